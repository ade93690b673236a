"""Clipping of each unit's gradient, and the bound that the clipped sum carries (SPECIFICATION.md 2.1, 4.2, 10.3).

Every rule bounds the vector v = (v_1, ..., v_G) of a privacy unit, where v_g is its gradient of group g.
Norms, clip factors and sums are float64. The noise is scaled by the bound that a `ClippedSum` carries, never
by a threshold from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dptune.privacy.allocation import Group, PrecisionRow
from dptune.privacy.rules import CLIPPINGS, row_of

NONE = "none"
"""Kind of the `ClipRule` of a plan without privacy."""

MARGIN = 1.0 / (1.0 + 2.0**-10)
"""Every clip factor is multiplied by this: room for rounding, so that sigma needs no change (10.3)."""


class SensitivityError(ValueError):
    """A clipped vector was measured outside its bound: nothing may be released."""


@dataclass(frozen=True)
class Sensitivity:
    """The set that holds the clipped vector of every possible unit.

    Attributes:
        bounds: b_g >= 0 (0: the group is frozen), shape (G,).
        joint: True for the ellipsoid sum_g (|v_g| / b_g)^2 <= 1, False for the box |v_g| <= b_g.
    """

    bounds: tuple[float, ...]
    joint: bool

    def rows(self, stds: ArrayLike) -> tuple[PrecisionRow, ...]:
        """Rows of a `PrecisionBudget`: this bound under noise of standard deviations s_g, shape (G,).

        For the ellipsoid, the largest |S^-1 v| is the largest b_g / s_g, so that it is one row of unit noise.
        """
        b, s = np.asarray(self.bounds), np.asarray(stds, float)
        if not self.joint:
            return tuple(PrecisionRow(f"gradients {g}", *pair) for g, pair in enumerate(zip(b, s, strict=True)))
        with np.errstate(divide="ignore"):
            reach = np.divide(b, s, out=np.zeros_like(b), where=b > 0.0)
        return (PrecisionRow("gradients", float(reach.max()), 1.0),)

    def check(self, norms: Tensor) -> None:
        """Raise unless the vectors with norms |v_g|, shape (G, units), lie within.

        Raises:
            SensitivityError: if one does not, or is not a number.
        """
        bounds = torch.tensor(self.bounds, dtype=torch.float64, device=norms.device).unsqueeze(1)
        ratio = torch.where(bounds > 0.0, norms / bounds, torch.where(norms == 0.0, 0.0, torch.inf))
        worst = torch.linalg.vector_norm(ratio, dim=0) if self.joint else ratio
        if not bool((worst <= 1.0).all()):
            raise SensitivityError(
                f"a clipped gradient is {float(worst.max()):.6g} times its bound; nothing is released"
            )


@dataclass(frozen=True)
class ClipRule:
    """How the gradients of one step are clipped.

    Attributes:
        kind: a key of `CLIPPINGS`, or `NONE` without privacy.
        thresholds: C_g, shape (G,). `flat` uses sqrt(sum_g C_g^2).
        tracked: the thresholds that a quantile tracker asks about, shape (G,) (4.1).
        unit_stds: s_g at noise multiplier 1, shape (G,), from these thresholds: the shape of the noise, and
            of `scaled_flat`'s ellipsoid.
        stability: gamma of AUTO-S, r of PSAC.
    """

    kind: str
    thresholds: tuple[float, ...]
    tracked: tuple[float, ...]
    unit_stds: tuple[float, ...]
    stability: float

    @property
    def sensitivity(self) -> Sensitivity:
        """The bound which the clipped vectors keep.

        Raises:
            ValueError: if the rule is unknown.
        """
        groups = len(self.thresholds)
        if self.kind == NONE:
            return Sensitivity((float("inf"),) * groups, joint=True)
        match row_of(CLIPPINGS, self.kind, "clipping").region:
            case "box":
                return Sensitivity(self.thresholds, joint=False)
            case "ball":
                return Sensitivity((float(np.linalg.norm(self.thresholds)),) * groups, joint=True)
            case "ellipsoid":
                return Sensitivity(self.unit_stds, joint=True)

    def factors(self, norms: Tensor) -> Tensor:
        """Clip factors, margin included, for gradients with norms |g_g|, both float64 of shape (G, units)."""
        if self.kind == NONE:
            return torch.ones_like(norms)
        bounds = torch.tensor(self.sensitivity.bounds, dtype=torch.float64, device=norms.device).unsqueeze(1)
        return CLIPPINGS[self.kind].factors(norms, bounds, self.stability) * MARGIN


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped vectors over the units of a batch, with the bound that each of them keeps.

    Attributes:
        values: the sum, float64, shape (D,): groups in order, within a group its parameters in order.
        sensitivity: the bound of one unit's contribution.
        inside: for each group the number of units whose norm is within the tracked threshold, less half the number
            of all units; float64, (G,).
        telemetry: NON_PRIVATE, float64, shape (3,): units; units whose vector was shortened, averaged over
            groups; gradients which were NaN or infinite somewhere, and were replaced by 0.
    """

    values: Tensor
    sensitivity: Sensitivity
    inside: Tensor
    telemetry: Tensor

    @classmethod
    def empty(cls, groups: Sequence[Group], sensitivity: Sensitivity) -> Self:
        """The sum over no unit."""
        zeros = [torch.zeros(n, dtype=torch.float64) for n in (sum(g.dimension for g in groups), len(groups), 3)]
        return cls(zeros[0], sensitivity, zeros[1], zeros[2])

    def __add__(self, other: ClippedSum) -> Self:
        """The sum over the units of both; they must have been clipped to the same bound."""
        if self.sensitivity != other.sensitivity:
            raise SensitivityError("sums with different clip bounds cannot be added; clip a whole step by one rule")
        return replace(
            self,
            values=self.values + other.values,
            inside=self.inside + other.inside,
            telemetry=self.telemetry + other.telemetry,
        )

    def reduced(self, all_reduce: Callable[[Tensor], object]) -> Self:
        """The sum over ranks; `all_reduce` adds up one float64 vector in place, as torch.distributed does."""
        parts = (self.values, self.inside, self.telemetry)
        packed = torch.cat(parts)
        all_reduce(packed)
        values, inside, telemetry = torch.split_with_sizes(packed, [len(part) for part in parts])
        return replace(self, values=values, inside=inside, telemetry=telemetry)


