"""Architectures of transformers made tiny with random weights: what dptune trains on, as a table made by a command.

`python tests/architectures.py` writes the table of `src/dptune/models/README.md`; `tests/unit/test_architectures.py`
does the same of each.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from backbones_for_tests import BERT, COMMON, seeded
from peft import PeftModel

from dptune.config.schema import Config, ConfigError
from dptune.data.batches import collate, example_losses, physical_batches
from dptune.identity import run_id
from dptune.models import adapters
from dptune.models.backbones import CLASSES
from dptune.runs.setup import set_up, training_rows
from dptune.runs.training import AdapterTraining
from dptune.training.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dptune.data.batches import InputFormat
    from dptune.data.encoding import Encoded

WIDE = {**BERT, "hidden_size": 32, "intermediate_size": 48}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
GQA = {"num_key_value_heads": 1, "head_dim": 16}
GPT = {**COMMON, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}
STACKS = {
    **COMMON,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 1,
}
T5 = {**COMMON, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
STATE = {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
SSM = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    # Decoders.
    "Llama": ("LlamaForCausalLM", {**WIDE, **GQA}),
    "Mistral": ("MistralForCausalLM", {**WIDE, **HEADS, "sliding_window": 8}),
    "Ministral": ("MinistralForCausalLM", {**WIDE, **HEADS, "sliding_window": 8}),
    "Qwen2": ("Qwen2ForCausalLM", {**WIDE, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3ForCausalLM", {**WIDE, **GQA}),
    "Gemma": ("GemmaForCausalLM", {**WIDE, **GQA}),
    "Gemma2": ("Gemma2ForCausalLM", {**WIDE, **HEADS, "sliding_window": 8}),
    "Gemma3": ("Gemma3ForCausalLM", {**WIDE, **HEADS, "sliding_window": 8}),
    "Phi": ("PhiForCausalLM", WIDE),
    "Phi3": ("Phi3ForCausalLM", {**WIDE, "sliding_window": 8}),
    "OLMo": ("OlmoForCausalLM", WIDE),
    "OLMo2": ("Olmo2ForCausalLM", WIDE),
    "OLMo3": ("Olmo3ForCausalLM", {**WIDE, "sliding_window": 8}),
    "SmolLM3": ("SmolLM3ForCausalLM", {**WIDE, "num_key_value_heads": 2}),
    "StableLM": ("StableLmForCausalLM", {**WIDE, "num_key_value_heads": 2}),
    "Starcoder2": ("Starcoder2ForCausalLM", {**WIDE, "num_key_value_heads": 2, "sliding_window": 8}),
    "Cohere": ("CohereForCausalLM", WIDE),
    "Cohere2": ("Cohere2ForCausalLM", {**WIDE, "num_key_value_heads": 2, "sliding_window": 8}),
    "Granite": ("GraniteForCausalLM", WIDE),
    "Helium": ("HeliumForCausalLM", {**WIDE, **HEADS}),
    "Nemotron": ("NemotronForCausalLM", {**WIDE, **HEADS}),
    "GLM": ("GlmForCausalLM", {**WIDE, **HEADS}),
    "GLM4": ("Glm4ForCausalLM", {**WIDE, **HEADS}),
    "EXAONE4": ("Exaone4ForCausalLM", {**WIDE, **HEADS, "sliding_window": 8}),
    "Arcee": ("ArceeForCausalLM", {**WIDE, **HEADS}),
    "Apertus": ("ApertusForCausalLM", {**WIDE, **HEADS}),
    "SeedOSS": ("SeedOssForCausalLM", {**WIDE, **HEADS}),
    "Persimmon": ("PersimmonForCausalLM", WIDE),
    "DiffLlama": ("DiffLlamaForCausalLM", {**WIDE, **HEADS}),
    "GPT-2": ("GPT2LMHeadModel", GPT),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", GPT),
    "GPT-J": ("GPTJForCausalLM", {**GPT, "rotary_dim": 8}),
    "GPT-Neo": (
        "GPTNeoForCausalLM",
        {
            **COMMON,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 128,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
    ),
    "GPT-NeoX": ("GPTNeoXForCausalLM", WIDE),
    "CodeGen": ("CodeGenForCausalLM", {**GPT, "n_head": 4, "rotary_dim": 4}),
    "OPT": (
        "OPTForCausalLM",
        {**COMMON, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"max_position_embeddings": 128, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "BLOOM": ("BloomForCausalLM", {**COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "Falcon": ("FalconForCausalLM", WIDE),
    "MPT": ("MptForCausalLM", {**COMMON, "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128}),
    "XGLM": (
        "XGLMForCausalLM",
        {**COMMON, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 2, "max_position_embeddings": 128},
    ),
    "BioGPT": ("BioGptForCausalLM", WIDE),
    "CTRL": ("CTRLLMHeadModel", {**GPT, "dff": 48}),
    # State spaces and hybrids.
    "Mamba": ("MambaForCausalLM", STATE),
    "Mamba2": ("Mamba2ForCausalLM", {**STATE, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "FalconMamba": ("FalconMambaForCausalLM", STATE),
    "RWKV": ("RwkvForCausalLM", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    "RecurrentGemma": (
        "RecurrentGemmaForCausalLM",
        {**WIDE, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8},
    ),
    "LFM2": ("Lfm2ForCausalLM", {**WIDE, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}),
    "Falcon-H1": ("FalconH1ForCausalLM", {**WIDE, **HEADS, **SSM, "mamba_chunk_size": 8}),
    "Bamba": (
        "BambaForCausalLM",
        {**WIDE, "num_key_value_heads": 2, "attn_layer_indices": [1]}
        | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    ),
    "Granite 4": (
        "GraniteMoeHybridForCausalLM",
        {**WIDE, "num_key_value_heads": 2, "num_local_experts": 0, "shared_intermediate_size": 48}
        | {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
        | {"mamba_n_groups": 1, "mamba_chunk_size": 8},
    ),
    # Encoders.
    "BERT": ("BertForMaskedLM", WIDE),
    "RoBERTa": ("RobertaForMaskedLM", WIDE),
    "XLM-RoBERTa": ("XLMRobertaForMaskedLM", WIDE),
    "CamemBERT": ("CamembertForMaskedLM", WIDE),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        {**COMMON, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 128},
    ),
    "ALBERT": ("AlbertForMaskedLM", {**WIDE, "embedding_size": 16}),
    "ELECTRA": ("ElectraForMaskedLM", {**WIDE, "embedding_size": 16}),
    "DeBERTa": (
        "DebertaForMaskedLM",
        {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
    ),
    "DeBERTa-v2": (
        "DebertaV2ForMaskedLM",
        {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    ),
    "MPNet": ("MPNetForMaskedLM", WIDE),
    "ModernBERT": ("ModernBertForMaskedLM", {**WIDE, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 1}),
    "ERNIE": ("ErnieForMaskedLM", WIDE),
    "MegatronBERT": ("MegatronBertForMaskedLM", WIDE),
    "MobileBERT": (
        "MobileBertForMaskedLM",
        {**WIDE, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    "ConvBERT": (
        "ConvBertForMaskedLM",
        {**WIDE, "embedding_size": 32, "num_attention_heads": 4, "head_ratio": 2} | {"initializer_range": 0.2},
    ),
    "RoFormer": ("RoFormerForMaskedLM", {**WIDE, "embedding_size": 16}),
    "RemBERT": ("RemBertForMaskedLM", {**WIDE, "input_embedding_size": 16, "output_embedding_size": 16}),
    "ESM": ("EsmForMaskedLM", {**WIDE, "mask_token_id": 3, "position_embedding_type": "rotary"}),
    "Longformer": ("LongformerForMaskedLM", {**WIDE, "attention_window": 8}),
    "BigBird": ("BigBirdForMaskedLM", {**WIDE, "attention_type": "original_full"}),
    "FNet": ("FNetForMaskedLM", WIDE),
    "SqueezeBERT": ("SqueezeBertForMaskedLM", {**WIDE, "embedding_size": 32}),
    "Nystromformer": ("NystromformerForMaskedLM", {**WIDE, "num_landmarks": 4, "segment_means_seq_len": 16}),
    "YOSO": ("YosoForMaskedLM", {**WIDE, "use_expectation": True}),
    "XMOD": ("XmodForMaskedLM", {**WIDE, "languages": ["en_XX"], "default_language": "en_XX"}),
    "Funnel": (
        "FunnelForMaskedLM",
        {**COMMON, "d_model": 32, "d_inner": 48, "n_head": 2, "d_head": 16, "block_sizes": [1, 1]},
    ),
    # Encoder-decoders.
    "T5": ("T5ForConditionalGeneration", T5),
    "mT5": ("MT5ForConditionalGeneration", T5),
    "UMT5": ("UMT5ForConditionalGeneration", T5),
    "LongT5": ("LongT5ForConditionalGeneration", {**T5, "local_radius": 4}),
    "BART": ("BartForConditionalGeneration", STACKS),
    "mBART": ("MBartForConditionalGeneration", STACKS),
    "Pegasus": ("PegasusForConditionalGeneration", STACKS),
    "Marian": ("MarianMTModel", STACKS),
    "Blenderbot": ("BlenderbotForConditionalGeneration", STACKS),
    "M2M100": ("M2M100ForConditionalGeneration", STACKS),
    "PLBart": ("PLBartForConditionalGeneration", STACKS),
    "LED": (
        "LEDForConditionalGeneration",
        {key: value for key, value in STACKS.items() if key != "max_position_embeddings"}
        | {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128, "attention_window": 8},
    ),
    "ProphetNet": (
        "ProphetNetForConditionalGeneration",
        {**COMMON, "hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_encoder_layers": 2}
        | {"num_decoder_layers": 2, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
        | {"max_position_embeddings": 128, "decoder_start_token_id": 1, "init_std": 0.2},
    ),
    # Mixtures of experts.
    "Mixtral": ("MixtralForCausalLM", {**WIDE, **HEADS, "num_local_experts": 4}),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", {**WIDE, **HEADS, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {**WIDE, **HEADS, **EXPERTS}),
    "OLMoE": ("OlmoeForCausalLM", {**WIDE, **EXPERTS}),
    "GraniteMoE": ("GraniteMoeForCausalLM", {**WIDE, **EXPERTS}),
    "PhiMoE": ("PhimoeForCausalLM", {**WIDE, **HEADS, **EXPERTS}),
    "GPT-OSS": ("GptOssForCausalLM", {**WIDE, **HEADS, **EXPERTS, "sliding_window": 8}),
    "DeepSeek-V2": (
        "DeepseekV2ForCausalLM",
        {**WIDE, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    ),
    "DeepSeek-V3": (
        "DeepseekV3ForCausalLM",
        {**WIDE, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
        | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 2, "first_k_dense_replace": 1},
    ),
    "ERNIE4.5-MoE": (
        "Ernie4_5_MoeForCausalLM",
        {**WIDE, "num_key_value_heads": 2, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    ),
    "Jamba": (
        "JambaForCausalLM",
        {**WIDE, "num_key_value_heads": 2, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"mamba_d_state": 8, "use_mamba_kernels": False},
    ),
    "SwitchTransformers": ("SwitchTransformersForConditionalGeneration", {**T5, "num_experts": 4}),
    "NLLB-MoE": ("NllbMoeForConditionalGeneration", {**STACKS, "num_experts": 4, "expert_capacity": 4}),
}
"""Class of transformers and the settings that make it tiny, by the name that people know."""


def build(name: str) -> PreTrainedModel:
    """A random model of an architecture, with its class in its config as `save_pretrained` writes it."""
    kind, settings = ARCHITECTURES[name]
    model = seeded(kind, 0, **settings)
    model.config.architectures = [kind]
    return model


def save_backbone(name: str, tokenizer: Any, folder: Path) -> Path:
    """A folder with a tiny backbone of an architecture, and its tokenizer."""
    model = build(name)
    model.save_pretrained(folder)
    made = copy.deepcopy(tokenizer)
    if type(model).__name__.endswith("ForMaskedLM"):
        # MPNet takes token 1 for padding, whatever its config says.
        made.cls_token, made.mask_token, made.eos_token = made.convert_ids_to_tokens([2, 3, 4])
    made.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture."""

    engine: str
    error: float
    """Largest difference of a loss."""


