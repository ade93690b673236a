"""Means with 95 % intervals over runs and test items, and paired differences.

A cell is a mean over runs that differ in their seed only. Two things could have come out differently: the seeds, and
which examples are in the test split, which all runs share. The standard error has both parts: what resampling the runs
and resampling the items within each task would give. Both bootstraps are taken in their limit of infinitely many
draws, which for means is a closed form (the infinitesimal jackknife, Efron 1982, chapter 6), so that every cell can be
computed again to the last digit. Student's t, with degrees of freedom after Welch and Satterthwaite, accounts for there
being few seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float | None
    """Lower end; None where there is no spread to estimate it from."""
    high: float | None
    """Upper end."""
    n: int
    """Runs, or pairs of runs."""
    p: float | None = None
    """Two-sided p-value of a mean of zero, by the same standard error and degrees of freedom."""


@dataclass(frozen=True)
class Answers:
    """Which test items each run got right; all runs saw the same items."""

    tasks: tuple[str, ...]
    """Names of the tasks."""
    task_of: NDArray[np.int64]
    """Task of each item, shape (items,)."""
    correct: Array
    """One or zero, shape (runs, items)."""

    @property
    def averages(self) -> Array:
        """Matrix that takes items to the mean of each task, shape (items, tasks)."""
        return _averages(self.task_of.tobytes(), len(self.tasks))

    def accuracies(self) -> Array:
        """Accuracy of each run on each task, shape (runs, tasks)."""
        return self.correct @ self.averages

    def influence(self, gradient: Array) -> Array:
        """How much each item moves the mean over runs of a function of the tasks' accuracies, shape (items,).

        Args:
            gradient: derivative of the function by each task's accuracy, shape (runs, tasks) or (tasks,).
        """
        weights = (gradient @ self.averages.T) / len(self.correct)
        return np.asarray((weights * self.correct).sum(axis=0))

    def variance(self, influence: Array) -> float:
        """Variance of a statistic when the items of each task are drawn again."""
        averages = self.averages
        spread = influence**2 @ averages - (influence @ averages) ** 2
        return float(spread.clip(min=0) @ (averages > 0).sum(axis=0))


@lru_cache(maxsize=64)
def _averages(task_of: bytes, tasks: int) -> Array:
    chosen = np.eye(tasks)[np.frombuffer(task_of, dtype=np.int64)]
    return np.asarray(chosen / chosen.sum(axis=0))


def mean_over_runs(
    values: Sequence[float],
    *,
    item_variance: float = 0.0,
    items: int = 0,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """The mean over runs with its interval.

    Args:
        values: one number a run; at least one.
        item_variance: variance of the mean when the test items are drawn again.
        items: number of test items behind it.
        bounds: smallest and largest possible value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    n, mean = len(numbers), float(numbers.mean())
    seed_variance = float(numbers.var(ddof=1)) / n if n > 1 else 0.0
    error = math.sqrt(seed_variance + item_variance)
    if error == 0:
        if bounds == (0.0, 1.0) and items:
            return Estimate(mean, *wilson(mean, items), n)  # All right or all wrong, in every run.
        return Estimate(mean, None, None, n)
    # Welch-Satterthwaite: runs have (n - 1) degrees of freedom, items nearly one each.
    degrees = error**4 / (seed_variance**2 / max(n - 1, 1) + item_variance**2 / max(items - 1, 1))
    half, p = t_quantile(degrees) * error, p_value(mean, error, degrees)
    if n > 1 and seed_variance > 0:
        # More degrees of freedom must not make an interval narrower than the runs alone would.
        half = max(half, t_quantile(n - 1) * math.sqrt(seed_variance))
        p = max(p, p_value(mean, math.sqrt(seed_variance), n - 1))
    return Estimate(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), n, p)


def share_of_one_run(share: float, items: int) -> Estimate:
    """The accuracy of a single run, with Wilson's interval over its items."""
    low, high = wilson(share, items)
    return Estimate(share, low, high, 1)


def t_quantile(degrees: float, level: float = 0.975) -> float:
    """Quantile of Student's t."""
    return float(special.stdtrit(degrees, level))


def p_value(mean: float, error: float, degrees: float) -> float:
    """Two-sided p-value of Student's t test of a mean of zero."""
    return float(2 * special.stdtr(degrees, -abs(mean) / error))


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval for a share of `n` items (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for testing several hypotheses (Holm 1979), in the order given."""
    order = np.argsort(p_values)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        corrected[position] = largest
    return corrected
