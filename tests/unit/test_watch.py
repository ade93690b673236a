"""A sweep as it is seen from the folders of its runs."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from dptune.config.schema import Config
from dptune.privacy.guarantee import Guarantee
from dptune.records.lock import locked
from dptune.records.record import Metrics, Privacy, RunRecord
from dptune.runs import watch
from dptune.runs.watch import Watch, look_on
from dptune.sweeps.jobs import Job

FAILED = "ValueError: no"


def job(root: Path, name: str, *varied: str) -> Job:
    config = Config()
    config = replace(config, compute=replace(config.compute, output_root=str(root)))
    return Job(name, config, (), varied)


def write(root: Path, name: str, state: str, epsilon: float | None = None) -> None:
    metrics = Metrics(0.5, {"a": 0.5}, "a", 0.0, None, 2.0, 10, None, {"a": 10})
    private, delta = epsilon is not None, epsilon and 1e-5
    privacy = Privacy(private, target_epsilon=epsilon and 8.0, delta=delta)
    guarantee = Guarantee("adapter", private, epsilon, delta, "example")
    record = RunRecord(name, state, {}, metrics=metrics, privacy=privacy, guarantee=guarantee)  # type: ignore[arg-type]
    if state == "failed":
        record.error = FAILED
    record.write(root / name)


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    settings = [("environment.seed=2", "privacy.target_epsilon=1"), ("privacy=none",), ("hyperparameter.rank=16",)]
    return [job(tmp_path, name, *varied) for name, varied in zip("abc", settings, strict=True)]


def test_a_setting_is_said_in_words_with_the_seed_at_the_end(jobs: list[Job]) -> None:
    assert [job.setting for job in jobs] == ["target_epsilon=1, seed=2", "privacy=none", "rank=16"]


def test_each_run_is_a_line_when_its_record_appears(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("dptune.runs.watch.time.monotonic", lambda: now[0])
    seen = Watch(jobs, total=10, workers=1)
    seen.look()
    write(tmp_path, "a", "running")
    seen.look()
    assert capsys.readouterr() == ("", "")
    now[0] = 100.0
    write(tmp_path, "a", "done", epsilon=7.9981)
    seen.look()
    seen.look()
    # Epsilon is rounded up. Two runs are left, each like the first.
    line = "[ 8/10]  target_epsilon=1, seed=2  accuracy 0.500  epsilon 7.999/8  3 min left\n"
    assert capsys.readouterr() == (line, "")
    write(tmp_path, "b", "failed")
    seen.look()
    log = tmp_path / "b" / "run.log"
    line = f"[ 8/10]  privacy=none              failed: {FAILED}; its log is {log}  50 s left\n"
    assert capsys.readouterr() == ("", line)
    write(tmp_path, "c", "done")
    seen.look()
    line = "[ 9/10]  rank=16                   accuracy 0.500  non-private\n"
    assert capsys.readouterr() == (line, "") and not seen.open and seen.failed == 1


def test_what_an_earlier_attempt_left_is_no_news(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a", "failed")
    write(tmp_path, "b", "done")  # It is forced to be done again.
    seen = Watch(jobs, total=3, workers=1)
    seen.look()
    assert capsys.readouterr() == ("", "")
    write(tmp_path, "a", "failed")
    write(tmp_path, "b", "done")
    seen.look()
    out, errors = capsys.readouterr()
    assert out.startswith("[1/3]  privacy=none") and FAILED in errors


def test_a_failure_without_a_record_is_said_once(jobs: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    seen = Watch(jobs, total=3, workers=1)
    seen.fail(jobs[0], "no memory")
    seen.fail(jobs[0], "no memory")
    assert capsys.readouterr().err.count("failed: no memory") == 1 == seen.failed


def test_a_record_that_cannot_be_read_is_a_failure(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = Watch(jobs, total=3, workers=1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "record.json").write_text("{")
    seen.look()
    assert "failed: " in (errors := capsys.readouterr().err) and "not readable as JSON" in errors


def test_the_last_runs_are_said_before_the_end_and_no_thread_stays(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = threading.active_count()
    with Watch(jobs, total=3, workers=1):
        for name in "abc":
            write(tmp_path, name, "done", epsilon=1.0)
    assert capsys.readouterr().out.count("accuracy") == 3 and threading.active_count() == before
    with pytest.raises(KeyboardInterrupt), Watch(jobs, total=3, workers=1):
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_a_watcher_sees_runs_of_others_to_their_end(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a", "done", epsilon=1.0)
    words: list[str] = []
    monkeypatch.setattr(watch, "EVERY", 0.01)
    monkeypatch.setattr("dptune.runs.watch.Display.show", lambda self, done, text: words.append(text))

    def others() -> None:
        with locked(tmp_path / "b"):
            write(tmp_path, "b", "running")
            (tmp_path / "b" / "history.jsonl").write_text(
                json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2}) + "\n"
            )
            while not any("step 2/" in text for text in words):
                threading.Event().wait(0.01)
        for name in "bc":
            write(tmp_path, name, "done", epsilon=1.0)

    other = threading.Thread(target=others)
    other.start()
    look_on(jobs, 0.01)
    other.join()
    out = capsys.readouterr().out
    assert [line[:5] for line in out.splitlines()] == ["[2/3]", "[3/3]"]
    steps = jobs[1].config.hyperparameter.steps
    assert any(text.startswith(f"1 running (step 2/{steps})") for text in words)


def test_a_sweep_that_is_done_is_not_watched(
    jobs: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "abc":
        write(tmp_path, name, "done", epsilon=1.0)
    look_on(jobs, 3600)
    assert capsys.readouterr() == ("", "")
