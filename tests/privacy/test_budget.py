"""The filter of a privacy budget: what it adds up, what it refuses, and that it holds for runs chosen by results."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import special, stats

from dptune.privacy import accounting
from dptune.privacy.budget import Account, Booking, BudgetError, Spending, order_for, parse
from dptune.privacy.events import Event
from dptune.privacy.pld import compose
from dptune.privacy.renyi import ORDERS, epsilon_at, exchange_curve, renyi_curve
from dptune.privacy.selection import Repetitions, epsilon_best, score_event

DELTA, RATE = 1e-5, 0.0256


def spending(sigma: float, steps: int, rate: float = RATE) -> Spending:
    return Spending.of_run([Event(sigma, rate, steps)], [], DELTA)


def booked(account: Account, cost: Spending, limit: float | None = None, delta: float = DELTA) -> None:
    """Check as a run does, and write down."""
    account.check(cost, "run", limit)
    number = len(account.bookings) + 1
    booking = Booking("t", number, "run", cost.at(account.order), cost.epsilon, delta, cost.what, limit, "now")
    account.bookings.append(booking)


def opened(first: Spending, limit: float | None = None) -> Account:
    return Account("a", "data", "example", DELTA, order_for(first, limit))


def test_the_first_run_is_judged_by_its_own_epsilon() -> None:
    first = spending(1.0, 200)
    account = opened(first, first.epsilon)
    assert epsilon_at(first.at(account.order), account.order, DELTA) > first.epsilon
    booked(account, first, first.epsilon)
    assert account.spent == first.epsilon
    assert account.left(first.epsilon) == 0
    with pytest.raises(BudgetError, match="0.000 of"):
        account.check(spending(100.0, 1), "next", None)


def test_runs_add_up_at_the_order_of_the_account_and_the_last_that_fits_is_the_last() -> None:
    first, limit = spending(2.0, 200), 3.0
    account = opened(first, limit)
    with pytest.raises(BudgetError) as caught:
        for _ in range(1000):
            booked(account, first, limit)
    times = len(account.bookings)
    assert 2 <= times < 1000
    divergence = times * first.at(account.order)
    assert account.spent == pytest.approx(epsilon_at(divergence, account.order, DELTA))
    assert account.spent <= limit < epsilon_at(divergence + first.at(account.order), account.order, DELTA)
    assert accounting.epsilon([Event(2.0, RATE, 200 * times)], DELTA) <= account.spent
    assert "\n" not in str(caught.value)
    for said in (f"{account.left_text(limit)} of 3 is left after {times} runs", "delta 1e-05", "unit example"):
        assert said in str(caught.value)


def test_no_choice_by_results_gets_past_the_filter_but_two_do_past_the_reference_accountant() -> None:
    """The counterexample of the specification (3.2), as runs: after a first one, its output decides between two."""
    first, one, other = spending(0.8, 60), spending(0.6341, 1), spending(3.0, 1057)
    limit = 3.0
    for second in ((0.6341, 1), (3.0, 1057)):
        events = [Event(0.8, RATE, 60), Event(second[0], RATE, second[1])]
        assert accounting.epsilon(events, DELTA) <= limit + 0.01  # each path alone keeps the limit; together not
    account = opened(first, limit)
    booked(account, first, limit)
    for choice in (one, other):
        with pytest.raises(BudgetError):
            account.check(choice, "second", limit)


def adaptive_delta(first: Event, options: list[Event], epsilon: float) -> float:
    """Delta of a first run, then of whichever option is worse for the outcome of the first: the reference's bound."""
    before = compose([first])._pmf_remove.to_dense_pmf()
    losses = (np.arange(before.size) + before._lower_loss) * before._discretization
    # The library wants ascending epsilons.
    after = [np.asarray(compose([option]).get_delta_for_epsilon((epsilon - losses)[::-1]))[::-1] for option in options]
    return float(before._infinity_mass + before._probs @ np.max(after, axis=0))


def test_delta_holds_for_choices_by_results_that_the_filter_allows_and_fails_for_the_naive_ones() -> None:
    first, limit = Event(0.8, RATE, 60), 3.0
    naive = [Event(0.6341, RATE, 1), Event(3.0, RATE, 1057)]
    assert adaptive_delta(first, naive, limit) > 1.2 * DELTA
    account = opened(Spending.of_run([Event(0.8, RATE, 3)], [], DELTA), limit)
    booked(account, spending(0.8, 3), limit)
    allowed = []
    for sigma in (0.75, 2.0):
        room, one = account.left(limit), spending(sigma, 1).at(account.order)
        steps = math.floor(room / one)
        assert steps >= 1
        account.check(spending(sigma, steps), "fits", limit)
        with pytest.raises(BudgetError):
            account.check(spending(sigma, steps + 1), "does not", limit)
        allowed.append(Event(sigma, RATE, steps))
    assert adaptive_delta(Event(0.8, RATE, 3), allowed, limit) <= DELTA


