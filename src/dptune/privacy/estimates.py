"""Estimates of epsilon that are not bounds (SPECIFICATION.md 7.4): for plots, never for a guarantee."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from dptune.privacy.events import Event, merge

Array = NDArray[np.float64]


def gdp_clt_mu(events: Sequence[Event]) -> float:
    """Parameter mu = q sqrt(T (exp(1/sigma^2) - 1)) of the Gaussian-DP central limit.

    Events add up in quadrature; for `sample_rate` 1 the exact sqrt(T) / sigma is used. Bu et al. 2020
    (arXiv:1911.11607).

    Raises:
        ValueError: for `group_size` above 1, for which no such limit is stated.
    """
    total = 0.0
    for e in events:
        if e.group_size > 1:
            raise ValueError("the Gaussian-DP limit is stated for group_size 1 only")
        inverse = 1 / e.noise_multiplier**2
        if inverse > 700:
            raise ValueError(f"the Gaussian-DP limit overflows at noise multiplier {e.noise_multiplier}")
        total += e.count * (inverse if e.sample_rate == 1.0 else e.sample_rate**2 * math.expm1(inverse))
    return math.sqrt(total)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at `delta` of the Gaussian mechanism of sensitivity-to-noise ratio `mu` (exact)."""

    def excess(epsilon: float) -> float:
        lower = math.exp(epsilon + special.log_ndtr(-epsilon / mu - mu / 2))
        return float(special.ndtr(-epsilon / mu + mu / 2)) - lower - delta

    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1))


def epsilon_gdp_clt(events: Sequence[Event], delta: float) -> float:
    """Estimate of epsilon by the Gaussian-DP central limit: optimistic, exact only for sample rate 1."""
    return gaussian_epsilon(gdp_clt_mu(events), delta)


def epsilon_edgeworth(events: Sequence[Event], delta: float, order: int = 1) -> float:
    """Estimate of epsilon by an Edgeworth expansion of the summed privacy loss.

    Wang et al. 2022 (arXiv:2206.04236), used at first order by EW-Tune (arXiv:2210.15042). Larger of both
    directions. Not a bound: it under- and overshoots, and its error interval is vacuous at the usual delta.

    Args:
        events: the releases.
        delta: target delta.
        order: 0 (normal approximation) to 3.

    Raises:
        ValueError: if `order` is not 0 to 3 or the expansion never falls below `delta`.
    """
    if order not in range(4):
        raise ValueError(f"order of the Edgeworth expansion must be 0, 1, 2 or 3, not {order}")
    under_p, under_q = np.sum(
        [e.count * _cumulants(e.noise_multiplier, e.sample_rate, e.group_size) for e in merge(events)], axis=0
    )
    negate = np.array([-1.0, 1.0, -1.0, 1.0, -1.0])
    return max(
        _last_crossing(under_p, under_q, delta, order),
        _last_crossing(negate * under_q, negate * under_p, delta, order),
    )


def _last_crossing(upper: Array, lower: Array, delta: float, order: int) -> float:
    """Largest epsilon at which the expanded delta(epsilon) is `delta`; the expansion is not monotone."""
    survival_upper, survival_lower = _survival(upper, order), _survival(lower, order)

    def excess(epsilon: Array) -> Array:
        return survival_upper(epsilon) - np.exp(epsilon) * survival_lower(epsilon) - delta

    grid = np.linspace(0.0, max(upper[0] + 12 * math.sqrt(upper[1]), 1.0), 20_001)
    above = np.flatnonzero(excess(grid) > 0)
    if above.size == 0:
        return 0.0
    if above[-1] == grid.size - 1:
        raise ValueError("the Edgeworth expansion does not fall below delta: use a bound")
    return float(optimize.brentq(lambda e: float(excess(np.array(e))), *grid[above[-1] : above[-1] + 2]))


def _survival(cumulants: Array, order: int) -> Callable[[Array], Array]:
    mean, variance = cumulants[:2]
    l3, l4, l5 = (cumulants[j - 1] / variance ** (j / 2) for j in (3, 4, 5))
    hermite = np.zeros(9)
    if order >= 1:
        hermite[2] += l3 / 6
    if order >= 2:
        hermite[[3, 5]] += l4 / 24, l3**2 / 72
    if order >= 3:
        hermite[[4, 6, 8]] += l5 / 120, l3 * l4 / 144, l3**3 / 1296

    def survival(epsilon: Array) -> Array:
        z = (epsilon - mean) / math.sqrt(variance)
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return np.asarray(special.ndtr(-z) + density * np.polynomial.hermite_e.hermeval(z, hermite))

    return survival


@lru_cache(maxsize=256)
def _cumulants(noise_multiplier: float, sample_rate: float, group_size: int) -> Array:
    """First five cumulants of one release's privacy loss ln P/Q, under P (row 0) and under Q (row 1)."""
    event = Event(noise_multiplier, sample_rate, 1, group_size)
    sigma = event.noise_multiplier
    shifts, log_p = event.mixture()
    x = np.arange(-12 * sigma, group_size + 12 * sigma, min(sigma, sigma**2) / 200)
    loss = special.logsumexp(log_p[:, None] + shifts[:, None] * (2 * x - shifts[:, None]) / (2 * sigma**2), axis=0)
    q = np.exp(-(x**2) / (2 * sigma**2))
    rows = []
    for weight in (np.exp(loss) * q, q):
        weight = weight / weight.sum()
        mean = weight @ loss
        m2, m3, m4, m5 = (weight @ (loss - mean) ** j for j in (2, 3, 4, 5))
        rows.append([mean, m2, m3, m4 - 3 * m2**2, m5 - 10 * m2 * m3])
    return np.array(rows)
