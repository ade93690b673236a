"""What `dptune status` says of runs in every state, and how long it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dptune.records.code import code_version
from dptune.records.lock import locked
from dptune.records.record import RecordError, RunRecord, run_state, run_states
from dptune.sweeps import status
from dptune.sweeps.expand import jobs_of_sweep

ARGUMENTS = ["environment.seed=0,1,2", "privacy=none"]


def write(folder: Path, state: str, **changes: object) -> Path:
    provenance = {"git": "x", "code": changes.pop("code", code_version()), "seed": 0}
    fields = {"config": {"a": {"code": "no"}}, "provenance": provenance, **changes}
    RunRecord(folder.name, state, **fields).write(folder)  # type: ignore[arg-type]
    return folder


def test_every_state_of_a_sweep_is_told_apart(tmp_path: Path) -> None:
    jobs = jobs_of_sweep("smoke", ["environment.seed=range(6)", "privacy=none", f"compute.output_root={tmp_path}"])
    done, stale, running, killed, failed, missing = (tmp_path / job.run_id for job in jobs)
    write(done, "done")
    write(stale, "done", code="older")
    write(running, "running")
    write(killed, "running")
    write(failed, "failed", error='ValueError: "too", much', code="older")
    with locked(running):
        text = status.of_sweep("smoke", jobs, ["environment.seed=range(6)"])
    lines = text.splitlines()
    assert lines[0] == "Sweep smoke: 6 runs: 1 done, 1 stale, 1 running, 1 interrupted, 1 failed, 1 missing"
    assert [line.split()[:3] for line in lines[1:6]] == [
        ["stale", stale.name, "seed=1"],
        ["running", running.name, "seed=2"],
        ["interrupted", killed.name, "seed=3"],
        ["failed", failed.name, "seed=4"],
        ["missing", missing.name, "seed=5"],
    ]
    assert f"by code older, this is {code_version()}" in lines[1]
    assert f"process {os.getpid()} on " in lines[2]
    assert f'ValueError: "too", much; its log is {failed / "run.log"}' in lines[4]
    assert lines[6:] == [
        "To do the 3 that are not done: dptune -m sweeps=smoke 'environment.seed=range(6)'",
        "To do all again with this code: dptune -m sweeps=smoke 'environment.seed=range(6)' compute.force=true",
    ]


def test_a_sweep_that_is_done_needs_nothing(tmp_path: Path) -> None:
    jobs = jobs_of_sweep("smoke", [*ARGUMENTS, f"compute.output_root={tmp_path}"])
    for job in jobs:
        write(tmp_path / job.run_id, "done")
    assert status.of_sweep("smoke", jobs, ARGUMENTS) == "Sweep smoke: 3 runs: 3 done"


def test_a_folder_is_shown_sweep_by_sweep(tmp_path: Path) -> None:
    assert status.of_folder(tmp_path / "nothing") == f"no runs in {tmp_path / 'nothing'}"
    write(tmp_path / "a", "done", sweep="one")
    write(tmp_path / "b", "failed", sweep="one", error="no")
    write(tmp_path / "c", "running")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "record.json").write_text("{")
    lines = status.of_folder(tmp_path).splitlines()
    assert lines[0] == "Without a sweep: 2 runs: 1 interrupted, 1 failed"
    assert lines[1].split() == ["interrupted", "c"] and "not readable as JSON" in lines[2]
    assert lines[3] == "Sweep one: 2 runs: 1 done, 1 failed"
    assert lines[5] == "To do the 1 that is not done: dptune -m sweeps=one"


@pytest.mark.parametrize("text", ['a "quoted", name\nof two lines', "null", ' "error": 3,'])
def test_a_summary_is_what_the_record_says(tmp_path: Path, text: str) -> None:
    write(tmp_path / "a", "failed", error=text, sweep=text)
    fast = run_state(tmp_path / "a")
    path = tmp_path / "a" / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    assert run_state(tmp_path / "a") == fast
    assert fast is not None and (fast.status, fast.error, fast.sweep, fast.code) == (
        "failed",
        text,
        text,
        code_version(),
    )
    assert run_state(tmp_path / "b") is None
    path.write_text("[]")
    (found,) = run_states(tmp_path)
    assert isinstance(found, RecordError) and found.folder == tmp_path / "a"


def test_ten_thousand_records_take_a_second_of_computing(tmp_path: Path) -> None:
    write(tmp_path / "outputs" / "0", "done", config={"x": {str(key): "value" * 4 for key in range(200)}})
    content = (tmp_path / "outputs" / "0" / "record.json").read_bytes()
    assert len(content) > 5_000
    for number in range(1, 10_000):
        folder = tmp_path / "outputs" / str(number)
        folder.mkdir()
        (folder / "record.json").write_bytes(content)
    before = sum(os.times()[2:4])
    command = [sys.executable, "-c", "from dptune.cli import main; main()", "status"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "Without a sweep: 10000 runs: 10000 done\n", done.stderr
    # Time of the child alone: others may use the machine meanwhile.
    assert sum(os.times()[2:4]) - before < 1.0
