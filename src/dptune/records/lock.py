"""Which process does a run: a lock that one process holds at a time, also over a shared file system. No torch here.

A lock is a file `.lock.<n>` in the run's folder, created exclusively. Its holder renews its time of change. A lock
is dead when its process is gone, which only the same machine can tell, or when it was not renewed for `EXPIRY` seconds.
Whoever finds locks 0 to n-1 dead creates number n; dead ones stay, so that of two processes that find the same ones
dead only one succeeds, and the old holder, should it wake up again, sees that it was succeeded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HEARTBEAT = 20.0
"""Seconds between two renewals."""
EXPIRY = 300.0
"""Seconds after which a lock that was not renewed is dead, wherever its process is."""


class LockLost(BlockingIOError):
    """This process was taken for dead and another one does its run: it must not write any more."""


@dataclass(frozen=True)
class Holder:
    """The process behind a lock."""

    host: str
    pid: int
    since: str
    """When it locked the run, in UTC."""
    place: str = ""
    """Names the machine since its start, and the process numbers that hold there; empty if that is not known."""
    born: str = ""
    """When the process began, in the machine's ticks: its number may be used again. Empty if that is not known."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@dataclass(frozen=True)
class RunLock:
    """A run folder that is this process's."""

    path: Path

    def check(self) -> None:
        """Call before anything is written.

        Raises:
            ClaimLost: when another process has taken over.
        """
        if _numbered(self.path.parent, _number(self.path) + 1).exists():
            raise LockLost(
                f"{self.path.parent}: this process was silent for too long and another one took the run over"
            )


@contextmanager
def locked(folder: Path) -> Iterator[RunLock | None]:
    """Hold a run folder for this process; yields None when another process holds it.

    Raises:
        OSError: when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = _create(folder)
    if path is None:
        yield None
        return
    stop = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, stop), daemon=True)
    renewal.start()
    try:
        yield RunLock(path)
    finally:
        stop.set()
        renewal.join()
        if not _numbered(folder, _number(path) + 1).exists():
            path.unlink(missing_ok=True)


def holder(folder: Path) -> Holder | None:
    """The living process that holds a run folder, if any."""
    return next(_living(folder, time.time()), None)


def _create(folder: Path) -> Path | None:
    """A new lock, or None when there is a living one."""
    me = json.dumps(dataclasses.asdict(_myself()))
    number = 0
    while True:
        if next(_living(folder, _clock(folder)), None) is not None:
            return None
        path = _numbered(folder, number)
        try:
            with path.open("x", encoding="utf-8") as stream:
                stream.write(me)
        except FileExistsError:
            number += 1
            continue
        except OSError:
            path.unlink(missing_ok=True)
            raise
        # Both of two processes that took different numbers at once see the other here, and give way.
        if len(list(_living(folder, _clock(folder)))) == 1:
            return path
        path.unlink()
        return None


def _numbered(folder: Path, number: int) -> Path:
    return folder / f".lock.{number}"


def _number(path: Path) -> int:
    return int(path.suffix[1:])


def _renew(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # A file server may be away for a moment; expiry is many heartbeats.
            os.utime(path)


def _clock(folder: Path) -> float:
    """Time of the file system, which may be another machine's than ours."""
    probe = folder / f".clock.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _living(folder: Path, now: float) -> Iterator[Holder]:
    """Holders of locks that are not dead."""
    for path in folder.glob(".lock.*"):
        try:
            text, age = path.read_text(encoding="utf-8"), now - path.stat().st_mtime
        except FileNotFoundError:
            continue
        try:
            found = Holder(**json.loads(text))
        except (ValueError, TypeError):
            # Created a moment ago and not written yet, or its writer died in between.
            found = Holder("an unknown host", 0, f"{datetime.fromtimestamp(now - age, UTC):%Y-%m-%dT%H:%M:%S}")
        gone = found.place != "" and found.place == _place() and _born(found.pid) != found.born
        if age <= EXPIRY and not gone:
            yield found


def _myself() -> Holder:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return Holder(socket.gethostname(), os.getpid(), since, _place(), _born(os.getpid()))


def _place() -> str:
    """Host, its start and its numbering of processes: containers may share the first two. Linux only, else empty."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str:
    """When a process of this machine began; empty when there is none, or only its remains."""
    try:
        # The second field is the command in parentheses, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
