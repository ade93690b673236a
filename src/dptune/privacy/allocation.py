"""How the privacy of one step is shared by the parameter groups (SPECIFICATION.md 2 and 4.1).

All groups are released together from one batch, so the step is a single Gaussian mechanism and not one per group.
Thresholds, weights and noise may differ from group to group, as functions of public constants and of past releases.
The noise multiplier of all groups together may not: `PrecisionBudget` checks it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dptune.privacy.rules import ALLOCATIONS, WEIGHTS, row_of

Vector = NDArray[np.float64]


class PrecisionError(ValueError):
    """The noise of a step is smaller than the plan has paid for; nothing may be released."""


@dataclass(frozen=True)
class Group:
    """Parameters which share one threshold and one noise standard deviation.

    Attributes:
        name: unique name; part of the key of the group's noise stream.
        parameters: names of its parameters, in the order in which their coordinates are laid out.
        dimension: number of coordinates d_g.
        shapes: one shape a parameter; may be left out for a single flat vector.
    """

    name: str
    parameters: tuple[str, ...]
    dimension: int
    shapes: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.parameters:
            raise ValueError(f"group {self.name!r} has no parameters; leave it out")
        if not self.shapes and len(self.parameters) == 1:
            object.__setattr__(self, "shapes", ((self.dimension,),))
        if len(self.shapes) != len(self.parameters):
            raise ValueError(f"group {self.name!r} needs one shape for each of its {len(self.parameters)} parameters")
        if self.dimension != sum(self.sizes) or self.dimension < 1:
            raise ValueError(f"group {self.name!r}: dimension {self.dimension} is not the size of {self.shapes}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of coordinates of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class PrecisionRow:
    """One released sum: how far one unit can move it (in l2 norm) and the noise it gets."""

    name: str
    sensitivity: float
    std: float


@dataclass(frozen=True)
class PrecisionBudget:
    """The precision budget of a step: sum_j (Delta_j / s_j)^2 = 1 / sigma^2 (SPECIFICATION.md 2.1, eq. 1)."""

    rows: tuple[PrecisionRow, ...]

    @property
    def precision(self) -> float:
        """The sum over rows of (sensitivity / std)^2; infinite where a row can move and has no noise."""
        return sum(_precision(row.sensitivity, row.std) for row in self.rows)

    @property
    def effective_noise_multiplier(self) -> float:
        """The sigma of the one Gaussian mechanism which all rows together are."""
        return _multiplier(self.precision)

    def remaining(self, planned: float) -> float:
        """The noise multiplier that is left for the gradients when these rows are paid for (4.1: sigma_Delta).

        Raises:
            PrecisionError: if the rows leave nothing.
        """
        left = _precision(1.0, planned) - self.precision
        if left <= 0.0:
            raise PrecisionError(
                f"noise multiplier {planned:g} leaves nothing for the gradients; raise the row's noise"
            )
        return _multiplier(left)

    def check(self, planned: float) -> float:
        """Return the effective multiplier, at least `planned` up to a relative 1e-9.

        Raises:
            PrecisionError: if it is smaller, or not a number.
        """
        effective = self.effective_noise_multiplier
        if not effective >= planned * (1.0 - 1e-9):
            raise PrecisionError(
                f"noise multiplier {effective:.9g} is below the planned {planned:.9g}; nothing is released"
            )
        return effective


def _precision(sensitivity: float, std: float) -> float:
    if sensitivity == 0.0:
        return 0.0
    return (sensitivity / std) ** 2 if std > 0.0 else math.inf


def _multiplier(precision: float) -> float:
    return math.inf if precision == 0.0 else 1.0 / math.sqrt(precision)


def share_std(sigma: float, sensitivity: float, share: float) -> float:
    """Noise of a row that takes a `share` in (0, 1] of the precision: sigma Delta / sqrt(share) (2.1)."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is {share:g}; choose it in (0, 1]")
    return sigma * sensitivity / math.sqrt(share)


