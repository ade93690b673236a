"""What a person sees of work under way: lines, and on a terminal a bar below them. No torch here."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from dptune.records.record import RunFailed


class Display:
    """Lines, and below them one bar where a person looks on: both streams are a terminal. Else nothing but lines."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        # As they are now: a library's words may be kept off them for a moment.
        self.out, self.err = sys.stdout, sys.stderr
        self.live = self.out.isatty() and self.err.isatty()
        self.bar: Any = None
        # A sweep looks at its runs in a thread of its own.
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            if self.bar is not None:
                self.bar.close()
                self.bar = None

    def say(self, line: str, *, error: bool = False) -> None:
        """Print a line, above the bar."""
        stream = self.err if error else self.out
        with self.lock:
            if self.bar is None:
                print(line, file=stream, flush=True)
            else:
                self.bar.write(line, file=stream)
                stream.flush()

    def show(self, done: int, words: str) -> None:
        """Draw the bar, with some words behind it; only on a terminal."""
        if not self.live:
            return
        with self.lock:
            if self.bar is None:
                from tqdm import tqdm

                tqdm.monitor_interval = 0  # Else it starts a thread that outlives the bar.
                self.bar = tqdm(
                    total=self.total,
                    file=self.err,
                    leave=False,
                    dynamic_ncols=True,
                    bar_format="|{bar}| {n_fmt}/{total_fmt}{desc}",
                )
            self.bar.n = done
            self.bar.set_description_str(f"  {words}" if words else "", refresh=False)
            self.bar.refresh()


class StepBar:
    """The bar of a single run: its steps and the time left for them."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self.first: tuple[int, float] | None = None

    def __call__(self, step: int, steps: int) -> None:
        """Called after each step."""
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        begin, since = self.first
        self.display.total = steps
        left = (now - since) / (step - begin) * (steps - step) if step > begin else None
        self.display.show(step, "steps" if left is None else f"steps  {in_time(left)} left")


def in_time(seconds: float) -> str:
    """A duration, as exactly as one cares."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def time_left(remaining: int, ended: int, seconds: float, workers: int = 1) -> float | None:
    """Seconds that some runs will take, by the rate at which others ended; None before the first did.

    Args:
        remaining: runs that are not done.
        ended: runs that ended.
        seconds: in which they did, up to the end of the last.
        workers: runs at the same time; all but the one that ended last are half done on average.
    """
    if not ended:
        return None
    busy = min(workers, remaining + 1)
    return remaining * seconds / (ended + (busy - 1) / 2)


def workers_of(launcher: Mapping[str, Any]) -> int:
    """How many runs a launcher does at the same time, by its settings."""
    number = launcher.get("n_jobs") or launcher.get("array_parallelism") or 1
    return int(number) if number > 0 else max((os.cpu_count() or 1) + 1 + int(number), 1)


@dataclass(frozen=True)
class NotDone:
    """What a job of a sweep gives back when it did not do its run."""

    why: str
    failed: bool
    """Else another process does it."""
    trace: str = ""
    """Where an error came from."""


def tried(run: Callable[[], object]) -> NotDone | None:
    """Do a run as a job of a sweep: what goes wrong is told to the sweeper, so that the other runs go on.

    Words travel between processes and machines; exceptions need not.
    """
    try:
        run()
    except BlockingIOError as error:
        return NotDone(str(error), failed=False)
    except RunFailed as error:
        return NotDone(str(error), failed=True)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return NotDone(why, failed=True, trace=traceback.format_exc())
    return None