def test_the_order_is_fixed_by_the_first_run_whatever_follows() -> None:
    first = spending(1.0, 200)
    account = opened(first, 20.0)
    before = account.order
    booked(account, first, 20.0)
    booked(account, spending(50.0, 100), 20.0)
    assert account.order == before
    room = [20.0 - epsilon_at(0.0, order, DELTA) for order in ORDERS]
    assert account.order == ORDERS[int(np.argmax(np.array(room) / first.curve))]


def test_the_lowest_limit_that_was_named_binds_every_run() -> None:
    small = spending(4.0, 100)
    account = opened(small, 2.0)
    booked(account, small, 2.0)
    with pytest.raises(BudgetError, match="the account's limit is 2"):
        account.check(spending(1.0, 200), "next", 50.0)
    with pytest.raises(BudgetError, match="the account's limit is 2"):
        account.check(spending(1.0, 200), "next", None)


def test_a_limit_at_another_delta_than_the_account_has_is_refused() -> None:
    small = spending(4.0, 100)
    account = opened(small, 2.0)
    other = Spending.of_run([Event(4.0, RATE, 100)], [], 1e-6)
    with pytest.raises(BudgetError, match="kept at delta 1e-05, not at 1e-06; set privacy.delta=1e-05"):
        account.check(other, "next", 2.0)


def test_a_search_costs_what_its_theorem_says_and_a_score_the_larger_part() -> None:
    events, score = [Event(1.0, RATE, 200)], [score_event(5.0)]
    search = Spending.of_search([events, score], Repetitions(10.0, 0.0), DELTA)
    assert search.epsilon == epsilon_best([events, score], Repetitions(10.0, 0.0), DELTA)
    assert search.at(8.0) > Spending.of_run(events, score, DELTA).at(8.0)
    scored = Spending.of_run([Event(50.0, RATE, 1)], score, DELTA)
    assert scored.at(8.0) == pytest.approx(8.0 / (2 * 5.0**2))


@pytest.mark.parametrize(("sigma", "rate"), [(0.8, 0.01), (1.0, 0.2), (3.0, 0.0256), (2.0, 1.0)])
def test_exchanging_a_unit_costs_more_than_leaving_it_out_and_no_more_than_is_charged(
    sigma: float, rate: float
) -> None:
    """The mean of a user whose record is left out may turn round: from the clip bound to its opposite."""
    x = np.linspace(-80, 80, 40_001)

    def log_density(shift: float) -> np.ndarray:
        parts = [stats.norm.logpdf(x, at, sigma) for at in (0.0, shift)]
        return special.logsumexp(parts, axis=0, b=np.array([[1 - rate], [rate]]))

    one, other = log_density(1.0), log_density(-1.0)
    curve = renyi_curve([Event(sigma, rate, 1)])
    charged = exchange_curve(curve)
    for order in (1.5, 2.0, 4.0, 8.0):
        at = ORDERS.index(order)
        moment = special.logsumexp(order * one + (1 - order) * other) + math.log(x[1] - x[0])
        exact = float(moment) / (order - 1)
        assert curve[at] < exact <= charged[at]
    assert math.isinf(charged[-1])


@pytest.mark.parametrize(("unit", "same"), [("user_els", True), ("user_uls", False)])
def test_what_a_run_by_user_costs_its_examples(unit: str, same: bool) -> None:
    cost = spending(2.0, 50)
    by_unit = cost.by_unit(unit)
    assert by_unit["user"] is cost
    example = by_unit["example"]
    assert example is not None
    assert (example is cost) == same
    assert example.at(8.0) == cost.at(8.0) if same else example.at(8.0) > 2 * cost.at(8.0)
    assert cost.by_unit("example") == {"example": cost, "user": None}


def test_lines_make_the_accounts_and_a_damaged_one_is_named() -> None:
    account = opened(spending(1.0, 10))
    booked(account, spending(1.0, 10), 9.0)
    opening = {"kind": "open", "account": "a", "label": "data", "unit": "example", "delta": DELTA}
    lines = [
        json.dumps(opening | {"order": account.order}),
        json.dumps({"kind": "data", "account": "a", "source": "s", "records": ["r"]}),
        json.dumps({"kind": "run", "account": "a", **asdict(account.bookings[0])}),
        json.dumps({"kind": "draw", "account": "a", "token": "t", "hash": "h"}),
    ]
    (read,) = parse(lines)
    assert (read.bookings, read.sources, read.records) == (account.bookings, {"s"}, {"r"})
    assert read.draws == {"t": "h"}
    assert read.limit == 9.0
    assert math.isclose(read.spent, account.spent)
    with pytest.raises(BudgetError, match="line 2 cannot be read"):
        parse([lines[0], lines[1][:-5], lines[2]])
