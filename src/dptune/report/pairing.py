"""Which runs of two methods are compared as a pair: same data, guarantee and seed, under the same conditions.

A run is described by parts of its config (`PARTS`). Which of them are held fixed and which is varied as a condition
depends on the claim. Within a condition the methods are paired at equal hyperparameters; where each was run at one
setting only, chosen for it, those two are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dptune.records.state import State
from dptune.report.results import Results
from dptune.report.settings import BACKBONE, CONDITION, DATA, GUARANTEE, HYPERPARAMETER, OF_SEARCH, SEED, TARGET, plain

SIGMA, PER_USER = "config.privacy.noise_multiplier", "config.privacy.examples_per_user"
BUDGET = (TARGET, SIGMA, PER_USER, "config.privacy.budget", *(f"config.{name}" for name in GUARANTEE))
"""Fields of `config.privacy` that say how much is spent on whom, not how."""
PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "method": (("config.adapter.", "config.privacy."), BUDGET),
    "target": ((TARGET, SIGMA), ()),
    "hyperparameter": ((HYPERPARAMETER,), ()),
    "environment": (("config.environment.",), (SEED,)),
    "data": ((CONDITION, DATA), ()),
    "fixed": (
        ("config.model.", "config.data.", "config.evaluation.", BACKBONE, *GUARANTEE, "privacy.stand_in", PER_USER),
        (),
    ),
}
"""By part of a run: how the columns that describe it begin, and those that are left out."""
Key = tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """One finished private run, by the parts of its config."""

    row: int
    method: Key
    """Adapter, and privacy without its budget."""
    target: Key
    """Budget: target epsilon, or the noise multiplier that was given."""
    hyperparameter: Key
    environment: Key
    """Without the seed."""
    data: Key
    """Condition of the data, and its fingerprint."""
    fixed: Key
    """Backbone, data source, unit, delta and noise mode: never compared across."""
    seed: Any
    sweep: str | None


@dataclass(frozen=True)
class Evidence:
    """All finished private runs, and the names of their methods."""

    columns: Mapping[str, Sequence[Any]]
    runs: tuple[Run, ...]
    names: Mapping[Key, str]
    """Name of each method, for people."""
    subject: Key | None
    """The method whose claims are tested; None if it was not run."""


SUBJECT = ("dptune", "lora + adaptive")
"""Names of the method whose claims are tested."""
Pairs = Mapping[Key, Mapping[Any, Sequence[tuple[int, int]]]]
"""By condition and seed: rows of the subject's and of the baseline's run."""


def evidence(results: Results) -> Evidence:
    """The finished private runs of some results, by the parts of their configs."""
    columns = {str(name): plain(results.runs[name]) for name in results.runs.columns}
    keys = {
        part: _keys(columns, [name for name in columns if name.startswith(starts) and name not in left_out])
        for part, (starts, left_out) in PARTS.items()
    }
    private = columns.get("privacy.private", ())
    # What a search released cost the whole search: it is paired with no run that was done by itself.
    searched = columns.get(OF_SEARCH, ())
    rows = [
        row
        for row, state in enumerate(columns["state"])
        if state == State.DONE and private[row] and (not searched or searched[row] is None)
    ]
    runs = tuple(
        Run(row=row, seed=columns[SEED][row], sweep=columns["sweep"][row], **{part: keys[part][row] for part in PARTS})
        for row in rows
    )
    names = _names(columns, runs)
    subject = next((key for key, name in names.items() if name in SUBJECT), None)
    return Evidence(columns, runs, names, subject)


def _names(columns: Mapping[str, Sequence[Any]], runs: Iterable[Run]) -> dict[Key, str]:
    """The name of each method: the last that it was asked for by, else its adapter and privacy setting."""
    names: dict[Key, str] = {}
    for run in runs:
        if known := columns["method"][run.row] if "method" in columns else None:
            names[run.method] = known
        else:
            content = (columns[f"config.{group}.name"][run.row] for group in ("adapter", "privacy"))
            names.setdefault(run.method, " + ".join(content))
    return names


def rows_of(pairs: Pairs) -> Iterator[int]:
    """All rows, the subject's before the baseline's in each pair."""
    return (row for seeds in pairs.values() for chosen in seeds.values() for pair in chosen for row in pair)


def common_seeds(pairs: Pairs) -> list[Any]:
    """The seeds that every condition has."""
    first, *others = pairs.values()
    return [seed for seed in first if all(seed in other for other in others)]


def groups(found: Evidence, held: Iterable[str], condition: str) -> dict[Key, dict[Key, Pairs]]:
    """Pairs by what is held fixed and by baseline.

    Args:
        found: the runs.
        held: parts that are equal in all runs of a group, beside `fixed`.
        condition: the part that is varied within a group.
    """
    parts = ("fixed", *held)
    by_group: dict[Key, dict[Key, dict[Key, list[Run]]]] = {}
    for run in found.runs:
        group = tuple(word for part in parts for word in getattr(run, part))
        by_group.setdefault(group, {}).setdefault(run.method, {}).setdefault(getattr(run, condition), []).append(run)
    paired: dict[Key, dict[Key, Pairs]] = {}
    for group, arms in by_group.items():
        subject = arms.get(found.subject, {}) if found.subject else {}
        for baseline, theirs in arms.items():
            if baseline != found.subject:
                pairs = {at: _paired(subject[at], theirs[at]) for at in subject if at in theirs}
                if pairs := {at: by_seed for at, by_seed in pairs.items() if by_seed}:
                    paired.setdefault(group, {})[baseline] = pairs
    return paired


def _paired(ours: Sequence[Run], theirs: Sequence[Run]) -> dict[Any, list[tuple[int, int]]]:
    """Rows by seed at equal hyperparameters, else at the one setting that a sweep has of each."""
    left = {(run.hyperparameter, run.seed): run.row for run in ours}
    right = {(run.hyperparameter, run.seed): run.row for run in theirs}
    if not {key for key, _ in left} & {key for key, _ in right}:
        for sweep in dict.fromkeys(run.sweep for run in ours):
            mine, other = ([run for run in runs if run.sweep == sweep] for runs in (ours, theirs))
            if len({run.hyperparameter for run in mine}) == 1 == len({run.hyperparameter for run in other}):
                left = {((), run.seed): run.row for run in mine}
                right = {((), run.seed): run.row for run in other}
                break
    by_seed: dict[Any, list[tuple[int, int]]] = {}
    for key, row in left.items():
        if key in right:
            by_seed.setdefault(key[1], []).append((row, right[key]))
    return by_seed


def _keys(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[Key]:
    words = [[repr(value) for value in columns[name]] for name in names]
    return list(zip(*words, strict=True)) if words else [()] * len(columns["state"])
