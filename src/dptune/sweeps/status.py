"""Which runs are done, running, failed, missing or stale, and what to type for the missing. No torch here."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dptune.records.code import code_version
from dptune.records.lock import holder
from dptune.records.record import RecordError, RunState, run_state, run_states
from dptune.records.state import State

if TYPE_CHECKING:
    from dptune.sweeps.jobs import Job


TO_DO = (State.INTERRUPTED, State.FAILED, State.MISSING)


@dataclass(frozen=True)
class Status:
    """One run."""

    run_id: str
    state: State
    why: str = ""
    """The error of a failed run, the process of a running one, the code of a stale one."""
    setting: str = ""
    """What sets it apart in its sweep."""


def of_sweep(name: str, jobs: Sequence[Job], arguments: Sequence[str]) -> str:
    """The state of each run of a sweep that was asked for with some overrides."""
    found = []
    for job in jobs:
        setting = ", ".join(item.split(".", 1)[-1] for item in job.varied)
        state = of_run(Path(job.config.compute.output_root) / job.run_id, setting)
        if job.is_search and state.state == State.MISSING:
            state = replace(state, why="the search is not finished")
        found.append(state)
    command = shlex.join(["dptune", "-m", f"sweeps={name}", *arguments])
    return "\n".join([f"Sweep {name}: {counts(found)}", *rows(found), *advice(found, command)])


def of_folder(root: Path) -> str:
    """The state of all runs below a folder, sweep by sweep; without its sweep nobody knows which runs are missing."""
    sweeps: dict[str | None, list[Status]] = {}
    for seen in run_states(root):
        name = seen.sweep if isinstance(seen, RunState) else None
        sweeps.setdefault(name, []).append(status_of(seen))
    lines = []
    for name, found in sorted(sweeps.items(), key=lambda item: item[0] or ""):
        title = f"Sweep {name}" if name else "Without a sweep"
        lines += [f"{title}: {counts(found)}", *rows(found)]
        lines += advice(found, f"dptune -m sweeps={name}") if name else []
    return "\n".join(lines or [f"no runs in {root}"])


def of_run(folder: Path, setting: str = "") -> Status:
    """The state of one run."""
    try:
        seen = run_state(folder)
    except RecordError as error:
        return Status(folder.name, State.FAILED, str(error), setting)
    return Status(folder.name, State.MISSING, "", setting) if seen is None else status_of(seen, setting)


def status_of(seen: RunState | RecordError, setting: str = "") -> Status:
    """The state that a record speaks of, if it still holds."""
    if isinstance(seen, RecordError):
        return Status(seen.folder.name, State.FAILED, str(seen), setting)
    name = seen.folder.name
    if seen.is_done:
        if seen.code == code_version():
            return Status(name, State.DONE, "", setting)
        return Status(name, State.STALE, f"by code {seen.code or 'of no version'}, this is {code_version()}", setting)
    if (process := holder(seen.folder)) is not None:
        return Status(name, State.RUNNING, str(process), setting)
    if seen.status == State.FAILED:
        return Status(name, State.FAILED, f"{seen.error}; its log is {seen.folder / 'run.log'}", setting)
    return Status(name, State.INTERRUPTED, "", setting)


def counts(found: Sequence[Status]) -> str:
    """How many runs are in which state."""
    numbers = [(sum(item.state == state for item in found), state) for state in State]
    runs = "1 run" if len(found) == 1 else f"{len(found)} runs"
    return f"{runs}: " + ", ".join(f"{number} {state}" for number, state in numbers if number)


def rows(found: Iterable[Status]) -> Iterator[str]:
    """A line for each run that is not simply done."""
    shown = sorted((item for item in found if item.state != State.DONE), key=lambda item: list(State).index(item.state))
    width = max((len(item.setting) for item in shown), default=0)
    for item in shown:
        yield f"  {item.state:<11}  {item.run_id}  {item.setting:<{width}}  {item.why}".rstrip()


def advice(found: Sequence[Status], command: str) -> list[str]:
    """What to type."""
    lines = []
    if number := sum(item.state in TO_DO for item in found):
        lines.append(f"To do the {number} that {'is' if number == 1 else 'are'} not done: {command}")
    if any(item.state == State.STALE for item in found):
        lines.append(f"To do all again with this code: {command} compute.force=true")
    return lines
