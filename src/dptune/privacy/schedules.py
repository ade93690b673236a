"""Public schedules of the noise multiplier over the steps (SPECIFICATION.md 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dptune.privacy.events import PlanError
from dptune.privacy.rules import SCHEDULES

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """How the noise multiplier changes over the steps; fixed in advance and public.

    Attributes:
        kind: a key of `SCHEDULES`.
        ratio: last over first factor; unused by `constant`.
        blocks: the schedule is executed as this many blocks of constant noise, each the mean of its part.
    """

    kind: str = "constant"
    ratio: float = 0.5
    blocks: int = 20

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise PlanError(
                f"schedule kind must be one of {', '.join(SCHEDULES)}, not {self.kind!r}; noise chosen from the"
                " run's own releases is not a public schedule"
            )
        if not (math.isfinite(self.ratio) and self.ratio > 0):
            raise PlanError(f"schedule ratio must be finite and above 0, not {self.ratio}")
        if not isinstance(self.blocks, int) or self.blocks < 1:
            raise PlanError(f"schedule blocks must be an integer of at least 1, not {self.blocks!r}")

    def factors(self, steps: int) -> Array:
        """Factor of the noise multiplier at each step, shape (steps,), constant within each block."""
        if self.kind == "constant" or not steps:
            return np.ones(steps)
        parts = np.array_split(self.shape(steps), min(self.blocks, steps))
        return np.concatenate([np.full(part.size, part.mean()) for part in parts])

    def shape(self, steps: int) -> Array:
        """The smooth schedule r(t) behind `factors`, shape (steps,)."""
        factor = SCHEDULES[self.kind]
        return np.array([factor(step / max(steps - 1, 1), self.ratio) for step in range(steps)])