def noise_stds(rule: str, thresholds: ArrayLike, dimensions: ArrayLike, weights: ArrayLike, sigma: float) -> Vector:
    """Noise standard deviations s_g, on the sum, which spend exactly the precision of `sigma` (2.2).

    `min_energy` minimises sum_g w_g d_g s_g^2; `joint` and `lora_weight_space` are the same rule with
    thresholds of `joint_thresholds` or weights of `lora_group_weights`. A group of threshold 0 is frozen: except
    under `uniform`, it gets no noise and must release zeros.

    Args:
        rule: a key of `ALLOCATIONS`.
        thresholds: C_g >= 0, shape (G,).
        dimensions: d_g, shape (G,).
        weights: w_g > 0, shape (G,); only their ratios matter.
        sigma: noise multiplier of all the groups together.

    Raises:
        ValueError: if the rule is unknown, or no threshold is positive.
    """
    row = row_of(ALLOCATIONS, rule, "allocation rule")
    a, b = row.a, row.b
    c, wd = np.asarray(thresholds, float), np.asarray(weights, float) * np.asarray(dimensions, float)
    live = c > 0.0
    if not live.any():
        raise ValueError("every threshold is 0; raise max_grad_norm")
    z = float(np.sum(c[live] ** (2 - 2 * a) * wd[live] ** b))
    return np.asarray(sigma * np.sqrt(z) * c**a * wd ** (-b / 2))


def joint_thresholds(
    mean_norms: ArrayLike, dimensions: ArrayLike, weights: ArrayLike, sigma: float, expected_batch_size: float
) -> Vector:
    """Thresholds which minimise clipping plus noise error when the norms are exponential (2.4, equation 3).

    Solves S = sum_g sqrt(w_g d_g) C_g(S), C_g = m_g [ln(m_g L^2 sqrt(w_g/d_g) / (sigma^2 S))]_+ by bisection.
    A group whose threshold comes out as 0 is not worth its noise: it is frozen.

    Args:
        mean_norms: m_g > 0, shape (G,), from released quantiles only.
        dimensions: d_g, shape (G,).
        weights: w_g > 0, shape (G,).
        sigma: noise multiplier of the gradients.
        expected_batch_size: L.

    Returns:
        C_g, shape (G,), on the scale of `mean_norms`; at least one is positive.
    """
    m, d, w = (np.asarray(x, float) for x in (mean_norms, dimensions, weights))
    worth = m * expected_batch_size**2 * np.sqrt(w / d) / sigma**2  # the S beyond which the group is frozen

    def thresholds(s: float) -> Vector:
        return np.asarray(m * np.log(np.maximum(worth / s, 1.0)))

    low, high = math.log(worth.max()) - 200.0, math.log(worth.max())
    for _ in range(100):
        middle = (low + high) / 2
        s = math.exp(middle)
        low, high = (middle, high) if np.sum(np.sqrt(w * d) * thresholds(s)) > s else (low, middle)
    return thresholds(math.exp(low))


def clamp_weights(weights: ArrayLike, floor: float) -> Vector:
    """Weights over their maximum, clamped to [floor, 1] (2.6); infinite ones count as the maximum."""
    w = np.asarray(weights, float)
    finite = w[np.isfinite(w)]
    top = float(finite.max()) if finite.size else 1.0
    return np.clip(w / top, floor, 1.0) if top > 0.0 else np.ones_like(w)


def lora_group_weights(groups: Sequence[Group], squared_norms: Mapping[str, float]) -> dict[str, float]:
    """Weights of groups of LoRA factors, by the noise that they put into BA to first order (2.5).

    A factor weighs its partner's squared norm over the rank, any other parameter 1, a group the mean over its
    coordinates. This costs nothing as long as the norms are those of public or released parameters.

    Args:
        groups: the groups, whose parameters are named as PEFT does (`...lora_A...`, `...lora_B...`).
        squared_norms: squared Frobenius norm of each factor, also of a frozen one.

    Raises:
        ValueError: if the norm of a factor's partner is missing.
    """

    def weight(name: str, shape: tuple[int, ...]) -> float:
        factor = re.search(r"lora_(?:embedding_)?([AB])\b", name)
        if factor is None:
            return 1.0
        is_a = factor[1] == "A"
        partner = name[: factor.start(1)] + ("B" if is_a else "A") + name[factor.end(1) :]
        if partner not in squared_norms:
            raise ValueError(f"the norm of {partner} is needed to weigh {name}; pass it")
        return squared_norms[partner] / (shape[0] if is_a else shape[1])

    return {
        group.name: sum(
            size / group.dimension * weight(name, shape)
            for name, shape, size in zip(group.parameters, group.shapes, group.sizes, strict=True)
        )
        for group in groups
    }


def debiased_energy(
    squared_norms: ArrayLike, dimensions: ArrayLike, stds: ArrayLike, expected_batch_size: float
) -> Vector:
    """Unbiased energy of the mean clipped gradient, (|y_g|^2 - d_g s_g^2) / L^2; can be negative (2.6)."""
    y, d, s = (np.asarray(x, float) for x in (squared_norms, dimensions, stds))
    return np.asarray((y - d * s**2) / expected_batch_size**2)


