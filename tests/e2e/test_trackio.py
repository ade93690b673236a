"""Mirrors of runs in Trackio's database, in a process of their own: Trackio writes to one folder a process."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import SMALL

from dptune.privacy.guarantee import rounded_up

pytest.importorskip("trackio", reason="needs the extra `trackio`")

PROGRAM = """
import socket, sys
from dptune.cli import main

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        sys.exit(f"a connection to {address}")

socket.socket.connect = refuse
main(sys.argv[1:])
"""


def dptune(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A token and a server would be used if Trackio were left to itself.
    tempting = {"HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "TRACKIO_SERVER_URL": "http://127.0.0.1:1/?write_token=x"}
    command = [sys.executable, "-c", PROGRAM, *arguments, "tracking=trackio", *SMALL]
    environment = {**os.environ, **tempting, "HOME": str(cwd / "home"), "HF_HOME": str(cwd / "home")}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300)


def rows(folder: Path) -> dict[str, list[dict[str, object]]]:
    """What is there of each run, in the order of steps."""
    found: dict[str, list[dict[str, object]]] = {}
    with sqlite3.connect(folder / "outputs" / "trackio" / "dptune.db") as database:
        for name, step, text in database.execute("select run_name, step, metrics from metrics order by id"):
            found.setdefault(name, []).append({"step": step, **json.loads(text)})
    return found


def test_history_and_results_are_mirrored_below_the_output_folder_and_nowhere_else(
    model_folder: Path, tmp_path: Path
) -> None:
    arguments = [f"model.path={model_folder}", "model.name=local", "privacy=uniform"]
    done = dptune(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and "is off for this run" not in done.stderr, (
        "Trackio's greetings are not shown"
    )
    ((name, found),) = rows(tmp_path).items()
    record = json.loads((tmp_path / "outputs" / name / "record.json").read_text())
    assert [row["step"] for row in found] == [1, 2, 2] and found[0]["learning_rate"]
    assert found[-1]["metrics/accuracy"] == record["metrics"]["accuracy"]
    assert found[-1]["privacy/epsilon"] == rounded_up(record["guarantee"]["epsilon"])
    assert {row["task"] for row in found[-1]["evaluation/by_task"]["_value"]} == set(  # type: ignore[index, call-overload]
        record["metrics"]["accuracy_by_task"]
    )
    assert "NON_PRIVATE" not in json.dumps(found)
    assert {path.name for path in tmp_path.iterdir()} <= {"outputs", ".cache"}

    again = dptune(tmp_path, *arguments, "compute.force=true", "tracking.allow_private=true")
    assert again.returncode == 0, again.stderr
    ((_, found),) = rows(tmp_path).items()
    assert [row["step"] for row in found] == [1, 2, 2], "the second attempt replaces the first one"
    assert "NON_PRIVATE/seconds" in found[0]


def test_times_and_test_metrics_of_private_data_are_mirrored_only_where_allowed(
    model_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mine.jsonl"
    splits = ["train"] * 50 + ["test"] * 10
    lines = [{"instruction": "say", "input": f"message {i}", "output": "yes", "split": s} for i, s in enumerate(splits)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = [
        "data=files",
        f"data.path={path}",
        "data.declared_size=50",
        f"model.path={model_folder}",
        "model.name=local",
    ]
    done = dptune(tmp_path, *data, "hyperparameter.expected_batch_size=10")
    assert done.returncode == 0, done.stderr
    ((_, found),) = rows(tmp_path).items()
    assert "privacy/epsilon" in found[-1] and [row["step"] for row in found] == [1, 2, 2]
    assert not [key for key in found[-1] if key.startswith(("cost/", "metrics/", "tasks/", "evaluation/"))]
    allowed = ["tracking.allow_times=true", "tracking.allow_test_metrics=true", "compute.force=true"]
    done = dptune(tmp_path, *data, "hyperparameter.expected_batch_size=10", *allowed)
    assert done.returncode == 0, done.stderr
    ((_, found),) = rows(tmp_path).items()
    assert "metrics/accuracy" in found[-1] and found[-1]["cost/seconds"]
