"""What a whole sweep costs: all runs released, or only the best of a random number (SPECIFICATION.md 8).

The epsilon of one run says nothing about the choice among several runs on the same private data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from dptune.privacy import accounting
from dptune.privacy.events import Event, PlanError
from dptune.privacy.renyi import ORDERS, delta_at, optimum, renyi_curve
from dptune.privacy.streams import KeyRing, Purpose, grid_of


def epsilon_all(runs: Sequence[Sequence[Event]], delta: float) -> float:
    """Epsilon at `delta` of releasing every run: the reference accountant over all their events together.

    Seeds and repeats on the same private data count as runs.
    """
    return accounting.epsilon([event for run in runs for event in run], delta)


@dataclass(frozen=True)
class Repetitions:
    """Distribution of the secret number K of runs of which only the best is released.

    K is drawn independently of the data and never revealed, nor are the total time and the losing runs; each
    run draws its config independently from a public prior (Papernot & Steinke 2022, arXiv:2110.03620).

    Attributes:
        mean: expected number of runs, above 1 (Poisson: at least 1, where the bound is proven).
        eta: shape, above -1, of the truncated negative binomial; 1 geometric, 0 logarithmic, `math.inf`
            Poisson. A Poisson K can be 0: then the base model is released.
    """

    mean: float
    eta: float

    def __post_init__(self) -> None:
        if not self.eta > -1:
            raise PlanError(f"eta must be above -1 (0 logarithmic, 1 geometric, inf Poisson), not {self.eta}")
        enough = self.mean >= 1 if self.eta == math.inf else self.mean > 1
        if not (math.isfinite(self.mean) and enough):
            raise PlanError(f"the mean number of runs must be finite and above 1 (Poisson: at least), not {self.mean}")

    @property
    def gamma(self) -> float:
        """Parameter gamma of the truncated negative binomial with this mean; none for Poisson."""
        if self.eta == math.inf:
            raise PlanError("the Poisson distribution has no gamma")

        def excess(log_gamma: float) -> float:
            # With x = ln(1/gamma), E[K] = eta (e^x - 1) / (1 - e^(-eta x)), and (e^x - 1) / x for eta = 0.
            x = -log_gamma
            scale = 1 / x if self.eta == 0 else self.eta / -math.expm1(-self.eta * x)
            return math.log(math.expm1(x) * scale / self.mean)

        return math.exp(optimize.brentq(excess, -200.0, -1e-9, xtol=1e-15, rtol=1e-15))

    def probabilities(self) -> Iterator[tuple[int, float]]:
        """Every possible K with its probability, ascending."""
        if self.eta == math.inf:
            probability = math.exp(-self.mean)
            for k in itertools.count():
                yield k, probability
                probability *= self.mean / (k + 1)
        gamma = self.gamma
        scale = 1 / -math.log(gamma) if self.eta == 0 else self.eta / (gamma**-self.eta - 1)
        probability = (1 - gamma) * scale
        for k in itertools.count(1):
            yield k, probability
            probability *= (1 - gamma) * (k + self.eta) / (k + 1)

    def quantile(self, level: float) -> int:
        """Smallest k with P(K <= k) >= `level`, which lies in (0, 1)."""
        total = 0.0
        for k, probability in self.probabilities():
            total += probability
            # Beyond the mean, a term that no longer changes the sum means that rounding has eaten the tail.
            if total >= level or (k > self.mean and total + probability == total):
                return k
        raise AssertionError("the probabilities do not end")

    def draw(self, keys: KeyRing) -> int:
        """Draw K; it must stay secret, and is drawn once per sweep."""
        return self.quantile(float(keys.stream(Purpose.SWEEP_K).uniform(1)[0]))

    def renyi_curve(self, run: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rényi curve at `ORDERS` of releasing the best run, from that of one run.

        Papernot & Steinke 2022, Theorems 2 (truncated negative binomial) and 6 (Poisson).
        """
        orders = np.array(ORDERS)
        if self.eta == math.inf:
            deltas = np.array([delta_at(run, math.log1p(1 / (order - 1))) for order in ORDERS])
            return run + self.mean * deltas + math.log(self.mean) / (orders - 1)
        spread = -math.log(self.gamma)
        hat = float(np.min((1 - 1 / orders) * run + spread / orders))
        return run + (1 + self.eta) * min(hat, spread) + math.log(self.mean) / (orders - 1)


def score_event(noise_multiplier: float) -> Event:
    """A noisy count of right answers as an accountant sees it: a Gaussian of sensitivity 1 (SPECIFICATION.md 8.2)."""
    return Event(noise_multiplier, 1.0)


def noisy_score(right: int, noise_multiplier: float, keys: KeyRing) -> float:
    """The score that a search chooses by: the number of right answers on the validation split, with noise.

    Args:
        right: the exact number, each answer a function of its own record and of released weights.
        noise_multiplier: standard deviation of the noise; one record changes the number by at most 1.
        keys: of the run.
    """
    noise = noise_multiplier * float(keys.stream(Purpose.SCORE).normal(1)[0])
    grid = grid_of(noise_multiplier)
    return round((right + noise) / grid) * grid


def curve_best(candidates: Sequence[Sequence[Event]], repetitions: Repetitions) -> NDArray[np.float64]:
    """Rényi curve at `ORDERS` of releasing only the best of K runs; arguments as for `epsilon_best`."""
    return repetitions.renyi_curve(np.max([renyi_curve(events) for events in candidates], axis=0))


def epsilon_best(candidates: Sequence[Sequence[Event]], repetitions: Repetitions, delta: float) -> float:
    """Epsilon at `delta` of releasing only the best of K runs, by Rényi DP.

    Args:
        candidates: events of every config that the prior can draw, and those of the score, which is counted on
            other records than those trained on (SPECIFICATION.md 8.2); the curve is the largest at each order.
        repetitions: distribution of K.
        delta: target delta.
    """
    return optimum(curve_best(candidates, repetitions), delta)[0]
