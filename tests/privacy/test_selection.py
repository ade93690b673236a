"""The privacy of choosing among runs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dptune.privacy.accounting import Event, epsilon
from dptune.privacy.events import PlanError
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.renyi import epsilon_rdp
from dptune.privacy.selection import (
    Repetitions,
    epsilon_all,
    epsilon_best,
    noisy_score,
    score_event,
)
from dptune.privacy.streams import KeyRing, grid_of

RUN = [Event(1.0, 0.0256, 200)]
DELTA = 1e-5


def plan(noise_multiplier: float = 1.0, **changes: object) -> PrivacyPlan:
    fields = {
        "num_units": 10_000,
        "expected_batch_size": 256,
        "steps": 200,
        "delta": DELTA,
        "noise_multiplier": noise_multiplier,
        "max_grad_norm": 1.0,
    }
    return PrivacyPlan(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("eta", [-0.5, 0.0, 0.5, 1.0, 3.0, math.inf])
def test_repetitions_have_their_mean_and_sum_to_one(eta: float) -> None:
    terms = list(itertools.islice(Repetitions(8.0, eta).probabilities(), 20_000))
    assert sum(p for _, p in terms) == pytest.approx(1.0, rel=1e-9)
    assert sum(k * p for k, p in terms) == pytest.approx(8.0, rel=1e-6)


def test_geometric_repetitions_stop_with_one_over_the_mean() -> None:
    assert Repetitions(10.0, 1.0).gamma == pytest.approx(0.1)
    with pytest.raises(PlanError, match="gamma"):
        _ = Repetitions(10.0, math.inf).gamma


@pytest.mark.parametrize("eta", [0.0, 1.0, math.inf])
def test_draws_follow_the_distribution(eta: float) -> None:
    repetitions = Repetitions(6.0, eta)
    draws = np.array([repetitions.draw(KeyRing.reproducible(seed, "sweep")) for seed in range(2_000)])
    for k, p in itertools.islice(repetitions.probabilities(), 4):
        assert abs(np.mean(draws == k) - p) < 4 * math.sqrt(p * (1 - p) / draws.size)
    assert abs(draws.mean() - 6.0) < 4 * draws.std() / math.sqrt(draws.size)


def test_the_draw_belongs_to_the_sweep() -> None:
    keys = KeyRing.reproducible(1, "sweep")
    assert Repetitions(30.0, 0.0).draw(keys) == Repetitions(30.0, 0.0).draw(keys)


@pytest.mark.parametrize(("mean", "eta"), [(1.0, 1.0), (0.5, 0.0), (5.0, -1.0), (math.inf, 1.0), (0.0, math.inf)])
def test_impossible_repetitions_are_refused(mean: float, eta: float) -> None:
    with pytest.raises(PlanError):
        Repetitions(mean, eta)


def test_different_runs_compose_over_their_own_events() -> None:
    other = [Event(2.0, 0.01, 500)]
    both = epsilon_all([RUN, other], DELTA)
    assert both == epsilon([*other, *RUN], DELTA)
    halves = [epsilon(run, DELTA / 2) for run in (RUN, other)]
    assert max(epsilon(RUN, DELTA), epsilon(other, DELTA)) < both < sum(halves)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, math.inf])
def test_selection_costs_more_than_a_run_and_grows_with_the_mean(eta: float) -> None:
    costs = [epsilon_best([RUN], Repetitions(mean, eta), DELTA) for mean in (3.0, 10.0, 30.0)]
    assert epsilon_rdp(RUN, DELTA) < costs[0] < costs[1] < costs[2]


def test_selection_pays_for_the_worst_candidate() -> None:
    repetitions = Repetitions(5.0, 0.0)
    strong = [Event(2.0, 0.0256, 200)]
    assert epsilon_best([strong, RUN], repetitions, DELTA) == epsilon_best([RUN], repetitions, DELTA)


def test_releasing_few_runs_is_cheaper_than_hiding_them() -> None:
    """The crossing of the two rules: three runs against six, at the same expected number."""
    assert epsilon_all([RUN] * 3, DELTA) < epsilon_best([RUN], Repetitions(3.0, 0.0), DELTA) + 0.5
    assert epsilon_all([RUN] * 12, DELTA) > epsilon_best([RUN], Repetitions(12.0, 0.0), DELTA)


def test_a_poisson_mean_below_one_has_no_proven_bound() -> None:
    """At mean 0.5 the formula gives less than the exact divergence of selecting among Gaussian runs."""
    with pytest.raises(PlanError, match="Poisson: at least"):
        Repetitions(0.5, math.inf)
    assert epsilon_best([RUN], Repetitions(1.0, math.inf), DELTA) >= epsilon(RUN, DELTA)


def exact_delta_of_best(
    epsilon_: float, density: np.ndarray, other: np.ndarray, scores: np.ndarray, cell: float, mean: float
) -> float:
    """Exact delta of releasing output and score of the best of a geometric number of runs, by quadrature.

    Args:
        epsilon_: where delta is wanted.
        density: of (score, output) of one run, on a grid of shape (scores, outputs).
        other: the same for the neighbour.
        scores: the grid's scores, ascending.
        cell: area of one cell.
        mean: expected number of runs.
    """

    def best(joint: np.ndarray) -> np.ndarray:
        marginal = joint.sum(axis=1) * cell / (scores[1] - scores[0])
        below = np.cumsum(marginal) - marginal / 2
        below *= scores[1] - scores[0]
        gamma = 1 / mean
        # Density of the maximum of K draws is the derivative of K's generating function at the distribution function.
        return joint * (gamma / (1 - (1 - gamma) * below) ** 2)[:, None]

    p, q = best(density), best(other)
    return max(float(np.maximum(a - math.exp(epsilon_) * b, 0).sum() * cell) for a, b in ((p, q), (q, p)))


@pytest.mark.parametrize(("sigma", "sigma_score"), [(1.0, 2.0), (2.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("neighbour", ["training", "validation"])
def test_the_best_run_is_as_private_as_stated_for_either_kind_of_record(
    sigma: float, sigma_score: float, neighbour: str
) -> None:
    """One record moves the output, which the score looks at, or the score itself: against the exact distribution."""
    mean, delta_ = 4.0, 1e-4
    x, s = np.linspace(-14, 15, 700), np.linspace(-24, 25, 1200)
    cell = float((x[1] - x[0]) * (s[1] - s[0]))

    def joint(moves_output: float, moves_score: float) -> np.ndarray:
        output = np.exp(-((x - moves_output) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        centre = x[None, :] + moves_score
        score = np.exp(-((s[:, None] - centre) ** 2) / (2 * sigma_score**2)) / (sigma_score * math.sqrt(2 * math.pi))
        return output[None, :] * score

    other = joint(1.0, 0.0) if neighbour == "training" else joint(0.0, 1.0)
    trained = [Event(sigma, 1.0)]
    stated = epsilon_best([trained, [score_event(sigma_score)]], Repetitions(mean, 1.0), delta_)
    assert exact_delta_of_best(stated, joint(0.0, 0.0), other, s, cell, mean) <= delta_
    # The quadrature finds what is there: at an epsilon that is far too small there is more.
    single = epsilon(trained if neighbour == "training" else [score_event(sigma_score)], delta_)
    assert exact_delta_of_best(single / 2, joint(0.0, 0.0), other, s, cell, mean) > delta_


@pytest.mark.parametrize(("sigma", "sigma_score", "eta"), [(1.5, 3.0, 0.0), (3.0, 1.5, 1.0), (2.0, 2.0, 0.5)])
def test_epsilon_of_a_search_by_the_published_formula(sigma: float, sigma_score: float, eta: float) -> None:
    """Theorem 2 of arXiv:2110.03620 written out for Gaussians, minimised over real orders."""
    mean, delta_ = 6.0, 1e-5
    gamma = Repetitions(mean, eta).gamma

    def curve(order: float) -> float:
        return max(order / (2 * sigma**2), order / (2 * sigma_score**2))

    hat = min(
        (1 + eta) * ((1 - 1 / order) * curve(order) + math.log(1 / gamma) / order)
        for order in np.linspace(1.001, 200, 200_000)
    )

    def converted(order: float) -> float:
        divergence = curve(order) + hat + math.log(mean) / (order - 1)
        return divergence + math.log1p(-1 / order) - math.log(delta_ * order) / (order - 1)

    oracle = min(converted(order) for order in np.linspace(1.01, 200, 200_000))
    found = epsilon_best([[Event(sigma, 1.0)], [score_event(sigma_score)]], Repetitions(mean, eta), delta_)
    assert oracle <= found <= oracle * 1.001


@pytest.mark.parametrize(("sigma", "mean"), [(1.5, 2.0), (3.0, 8.0), (2.0, 40.0)])
def test_epsilon_of_a_poisson_search_by_the_published_formula(sigma: float, mean: float) -> None:
    """Theorem 6 of arXiv:2110.03620 written out for a Gaussian: its mean counts at each order, not in the end alone."""
    delta_, orders = 1e-5, np.linspace(1.01, 200, 4_000)
    curve = orders / (2 * sigma**2)
    converted = []
    for order in orders:
        exponents = (orders - 1) * (curve - math.log1p(1 / (order - 1)) + np.log1p(-1 / orders)) - np.log(orders)
        single = float(np.exp(min(exponents.min(), 0.0)))
        divergence = order / (2 * sigma**2) + mean * single + math.log(mean) / (order - 1)
        converted.append(divergence + math.log1p(-1 / order) - math.log(delta_ * order) / (order - 1))
    found = epsilon_best([[Event(sigma, 1.0)]], Repetitions(mean, math.inf), delta_)
    assert min(converted) <= found * (1 + 1e-6)
    assert found <= min(converted) * 1.002


def test_the_score_is_an_honest_gaussian_on_a_public_grid() -> None:
    scores = np.array([noisy_score(7, 3.0, KeyRing.reproducible(seed, "run")) for seed in range(4_000)])
    assert abs(scores.mean() - 7) < 4 * 3.0 / math.sqrt(scores.size)
    assert abs(scores.std() / 3.0 - 1) < 4 / math.sqrt(2 * scores.size)
    assert np.all(scores % grid_of(3.0) == 0)
    assert stats.kstest((scores - 7) / 3.0, "norm").pvalue > 1e-3


def test_a_score_that_has_the_smaller_curve_is_free() -> None:
    repetitions = Repetitions(8.0, math.inf)
    assert epsilon_best([RUN, [score_event(20.0)]], repetitions, DELTA) == epsilon_best([RUN], repetitions, DELTA)
    assert epsilon_best([RUN, [score_event(0.5)]], repetitions, DELTA) > epsilon_best([RUN], repetitions, DELTA)
