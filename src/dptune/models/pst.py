"""PST: sparse fine-tuning by low-rank updates and low-rank scores (arXiv:2205.11005)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from dptune.config.schema import AdapterConfig
from dptune.models.layers import check_rank, replace, trainable_layers, widths

INITIAL_HOLD, FINAL_HOLD = 0.1, 0.3
"""Shares of the steps before the first and after the last change of the sparsity."""


class PrunedLinear(torch.nn.Module):
    """A linear layer whose weight is M * (W + U V), where the mask M drops the lowest scores S = |W| + A B + R + C.

    Both scales, beta and alpha, are 1. The mask is a buffer: it changes between steps only, so that a row's gradient
    depends on no other row. Scores get the mask's gradient as if M were S (straight-through estimator).
    """

    pst_U: torch.nn.Parameter
    pst_V: torch.nn.Parameter
    pst_A: torch.nn.Parameter
    pst_B: torch.nn.Parameter
    pst_R: torch.nn.Parameter
    pst_C: torch.nn.Parameter
    pst_mask: torch.Tensor

    def __init__(self, base_layer: Any, rank: int, *, steps: int, sparsity: float) -> None:
        super().__init__()
        self.steps, self.sparsity = steps, sparsity
        inputs, outputs = widths(base_layer)
        self.base_layer: Any = base_layer
        self.transposed = isinstance(base_layer, Conv1D)
        device = base_layer.weight.device
        for name, shape in {
            "pst_U": (outputs, rank),
            "pst_V": (rank, inputs),
            "pst_A": (outputs, rank),
            "pst_B": (rank, inputs),
            "pst_R": (outputs, 1),
            "pst_C": (1, inputs),
        }.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape, device=device)))
        self.register_buffer("pst_mask", torch.ones(outputs, inputs, dtype=torch.bool, device=device))
        for factor in (self.pst_U, self.pst_A):
            torch.nn.init.normal_(factor, std=0.02)

    @property
    def weight(self) -> torch.Tensor:
        """The layer's own, whose number format T5 looks at."""
        weight: torch.Tensor = self.base_layer.weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., out]."""
        bias = None if self.base_layer.bias is None else self.base_layer.bias.float()
        return torch.nn.functional.linear(x.float(), self.released(), bias).to(x.dtype)

    def released(self) -> torch.Tensor:
        """The pruned weight [out, in], which is all that is needed of this layer once it is trained."""
        scores = self.scores()
        # The difference is exactly zero; only its gradient counts.
        return self.dense() * (self.pst_mask + (scores - scores.detach()))

    def dense(self) -> torch.Tensor:
        """W + U V [out, in]."""
        return self._base() + self.pst_U @ self.pst_V

    def scores(self) -> torch.Tensor:
        """Importance of each weight [out, in]."""
        return self._base().abs() + self.pst_A @ self.pst_B + self.pst_R + self.pst_C

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """Drop the lowest scores, after `step`: that share of the weights, rounded down; of equal ones the first."""
        dropped = math.floor(sparsity_after(step, self.steps, self.sparsity) * self.pst_mask.numel())
        order = self.scores().flatten().argsort(stable=True)
        self.pst_mask.fill_(True).view(-1)[order[:dropped]] = False

    def _base(self) -> torch.Tensor:
        weight: torch.Tensor = self.base_layer.weight
        return (weight.T if self.transposed else weight).float()


def pst(model: torch.nn.Module, config: AdapterConfig, rank: int, steps: int) -> torch.nn.Module:
    """PST on the linear layers. U and A start random, V, B, R and C at zero, and every mask at ones."""
    layers = trainable_layers(model, config)
    check_rank(layers, rank)
    for name, layer in layers.items():
        replace(model, name, PrunedLinear(layer, rank, steps=steps, sparsity=config.sparsity))
    return model


def sparsity_after(step: int, steps: int, final: float) -> float:
    """Sparsity once `step` (from 0) of `steps` is done: a cubic ramp from 0 to `final` between the holds."""
    begin, end = INITIAL_HOLD * steps, (1 - FINAL_HOLD) * steps
    done = min(max((step + 1 - begin) / (end - begin), 0.0), 1.0)
    return final * (1 - (1 - done) ** 3)


def prune(model: torch.nn.Module, step: int, released: Mapping[str, torch.Tensor]) -> None:
    """Set the masks from the scores as they are after the step. Scores were trained privately: post-processing."""
    for module in model.modules():
        if isinstance(module, PrunedLinear):
            module.prune(step)
