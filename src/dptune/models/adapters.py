"""The projection subspaces: which parameters are trained. One table of adapters, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from dptune.config.checks import check_adapter
from dptune.config.schema import ADAPTERS, AdapterConfig, ConfigError, EnvironmentConfig
from dptune.models import own_adapters, peft_adapters
from dptune.models.layers import ARCHITECTURES, check_rows_are_independent, model_type_of
from dptune.models.pst import prune, pst
from dptune.models.quantization import quantized_layers, refuse_merging
from dptune.records.record import Parameters

__all__ = [
    "KINDS",
    "AdapterKind",
    "after_step",
    "attach",
    "count",
    "engine_of",
    "load_adapter",
    "model_type_of",
    "save",
    "set_modes",
    "trainable_parameters",
]

Attach = Callable[[torch.nn.Module, AdapterConfig, int, int], torch.nn.Module]
"""Backbone, config, rank and number of steps to the model with a fresh adapter; draws from torch's global stream."""

AfterStep = Callable[[torch.nn.Module, int, Mapping[str, torch.Tensor]], None]
"""Model, step from 0, and released gradients by parameter."""

FUNCTIONAL = dict.fromkeys(ARCHITECTURES, "functional")
HOOKS = dict.fromkeys(ARCHITECTURES, "hooks")
LINEAR_ONLY = {"gpt2": "PEFT has it for linear layers only, and GPT-2's are Conv1D"}


@dataclass(frozen=True)
class AdapterKind:
    """One adapter."""

    attach: Attach
    """Puts a fresh one on a backbone."""
    engines: Mapping[str, str]
    """The fastest engine that is right, by architecture."""
    impossible: Mapping[str, str] = field(default_factory=dict)
    """Why it cannot work, by architecture."""
    after_step: AfterStep | None = None
    """What is done to it after each step of the optimizer."""
    unchanged: bool = True
    """Whether a fresh one leaves the backbone's outputs as they are."""


KINDS: Mapping[str, AdapterKind] = {
    "lora": AdapterKind(peft_adapters.lora, HOOKS),
    "ffa_lora": AdapterKind(peft_adapters.ffa_lora, HOOKS),
    "lora_xs": AdapterKind(peft_adapters.lora_xs, HOOKS),
    "dora": AdapterKind(peft_adapters.dora, FUNCTIONAL),
    "adalora": AdapterKind(peft_adapters.adalora, FUNCTIONAL, after_step=peft_adapters.reallocate),
    "vera": AdapterKind(peft_adapters.vera, FUNCTIONAL),
    "ia3": AdapterKind(peft_adapters.ia3, FUNCTIONAL),
    "loha": AdapterKind(peft_adapters.loha, FUNCTIONAL, LINEAR_ONLY),
    "lokr": AdapterKind(peft_adapters.lokr, FUNCTIONAL, LINEAR_ONLY),
    "oft": AdapterKind(peft_adapters.oft, FUNCTIONAL, LINEAR_ONLY),
    "boft": AdapterKind(peft_adapters.boft, FUNCTIONAL, LINEAR_ONLY),
    "fourierft": AdapterKind(peft_adapters.fourierft, FUNCTIONAL),
    "prompt": AdapterKind(peft_adapters.prompt, FUNCTIONAL, unchanged=False),
    "p_tuning": AdapterKind(peft_adapters.p_tuning, FUNCTIONAL, unchanged=False),
    "prefix": AdapterKind(peft_adapters.prefix, FUNCTIONAL, unchanged=False),
    "houlsby": AdapterKind(own_adapters.houlsby, HOOKS),
    "pfeiffer": AdapterKind(own_adapters.pfeiffer, HOOKS),
    "parallel": AdapterKind(own_adapters.parallel, HOOKS),
    "bitfit": AdapterKind(own_adapters.bitfit, FUNCTIONAL),
    "ln_tuning": AdapterKind(peft_adapters.ln_tuning, FUNCTIONAL),
    "head": AdapterKind(own_adapters.head, HOOKS),
    # T5's relative_attention_bias is looked up once for a whole batch.
    "full": AdapterKind(own_adapters.full, {**FUNCTIONAL, "encoder_decoder": "loop"}),
    "pst": AdapterKind(pst, FUNCTIONAL, after_step=prune),
}
"""Every kind of `config.ADAPTERS`."""


@dataclass(frozen=True)
class Attached:
    """What was attached to a model; hangs on it as `attached`."""

    config: AdapterConfig
    rank: int
    steps: int


