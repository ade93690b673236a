"""Poisson batches over examples and users."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from dptune.privacy.events import PlanError
from dptune.privacy.sampling import PoissonSampler, cap_per_user, rows_by_user
from dptune.privacy.streams import KeyRing

KEYS = KeyRing.reproducible(3, "run")
USERS = [f"u{row % 50}" for row in range(400)]


def test_inclusion_is_bernoulli_and_independent() -> None:
    sampler = PoissonSampler.over_examples(KEYS, 0.1, np.arange(2_000))
    batches = [sampler.batch(step) for step in range(100)]
    sizes = np.array([batch.num_units for batch in batches])
    # The sizes are binomial: mean 200, variance 180; a fixed batch size would have no variance.
    assert abs(sizes.mean() - 200) < 4 * np.sqrt(180 / 100)
    assert 1e-3 < stats.chi2.cdf(99 * sizes.var(ddof=1) / 180, 99) < 1 - 1e-3
    counts = np.bincount(np.concatenate([batch.indices for batch in batches]), minlength=2_000)
    assert stats.chisquare(np.bincount(counts.clip(4, 17))[4:], _binomial_cells() * 2_000).pvalue > 1e-3


def _binomial_cells() -> np.ndarray:
    cells = stats.binom.pmf(np.arange(4, 18), 100, 0.1)
    cells[0], cells[-1] = stats.binom.cdf(4, 100, 0.1), stats.binom.sf(16, 100, 0.1)
    return np.asarray(cells / cells.sum())


def test_batches_are_reproducible_and_differ_by_step() -> None:
    sampler = PoissonSampler.over_examples(KEYS, 0.3, np.arange(100))
    assert np.array_equal(sampler.batch(5).indices, sampler.batch(5).indices)
    assert not np.array_equal(sampler.batch(5).indices, sampler.batch(6).indices)


def test_every_example_is_its_own_unit() -> None:
    batch = PoissonSampler.over_examples(KEYS, 0.5, np.arange(20) * 10).batch(0)
    assert batch.indices.dtype == batch.units.dtype == np.int64
    assert np.array_equal(batch.units, np.arange(batch.num_units))
    assert set(batch.indices) <= set(range(0, 200, 10))


def test_batches_can_be_empty() -> None:
    for sampler in (
        PoissonSampler.over_examples(KEYS, 1e-6, np.arange(10)),
        PoissonSampler.over_users(KEYS, 1e-6, ["a", "b"], 3),
    ):
        batch = sampler.batch(0)
        assert batch.num_units == batch.indices.size == batch.units.size == 0
        assert batch.indices.dtype == np.int64


def test_users_are_sampled_whole_up_to_the_cap() -> None:
    sampler = PoissonSampler.over_users(KEYS, 0.4, USERS, 3)
    batch = sampler.batch(2)
    assert 0 < batch.num_units < 50
    owners = np.array(USERS)[batch.indices]
    for unit in range(batch.num_units):
        rows = batch.indices[batch.units == unit]
        assert rows.size == np.unique(rows).size == 3
        assert len(set(owners[batch.units == unit])) == 1
    assert len({owners[batch.units == unit][0] for unit in range(batch.num_units)}) == batch.num_units


def test_a_users_rows_are_chosen_anew_at_each_step() -> None:
    sampler = PoissonSampler.over_users(KEYS, 1.0, ["a"] * 30, 4)
    seen = np.concatenate([sampler.batch(step).indices for step in range(40)])
    assert np.unique(seen).size == 30


def test_cap_keeps_at_most_k_rows_of_each_user() -> None:
    kept = cap_per_user(USERS, 3, KEYS)
    assert np.array_equal(kept, np.unique(kept))
    assert all(np.bincount([int(USERS[row][1:]) for row in kept]) == 3)
    assert np.array_equal(cap_per_user(USERS, 8, KEYS), np.arange(400))


def test_cap_of_a_user_does_not_depend_on_others() -> None:
    alone = cap_per_user(["a"] * 10, 4, KEYS)
    users = ["b", "a"] * 10 + ["c"] * 5
    together = [row for row in cap_per_user(users, 4, KEYS) if users[row] == "a"]
    assert np.array_equal((np.array(together) - 1) // 2, alone)


def test_removing_a_record_changes_nobody_elses_coins() -> None:
    """A user that leaves keeps every other user's cohort, as zero-out adjacency needs."""
    sampler = PoissonSampler.over_users(KEYS, 0.5, USERS, 3)
    ghost = dataclasses.replace(sampler, rows=(np.empty(0, np.int64), *sampler.rows[1:]))
    for step in range(10):
        full, less = sampler.batch(step), ghost.batch(step)
        kept = full.indices[~np.isin(full.indices, sampler.rows[0])]
        assert np.array_equal(kept, less.indices)
        assert full.num_units == less.num_units


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_rows_without_user_are_refused(missing: object) -> None:
    with pytest.raises(PlanError, match="row 1 has no user"):
        rows_by_user(["a", missing])  # type: ignore[list-item]
