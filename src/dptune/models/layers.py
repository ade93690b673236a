"""What a backbone is made of: its architecture, and the layers that an adapter can be put on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from dptune.config.schema import AdapterConfig, ConfigError

Layers = dict[str, torch.nn.Module]
"""Layers by their name in the backbone."""


def model_type_of(model: Any) -> str:
    """`decoder`, `gpt2`, `encoder` (`...ForMaskedLM`) or `encoder_decoder`.

    `gpt2` stands for every decoder whose layers are transformers' `Conv1D`, which stores weights transposed.
    """
    backbone = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(backbone.config, "is_encoder_decoder", False):
        return "encoder_decoder"
    if type(backbone).__name__.endswith("ForMaskedLM"):
        return "encoder"
    return "gpt2" if any(isinstance(module, Conv1D) for module in backbone.modules()) else "decoder"


def check_rows_are_independent(model: torch.nn.Module) -> None:
    """Raises ConfigError for a backbone in which one record's gradient depends on the others of its batch."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"model: {name} is a batch norm, which mixes the records of a batch, so that no single one can be "
                "clipped; choose a backbone with layer norm or group norm"
            )
    config: Any = getattr(model, "config", None)
    dense = getattr(config, "num_local_experts", None) == 0  # Granite 4 keeps the coefficient all the same.
    for field, harmless in (("num_experts", 1), ("num_local_experts", 1), ("router_aux_loss_coef", 0)):
        if not dense and (getattr(config, field, None) or 0) > harmless:
            raise ConfigError(
                f"model: {field}={getattr(config, field)} is a mixture of experts, whose balance couples the records "
                "of a batch; choose a dense backbone"
            )
    for name, module in model.named_modules():
        # Not the whole model, which may be called after experts and have none (Granite 4).
        if re.search(r"(Experts|MoE|Moe|MoeBlock|SparseMLP)$", type(module).__name__):
            raise ConfigError(
                f"model: {name or type(module).__name__} is a mixture of experts, whose balance couples the records of "
                "a batch; choose a dense backbone"
            )


def widths(layer: torch.nn.Module) -> tuple[int, int]:
    """Number of inputs and outputs of a linear layer or an embedding."""
    weight: Any = layer.weight
    first, second = weight.shape
    return (first, second) if isinstance(layer, Conv1D | torch.nn.Embedding) else (second, first)