def clip_and_sum(
    per_example: Mapping[str, Tensor], groups: Sequence[Group], rule: ClipRule, counted: Tensor | None = None
) -> ClippedSum:
    """Clip the gradient of each unit, a row, and add them up.

    Two passes over the gradients, each converting one parameter at a time to float64: norms first, then the
    clipped vectors, whose norms are measured again before they are added.

    Args:
        per_example: gradients of one physical batch: for every parameter of every group, any floating dtype,
            shape (b, *shape).
        groups: the groups.
        rule: how to clip.
        counted: whether a row counts, shape (b,); one that does not is as if it were 0, and keeps the shape of
            the batch, on which rounding depends. None: all rows count.

    Raises:
        ValueError: if a parameter is missing or unknown, or the shapes or numbers of rows disagree.
        SensitivityError: if a clipped vector is outside its bound.
    """
    sizes = {name: size for group in groups for name, size in zip(group.parameters, group.sizes, strict=True)}
    rows = _check_rows(per_example, groups, counted)
    device = next(iter(per_example.values())).device
    scratch = torch.empty(rows * max(sizes.values()), dtype=torch.float64, device=device)

    def load(name: str) -> Tensor:
        flat = scratch[: rows * sizes[name]].view(rows, sizes[name])
        return flat.copy_(per_example[name].detach().reshape(rows, sizes[name]))

    row_norms = {name: torch.linalg.vector_norm(load(name), dim=1) for name in sizes}
    counts = torch.ones(rows, dtype=torch.bool, device=device) if counted is None else counted.to(device)
    bad = ~torch.stack(list(row_norms.values())).isfinite().all(dim=0) & counts
    out = bad | ~counts
    out_rows = out.nonzero().flatten()

    def kept(name: str) -> Tensor:
        flat = load(name)
        if len(out_rows):
            flat[out_rows] = 0.0
        return flat

    unit_norms = {name: norms.masked_fill(out, 0.0) for name, norms in row_norms.items()}
    norms = torch.stack([_norm_of(group, unit_norms) for group in groups])
    factors = rule.factors(norms)

    sums: list[Tensor] = []
    clipped_norms: dict[str, Tensor] = {}
    for group, factor in zip(groups, factors, strict=True):
        for name in group.parameters:
            clipped = kept(name).mul_(factor.unsqueeze(1))
            clipped_norms[name] = torch.linalg.vector_norm(clipped, dim=1)
            sums.append(clipped.sum(dim=0))
    if rule.kind != NONE:
        rule.sensitivity.check(torch.stack([_norm_of(group, clipped_norms) for group in groups]))

    tracked = torch.tensor(rule.tracked, dtype=torch.float64, device=device).unsqueeze(1)
    shortened = ((factors < MARGIN) & counts).double().mean(dim=0).sum()
    return ClippedSum(
        values=torch.cat(sums),
        sensitivity=rule.sensitivity,
        inside=((norms <= tracked) & counts).double().sum(dim=1) - counts.double().sum() / 2,
        telemetry=torch.stack([counts.double().sum(), shortened, bad.double().sum()]),
    )


def _check_rows(per_example: Mapping[str, Tensor], groups: Sequence[Group], counted: Tensor | None) -> int:
    shapes = {name: shape for group in groups for name, shape in zip(group.parameters, group.shapes, strict=True)}
    if missing := shapes.keys() - per_example.keys():
        raise ValueError(f"no per-example gradients of {sorted(missing)[0]}; every parameter of every group is needed")
    if unknown := per_example.keys() - shapes.keys():
        raise ValueError(f"{sorted(unknown)[0]} is in no group; it would be trained without privacy")
    rows = len(per_example[next(iter(shapes))]) if counted is None else len(counted)
    for name, shape in shapes.items():
        if tuple(per_example[name].shape) not in {(rows, *shape), (rows, math.prod(shape))}:
            raise ValueError(
                f"gradients of {name} have shape {tuple(per_example[name].shape)}; expected {(rows, *shape)}"
            )
    return rows


def _norm_of(group: Group, norms: Mapping[str, Tensor]) -> Tensor:
    # Along the rows of a matrix, each of which is then added up in one order, wherever it stands.
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norms[name] for name in group.parameters], dim=1), dim=1)
    return norm
