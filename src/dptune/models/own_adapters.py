"""Adapters that PEFT does not provide, bottlenecks and parts of the backbone itself, and how they are saved."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dptune.config.schema import AdapterConfig, ConfigError
from dptune.models.layers import (
    chosen,
    in_blocks,
    linear_layers,
    matching,
    norms,
    output_head,
    replace,
    sublayers,
    widths,
)

TENSORS_FILE, SETTINGS_FILE = "adapter_model.safetensors", "dptune_adapter.json"


class Bottleneck(torch.nn.Module):
    """A layer of the backbone with a small network behind or beside it: y + up(f(down(y))), or down(x)."""

    def __init__(self, base_layer: torch.nn.Module, width: int, bottleneck: int, activation: torch.nn.Module) -> None:
        super().__init__()
        # A rounded layer without a bias has no parameters.
        device = next(itertools.chain(base_layer.parameters(), base_layer.buffers())).device
        self.base_layer: Any = base_layer
        self.adapter_down = torch.nn.Linear(width, bottleneck, device=device)
        self.adapter_up = torch.nn.Linear(bottleneck, width, device=device)
        self.activation = activation
        torch.nn.init.zeros_(self.adapter_up.weight)
        torch.nn.init.zeros_(self.adapter_up.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own, whose number format T5 looks at."""
        weight: torch.Tensor = self.base_layer.weight
        return weight

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """What the small network adds to the hidden states [b, t, width] that it reads."""
        return self.adapter_up(self.activation(self.adapter_down(x.float()))).to(x.dtype)


class SequentialBottleneck(Bottleneck):
    """Reads the layer's output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [b, t, width]."""
        y = self.base_layer(x)
        return y + self.change(y)


class ParallelBottleneck(Bottleneck):
    """Reads what the feed-forward network reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [b, t, width]."""
        return self.base_layer(x) + self.change(x)


class BertParallelBottleneck(Bottleneck):
    """The same on BERT's `output`, which adds the network's input to its output before the norm."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        """Hidden states [b, t, width]."""
        return self.base_layer(hidden_states, input_tensor + self.change(input_tensor))


def houlsby(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> torch.nn.Module:
    """Bottlenecks after self-attention and after the feed-forward network (arXiv:1902.00751)."""
    where = sublayers(model, config)
    _put_behind(model, where.attention_output, config, torch.nn.GELU)
    return _put_behind(model, where.feed_forward_output, config, torch.nn.GELU)


def pfeiffer(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> torch.nn.Module:
    """Bottlenecks after the feed-forward network (arXiv:2005.00247)."""
    return _put_behind(model, sublayers(model, config).feed_forward_output, config, torch.nn.ReLU)


def _put_behind(
    model: torch.nn.Module, pattern: str, config: AdapterConfig, activation: type[torch.nn.Module]
) -> torch.nn.Module:
    for name, layer in matching(model, pattern, config).items():
        replace(model, name, SequentialBottleneck(layer, widths(layer)[1], config.bottleneck, activation()))
    return model


def parallel(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> torch.nn.Module:
    """Bottlenecks beside the feed-forward network (arXiv:2110.04366), with scale 1."""
    where = sublayers(model, config)
    outputs = matching(model, where.feed_forward_output, config).values()
    for (name, network), output in zip(matching(model, where.feed_forward, config).items(), outputs, strict=True):
        kind = BertParallelBottleneck if where.feed_forward == "output" else ParallelBottleneck
        replace(model, name, kind(network, widths(output)[1], config.bottleneck, torch.nn.ReLU()))
    return model


def bitfit(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> torch.nn.Module:
    """Biases of linear layers and norms (arXiv:2106.10199), but for the output head's.

    A linear layer without a bias, as in Llama and T5, gets one that is zero at first, so that the method exists there;
    a norm without one stays as it is. T5's `relative_attention_bias` is no bias of a layer and is not trained.
    """
    linear = linear_layers(model)
    biased = {name: layer for name, layer in norms(model).items() if getattr(layer, "bias", None) is not None}
    for name, layer in chosen(model, linear | biased, config).items():
        if layer.bias is None:
            layer.bias = torch.nn.Parameter(torch.zeros(widths(linear[name])[1], device=layer.weight.device))
        layer.bias.requires_grad_(True)
    return model


def head(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> torch.nn.Module:
    """The output head; one that is tied to the embeddings gets its own copy of the weight."""
    layer: Any = output_head(model)[1]
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    layer.requires_grad_(True)
    return model


def full(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> torch.nn.Module:
    """Every parameter of the backbone, or of its top layers; tied weights stay tied."""
    if config.top_layers is None:
        return model.requires_grad_(True)
    for block in in_blocks(model, config.top_layers):
        model.get_submodule(block).requires_grad_(True)
    return model


def save(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int, folder: Path) -> None:
    """Write the trained parameters and masks, one bit an entry, with the settings that attach them again."""
    tensors = {name: value.detach().contiguous() for name, value in model.named_parameters() if value.requires_grad}
    tensors |= {name: _packed(value) for name, value in _masks(model).items()}
    settings = {"adapter": dataclasses.asdict(config), "rank": rank, "steps": steps}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS_FILE, metadata={"format": "pt"})
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def settings_of(folder: Path) -> tuple[AdapterConfig, int, int]:
    """What was attached: config, rank and steps."""
    content = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    return AdapterConfig(**content["adapter"]), content["rank"], content["steps"]


@torch.no_grad()
def restore(model: torch.nn.Module, folder: Path) -> None:
    """Give a freshly attached adapter the values of a folder.

    Raises:
        ConfigError: naming the first tensor that is not there on both sides in the same shape.
    """
    stored = load_file(folder / TENSORS_FILE)
    masks = _masks(model)
    expected: Mapping[str, torch.Tensor] = {
        name: value for name, value in model.named_parameters() if value.requires_grad
    } | {name: _packed(value) for name, value in masks.items()}
    for name in sorted(stored.keys() | expected.keys()):
        if name not in stored or name not in expected or stored[name].shape != expected[name].shape:
            raise ConfigError(f"{folder}: the adapter does not fit this backbone; open it on its own ({name})")
    for name, value in expected.items():
        if name in masks:
            bits = stored[name].to(value.device).unsqueeze(1) >> torch.arange(8, device=value.device) & 1
            masks[name].copy_(bits.flatten()[: masks[name].numel()].reshape(masks[name].shape))
        else:
            value.copy_(stored[name])


def _masks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Boolean buffers that belong to a file: those of `dptune.models.pst`."""
    return {name: value for name, value in model.named_buffers() if name.endswith(".pst_mask")}


def _packed(mask: torch.Tensor) -> torch.Tensor:
    """Bits of a mask, eight in a byte."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, device=mask.device, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
