"""Settings: runs that may be averaged, because they differ in their seed only, and which settings may be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dptune.privacy.guarantee import rounded_up
from dptune.records.state import State

if TYPE_CHECKING:
    import pandas as pd

SEED, HYPERPARAMETER = "config.environment.seed", "config.hyperparameter."
STEPS, TARGET, MODEL = f"{HYPERPARAMETER}steps", "config.privacy.target_epsilon", "config.model.name"
CONDITION = "config.data_sensitivity."
"""Changes that are made to the data to study what they do."""
NOT_SETTING = ("config.compute.", "config.tracking.", "config.privacy.budget", "config.method", "config.sweep", SEED)
"""Parts of the config in which runs of one setting may differ: they change no number, or are what is averaged over."""
NOT_CONDITION = ("config.adapter.", "config.privacy.", *NOT_SETTING)
"""Parts of the config that say which method was used, or are no part of the setting."""
GUARANTEE = {"privacy.delta": "delta", "privacy.unit": "privacy unit", "privacy.noise_mode": "noise mode"}
"""What an epsilon is stated for: epsilons that differ in one of these cannot be compared."""
OF_SEARCH = "guarantee.of_search"
"""Column of the epsilon of the search that released a run, rounded up; null of others."""
DATA, BACKBONE = "provenance.data", "provenance.backbone"
MUST_AGREE = {
    **GUARANTEE,
    "privacy.stand_in": "stand-in flag",
    DATA: "data fingerprint",
    BACKBONE: "backbone fingerprint",
    OF_SEARCH: "epsilon of the search",
}
"""What must be equal in runs that are averaged, beyond their configs; by column, with its name for people."""
NAMED = ("model", "adapter", "privacy", "data", "data_sensitivity")
"""Groups of the config with a name. A label does not repeat what follows from that name."""


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
        """Its method: the name it was asked for by, or adapter and privacy setting; and the start from public data."""
        own = self.value("method") or f"{self.value('config.adapter.name')} + {self.value('config.privacy.name')}"
        start = self.value("config.public.method")
        return own if start in (None, "none") else f"{own} from public {start}"

    @property
    def private(self) -> bool:
        """Whether it is trained with a guarantee."""
        return self.value("config.privacy.enabled") is not False

    @cached_property
    def epsilon(self) -> float | None:
        """The largest epsilon that one of its runs guarantees, rounded up: of all that was begun, finished or not."""
        steps, found = self.columns.get("guarantee.steps"), self.columns.get("guarantee.epsilon")
        if steps is None or found is None:
            return None
        begun = [row for row in self.rows if row in self.done or steps[row]]
        return max((rounded_up(found[row]) for row in begun if found[row] is not None), default=None)

    @property
    def of_search(self) -> bool:
        """Whether a search released its runs, so that their epsilon is that of the search."""
        return self.value(OF_SEARCH) is not None

    @property
    def asked(self) -> float | None:
        """The epsilon that was asked for; that of a trial is none of its search."""
        return self.value(TARGET) if self.private and not self.of_search else None

    @property
    def target(self) -> float | None:
        """The epsilon that was asked for, where its runs keep it."""
        kept = self.asked is None or self.epsilon is None or self.epsilon <= rounded_up(self.asked)
        return self.asked if kept else None

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
    # A superseded run is never averaged with what the sweep asks for today.
    apart = codes(runs[["method", "state"]].assign(state=runs["state"] == State.SUPERSEDED), ["state", "method"])
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, key in enumerate(zip(*(apart | {name: coded[name] for name in varied}).values(), strict=True)):
        groups.setdefault(key, []).append(row)
    columns = {str(name): plain(runs[name]) for name in runs.columns}
    agreed = codes(runs, [name for name in MUST_AGREE if name in runs])
    parts = [part for rows in groups.values() for part in _averageable(rows, columns["state"], agreed)]
    labels = _labels(parts, varied, columns)
    found = [Setting(label, columns, tuple(part)) for label, part in zip(labels, parts, strict=True)]
    return sorted(found, key=lambda item: not item.private)


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
        for column, name in MUST_AGREE.items() if len(members) > 1 else ():
            values = {str(item.value(column)) for item in members if item.done}
            if len(values) > 1:
                notes.append(f"Not averaged: runs of “{label}” have different {name}s ({', '.join(sorted(values))}).")
    return notes


def mixed(settings: Iterable[Setting]) -> list[str]:
    """In what the private settings of a table differ although it decides what their epsilons mean."""
    private = [item for item in settings if item.private and item.done]
    # A condition changes the data, which is what it is for: only within one must the data be the same.
    values = {column: _values(private, column) for column in GUARANTEE} | {DATA: _values(private, DATA, CONDITION)}
    return [
        f"Rows differ in {MUST_AGREE[column]} ({', '.join(sorted(found))}): they are never averaged, and no "
        "difference between such rows is stated."
        for column, found in values.items()
        if found
    ]


def _values(settings: Iterable[Setting], column: str, within: str | None = None) -> list[str]:
    """The values of a column that differ between settings that are equal in a part of the config; none if all agree."""
    strata: dict[tuple[str, ...], set[str]] = {}
    for item in settings:
        stratum = tuple(repr(item.value(name)) for name in item.columns if within and name.startswith(within))
        strata.setdefault(stratum, set()).add(str(item.value(column)))
    return [value for values in strata.values() if len(values) > 1 for value in values]


def comparable(one: Setting, other: Setting) -> str | None:
    """Why two settings must not be compared run by run; None if they may.

    The data may differ where a condition of the data is what is studied.
    """

    def differ(prefix: str) -> bool:
        return any(one.value(name) != other.value(name) for name in one.columns if name.startswith(prefix))

    if differ("config.data."):
        return "other data"
    if differ("config.evaluation."):
        return "evaluated in another way"
    columns = [] if differ(MODEL) else [BACKBONE]
    columns += [] if differ(CONDITION) else [DATA]
    columns += GUARANTEE if one.private and other.private else ()
    return next((f"other {MUST_AGREE[column]}" for column in columns if differ(column)), None)


def references(settings: Sequence[Setting]) -> list[Setting | None]:
    """What each setting is compared with; None for nothing.

    In a table of one method it is the setting that the others are varied around. In a table of several it is the
    baseline at the same epsilon: DP-LoRA or uniform noise, else the first method. Where the baseline was run at several
    settings, it is the one that is equal in everything but the method; a setting without such a partner is compared
    with what the settings of its own method are varied around.
    """
    middle = next((item for item in settings if item.label.partition(" [")[0] == "reference" and item.done), None)
    private = [item for item in settings if item.private and item.done]
    arms = list(dict.fromkeys(item.arm for item in private))
    if len(arms) < 2:
        return [middle] * len(settings)
    base = next((arm for arm in arms if arm == "dp_lora" or arm.endswith("+ uniform")), arms[0])
    names = [name for name in private[0].columns if name.startswith("config.") and not name.startswith(NOT_CONDITION)]
    varied = [name for name in names if len({repr(item.columns[name][item.rows[0]]) for item in settings}) > 1]
    baselines = [(item, _condition(item, varied)) for item in private if item.arm == base]
    return [
        _partner(item, _condition(item, varied), baselines)
        or (middle if middle and middle is not item and (item.arm == middle.arm or not item.private) else None)
        for item in settings
    ]


def _condition(setting: Setting, names: Iterable[str]) -> tuple[Any, ...]:
    """Target and all that is no part of the method."""
    return (setting.target, *(repr(setting.value(name)) for name in names))


def _partner(
    setting: Setting, condition: tuple[Any, ...], baselines: Sequence[tuple[Setting, tuple[Any, ...]]]
) -> Setting | None:
    """The only baseline at this target (any target, for a setting without privacy), or the one that is equal."""
    near = [item for item, _ in baselines if item.target == setting.target or not setting.private]
    if len(near) == 1:
        return near[0]
    return next((item for item, its in baselines if its == condition), None)


def _averageable(rows: list[int], states: Sequence[str], agreed: Mapping[str, list[int]]) -> list[list[int]]:
    """Runs of one setting, parted where they must not be averaged; what is not finished goes with the first part."""
    parts: dict[tuple[int, ...], list[int]] = {}
    for row in (row for row in rows if states[row] == State.DONE):
        parts.setdefault(tuple(column[row] for column in agreed.values()), []).append(row)
    if len(parts) < 2:
        return [rows]
    first, *others = parts.values()
    return [[*first, *(row for row in rows if states[row] != State.DONE)], *others]


def _labels(parts: Sequence[list[int]], varied: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """One label a setting: what differs from what most of them have."""
    firsts = [part[0] for part in parts]
    content = {name: [repr(columns[name][row]) for row in firsts] for name in ("method", *varied)}
    usual = {name: _majority(content[name]) for name in varied if not _settled(name, content)}
    labels = []
    for row in firsts:
        method = columns["method"][row]
        words = [method] if method and len(set(content["method"])) > 1 else []
        words += [
            f"{name.removeprefix('config.').removesuffix('.name').removesuffix('.method').rpartition('.')[2]}="
            f"{_said(columns[name][row])}"
            for name, common in usual.items()
            if repr(columns[name][row]) != common and not _says_nothing(name, row, columns)
        ]
        superseded = " (superseded)" if columns["state"][row] == State.SUPERSEDED else ""
        labels.append((", ".join(words) or "reference") + superseded)
    return _told_apart(labels, firsts, columns)


def _says_nothing(name: str, row: int, columns: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a value needs no words: how a run without steps would have been trained, or no target.

    The target of a trial is none of its search.
    """
    if name == TARGET:
        return columns[name][row] is None or (OF_SEARCH in columns and columns[OF_SEARCH][row] is not None)
    return name.startswith(HYPERPARAMETER) and name != STEPS and STEPS in columns and columns[STEPS][row] == 0


def _settled(name: str, content: Mapping[str, Sequence[str]]) -> bool:
    """Whether a column follows from the method, or from the name of its group: one value of that, one of this."""
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


def _told_apart(labels: list[str], firsts: Sequence[int], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Equal labels get what they differ in, in square brackets."""
    members: dict[str, list[int]] = {}
    for label, row in zip(labels, firsts, strict=True):
        members.setdefault(label, []).append(row)

    def told(label: str, row: int) -> str:
        known = [name for name in MUST_AGREE if name in columns]
        differ = [name for name in known if len({str(columns[name][other]) for other in members[label]}) > 1]
        words = ", ".join(f"{MUST_AGREE[name]} {columns[name][row]}" for name in differ)
        return label if len(members[label]) == 1 else f"{label} [{words}]"

    return [told(label, row) for label, row in zip(labels, firsts, strict=True)]


def _said(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