def trained(name: str, tokenizer: Any, folder: Path, adapter: str = "lora") -> Outcome:
    """Three private steps of LoRA under the default engine, the adapter opened by PEFT, losses row by row.

    Raises:
        ConfigError: when the architecture is refused.
    """
    path = save_backbone(name, tokenizer, folder / "backbone")
    config = Config()
    config.model.name, config.model.path, config.adapter.name = "local", str(path), adapter
    config.data.tasks = ["team", "urgency"]
    config.data.train_size, config.data.validation_size, config.data.test_size = 200, 20, 20
    config.hyperparameter.steps, config.hyperparameter.warmup_steps = 3, 1
    config.hyperparameter.expected_batch_size, config.hyperparameter.rank = 16, 2
    config.hyperparameter.learning_rate = 0.05
    config.environment.sequence_length, config.compute.physical_batch_size = 24, 4
    config.compute.output_root, config.compute.cache_dir = str(folder / "outputs"), str(folder / "cache")
    setup = set_up(config, run_id(config))
    AdapterTraining(config, setup, Ranks(), None).run()
    adapters.save(setup.model, folder / "adapter")
    layout = setup.backbone.layout
    rows = training_rows(setup, 24, "plain")[:12]
    model = setup.model.eval()
    opened = PeftModel.from_pretrained(CLASSES[layout.architecture].from_pretrained(path), folder / "adapter").eval()
    worst = 0.0
    with torch.no_grad():
        for piece in physical_batches(rows, setup.path.ladder):
            own = [rows[at] for at in piece.positions]
            together = example_losses(model, collate(own, layout, piece.shape))
            alone = [loss_without_padding(opened, row, layout) for row in own]
            worst = max(worst, float((together[: len(own)] - torch.stack(alone)).abs().max()))
    return Outcome(setup.path.engine, worst)


