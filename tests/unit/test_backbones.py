"""How a backbone and its tokenizer are read: beginning of a text, vocabulary, positions."""

from pathlib import Path
from typing import Any

import pytest
from backbones_for_tests import BACKBONES, BERT, COMMON, seeded
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from dptune.config.checks import with_values
from dptune.config.schema import SHIPPED, Config, ConfigError, ModelConfig
from dptune.data.batches import Ladder, collate, example_losses
from dptune.data.encoding import Encoded, encode_examples
from dptune.data.schema import Example
from dptune.models.backbones import Backbone, beginning_of, input_format_of, load_backbone, positions_of
from dptune.runs import setup
from dptune.runs.setup import check_length

EXAMPLE = Example("team", "which team ?", "reset my code", None, "billing", None, "train")


@pytest.fixture
def with_bos(tokenizer: Any, tmp_path: Path) -> Any:
    """The tokenizer as Llama's: its own call puts <unk>, taken for <s>, before a text."""
    tokenizer.save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path, bos_token="<unk>")
    backend = made.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<unk> $A", pair="<unk> $A <unk> $B", special_tokens=[("<unk>", made.bos_token_id)]
    )
    return made


def test_a_text_begins_as_the_tokenizers_own_call_begins_it(with_bos: Any, tokenizer: Any) -> None:
    assert beginning_of(with_bos) == (with_bos.bos_token_id,) and beginning_of(tokenizer) == ()
    layout = input_format_of(BACKBONES["llama"](), with_bos)
    (row,) = encode_examples([EXAMPLE], with_bos, 64, begin=layout.beginning("plain"))
    prompt = with_bos("which team ?\nreset my code\n>")["input_ids"]
    assert list(row.tokens[: len(prompt)]) == prompt and prompt.count(with_bos.bos_token_id) == 1
    assert layout.beginning("chat") == ()


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_the_shipped_backbones_were_pretrained_without_a_beginning(name: str) -> None:
    assert beginning_of(AutoTokenizer.from_pretrained(SHIPPED / name)) == ()


def test_an_encoder_begins_with_its_prefix_alone(with_bos: Any) -> None:
    with_bos.cls_token, with_bos.mask_token = "<unk>", "<eos>"
    layout = input_format_of(as_saved(BACKBONES["roberta"]()), with_bos)
    assert layout.prefix == (with_bos.cls_token_id,) and layout.beginning("plain") == ()


def test_a_tokenizer_beyond_the_embedding_is_refused_by_name(tokenizer: Any, tmp_path: Path) -> None:
    seeded("LlamaForCausalLM", 0, **BERT).save_pretrained(tmp_path)
    longer = AutoTokenizer.from_pretrained(_saved(tokenizer, tmp_path))
    longer.add_tokens([f"<new{at}>" for at in range(300)])
    longer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer goes up to token \d+ .* the backbone has 300 embeddings"):
        load_backbone(
            ModelConfig(name="local", path=str(tmp_path)), precision="float32", device="cpu", cache_dir=tmp_path
        )


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def checked(model: Any, tokenizer: Any, length: int, adapter: str = "lora") -> None:
    config = Config()
    config.environment.sequence_length, config.adapter.name, config.adapter.virtual_tokens = length, adapter, 20
    check_length(config, Backbone(model, tokenizer, "", input_format_of(model, tokenizer)))


@pytest.mark.parametrize(
    ("name", "largest"),
    [("llama", 128), ("gpt2", 128), ("bert", 127), ("roberta", 126), ("bart", 126)],
)
def test_rows_beyond_the_last_position_are_refused_naming_the_largest_that_fits(
    with_bos: Any, name: str, largest: int
) -> None:
    """The largest that is named can be computed, and with learned positions none beyond."""
    with_bos.cls_token, with_bos.mask_token = "<unk>", "<eos>"
    model = as_saved(tiny_bart() if name == "bart" else BACKBONES[name]())
    checked(model, with_bos, largest)
    with pytest.raises(ConfigError, match=f"beyond the 128 positions of model=.*at most {largest} fits"):
        checked(model, with_bos, largest + 1)
    layout = input_format_of(model, with_bos)

    def widest(length: int) -> bool:
        batch = collate([Encoded((5,) * length, 2)], layout, Ladder(length, 1, layout).shapes[-1])
        return bool(example_losses(model, batch).isfinite().all())

    assert widest(largest)
    if name != "llama":
        with pytest.raises((IndexError, RuntimeError)):
            widest(largest + 1)


def test_a_soft_prompt_takes_positions_too(tokenizer: Any) -> None:
    model = BACKBONES["gpt2"]()
    checked(model, tokenizer, 108, "prompt")
    checked(model, tokenizer, 120, "lora")
    with pytest.raises(ConfigError, match="sequence_length=109 and adapter.virtual_tokens=20: .* at most 108 fits"):
        checked(model, tokenizer, 109, "prompt")


def test_relative_positions_have_no_end(tokenizer: Any) -> None:
    assert positions_of(BACKBONES["t5"]().config) is None
    checked(BACKBONES["t5"](), tokenizer, 100_000)


def as_saved(model: Any) -> Any:
    """The model with the class in its config, as `save_pretrained` writes it."""
    model.config.architectures = [type(model).__name__]
    return model


def tiny_bart() -> Any:
    width = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 128}
    heads = {f"{stack}_attention_heads": 2 for stack in ("encoder", "decoder")}
    wide = {f"{stack}_ffn_dim": 24 for stack in ("encoder", "decoder")}
    return seeded("BartForConditionalGeneration", 0, **COMMON, **width, **heads, **wide, decoder_start_token_id=1)


@pytest.mark.parametrize(
    ("values", "kernel"),
    [
        ({}, "sdpa"),
        ({"environment.precision": "bfloat16"}, "eager"),
        ({"environment.precision": "bfloat16", "environment.sequence_length": 512}, "sdpa"),
    ],
)
def test_attention_on_a_cpu_in_16_bits_takes_no_fused_kernel(values: dict[str, object], kernel: str) -> None:
    config = with_values(Config(), [("model.name", "nano"), *values.items()])
    assert setup.load_backbone(config).model.config._attn_implementation == kernel  # type: ignore[union-attr]
