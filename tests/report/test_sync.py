"""Records are uploaded once, as what tracking would have shown of them, and nothing else leaves."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report.planted import config, plant

from dptune.cli import main
from dptune.config.schema import Config, TrackingConfig
from dptune.records import mirror as tracking
from dptune.records.record import Privacy, RunRecord
from dptune.report.results import history


class FakeRun:
    """What W&B would hold of one run."""

    def __init__(self, wandb: "FakeWandb", **given: Any) -> None:
        self.wandb, self.given = wandb, given
        self.step = wandb.steps.get(given["id"], 0)
        self.rows: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.tags: list[str] = []
        self.exit_code: int | None = None

    def log(self, values: dict[str, Any], step: int = 0) -> None:
        if self.given["id"] in self.wandb.broken:
            raise OSError("connection\nlost")
        self.rows.setdefault(step, {}).update(values)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code

    @property
    def shown(self) -> dict[str, Any]:
        named = {key: value for key, value in self.given.items() if key not in ("dir", "mode", "resume", "settings")}
        return named | {"rows": self.rows, "summary": self.summary, "artifacts": self.artifacts, "tags": self.tags}


class FakeWandb:
    """The part of the `wandb` module that is used."""

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.broken: set[str] = set()
        self.steps: dict[str, int] = {}

    def init(self, **given: Any) -> FakeRun:
        self.runs.append(FakeRun(self, **given))
        return self.runs[-1]

    @staticmethod
    def Settings(**_: Any) -> None: ...

    @staticmethod
    def Table(columns: list[str], data: list[list[Any]]) -> Any:
        return {"columns": columns, "data": data}

    class Artifact(SimpleNamespace):
        def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
            super().__init__(name=name, type=type, metadata=metadata, files=[])

        def add_file(self, path: str) -> None:
            self.files.append(Path(path).name)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    """W&B as it would answer somebody with an account."""
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    return fake


@pytest.fixture
def records(tmp_path: Path) -> list[RunRecord]:
    """Three finished runs of one sweep, with adapters."""
    made = [plant(tmp_path, config("uniform", seed), 0.5, 0.75) for seed in range(3)]
    for record in made:
        adapter = tmp_path / record.run_id / "adapter"
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    return made


def sync(root: Path, *arguments: str) -> int:
    """The exit status of `dptune sync`."""
    try:
        main(["sync", f"compute.output_root={root}", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_every_finished_record_becomes_one_run_once(wandb: FakeWandb, records: list[RunRecord], tmp_path: Path) -> None:
    failed = RunRecord("0" * 12, "failed", records[0].config, "planted", error="x")
    failed.write(tmp_path / failed.run_id)
    assert sync(tmp_path) == 0
    assert len(wandb.runs) == 4  # Three finished runs and the table of their sweep; nothing of the failed one.
    run = next(run for run in wandb.runs if run.given["id"] == records[0].run_id)
    assert run.given["group"] == "planted" and run.given["job_type"] == "lora + uniform" and run.exit_code == 0
    assert run.given["resume"] == "allow" and run.given["mode"] == "online"
    assert run.given["config"]["environment"]["seed"] == 0 and run.given["config"]["provenance"]["data"] == "d0"
    assert sorted(run.rows) == [row["step"] for row in history(tmp_path / records[0].run_id)]
    assert not any("NON_PRIVATE" in key for row in run.rows.values() for key in row)
    assert run.rows[max(run.rows)]["evaluation/by_task"]["data"] == [["a", 0.5, 0.25, 40], ["b", 0.75, 0.25, 20]]
    assert run.summary["metrics/accuracy"] == 0.625 and run.summary["tasks/b"] == 0.75
    assert run.summary["cost/seconds"] == 3.0 and run.summary["parameters/fraction"] == 0.025
    assert set(run.tags) == {
        *("model=tiny", "adapter=lora", "data=supportdesk", "privacy=uniform"),
        *("reproducible-noise", "stand-in-data"),
    }
    (artifact,) = run.artifacts
    assert artifact.type == "adapter" and artifact.files == ["adapter_model.safetensors"]
    assert artifact.metadata["epsilon"] == 8 and artifact.metadata["delta"] == 1e-5
    assert len(artifact.metadata["record"]) == 64
    assert sync(tmp_path) == 0
    assert len(wandb.runs) == 4


def test_the_table_of_a_sweep_is_a_run_of_its_own(wandb: FakeWandb, records: list[RunRecord], tmp_path: Path) -> None:
    sync(tmp_path)
    (report,) = (run for run in wandb.runs if run.given["job_type"] == "report")
    assert report.given["id"] == "report-planted" and report.given["group"] == "planted"
    table = report.rows[0]["tables/main"]
    assert "ε spent/target ↓" in table["columns"] and len(table["data"]) == 2  # floor and setting
    assert "accounted, not realised" in report.given["notes"]
    plant(tmp_path, config("uniform", 7), 0.5, 0.5)
    sync(tmp_path)
    assert sum(run.given["job_type"] == "report" for run in wandb.runs) == 2 and len(wandb.runs) == 6


def test_tracking_and_upload_show_the_same(wandb: FakeWandb, records: list[RunRecord], tmp_path: Path) -> None:
    folder = tmp_path / records[0].run_id
    live = tracking.WandbTracker(TrackingConfig("wandb_offline"), records[0], folder)
    for row in history(folder):
        live.step(row)
    live.finish(records[0])
    sync(tmp_path)
    later = next(run for run in wandb.runs[1:] if run.given["id"] == records[0].run_id)
    assert wandb.runs[0].shown == later.shown


def test_what_a_run_tracked_before_is_not_logged_twice(
    wandb: FakeWandb, records: list[RunRecord], tmp_path: Path
) -> None:
    wandb.steps = {records[0].run_id: 3, records[1].run_id: 5}
    sync(tmp_path)
    rows = {run.given["id"]: sorted(run.rows) for run in wandb.runs}
    assert (
        rows[records[0].run_id] == [3, 4] and rows[records[1].run_id] == [] and rows[records[2].run_id] == [1, 2, 3, 4]
    )


def test_a_record_that_changed_overwrites_what_was_uploaded(
    wandb: FakeWandb, records: list[RunRecord], tmp_path: Path
) -> None:
    sync(tmp_path)
    done = len(wandb.runs)
    plant(tmp_path, config("uniform", 1), 0.25, 0.25)
    sync(tmp_path, "environment.seed=1")
    again = {run.given["id"]: run.given["resume"] for run in wandb.runs[done:]}
    assert again == {records[1].run_id: None}  # Alone: a table of chosen runs is not that of the sweep.
    sync(tmp_path)
    assert [run.given["id"] for run in wandb.runs[done + 1 :]] == ["report-planted"]


def test_one_failure_does_not_stop_the_others(
    wandb: FakeWandb, records: list[RunRecord], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.broken = {records[1].run_id}
    assert sync(tmp_path) == 1
    said = capsys.readouterr()
    assert f"{records[1].run_id} was not uploaded: connection lost" in said.err and "1 not uploaded" in said.err
    assert "3 uploaded, 0 there already" in said.out
    assert [run.exit_code for run in wandb.runs if run.given["id"] == records[1].run_id] == [1]
    wandb.broken = set()
    assert sync(tmp_path) == 0
    assert "1 uploaded, 3 there already" in capsys.readouterr().out


def test_another_destination_gets_the_runs_too(wandb: FakeWandb, records: list[RunRecord], tmp_path: Path) -> None:
    sync(tmp_path)
    sync(tmp_path, "tracking.project=other", "tracking.entity=team", "tracking.upload_adapters=false")
    assert len(wandb.runs) == 8
    assert {(run.given["entity"], run.given["project"]) for run in wandb.runs[4:]} == {("team", "other")}
    assert not any(run.artifacts for run in wandb.runs[4:])


@pytest.mark.parametrize(
    ("privacy", "allowed"),
    [
        ({"private": True, "noise_mode": "secure"}, True),
        ({"private": True, "noise_mode": "reproducible"}, False),
        ({"private": False}, False),
        ({"private": True, "noise_mode": "reproducible", "stand_in": True}, True),
        ({"private": False, "stand_in": True}, True),
    ],
)
def test_an_adapter_leaves_only_with_a_guarantee_or_from_public_data(privacy: dict[str, Any], allowed: bool) -> None:
    record = RunRecord("a", "done", dataclasses.asdict(Config()), privacy=Privacy(**privacy))
    assert tracking.releasable(record) is allowed


@pytest.mark.parametrize(
    ("data", "protected"),
    [
        ({}, False),
        ({"public": False}, True),
        ({"name": "mine", "path": "x.jsonl"}, True),
        ({"name": "mine", "path": "x.jsonl", "public": True}, True),
        ({"name": "mine", "hub_id": "somebody/records", "public": True}, False),
        ({"name": "mine", "hub_id": "somebody/records"}, True),
        ({"name": "dolly", "hub_id": "somebody/records", "path": "mine.jsonl", "public": True}, True),
    ],
)
def test_data_is_protected_before_its_privacy_is_known_and_after(data: dict[str, Any], protected: bool) -> None:
    content = dataclasses.asdict(Config())
    record = RunRecord("a", "running", {**content, "data": {**content["data"], **data}})
    assert tracking.is_protected(record) is protected
    record.privacy = Privacy(True, stand_in=True)
    assert tracking.is_protected(record) is protected
    record.privacy = Privacy(True, stand_in=False)
    assert tracking.is_protected(record)
    assert tracking.is_protected(RunRecord("a", "done", {}, privacy=Privacy(True, stand_in=True)))


def private_record(root: Path) -> RunRecord:
    """As a run on private data leaves it."""
    record = plant(root, config("uniform", 0), 0.5, 0.75, stand_in=False, not_covered=["the 60 test records"])
    record.cost = None
    record.write(root / record.run_id)
    cost = {"seconds": 3.25, "examples_per_second": 17.0, "peak_memory_mb": 301.0}
    (root / record.run_id / "NON_PRIVATE_cost.json").write_text(json.dumps(cost))
    adapter = root / record.run_id / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    lines = (root / record.run_id / "history.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "NON_PRIVATE/seconds": 0.5} for line in lines]
    (root / record.run_id / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return record


LEAVES = {
    "allow_private": "NON_PRIVATE/loss",
    "allow_times": "cost/seconds",
    "allow_test_metrics": "metrics/accuracy",
    "allow_adapters": "adapter",
}


@pytest.mark.parametrize("given", [None, *LEAVES])
def test_of_private_data_each_thing_leaves_by_its_own_key_alone(
    wandb: FakeWandb, tmp_path: Path, given: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    record = private_record(tmp_path)
    assert sync(tmp_path, *([f"tracking.{given}=true"] if given else [])) == 0
    (run,) = (run for run in wandb.runs if run.given["id"] == record.run_id)
    shown = {*run.summary, *(key for row in run.rows.values() for key in row), *(item.type for item in run.artifacts)}
    assert {key for key in LEAVES.values() if key in shown} == ({LEAVES[given]} if given else set())
    metrics = {key for key in shown if key.startswith(("metrics/", "zero_shot/", "tasks/", "evaluation/"))}
    assert bool(metrics) is (given == "allow_test_metrics")
    assert ("cost/peak_memory_mb" in shown) is (given == "allow_times") and "NON_PRIVATE/seconds" not in shown
    assert (run.given["config"]["provenance"]["started"] == "2026-01-01T10:20:30") is (given == "allow_times")
    assert run.summary["privacy/epsilon"] == 8 and run.summary["privacy/not_covered"] == "the 60 test records"
    tables = [run for run in wandb.runs if run.given["job_type"] == "report"]
    assert bool(tables) is (given == "allow_test_metrics")
    assert ("the table of planted stays here" in capsys.readouterr().err) is (given != "allow_test_metrics")


def test_a_hash_of_exact_metrics_stays_with_them(wandb: FakeWandb, tmp_path: Path) -> None:
    private_record(tmp_path)
    sync(tmp_path, "tracking.allow_adapters=true")
    sync(tmp_path, "tracking.allow_adapters=true", "tracking.allow_test_metrics=true")
    metadata = [artifact.metadata for run in wandb.runs for artifact in run.artifacts]
    assert ["record" in item for item in metadata] == [False, True]
    assert all("the 60 test records" in item["not_covered"] for item in metadata)


def test_of_private_data_a_mirror_gets_nothing_before_the_end(wandb: FakeWandb, tmp_path: Path) -> None:
    record = private_record(tmp_path)
    folder = tmp_path / record.run_id
    for allowed in (False, True):
        live = tracking.WandbTracker(TrackingConfig("wandb_offline", allow_times=allowed), record, folder)
        for at, row in enumerate(history(folder)):
            live.step(row)
            assert len(wandb.runs) == (1 if allowed else 0) and (not allowed or len(wandb.runs[-1].rows) == at + 1)
        live.finish(record)
        assert sorted(wandb.runs[-1].rows) == [1, 2, 3, 4]
        times = {row.get("_timestamp") for row in wandb.runs[-1].rows.values()}
        assert len(times) == 1 and (times == {None}) is allowed
        wandb.runs.clear()


def test_without_an_account_one_line_says_so(
    records: list[RunRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    assert sync(tmp_path) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "WANDB_API_KEY" in said.err and not said.out


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("tracking.projekt=x", "did you mean tracking.project"),
        ("tracking=none", "nothing"),
        ("tracking=wanbd", "one of"),
    ],
)
def test_a_wrong_setting_is_one_line(
    wandb: FakeWandb, records: list[RunRecord], tmp_path: Path, argument: str, word: str, capsys
) -> None:
    assert sync(tmp_path, argument) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not wandb.runs


def test_offline_files_are_written_once(records: list[RunRecord], tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="make setup EXTRAS=wandb, or make test")
    for _ in range(2):
        assert sync(tmp_path, "tracking=wandb_offline") == 0
        assert len(list(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))) == 3
        assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1
    marker = json.loads((tmp_path / records[0].run_id / ".wandb-uploaded").read_text())
    assert list(marker) == ["wandb_offline:/dptune"]
