"""Claims: one holder at a time, whatever happens to it."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dptune.records import lock as lease
from dptune.records.lock import LockLost, holder, locked

HOLD = """
import sys, time
from pathlib import Path
from dptune.records.lock import locked
with locked(Path(sys.argv[1])) as lock:
    print("held" if lock else "refused", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def written_elsewhere(folder: Path, age: float) -> Path:
    """A lock of another machine, renewed some seconds ago."""
    path = folder / ".lock.0"
    path.write_text(json.dumps(dataclasses.asdict(lease.Holder("elsewhere", 1, "2026-01-01", "elsewhere x", "7"))))
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))
    return path


def test_a_lock_excludes_others_until_it_ends(tmp_path: Path) -> None:
    with locked(tmp_path) as mine:
        assert mine is not None
        mine.check()
        with locked(tmp_path) as second:
            assert second is None
        found = holder(tmp_path)
        assert found is not None and (found.host, found.pid) == (socket.gethostname(), os.getpid())
        assert f"process {os.getpid()} on " in str(found)
    assert holder(tmp_path) is None and not list(tmp_path.iterdir())
    with locked(tmp_path) as again:
        assert again is not None


def test_another_process_is_excluded_until_it_is_killed(tmp_path: Path) -> None:
    other = hold(tmp_path)
    with locked(tmp_path) as mine:
        assert mine is None
    found = holder(tmp_path)
    assert found is not None and found.pid == other.pid
    other.kill()
    # Its remains are still there: nobody has waited for it.
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert holder(tmp_path) is None
    with locked(tmp_path) as mine:
        assert mine is not None and mine.path.name == ".lock.1"
    other.communicate()


@pytest.mark.parametrize(("age", "free"), [(lease.EXPIRY - 60, False), (lease.EXPIRY + 60, True)])
def test_a_lock_of_another_machine_ends_when_it_is_not_renewed(tmp_path: Path, age: float, free: bool) -> None:
    written_elsewhere(tmp_path, age)
    assert (holder(tmp_path) is None) is free
    with locked(tmp_path) as mine:
        assert (mine is not None) is free


def test_a_process_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    with locked(tmp_path) as mine:
        assert mine is not None
        mine.path.write_text(json.dumps({**json.loads(mine.path.read_text()), "born": "1"}))
        with locked(tmp_path) as second:
            assert second is not None


def test_a_lock_that_is_being_written_counts(tmp_path: Path) -> None:
    (tmp_path / ".lock.0").touch()
    with locked(tmp_path) as mine:
        assert mine is None


def test_who_was_taken_for_dead_must_not_write_and_leaves_the_new_lock_alone(tmp_path: Path) -> None:
    with locked(tmp_path) as old:
        assert old is not None
        os.utime(old.path, (1, 1))
        with locked(tmp_path) as new:
            assert new is not None
            new.check()
            with pytest.raises(LockLost, match="took the run over"):
                old.check()
    with locked(tmp_path) as third:
        assert third is not None


def test_a_stopped_process_is_found_dead_after_a_while_only(tmp_path: Path) -> None:
    other = hold(tmp_path)
    try:
        other.send_signal(signal.SIGSTOP)
        assert holder(tmp_path) is not None
        os.utime(tmp_path / ".lock.0", (1, 1))
        assert holder(tmp_path) is None
    finally:
        other.kill()
        other.communicate()


def test_locks_are_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.02)
    with locked(tmp_path) as mine:
        assert mine is not None
        os.utime(mine.path, (1, 1))
        limit = time.monotonic() + 10
        while mine.path.stat().st_mtime == 1 and time.monotonic() < limit:
            time.sleep(0.02)
        assert mine.path.stat().st_mtime > 1


def test_of_many_processes_one_gets_a_run(tmp_path: Path) -> None:
    """All start at a dead lock at the same moment; the winner holds on until all have tried."""
    written_elsewhere(tmp_path, lease.EXPIRY + 60)
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom dptune.records.lock import locked\n"
        "folder = Path(sys.argv[1])\nPath(sys.argv[2]).touch()\n"
        "while not (folder / 'go').exists():\n    pass\n"
        "with locked(folder) as lock:\n    print('held' if lock else 'refused', flush=True)\n    sys.stdin.read()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(tmp_path / f"ready{n}")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(6)
    ]
    while len(list(tmp_path.glob("ready*"))) < 6:
        pass
    (tmp_path / "go").touch()
    answers = [process.stdout.readline().strip() for process in processes if process.stdout]
    for process in processes:
        process.communicate()
    assert sorted(answers) == ["held"] + ["refused"] * 5
