"""A sweep under way, seen from the folders of its runs alone, whichever process or machine does them. No torch here."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dptune.records.lock import holder
from dptune.records.record import HISTORY_FILE, RECORD_FILE, RecordError, RunRecord, has_ended, read
from dptune.records.state import State
from dptune.sweeps.progress import Display, in_time, time_left
from dptune.sweeps.status import of_run

if TYPE_CHECKING:
    from dptune.sweeps.jobs import Job

EVERY = 0.5
"""Seconds between two looks at the runs of a sweep."""
WIDEST = 48
"""Settings are padded to the longest one, but not beyond this."""


class Watch:
    """Says each run of a sweep as its record appears, whichever process or machine wrote it.

    Used as a context: a thread looks at the folders while the launcher works.

    Args:
        missing: runs to do.
        total: runs of the sweep; the rest was done before.
        workers: how many runs are done at the same time.
    """

    def __init__(self, missing: Sequence[Job], total: int, workers: int) -> None:
        self.display = Display(total)
        self.total, self.workers = total, workers
        self.open = {job.run_id: job for job in missing}
        self.width = min(WIDEST, max((len(job.setting) for job in missing), default=0))
        # A record of an earlier attempt, or one that is forced to be made again, is no news.
        self.seen = {job.run_id: _mark(_folder(job)) for job in missing}
        self.done, self.failed = total - len(missing), 0
        self.begin = time.monotonic()
        self.left: tuple[float, float] | None = None  # seconds, and as of when
        self.begun = False
        self.running = ""
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self.thread.join()
        if kind is None:
            self.look()
        self.display.__exit__()

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        self.display.say(line)

    def look(self) -> None:
        """Say what has ended since the last look."""
        for job in list(self.open.values()):
            folder = _folder(job)
            mark = _mark(folder)
            if mark is None or mark == self.seen[job.run_id]:
                continue
            self.seen[job.run_id] = mark
            self.begun = True
            try:
                record = read(folder) if has_ended(folder) else None
            except RecordError as error:
                self.fail(job, str(error))
                continue
            if record is not None and record.is_done:
                self._end(job)
                self.done += 1
                self._say(job, f"accuracy {result(record)}", self._estimate())
            elif record is not None:
                self.fail(job, f"{record.error}; its log is {folder / 'run.log'}")
        # Whatever runs print before their records are there, such as how a backbone is pretrained, has no bar below it.
        if self.begun and self.open:
            self.display.show(self.done, self._words())

    def fail(self, job: Job, why: str) -> None:
        """Say that a run failed, unless that was said."""
        if job.run_id in self.open:
            self._end(job)
            self.failed += 1
            self._say(job, f"failed: {why}", self._estimate(), error=True)

    def _end(self, job: Job) -> None:
        del self.open[job.run_id]
        now = time.monotonic()
        ended = self.done + 1 + self.failed - (self.total - len(self.seen))
        left = time_left(len(self.open), ended, now - self.begin, self.workers)
        self.left = None if left is None else (left, now)

    def _estimate(self) -> str:
        if self.left is None or not self.open:
            return ""
        seconds, since = self.left
        return f"{in_time(max(0.0, seconds - (time.monotonic() - since)))} left"

    def _words(self) -> str:
        failed = f"{self.failed} failed" if self.failed else ""
        gone = f"{in_time(time.monotonic() - self.begin)} gone"
        return "  ".join(filter(None, (self.running, failed, gone, self._estimate())))

    def _say(self, job: Job, what: str, left: str, *, error: bool = False) -> None:
        count = f"[{self.done:>{len(str(self.total))}}/{self.total}]"
        line = "  ".join(filter(None, (count, f"{job.setting:<{self.width}}", what, left)))
        self.display.say(line, error=error)

    def _look_on(self) -> None:
        pause = EVERY
        while not self.stop.wait(pause):
            begin = time.monotonic()
            self.look()
            # A slow file server is asked less often.
            pause = max(EVERY, 10 * (time.monotonic() - begin))


def look_on(jobs: Sequence[Job], every: float) -> None:
    """Say each run of a sweep that others do, until all are done; on a terminal with a bar of where they are.

    Args:
        jobs: runs of the sweep.
        every: seconds between two looks at what is running.
    """
    states = [of_run(Path(job.config.compute.output_root) / job.run_id).state for job in jobs]
    missing = [job for job, state in zip(jobs, states, strict=True) if state not in (State.DONE, State.STALE)]
    with Watch(missing, len(jobs), 1) as watch:
        watch.begun = True
        while watch.open:
            steps = [step for job in list(watch.open.values()) if (step := _step(job))]
            watch.workers = max(1, len(steps))
            watch.running = f"{len(steps)} running ({', '.join(steps[:MOST_STEPS])})" if steps else "none running"
            watch.stop.wait(every)


MOST_STEPS = 3
"""Runs whose steps are shown."""


def _step(job: Job) -> str:
    """How far a run is that a process does now: the steps that are in its history of all."""
    folder = _folder(job)
    if not folder.is_dir() or holder(folder) is None:
        return ""
    try:
        done = (folder / HISTORY_FILE).read_bytes().count(b"\n")
    except OSError:
        done = 0
    return f"step {done}/{job.config.hyperparameter.steps}"


def result(record: RunRecord) -> str:
    """Accuracy and epsilon of a finished run."""
    from dptune.runs.privacy import spent

    assert record.metrics is not None
    return f"{record.metrics.accuracy:.3f}  {spent(record)}"


def _folder(job: Job) -> Path:
    return Path(job.config.compute.output_root) / job.run_id


def _mark(folder: Path) -> tuple[int, int] | None:
    """Changes whenever a record is written: each is a new file that replaces the old one."""
    try:
        found = (folder / RECORD_FILE).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
