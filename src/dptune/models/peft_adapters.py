"""Adapters that PEFT provides, and LoRA's relatives that are stored as its LoRA: each a function that attaches one."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.boft import layer as boft_layer
from peft.tuners.loha.layer import Linear as LoHaLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from dptune.config.schema import AdapterConfig, ConfigError
from dptune.models.layers import (
    Layers,
    check_rank,
    chosen,
    input_embeddings,
    matching,
    model_type_of,
    norms,
    output_head,
    sublayers,
    trainable_layers,
    widths,
)
from dptune.models.soft_prompts import SoftPromptModel, attach_soft_prompt

TASK_TYPES = {"decoder": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "encoder": None, "encoder_decoder": "SEQ_2_SEQ_LM"}
"""PEFT has no task type for masked language models; without one it leaves the forward pass as it is."""

PROMPT_TASK_TYPES = {**TASK_TYPES, "encoder": "FEATURE_EXTRACTION"}
"""With which it puts prompts before an encoder's input."""


def lora(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int, *, dora: bool = False) -> PeftModel:
    """LoRA (arXiv:2106.09685): W + alpha / rank * B A; B starts at zero, so that training starts at the backbone."""
    layers = _linear(model, config, rank)
    if config.embeddings:
        name, head = output_head(model)
        extra = {**input_embeddings(model), name: head}
        check_rank(extra, rank)
        layers |= extra
    return _wrap(
        model, layers, peft.LoraConfig, r=rank, lora_alpha=config.alpha, use_rslora=config.rslora, use_dora=dora
    )


