"""Tables of results: pure functions of runs. No torch here.

A table is a list of columns and of rows of cells; a cell knows its number, its interval, how many runs are behind it
and which. `render.py` turns it into Markdown, CSV, LaTeX and HTML, `terminal.py` into lines of a given width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dptune.privacy.accounting import epsilon_text, rounded_up
from dptune.records.code import code_version
from dptune.records.state import State
from dptune.report.composition import Composition, compositions
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
class Column:
    """One column."""

    key: str
    title: str
    direction: str = ""
    """`↑` where higher is better, `↓` where lower is."""

    @property
    def head(self) -> str:
        """Title and direction."""
        return f"{self.title} {self.direction}".strip()


@dataclass(frozen=True)
class Table:
    """A table with what must be known to read it."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]
    notes: tuple[str, ...] = ()
    compositions: tuple[Composition, ...] = field(default=(), repr=False)


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
TEXT = {"bleu": BLEU, "rouge_l": ROUGE_L}
"""Measures of free-form text, shown where there is some."""
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
    items, variance = results.judgements(run_ids), 0.0
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
    settings = results.settings
    columns = (
        Column("row", "#"),
        Column("setting", "setting"),
        Column("accuracy", "accuracy [95 %] (n)", "↑"),
        Column("difference", "difference by seed [95 %] (n)", "↑"),
        *(Column(key, measure.title, measure.direction) for key, measure in TEXT.items() if _known(results, measure)),
        Column("unseen", "unseen inputs", "↑"),
        Column("worst", "worst task", "↑"),
        Column("spread", "spread over tasks", "↓"),
        Column("epsilon", "ε spent/target", "↓"),
        Column("delta", "δ"),
        Column("trainable", "trainable (%)", "↓"),
        Column("seconds", "time, s", "↓"),
    )
    rows = floor_rows(results)
    compared_with = references(settings)
    position = {id(setting): at for at, setting in enumerate(settings, 1)}
    for at, (setting, reference) in enumerate(zip(settings, compared_with, strict=True), 1):
        difference = difference_cell(results, setting, reference, position.get(id(reference), 0))
        rows.append({"row": Cell(str(at), at), **setting_row(results, setting, difference)})
    states = Counter(results.runs["state"])
    counted = len(results.runs) - states[State.SUPERSEDED]
    title = f"{title or name}: {states[State.DONE]} of {counted} runs done"
    title += f", {states[State.SUPERSEDED]} superseded" if states[State.SUPERSEDED] else ""
    found = compositions(results.runs)
    lines = notes(results, settings, found, compared=any(reference is not None for reference in compared_with))
    return Table(name, title, columns, tuple(rows), tuple(lines), tuple(found))


def setting_row(results: Results, setting: Setting, difference: Cell) -> dict[str, Cell]:
    """One row of the main table."""
    label = setting.label + ("" if setting.private else " (ceiling)")
    lacking = lacking_runs(setting)
    if not setting.done:
        return {"setting": Cell(label), "accuracy": Cell(lacking)}
    items = results.judgements(setting.run_ids)
    accuracy = measured(setting, ACCURACY, items)
    if lacking:
        parts = replace(accuracy.parts or Parts(accuracy.text), words=lacking)
        accuracy = replace(accuracy, text=f"{accuracy.text}; {lacking}", parts=parts)
    return {
        "setting": Cell(label, run_ids=setting.run_ids),
        "accuracy": accuracy,
        "difference": difference,
        **{key: measured(setting, measure) for key, measure in TEXT.items()},
        "unseen": measured(setting, UNSEEN),
        "worst": measured(setting, WORST, items),
        "spread": measured(setting, SPREAD, items),
        **epsilon_cells(setting),
        "trainable": trainable_cell(setting),
        "seconds": cost_cell(setting, SECONDS),
    }


def floor_rows(results: Results) -> list[dict[str, Cell]]:
    """Each backbone before training."""
    done, model = results.done, "config.model.name"
    if model not in done or done[model].nunique() < 2:
        return [floor_row(done)] if len(done) else []
    return [floor_row(runs, f", model={name}") for name, runs in done.groupby(model, sort=False)]


