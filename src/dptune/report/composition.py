"""What a whole set of runs costs in epsilon, in sentences that may stand under a table (SPECIFICATION.md 8)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from dptune.privacy.accounting import OF_SEARCHES, REFERENCE, epsilon_text
from dptune.privacy.events import Event
from dptune.privacy.plan import PlanError, PrivacyPlan
from dptune.privacy.renyi import optimum, renyi_curve
from dptune.privacy.selection import Repetitions, curve_best, epsilon_all, score_event
from dptune.records.state import State

if TYPE_CHECKING:
    import pandas as pd

MANY = 12
"""Above this many different releases the exact accountant would take minutes; Rényi DP bounds them at once."""

OF_RUNS, OF_A_SEARCH = REFERENCE.upper(), OF_SEARCHES.upper()
"""The accountants of what the views state, as they are written there."""

MEAN, SCORE = "provenance.repetitions.mean", "privacy.score_noise_multiplier"
"""Columns of runs that a search released, and of runs with a score."""


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
    """One statement for all private runs on the same data, with the same unit and delta; then what they leave out."""
    done = runs[runs["status"] == "done"]  # Stale runs too: they saw the same data.
    if not len(done) or "privacy.private" not in done:
        return []
    private = done[done["privacy.private"] == True]  # noqa: E712
    keys = [name for name in ("provenance.data", "privacy.unit", "privacy.delta") if name in private]
    groups = [group for _, group in private.groupby(keys, sort=False, dropna=False)] if len(private) else []
    found = [item for group in groups for item in _of(group)]
    if len(groups) > 1:
        found = [replace(item, text=f"{item.text} Data {item.data}.") for item in found]
        text = "These runs differ in data, unit or delta: no ε is stated for all of them together."
        found.append(Composition(text, None, None, ()))
    notes = []
    if len(private) < len(done):
        notes.append(f"The {len(done) - len(private)} non-private runs have no ε at all.")
    if begun := int(runs["state"].isin([State.FAILED, State.BEGUN]).sum()):
        notes.append(f"{begun} runs failed or did not end; whatever was seen of them is not in the ε above.")
    return found + [Composition(note, None, None, ()) for note in notes]


def _of(runs: pd.DataFrame) -> list[Composition]:
    ids = tuple(runs["run_id"])
    unit, delta = runs["privacy.unit"].iloc[0], float(runs["privacy.delta"].iloc[0])
    data = str(runs["provenance.data"].iloc[0]) if "provenance.data" in runs else "unknown"
    chosen = runs[MEAN].notna() if MEAN in runs else runs["run_id"].isna()
    try:
        searches = [_search(row) for _, row in runs[chosen].iterrows()]
        plans, scores = _transcripts(runs[~chosen]), _scores(runs[~chosen])
        # Transcripts that were begun and killed count in full.
        events = tuple(event for plan, times in plans for event in plan.events() * times)
        epsilon, how = _together(events, scores, tuple(searches), delta)
    except PlanError as error:
        return [Composition(f"No ε is stated for all {len(runs)} runs: {error}.", None, None, ids)]
    means = ", ".join(dict.fromkeys(f"{search.repetitions.mean:g}" for search in searches))
    best = f"the best of a random, secret number of runs (mean {means})"
    if len(runs) == len(searches) == 1:
        what = f"releasing {best}"
    else:
        what = f"releasing all {len(runs)} runs together"
        if (again := sum(times for _, times in plans) - int((~chosen).sum())) > 0:
            what += f", and {again} transcripts that were begun before,"
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


def _transcripts(runs: pd.DataFrame) -> list[tuple[PrivacyPlan, int]]:
    """Each plan, with the number of its transcripts that were begun: at least one a run, killed ones included."""
    texts = runs["privacy.plan"].map(repr)
    begun = runs["privacy.attempts"].astype(int).clip(lower=1).groupby(texts, sort=False).sum()
    plans = dict(zip(texts, runs["privacy.plan"], strict=True))
    return [(PrivacyPlan.from_dict(plans[str(text)]), int(times)) for text, times in begun.items()]


def _scores(runs: pd.DataFrame) -> tuple[Event, ...]:
    """The noisy scores that were released outside searches."""
    if SCORE not in runs:
        return ()
    scored = runs[runs[SCORE].notna()]
    times = scored["privacy.attempts"].astype(int).clip(lower=1)
    return tuple(score_event(float(sigma)) for sigma, n in zip(scored[SCORE], times, strict=True) for _ in range(n))


def _search(run: pd.Series[Any]) -> _Search:
    """How the number of trials was drawn and what each may have cost, from `provenance.repetitions`.

    Raises:
        PlanError: if the score that chose is not paid for, or the record lacks something.
    """
    prefix = MEAN.removesuffix("mean")
    if run.get(f"{prefix}score_is_covered") is not True:
        raise PlanError(f"the score that chose run {run['run_id']} is not paid for")
    try:
        candidates = tuple(tuple(Event(**event) for event in events) for events in run[f"{prefix}candidates"])
        return _Search(candidates, Repetitions(float(run[MEAN]), float(run[f"{prefix}eta"])))
    except (KeyError, TypeError) as error:
        raise PlanError(f"run {run['run_id']} does not say what its search cost ({error})") from None
