"""Tables of results: pure functions of runs. No torch here.

A table is a list of columns and of rows of cells; a cell knows its number, its interval, how many runs are behind it
and which. A column is one row of `SETTING_COLUMNS` or `RUN_COLUMNS`, which holds all that is known of it.
`render.py` turns a table into Markdown, CSV, LaTeX and HTML, `terminal.py` into lines of a given width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dptune.config.schema import ON_PUBLIC_GRADIENTS
from dptune.privacy.guarantee import epsilon_text, rounded_up
from dptune.records.code import code_version
from dptune.records.state import State
from dptune.report.composition import OF_A_SEARCH, OF_RUNS, Composition, compositions
from dptune.report.intervals import Answers, Array, Estimate, mean_over_runs, share_of_one_run
from dptune.report.results import Results
from dptune.report.settings import SEED, Setting, comparable, mixed, references, why_apart

if TYPE_CHECKING:
    import pandas as pd

NONE = "–"


@dataclass(frozen=True)
class Parts:
    """What the text of a cell is made of, for a table that aligns it or sets it in several lines."""

    number: str
    interval: str = ""
    tail: str = ""
    """What belongs to the number, such as the row that a difference is to."""
    words: str = ""
    """What else is to be said."""
    marks: tuple[str, ...] = ()
    """Keys of `FLAGS`."""


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, and the number behind it."""

    text: str
    value: float | None = None
    """The number, as it is before rounding."""
    low: float | None = None
    """Lower end of its 95 % interval."""
    high: float | None = None
    """Upper end."""
    n: int | None = None
    """Runs, or pairs of runs."""
    run_ids: tuple[str, ...] = ()
    """The runs it was computed from."""
    parts: Parts | None = None
    """Its text in parts, where there is a number in it."""


@dataclass(frozen=True)
class Measure:
    """A number of a run that is averaged over runs, as a function of the accuracies of its tasks where it is one."""

    key: str
    title: str
    direction: str
    of: Callable[[Array], Array] | None = None
    """Derivative by the accuracy of each task, shape (runs, tasks) from (runs, tasks)."""
    bounds: tuple[float, float] = (0.0, 1.0)
    digits: int = 3

    @property
    def before(self) -> str:
        """The column of runs that has it before training; runs have none for what training costs."""
        return f"zero_shot.{self.key.removeprefix('metrics.')}"


ALWAYS = 9


@dataclass(frozen=True)
class Column:
    """One column: its head, how its cells are made, where it is shown and what its reader must know."""

    key: str
    title: str
    direction: str = ""
    """`↑` where higher is better, `↓` where lower is."""
    cell: Callable[[Any], Cell | None] = lambda row: None
    """The cell of a row; None where there is nothing to say."""
    measure: Measure | None = None
    """What it shows the mean of; its value before training stands in the row of the floor."""
    floor: Cell | None = None
    """What the row of the floor has here where that is the same in every table."""
    notes: Callable[[Sequence[Any]], Iterable[str]] = lambda rows: ()
    """What a reader of these rows must know of it."""
    tables: tuple[str, ...] = ("main",)
    """Names of the tables of settings that show it."""
    early: bool = False
    """Whether there is something to say before a run is finished."""
    optional: bool = False
    """Whether it stays away from a table in which it has no number."""
    narrow: int = 0
    """0: not shown in a terminal. Else, where there is no room, the lowest go first, and those at `ALWAYS` never."""
    right: bool = False
    """Whether a terminal sets it flush right."""

    @property
    def head(self) -> str:
        """Title and direction."""
        return f"{self.title} {self.direction}".strip()


@dataclass(frozen=True)
class Row:
    """One setting, and what the columns of its tables need beside it."""

    results: Results
    setting: Setting
    at: int
    """Its number."""
    reference: Setting | None = None
    """What it is compared with."""
    reference_at: int = 0
    """The number of that row."""

    @cached_property
    def items(self) -> Answers | None:
        """Which items its runs got right."""
        return self.results.test_items(self.setting.run_ids)


