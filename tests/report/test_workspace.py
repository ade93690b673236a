"""The W&B workspace is built without network, and shows nothing that is never uploaded."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dptune.config.schema import TrackingConfig
from dptune.records.frame import collect
from dptune.records.mirror import TASK_TABLE, mirrored_summary
from dptune.report.results import history
from dptune.report.upload import SWEEP_TABLE
from dptune.sweeps.jobs import ROOT

pytest.importorskip("wandb_workspaces", reason="make setup EXTRAS=workspace, or make test")

SAMPLE = ROOT / "analysis" / "sample"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("workspace", ROOT / "analysis" / "workspace.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def panels(script: ModuleType) -> list[dict[str, Any]]:
    """What W&B is sent of each panel."""
    made = script.workspace("team", "project", script.tasks_of(SAMPLE))
    return [panel._to_model().model_dump(by_alias=True) for section in made.sections for panel in section.panels]


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_no_panel_stays_empty(panels: list[dict[str, Any]]) -> None:
    records = collect(SAMPLE).records
    results = {
        key
        for record in records
        for key, value in mirrored_summary(record, TrackingConfig(), SAMPLE / record.run_id).items()
        if value is not None
    }
    steps = {key for row in history(SAMPLE / records[0].run_id) for key in row if not key.startswith("NON_PRIVATE/")}
    settings = {
        f"{group}.value.{key}" for group, part in records[0].config.items() if isinstance(part, dict) for key in part
    }
    checked = 0
    for panel in panels:
        content = panel["config"]
        for key in ("xAxis", "yAxis") if panel["viewType"] == "Scatter Plot" else ():
            assert content[key].removeprefix("summary:") in results
            checked += 1
        for axis in content.get("columns") or ():
            source, _, name = axis["accessor"].partition(":")
            assert name in (settings if source == "config" else results)
            checked += 1
        if (grouped := content.get("groupBy")) is not None:
            assert grouped == "jobType" or grouped in settings
        for name in content.get("metrics") or ():
            assert name in (steps if panel["viewType"] == "Run History Line Plot" else results)
            checked += 1
        if content.get("useMetricRegex"):
            assert any(re.fullmatch(content["metricRegex"], key) for key in steps)
            checked += 1
        if panel["viewType"] == "Parameter Importance":
            assert content["targetKey"] in results
            checked += 1
    tables = [panel["config"] for panel in panels if panel["viewType"] == "Weave"]
    assert [{TASK_TABLE, SWEEP_TABLE} & set(strings(content)) for content in tables] == [{TASK_TABLE}, {SWEEP_TABLE}]
    assert checked > len(panels)


def test_the_report_shows_every_section_of_the_workspace(script: ModuleType) -> None:
    tasks = script.tasks_of(SAMPLE)
    sections, made = script.sections(tasks), script.report("team", "project", tasks)
    grids = [block for block in made.blocks if type(block).__name__ == "PanelGrid"]
    assert [len(grid.panels) for grid in grids] == [len(panels) for panels in sections.values()]
    assert {"Hyperparameters", "Environment", "Data"} <= set(sections)
    assert [block.text for block in made.blocks if type(block).__name__ == "H2"] == list(sections)
    assert all((runs.entity, runs.project) == ("team", "project") for grid in grids for runs in grid.runsets)
    for grid in grids:
        places = [(panel.layout.x, panel.layout.y) for panel in grid.panels]
        assert len(set(places)) == len(places)


def test_every_task_has_its_panel(panels: list[dict[str, Any]]) -> None:
    shown = {name for panel in panels for name in panel["config"].get("metrics") or ()}
    record = collect(SAMPLE).records[0]
    assert record.metrics is not None
    assert {f"tasks/{task}" for task in record.metrics.accuracy_by_task} <= shown


@pytest.mark.parametrize(("arguments", "status"), [(["a/b", "--dry-run"], 0), (["a/b"], 2), (["a"], 2)])
def test_the_command_saves_nothing_without_an_account(
    script: ModuleType, arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["workspace.py", *arguments])
    if status:
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == status
        assert ("account" in capsys.readouterr().err) == ("/" in arguments[0])
    else:
        script.main()
        assert "Privacy and utility: Accuracy by ε spent" in capsys.readouterr().out
