"""What a privacy plan can choose from: one literal dict for each choice.

The plan and the config take their choices from here, and what carries a choice out takes its row: a new choice is a
new row. Only the standard library is imported, so that a config is checked before anything heavy is loaded; what is
computed on tensors uses their methods alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

NoiseMode = Literal["secure", "reproducible"]
"""Where keys come from (SPECIFICATION.md 10.1)."""

UNITS = ("example", "user_els", "user_uls")
"""Units of privacy: one example, or one user by sampling examples (ELS) or users (ULS). SPECIFICATION.md 1.1 and 7.5.
"""

Row = TypeVar("Row")


def row_of(choices: Mapping[str, Row], name: str, what: str) -> Row:
    """The row of a choice.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in choices:
        raise ValueError(f"{what} {name!r} is unknown; choose one of {', '.join(choices)}")
    return choices[name]


SMALLEST_NORM = 2.0**-20
"""Automatic rules count a shorter gradient as if it had this norm: rounding is not blown up to the clip bound."""


@dataclass(frozen=True)
class ClippingRule:
    """One way to bound a unit's gradient.

    Attributes:
        factors: from norms |g_g|, shape (G, units), bounds b_g, shape (G, 1), and `stability` to clip factors, before
            the margin of 10.3; float64.
        region: where every clipped vector lies: `box` |v_g| <= C_g, `ball` |v| <= C, or `ellipsoid` whose semi-axes are
            the noise of the groups at multiplier 1.
        uniform_only: whether only noise that is equal in all groups fits it.
    """

    factors: Callable[[Tensor, Tensor, float], Tensor]
    region: Literal["box", "ball", "ellipsoid"]
    uniform_only: bool = False


def _together(norms: Tensor, bounds: Tensor, stability: float) -> Tensor:
    """One factor for all groups of a unit; a frozen group has no say in the norm and keeps nothing."""
    live = bounds > 0.0
    joint: Tensor = (norms / bounds).where(live, 0.0).norm(dim=0, keepdim=True)
    return joint.reciprocal().clamp(max=1.0).where(live, 0.0)


def _each(norms: Tensor, bounds: Tensor, stability: float) -> Tensor:
    return (bounds / norms).where(norms > bounds, 1.0)


def _normalised(norms: Tensor, bounds: Tensor, slack: Tensor | float) -> Tensor:
    return bounds / (norms + slack).clamp(min=SMALLEST_NORM)


CLIPPINGS: Mapping[str, ClippingRule] = {
    # SPECIFICATION.md 2.1: all groups together, each group alone (M1), all together in the metric of the noise (M2).
    "flat": ClippingRule(_together, "ball", uniform_only=True),
    "group": ClippingRule(_each, "box"),
    "scaled_flat": ClippingRule(_together, "ellipsoid"),
    # SPECIFICATION.md 4.2: automatic clipping. AUTO-S and AUTO-V (arXiv:2206.07136), PSAC (arXiv:2212.00328).
    "auto_s": ClippingRule(_normalised, "box"),
    "auto_v": ClippingRule(lambda norms, bounds, stability: _normalised(norms, bounds, 0.0), "box"),
    "psac": ClippingRule(
        lambda norms, bounds, stability: _normalised(norms, bounds, stability / (norms + stability)), "box"
    ),
}
"""How one unit's gradient is bounded."""


def _module_of(name: str) -> str:
    """The module that a parameter adapts: what stands before the adapter's own part of the name."""
    parts = name.split(".")
    adapter = next((i for i, part in enumerate(parts) if _ADAPTER_PART.fullmatch(part)), len(parts) - 1)
    return ".".join(parts[:adapter]) or name


_ADAPTER_PART = re.compile(r"(lora|vera|ia3|hada|lokr|oft|boft|hra|adapter)_\w+|modules_to_save")


def _layer_of(name: str) -> str:
    """Everything up to the first number in a parameter's name."""
    number = re.search(r"(?:^|\.)\d+(?=\.|$)", name)
    return name[: number.end()] if number else "outside the layers"


GROUPINGS: Mapping[str, Callable[[str], str]] = {
    "all": lambda name: "all",
    "matrix": lambda name: name,
    "module": _module_of,
    "layer": _layer_of,
    "kind": lambda name: re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name),
}
"""From the name of a parameter to that of its group: one group; each parameter; all that adapts one module (both
factors of LoRA); all in one layer; the same parameter of all layers."""


@dataclass(frozen=True)
class AllocationRule:
    """One way to share noise over the groups: s_g^2 = sigma^2 Z C_g^(2a) (w_g d_g)^(-b) (SPECIFICATION.md 2.2).

    Attributes:
        a: exponent of the threshold.
        b: exponent of weight and dimension.
        solves_thresholds: whether the thresholds C_g are solved for, from tracked quantiles.
        takes_weights: whether the weights w_g are given from outside, before each step.
    """

    a: float
    b: float
    solves_thresholds: bool = False
    takes_weights: bool = False


ALLOCATIONS: Mapping[str, AllocationRule] = {
    "uniform": AllocationRule(0.0, 0.0),
    "equal_budget": AllocationRule(1.0, 0.0),
    "min_energy": AllocationRule(0.5, 0.5),
    "equal_snr": AllocationRule(1.0, 1.0),
    "joint": AllocationRule(0.5, 0.5, solves_thresholds=True),  # SPECIFICATION.md 2.4
    "lora_weight_space": AllocationRule(0.5, 0.5, takes_weights=True),  # SPECIFICATION.md 2.5
}
"""How noise is shared over the groups at a fixed total."""


WEIGHTS: Mapping[str, Callable[[Sequence[float], Sequence[float], Sequence[float]], Sequence[float]]] = {
    "static": lambda energy, resolution, second_moment: [1.0] * len(energy),
    "released_energy": lambda energy, resolution, second_moment: list(map(max, energy, resolution)),
    "adam": lambda energy, resolution, second_moment: second_moment,
}
"""From energy, resolution and second moment of what was released to one over the importance of each group
(SPECIFICATION.md 2.6). Weights that look at anything private but unreleased would have to be paid for."""


_STAGES = 4

SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "constant": lambda u, ratio: 1.0,
    "linear": lambda u, ratio: 1 + (ratio - 1) * u,
    "cosine": lambda u, ratio: ratio + (1 - ratio) * (1 + math.cos(math.pi * u)) / 2,
    "step": lambda u, ratio: ratio ** (min(math.floor(_STAGES * u), _STAGES - 1) / (_STAGES - 1)),
    "exponential": lambda u, ratio: ratio**u,
}
"""Noise multiplier over that of the first step, from the share u of the steps that is done and the ratio of the last to
the first (SPECIFICATION.md 3.1)."""
