"""A privacy budget over all runs on one data set: a Rényi filter whose order is fixed when the account is opened.

Runs are chosen by people who have seen the results of earlier ones, so that what a run costs depends on earlier
outputs. Composing the realised runs by the reference accountant and stopping at the limit is then no guarantee. Adding
up Rényi divergences at one order that was fixed before the first run, and stopping at the divergence that the limit
allows, is one (SPECIFICATION.md 8.3). Nothing here reads or writes files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dptune.privacy import accounting
from dptune.privacy.accounting import epsilon_text
from dptune.privacy.events import Event
from dptune.privacy.renyi import ORDERS, epsilon_at, exchange_curve, optimum, renyi_curve
from dptune.privacy.selection import Repetitions, curve_best, epsilon_best


class BudgetError(ValueError):
    """An account that cannot be read, or a run that it does not allow; one line for a person."""


@dataclass(frozen=True)
class Spending:
    """What one run, or one search as a whole, costs.

    Attributes:
        curve: Rényi divergences at `ORDERS`, fixed before it starts.
        epsilon: its own epsilon at `delta`, by the best accountant there is for it.
        delta: of that epsilon.
        what: of what, in words.
    """

    curve: NDArray[np.float64] = field(repr=False)
    epsilon: float
    delta: float
    what: str

    @classmethod
    def of_run(cls, events: Sequence[Event], score: Sequence[Event], delta: float) -> Spending:
        """Of one run: its training, and its score if it has one; no record is in both (SPECIFICATION.md 8.2)."""
        parts = [part for part in (events, score) if part]
        curve = np.max([renyi_curve(part) for part in parts], axis=0)
        releases = sum(event.count for event in events)
        return cls(
            curve,
            max(accounting.epsilon(part, delta) for part in parts),
            delta,
            f"{releases:,} releases" + (" and a score" if score else ""),
        )

    @classmethod
    def of_search(cls, candidates: Sequence[Sequence[Event]], repetitions: Repetitions, delta: float) -> Spending:
        """Of a search that releases its best run."""
        return cls(
            curve_best(candidates, repetitions),
            epsilon_best(candidates, repetitions, delta),
            delta,
            f"best of a secret number of runs (mean {repetitions.mean:g})",
        )

    def by_unit(self, unit: str) -> dict[str, Spending | None]:
        """What it costs the accounts of examples and of users, by the unit of the run (SPECIFICATION.md 8.3).

        None where it bounds nothing: a user may have any number of examples.
        """
        if unit == "example":
            return {"example": self, "user": None}
        if unit != "user_uls":
            return {"user": self, "example": self}
        # One record less may turn its user's mean round: that is another user, not one user less.
        curve = exchange_curve(self.curve)
        one = replace(
            self, curve=curve, epsilon=optimum(curve, self.delta)[0], what=f"{self.what}, as one user for another"
        )
        return {"user": self, "example": one}

    def at(self, order: float) -> float:
        """Rényi divergence at an order of `ORDERS`."""
        return float(self.curve[ORDERS.index(order)])


@dataclass(frozen=True)
class Booking:
    """One transcript that was booked before it began.

    Attributes:
        token: names the run's folder.
        attempt: number of the transcript in that folder, from 1.
        run: run id.
        cost: Rényi divergence at the account's order; None for a run without a guarantee.
        epsilon: its own epsilon; None likewise.
        delta: of that epsilon.
        what: of what.
        limit: the budget that the run named, if any.
        at: when, in UTC.
        unit: of its guarantee; empty for none, and in bookings of earlier versions for the account's own.
    """

    token: str
    attempt: int
    run: str
    cost: float | None
    epsilon: float | None
    delta: float
    what: str
    limit: float | None
    at: str
    unit: str = ""


@dataclass
class Account:
    """All runs on one data set with one unit of privacy.

    Attributes:
        name: of the account.
        label: of the data, for people.
        unit: `example` or `user`.
        delta: of every epsilon of the account: that of its first run.
        order: the order of the filter, fixed by its first run.
        sources: hashes of the sources that belong to it.
        records: hashes of some records of each.
        bookings: in their order.
        places: of the file that names a booking, by that name, as its system tells it from any other.
        draws: hash of how many trials a search has, and which, by the name of its booking.
        begun: transcripts, by name and number of their booking, that have looked at data.
        ended: those of runs that are done, which cannot go on.
    """

    name: str
    label: str
    unit: str
    delta: float
    order: float
    sources: set[str] = field(default_factory=set)
    records: set[str] = field(default_factory=set)
    bookings: list[Booking] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    draws: dict[str, str] = field(default_factory=dict)
    begun: set[tuple[str, int]] = field(default_factory=set)
    ended: set[tuple[str, int]] = field(default_factory=set)

    @property
    def private(self) -> list[Booking]:
        """The bookings that have a guarantee."""
        return [booking for booking in self.bookings if booking.cost is not None]

    def is_over(self, booking: Booking, *, goes_on: bool) -> bool:
        """Whether what comes next is another transcript than a booked one.

        Args:
            booking: the last one of a run.
            goes_on: whether the run goes on from a checkpoint.
        """
        name = booking.token, booking.attempt
        # Of bookings of earlier versions it is not known.
        return name in self.ended or (not goes_on and (name in self.begun or not booking.unit))

    @property
    def foreign(self) -> list[Booking]:
        """Runs on examples in an account of users, whom they promise nothing."""
        return [booking for booking in self.bookings if booking.unit == "example" != self.unit]

    @property
    def limit(self) -> float | None:
        """The lowest budget that any run named: naming a higher one later, after results were seen, raises nothing."""
        return min((booking.limit for booking in self.bookings if booking.limit is not None), default=None)

    @property
    def divergence(self) -> float:
        """What is spent, as a Rényi divergence at the account's order."""
        return math.fsum(booking.cost for booking in self.private if booking.cost is not None)

    @property
    def spent(self) -> float:
        """Epsilon of all bookings together, whatever later ones were chosen by."""
        private = self.private
        if not private:
            return 0.0
        together = max(epsilon_at(self.divergence, self.order, self.delta), 0.0)
        first = private[0]
        # One run has nothing to adapt to: its own epsilon holds, too.
        if len(private) == 1 and first.delta == self.delta and first.epsilon is not None:
            return min(together, first.epsilon)
        return together

    def left(self, limit: float) -> float:
        """What the filter still allows under a limit, in epsilon (its divergences add up one to one)."""
        if not self.private:
            return limit
        return max(limit - epsilon_at(self.divergence, self.order, self.delta), 0.0)

    def left_text(self, limit: float) -> str:
        """What is left, rounded down."""
        return f"{math.floor(self.left(limit) * 1000) / 1000:.3f}"

    def check(self, spending: Spending, run: str, named: float | None) -> None:
        """Refuse a run that would exceed the lowest limit that was ever named for the data.

        Raises:
            BudgetError: saying what is left.
        """
        limit = min((value for value in (self.limit, named) if value is not None), default=None)
        if limit is None:
            return
        if self.foreign:
            raise BudgetError(
                f"{len(self.foreign)} runs on {self.label} protect single examples, and bound nothing for a user, who "
                f"may have any number of them: no budget of unit {self.unit} can hold; leave privacy.budget out, or "
                "set it for privacy.unit=example"
            )
        if named is not None and spending.delta != self.delta:
            raise BudgetError(
                f"the budget of {self.label} is kept at delta {self.delta:g}, not at {spending.delta:g}; "
                f"set privacy.delta={self.delta:g}"
            )
        total = self.divergence + spending.at(self.order)
        if epsilon_at(total, self.order, self.delta) <= limit:
            return
        if not self.private and spending.delta == self.delta and spending.epsilon <= limit:
            return
        takes = spending.at(self.order) if self.private else spending.epsilon
        bound = f" (the account's limit is {limit:g})" if limit != named else ""
        raise BudgetError(
            f"run {run} would add epsilon {epsilon_text(takes)} to what {self.label} has spent{bound}, and "
            f"{self.left_text(limit)} of {limit:g} is left after {len(self.private)} runs, at delta {self.delta:g} and "
            f"unit {self.unit}; take more noise, fewer steps or a smaller batch (`dptune budget` shows the account)"
        )

    def check_foreign(self, run: str) -> None:
        """Refuse a run on examples where users have a budget.

        Raises:
            BudgetError: naming the way out.
        """
        if self.limit is not None:
            raise BudgetError(
                f"run {run} protects single examples, and bounds nothing for a user of {self.label}, who may have any "
                f"number of them, but has a budget of {self.limit:g}; take privacy.unit=user_els with "
                "privacy.examples_per_user"
            )

    def carried(self) -> list[Booking]:
        """Its runs on examples as they stand in an account of users that is opened later: without a bound."""
        own = (booking for booking in self.bookings if booking.unit in ("", "example"))
        return [
            replace(booking, cost=None, epsilon=None, limit=None, unit="" if booking.cost is None else "example")
            for booking in own
        ]


