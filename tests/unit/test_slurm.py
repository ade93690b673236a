"""Clusters with and without accounting, by a `sacct` of our own."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("submitit", reason="needs the extra `slurm`")

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from dptune.sweeps.slurm import be_quiet_without_accounting

NO_ACCOUNTING = "echo 'Slurm accounting storage is disabled' >&2; exit 1"
ACCOUNTING = "echo 'JobID|State|NodeList'; echo '7_0|RUNNING|node1'"


@pytest.fixture(autouse=True)
def watcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does to submitit is undone."""
    monkeypatch.setattr(SlurmJob, "watcher", SlurmInfoWatcher(delay_s=0))
    yield


def command(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `sacct` that is found first and counts how often it is asked."""
    asked = folder / "asked"
    (folder / "sacct").write_text(f"#!/bin/sh\necho x >> {asked}\n{body}\n")
    (folder / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return asked


def look_ten_times(folder: Path) -> list[str]:
    job: SlurmJob[None] = SlurmJob(folder, "7_0")
    for _ in range(10):
        job.watcher.update()
    return [job.state, str(job.done())]


def test_without_accounting_one_line_is_said_and_nobody_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked = command(tmp_path, NO_ACCOUNTING, monkeypatch)
    said: list[str] = []
    be_quiet_without_accounting(said.append)
    assert look_ten_times(tmp_path) == ["UNKNOWN", "False"]
    assert len(said) == 1 and "keeps no accounting (sacct fails)" in said[0]
    assert asked.read_text() == "x\n" and capfd.readouterr() == ("", "") and not caplog.records
    # The rest of what submitit has to say is heard.
    logging.getLogger("submitit").warning("something else")
    assert "something else" in caplog.text or "something else" in capfd.readouterr().err


def test_with_accounting_submitit_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = command(tmp_path, ACCOUNTING, monkeypatch)
    said: list[str] = []
    be_quiet_without_accounting(said.append)
    assert look_ten_times(tmp_path) == ["RUNNING", "False"]
    assert not said and len(asked.read_text().split()) > 10
