"""What a whole set of runs costs in epsilon, in sentences that may stand under a table (SPECIFICATION.md 8)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from dptune.privacy.accounting import rounded_up
from dptune.privacy.events import Event
from dptune.privacy.plan import PlanError, PrivacyPlan
from dptune.privacy.selection import Repetitions, epsilon_all, statement
from dptune.report.results import FAILED, RUNNING

if TYPE_CHECKING:
    import pandas as pd

MANY = 12
"""Above this many different releases the exact accountant would take minutes; Rényi DP bounds them at once."""


@dataclass(frozen=True)
class Procedure:
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


def procedures(runs: pd.DataFrame) -> list[Procedure]:
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
        found.append(Procedure(text, None, None, ()))
    notes = []
    if len(private) < len(done):
        notes.append(f"The {len(done) - len(private)} non-private runs have no ε at all.")
    if begun := int(runs["state"].isin([FAILED, RUNNING]).sum()):
        notes.append(f"{begun} runs failed or did not end; whatever was seen of them is not in the ε above.")
    return found + [Procedure(note, None, None, ()) for note in notes]


def _of(runs: pd.DataFrame) -> list[Procedure]:
    ids = tuple(runs["run_id"])
    unit, delta = runs["privacy.unit"].iloc[0], float(runs["privacy.delta"].iloc[0])
    try:
        # Transcripts that were begun and killed count in full.
        plans = _transcripts(runs)
        epsilon, how = _together(tuple(event for plan, times in plans for event in plan.events() * times), delta)
        what = f"releasing all {len(runs)} runs together"
        if (again := sum(times for _, times in plans) - len(runs)) > 0:
            what += f", and {again} transcripts that were begun before,"
        text = f"Epsilon of {what} is {rounded_up(epsilon):.3f} (delta = {delta:g}, unit {unit}, {how})."
        data = str(runs["provenance.data"].iloc[0]) if "provenance.data" in runs else "unknown"
        found = [Procedure(text, epsilon, delta, ids, data)]
        if (drawn := _repetitions(runs)) is not None:
            covered = bool((runs["provenance.repetitions.score_is_covered"] == True).all())  # noqa: E712
            configs = list(dict.fromkeys(plan for plan, _ in plans))
            best = statement(configs, "best_of_random", delta=delta, repetitions=drawn, score_is_covered=covered)
            found.append(Procedure(best.text, best.epsilon, delta, ids, data))
        return found
    except PlanError as error:
        return [Procedure(f"No ε is stated for all {len(runs)} runs: {error}.", None, None, ids)]


@lru_cache(maxsize=32)
def _together(events: tuple[Event, ...], delta: float) -> tuple[float, str]:
    kinds = {replace(event, count=1) for event in set(events)}
    if len(kinds) <= MANY:
        return epsilon_all([events], delta), "PLD"
    from dptune.privacy.renyi import optimum, renyi_curve

    return optimum(renyi_curve(events), delta)[0], "RDP"


def _transcripts(runs: pd.DataFrame) -> list[tuple[PrivacyPlan, int]]:
    """Each plan, with the number of its transcripts that were begun: at least one a run, killed ones included."""
    texts = runs["privacy.plan"].map(repr)
    begun = runs["privacy.attempts"].astype(int).clip(lower=1).groupby(texts, sort=False).sum()
    plans = dict(zip(texts, runs["privacy.plan"], strict=True))
    return [(PrivacyPlan.from_dict(plans[str(text)]), int(times)) for text, times in begun.items()]


def _repetitions(runs: pd.DataFrame) -> Repetitions | None:
    """How the secret number of runs was drawn, where all runs say so in `provenance.repetitions`."""
    names = [f"provenance.repetitions.{name}" for name in ("mean", "eta", "score_is_covered")]
    if any(name not in runs or runs[name].isna().any() or runs[name].nunique() != 1 for name in names):
        return None
    mean, eta, _ = (runs[name].iloc[0] for name in names)
    return Repetitions(float(mean), float(eta))