def output_head(model: Any) -> tuple[str, torch.nn.Module]:
    """The layer that makes logits, with its name."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head), head


def input_embeddings(model: Any) -> Layers:
    """The embeddings of tokens that the forward pass reads; T5 has one for each stack, with one weight."""
    first = model.get_input_embeddings()
    shared = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and module.weight is first.weight
    }
    return {name: module for name, module in shared.items() if module is not first or len(shared) == 1}


def linear_layers(model: torch.nn.Module) -> Layers:
    """All linear layers except for the output head."""
    head = output_head(model)[1]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }


def trainable_layers(model: Any, config: AdapterConfig) -> Layers:
    """The linear layers that are asked for, of those that the logits depend on.

    A pooler, a global attention that nothing asks for or a head for another task would be trained for nothing, and
    PEFT refuses those that fused kernels go round.

    Raises:
        ConfigError: when none is left.
    """
    skipped = BYPASSED if model.config.model_type in STATE_SPACES else ()
    layers = {name: layer for name, layer in linear_layers(model).items() if not name.endswith(skipped)}
    return used(model, chosen(model, layers, config))


STATE_SPACES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
"""Model types whose kernels read the weights of `BYPASSED` layers without calling them."""
BYPASSED = (".out_proj", ".conv1d")


def used(model: Any, layers: Layers) -> Layers:
    """Those of `layers` that the logits of a few tokens depend on.

    Raises:
        ConfigError: when there is none, or the backbone cannot read a few tokens.
    """
    marks: dict[str, torch.Tensor] = {}

    def mark(name: str) -> Any:
        def hook(layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            marks[name] = marks.get(name, torch.zeros((), device=output.device, requires_grad=True))
            return output + marks[name].to(output.dtype)

        return hook

    tokens = torch.tensor([[5, 6, 7, 8]], device=next(model.parameters()).device)
    inputs: dict[str, Any] = {} if model_type_of(model) == "encoder" else {"use_cache": False}
    if model_type_of(model) == "encoder_decoder":
        inputs["decoder_input_ids"] = tokens
    handles = [layer.register_forward_hook(mark(name)) for name, layer in layers.items()]
    try:
        with torch.enable_grad():
            logits = model(input_ids=tokens, **inputs).logits
            total = logits.float().sum()
            gradients = torch.autograd.grad(total, list(marks.values()), allow_unused=True) if marks else ()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model: a backbone of type {model.config.model_type} cannot read four tokens ({reason}); choose another"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    reached = {name for name, gradient in zip(marks, gradients, strict=True) if gradient is not None}
    if not reached:
        raise ConfigError(
            f"adapter.target_modules: the logits do not depend on {next(iter(layers))}, nor on another layer that is "
            "asked for; choose others, or null"
        )
    return {name: layer for name, layer in layers.items() if name in reached}


def norms(model: torch.nn.Module) -> Layers:
    """All normalisation layers with a weight; RMS norms have a class of their own in each backbone."""
    return {
        name: module
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    }


def blocks(model: torch.nn.Module) -> list[list[str]]:
    """Names of the transformer blocks, from input to output, of each stack; T5 has two stacks."""
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] in ("layers", "layer", "h", "block")
    ]
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    return [[f"{name}.{index}" for index, _ in enumerate(model.get_submodule(name).children())] for name in outer]


def in_blocks(model: torch.nn.Module, top_layers: int | None) -> list[str]:
    """Names of the blocks that carry an adapter: all, or the last `top_layers` of each stack.

    Raises:
        ConfigError: when a stack has fewer.
    """
    stacks = blocks(model)
    fewest = min((len(stack) for stack in stacks), default=0)
    if top_layers is not None and top_layers > fewest:
        raise ConfigError(f"adapter.top_layers={top_layers} is above the backbone's {fewest} layers; lower it")
    return [name for stack in stacks for name in (stack if top_layers is None else stack[-top_layers:])]


def chosen(model: torch.nn.Module, layers: Layers, config: AdapterConfig) -> Layers:
    """Those of `layers` that `adapter.target_modules` and `adapter.top_layers` ask for.

    Raises:
        ConfigError: when none is left.
    """
    found = layers
    if config.top_layers is not None:
        prefixes = tuple(f"{name}." for name in in_blocks(model, config.top_layers))
        found = {name: layer for name, layer in found.items() if name.startswith(prefixes)}
    suffixes = sorted({name.rpartition(".")[2] for name in found})
    if config.target_modules is not None:
        ends = tuple(f".{target}" for target in config.target_modules)
        found = {name: layer for name, layer in found.items() if f".{name}".endswith(ends)}
    if not found:
        options = f"choose from {', '.join(suffixes)}, or null" if suffixes else "choose another adapter"
        raise ConfigError(
            f"adapter.target_modules={config.target_modules} matches no layer of the backbone that "
            f"adapter={config.name} can be put on; {options}"
        )
    return found


def check_rank(layers: Layers, rank: int) -> None:
    """Raises ConfigError, naming the layer, when a factor of that rank would be wider than the layer."""
    for name, layer in layers.items():
        if rank > min(widths(layer)):
            raise ConfigError(
                f"hyperparameter.rank={rank} is above the width {min(widths(layer))} of {name}; lower it, or leave the "
                "layer out of adapter.target_modules"
            )


@dataclass(frozen=True)
class Sublayers:
    """Where attention and feed-forward network are in a block: patterns of names inside the block."""

    attention_output: str
    """The linear layer that ends self-attention."""
    feed_forward: str
    """The module that is called with the input of the feed-forward network."""
    feed_forward_output: str
    """The linear layer that ends it."""
    key_value: str
    """The linear layers that make keys and values of attention."""


_LLAMA = Sublayers(r"self_attn\.o_proj", "mlp", r"mlp\.down_proj", r"self_attn\.[kv]_proj")
_BERT = Sublayers(r"attention\.output\.dense", "output", r"output\.dense", r"attention\.self\.(key|value)")

SUBLAYERS: Mapping[str, Sublayers] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "gemma", "gemma2"), _LLAMA),
    "gpt2": Sublayers(r"attn\.c_proj", "mlp", r"mlp\.c_proj", r"attn\.c_attn"),
    "gpt_neox": Sublayers(r"attention\.dense", "mlp", r"mlp\.dense_4h_to_h", r"attention\.query_key_value"),
    **dict.fromkeys(("bert", "roberta"), _BERT),
    "t5": Sublayers(
        r"layer\.\d+\.SelfAttention\.o",
        r"layer\.\d+\.DenseReluDense",
        r"layer\.\d+\.DenseReluDense\.wo",
        r"layer\.\d+\.(SelfAttention|EncDecAttention)\.[kv]",
    ),
}
"""By transformers' model type. GPT-2 and NeoX make queries in the same layer as keys and values."""


def sublayers(model: Any, config: AdapterConfig) -> Sublayers:
    """Where attention and feed-forward network are in this backbone.

    Raises:
        ConfigError: naming the model type, when that is not known.
    """
    try:
        return SUBLAYERS[model.config.model_type]
    except KeyError:
        raise ConfigError(
            f"adapter={config.name} does not know the blocks of model type {model.config.model_type}, only of "
            f"{', '.join(SUBLAYERS)}; choose adapter=lora"
        ) from None


def matching(model: torch.nn.Module, pattern: str, config: AdapterConfig) -> Layers:
    """Modules whose name inside a block matches, in the blocks that carry the adapter."""
    found: Layers = {}
    for block in in_blocks(model, config.top_layers):
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if re.fullmatch(pattern, name.removeprefix(f"{block}.")):
                found[name] = module
    return found


def replace(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