def floor_row(done: pd.DataFrame, which: str = "") -> dict[str, Cell]:
    """What most of some finished runs began with."""
    row: dict[str, Cell] = {"setting": Cell(f"zero-shot (floor){which}"), "epsilon": Cell("none")}
    if "zero_shot.accuracy" not in done or not done["zero_shot.accuracy"].notna().any():
        return {**row, "accuracy": Cell("not measured")}
    known = done[done["zero_shot.accuracy"].notna()]
    if (different := known["zero_shot.accuracy"].nunique()) > 1:
        # Another backbone, precision, sequence length or test split has another floor.
        common = known["zero_shot.accuracy"].mode().iloc[0]
        same = known["zero_shot.accuracy"] == common
        if 2 * same.sum() <= len(known):
            return {**row, "accuracy": Cell(f"differs between runs ({different} values)")}
        row["setting"] = Cell(f"zero-shot (floor of {same.sum()} of {len(known)} runs){which}")
        known = known[same]
    first = known.iloc[0]
    accuracy = share_of_one_run(float(first["zero_shot.accuracy"]), int(first["zero_shot.n"]))
    tasks = [float(value) for key, value in first.items() if _is_task(str(key), "zero_shot.") and value == value]
    row["accuracy"] = in_words(accuracy, 3, tuple(known["run_id"]))
    if tasks:
        row["worst"] = Cell(f"{min(tasks):.3f}", min(tasks))
        row["spread"] = Cell(f"{float(np.std(tasks)):.3f}", float(np.std(tasks)))
    for key, measure in TEXT.items():
        if (value := first.get(f"zero_shot.{key}")) is not None and value == value:
            row[key] = Cell(f"{value:.{measure.digits}f}", float(value))
    if (unseen := first.get("zero_shot.accuracy_unseen")) == unseen and unseen is not None:
        row["unseen"] = Cell(f"{unseen:.3f}", unseen)
    return {**row, "trainable": Cell("0 (0.00)", 0.0, parts=Parts("0", tail="(0.00)"))}


def difference_cell(results: Results, setting: Setting, reference: Setting | None, row: int) -> Cell:
    """How a setting differs from its reference, which is in the given row, seed by seed."""
    if reference is None:
        return Cell(NONE)
    if reference is setting:
        return Cell("reference")
    try:
        found, run_ids = paired(results, setting, reference)
    except ValueError as reason:
        return Cell(f"not compared: {reason}")
    return in_words(found, 3, tuple(run_ids), sign="+", tail=f"to {row}")


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


def epsilon_cells(setting: Setting) -> dict[str, Cell]:
    """Epsilon spent over target, and delta: the largest spent of its runs counts. With that of a search."""
    if not setting.private:
        return {"epsilon": Cell("none"), "delta": Cell(NONE)}
    spent = [value for value in setting.values("privacy.epsilon") if value is not None]
    if not spent:
        return {"epsilon": Cell("not recorded"), "delta": Cell(NONE)}
    epsilon, delta, target = rounded_up(max(spent)), setting.value("privacy.delta"), setting.target
    parts = Parts(f"{epsilon:.3f}/{NONE if target is None else format(target, 'g')}")
    if whole := setting.value("provenance.repetitions.epsilon"):
        epsilon = rounded_up(whole)
        parts = replace(parts, words=f"best of K {epsilon:.3f}")
    flags = [setting.value("privacy.noise_mode") == "reproducible" and "r", setting.value("privacy.stand_in") and "p"]
    parts = replace(parts, marks=tuple(flag for flag in flags if flag))
    text = "; ".join(filter(None, (parts.number, parts.words)))
    text += f" ({','.join(parts.marks)})" if parts.marks else ""
    return {
        "epsilon": Cell(text, epsilon, run_ids=setting.run_ids, parts=parts),
        "delta": Cell(f"{delta:g}", delta),
    }


