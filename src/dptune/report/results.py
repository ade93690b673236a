"""What the views are made of: a frame of runs, and which test items each run got right."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dptune.records.frame import collect, to_frame
from dptune.records.record import EVALUATION_FILE, HISTORY_FILE, RunRecord
from dptune.records.state import State
from dptune.report.intervals import Answers
from dptune.report.settings import OF_SEARCH

if TYPE_CHECKING:
    import pandas as pd

    from dptune.report.settings import Setting
    from dptune.sweeps.jobs import Job

ORDER = (
    "sweep",
    "method",
    "config.adapter.name",
    "config.privacy.name",
    "config.privacy.target_epsilon",
    "config.environment.seed",
)
"""How runs are listed where no sweep gives an order."""
MOST_WITH_ITEMS = 4000
"""Above this many runs their judged items, a hundred times larger than what is shown, stay in their folders."""
HOW_TO_MAKE_SOME = (
    "no records in {root}: `make sweep SWEEP=smoke` makes four in a minute or two, and `make sweep` the main ones"
)


@dataclass(frozen=True)
class Results:
    """All that is known of some runs."""

    runs: pd.DataFrame
    """One row a run, as `records.to_frame` gives it, with its state in the column `state`."""
    correct: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    """By run id: which test items it got right."""
    tasks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By run id: the task of each test item; runs on the same data share one tuple."""
    unreadable: tuple[str, ...] = ()
    """One line for each record, or file beside it, that was left out."""
    root: Path = Path("outputs")
    """Where the run folders lie."""

    @property
    def done(self) -> pd.DataFrame:
        """The finished runs."""
        return self.runs[self.runs["state"] == State.DONE]

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """The runs by setting, in the order of every table."""
        from dptune.report.settings import settings_of

        return tuple(settings_of(self.runs))

    def only(self, runs: pd.DataFrame) -> Results:
        """The same with other rows."""
        return dataclasses.replace(self, runs=runs)

    def test_items(self, run_ids: Sequence[str]) -> Answers | None:
        """Items by run, if they are known for all of these runs and are the same items."""
        layouts = {self.tasks.get(run_id) for run_id in run_ids}
        if len(layouts) != 1 or None in layouts:
            return None
        (layout,) = layouts
        assert layout is not None
        names, task_of = _indexed(layout)
        return Answers(names, task_of, np.array([self.correct[run_id] for run_id in run_ids], dtype=np.float64))


def load_results(root: Path) -> Results:
    """Everything below an output folder. Records that cannot be read are named in `unreadable`.

    Which test items each run got right is read too, for up to `MOST_WITH_ITEMS` runs.
    """
    found = collect(root)
    items = len(found.records) <= MOST_WITH_ITEMS
    return of_records(found.records, root, unreadable=found.unreadable, items=items)


def of_records(
    records: Sequence[RunRecord], root: Path, *, unreadable: tuple[str, ...] = (), items: bool = True
) -> Results:
    """Results of some records, whose folders lie below `root`."""
    import pandas as pd

    if not records:
        return Results(pd.DataFrame({"run_id": [], "status": [], "state": []}), unreadable=unreadable, root=root)
    runs = to_frame(records)
    guarantees = [record.guarantee for record in records]
    runs["guarantee"] = pd.Series(guarantees, dtype=object)
    runs[OF_SEARCH] = [found.shown if found is not None and found.of_search else None for found in guarantees]
    runs["state"] = runs["status"].replace({"running": State.BEGUN})
    for part in ("metrics", "zero_shot"):
        tasks = [name for name in runs if str(name).startswith(f"{part}.accuracy_by_task.")]
        runs[f"{part}.worst"] = runs[tasks].min(axis=1) if tasks else None
    order = [name for name in ORDER if name in runs]
    runs = runs.sort_values(order, kind="stable", ignore_index=True, na_position="first")
    results = Results(runs, unreadable=unreadable, root=root)
    return with_items(results, records) if items else results


