"""The arithmetic of audits; known answers are among the vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dptune.privacy.audit import exposure_tail, guesses_needed, one_run_lower_bound, one_run_p_value


def test_randomised_response_is_refuted_as_rarely_as_promised() -> None:
    """Randomised response at epsilon is exactly epsilon-DP: its guesses are correct with probability a."""
    epsilon, guesses, rng = 1.0, 200, np.random.default_rng(0)
    correct = rng.binomial(guesses, 1 / (1 + math.exp(-epsilon)), size=300)
    bounds = {v: one_run_lower_bound(0.0, canaries=guesses, guesses=guesses, correct=v) for v in set(correct.tolist())}
    refuted = np.mean([bounds[v] > epsilon for v in correct.tolist()])
    assert refuted < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert max(bounds.values()) > 0.5


def test_the_bound_is_where_the_p_value_crosses_the_level() -> None:
    shared = {"canaries": 1000, "guesses": 100, "correct": 90}
    bound = one_run_lower_bound(1e-5, **shared, significance=0.01)
    assert one_run_p_value(bound, 1e-5, **shared) == pytest.approx(0.01, rel=1e-5)
    assert one_run_p_value(bound + 0.1, 1e-5, **shared) > 0.01


def test_more_correct_guesses_refute_more_and_delta_refutes_less() -> None:
    bounds = [one_run_lower_bound(1e-5, canaries=500, guesses=100, correct=v) for v in (50, 70, 90, 100)]
    assert bounds[0] == 0 and bounds == sorted(bounds) and bounds[-1] > 3
    assert one_run_lower_bound(1e-3, canaries=500, guesses=100, correct=90) < bounds[2]


def test_power_is_the_fewest_faultless_guesses() -> None:
    needed = guesses_needed(3.0)
    for guesses, enough in ((needed, True), (needed - 1, False)):
        bound = one_run_lower_bound(0.0, canaries=guesses, guesses=guesses, correct=guesses)
        assert (bound >= 3.0) == enough


def test_exposure_tail_is_a_probability() -> None:
    assert exposure_tail(0.0, 8.0, 1e-5) == 1.0
    assert exposure_tail(20.0, 1.0, 1e-5) == pytest.approx(math.e / 2**20 + 1e-5)


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_impossible_counts_are_refused(canaries: int, guesses: int, correct: int) -> None:
    with pytest.raises(ValueError, match="correct"):
        one_run_p_value(1.0, 1e-5, canaries=canaries, guesses=guesses, correct=correct)
