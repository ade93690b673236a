"""Which runs belong together: runs of one setting differ in their seed only, and nothing else is ever averaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dptune.records.state import State

if TYPE_CHECKING:
    import pandas as pd

SEED, HYPERPARAMETER = "config.environment.seed", "config.hyperparameter."
STEPS = f"{HYPERPARAMETER}steps"
TARGET = "config.privacy.target_epsilon"
NOT_SETTING = ("config.compute.", "config.tracking.", "config.method", "config.sweep", SEED)
"""Parts of the config that do not set runs apart: they cannot change numbers, or are what is averaged over."""
NOT_METHOD = ("config.adapter.", "config.privacy.", *NOT_SETTING)
"""Parts of the config that are the method, or no setting."""
COMPARABLE = {
    "privacy.delta": "delta",
    "privacy.unit": "privacy unit",
    "privacy.noise_mode": "noise mode",
    "privacy.stand_in": "stand-in flag",
    "provenance.data": "data fingerprint",
    "provenance.backbone": "backbone fingerprint",
    "provenance.repetitions.epsilon": "epsilon of the search",
}
"""What must be equal in runs that are averaged, beyond their settings."""
NAMED = ("model", "adapter", "privacy", "data", "data_sensitivity")
"""Groups of the config with a name; what the name settles needs no label of its own."""


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed only."""

    label: str
    """What sets it apart from the other settings of the same table."""
    columns: Mapping[str, Sequence[Any]]
    """All runs of the table, a column at a time; null is None."""
    rows: tuple[int, ...]
    """Which of them are of this setting, in every state."""

    @cached_property
    def done(self) -> tuple[int, ...]:
        """Rows of its finished runs."""
        states = self.columns["state"]
        return tuple(row for row in self.rows if states[row] == State.DONE)

    @cached_property
    def arm(self) -> str:
        """Its method: the name it was asked for by, or adapter and privacy setting."""
        return self.value("method") or f"{self.value('config.adapter.name')} + {self.value('config.privacy.name')}"

    @property
    def private(self) -> bool:
        """Whether it is trained with a guarantee."""
        return self.value("config.privacy.enabled") is not False

    @property
    def target(self) -> float | None:
        """Target epsilon."""
        return self.value("config.privacy.target_epsilon") if self.private else None

    @cached_property
    def run_ids(self) -> tuple[str, ...]:
        """Ids of its finished runs."""
        return tuple(self.values("run_id"))

    def values(self, column: str) -> list[Any]:
        """One value for each finished run; empty without such a column."""
        content = self.columns.get(column)
        return [] if content is None else [content[row] for row in self.done]

    def value(self, column: str) -> Any:
        """What its runs have in this column; None for null."""
        content = self.columns.get(column, ())
        return next((content[row] for row in (*self.done, *self.rows) if content and content[row] is not None), None)

    def by_seed(self) -> dict[Any, int]:
        """The finished run of each seed."""
        return dict(zip(self.values(SEED), self.done, strict=True))


def settings_of(runs: pd.DataFrame) -> list[Setting]:
    """The settings of some runs, private ones first, in the order in which they appear."""
    if not len(runs):
        return []
    names = [name for name in runs.columns if str(name).startswith("config.") and not name.startswith(NOT_SETTING)]
    coded = codes(runs, names)
    varied = [name for name in names if len(set(coded[name])) > 1]
    columns = {str(name): plain(runs[name]) for name in runs.columns}
    # A superseded run is never averaged with what the sweep asks for today.
    apart = codes(runs[["method", "state"]].assign(state=runs["state"] == State.SUPERSEDED), ["state", "method"])
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, key in enumerate(zip(*(apart | {name: coded[name] for name in varied}).values(), strict=True)):
        groups.setdefault(key, []).append(row)
    present = codes(runs, [name for name in COMPARABLE if name in runs])
    parts = [part for rows in groups.values() for part in _comparable(rows, columns["state"], present)]
    labels = _labels(parts, varied, columns)
    found = [Setting(label, columns, tuple(part)) for label, part in zip(labels, parts, strict=True)]
    return [item for item in found if item.private] + [item for item in found if not item.private]


