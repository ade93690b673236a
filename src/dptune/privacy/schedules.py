"""Public schedules of the noise multiplier over the steps (SPECIFICATION.md 3.1 and 3.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from dptune.privacy.events import PlanError

Array = NDArray[np.float64]
Kind = Literal["constant", "linear", "cosine", "step", "exponential", "lambert"]

KINDS: tuple[Kind, ...] = ("constant", "linear", "cosine", "step", "exponential", "lambert")
_STAGES = 4


@dataclass(frozen=True)
class Schedule:
    """How the noise multiplier changes over the steps; fixed in advance and public.

    Attributes:
        kind: shape. ``lambert`` is the optimal shape for influences ``ratio ** (T - 1 - t)`` of step t under
            the central-limit budget of a constant multiplier of 1 (:func:`lambert_noise_multipliers`); it is
            only a shape, to be rescaled by calibration.
        ratio: last over first factor; for ``lambert`` the decay of influence a step; unused by ``constant``.
        blocks: the schedule is executed as this many blocks of constant noise, each the mean of its part.
    """

    kind: Kind = "constant"
    ratio: float = 0.5
    blocks: int = 20

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(
                f"schedule kind must be one of {', '.join(KINDS)}, not {self.kind!r}; noise chosen from the"
                " run's own releases is not a public schedule: it needs a Rényi filter"
            )
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise PlanError(f"schedule ratio must be finite and above 0, not {self.ratio}")
        if self.kind == "lambert" and self.ratio > 1:
            raise PlanError(f"schedule ratio of 'lambert' is a decay: choose it in (0, 1], not {self.ratio}")
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise PlanError(f"schedule blocks must be an integer of at least 1, not {self.blocks!r}")

    def factors(self, steps: int) -> Array:
        """Factor of the noise multiplier at each step, shape (steps,), constant within each block."""
        if self.kind == "constant" or not steps:
            return np.ones(steps)
        parts = np.array_split(self.shape(steps), min(self.blocks, steps))
        return np.concatenate([np.full(part.size, part.mean()) for part in parts])

    def shape(self, steps: int) -> Array:
        """The smooth schedule r(t) behind :meth:`factors`, shape (steps,)."""
        u = np.arange(steps) / max(steps - 1, 1)
        rho = self.ratio
        match self.kind:
            case "constant":
                return np.ones(steps)
            case "linear":
                return 1 + (rho - 1) * u
            case "cosine":
                return rho + (1 - rho) * (1 + np.cos(np.pi * u)) / 2
            case "step":
                return np.asarray(rho ** (np.minimum(np.floor(_STAGES * u), _STAGES - 1) / (_STAGES - 1)))
            case "exponential":
                return np.asarray(rho**u)
            case "lambert":
                influence = rho ** np.arange(steps - 1.0, -1.0, -1.0)
                return lambert_noise_multipliers(influence, steps * math.expm1(1.0))


def lambert_noise_multipliers(influence: ArrayLike, budget: float) -> Array:
    """Noise multipliers that minimise sum_t a_t sigma_t^2 under sum_t (exp(1/sigma_t^2) - 1) = budget.

    1/sigma_t^2 = 2 W0(sqrt(a_t / lambda) / 2), lambda by root finding (SPECIFICATION.md 3.2). The budget is
    that of the Gaussian-DP central limit, which is optimistic: calibrate the result with the reference.

    Args:
        influence: a_t > 0, the effect of step t's noise on the result, shape (T,).
        budget: above 0.
    """
    a = np.asarray(influence, dtype=np.float64)
    a = a / a.max()

    def precision(log_lambda: float) -> Array:
        return np.asarray(2 * special.lambertw(0.5 * np.sqrt(a) * math.exp(-log_lambda / 2)).real)

    def excess(log_lambda: float) -> float:
        return math.log(np.expm1(precision(log_lambda)).sum() / budget)

    low = high = 0.0
    while excess(low) < 0:
        low -= 1.0
    while excess(high) > 0:
        high += 1.0
    return 1 / np.sqrt(precision(optimize.brentq(excess, low - 1, high + 1, xtol=1e-13)))
