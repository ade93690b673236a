"""Events to epsilon: the reference accountant, others beside it, and calibration (SPECIFICATION.md 7).

The epsilon that is printed, compared with a target or used in calibration is always `epsilon`: an upper bound by
privacy loss distributions on the grid of `pld.interval`. Everything that is only an estimate says so in its `Reported`
value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Literal

import numpy as np
from scipy import optimize

from dptune.privacy.estimates import epsilon_edgeworth, epsilon_gdp_clt
from dptune.privacy.events import Event, PlanError, merge
from dptune.privacy.guarantee import epsilon_text as epsilon_text
from dptune.privacy.guarantee import rounded_up as rounded_up
from dptune.privacy.pld import compose, interval
from dptune.privacy.renyi import epsilon_rdp

SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 0.1, 1e3
SMALLEST_DELTA = 1e-8  # below, the rounding of the Fourier transforms is no longer negligible
_GRID = 1e-4


class CalibrationError(PlanError):
    """No noise multiplier reaches the target epsilon."""


def epsilon(events: Sequence[Event], delta: float) -> float:
    """Upper bound on epsilon at `delta` of all events together: the reference (SPECIFICATION.md 7.2).

    Pessimistic connect-the-dots privacy loss distributions, larger of both directions; adaptive composition
    of the dominating pairs (theorem B). `math.inf` if no finite epsilon holds at this delta.

    Raises:
        ValueError: without events, or for a delta outside [1e-8, 1).
    """
    if not SMALLEST_DELTA <= delta < 1:
        raise ValueError(f"delta must lie in [{SMALLEST_DELTA}, 1), not {delta}")
    return _epsilon(merge(events), delta)


@lru_cache(maxsize=256)
def _epsilon(events: tuple[Event, ...], delta: float, coarsening: float = 1.0) -> float:
    try:
        grid_interval = interval(events) * coarsening if events else None
        value = float(compose(events, grid_interval).get_epsilon_for_delta(delta))
    except (OverflowError, ZeroDivisionError):  # Losses beyond double precision: too little noise for any epsilon.
        return math.inf
    return math.inf if math.isnan(value) else value


def delta(events: Sequence[Event], epsilon: float) -> float:
    """Upper bound on delta at `epsilon` of all events together, by the reference accountant.

    Never below 1e-9, which rounding in the Fourier transforms could hide.
    """
    return max(float(compose(events).get_delta_for_epsilon(epsilon)), SMALLEST_DELTA / 10)


def epsilon_prv(events: Sequence[Event], delta: float, error: float | None = None) -> float:
    """Upper bound on epsilon by the PRV accountant (Gopi et al. 2021, arXiv:2106.02848): its upper value.

    Args:
        events: the releases, with `group_size` 1.
        delta: target delta.
        error: additive error in epsilon that the upper value includes. By default 0.01 up to 10,000 releases, then
            growing with the square root of their number, so that its grid, and the minutes it takes, do not.

    Raises:
        ValueError: for `group_size` above 1, which the accountant does not have.
    """
    import prv_accountant

    blocks = merge(events)
    if any(event.group_size > 1 for event in blocks):
        raise ValueError("the PRV accountant has no mixture of Gaussians: group_size must be 1")
    variables = [
        prv_accountant.GaussianMechanism(event.noise_multiplier)
        if event.sample_rate == 1.0
        else prv_accountant.PoissonSubsampledGaussianMechanism(event.sample_rate, event.noise_multiplier)
        for event in blocks
    ]
    counts = [event.count for event in blocks]
    if error is None:
        error = 0.01 * math.sqrt(max(sum(counts) / 1e4, 1.0))
    with np.errstate(all="ignore"):
        accountant = prv_accountant.PRVAccountant(
            variables, eps_error=error, delta_error=delta / 1000, max_self_compositions=counts
        )
        upper = float(accountant.compute_epsilon(delta, counts)[2])
    if not math.isfinite(upper):
        raise ValueError("the PRV accountant gives no finite value")
    return upper


@dataclass(frozen=True)
class Reported:
    """What one accountant says.

    Attributes:
        value: epsilon, or None if the accountant failed.
        kind: `bound` (a guarantee) or `estimate` (for plots only).
        accountant: how it was computed, with versions.
        reason: one line on why there is no value.
    """

    value: float | None
    kind: Literal["bound", "estimate"]
    accountant: str
    reason: str | None = None


@dataclass(frozen=True)
class Accountant:
    """One way to compute epsilon.

    Attributes:
        epsilon: from the releases and delta.
        kind: `bound` (a guarantee) or `estimate` (for plots only).
        method: how it is computed.
        library: package that does it, whose version is told; None: this one.
    """

    epsilon: Callable[[Sequence[Event], float], float]
    kind: Literal["bound", "estimate"]
    method: str
    library: str | None = None

    @property
    def description(self) -> str:
        """The method, with the version of its library."""
        return f"{self.library} {version(self.library)}, {self.method}" if self.library else self.method


ACCOUNTANTS: Mapping[str, Accountant] = {
    "pld": Accountant(epsilon, "bound", "connect-the-dots", "dp-accounting"),
    "rdp": Accountant(epsilon_rdp, "bound", "Rényi DP, quadrature"),
    "prv": Accountant(epsilon_prv, "bound", "upper value", "prv-accountant"),
    "gdp_clt": Accountant(epsilon_gdp_clt, "estimate", "Gaussian-DP central limit"),
    "edgeworth": Accountant(epsilon_edgeworth, "estimate", "Edgeworth, first order"),
}
"""Every accountant whose epsilon stands in a record."""

REFERENCE, OF_SEARCHES = "pld", "rdp"
"""The accountant of every epsilon that is a guarantee, and that of a search, for which there is no other theorem (8.2).
"""


def side_by_side(events: Sequence[Event], delta: float) -> dict[str, Reported]:
    """Epsilon by every accountant. One that fails says why and stops no other."""
    reports = {}
    for name, accountant in ACCOUNTANTS.items():
        value, reason = None, None
        try:
            value = accountant.epsilon(events, delta)
            if not math.isfinite(value):
                raise ArithmeticError(f"no finite epsilon at delta {delta:g}")
        except (ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
            value, reason = None, f"{type(error).__name__}: {error}".splitlines()[0]
        reports[name] = Reported(value, accountant.kind, accountant.description, reason)
    return reports


def calibrate(
    make_events: Callable[[float], Sequence[Event]],
    target_epsilon: float,
    delta: float,
) -> float:
    """Smallest noise multiplier on a 1e-4 grid whose reference epsilon is at most the target.

    The root is searched on a loss grid eight times coarser than the reference's, shifted by what one
    evaluation at twice the reference's interval tells about the rounding, and settled by the reference.

    Args:
        make_events: the events of a noise multiplier; must lose privacy as the multiplier falls.
        target_epsilon: above 0.
        delta: target delta.

    Returns:
        A multiplier between 0.1 and 1000.

    Raises:
        CalibrationError: if even a multiplier of 1000 exceeds the target.
        PlanError: if the target is not a finite number above 0.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise PlanError(f"target epsilon must be finite and above 0, not {target_epsilon}")

    def meets(index: int) -> bool:
        return epsilon(make_events(round(index * _GRID, 4)), delta) <= target_epsilon

    def excess(log_multiplier: float, coarsening: float = 8.0) -> float:
        value = _epsilon(merge(make_events(math.exp(log_multiplier))), delta, coarsening)
        return min(value, 1e9) - target_epsilon

    smallest, largest = (round(limit / _GRID) for limit in (SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER))
    guess = round(_estimated_root(excess) / _GRID)
    index = _first_that_meets(meets, min(max(guess, smallest), largest), smallest, largest)
    if index is None:
        reachable = epsilon(make_events(LARGEST_NOISE_MULTIPLIER), delta)
        raise CalibrationError(
            f"epsilon {target_epsilon:g} at delta {delta:g} cannot be reached: even noise multiplier "
            f"{LARGEST_NOISE_MULTIPLIER:g} spends {reachable:.4g}; aim above that, or take fewer steps, a "
            "smaller expected batch size, a larger delta, or more noise in the one-shot releases"
        )
    return round(index * _GRID, 4)


