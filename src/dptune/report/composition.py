"""What a whole set of runs costs in epsilon, in sentences that may stand under a table (SPECIFICATION.md 8)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dptune.privacy.accounting import OF_SEARCHES, REFERENCE
from dptune.privacy.events import Event, PlanError
from dptune.privacy.guarantee import epsilon_text
from dptune.privacy.renyi import optimum, renyi_curve
from dptune.privacy.selection import Repetitions, curve_best, epsilon_all
from dptune.privacy.spent import group_size_of
from dptune.records.state import State

if TYPE_CHECKING:
    import pandas as pd

MANY = 12
"""Above this many different releases the exact accountant would take minutes; Rényi DP bounds them at once."""

OF_RUNS, OF_A_SEARCH = REFERENCE.upper(), OF_SEARCHES.upper()
"""The accountants of what the views state, as they are written there."""

MEAN = "provenance.repetitions.mean"
"""Column of runs that a search released."""


@dataclass(frozen=True)
class Composition:
    """Epsilon of everything that was done to one data set."""

    text: str
    """One sentence."""
    epsilon: float | None
    """Upper bound; None if none can be stated."""
    delta: float | None
    """Its delta."""
    run_ids: tuple[str, ...]
    """The runs it covers."""
    data: str = "unknown"
    """Fingerprint of their data."""


def compositions(runs: pd.DataFrame) -> list[Composition]:
    """One statement for all that was released on the same data, with the same unit and delta; then what it leaves out.

    What runs let out that failed or did not end counts; so do stale runs, which saw the same data.
    """
    if not len(runs) or "guarantee.private" not in runs:
        return []
    done = runs["status"] == "done"
    private = runs[(runs["guarantee.private"] == True) & (done | (runs["guarantee.steps"] > 0))]  # noqa: E712
    keys = [name for name in ("provenance.data", "guarantee.unit", "guarantee.delta") if name in private]
    groups = [group for _, group in private.groupby(keys, sort=False, dropna=False)] if len(private) else []
    found = [item for group in groups for item in _of(group)]
    if len(groups) > 1:
        found = [replace(item, text=f"{item.text} Data {item.data}.") for item in found]
        text = "These runs differ in data, unit or delta: no ε is stated for all of them together."
        found.append(Composition(text, None, None, ()))
    if without := int((done & (runs["guarantee.private"] != True)).sum()):  # noqa: E712
        found.append(Composition(f"The {without} non-private runs have no ε at all.", None, None, ()))
    silent = runs["state"].isin([State.FAILED, State.BEGUN]) & (runs["guarantee.released"] == "unknown")
    if count := int(silent.sum()):
        text = f"{count} runs failed or did not end, and do not tell what they let out: it is not in the ε above."
        found.append(Composition(text, None, None, ()))
    return found


def _of(runs: pd.DataFrame) -> list[Composition]:
    ids = tuple(runs["run_id"])
    data = str(runs["provenance.data"].iloc[0]) if "provenance.data" in runs else "unknown"
    if (unknown := runs["guarantee.epsilon"].isna()).any():
        which = "; ".join(
            f"{row.run_id}: {', '.join(row['guarantee.not_covered'])}" for _, row in runs[unknown].iterrows()
        )
        return [Composition(f"No ε is stated for all {len(runs)} runs ({which}).", None, None, ids)]
    unit, delta = runs["guarantee.unit"].iloc[0], float(runs["guarantee.delta"].iloc[0])
    chosen = runs[MEAN].notna() if MEAN in runs else runs["run_id"].isna()
    try:
        searches = [_search(row) for _, row in runs[chosen].iterrows()]
        training, scores = (_events(runs[~chosen], part) for part in ("training", "scores"))
        epsilon, how = _together(training, scores, tuple(searches), delta)
    except PlanError as error:
        return [Composition(f"No ε is stated for all {len(runs)} runs: {error}.", None, None, ids)]
    means = ", ".join(dict.fromkeys(f"{search.repetitions.mean:g}" for search in searches))
    best = f"the best of a random, secret number of runs (mean {means})"
    ended = int((runs["status"] == "done").sum())
    if len(runs) == len(searches) == 1:
        what = f"releasing {best}"
    else:
        begun = len(runs) - ended
        unended = f"what {begun} runs let out that failed or did not end"
        what = f"releasing all {ended} runs together" if ended else unended
        if (again := int(runs["guarantee.attempts"][~chosen].clip(lower=1).sum()) - int((~chosen).sum())) > 0:
            what += f", and {again} transcripts that were begun before,"
        if ended and begun:
            what += f", and {unended},"
        if searches:
            what += f", where {len(searches)} of them count as the whole search, {best},"
    text = f"Epsilon of {what} is {epsilon_text(epsilon)} (delta = {delta:g}, unit {unit}, {how})."
    return [Composition(text, epsilon, delta, ids, data)]


@dataclass(frozen=True)
class _Search:
    """The search that a run came out of."""

    candidates: tuple[tuple[Event, ...], ...]
    repetitions: Repetitions


@lru_cache(maxsize=32)
def _together(
    events: tuple[Event, ...], scores: tuple[Event, ...], searches: tuple[_Search, ...], delta: float
) -> tuple[float, str]:
    """Epsilon of some releases on training records, some scores on validation records, and some searches on both."""
    kinds = {replace(event, count=1) for event in set(events)}
    if not searches and len(kinds) <= MANY:
        # No record is in both splits, so that the larger epsilon holds.
        parts = [epsilon_all([part], delta) for part in (events, scores) if part]
        return max(parts, default=0.0), OF_RUNS
    total = np.maximum(renyi_curve(events), renyi_curve(scores))
    for search in searches:
        total = total + curve_best(search.candidates, search.repetitions)
    return optimum(total, delta)[0], OF_A_SEARCH


def _events(runs: pd.DataFrame, part: str) -> tuple[Event, ...]:
    """What the guarantees of some runs are composed of: `training` or `scores`."""
    return tuple(Event(**vars(release)) for releases in runs[f"guarantee.{part}"] for release in releases)


def _search(run: pd.Series[Any]) -> _Search:
    """How the number of trials was drawn and what each may have cost, from `provenance.repetitions`.

    Raises:
        PlanError: if the score that chose is not paid for, or the record lacks something.
    """
    prefix = MEAN.removesuffix("mean")
    if run.get(f"{prefix}score_is_covered") is not True:
        raise PlanError(f"the score that chose run {run['run_id']} is not paid for")
    try:
        size = int(run["guarantee.group_size"])
        candidates = tuple(
            tuple(group_size_of(Event(**event), size) for event in events) for events in run[f"{prefix}candidates"]
        )
        return _Search(candidates, Repetitions(float(run[MEAN]), float(run[f"{prefix}eta"])))
    except (KeyError, TypeError) as error:
        raise PlanError(f"run {run['run_id']} does not say what its search cost ({error})") from None