def of_sweep(name: str, jobs: Sequence[Job], found: Results) -> Results:
    """What a sweep asks for, whether it is there or not, and what was made for it that it no longer asks for."""
    import pandas as pd

    asked = [job.run_id for job in jobs]
    runs = found.runs
    wanted = runs[runs["run_id"].isin(asked)]
    # A run that several sweeps share was recorded under the method of the first; here it has the name it has here.
    # Only the record of a search knows which of its candidates was chosen.
    recorded = dict(zip(wanted["run_id"], wanted["method"], strict=True)) if "method" in wanted else {}
    named = {job.run_id: recorded.get(job.run_id) if job.is_search else job.config.method for job in jobs}
    wanted = wanted.assign(method=wanted["run_id"].map(named).astype(object))
    present = {str(run_id) for run_id in wanted["run_id"]}
    lacking = [job for job in jobs if job.run_id not in present]
    planned = to_frame(
        RunRecord(job.run_id, "running", dataclasses.asdict(job.config), name, job.config.method) for job in lacking
    )
    parts = [part for part in (wanted, planned.assign(state=State.MISSING) if lacking else None) if part is not None]
    if "sweep" in runs:
        old = runs[(runs["sweep"] == name) & ~runs["run_id"].isin(asked)]
        parts.append(old.assign(state=State.SUPERSEDED))
    together = pd.concat([part.astype(object) for part in parts if len(part)], ignore_index=True).infer_objects()
    position = {run_id: at for at, run_id in enumerate(asked)}
    order = together["run_id"].map(lambda run_id: position.get(run_id, len(asked))).argsort(kind="stable")
    return found.only(together.iloc[order].reset_index(drop=True))


def filtered(results: Results, filters: Sequence[str]) -> Results:
    """The runs for which every `key=value` holds; a key is a column or the end of one, several values by commas.

    Raises:
        ValueError: for a key that no record has.
    """
    runs = results.runs
    for item in filters:
        key, _, wanted = item.partition("=")
        columns = [name for name in (key, f"config.{key}") if name in runs]
        columns += [str(name) for name in runs if str(name).endswith(f".{key}")]
        if not columns:
            raise ValueError(f"no record has {key}; filters name a column such as privacy.name, method, sweep or state")
        values = wanted.split(",")
        runs = runs[runs[columns[0]].map(lambda value, values=values: _says(value, values))]
    return results.only(runs)


def with_items(results: Results, records: Sequence[RunRecord]) -> Results:
    """The same with the test items, where they agree with the record."""
    correct: dict[str, NDArray[np.bool_]] = {}
    tasks: dict[str, tuple[str, ...]] = {}
    layouts: dict[str, list[tuple[str, ...]]] = {}
    wrong = list(results.unreadable)
    for record in records:
        if not record.is_done or record.metrics is None:
            continue
        path = results.root / record.run_id / EVALUATION_FILE
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            continue
        right = np.array([word.startswith(b"true") for word in text.split(_CORRECT)[1:]])
        known = layouts.setdefault(str(record.provenance.get("data")), [])
        layout = next((item for item in known if _agrees(record, right, item)), None)
        if layout is None:
            layout = _task_column(text)
            if not _agrees(record, right, layout):
                wrong.append(f"{path}: does not agree with the accuracies in its record; its items are not used")
                continue
            known.append(layout)
        correct[record.run_id], tasks[record.run_id] = right, layout
    return dataclasses.replace(results, correct=correct, tasks=tasks, unreadable=tuple(wrong))


def history(folder: Path) -> list[dict[str, object]]:
    """The lines of a run's history; none when it has no file, and what can be read of one that was cut off."""
    try:
        lines = (folder / HISTORY_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # A run that was killed leaves half a line at the end.
    return rows


_CORRECT = b'"correct": '


def _task_column(text: bytes) -> tuple[str, ...]:
    try:
        return tuple(str(json.loads(line)["task"]) for line in text.splitlines())
    except (ValueError, KeyError, TypeError):
        return ()


@lru_cache(maxsize=64)
def _indexed(layout: tuple[str, ...]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    names, index = np.unique(np.array(layout), return_inverse=True)
    return tuple(str(name) for name in names), index.astype(np.int64)


def _agrees(record: RunRecord, right: NDArray[np.bool_], layout: tuple[str, ...]) -> bool:
    """Whether items and record tell the same accuracy of every task."""
    if not layout or len(layout) != len(right) or record.metrics is None:
        return False
    names, task_of = _indexed(layout)
    means = np.bincount(task_of, weights=right) / np.bincount(task_of)
    stated = record.metrics.accuracy_by_task
    return set(names) == set(stated) and bool(np.allclose(means, [stated[name] for name in names], atol=1e-9))


def _says(value: object, wanted: Sequence[str]) -> bool:
    if isinstance(value, float):
        return any(_number(word) == value or (word in ("null", "none") and value != value) for word in wanted)
    return ("null" if value is None else str(value)) in wanted or str(value).lower() in wanted


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
