"""What an accountant is told: blocks of identical Poisson-subsampled Gaussian releases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special


class PlanError(ValueError):
    """A plan, or its use, for which no true epsilon could be stated; one line on what to change."""


@dataclass(frozen=True, order=True)
class Event:
    """`count` Poisson-subsampled Gaussian releases with the same parameters (SPECIFICATION.md 2 and 7.5).

    Attributes:
        noise_multiplier: noise standard deviation over the clip norm of one record.
        sample_rate: probability that a record takes part, in (0, 1]; 1 is the plain Gaussian mechanism.
        count: number of releases.
        group_size: records of one privacy unit, each sampled and clipped on its own. Above 1 the dominating
            pair is the binomial mixture of Gaussians of example-level sampling with user-level privacy
            (Charles et al. 2024, arXiv:2407.07737).
    """

    noise_multiplier: float
    sample_rate: float
    count: int = 1
    group_size: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PlanError(f"noise_multiplier must be finite and above 0, not {self.noise_multiplier}")
        if not 0 < self.sample_rate <= 1:
            raise PlanError(f"sample_rate must lie in (0, 1], not {self.sample_rate}")
        for name in ("count", "group_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PlanError(f"{name} must be an integer of at least 1, not {value!r}")

    def mixture(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Shifts j and log-probabilities of the mixture sum_j Bin(group_size, q)(j) N(j, sigma^2)."""
        shifts = np.arange(self.group_size + 1, dtype=np.float64)
        if self.sample_rate == 1.0:
            return shifts[-1:], np.zeros(1)
        k, q = self.group_size, self.sample_rate
        log_choose = special.gammaln(k + 1) - special.gammaln(shifts + 1) - special.gammaln(k - shifts + 1)
        return shifts, log_choose + shifts * math.log(q) + (k - shifts) * math.log1p(-q)


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """Add up the counts of events that differ in nothing else; order does not matter to any accountant."""
    counts: Counter[Event] = Counter()
    for event in events:
        counts[replace(event, count=1)] += event.count
    return tuple(replace(event, count=count) for event, count in sorted(counts.items()))
