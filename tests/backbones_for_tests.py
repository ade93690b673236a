"""Random backbones of two layers and width 16, one of each architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dptune.data.batches import InputFormat

COMMON = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
BERT = {
    **COMMON,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def seeded(kind: str, seed: int, **settings: Any) -> PreTrainedModel:
    """A random model of a transformers class."""
    import torch
    import transformers

    made = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return made(made.config_class(**settings)).eval()


def tiny_llama(seed: int = 0) -> PreTrainedModel:
    """Llama: RMS norms, rotary positions, no biases."""
    settings = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    return seeded("LlamaForCausalLM", seed, **settings)


def tiny_qwen2(seed: int = 0) -> PreTrainedModel:
    """Two heads share keys and values; queries, keys and values have biases; the head is tied."""
    return seeded("Qwen2ForCausalLM", seed, **BERT, num_key_value_heads=1, tie_word_embeddings=True)


def tiny_gpt2(seed: int = 0) -> PreTrainedModel:
    """Conv1D layers, learned positions, tied head."""
    return seeded("GPT2LMHeadModel", seed, **COMMON, n_positions=128, n_embd=16, n_inner=24, n_layer=2, n_head=2)


def tiny_bert(seed: int = 0) -> PreTrainedModel:
    """An encoder."""
    return seeded("BertForMaskedLM", seed, **BERT)


def tiny_roberta(seed: int = 0) -> PreTrainedModel:
    """An encoder whose positions start after the padding's."""
    return seeded("RobertaForMaskedLM", seed, **BERT)


def tiny_t5(seed: int = 0) -> PreTrainedModel:
    """An encoder-decoder with one embedding for both stacks."""
    return seeded(
        "T5ForConditionalGeneration",
        seed,
        **COMMON,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        is_gated_act=False,
    )


BACKBONES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "t5": tiny_t5,
}


def layout_of(name: str) -> InputFormat:
    """How a backbone of `BACKBONES` reads an example."""
    from dptune.data.batches import InputFormat

    if name == "t5":
        return InputFormat(pad=0, architecture="encoder_decoder", end=1, start=0, first_position=None)
    if name in ("bert", "roberta"):
        return InputFormat(
            pad=0, architecture="encoder", prefix=(2,), end=1, mask=3, first_position=int(name == "roberta")
        )
    return InputFormat(pad=0)