def codes(runs: pd.DataFrame, names: Sequence[str]) -> dict[str, list[int]]:
    """Each column as integers that are equal where its values are; null is a value, and so is a list."""
    import pandas as pd

    def coded(column: pd.Series[Any]) -> list[int]:
        try:
            found = pd.factorize(column, use_na_sentinel=True)[0]
        except TypeError:  # Lists have no hash.
            texts = column.map(lambda value: repr(value) if isinstance(value, list | dict) else value)
            found = pd.factorize(texts, use_na_sentinel=True)[0]
        codes: list[int] = found.tolist()
        return codes

    return {name: coded(runs[name]) for name in names}


def plain(column: pd.Series[Any]) -> list[Any]:
    """A column as Python values, with None for every kind of null."""
    if not column.hasnans:
        return column.tolist()
    return [None if value is None or value != value else value for value in column.tolist()]


def why_apart(settings: Sequence[Setting]) -> list[str]:
    """Which runs have the same settings and are still not averaged, and why."""
    by_label: dict[str, list[Setting]] = {}
    for setting in settings:
        by_label.setdefault(setting.label.partition(" [")[0], []).append(setting)
    notes = []
    for label, members in by_label.items():
        for column, name in COMPARABLE.items() if len(members) > 1 else ():
            values = {str(item.value(column)) for item in members if item.done}
            if len(values) > 1:
                notes.append(f"Not averaged: runs of “{label}” have different {name}s ({', '.join(sorted(values))}).")
    return notes


def mixed(settings: Iterable[Setting]) -> list[str]:
    """What private settings of one table differ in although it decides what their epsilons mean."""
    private = [item for item in settings if item.private and item.done]
    notes = []
    for column in ("privacy.delta", "privacy.unit", "privacy.noise_mode", "provenance.data"):
        # Conditions of the data are compared, which is what they are for; within one the data must be the same.
        strata: dict[tuple[str, ...], set[str]] = {}
        for item in private:
            names = [name for name in item.columns if name.startswith("config.data_sensitivity.")]
            condition = tuple(repr(item.value(name)) for name in names if column == "provenance.data")
            strata.setdefault(condition, set()).add(str(item.value(column)))
        values = sorted(value for stratum in strata.values() if len(stratum) > 1 for value in stratum)
        if values:
            notes.append(
                f"Rows differ in {COMPARABLE[column]} ({', '.join(values)}): they are never averaged, and no "
                "difference between such rows is stated."
            )
    return notes


def comparable(one: Setting, other: Setting) -> str | None:
    """Why two settings must not be compared run by run; None if they may.

    The data may differ where a condition of the data is what is studied.
    """
    if any(one.value(name) != other.value(name) for name in one.columns if name.startswith("config.data.")):
        return "other data"
    if any(one.value(name) != other.value(name) for name in one.columns if name.startswith("config.evaluation.")):
        return "judged in another way"
    columns = ["provenance.backbone"] if one.value("config.model.name") == other.value("config.model.name") else []
    condition = [name for name in one.columns if name.startswith("config.data_sensitivity.")]
    if all(one.value(name) == other.value(name) for name in condition):
        columns += ["provenance.data"]
    if one.private and other.private:
        columns += ["privacy.delta", "privacy.unit", "privacy.noise_mode"]
    for column in columns:
        if one.value(column) != other.value(column):
            return f"other {COMPARABLE[column]}"
    return None


