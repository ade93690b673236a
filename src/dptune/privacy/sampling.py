"""Poisson sampling of privacy units (SPECIFICATION.md 1.2 and 7.5).

Batches are drawn independently at each step, are never truncated, and can be empty; the accountant's epsilon
holds for nothing else. A sampler is a pure function of its keys and the step.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dptune.privacy.events import PlanError
from dptune.privacy.streams import KeyRing, Purpose

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One logical batch.

    Attributes:
        indices: rows of the data set, shape (n,).
        units: position in the batch of the privacy unit that is clipped as one, for each row, shape (n,).
        num_units: number of such units; secret, like everything else here.
    """

    indices: Rows
    units: Rows
    num_units: int


@dataclass(frozen=True)
class PoissonSampler:
    """Includes each of its members independently with the sample rate, anew at each step.

    Attributes:
        keys: secret keys of the run.
        sample_rate: inclusion probability q.
        rows: rows of each member, each shape (n_member,): single examples, or all rows of one user.
        names: of each member, for the public choice of a user's rows; None if members are examples.
        examples_per_user: at most so many rows of a sampled user take part, chosen anew at each step.
    """

    keys: KeyRing
    sample_rate: float
    rows: tuple[Rows, ...] | Rows
    names: tuple[str, ...] | None = None
    examples_per_user: int | None = None

    @classmethod
    def over_examples(cls, keys: KeyRing, sample_rate: float, rows: Rows) -> PoissonSampler:
        """Sample the given rows, each a unit of its own (also for ELS, on the rows that the cap keeps)."""
        return cls(keys, sample_rate, np.asarray(rows, dtype=np.int64))

    @classmethod
    def over_users(
        cls, keys: KeyRing, sample_rate: float, users: Sequence[Hashable], examples_per_user: int
    ) -> PoissonSampler:
        """Sample users (ULS); each brings up to `examples_per_user` rows, chosen by public coins."""
        rows = rows_by_user(users)
        return cls(keys, sample_rate, tuple(rows.values()), tuple(rows), examples_per_user)

    @property
    def all_rows(self) -> Rows:
        """Every row that may be drawn, once; shape (n,)."""
        return np.asarray(self.rows) if self.names is None else np.concatenate(self.rows)

    def batch(self, step: int) -> Batch:
        """Draw the batch of a step; the same step gives the same batch."""
        coins = self.keys.stream(Purpose.SAMPLING, step=step).uniform(len(self.rows))
        chosen = np.flatnonzero(coins < self.sample_rate)
        if self.names is None or self.examples_per_user is None:
            return Batch(np.asarray(self.rows)[chosen], np.arange(chosen.size), chosen.size)
        parts = [
            _choose(self.rows[member], self.examples_per_user, self.keys, f"step {self.names[member]}", step)
            for member in chosen
        ]
        units = np.repeat(np.arange(chosen.size), [part.size for part in parts])
        return Batch(np.concatenate([*parts, np.empty(0, np.int64)]), units, chosen.size)


def rows_by_user(users: Sequence[Hashable]) -> Mapping[str, Rows]:
    """Rows of each user, users in the order of their first row.

    Raises:
        PlanError: if a row has no user, or one that could be written otherwise in another row.
    """
    rows: dict[str, list[int]] = {}
    for row, user in enumerate(users):
        if user is None or user != user or user == "":
            raise PlanError(f"row {row} has no user: user-level privacy needs the user of every row")
        if isinstance(user, float) or (isinstance(user, str) and not unicodedata.is_normalized("NFKC", user)):
            raise PlanError(f"the user of row {row} can be written in other ways too: give each user one name")
        rows.setdefault(str(user), []).append(row)
    return {user: np.array(own, dtype=np.int64) for user, own in rows.items()}


def cap_per_user(users: Sequence[Hashable], examples_per_user: int, keys: KeyRing) -> Rows:
    """Rows kept when each user may have at most `examples_per_user` of them, in ascending order (ELS).

    Which of a user's rows are kept depends on public coins and on the number of that user's own rows, so that
    nobody else's data can change it (SPECIFICATION.md 7.5).

    Raises:
        PlanError: if a row has no user.
    """
    kept = [_choose(rows, examples_per_user, keys, f"cap {user}", 0) for user, rows in rows_by_user(users).items()]
    return np.sort(np.concatenate([*kept, np.empty(0, np.int64)]))


def _choose(rows: Rows, limit: int, keys: KeyRing, group: str, step: int) -> Rows:
    if rows.size <= limit:
        return rows
    coins = keys.stream(Purpose.COHORT, step=step, group=group).uniform(rows.size)
    return np.sort(rows[np.argsort(coins)[:limit]])
