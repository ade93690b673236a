import dataclasses
import json
import math
from pathlib import Path

import pytest

from dptune.privacy.guarantee import Guarantee, Release
from dptune.records import frame
from dptune.records import record as records
from dptune.records.files import whole_folder, write_once
from dptune.records.record import Cost, GroupPrivacy, Metrics, Parameters, Privacy, RecordError, RunRecord


def metrics(accuracy: float = 0.75) -> Metrics:
    return Metrics(accuracy, {"a": accuracy}, "a", 0.0, None, 1.5, 8, 0, {"a": 8})


def record(run_id: str = "abc", **changes: object) -> RunRecord:
    base = {
        "run_id": run_id,
        "status": "done",
        "config": {"environment": {"seed": 0}},
        "metrics": metrics(),
        "zero_shot": metrics(0.25),
        "privacy": Privacy(True, "example", 8.0, 1e-5, groups={"all": GroupPrivacy(10, 1.0)}),
        "guarantee": Guarantee("adapter", True, 7.9, 1e-5, "example", training=(Release(1.0, 0.1, 3),)),
        "parameters": Parameters(1000, 10),
        "cost": Cost(1.0, 0.5, 100.0, 300.0, "cpu"),
    }
    return RunRecord(**{**base, **changes})  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = record()
    written.write(tmp_path / "abc")
    assert records.read(tmp_path / "abc") == written
    assert json.loads((tmp_path / "abc" / "record.json").read_text())["parameters"]["fraction"] == 0.01


def test_a_record_of_a_run_that_just_began_is_read(tmp_path: Path) -> None:
    begun = RunRecord(run_id="x", status="running", config={})
    begun.write(tmp_path / "x")
    found = records.read(tmp_path / "x")
    assert found is not None and found.guarantee is not None and found.guarantee.released == "unknown"
    assert dataclasses.replace(found, guarantee=None) == begun


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    record(privacy=Privacy(False, plan={"max_grad_norm": math.inf}), guarantee=Guarantee("adapter", False)).write(
        tmp_path / "abc"
    )
    text = (tmp_path / "abc" / "record.json").read_text()
    assert "Infinity" not in text and json.loads(text)["privacy"]["plan"] == {"max_grad_norm": None}


def test_writing_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record().write(tmp_path)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(records.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        record(status="failed").write(tmp_path)
    found = records.read(tmp_path)
    assert found is not None and found.status == "done"
    assert [item.name for item in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a run record"),
        ('{"schema_version": 99}', "schema version 99"),
    ],
)
def test_a_corrupt_record_is_named_and_left_out(tmp_path: Path, text: str, message: str) -> None:
    record().write(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_text(text)
    with pytest.raises(RecordError, match=message):
        records.read(tmp_path / "bad")
    with pytest.warns(UserWarning, match="left out .*bad"):
        assert [item.run_id for item in frame.read_all(tmp_path)] == ["abc"]


def test_records_become_a_table() -> None:
    made = frame.to_frame([record("a"), record("b")])
    assert made["run_id"].tolist() == ["a", "b"]
    assert made["metrics.accuracy"].tolist() == [0.75, 0.75]
    assert made["config.environment.seed"].tolist() == [0, 0]


def test_records_of_different_shapes_share_a_table() -> None:
    failed = record("b", status="failed", metrics=None, config={"environment": {"seed": 1}, "method": "x"})
    odd = record("c", config={"environment": 7, "method": None})
    made = frame.to_frame([record("a"), failed, odd])
    assert made["metrics.accuracy"].isna().tolist() == [False, True, False]
    assert made["metrics.accuracy_by_task.a"].dropna().tolist() == [0.75, 0.75]
    assert made["config.environment.seed"].dropna().tolist() == [0, 1]
    assert made["config.environment"].dropna().tolist() == [7]
    assert made["config.method"].dropna().tolist() == ["x"]
    assert made["parameters.fraction"].tolist() == [0.01] * 3
    assert made["privacy.groups"][0] == {"all": GroupPrivacy(10, 1.0)}


def test_a_folder_appears_whole_and_never_over_another(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with whole_folder(folder) as draft:
        (draft / "a").write_text("1")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["a"]
    with pytest.raises(OSError), whole_folder(folder) as draft:
        (draft / "b").write_text("2")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "other", within=tmp_path) as draft:
        (draft / "c").write_text(str(1 / 0))
    assert [path.name for path in tmp_path.iterdir()] == ["made"] and (folder / "a").read_text() == "1"


def test_of_two_that_create_a_file_the_first_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    assert write_once(path, b"first") and not write_once(path, b"second")
    assert path.read_bytes() == b"first" and path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