def references(settings: Sequence[Setting]) -> list[Setting | None]:
    """What each setting is compared with: the baseline of its epsilon, or what most settings are varied around.

    Where a table holds several methods, the baseline is DP-LoRA or uniform noise, else the first; where that was run at
    several settings, the one that is equal in everything but the method. A setting without such a partner is compared
    with what the settings of its method are varied around.
    """
    middle = next((item for item in settings if item.label.partition(" [")[0] == "reference" and item.done), None)
    private = [item for item in settings if item.private and item.done]
    arms = list(dict.fromkeys(item.arm for item in private))
    if len(arms) < 2:
        return [middle] * len(settings)
    base = next((arm for arm in arms if arm == "dp_lora" or arm.endswith("+ uniform")), arms[0])
    names = [name for name in private[0].columns if name.startswith("config.") and not name.startswith(NOT_METHOD)]
    varied = [name for name in names if len({repr(item.columns[name][item.rows[0]]) for item in settings}) > 1]

    def rest(item: Setting) -> tuple[str, ...]:
        return tuple(repr(item.value(name)) for name in varied)

    by_target: dict[float | None, list[Setting]] = {}
    exactly: dict[tuple[float | None, tuple[str, ...]], Setting] = {}
    for item in private:
        if item.arm == base:
            by_target.setdefault(item.target, []).append(item)
            exactly.setdefault((item.target, rest(item)), item)
    found: list[Setting | None] = []
    for item in settings:
        stratum = (
            by_target.get(item.target, []) if item.private else [other for at in by_target.values() for other in at]
        )
        partner = stratum[0] if len(stratum) == 1 else exactly.get((item.target, rest(item)))
        if partner is None and middle not in (None, item) and (item.arm == middle.arm or not item.private):
            partner = middle
        found.append(partner)
    return found


def _comparable(rows: list[int], states: Sequence[str], present: Mapping[str, list[int]]) -> list[list[int]]:
    """Runs of one setting, parted where they must not be averaged; what is not finished goes with the first part."""
    parts: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        if states[row] == State.DONE:
            parts.setdefault(tuple(column[row] for column in present.values()), []).append(row)
    if len(parts) < 2:
        return [rows]
    first, *others = parts.values()
    return [[*first, *(row for row in rows if states[row] != State.DONE)], *others]


def _labels(parts: Sequence[list[int]], varied: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """One label a setting: what differs from what most of them have."""
    methods = [columns["method"][part[0]] for part in parts]
    content = {name: [repr(columns[name][part[0]]) for part in parts] for name in varied}
    content["method"] = [repr(method) for method in methods]
    shown = [name for name in varied if not _settled(name, content)]
    common = {name: _majority(content[name]) for name in shown}
    labels = []
    # Without privacy there is no target, which needs no words.
    for at, part in enumerate(parts):
        words = [methods[at]] if methods[at] and len(set(methods)) > 1 else []
        # Without a step, how it would have been trained says nothing; nor does a target that is none.
        idle = STEPS in columns and columns[STEPS][part[0]] == 0
        words += [
            f"{name.removeprefix('config.').removesuffix('.name').rpartition('.')[2]}={_said(columns[name][part[0]])}"
            for name in shown
            if content[name][at] != common[name]
            and not (idle and name.startswith(HYPERPARAMETER) and name != STEPS)
            and not (name == TARGET and columns[name][part[0]] is None)
        ]
        label = ", ".join(words) or "reference"
        labels.append(label + (" (superseded)" if columns["state"][part[0]] == State.SUPERSEDED else ""))
    return _told_apart(labels, parts, columns)


def _settled(name: str, content: Mapping[str, Sequence[str]]) -> bool:
    """Whether a column is a function of the method, or of the name of its group."""
    group, values = name.split(".")[1], content[name]
    if name == TARGET:
        # Without privacy there is no target: what matters is whether private settings have several.
        return len({value for value in values if value != "None"}) <= 1
    causes = ["method"] if group in ("adapter", "privacy") and len(set(content["method"])) > 1 else []
    causes += [f"config.{group}.name"] if group in NAMED and name != f"config.{group}.name" else []
    return any(
        cause in content and len(set(zip(content[cause], values, strict=True))) == len(set(content[cause]))
        for cause in causes
    )


def _majority(values: Sequence[str]) -> str | None:
    """The value that more than half of the settings have."""
    value, count = Counter(values).most_common(1)[0]
    return value if count * 2 > len(values) else None


def _told_apart(labels: list[str], parts: Sequence[list[int]], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Equal labels get what they differ in, in square brackets."""
    members: dict[str, list[int]] = {}
    for at, label in enumerate(labels):
        members.setdefault(label, []).append(at)
    told = list(labels)
    for label, places in members.items():
        differ = [
            name
            for name in COMPARABLE
            if name in columns and len({str(columns[name][parts[at][0]]) for at in places}) > 1
        ]
        for at in places if len(places) > 1 else ():
            told[at] = f"{label} [{', '.join(f'{COMPARABLE[name]} {columns[name][parts[at][0]]}' for name in differ)}]"
    return told


def _said(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
