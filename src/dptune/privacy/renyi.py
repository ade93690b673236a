"""Rényi differential privacy of the events (SPECIFICATION.md 7.1), and its conversions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dptune.privacy.events import Event, merge

ORDERS: tuple[float, ...] = (
    *(round(1 + 0.1 * i, 1) for i in range(1, 100)),
    *(float(order) for order in range(11, 65)),
    *(float(round(64 * 2 ** (i / 4))) for i in range(1, 17)),
)
"""Orders at which curves are evaluated: fine where optima of training runs lie, up to 1024."""


def renyi_divergence(event: Event, order: float) -> float:
    """Rényi divergence of one release of `event` at `order` > 1, larger of both directions.

    The integral of (P/Q)^order under Q by the trapezoid rule on a grid fine enough for machine precision;
    for whole orders it equals the closed form of Mironov, Talwar & Zhang 2019 (arXiv:1908.10530), who also
    show that the remove direction dominates when `group_size` is 1.
    """
    sigma, k = event.noise_multiplier, event.group_size
    if event.sample_rate == 1.0:
        return order * k**2 / (2 * sigma**2)
    shifts, log_p = event.mixture()
    step = min(sigma / 20, sigma**2 / 4)

    def log_moment(power: float, low: float, high: float) -> float:
        x = np.arange(low, high, step)
        loss = np.full_like(x, -np.inf)
        for j, p in zip(shifts, log_p, strict=True):
            loss = np.logaddexp(loss, p + j * (2 * x - j) / (2 * sigma**2))
        density = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
        return float(special.logsumexp(power * loss + density)) + math.log(step)

    tail = 12 * sigma
    divergence = log_moment(order, -tail, order * k + tail)
    if k > 1:
        divergence = max(divergence, log_moment(1 - order, -(order - 1) * k - tail, k + tail))
    return max(divergence, 0.0) / (order - 1)


def renyi_curve(events: Sequence[Event]) -> NDArray[np.float64]:
    """Rényi divergences of all events together at `ORDERS` (they add up)."""
    total = np.zeros(len(ORDERS))
    for event in merge(events):
        total += event.count * _curve(event.noise_multiplier, event.sample_rate, event.group_size)
    return total


@lru_cache(maxsize=256)
def _curve(noise_multiplier: float, sample_rate: float, group_size: int) -> NDArray[np.float64]:
    event = Event(noise_multiplier, sample_rate, 1, group_size)
    curve = np.array([renyi_divergence(event, order) for order in ORDERS])
    curve.flags.writeable = False
    return curve


def exchange_curve(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Curve at `ORDERS` for data in which one unit is exchanged for another, from that for one more or less.

    The weak triangle inequality (Mironov 2017, arXiv:1702.07476, Proposition 11, with p = q = 2) by way of the data
    without the unit. Between orders the next higher one counts, as divergences grow with the order.
    """
    orders = np.array(ORDERS)
    # A sentinel of infinity stands for all orders above the last one.
    higher = np.append(curve, np.inf)
    twice = higher[np.searchsorted(orders, 2 * orders - 1e-9)]
    less = higher[np.searchsorted(orders, 2 * orders - 1 - 1e-9)]
    exchanged: NDArray[np.float64] = (orders - 0.5) / (orders - 1) * twice + less
    return exchanged


def epsilon_at(divergence: float, order: float, delta: float) -> float:
    """Epsilon of an (order, divergence)-RDP mechanism at `delta`.

    Canonne, Kamath & Steinke 2020 (arXiv:2004.00010), Proposition 12.
    """
    return divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def optimum(curve: NDArray[np.float64], delta: float) -> tuple[float, float]:
    """Smallest epsilon (at least 0) over `ORDERS` at `delta`, and the order that gives it.

    Raises:
        ValueError: if no order has a finite divergence.
    """
    finite = [(epsilon_at(float(r), a, delta), a) for r, a in zip(curve, ORDERS, strict=True) if math.isfinite(r)]
    if not finite:
        raise ValueError("no Rényi order gives a finite divergence: raise the noise multiplier")
    epsilon, order = min(finite)
    return max(epsilon, 0.0), order


def delta_at(curve: NDArray[np.float64], epsilon: float) -> float:
    """Smallest delta in [0, 1] at `epsilon` over `ORDERS`: the inverse of `epsilon_at`."""
    orders = np.array(ORDERS)
    exponents = (orders - 1) * (curve - epsilon + np.log1p(-1 / orders)) - np.log(orders)
    return float(np.exp(np.minimum(exponents[np.isfinite(curve)], 0.0).min(initial=0.0)))


def epsilon_rdp(events: Sequence[Event], delta: float) -> float:
    """Upper bound on epsilon at `delta` by Rényi DP (SPECIFICATION.md 7.1); looser than the reference."""
    return optimum(renyi_curve(events), delta)[0]