@dataclass(frozen=True)
class Table:
    """A table with what must be known to read it."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]
    notes: tuple[str, ...] = ()
    compositions: tuple[Composition, ...] = field(default=(), repr=False)


def _share(accuracies: Array) -> Array:
    return np.full_like(accuracies, 1 / accuracies.shape[1])


def _worst(accuracies: Array) -> Array:
    return np.asarray(np.eye(accuracies.shape[1])[accuracies.argmin(axis=1)])


def _spread(accuracies: Array) -> Array:
    deviation = accuracies.std(axis=1, keepdims=True)
    centred = accuracies - accuracies.mean(axis=1, keepdims=True)
    zero = np.zeros_like(centred)
    return np.asarray(np.divide(centred, deviation * accuracies.shape[1], out=zero, where=deviation > 0))


ACCURACY = Measure("metrics.accuracy", "accuracy", "↑", _share)
WORST = Measure("metrics.worst", "worst task", "↑", _worst)
SPREAD = Measure("metrics.spread_over_tasks", "spread over tasks", "↓", _spread)
UNSEEN = Measure("metrics.accuracy_unseen", "unseen inputs", "↑")
PERPLEXITY = Measure("metrics.response_perplexity", "perplexity", "↓", None, (1.0, math.inf), 2)
BLEU = Measure("metrics.bleu", "BLEU", "↑", None, (0.0, 100.0), 1)
ROUGE_L = Measure("metrics.rouge_l", "ROUGE-L", "↑")
SECONDS = Measure("cost.seconds", "time, s", "↓", None, (0.0, math.inf), 0)
MEMORY = Measure("cost.peak_memory_mb", "peak memory, MiB", "↓", None, (0.0, math.inf), 0)


def estimate(setting: Setting, measure: Measure, items: Answers | None = None) -> Estimate | None:
    """The mean of a measure over the finished runs of a setting; None without numbers.

    Args:
        setting: the setting.
        measure: what is averaged.
        items: which items its runs got right, for the part of the interval that comes from them.
    """
    values = [value for value in values_of(setting, measure) if value is not None]
    if not values:
        return None
    if len(values) == 1:
        if measure is ACCURACY or (measure is UNSEEN and setting.value("metrics.n_unseen")):
            tested = setting.value("metrics.n" if measure is ACCURACY else "metrics.n_unseen")
            return share_of_one_run(values[0], int(tested))
        if measure is WORST:
            worst = setting.value("metrics.worst_task")
            tested = setting.value(f"metrics.n_by_task.{worst}") or setting.value("metrics.n")
            return share_of_one_run(values[0], int(tested))
    if not (items and measure.of):
        return mean_over_runs(values, bounds=measure.bounds)
    accuracies = items.accuracies()
    variance = items.variance(items.influence(measure.of(accuracies)))
    tested = len(items.task_of) // (len(items.tasks) if measure is WORST else 1)
    return mean_over_runs(values, item_variance=variance, items=tested, bounds=measure.bounds)


def paired(results: Results, one: Setting, other: Setting, measure: Measure = ACCURACY) -> tuple[Estimate, list[str]]:
    """The mean difference over the seeds that two settings share, and the runs behind it.

    Raises:
        ValueError: saying why they cannot be compared.
    """
    if reason := comparable(one, other):
        raise ValueError(reason)
    first, second = one.by_seed(), other.by_seed()
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        raise ValueError("no seed in common")
    columns, ids = one.columns, one.columns["run_id"]
    left, right = [first[seed] for seed in seeds], [second[seed] for seed in seeds]
    differences = [
        _number(columns, a, measure) - _number(columns, b, measure) for a, b in zip(left, right, strict=True)
    ]
    run_ids = [ids[row] for row in (*left, *right)]
    items, variance = results.test_items(run_ids), 0.0
    tested = 0 if items is None else len(items.task_of)
    if items and measure.of:
        gradient = measure.of(items.accuracies())
        # The mean over 2n runs of signed, doubled values is the mean difference over n pairs.
        gradient *= 2 * np.repeat([1.0, -1.0], len(seeds))[:, None]
        variance = items.variance(items.influence(gradient))
    return mean_over_runs(differences, item_variance=variance, items=tested), run_ids


def values_of(setting: Setting, measure: Measure) -> list[float | None]:
    """One number for each finished run."""
    return [_optional(setting.columns, row, measure) for row in setting.done]


def main_table(name: str, results: Results, title: str | None = None) -> Table:
    """The results of some runs: one row a setting, seeds together, the floor first and the ceiling last."""
    rows = rows_of(results)
    columns, cells = _filled("main", rows)
    states = Counter(results.runs["state"])
    counted = len(results.runs) - states[State.SUPERSEDED]
    title = f"{title or name}: {states[State.DONE]} of {counted} runs done"
    title += f", {states[State.SUPERSEDED]} superseded" if states[State.SUPERSEDED] else ""
    found = compositions(results.runs)
    lines = [*_column_notes(columns, rows), *(item.text for item in found), *limits(results.settings)]
    lines += [*code_notes(results), *(f"Left out: {reason}" for reason in results.unreadable)]
    return Table(name, title, columns, (*floor_rows(results), *cells), tuple(lines), tuple(found))


def cost_table(name: str, results: Results) -> Table:
    """Noise, parameters, time and memory of each setting."""
    rows = rows_of(results)
    columns, cells = _filled("cost", rows)
    lines = (*_column_notes(columns, rows), *flag_notes(results.settings))
    return Table(f"{name}-cost", f"{name}: noise, size and cost", columns, cells, lines)


def rows_of(results: Results) -> list[Row]:
    """The settings of some results, each with the one that it is compared with."""
    settings, compared_with = results.settings, references(results.settings)
    position = {id(setting): at for at, setting in enumerate(settings, 1)}
    return [
        Row(results, setting, position[id(setting)], reference, position.get(id(reference), 0))
        for setting, reference in zip(settings, compared_with, strict=True)
    ]


def cells_of(columns: Iterable[Column], row: Any) -> dict[str, Cell]:
    """The cells of one row, by column; without those that have nothing to say."""
    return {column.key: cell for column in columns if (cell := column.cell(row)) is not None}


def _filled(table: str, rows: Sequence[Row]) -> tuple[tuple[Column, ...], tuple[dict[str, Cell], ...]]:
    """The columns of a table of settings, and its rows."""
    columns = [column for column in SETTING_COLUMNS if table in column.tables]
    early = [column for column in columns if column.early]
    cells = tuple(cells_of(columns if row.setting.done else early, row) for row in rows)
    known = {key for row in cells for key, cell in row.items() if cell.value is not None}
    return tuple(column for column in columns if not column.optional or column.key in known), cells


def _column_notes(columns: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """What the columns have to say, each thing once."""
    return list(dict.fromkeys(note for column in columns for note in column.notes(rows)))


def floor_rows(results: Results) -> list[dict[str, Cell]]:
    """Each backbone before training."""
    done, model = results.done, "config.model.name"
    if model not in done or done[model].nunique() < 2:
        return [floor_row(done)] if len(done) else []
    return [floor_row(runs, f", model={name}") for name, runs in done.groupby(model, sort=False)]


def floor_row(done: pd.DataFrame, which: str = "") -> dict[str, Cell]:
    """What most of some finished runs began with."""
    row = {column.key: column.floor for column in SETTING_COLUMNS if column.floor}
    row["setting"] = Cell(f"zero-shot (floor){which}")
    if ACCURACY.before not in done or not done[ACCURACY.before].notna().any():
        return {**row, "accuracy": Cell("not measured")}
    known = done[done[ACCURACY.before].notna()]
    if (different := known[ACCURACY.before].nunique()) > 1:
        # Another backbone, precision, sequence length or test split has another floor.
        common = known[ACCURACY.before].mode().iloc[0]
        same = known[ACCURACY.before] == common
        if 2 * same.sum() <= len(known):
            return {**row, "accuracy": Cell(f"differs between runs ({different} values)")}
        row["setting"] = Cell(f"zero-shot (floor of {same.sum()} of {len(known)} runs){which}")
        known = known[same]
    first = known.iloc[0]
    for column in SETTING_COLUMNS:
        measure = column.measure
        value = first.get(measure.before) if measure else None
        if measure and value is not None and value == value:
            row[column.key] = Cell(f"{value:.{measure.digits}f}", float(value))
    accuracy = share_of_one_run(float(first[ACCURACY.before]), int(first["zero_shot.n"]))
    return {**row, "accuracy": in_words(accuracy, ACCURACY.digits, tuple(known["run_id"]))}


def setting_cell(row: Row) -> Cell:
    """What sets a setting apart from the others."""
    return Cell(row.setting.label + ("" if row.setting.private else " (ceiling)"), run_ids=row.setting.run_ids)


def accuracy_cell(row: Row) -> Cell:
    """Accuracy, and how many runs have none and why."""
    lacking = lacking_runs(row.setting)
    if not row.setting.done:
        return Cell(lacking)
    cell = measured(row.setting, ACCURACY, row.items)
    if not lacking:
        return cell
    return replace(cell, text=f"{cell.text}; {lacking}", parts=replace(cell.parts or Parts(cell.text), words=lacking))


def difference_cell(row: Row) -> Cell:
    """How a setting differs from its reference, seed by seed."""
    if row.reference is None:
        return Cell(NONE)
    if row.reference is row.setting:
        return Cell("reference")
    try:
        found, run_ids = paired(row.results, row.setting, row.reference)
    except ValueError as reason:
        return Cell(f"not compared: {reason}")
    return in_words(found, 3, tuple(run_ids), sign="+", tail=f"to {row.reference_at}")


def measured(setting: Setting, measure: Measure, items: Answers | None = None) -> Cell:
    """A mean with its interval and number of runs."""
    found = estimate(setting, measure, items)
    return Cell(NONE) if found is None else in_words(found, measure.digits, setting.run_ids)


def in_words(found: Estimate, digits: int, run_ids: tuple[str, ...] = (), sign: str = "", tail: str = "") -> Cell:
    """A cell as `mean [low, high] (n) tail`."""
    parts = Parts(f"{found.mean:{sign}.{digits}f}", tail=tail)
    if found.low is not None and found.high is not None:
        parts = replace(parts, interval=f"[{found.low:{sign}.{digits}f}, {found.high:{sign}.{digits}f}]")
    text = " ".join(filter(None, (parts.number, parts.interval, f"({found.n})", tail)))
    return Cell(text, found.mean, found.low, found.high, found.n, run_ids, parts)


def epsilon_cell(row: Row) -> Cell:
    """Epsilon spent over target, or that of a whole search: the largest of its runs counts."""
    setting, epsilon = row.setting, row.setting.epsilon
    if not setting.private:
        return Cell("none")
    if epsilon is None:
        return Cell("unknown" if setting.done else NONE)
    if setting.of_search:
        parts = Parts(epsilon_text(epsilon), words="best of K")
    else:
        asked = NONE if setting.asked is None else format(setting.asked, "g")
        parts = Parts(f"{epsilon_text(epsilon)}/{asked}")
    parts = replace(parts, marks=tuple(mark for mark, flag in FLAGS.items() if flag.holds(setting)))
    text = "; ".join(filter(None, (parts.number, parts.words)))
    text += f" ({','.join(parts.marks)})" if parts.marks else ""
    return Cell(text, epsilon, run_ids=setting.run_ids, parts=parts)


def delta_cell(row: Row) -> Cell:
    """Delta of the epsilon beside it."""
    setting, delta = row.setting, row.setting.value("guarantee.delta")
    return Cell(f"{delta:g}", delta) if setting.private and setting.epsilon is not None else Cell(NONE)


def sigma_cell(row: Row) -> Cell:
    """The largest noise multiplier of its runs."""
    sigma = [value for value in row.setting.values("privacy.noise_multiplier") if value is not None]
    return Cell(f"{max(sigma):.4f}", max(sigma)) if sigma else Cell(NONE)


def trainable_cell(row: Row) -> Cell:
    """How many parameters were trained, and their share."""
    counts = {value for value in row.setting.values("parameters.trainable") if value is not None}
    if len(counts) != 1:
        return Cell(NONE if not counts else "differs between runs")
    (count,) = counts
    parts = Parts(f"{int(count):,}", tail=f"({100 * row.setting.value('parameters.fraction'):.2f})")
    return Cell(f"{parts.number} {parts.tail}", float(count), parts=parts)


def public_cell(row: Row) -> Cell:
    """Number of public records that the adapter, or the subspace of its gradients, was learned from."""
    setting = row.setting
    if records := setting.value("provenance.public.records"):
        return Cell(f"{records:,.0f} ({setting.value('config.public.method')})", float(records))
    if setting.value("config.privacy.projection") in ON_PUBLIC_GRADIENTS:
        return Cell("for gradients", 0.0)
    return Cell("none")


def cost_cell(row: Row, measure: Measure) -> Cell:
    """A cost; withheld for private data, where it depends on the batches that were drawn."""
    if row.setting.private and not row.setting.value("privacy.stand_in"):
        return Cell("withheld")
    return mean_cell(row, measure)


def mean_cell(row: Row, measure: Measure) -> Cell:
    """The mean of a measure over the runs of a setting."""
    return measured(row.setting, measure, row.items if measure.of else None)


def _mean(key: str, measure: Measure, cell: Callable[[Row, Measure], Cell] = mean_cell, **rest: Any) -> Column:
    return Column(key, measure.title, measure.direction, lambda row: cell(row, measure), measure, **rest)


def lacking_runs(setting: Setting) -> str:
    """How many runs have no numbers, and why."""
    states = [setting.columns["state"][row] for row in setting.rows]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != State.DONE)


def task_table(name: str, results: Results) -> Table:
    """Accuracy of each task by setting."""
    settings = results.settings
    tasks = [str(key).rpartition(".")[2] for key in results.runs.columns if _is_task(str(key), "metrics.")]
    rows = [task_row(results, setting, tasks, at) for at, setting in enumerate(settings, 1)]
    columns = (Column("row", "#"), Column("setting", "setting"), *(Column(task, task, "↑") for task in tasks))
    note = "Accuracy [95 %] (n) of each task. " + INTERVALS
    return Table(f"{name}-tasks", f"{name}: accuracy by task", columns, tuple(rows), (note,))


def task_row(results: Results, setting: Setting, tasks: Sequence[str], at: int) -> dict[str, Cell]:
    """One row of the table of tasks."""
    row = {"row": _numbered(at), "setting": Cell(setting.label, run_ids=setting.run_ids)}
    items = results.test_items(setting.run_ids)
    for task in tasks:
        values = [value for value in setting.values(f"metrics.accuracy_by_task.{task}") if value is not None]
        if not values:
            row[task] = Cell(lacking_runs(setting) or NONE)
        elif len(values) == 1:
            tested = setting.value(f"metrics.n_by_task.{task}") or setting.value("metrics.n")
            row[task] = in_words(share_of_one_run(values[0], int(tested)), 3, setting.run_ids)
        else:
            variance, tested = 0.0, 0
            if items is not None and task in items.tasks:
                index = items.tasks.index(task)
                variance = items.variance(items.influence(np.eye(len(items.tasks))[index]))
                tested = int((items.task_of == index).sum())
            found = mean_over_runs(values, item_variance=variance, items=tested, bounds=(0.0, 1.0))
            row[task] = in_words(found, 3, setting.run_ids)
    return row


def comparison_table(name: str, results: Results) -> Table | None:
    """Methods by target epsilon, with the difference to the baseline; None where there is one method only."""
    made = [row for row in rows_of(results) if row.setting.done]
    settings = [row.setting for row in made]
    arms = list(dict.fromkeys(item.arm for item in settings))
    if len(arms) < 2:
        return None
    targets = sorted({item.target for item in settings if item.target is not None})
    rows: list[dict[str, Cell]] = []
    for arm in arms:
        members = [row for row in made if row.setting.arm == arm]
        rows.append({"setting": Cell(arm)})
        for target in [*targets, None]:
            if here := [row for row in members if row.setting.target == target]:
                rows[-1][f"{target}"] = compared_cell(here)
    columns = [Column("setting", "method"), *(Column(f"{target}", f"ε ≤ {target:g}", "↑") for target in targets)]
    if any("None" in row for row in rows):
        columns.append(Column("None", "no target ε", "↑"))
    base = next((row.reference for row in made if row.reference), None)
    lines = [
        f"Accuracy [95 %] (n); then the difference by seed to {base.arm}." if base else "Accuracy [95 %] (n).",
        INTERVALS,
    ]
    lines += limits(settings)
    return Table(f"{name}-comparison", f"{name}: methods by ε", tuple(columns), tuple(rows), tuple(lines))


def compared_cell(members: Sequence[Row]) -> Cell:
    """Accuracy of a method at one epsilon, and the difference to its reference."""
    if len(members) > 1:
        return Cell(f"{len(members)} settings, never averaged")
    (row,) = members
    accuracy = measured(row.setting, ACCURACY, row.items)
    if row.reference in (None, row.setting):
        return accuracy
    difference = difference_cell(row).text.removesuffix(f" to {row.reference_at}")
    return replace(accuracy, text=f"{accuracy.text}; {difference}")


@dataclass(frozen=True)
class OneRun:
    """A run, as the columns of the table of runs see it."""

    at: int
    """Number of its setting."""
    setting: Setting
    row: int

    def value(self, column: str) -> Any:
        """What it has in this column; None without such a column."""
        return self.setting.columns[column][self.row] if column in self.setting.columns else None

    @property
    def state_cell(self) -> Cell:
        """Its state, and why it failed."""
        state, error = self.value("state"), self.value("error")
        return Cell(f"{state}: {error}" if error else state)

    @property
    def epsilon_cell(self) -> Cell:
        """What it guarantees; of a run that did not end, of what it began."""
        epsilon = self.value("guarantee.epsilon")
        return Cell(NONE) if epsilon is None else Cell(epsilon_text(epsilon), rounded_up(epsilon))

    def number(self, column: str, text: Callable[[float], str]) -> Cell:
        """A number of it."""
        value = self.value(column)
        return Cell(NONE) if value is None else Cell(text(value), float(value))


RUN_COLUMNS = (
    Column("row", "#", cell=lambda run: _numbered(run.at)),
    Column("setting", "setting", cell=lambda run: Cell(run.setting.label)),
    Column("seed", "seed", cell=lambda run: Cell(str(run.value(SEED)) if SEED in run.setting.columns else NONE)),
    Column("run", "run", cell=lambda run: Cell(run.value("run_id"), run_ids=(run.value("run_id"),))),
    Column("state", "state", cell=lambda run: run.state_cell),
    Column("accuracy", "accuracy", "↑", cell=lambda run: run.number(ACCURACY.key, lambda value: f"{value:.4f}")),
    Column("epsilon", "ε", "↓", cell=lambda run: run.epsilon_cell),
)


def run_table(name: str, results: Results) -> Table:
    """Every run: where each number of the other tables comes from."""
    runs = [OneRun(at, item, row) for at, item in enumerate(results.settings, 1) for row in item.rows]
    rows = tuple(cells_of(RUN_COLUMNS, run) for run in runs)
    return Table(f"{name}-runs", f"{name}: every run", RUN_COLUMNS, rows, ("# is the row in the other tables.",))


INTERVAL = (
    "[95 %]: confidence interval of the mean over other seeds and test items (Student's t); of a single run over its "
    "test items alone (Wilson)."
)
INTERVALS = f"{INTERVAL} (n): number of runs."


@dataclass(frozen=True)
class Flag:
    """What limits the meaning of an epsilon."""

    text: str
    holds: Callable[[Setting], bool]


FLAGS = {
    "r": Flag(
        "Noise mode reproducible: ε is accounted, not realised (anyone with the seed can subtract the noise).",
        lambda setting: setting.value("guarantee.realised") is False,
    ),
    "p": Flag(
        "The data is a public stand-in: ε is stated as if it were private.",
        lambda setting: bool(setting.value("guarantee.stand_in")),
    ),
    "d": Flag(
        "The training split holds records several times (duplicates): ε is for all copies of a record.",
        lambda setting: setting.value("guarantee.unit") == "example" and setting.value("guarantee.group_size") > 1,
    ),
}
"""By the mark that an epsilon has in a table."""


def about_accuracy(rows: Sequence[Row]) -> Iterable[str]:
    """What intervals are over."""
    if done := [run_id for row in rows for run_id in row.setting.run_ids]:
        yield INTERVALS
    if without := sum(run_id not in rows[0].results.tasks for run_id in done):
        yield f"{without} runs are shown without their judged items: those intervals are over seeds only."


def about_difference(rows: Sequence[Row]) -> Iterable[str]:
    """What is compared with what."""
    if any(row.reference for row in rows):
        yield "Difference “to k”: to row k, by seed, on the same data and test items but for a condition of the data."


def about_epsilon(rows: Sequence[Row]) -> Iterable[str]:
    """Who sees what, and what the number covers."""
    private = _private(row.setting for row in rows)
    if private:
        who = " or ".join(sorted({str(item.value("guarantee.protects")) for item in private}))
        yield (
            "ε bounds how well anyone who sees every noisy step of one run, and so its adapter, can tell whether "
            f"{who} was trained on (upper bound by the {OF_RUNS} accountant). Several runs, or the choice among them, "
            "cost more."
        )
    if any(item.of_search for item in private):
        yield (
            f"“best of K”: ε of the search that released the run, by the {OF_A_SEARCH} accountant. It covers the "
            "choice, as long as the number of trials, the losing ones and the time they took stay secret."
        )


def about_cost(rows: Sequence[Row]) -> Iterable[str]:
    """Why a cost is not told."""
    if any(not item.value("privacy.stand_in") for item in _private(row.setting for row in rows)):
        yield "“withheld”: times and memory of runs on private data depend on the batches that were drawn."


def limits(settings: Sequence[Setting]) -> list[str]:
    """What limits the meaning of the epsilons, and which runs do not belong together."""
    return [*flag_notes(settings), *mixed(settings), *why_apart(settings)]


def flag_notes(settings: Sequence[Setting]) -> list[str]:
    """What limits the meaning of the epsilons."""
    private = _private(settings)
    lines = [f"({mark}) {flag.text}" for mark, flag in FLAGS.items() if any(map(flag.holds, private))]
    judged = {
        int(count)
        for item in settings
        if not item.value("privacy.stand_in")
        for count in item.values("metrics.n")
        if count is not None
    }
    if judged:
        counts = " or ".join(f"{count:,}" for count in sorted(judged))
        lines.append(f"Test split of private data: no guarantee for its {counts} records, whose metrics are exact.")
    if any((times or 0) > 1 for item in private for times in item.values("guarantee.attempts")):
        lines.append("Some runs were begun more than once; ε is for all that they began (their ledgers list it).")
    return lines


COST, BOTH = ("cost",), ("main", "cost")
UNTRAINED = Cell("0 (0.00)", 0.0, parts=Parts("0", tail="(0.00)"))
SETTING_COLUMNS = (
    Column("row", "#", "", lambda row: _numbered(row.at), tables=BOTH, early=True, narrow=ALWAYS, right=True),
    Column("setting", "setting", "", setting_cell, tables=BOTH, early=True, narrow=ALWAYS),
    Column(
        "accuracy", "accuracy [95 %] (n)", "↑", accuracy_cell, ACCURACY, notes=about_accuracy, early=True, narrow=ALWAYS
    ),
    Column("difference", "difference by seed [95 %] (n)", "↑", difference_cell, notes=about_difference, narrow=ALWAYS),
    _mean("bleu", BLEU, optional=True, narrow=3),
    _mean("rouge_l", ROUGE_L, optional=True, narrow=2),
    _mean("unseen", UNSEEN),
    _mean("worst", WORST),
    _mean("spread", SPREAD),
    Column(
        "epsilon",
        "ε spent/target",
        "↓",
        epsilon_cell,
        floor=Cell("none"),
        notes=about_epsilon,
        tables=BOTH,
        early=True,
        narrow=ALWAYS,
    ),
    Column("delta", "δ", "", delta_cell, tables=BOTH),
    Column("public", "public data used", "", public_cell, floor=Cell("none"), optional=True, narrow=4),
    Column("sigma", "noise multiplier σ", "", sigma_cell, tables=COST),
    Column("trainable", "trainable (%)", "↓", trainable_cell, floor=UNTRAINED, tables=BOTH, narrow=1, right=True),
    _mean("seconds", SECONDS, cost_cell, notes=about_cost, tables=BOTH),
    _mean("memory", MEMORY, cost_cell, notes=about_cost, tables=COST),
    _mean("perplexity", PERPLEXITY, tables=COST),
)
"""The columns of the tables of settings: adding one is adding one here."""


def code_notes(results: Results) -> list[str]:
    """Whether all runs were made by this code: as `dptune status` says, run by run."""
    done, this = results.done, code_version()
    if "provenance.code" not in done:
        return []
    made = done["provenance.code"]
    others = sorted({str(code) for code in made.dropna()} - {this})
    if not (stale := int((made != this).sum())):
        return []
    named = f" ({', '.join(others)})" if others else ""
    return [f"Stale: {stale} of {len(done)} runs were made by other code{named} than this ({this})."]


def _numbered(at: int) -> Cell:
    return Cell(str(at), at, parts=Parts(str(at)))


def _private(settings: Iterable[Setting]) -> list[Setting]:
    return [item for item in settings if item.private and item.done]


def _is_task(key: str, prefix: str) -> bool:
    return key.startswith(f"{prefix}accuracy_by_task.")


def _optional(columns: Mapping[str, Sequence[Any]], row: int, measure: Measure) -> float | None:
    value = columns[measure.key][row] if measure.key in columns else None
    return None if value is None else float(value)


def _number(columns: Mapping[str, Sequence[Any]], row: int, measure: Measure) -> float:
    value = _optional(columns, row, measure)
    if value is None:
        raise ValueError(f"no {measure.title}")
    return value
