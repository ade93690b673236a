"""Which runs of two methods may be set against each other: same data, same guarantee, same seed, same conditions.

A run is described by parts of its config. The method is its adapter and privacy setting without the budget; what is
held fixed and what is varied as a condition depends on the question. Within a condition the methods are paired at equal
hyperparameters; where each was run at one setting only, chosen for it, those two are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dptune.records.state import State
from dptune.report.results import Results
from dptune.report.settings import SEED, plain

BUDGET = ("target_epsilon", "noise_multiplier", "delta", "noise_mode", "unit", "examples_per_user")
"""Fields of `config.privacy` that say how much is spent on whom, not how."""
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


Pairs = Mapping[Key, Mapping[Any, Sequence[tuple[int, int]]]]
"""By condition and seed: rows of the subject's and of the baseline's run."""


def evidence(results: Results) -> Evidence:
    """The finished private runs of some results, by the parts of their configs."""
    columns = {str(name): plain(results.runs[name]) for name in results.runs.columns}
    parts = {
        "method": [
            name
            for name in columns
            if name.startswith(("config.adapter.", "config.privacy.")) and name.rpartition(".")[2] not in BUDGET
        ],
        "target": ["config.privacy.target_epsilon", "config.privacy.noise_multiplier"],
        "hyperparameter": _below(columns, "config.hyperparameter."),
        "environment": [name for name in _below(columns, "config.environment.") if name != SEED],
        "data": [*_below(columns, "config.data_sensitivity."), "provenance.data"],
        "fixed": [
            *_below(columns, "config.model."),
            *_below(columns, "config.data."),
            *_below(columns, "config.evaluation."),
            "provenance.backbone",
            *(f"privacy.{name}" for name in ("delta", "unit", "noise_mode", "stand_in")),
            "config.privacy.examples_per_user",
        ],
    }
    keys = {part: _keys(columns, [name for name in names if name in columns]) for part, names in parts.items()}
    private = columns.get("privacy.private", ())
    rows = [row for row, state in enumerate(columns["state"]) if state == State.DONE and private[row]]
    runs = tuple(
        Run(row=row, seed=columns[SEED][row], sweep=columns["sweep"][row], **{part: keys[part][row] for part in parts})
        for row in rows
    )
    names: dict[Key, str] = {}
    for run in runs:
        known = columns["method"][run.row] if "method" in columns else None
        content = f"{columns['config.adapter.name'][run.row]} + {columns['config.privacy.name'][run.row]}"
        if known or run.method not in names:
            names[run.method] = known or content
    subject = next((key for key, name in names.items() if name in ("dptune", "lora + adaptive")), None)
    return Evidence(columns, runs, names, subject)


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


def _below(columns: Mapping[str, Any], prefix: str) -> list[str]:
    return [name for name in columns if name.startswith(prefix)]


def _keys(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> list[Key]:
    words = [[repr(value) for value in columns[name]] for name in names]
    return list(zip(*words, strict=True)) if words else [()] * len(columns["state"])