def dora(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """DoRA (arXiv:2402.09353): LoRA on the direction of each weight, and its magnitude by output."""
    return lora(model, config, rank, steps, dora=True)


def ffa_lora(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """FFA-LoRA (arXiv:2403.12313): LoRA whose random factor A is public and frozen, so that noise stays linear."""
    adapted = lora(model, config, rank, steps)
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return adapted


def lora_xs(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """LoRA-XS (arXiv:2405.17604): W + alpha / rank * B R A with B = U S and A = V^T of W's truncated SVD, frozen.

    Only R, rank x rank, is trained. It starts at zero, not at the paper's noise of 1e-5: B and A are not zero, so that
    it has a gradient all the same.
    """
    adapted = lora(model, config, rank, steps)
    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight.detach().float()
        if layer.fan_in_fan_out:
            weight = weight.T
        # Ten power iterations on a few more columns than are kept: the leading vectors to rounding.
        left, values, right = torch.svd_lowrank(weight, q=min(rank + 10, *weight.shape), niter=10)
        down, up = layer.lora_A["default"], layer.lora_B["default"]
        down.weight.data.copy_(right[:, :rank].T)
        up.weight.data.copy_(left[:, :rank] * values[:rank])
        for factor in (down, up):
            factor.requires_grad_(False)
        latent = torch.nn.Linear(rank, rank, bias=False, device=weight.device)
        torch.nn.init.zeros_(latent.weight)
        layer.lora_B["default"] = torch.nn.Sequential(OrderedDict(latent=latent, up=up))
    return adapted


@dataclass(frozen=True)
class TwoSided:
    """A layer of LoRA-XS, as whoever finds bases for it sees it."""

    layer: Any

    @property
    def weight(self) -> torch.nn.Parameter:
        """The frozen weight as it is stored."""
        weight: torch.nn.Parameter = self.layer.get_base_layer().weight
        return weight

    @property
    def rank(self) -> int:
        """Columns of its bases."""
        return int(self.layer.lora_A["default"].out_features)

    @property
    def factors(self) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """The frozen ones: [rank, in] and [out, rank]."""
        return self.layer.lora_A["default"].weight, self.layer.lora_B["default"].up.weight

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """A tensor that is stored as the weight is, as [out, in]."""
        return stored.T if self.layer.fan_in_fan_out else stored

    @torch.no_grad()
    def set_bases(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Put the columns of `left` [out, rank] and `right` [in, rank] in the place of the frozen factors."""
        down, up = self.factors
        up.copy_(left)
        down.copy_(right.T)


def two_sided_layers(model: torch.nn.Module) -> list[TwoSided]:
    """The layers of LoRA-XS."""
    return [TwoSided(module) for module in model.modules() if isinstance(module, LoraLayer)]


def frozen_factors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The factors of LoRA that are not trained, by name."""
    return {
        name: value
        for name, value in model.named_parameters()
        if not value.requires_grad and (".lora_A." in name or ".lora_B." in name)
    }


def adalora(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """AdaLoRA (arXiv:2303.10512): B E A with diagonal E, whose rank starts half above and falls to the mean `rank`.

    The schedule follows the steps: a tenth before the first cut, three tenths after the last one. Its orthogonality
    penalty is left out: it is part of PEFT's own loss, which is not used because it is no sum over examples.
    """
    layers = _linear(model, config, rank)
    return _wrap(
        model,
        layers,
        peft.AdaLoraConfig,
        init_r=rank + (rank + 1) // 2,
        target_r=rank,
        lora_alpha=config.alpha,
        total_step=max(steps, 2),
        tinit=steps // 10,
        tfinal=3 * steps // 10,
        deltaT=max(1, steps // 50),
    )


def reallocate(model: torch.nn.Module, step: int, released: Mapping[str, torch.Tensor]) -> None:
    """Move AdaLoRA's ranks to where the released gradients, and nothing else, show sensitivity: post-processing."""
    adapted: Any = model
    parameters = dict(model.named_parameters())
    try:
        for name, gradient in released.items():
            parameters[name].grad = gradient.to(parameters[name].device, parameters[name].dtype)
        adapted.base_model.update_and_allocate(step + 1)
    finally:
        for name in released:
            parameters[name].grad = None


def vera(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """VeRA (arXiv:2310.11454): random factors that all layers share; two scaling vectors of each layer are trained."""
    # A rank above the widths is usual here: the factors are not trained.
    layers = trainable_layers(model, config)
    return _wrap(model, layers, peft.VeraConfig, r=rank, projection_prng_key=_seed(), save_projection=True)


def ia3(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """IA3 (arXiv:2205.05638): scales of keys, values and the hidden units of the feed-forward network.

    Where queries, keys and values are one layer (GPT-2, NeoX) queries are scaled, too, as PEFT does.
    """
    where = sublayers(model, config)
    hidden = matching(model, where.feed_forward_output, config)
    layers = chosen(model, matching(model, where.key_value, config) | hidden, config)
    return _wrap(model, layers, peft.IA3Config, feedforward_modules=sorted(hidden))


def loha(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """LoHa (arXiv:2108.06098): the elementwise product of two low-rank matrices."""
    layers = _linear(model, config, rank)
    adapted = _wrap(model, layers, peft.LoHaConfig, r=rank, alpha=config.alpha)
    for module in adapted.modules():
        if isinstance(module, LoHaLinear):
            module.__class__ = PlainLoHaLinear
    return adapted


class PlainLoHaLinear(LoHaLinear):
    """PEFT's layer without its own backward pass, for which torch.func has no rule."""

    def get_delta_weight(self, adapter_name: str, *, apply_rank_dropout: bool = False) -> torch.Tensor:
        """What is added to the weight [out, in]."""
        first = self.hada_w1_a[adapter_name] @ self.hada_w1_b[adapter_name]
        second = self.hada_w2_a[adapter_name] @ self.hada_w2_b[adapter_name]
        return first * second * self.scaling[adapter_name]


def lokr(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """LoKr (arXiv:2309.14859): a Kronecker product, whose larger factor has low rank if that is smaller."""
    layers = trainable_layers(model, config)
    return _wrap(model, layers, peft.LoKrConfig, r=rank, alpha=config.alpha)


def oft(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """OFT (arXiv:2306.07280): rotates blocks of each layer's inputs; see `block_size`."""
    layers = trainable_layers(model, config)
    return _wrap(model, layers, peft.OFTConfig, r=0, oft_block_size=block_size(layers, rank))


def boft(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """BOFT (arXiv:2311.06243) with one butterfly factor: block rotations and a scale of each output."""
    layers = trainable_layers(model, config)
    return _wrap(model, layers, peft.BOFTConfig, boft_block_size=block_size(layers, rank), boft_n_butterfly_factor=1)


def block_size(layers: Layers, rank: int) -> int:
    """Size of rotated blocks: the largest that divides the inputs of all layers and is not above the rank (or 2).

    Raises:
        ConfigError: when no size above 1 does.
    """
    common = math.gcd(*(widths(layer)[0] for layer in layers.values()))
    size = max(size for size in range(1, max(rank, 2) + 1) if common % size == 0)
    if size == 1:
        raise ConfigError(
            f"hyperparameter.rank={rank}: no block of 2 to {max(rank, 2)} divides the inputs of all layers (greatest "
            f"common divisor {common}); choose other adapter.target_modules or adapter=lora"
        )
    return size


def fourierft(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """FourierFT (arXiv:2405.03003): rank times the smallest width many Fourier coefficients of each update."""
    layers = _linear(model, config, rank)
    count = rank * min(min(widths(layer)) for layer in layers.values())
    return _wrap(model, layers, peft.FourierFTConfig, n_frequency=count, random_loc_seed=_seed(), init_weights=True)


def ln_tuning(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """LN-tuning (arXiv:2312.11420): weights, and biases if there are any, of the normalisation layers."""
    return _wrap(model, chosen(model, norms(model), config), peft.LNTuningConfig)


def prompt(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """Prompt tuning (arXiv:2104.08691): embeddings before the input, as large as the backbone's at first."""
    adapted = _soft_prompt(model, peft.PromptTuningConfig, num_virtual_tokens=config.virtual_tokens)
    spread = float(_backbone(adapted).get_input_embeddings().weight.float().std())
    torch.nn.init.normal_(adapted.prompt_encoder["default"].embedding.weight, std=spread)
    return adapted


def p_tuning(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """P-tuning (arXiv:2103.10385): embeddings before the input that a small network makes; only they are saved."""
    return _soft_prompt(
        model,
        peft.PromptEncoderConfig,
        num_virtual_tokens=config.virtual_tokens,
        encoder_hidden_size=config.bottleneck,
    )


def prefix(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> PeftModel:
    """Prefix tuning (arXiv:2101.00190) without its network: keys and values before those of each self-attention.

    Of an encoder-decoder the decoder has them. PEFT's own forward pass makes them once a row and shifts positions.
    """
    architecture, backbone = model_type_of(model), cast(Any, model).config
    shape = {}
    if architecture == "encoder_decoder":
        # PEFT would take the encoder's depth, and the hidden width where heads may be wider or narrower.
        shape = {"num_layers": backbone.num_decoder_layers, "token_dim": backbone.num_heads * backbone.d_kv}
    settings = peft.PrefixTuningConfig(
        task_type=PROMPT_TASK_TYPES[architecture], num_virtual_tokens=config.virtual_tokens, **shape
    )
    with quiet():
        adapted: Any = peft.get_peft_model(model, settings)
    torch.nn.init.normal_(adapted.prompt_encoder["default"].embedding.weight, std=0.02)
    return adapted


def save(model: PeftModel, folder: Path) -> None:
    """Write a folder that `PeftModel.from_pretrained` opens; LoRA-XS is written as LoRA with B R for B."""
    config: Any = model.peft_config["default"]
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)
    pattern = getattr(config, "rank_pattern", None)
    if config.peft_type == "ADALORA" and pattern is not None:
        config.rank_pattern = _rows_to_keep(model, pattern)
    with quiet():
        # Without embeddings to save there is nothing that PEFT would ask the Hub about.
        model.save_pretrained(
            str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=_with_latents_merged(model)
        )
    if pattern is not None:
        config.rank_pattern = pattern
    if tied := tied_layers(model):
        _untie(folder, tied)


def tied_layers(model: PeftModel) -> Layers:
    """Layers with an adapter whose frozen weight is that of another such layer, but for the first one of each weight.

    PEFT merges into a weight in place: each of them would get what was learned for the others.
    """
    seen: set[int] = set()
    found: Layers = {}
    for name, layer in _backbone(model).named_modules():
        if isinstance(layer, LoraLayer):
            # A rounded layer has no parameter, and makes its weight anew at each use.
            weight = dict(layer.get_base_layer().named_parameters(recurse=False)).get("weight")
            if weight is not None and id(weight) in seen:
                found[name] = cast(torch.nn.Module, layer)
            seen.add(id(weight))
    return found


def refuse_merging_ties(model: PeftModel) -> None:
    """Make PEFT's merge into a weight that layers with an adapter share an error; what `save` wrote can be merged."""

    def refuse() -> None:
        raise ValueError(
            "embeddings and output head share one weight, into which the adapters of both cannot be merged; save the "
            "adapter, which unties them, and merge what was saved (dptune merge)"
        )

    if tied_layers(model):
        cast(Any, model.base_model)._check_merge_allowed = refuse


@torch.no_grad()
def _untie(folder: Path, tied: Layers) -> None:
    """In a saved adapter, replace what was learned for tied layers by the whole layer, which PEFT keeps apart."""
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(weights), json.loads(settings.read_text(encoding="utf-8"))
    for name, layer in tied.items():
        prefix = f"base_model.model.{name}."
        tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{prefix}lora_")}
        alone: Any = copy.deepcopy(layer)
        alone.merge()
        merged = alone.get_base_layer().state_dict()
        tensors |= {f"{prefix}{key}": value.detach().cpu().contiguous().clone() for key, value in merged.items()}
    config["target_modules"] = sorted(set(config["target_modules"]) - tied.keys())
    config["modules_to_save"] = sorted(tied)
    save_file(tensors, weights, metadata={"format": "pt"})
    settings.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def load_peft_adapter(model: torch.nn.Module, folder: Path) -> PeftModel:
    """A fresh backbone with the adapter of such a folder.

    Raises:
        ConfigError: when there is none, or it does not fit.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} holds no adapter: adapter_config.json is missing; give the folder of a saved one")
    try:
        with quiet():
            config = PeftConfig.from_pretrained(str(folder))
            if config.peft_type not in ("PROMPT_TUNING", "P_TUNING"):
                return PeftModel.from_pretrained(model, str(folder), config=config)
            opened = SoftPromptModel(model, config)
            opened.load_adapter(str(folder), "default")
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder}: the adapter does not fit this backbone; open it on its own ({reason})") from None
    return opened


@contextmanager
def quiet() -> Iterator[None]:
    """Silence PEFT's warnings about what it resolves by itself."""
    with warnings.catch_warnings():
        for message in (
            ".is_gradient_checkpointing. is deprecated",  # PEFT 0.21 reads a property that transformers 5 renamed.
            "fan_in_fan_out is set to",  # GPT-2's layers are stored transposed, its head is not.
            "Model has `tie_word_embeddings=True`",  # Each layer has its own adapter; the tied weight is frozen.
            "The following rank_pattern keys did not match",  # AdaLoRA's pattern is by matrix, not by layer as LoRA's.
            "Unsupported layer type",  # RMS norms, whose widths LN-tuning does not need.
        ):
            warnings.filterwarnings("ignore", message=message)
        # BOFT's CUDA kernel would be compiled at first use, and torch.func has no rule for it.
        boft_layer._FBD_CUDA = False  # type: ignore[assignment]
        yield


def _linear(model: torch.nn.Module, config: AdapterConfig, rank: int) -> Layers:
    layers = trainable_layers(model, config)
    check_rank(layers, rank)
    return layers


def _wrap(model: torch.nn.Module, layers: Layers, kind: Callable[..., PeftConfig], **settings: Any) -> PeftModel:
    task_type = TASK_TYPES[model_type_of(model)]
    with quiet():
        return peft.get_peft_model(model, kind(task_type=task_type, target_modules=sorted(layers), **settings))


def _soft_prompt(model: torch.nn.Module, kind: Callable[..., PeftConfig], **settings: Any) -> Any:
    # One prompt, before the encoder, where there are two stacks.
    settings["num_transformer_submodules"] = 1
    # PEFT would take the hidden width; some backbones widen (or narrow) what they embed.
    backbone = cast(Any, model)
    settings["token_dim"] = backbone.get_input_embeddings().weight.shape[1]
    if not HEADS & backbone.config.to_dict().keys():
        settings["num_attention_heads"] = 1  # Asked for, and not used: a state space has none.
    with quiet():
        return attach_soft_prompt(model, kind(task_type=PROMPT_TASK_TYPES[model_type_of(model)], **settings))


HEADS = {"num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"}
"""Where PEFT looks for the number of heads."""


def _seed() -> int:
    return int(torch.randint(2**31, ()))


def _backbone(model: PeftModel) -> Any:
    return model.get_base_model()


@torch.no_grad()
def _with_latents_merged(model: PeftModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    for name in [name for name in state if name.endswith(".lora_B.default.latent.weight")]:
        stem = name.removesuffix(".latent.weight")
        state[f"{stem}.weight"] = state.pop(f"{stem}.up.weight") @ state.pop(name)
    return state


def _rows_to_keep(model: PeftModel, pattern: Mapping[str, list[bool]]) -> dict[str, list[bool]]:
    """AdaLoRA's mask and every row whose E is not zero: the optimizer may have moved it after the last mask."""
    diagonals = {name: value.flatten().tolist() for name, value in _backbone(model).named_parameters()}
    # A reopened adapter has lost the other rows already; its pattern, without adapter name, stays as it is.
    return {
        name: [kept or value != 0 for kept, value in zip(mask, diagonals[name], strict=True)]
        if name in diagonals
        else mask
        for name, mask in pattern.items()
    }
