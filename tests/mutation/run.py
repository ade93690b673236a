"""Plants faults one at a time and says whether a named test sees each: `make mutate`.

    python tests/mutation/run.py [--only WORD] [--jobs N]

Each fault of `faults.py` is put into a copy of `src`, and only the tests that are named beside it are run on that copy,
in a process of their own. Before that, all of them are run on a copy without a fault, where they must pass: a test that
is red anyway sees nothing. The status is 1 if a fault survived, if its place is gone, or if it broke the import instead
of a test.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dptune"
LIMIT_S = 300
"""A fault whose tests take longer has not been seen: no test said so."""
PASSED, FAILED = 0, 1
"""Exit statuses of pytest; all others mean that it ran no test."""
HEAVY = (
    *("pytest", "hypothesis.strategies", "scipy.stats", "scipy.optimize", "pandas", "torch", "hydra", "omegaconf"),
    *("transformers.models.llama.modeling_llama", "peft", "dp_accounting.pld.privacy_loss_distribution"),
)
"""What the tests import and no fault changes: loaded once, and each fault's process is a fork of the one that did."""


def planted(text: str, fault: Fault) -> str:
    """The text of a file with the fault in it.

    Raises:
        ValueError: when its place is gone, or is not the only one.
    """
    if (found := text.count(fault.old)) != 1:
        raise ValueError(f"its place is found {found} times in {fault.file}")
    return text.replace(fault.old, fault.new)


class Run:
    """Tests on a copy of the package, in a process of their own."""

    def __init__(self, tests: Sequence[str], fault: Fault | None = None) -> None:
        """Make the copy, plant the fault and start.

        Raises:
            ValueError: when the fault cannot be planted.
        """
        self.fault, self.begin = fault, time.perf_counter()
        self._folder = tempfile.TemporaryDirectory(prefix="dptune-fault-")
        folder = Path(self._folder.name)
        shutil.copytree(ROOT / "src", folder / "src")
        for beside in ("conf", "sweeps"):  # which the package looks for beside itself
            (folder / beside).symlink_to(ROOT / beside)
        self._said = folder / "said"
        if fault is not None:
            place = folder / "src" / "dptune" / fault.file
            place.write_text(planted(place.read_text(encoding="utf-8"), fault), encoding="utf-8")
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            status = 70
            try:
                status = self._test(folder, tests)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)

    def _test(self, folder: Path, tests: Sequence[str]) -> int:
        handle = os.open(self._said, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        signal.alarm(LIMIT_S)
        os.chdir(ROOT)
        # Processes beside each other must not share pytest's folders.
        os.environ.update(PYTHONPATH=str(folder / "src"), TMPDIR=str(folder), OMP_NUM_THREADS="1")
        tempfile.tempdir = None
        sys.path.insert(0, str(folder / "src"))

        import pytest

        import dptune

        assert Path(dptune.__file__).is_relative_to(folder), f"{dptune.__file__} is not the copy"
        # A test that was rewritten for better messages takes longer to load than to run.
        options = ("-x", "-q", "--tb=line", "--assert=plain", "-o", "timeout=0")
        without = ("-p", "no:cacheprovider", "-p", "no:xdist")
        return int(pytest.main([*options, *without, *(f"tests/{test}" for test in tests)]))

    def ended(self, status: int) -> tuple[str, float]:
        """What became of it, as status and last line of pytest say, and the seconds that it took."""
        self.said = said = (
            self._said.read_text(encoding="utf-8", errors="replace").strip() if self._said.exists() else ""
        )
        self._folder.cleanup()
        seconds = time.perf_counter() - self.begin
        code = os.waitstatus_to_exitcode(status)
        if code == FAILED:
            return "caught", seconds
        if code == PASSED:
            return "SURVIVED", seconds
        return f"NO TEST: {'out of time' if code == -signal.SIGALRM else said[-300:]}", seconds


def main() -> int:
    """Plant the faults and print the table."""
    parser = argparse.ArgumentParser(description="Plants faults one at a time; each must turn a named test red.")
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose name or file has this in it")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    given = parser.parse_args()
    waiting = [fault for fault in FAULTS if given.only in fault.name or given.only in fault.file]
    if not waiting:
        print(f"no fault has {given.only!r} in its name or file")
        return 1
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    for module in HEAVY:
        importlib.import_module(module)
    assert "dptune" not in sys.modules

    tests = sorted({test for fault in waiting for test in fault.tests})
    print(f"{len(tests)} tests of {len(waiting)} faults, where there is no fault", flush=True)
    whole = Run(tests)
    end, seconds = whole.ended(os.waitpid(whole.process, 0)[1])
    if end != "SURVIVED":
        print(whole.said[-3000:], "without a fault they must pass: mend them first", sep="\n")
        return 1
    print(f"they pass, in {seconds:.0f} s", flush=True)

    begin, count, missed = time.perf_counter(), len(waiting), list[str]()
    running: dict[int, Run] = {}

    def tell(fault: Fault, end: str, seconds: float) -> None:
        done = count - len(waiting) - len(running)
        left = (time.perf_counter() - begin) / done * (count - done) / 60
        line = f"{end:9}{seconds:6.1f} s  {fault.name} ({fault.file})  {', '.join(fault.tests)}"
        print(f"{done:3}/{count}  {line}  {left:.0f} min left", flush=True)
        if end != "caught":
            missed.append(line)

    while waiting or running:
        while waiting and len(running) < given.jobs:
            fault = waiting.pop(0)
            try:
                started = Run(fault.tests, fault)
                running[started.process] = started
            except (OSError, ValueError) as error:
                tell(fault, f"GONE: {error}", 0.0)
        if running:
            process, status = os.wait()
            over = running.pop(process)
            assert over.fault is not None
            tell(over.fault, *over.ended(status))
    print(
        f"{count - len(missed)} of {count} faults were caught in {time.perf_counter() - begin:.0f} s", *missed, sep="\n"
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