def trainable_cell(setting: Setting) -> Cell:
    """How many parameters were trained, and their share."""
    counts = {value for value in setting.values("parameters.trainable") if value is not None}
    if len(counts) != 1:
        return Cell(NONE if not counts else "differs between runs")
    (count,) = counts
    parts = Parts(f"{int(count):,}", tail=f"({100 * setting.value('parameters.fraction'):.2f})")
    return Cell(f"{parts.number} {parts.tail}", float(count), parts=parts)


def cost_cell(setting: Setting, measure: Measure) -> Cell:
    """A cost; withheld for private data, where it depends on the batches that were drawn."""
    if setting.private and not setting.value("privacy.stand_in"):
        return Cell("withheld")
    return measured(setting, measure)


def lacking_runs(setting: Setting) -> str:
    """How many runs have no numbers, and why."""
    states = [setting.columns["state"][row] for row in setting.rows]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != State.DONE)


def cost_table(name: str, results: Results) -> Table:
    """Noise, parameters, time and memory of each setting."""
    settings = results.settings
    rows = []
    for at, setting in enumerate(settings, 1):
        sigma = {value for value in setting.values("privacy.noise_multiplier") if value is not None}
        rows.append(
            {
                "row": Cell(str(at), at),
                "setting": Cell(setting.label, run_ids=setting.run_ids),
                "sigma": Cell(f"{max(sigma):.4f}", max(sigma)) if sigma else Cell(NONE),
                "trainable": trainable_cell(setting),
                "seconds": cost_cell(setting, SECONDS),
                "memory": cost_cell(setting, MEMORY),
                "perplexity": measured(setting, PERPLEXITY),
                **epsilon_cells(setting),
            }
        )
    columns = (
        Column("row", "#"),
        Column("setting", "setting"),
        Column("epsilon", "ε spent/target", "↓"),
        Column("delta", "δ"),
        Column("sigma", "noise multiplier σ"),
        Column("trainable", "trainable (%)", "↓"),
        Column("seconds", SECONDS.title, "↓"),
        Column("memory", MEMORY.title, "↓"),
        Column("perplexity", PERPLEXITY.title, "↓"),
    )
    return Table(f"{name}-cost", f"{name}: noise, size and cost", columns, tuple(rows), tuple(flag_notes(settings)))


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
    row = {"row": Cell(str(at), at), "setting": Cell(setting.label, run_ids=setting.run_ids)}
    items = results.judgements(setting.run_ids)
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
    settings = [item for item in results.settings if item.done]
    arms = list(dict.fromkeys(item.arm for item in settings))
    if len(arms) < 2:
        return None
    targets = sorted({item.target for item in settings if item.target is not None})
    compared_with = dict(zip(map(id, settings), references(settings), strict=True))
    rows = []
    for arm in arms:
        row = {"setting": Cell(arm)}
        for target in [*targets, None]:
            members = [item for item in settings if item.arm == arm and item.target == target]
            if len(members) > 1:
                row[f"{target}"] = Cell(f"{len(members)} settings, never averaged")
            elif members:
                (setting,) = members
                reference = compared_with[id(setting)]
                accuracy = measured(setting, ACCURACY, results.judgements(setting.run_ids))
                if reference not in (None, setting):
                    difference = difference_cell(results, setting, reference, 0).text.removesuffix(" to 0")
                    accuracy = replace(accuracy, text=f"{accuracy.text}; {difference}")
                row[f"{target}"] = accuracy
        rows.append(row)
    columns = [Column("setting", "method"), *(Column(f"{target}", f"ε ≤ {target:g}", "↑") for target in targets)]
    if any("None" in row for row in rows):
        columns.append(Column("None", "no target ε", "↑"))
    base = next((item for item in compared_with.values() if item is not None), None)
    lines = [
        f"Accuracy [95 %] (n); then the difference by seed to {base.arm}." if base else "Accuracy [95 %] (n).",
        INTERVALS,
    ]
    lines += [*flag_notes(settings), *mixed(settings), *why_apart(settings)]
    return Table(f"{name}-comparison", f"{name}: methods by ε", tuple(columns), tuple(rows), tuple(lines))


