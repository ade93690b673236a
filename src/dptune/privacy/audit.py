"""Lower bounds on epsilon from an audit, and what an attack may reach at most (SPECIFICATION.md 9).

A passed audit proves nothing; one whose lower bound exceeds the claimed epsilon proves an error.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats


def one_run_p_value(epsilon: float, delta: float, *, canaries: int, guesses: int, correct: int) -> float:
    """Largest probability, for any (epsilon, delta)-DP training, of so many correct guesses or more.

    P[X >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= X < v] / i with X ~ Binomial(r, e^epsilon/(1 + e^epsilon)).
    Steinke, Nasr & Jagielski 2023 (arXiv:2305.08846), Theorem 5.2.

    Args:
        epsilon: claimed epsilon.
        delta: claimed delta.
        canaries: m, each included with probability 1/2, independently, before any sampling.
        guesses: r <= m, fixed before the inclusion bits are seen; the auditor abstains on the rest.
        correct: v <= r.

    Raises:
        ValueError: unless 0 <= correct <= guesses <= canaries.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"need 0 <= correct <= guesses <= canaries, not {correct}, {guesses}, {canaries}")
    count = stats.binom(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(count.sf(correct - 1))
    if correct == 0 or delta == 0:
        return min(tail, 1.0)
    i = np.arange(1, correct + 1)
    near_miss = (count.cdf(correct - 1) - count.cdf(correct - 1 - i)) / i
    return min(tail + 2 * canaries * delta * float(near_miss.max()), 1.0)


def one_run_lower_bound(
    delta: float, *, canaries: int, guesses: int, correct: int, significance: float = 0.05
) -> float:
    """Largest epsilon that the audit refutes at level `significance`; 0 if it refutes none.

    Args:
        delta: claimed delta.
        canaries: as in `one_run_p_value`.
        guesses: as in `one_run_p_value`.
        correct: as in `one_run_p_value`.
        significance: beta; divide it by the number of audits that are looked at.
    """

    def refuted(epsilon: float) -> bool:
        p = one_run_p_value(epsilon, delta, canaries=canaries, guesses=guesses, correct=correct)
        return p < significance

    low, high = 0.0, 100.0
    if not refuted(low):
        return 0.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def guesses_needed(epsilon: float, significance: float = 0.05) -> int:
    """Fewest guesses with which a faultless auditor refutes `epsilon` at delta 0: the power of the audit."""
    return math.ceil(math.log(1 / significance) / math.log1p(math.exp(-epsilon)))


def exposure_tail(bits: float, epsilon: float, delta: float) -> float:
    """Largest probability that one secret's exposure reaches `bits`: e^epsilon 2^-bits + delta.

    Exposure is log2 of the number of candidate secrets less log2 of the rank of the true one, ties broken at
    random (Carlini et al. 2019, arXiv:1802.08232). For a secret inserted k times, epsilon is that of k records.
    """
    return min(1.0, math.exp(epsilon - bits * math.log(2)) + delta)
