"""The command line in processes of its own, which start quickly: each is forked from one that has imported the rest.

Such a process has its own pid, memory, signals and exit status, as one that a shell starts; what it does not do again
is to import torch, transformers and PEFT, which takes five seconds of computing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import mkstemp

FRESH = [sys.executable, "-c", "from dptune.cli import main; main()"]
"""A command that imports everything itself: for launchers whose own processes end with the interpreter only."""

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["dptune.runs.run", "dptune.cli"])


def _main(arguments: Sequence[str], cwd: str, environment: Mapping[str, str], out: str, errors: str) -> None:
    for descriptor, path in ((1, out), (2, errors)):
        opened = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["dptune", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Jobs in the background of a shell ignore Ctrl-C.

    from dptune.cli import main

    main(list(arguments))


class Started:
    """A running `dptune`, with the names of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], cwd: Path | None = None, **environment: str) -> None:
        self.args = ["dptune", *arguments]
        self._files = []
        for stream in ("stdout", "stderr"):
            descriptor, name = mkstemp(suffix=f".{stream}")
            os.close(descriptor)
            self._files.append(name)
        given = {**os.environ, **environment}
        self._process: ForkServerProcess = FORK.Process(
            target=_main, args=(list(arguments), str(cwd or Path.cwd()), given, *self._files)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget  # type: ignore[attr-defined]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and give what it said on both streams."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        out, errors = (Path(file).read_text(encoding="utf-8") for file in self._files)
        for file in self._files:
            Path(file).unlink()
        return out, errors


def dptune(
    *arguments: str, cwd: Path | None = None, timeout: float = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `dptune` to its end."""
    started = Started(arguments, cwd, **environment)
    out, errors = started.communicate(timeout)
    return subprocess.CompletedProcess(started.args, started.returncode or 0, out, errors)