def run_table(name: str, results: Results) -> Table:
    """Every run: where each number of the other tables comes from."""
    rows = []
    for at, setting in enumerate(results.settings, 1):
        content = setting.columns
        for row in setting.rows:
            run_id, accuracy = str(content["run_id"][row]), _optional(content, row, ACCURACY)
            state, error = content["state"][row], (content["error"][row] if "error" in content else None)
            epsilon = content["privacy.epsilon"][row] if "privacy.epsilon" in content else None
            rows.append(
                {
                    "row": Cell(str(at), at),
                    "setting": Cell(setting.label),
                    "seed": Cell(str(content[SEED][row]) if SEED in content else NONE),
                    "run": Cell(run_id, run_ids=(run_id,)),
                    "state": Cell(f"{state}: {error}" if error else state),
                    "accuracy": Cell(NONE if accuracy is None else f"{accuracy:.4f}", accuracy),
                    "epsilon": Cell(NONE if epsilon is None else epsilon_text(epsilon), epsilon),
                }
            )
    heads = ("#", "setting", "seed", "run", "state", "accuracy", "ε")
    keys = ("row", "setting", "seed", "run", "state", "accuracy", "epsilon")
    columns = tuple(
        Column(key, head, {"accuracy": "↑", "epsilon": "↓"}.get(key, "")) for key, head in zip(keys, heads, strict=True)
    )
    return Table(f"{name}-runs", f"{name}: every run", columns, tuple(rows), ("# is the row in the other tables.",))


INTERVAL = (
    "[95 %]: the mean over runs ± Student's t times its standard error when runs (seeds) and test items are drawn "
    "again; for a single run Wilson's interval over its items."
)
INTERVALS = f"{INTERVAL} (n): number of runs."
FLAGS = {
    "r": "Noise mode reproducible: ε is accounted, not realised (anyone with the seed can subtract the noise).",
    "p": "The data is a public stand-in: ε is stated as if it were private.",
}
"""What limits the meaning of an epsilon, by its mark."""


def notes(results: Results, settings: Sequence[Setting], found: Sequence[Composition], compared: bool) -> list[str]:
    """What a reader must know to read the main table."""
    lines = [INTERVALS] if len(results.done) else []
    if compared:
        lines.append(
            "Difference “to k”: to row k, by seed, on the same data and test items but for a condition of the data."
        )
    without = sum(run_id not in results.tasks for run_id in results.done["run_id"]) if len(results.runs) else 0
    if without:
        lines.append(f"{without} runs are shown without their judged items: those intervals are over seeds only.")
    private = [item for item in settings if item.private and item.done]
    if private:
        units = sorted({str(item.value("privacy.unit")) for item in private})
        lines.append(
            f"ε: upper bound by the PLD accountant for one run, unit {', '.join(units)}. "
            "It excludes the choice among runs."
        )
    if any(item.value("provenance.repetitions.epsilon") for item in private):
        lines.append(
            "“best of K”: ε of the search that released the run, by Rényi DP. It includes the choice, as long as the "
            "number of trials, the losing ones and the time they took stay secret."
        )
    lines += [item.text for item in found]
    lines += [*flag_notes(settings), *mixed(settings), *why_apart(settings), *code_notes(results)]
    lines += [f"Left out: {reason}" for reason in results.unreadable]
    return lines


def flag_notes(settings: Sequence[Setting]) -> list[str]:
    """What limits the meaning of the epsilons."""
    private = [item for item in settings if item.private and item.done]
    lines = []
    if any(item.value("privacy.noise_mode") == "reproducible" for item in private):
        lines.append(f"(r) {FLAGS['r']}")
    if any(item.value("privacy.stand_in") for item in private):
        lines.append(f"(p) {FLAGS['p']}")
    if any(not item.value("privacy.stand_in") for item in private):
        lines.append("“withheld”: times and memory of runs on private data depend on the batches that were drawn.")
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
    if any((times or 0) > 1 for item in private for times in item.values("privacy.attempts")):
        lines.append("Some runs were begun more than once; ε is for one transcript of each (their ledgers list all).")
    return lines


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


def _known(results: Results, measure: Measure) -> bool:
    return measure.key in results.runs and bool(results.runs[measure.key].notna().any())


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
