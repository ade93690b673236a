"""The projection subspaces: which parameters are trained. Name -> function; the file format is PEFT's."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from dptune.config import AdapterConfig, ConfigError
from dptune.records import Parameters


def attach(model: torch.nn.Module, config: AdapterConfig, rank: int, seed: int) -> PeftModel:
    """The model with a fresh adapter, in float32, that is all that is trained.

    Args:
        model: frozen backbone; the adapter is injected into it.
        config: kind of adapter.
        rank: rank of its factors.
        seed: seed of the initialisation, which is public.

    Raises:
        ConfigError: when the backbone has no layer that the adapter asks for.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5 renamed.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
        # GPT-2's layers are stored transposed, which PEFT finds out by itself.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, ADAPTERS[config.name](config, rank))
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"adapter={config.name} does not fit the backbone: {reason}") from None
    for name, parameter in adapted.named_parameters():
        if config.name == "ffa_lora" and ".lora_A." in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_modes(adapted)
    return adapted


def lora(config: AdapterConfig, rank: int) -> PeftConfig:
    """LoRA (arXiv:2106.09685); B starts at zero, so that training starts at the backbone."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT takes any number here
        lora_dropout=0.0,
        target_modules=config.target_modules or "all-linear",
    )


ADAPTERS: dict[str, Callable[[AdapterConfig, int], PeftConfig]] = {"lora": lora, "ffa_lora": lora}


def set_modes(model: torch.nn.Module) -> None:
    """Training mode for modules that own trained parameters, evaluation mode for all others: no dropout anywhere."""
    model.eval()
    for module in model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count(model: torch.nn.Module) -> Parameters:
    """Exact counts; a tied parameter counts once."""
    return Parameters(
        total=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(parameter.numel() for parameter in trainable(model).values()),
    )
