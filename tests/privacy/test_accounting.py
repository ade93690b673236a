"""Accountants against each other, against the library, and against what must be refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as library
from scipy import integrate, stats

from dptune.privacy import accounting, pld
from dptune.privacy.accounting import (
    ACCOUNTANTS,
    REFERENCE,
    CalibrationError,
    Event,
    epsilon_text,
    rounded_up,
    side_by_side,
)
from dptune.privacy.estimates import epsilon_edgeworth
from dptune.privacy.events import merge
from dptune.privacy.pld import compose, interval
from dptune.privacy.renyi import epsilon_rdp, renyi_divergence

EVENT = Event(1.0, 0.0256, 200)
DELTA = 1e-5


@pytest.mark.parametrize("event", [EVENT, Event(0.6, 0.1, 30), Event(10.0, 1.0, 50), Event(3.0, 0.5, 7)])
def test_distribution_equals_the_librarys(event: Event) -> None:
    theirs = library.from_gaussian_mechanism(
        event.noise_multiplier, sampling_prob=event.sample_rate, value_discretization_interval=1e-3
    ).self_compose(event.count)
    ours = compose([event], 1e-3)
    for delta in (1e-3, 1e-5, 1e-7):
        assert ours.get_epsilon_for_delta(delta) == pytest.approx(theirs.get_epsilon_for_delta(delta), rel=1e-6)


@pytest.mark.parametrize("k", [2, 5])
def test_mixture_distribution_equals_the_librarys(k: int) -> None:
    event = Event(1.5, 0.05, 20, k)
    theirs = library.from_mixture_gaussian_mechanism(
        1.5, list(range(k + 1)), stats.binom.pmf(range(k + 1), k, 0.05), value_discretization_interval=1e-2
    ).self_compose(20)
    for delta in (1e-3, 1e-5, 1e-7):
        ours = compose([event], 1e-2).get_epsilon_for_delta(delta)
        assert ours == pytest.approx(theirs.get_epsilon_for_delta(delta), rel=1e-6)


def test_all_of_a_users_records_at_once_are_one_record_of_that_sensitivity() -> None:
    assert accounting.epsilon([Event(4.0, 1.0, 9, 2)], DELTA) == pytest.approx(
        accounting.epsilon([Event(2.0, 1.0, 9)], DELTA), rel=1e-6
    )


@pytest.mark.parametrize("event", [EVENT, Event(1.6, 0.0256, 200), Event(20.0, 0.1, 5000), Event(1.0, 0.0256, 1)])
def test_printed_interval_costs_little(event: Event) -> None:
    fine = compose([event], interval([event]) / 5).get_epsilon_for_delta(DELTA)
    assert 0 <= accounting.epsilon([event], DELTA) - fine < 2.5e-4


def test_composition_adds_up_and_forgets_order() -> None:
    a, b = Event(0.8, 0.0256, 100), Event(1.2, 0.0256, 100)
    both = accounting.epsilon([a, b], DELTA)
    assert accounting.epsilon([b, a], DELTA) == both
    assert max(accounting.epsilon([a], DELTA), accounting.epsilon([b], DELTA)) < both
    assert accounting.epsilon([EVENT] * 3, DELTA) == accounting.epsilon([Event(1.0, 0.0256, 600)], DELTA)
    assert merge([b, a, b]) == (Event(0.8, 0.0256, 100), Event(1.2, 0.0256, 200))


def test_delta_inverts_epsilon() -> None:
    assert accounting.delta([EVENT], accounting.epsilon([EVENT], DELTA)) == pytest.approx(DELTA, rel=1e-4)


@pytest.mark.parametrize("delta", [0.0, 1e-13, 1.0, math.nan])
def test_meaningless_delta_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta must lie"):
        accounting.epsilon([EVENT], delta)


def test_no_events_have_no_epsilon() -> None:
    with pytest.raises(ValueError, match="at least one event"):
        accounting.epsilon([], DELTA)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.inf),
        ("noise_multiplier", math.nan),
        ("sample_rate", 0.0),
        ("sample_rate", 1.1),
        ("sample_rate", math.nan),
        ("count", 0),
        ("count", 1.5),
        ("group_size", 0),
    ],
)
def test_impossible_events_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Event(**({"noise_multiplier": 1.0, "sample_rate": 0.1} | {field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(("q", "sigma", "order"), [(0.0256, 0.8, 5), (0.3, 2.0, 16), (0.01, 1.0, 2)])
def test_renyi_divergence_equals_the_closed_form_at_whole_orders(q: float, sigma: float, order: int) -> None:
    terms = [
        math.comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(order + 1)
    ]
    expected = math.log(math.fsum(terms)) / (order - 1)
    assert renyi_divergence(Event(sigma, q), order) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("sigma", "order"), [(0.8, 5.6), (1.0, 1.9)])
def test_renyi_divergence_equals_quadrature_at_fractional_orders(sigma: float, order: float) -> None:
    def integrand(x: float) -> float:
        ratio = 1 - 0.0256 + 0.0256 * math.exp((2 * x - 1) / (2 * sigma**2))
        return float(ratio**order * stats.norm.pdf(x, scale=sigma))

    pieces = [-12 * sigma, -2.0, 0.0, 1.0, 3.0, 6.0, order + 12 * sigma]
    value = sum(integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in itertools.pairwise(pieces))
    assert renyi_divergence(Event(sigma, 0.0256), order) == pytest.approx(math.log(value) / (order - 1), rel=1e-7)


def test_renyi_is_a_looser_bound_than_the_reference() -> None:
    for event in (EVENT, Event(0.7, 0.01, 500), Event(1.0, 0.0256, 200, 4), Event(10.0, 1.0, 50)):
        assert accounting.epsilon([event], DELTA) < epsilon_rdp([event], DELTA)


def test_membership_ceiling_is_between_guessing_and_certainty() -> None:
    found = accounting.membership_ceiling([EVENT], 0.01)
    assert 0.01 < found.true_positive_rate < 0.01 + found.advantage
    assert accounting.membership_ceiling([EVENT], 1.0).true_positive_rate == 1.0
    with pytest.raises(ValueError, match="false_positive_rate"):
        accounting.membership_ceiling([EVENT], 1.5)


def test_every_accountant_is_side_by_side_and_labelled() -> None:
    found = side_by_side([EVENT], DELTA)
    assert {name: report.kind for name, report in found.items()} == {
        "pld": "bound",
        "rdp": "bound",
        "prv": "bound",
        "gdp_clt": "estimate",
        "edgeworth": "estimate",
    }
    assert all(report.value is not None and report.reason is None for report in found.values())
    assert found["pld"].value == accounting.epsilon([EVENT], DELTA)


def test_an_accountant_that_fails_says_why_and_stops_no_other() -> None:
    found = side_by_side([Event(1.0, 0.0256, 200, 2)], DELTA)
    assert found["pld"].value is not None and found["rdp"].value is not None
    for name in ("prv", "gdp_clt"):
        assert found[name].value is None
        assert "group_size" in str(found[name].reason) and "\n" not in str(found[name].reason)


def test_edgeworth_is_no_bound() -> None:
    """Why an estimate never gates: its first order lies below a value that is proven from below by the library."""
    optimistic = library.from_gaussian_mechanism(
        1.0,
        sampling_prob=0.0256,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=1e-4,
    ).self_compose(200)
    assert epsilon_edgeworth([EVENT], DELTA) < optimistic.get_epsilon_for_delta(DELTA)
    with pytest.raises(ValueError, match="order"):
        epsilon_edgeworth([EVENT], DELTA, 4)


@pytest.mark.parametrize(
    ("target", "rate", "steps", "group_size"),
    [(3.0, 0.0256, 200, 1), (0.25, 0.064, 50, 1), (0.05, 0.0256, 200, 1), (3.0, 0.0256, 200, 4), (1.0, 1.0, 20, 1)],
)
def test_calibration_is_minimal_and_never_below_target(target: float, rate: float, steps: int, group_size: int) -> None:
    def events(sigma: float) -> list[Event]:
        return [Event(sigma, rate, steps, group_size)]

    sigma = accounting.calibrate(events, target, DELTA)
    assert sigma == round(sigma, 4)
    assert accounting.epsilon(events(sigma), DELTA) <= target
    assert accounting.epsilon(events(round(sigma - 1e-4, 4)), DELTA) > target


def test_calibration_of_a_target_that_any_noise_meets() -> None:
    assert accounting.calibrate(lambda s: [Event(s, 1e-4, 1)], 50.0, 1e-3) == 0.1


def test_unreachable_target_says_what_is_reachable() -> None:
    fixed = Event(1.0, 1.0, 1)
    reachable = accounting.epsilon([fixed, Event(1000.0, 0.0256, 200)], DELTA)
    with pytest.raises(CalibrationError, match=f"{reachable:.4g}.*fewer steps"):
        accounting.calibrate(lambda s: [Event(s, 0.0256, 200), fixed], 3.0, DELTA)


@pytest.mark.parametrize("target", [0.0, -1.0, math.inf, math.nan])
def test_meaningless_target_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target epsilon"):
        accounting.calibrate(lambda s: [Event(s, 0.0256, 200)], target, DELTA)


def test_simulated_transcripts_stay_below_the_reference() -> None:
    """Both directions of delta(1), from sampled privacy losses of 20 steps."""
    rng, q, steps = np.random.default_rng(0), 0.1, 20

    def loss(x: np.ndarray) -> np.ndarray:
        return np.log(1 - q + q * np.exp(x - 0.5)).sum(axis=1)

    shape = (200_000, steps)
    with_unit = loss(rng.standard_normal(shape) + (rng.random(shape) < q))
    without = -loss(rng.standard_normal(shape))
    bound = accounting.delta([Event(1.0, q, steps)], 1.0)
    deltas = [np.maximum(0, 1 - np.exp(1.0 - losses)) for losses in (with_unit, without)]
    for sample in deltas:
        assert sample.mean() - 4 * sample.std() / math.sqrt(sample.size) < bound
    largest = max(deltas, key=np.mean)
    assert largest.mean() == pytest.approx(bound, abs=4 * largest.std() / math.sqrt(largest.size))


def test_epsilon_for_people_is_rounded_up() -> None:
    assert rounded_up(2.3839) == 2.384 and rounded_up(2.3841) == 2.385
    assert rounded_up(math.inf) == math.inf
    assert (epsilon_text(0.49991), epsilon_text(math.inf)) == ("0.500", "inf")


def test_the_reference_is_what_calibration_and_plans_use() -> None:
    assert ACCOUNTANTS[REFERENCE].epsilon is accounting.epsilon and ACCOUNTANTS[REFERENCE].kind == "bound"


def test_a_delta_that_rounding_could_hide_is_refused() -> None:
    from dptune.privacy import accounting

    with pytest.raises(ValueError, match="delta must lie in"):
        accounting.epsilon([Event(1.0, 0.01, 10)], 1e-9)
    assert accounting.delta([Event(10.0, 0.01, 1)], 50.0) == 1e-9


def test_a_plain_gaussian_with_hardly_any_noise_is_accounted_for() -> None:
    from dptune.privacy import accounting

    assert accounting.epsilon([Event(0.1, 1.0)], 1e-5) > 50


@pytest.mark.parametrize("sigma", [5e-324, 1e-300, 1e-9, 1e-6])
def test_noise_too_small_for_double_precision_has_no_finite_epsilon(sigma: float) -> None:
    assert accounting.epsilon([Event(sigma, 1.0)], 1e-5) == math.inf


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_many_releases_with_few_losses_a_step_compose_as_the_library_does_it(rate: float) -> None:
    event = Event(20.0, rate)
    single = pld._single(event, 2e-3)
    assert single._pmf_remove.size < 1000
    ours = pld.compose([replace(event, count=20)], 2e-3).get_epsilon_for_delta(1e-5)
    assert ours == single.self_compose(20).get_epsilon_for_delta(1e-5)