def loss_without_padding(model: Any, row: Encoded, layout: InputFormat) -> torch.Tensor:
    """The loss of one row as transformers computes it: all of its tokens, and nothing else."""
    prompt, response = row.tokens[: len(row.tokens) - row.response], row.tokens[len(row.tokens) - row.response :]
    if layout.architecture == "encoder_decoder":
        shifted = (layout.start, *response[:-1])
        logits = model(input_ids=_row(*prompt, layout.end), decoder_input_ids=_row(*shifted)).logits[0]
    elif layout.architecture == "encoder":
        response = response[:-1] if response[-1] == layout.end and len(response) > 1 else response
        shown = (*layout.prefix, *prompt, *[layout.mask] * len(response))
        ends = row.tokens[len(prompt) + len(response) :]
        logits = model(input_ids=_row(*shown, *ends)).logits[0]
        # What stands before the text is a soft prompt.
        logits = logits[-len(response) - len(ends) :][: len(response)]
    else:
        logits = model(input_ids=_row(*row.tokens)).logits[0, -len(response) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(response))


def _row(*tokens: int | None) -> torch.Tensor:
    return torch.tensor([tokens])


EXPERTS_REASON = "mixture of experts"
PADDING_REASON = "reads padding"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("ConvBERT", "FNet", "YOSO", "Funnel", "ProphetNet"), PADDING_REASON),
    "Nystromformer": "cannot read four tokens",
    **dict.fromkeys(("Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "GraniteMoE", "PhiMoE"), EXPERTS_REASON),
    **dict.fromkeys(("GPT-OSS", "DeepSeek-V2", "DeepSeek-V3", "ERNIE4.5-MoE", "Jamba"), EXPERTS_REASON),
    **dict.fromkeys(("SwitchTransformers", "NLLB-MoE"), EXPERTS_REASON),
}
"""What is refused, and words of the reason."""
README = Path(__file__).parents[1] / "src" / "dptune" / "models" / "README.md"
BEGIN, END = "<!-- made by `make architectures` -->\n", "<!-- end -->\n"


def table(tokenizer: Any) -> str:
    """A Markdown table of all architectures: engines that passed the check, or why there is none."""
    rows, worst = [], 0.0
    for name, (kind, _) in ARCHITECTURES.items():
        cells = []
        for adapter in ("lora", "prompt"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcome = trained(name, tokenizer, Path(folder), adapter)
                except ConfigError as error:
                    if adapter == "lora" and REFUSED[name] not in str(error):
                        raise
                    cells.append(f"no: {REFUSED[name]}" if adapter == "lora" else "no")
                else:
                    cells.append(outcome.engine)
                    worst = max(worst, outcome.error)
        rows.append(f"| {name} | `{kind}` | {cells[0]} | {cells[1]} |\n")
    head = "| architecture | class of transformers | `lora` | `prompt` |\n|---|---|---|---|\n"
    return f"Largest difference of a loss: {worst:.1e}.\n\n{head}{''.join(rows)}"


if __name__ == "__main__":
    from conftest import make_tokenizer

    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}{table(make_tokenizer())}{END}{rest.partition(END)[2]}", encoding="utf-8")