def mean_of_quantile(quantiles: ArrayLike, gamma: float) -> Vector:
    """Mean of an exponential law whose `gamma`-quantile is given: C / -ln(1 - gamma) (2.4 at gamma = 1/2)."""
    return np.asarray(quantiles, float) / -math.log1p(-gamma)


@dataclass(frozen=True)
class AllocationState:
    """What the allocation remembers of the released history; nothing else enters it (2.6, theorem B).

    The moving averages start at 0 and are not bias-corrected: the correction is the same for every group, and
    only the ratios of weights matter.

    Attributes:
        groups: names of the groups, in order.
        thresholds: tracked C_g.
        steps: number of releases seen.
        energy: moving average of the debiased energies.
        resolution: moving average of what an energy can resolve, s_g^2 sqrt(2 d_g) / L^2.
        second_moment: moving average of the mean squared coordinate of y_g / L: the mean of Adam's v over the
            group.
    """

    groups: tuple[str, ...]
    thresholds: tuple[float, ...]
    steps: int
    energy: tuple[float, ...]
    resolution: tuple[float, ...]
    second_moment: tuple[float, ...]

    @classmethod
    def start(cls, groups: Sequence[Group], thresholds: ArrayLike) -> Self:
        """The state before the first release."""
        zero = (0.0,) * len(groups)
        return cls(tuple(group.name for group in groups), _tuple(thresholds), 0, zero, zero, zero)

    def update(
        self,
        squared_norms: ArrayLike,
        stds: ArrayLike,
        dimensions: ArrayLike,
        expected_batch_size: float,
        ema: float,
    ) -> Self:
        """The state after a release y with squared norms |y_g|^2 and noise s_g, both on the sum.

        Args:
            squared_norms: |y_g|^2, shape (G,).
            stds: s_g, shape (G,).
            dimensions: d_g, shape (G,).
            expected_batch_size: L.
            ema: share of the old average which is kept; Adam's beta_2 for the weights `adam`.
        """
        y, d, s = (np.asarray(x, float) for x in (squared_norms, dimensions, stds))

        def average(old: tuple[float, ...], new: Vector) -> tuple[float, ...]:
            return _tuple(ema * np.asarray(old) + (1.0 - ema) * new)

        return replace(
            self,
            steps=self.steps + 1,
            energy=average(self.energy, debiased_energy(y, d, s, expected_batch_size)),
            resolution=average(self.resolution, s**2 * np.sqrt(2 * d) / expected_batch_size**2),
            second_moment=average(self.second_moment, y / d / expected_batch_size**2),
        )

    def track(
        self, fractions: ArrayLike, quantile: float, learning_rate: float, minimum: float, maximum: float
    ) -> Self:
        """Move the thresholds to the quantile: C_g exp(-eta (b_g - gamma)), clamped (4.1; 1905.03871).

        Args:
            fractions: noised fraction of norms within C_g, shape (G,).
            quantile: gamma.
            learning_rate: eta.
            minimum: smallest threshold.
            maximum: largest threshold.
        """
        step = np.exp(-learning_rate * (np.asarray(fractions, float) - quantile))
        return replace(self, thresholds=_tuple(np.clip(np.asarray(self.thresholds) * step, minimum, maximum)))

    def weights(self, kind: str, floor: float) -> Vector:
        """Weights w_g of the next step, in [floor, 1], shape (G,) (2.6).

        Args:
            kind: a key of `WEIGHTS`.
            floor: smallest ratio to the largest weight.

        Raises:
            ValueError: if the kind is unknown.
        """
        inverse = row_of(WEIGHTS, kind, "allocation weights")
        if self.steps == 0:
            return np.ones(len(self.groups))
        with np.errstate(divide="ignore"):
            return clamp_weights(1.0 / np.asarray(inverse(self.energy, self.resolution, self.second_moment)), floor)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The state that `to_dict` wrote, also when it went through JSON."""
        return cls(
            groups=tuple(values["groups"]),
            thresholds=_tuple(values["thresholds"]),
            steps=int(values["steps"]),
            energy=_tuple(values["energy"]),
            resolution=_tuple(values["resolution"]),
            second_moment=_tuple(values["second_moment"]),
        )


def _tuple(values: ArrayLike) -> tuple[float, ...]:
    return tuple(float(value) for value in np.asarray(values, float))
