"""The folder of a run, for the process that has locked it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dptune.records.lock import RunLock

LOG_FILE = "run.log"


Report = Callable[[str], None]
"""Receives one line of progress."""
Steps = Callable[[int, int], None]
"""Receives, after each step, its number and that of all."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, for the process that has locked it."""

    path: Path
    lock: RunLock
    say: Report
    steps: Steps

    def log(self, line: str) -> None:
        """Write a line to the log and report it."""
        self.note(line)
        self.say(line)

    def note(self, line: str) -> None:
        """Write a line to the log."""
        with (self.path / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}\n")


def log_traceback(folder: Path) -> None:
    """Write the exception that is being handled to a run's log, or to standard error when that cannot be written."""
    try:
        with (folder / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(traceback.format_exc())
    except OSError:
        traceback.print_exc()