def order_for(spending: Spending, limit: float | None) -> float:
    """The order of a new account: that at which most runs like the first one fit, or that of its own epsilon.

    It is a function of public numbers, and fixed from then on.
    """
    if limit is None:
        return optimum(spending.curve, spending.delta)[1]
    orders = np.array(ORDERS)
    room = limit - np.array([epsilon_at(0.0, order, spending.delta) for order in ORDERS])
    with np.errstate(divide="ignore", invalid="ignore"):
        runs = np.where(np.isfinite(spending.curve) & (spending.curve > 0), room / spending.curve, -math.inf)
    return float(orders[int(np.argmax(runs))])


def parse(lines: Iterable[str]) -> list[Account]:
    """The accounts in the lines of a file.

    Raises:
        BudgetError: naming the line that cannot be read.
    """
    accounts: dict[str, Account] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            kind, name = row.pop("kind"), row.pop("account")
            if kind == "open":
                accounts[name] = Account(name, **row)
            elif kind == "data":
                accounts[name].sources.add(row["source"])
                accounts[name].records.update(row["records"])
            elif kind == "place":
                accounts[name].places[row["token"]] = row["place"]
            elif kind == "draw":
                accounts[name].draws[row["token"]] = row["hash"]
            elif kind in ("begun", "ended"):
                getattr(accounts[name], kind).add((row["token"], row["attempt"]))
            else:
                accounts[name].bookings.append(Booking(**row))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BudgetError(f"line {number} cannot be read") from None
    return list(accounts.values())
