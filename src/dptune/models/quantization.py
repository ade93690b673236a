"""Frozen linear layers whose weights are rounded once, to 8 or to 4 bits: less memory, not less time.

Codes and scales are what a layer keeps; its weight is made from them at each use, in the forward pass and again in the
backward pass, and not kept. All of this is elementwise, so that the codes do not depend on the machine. The layers pass
for `torch.nn.Linear` and `Conv1D`, so that every adapter that leaves weights alone can be put on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from dptune.models.layers import linear_layers, replace

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat of 4 bits: quantiles of a normal distribution with an exact zero (arXiv:2305.14314, appendix E)."""

BLOCK = 64
"""Weights that share an NF4 scale."""


@dataclass(frozen=True)
class Format:
    """How a matrix is kept."""

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Weight [out, in] in float32 to codes and float32 scales."""
    decode: Callable[[Tensor, Tensor, torch.Size], Tensor]
    """Codes, scales and shape [out, in] to the rounded weight in float32."""


def encode_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] from -127 to 127, and a scale for each output [out, 1]: its largest absolute weight over 127."""
    scales = _scales(weight.abs().amax(dim=1, keepdim=True) / 127)
    return (weight / scales).round().clamp(-127, 127).to(torch.int8), scales


def decode_int8(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """Each weight is off by at most half its output's scale."""
    return codes.float() * scales


def encode_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest levels, two in a byte, the first in its upper half, and the largest absolute weight of each block.

    Blocks are `BLOCK` weights in the order of the flat weight; the last one may be shorter. Scales stay float32 (half a
    bit a weight): QLoRA's second rounding, of the scales, is left out.
    """
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
    scales = _scales(flat.abs().amax(dim=1, keepdim=True))
    levels = torch.tensor(NF4_LEVELS, device=weight.device)
    codes = torch.bucketize(flat / scales, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).reshape(-1, 2)
    return codes[: (weight.numel() + 1) // 2, 0] << 4 | codes[: (weight.numel() + 1) // 2, 1], scales


def decode_nf4(codes: Tensor, scales: Tensor, shape: torch.Size) -> Tensor:
    """Each weight is off by at most half the gap of its levels, times its block's scale."""
    values = _pairs(codes.device).index_select(0, codes.int()).flatten()
    padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).reshape(-1, BLOCK)
    return (padded * scales).flatten()[: shape.numel()].reshape(shape)


FORMATS: Mapping[str, Format] = {"int8": Format(encode_int8, decode_int8), "nf4": Format(encode_nf4, decode_nf4)}
"""Every choice of `environment.backbone_quantization` but `none`."""


class QuantizedLayer(torch.nn.Module):
    """A frozen linear layer that keeps codes and scales in the place of its weight; the bias stays as it is."""

    codes: Tensor
    scales: Tensor

    def __init__(self, layer: Any, quantization: str) -> None:
        """Round the weight of a `torch.nn.Linear` or a `Conv1D`, which keeps it transposed."""
        # Not that of the layer's class, which would make a weight.
        torch.nn.Module.__init__(self)
        self.quantization, self.dtype = quantization, layer.weight.dtype
        self.transposed = isinstance(layer, Conv1D)
        weight = layer.weight.detach().float()
        weight = weight.T if self.transposed else weight
        self.shape = weight.shape
        codes, scales = FORMATS[quantization].encode(weight.contiguous())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", layer.bias)

    def matrix(self) -> Tensor:
        """The rounded weight [out, in], made now, in the number format of the layer."""
        return FORMATS[self.quantization].decode(self.codes, self.scales, self.shape).to(self.dtype)

    @property
    def weight(self) -> Tensor:
        """The same as the layer would keep it; changing it changes nothing."""
        return self.matrix().T if self.transposed else self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., out]."""
        bias: Any = self.bias
        y: Tensor = _Product.apply(x, self)
        return y if bias is None else y + bias


class QuantizedLinear(QuantizedLayer, torch.nn.Linear):  # type: ignore[override]  # whose weight is a parameter
    """In the place of a `torch.nn.Linear`."""

    def __init__(self, layer: torch.nn.Linear, quantization: str) -> None:
        QuantizedLayer.__init__(self, layer, quantization)
        self.in_features, self.out_features = layer.in_features, layer.out_features


class QuantizedConv1D(QuantizedLayer, Conv1D):  # type: ignore[misc]  # whose weight is a parameter
    """In the place of a `Conv1D`."""

    def __init__(self, layer: Conv1D, quantization: str) -> None:
        QuantizedLayer.__init__(self, layer, quantization)
        self.nx, self.nf = layer.nx, layer.nf


class _Product(torch.autograd.Function):
    """x W^T. The backward pass makes W again: kept until then, all weights would be in memory at once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, layer: QuantizedLayer) -> Tensor:
        return torch.nn.functional.linear(x, layer.matrix())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, QuantizedLayer], output: Tensor) -> None:
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.matrix(), None


@torch.no_grad()
def quantize(model: torch.nn.Module, quantization: str) -> None:
    """Round the weights of all linear layers but the output head, in place; `none` leaves the model as it is.

    Embeddings, norms, biases and the head, whose errors go straight into the logits, keep their number format.
    """
    if quantization == "none":
        return
    for name, layer in linear_layers(model).items():
        kind: Any = QuantizedConv1D if isinstance(layer, Conv1D) else QuantizedLinear
        replace(model, name, kind(layer, quantization).train(layer.training))


def quantized_layers(model: torch.nn.Module) -> dict[str, QuantizedLayer]:
    """Layers by name whose weights are rounded."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def refuse_merging(adapted: Any) -> None:
    """Make PEFT's merge of an adapter into rounded weights an error: it would change a weight that is then given up."""

    def refuse() -> None:
        raise ValueError(
            "an adapter cannot be merged into rounded weights; open it on the backbone with "
            "environment.backbone_quantization=none and merge it there"
        )

    if quantized_layers(adapted) and hasattr(getattr(adapted, "base_model", None), "_check_merge_allowed"):
        adapted.base_model._check_merge_allowed = refuse


def _scales(largest: Tensor) -> Tensor:
    """Where all weights are zero any scale will do."""
    return largest.where(largest > 0, 1.0)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels of each byte [256, 2]."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
