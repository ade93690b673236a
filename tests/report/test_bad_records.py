import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from report.planted import config, plant

from dptune.cli import main
from dptune.records.frame import collect


def corrupt(root: Path, change) -> Path:
    good = plant(root, config(seed=7), 0.5, 0.5)
    path = root / good.run_id / "record.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


BAD = {
    "old schema": (lambda record: record.update(schema_version=0), "schema version 0 of an older dptune"),
    "new schema": (lambda record: record.update(schema_version=99), "schema version 99 of a newer dptune"),
    "no schema": (lambda record: record.pop("schema_version"), "schema_version"),
    "an unknown field": (lambda record: record["metrics"].update(meteor=1.0), "meteor"),
    "a missing field": (lambda record: record["metrics"].pop("accuracy"), "accuracy"),
    "an accuracy of 1.7": (lambda record: record["metrics"].update(accuracy=1.7), "outside"),
    "a BLEU of 170": (lambda record: record["metrics"].update(bleu=170.0), "outside"),
    "a word for a number": (lambda record: record["metrics"].update(accuracy="high"), "not a run record"),
    "an unknown state": (lambda record: record.update(status="ok"), "status"),
    "a negative epsilon": (lambda record: record["guarantee"].update(epsilon=-1.0), "above 0"),
    "done without metrics": (lambda record: record.update(metrics=None), "metrics"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_and_left_out(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, reason = BAD[name]
    plant(tmp_path, config(seed=0), 0.6, 0.6)
    path = corrupt(tmp_path, change)
    found = collect(tmp_path)
    assert len(found.records) == 1 and len(found.unreadable) == 1
    assert str(path) in found.unreadable[0] and reason in found.unreadable[0]
    main(["table", f"compute.output_root={tmp_path}"])
    shown = capsys.readouterr()
    assert f"LEFT OUT {path}" in shown.err
    # However long the folder is: long lines are broken.
    assert "".join(f"Left out: {path}".split()) in "".join(shown.out.split())
    assert "0.600" in shown.out and "0.550" not in shown.out


def zeroed(record: dict[str, Any], steps: int = 0) -> None:
    record["privacy"].update(steps=steps)
    record["guarantee"].update(epsilon=0.0, steps=steps)


def test_a_run_of_no_steps_costs_nothing(tmp_path: Path) -> None:
    path = corrupt(tmp_path, zeroed)
    assert not collect(tmp_path).unreadable
    content = json.loads(path.read_text())
    zeroed(content, steps=3)
    path.write_text(json.dumps(content))
    assert "steps must be above 0" in collect(tmp_path).unreadable[0]


def test_half_a_file_and_a_copy_are_left_out(tmp_path: Path) -> None:
    good = plant(tmp_path, config(seed=0), 0.6, 0.6)
    other = plant(tmp_path, config(seed=1), 0.6, 0.6)
    path = tmp_path / other.run_id / "record.json"
    path.write_text(path.read_text()[:200])
    shutil.copytree(tmp_path / good.run_id, tmp_path / f"{good.run_id}-copy")
    found = collect(tmp_path)
    assert [item.run_id for item in found.records] == [good.run_id]
    assert any("count twice" in reason for reason in found.unreadable)
    assert any("not readable as JSON" in reason for reason in found.unreadable)


@pytest.mark.parametrize("view", ["table", "tables", "figures", "claims", "report"])
def test_no_records_says_how_to_make_some(tmp_path: Path, view: str, capsys: pytest.CaptureFixture[str]) -> None:
    if view != "table":
        pytest.importorskip("great_tables", reason="make setup EXTRAS=report, or make test")
    with pytest.raises(SystemExit) as stopped:
        main([view, f"compute.output_root={tmp_path / 'none'}", f"to={tmp_path}"])
    assert stopped.value.code == 2 and "make sweep" in capsys.readouterr().err


def test_filters_choose_runs_or_name_what_they_cannot_find(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, config("uniform"), 0.5, 0.5)
    plant(tmp_path, config("adaptive"), 0.9, 0.9)
    main(["table", "privacy.name=adaptive", f"compute.output_root={tmp_path}"])
    assert "1 of 1 runs done" in (shown := capsys.readouterr().out) and "0.900" in shown and "0.500" not in shown
    for wrong, reason in (("privacy.nam=x", "no record has privacy.nam"), ("privacy.name=x", "no record below")):
        with pytest.raises(SystemExit):
            main(["table", wrong, f"compute.output_root={tmp_path}"])
        assert reason in capsys.readouterr().err


def test_many_records_are_read_and_shown(tmp_path: Path) -> None:
    """Thousands of settings stay one row each, with the seeds of each together."""
    from dptune.records.record import RunRecord
    from dptune.report.results import of_records
    from dptune.report.tables import main_table

    template = plant(tmp_path, config(), 0.5, 0.5)
    records = []
    for at in range(1500):
        record = RunRecord(**vars(template))
        record.run_id = f"{at:012x}"
        changed = config(seed=at % 3, hyperparameter__weight_decay=(at // 3) * 1e-3)
        record.config = json.loads(json.dumps(vars(changed), default=vars))
        records.append(record)
    table = main_table("many", of_records(records, tmp_path, items=False))
    assert len(table.rows) == 501 and all(row["accuracy"].n == 3 for row in table.rows[1:])
