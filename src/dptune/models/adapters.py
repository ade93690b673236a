"""Which parameters are trained: an adapter is attached, counted, changed after a step, saved and loaded.

The kinds are `dptune.config.adapters.ADAPTERS`; a row there names the functions that are called here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from dptune.config.adapters import ADAPTERS
from dptune.config.checks import check_adapter
from dptune.config.schema import AdapterConfig, ConfigError, EnvironmentConfig
from dptune.models import own_adapters, peft_adapters
from dptune.models.layers import check_rows_are_independent, model_type_of
from dptune.models.quantization import quantized_layers, refuse_merging
from dptune.records.record import Parameters

REFUSALS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, NotImplementedError)
"""What libraries raise when backbone, adapter and engine do not go together."""


@dataclass(frozen=True)
class Attached:
    """What was attached to a model, whose attribute `attached` it is."""

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
    put_on = _function(ADAPTERS[config.name].attach)
    check_rows_are_independent(model)
    check_adapter(config, EnvironmentConfig())
    _check_model(config, model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: torch.nn.Module = put_on(model.requires_grad_(False), config, rank, steps)
        except ConfigError:
            raise
        except REFUSALS as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(
                f"adapter={config.name} cannot be put on a backbone of type {model.config.model_type}: {reason}"  # type: ignore[union-attr]
            ) from error
    for parameter in trainable_parameters(adapted).values():
        parameter.data = parameter.data.float()
    if isinstance(adapted, PeftModel):
        peft_adapters.refuse_merging_ties(adapted)
    refuse_merging(adapted)
    adapted.attached = Attached(config, rank, steps)  # type: ignore[assignment]  # not a submodule
    set_modes(adapted)
    return adapted


def engine_of(name: str, architecture: str, *, embeddings: bool = False) -> str:
    """The fastest engine that gives this adapter's gradients exactly, with LoRA's `embeddings` or without.

    Raises:
        ConfigError: when the adapter cannot work on the architecture.
    """
    kind = ADAPTERS[name]
    if architecture in kind.impossible:
        raise ConfigError(
            f"adapter={name} cannot be put on this {architecture} backbone: {kind.impossible[architecture]}; "
            "choose adapter=lora"
        )
    # PEFT keeps the factors of embeddings outside of any layer with a closed form.
    return "functional" if embeddings else kind.engine_on.get(architecture, kind.engine)


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
    """Numbers of parameters, in all and by groups such as `lora_A` or `bias`.

    A tied parameter counts once, a rounded one as if it were not rounded.
    """
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
    if (change := ADAPTERS[_attached(model).config.name].after_step) is not None:
        _function(change)(model, step, released)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write the adapter, and nothing of the backbone that was not trained, into a folder.

    PEFT's adapters are written as `PeftModel.from_pretrained` opens them, the others as safetensors. `load_adapter`
    opens both.
    """
    if is_peft(model):
        peft_adapters.save(cast(PeftModel, model), folder)
    else:
        attached = _attached(model)
        own_adapters.save(model, attached.config, attached.rank, attached.steps, folder)


def is_peft(model: torch.nn.Module) -> bool:
    """Whether PEFT opens what `save` writes of it."""
    return isinstance(model, PeftModel)


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


def _function(name: str) -> Any:
    """The function of a row, `module.function` of this package."""
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"dptune.models.{module}"), function)


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