def attach(model: torch.nn.Module, config: AdapterConfig, *, rank: int, steps: int, seed: int) -> torch.nn.Module:
    """The model with a fresh adapter, in float32, that is all that is trained.

    Args:
        model: the backbone; the adapter is put into it.
        config: kind of adapter.
        rank: rank of its factors.
        steps: number of steps it will be trained for, which AdaLoRA and PST plan ahead with.
        seed: seed of the initialisation, which is public.

    Raises:
        ConfigError: when backbone and adapter do not go together.
    """
    kind = KINDS[config.name]
    check_rows_are_independent(model)
    check_adapter(config, EnvironmentConfig())
    _check_model(config, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = kind.attach(model.requires_grad_(False), config, rank, steps)
    for parameter in trainable_parameters(adapted).values():
        parameter.data = parameter.data.float()
    refuse_merging(adapted)
    adapted.attached = Attached(config, rank, steps)  # type: ignore[assignment]  # not a submodule
    set_modes(adapted)
    return adapted


def engine_of(name: str, architecture: str, *, embeddings: bool = False) -> str:
    """The fastest engine that gives this adapter's gradients exactly, with LoRA's `embeddings` or without.

    Raises:
        ConfigError: when the adapter cannot work on the architecture.
    """
    kind = KINDS[name]
    if architecture in kind.impossible:
        raise ConfigError(
            f"adapter={name} cannot be put on this {architecture} backbone: {kind.impossible[architecture]}; "
            "choose adapter=lora"
        )
    # PEFT keeps the factors of embeddings outside of any layer with a closed form.
    return "functional" if embeddings else kind.engines[architecture]


def set_modes(model: torch.nn.Module) -> None:
    """Training mode for modules that own trained parameters, evaluation mode for all others: no dropout anywhere."""
    model.eval()
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count(model: torch.nn.Module) -> Parameters:
    """Exact counts, of groups such as `lora_A` or `bias`, too; a tied parameter counts once, a rounded one as any."""
    groups: dict[str, int] = {}
    for name, parameter in trainable_parameters(model).items():
        parts = [part for part in name.split(".") if part not in ("weight", "default") and not part.isdigit()]
        groups[parts[-1]] = groups.get(parts[-1], 0) + parameter.numel()
    return Parameters(
        total=sum(parameter.numel() for parameter in model.parameters())
        + sum(layer.shape.numel() for layer in quantized_layers(model).values()),
        trainable=sum(groups.values()),
        groups=groups,
    )


def after_step(model: torch.nn.Module, step: int, released: Mapping[str, torch.Tensor]) -> None:
    """What the adapter does after an optimizer step: AdaLoRA moves ranks, PST prunes. Free post-processing.

    Args:
        model: the adapted model.
        step: the step that was done, from 0.
        released: its released gradients by parameter, which are all that may be looked at.
    """
    if (change := KINDS[_attached(model).config.name].after_step) is not None:
        change(model, step, released)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write the adapter, and nothing of the backbone that was not trained, into a folder.

    PEFT's adapters are written as `PeftModel.from_pretrained` opens them, the others as safetensors; `load` opens both.
    """
    if isinstance(model, PeftModel):
        peft_adapters.save(model, folder)
    else:
        attached = _attached(model)
        own_adapters.save(model, attached.config, attached.rank, attached.steps, folder)


def load_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The model with the adapter of a folder that `save` wrote, in evaluation mode.

    Args:
        model: the backbone as it was before, with nothing attached; the adapter is put into it.
        folder: what `save` wrote.

    Raises:
        ConfigError: when the adapter belongs to another backbone.
    """
    if (folder / own_adapters.SETTINGS_FILE).exists():
        config, rank, steps = own_adapters.settings_of(folder)
        adapted = attach(model, config, rank=rank, steps=steps, seed=0)
        own_adapters.restore(adapted, folder)
    else:
        adapted = peft_adapters.load_peft_adapter(model, folder)
        refuse_merging(adapted)
    return adapted.eval()


def _attached(model: Any) -> Attached:
    attached: Attached = model.attached
    return attached


def _check_model(config: AdapterConfig, model: torch.nn.Module) -> None:
    rules = ADAPTERS[config.name]
    engine_of(config.name, model_type_of(model))
    if rules.changes_matrices and (rounded := quantized_layers(model)):
        name, layer = next(iter(rounded.items()))
        raise ConfigError(
            f"adapter={config.name} changes the backbone's own matrices, and that of {name} is rounded to "
            f"{layer.quantization}; set environment.backbone_quantization=none, or choose adapter=lora"
        )
    low = next((name for name, value in model.named_parameters() if value.dtype != torch.float32), None)
    if rules.own_weights and low is not None:
        raise ConfigError(
            f"adapter={config.name} trains the backbone's own weights, and {low} is not float32; set "
            "environment.precision=float32"
        )