def _estimated_root(excess: Callable[..., float]) -> float:
    """Multiplier at which the reference epsilon is about the target, from coarser grids only."""
    low, high = math.log(SMALLEST_NOISE_MULTIPLIER), math.log(LARGEST_NOISE_MULTIPLIER)
    # From a multiplier of 1 in steps of a factor of 1.5, until the target lies between two of them.
    start = 0.0
    outward = math.log(1.5) if excess(start) > 0 else -math.log(1.5)
    end = start + outward
    while low < end < high and (excess(end) > 0) == (outward > 0):
        start, end = end, end + outward
    if not low < end < high:
        return math.exp(min(max(end, low), high))
    root = float(optimize.brentq(excess, start, end, xtol=3e-3))
    here = excess(root)
    rounding = (here - excess(root, 2.0)) * 63 / 60  # the error of an interval h is of the order of h^2
    slope = (excess(root + 1e-3) - here) / 1e-3
    if slope == 0:  # The grid does not tell the two apart: the reference settles it.
        return math.exp(root)
    return math.exp(root + (rounding - here) / slope)


def _first_that_meets(meets: Callable[[int], bool], guess: int, smallest: int, largest: int) -> int | None:
    """Smallest index in [smallest, largest] that meets a monotone condition, searched from a guess."""
    # Away from the guess in steps that double, until `low` does not meet the condition and `high` does; then halve.
    step = 1
    if meets(guess):
        low, high = guess - step, guess
        while low >= smallest and meets(low):
            step *= 2
            low, high = low - step, low
        low = max(low, smallest - 1)
    else:
        low, high = guess, guess + step
        while high <= largest and not meets(high):
            step *= 2
            low, high = high, high + step
        if high > largest:
            if not meets(largest):
                return None
            high = largest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class MembershipCeiling:
    """Limits on any membership inference attack that the privacy curve implies (SPECIFICATION.md 9.5).

    Attributes:
        false_positive_rate: the rate the attacker allows.
        true_positive_rate: largest rate of detected members at that rate.
        advantage: largest true minus false positive rate at any rate.
    """

    false_positive_rate: float
    true_positive_rate: float
    advantage: float


def membership_ceiling(events: Sequence[Event], false_positive_rate: float) -> MembershipCeiling:
    """Ceiling on membership inference: min over e of e^e f + delta(e) and 1 - e^-e (1 - f - delta(e)).

    Args:
        events: the releases.
        false_positive_rate: f, in [0, 1].
    """
    if not 0 <= false_positive_rate <= 1:
        raise ValueError(f"false_positive_rate must lie in [0, 1], not {false_positive_rate}")
    distribution = compose(events)
    epsilons = np.linspace(0.0, 20.0, 4001)
    deltas = np.asarray(distribution.get_delta_for_epsilon(epsilons))
    direct = np.exp(epsilons) * false_positive_rate + deltas
    mirrored = 1 - np.exp(-epsilons) * (1 - false_positive_rate - deltas)
    rate = min(1.0, float(direct.min()), float(mirrored.min()))
    return MembershipCeiling(false_positive_rate, rate, float(deltas[0]))
