"""Noise chosen while training runs: what may be chosen, and what must be refused (SPECIFICATION.md 3.3).

The accountants compose noise multipliers that were fixed in advance. If a multiplier is picked after looking
at earlier releases, only the two rules below are shipped: a public floor, and a Rényi filter of one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dptune.privacy.events import Event
from dptune.privacy.renyi import optimum, renyi_curve, renyi_divergence

_GRID = 1e-4
_LARGEST = 1e3


class BudgetExhausted(ValueError):
    """The next release would not fit into the privacy budget: training has to stop before it."""


@dataclass(frozen=True)
class NoiseFloor:
    """A public lower limit of the noise multiplier at each step (SPECIFICATION.md 3.3 a).

    Whatever is chosen above the floor, and whenever training stops, the epsilon of the floor holds.

    Attributes:
        noise_multipliers: the floor of each step.
    """

    noise_multipliers: tuple[float, ...]

    def check(self, step: int, noise_multiplier: float) -> None:
        """Raise BudgetExhausted if the choice lies below the floor or the step beyond the last one."""
        if step >= len(self.noise_multipliers):
            raise BudgetExhausted(f"step {step} lies beyond the {len(self.noise_multipliers)} accounted steps: stop")
        if noise_multiplier < self.noise_multipliers[step]:
            floor = self.noise_multipliers[step]
            raise BudgetExhausted(f"noise multiplier {noise_multiplier} at step {step} is below its floor {floor}")


@dataclass(frozen=True)
class RenyiFilter:
    """Fully adaptive composition at one Rényi order fixed in advance (SPECIFICATION.md 3.3 b).

    Feldman & Zrnic 2021 (arXiv:2008.11193) and Lécuyer 2021 (arXiv:2103.01379): while the divergences of the
    releases that were really made sum to at most ``budget``, the transcript is (order, budget)-RDP and so
    (epsilon, delta)-DP, however each multiplier was chosen from the history.

    Attributes:
        order: Rényi order, above 1.
        epsilon: target epsilon.
        delta: target delta.
        spent: divergence charged so far.
    """

    order: float
    epsilon: float
    delta: float
    spent: float = 0.0

    def __post_init__(self) -> None:
        if not (self.order > 1 and math.isfinite(self.order)):
            raise ValueError(f"order must be finite and above 1, not {self.order}")
        if not self.budget > 0:
            raise ValueError(f"order {self.order} cannot reach epsilon {self.epsilon} at delta {self.delta}")
        if not 0 <= self.spent <= self.budget:
            raise ValueError(f"spent must lie between 0 and the budget {self.budget}, not {self.spent}")

    @classmethod
    def nominal(cls, events: Sequence[Event], epsilon: float, delta: float) -> RenyiFilter:
        """Filter whose order is the best one for a nominal, public plan."""
        return cls(optimum(renyi_curve(events), delta)[1], epsilon, delta)

    @property
    def budget(self) -> float:
        """Total divergence B = epsilon - ln(1 - 1/order) + ln(delta order)/(order - 1)."""
        return self.epsilon - math.log1p(-1 / self.order) + math.log(self.delta * self.order) / (self.order - 1)

    def cost(self, event: Event) -> float:
        """Divergence of all releases of ``event``."""
        return event.count * renyi_divergence(event, self.order)

    def steps_left(self, event: Event) -> int:
        """How many further releases like one of ``event`` fit."""
        return math.floor((self.budget - self.spent) / renyi_divergence(event, self.order))

    def charge(self, event: Event) -> RenyiFilter:
        """Return the filter after ``event``; call it before the data are touched.

        Raises:
            BudgetExhausted: if it does not fit; nothing is charged then.
        """
        total = self.spent + self.cost(event)
        if total > self.budget:
            raise BudgetExhausted(
                f"divergence {total:.6g} would exceed the budget {self.budget:.6g}: raise the noise or stop"
            )
        return replace(self, spent=total)

    def raise_to_fit(self, event: Event) -> Event:
        """Return ``event`` with the smallest noise multiplier that fits (1e-4 grid), never below its own.

        Raises:
            BudgetExhausted: if no multiplier up to 1000 fits.
        """

        def fits(grid: int) -> bool:
            return self.spent + self.cost(replace(event, noise_multiplier=grid * _GRID)) <= self.budget

        if self.spent + self.cost(event) <= self.budget:
            return event
        low, high = math.floor(event.noise_multiplier / _GRID), round(_LARGEST / _GRID)
        if not fits(high):
            raise BudgetExhausted("no noise multiplier fits into what is left of the budget: stop")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return replace(event, noise_multiplier=high * _GRID)


def privacy_filter(rule: Literal["renyi"], events: Sequence[Event], epsilon: float, delta: float) -> RenyiFilter:
    """Open the filter named ``rule`` for noise that is chosen adaptively; only ``renyi`` is sound.

    Raises:
        ValueError: for any other rule. Composing the realised multipliers with a PLD or PRV accountant and
            stopping at the target is not a filter: delta can exceed the target by a fifth although every
            path meets it (SPECIFICATION.md 3.3; arXiv:2602.06756).
    """
    if rule != "renyi":
        raise ValueError(
            f"filter {rule!r} is refused: composing realised noise multipliers and stopping at the target "
            "does not bound delta if they depend on earlier releases; use 'renyi' or a public noise floor"
        )
    return RenyiFilter.nominal(events, epsilon, delta)
