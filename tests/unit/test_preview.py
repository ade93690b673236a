"""What `dptune data` says of the records before any budget is spent."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dptune import cli
from dptune.config.checks import with_values
from dptune.config.schema import Config, ConfigError
from dptune.runs.preview import GAIN, PRIVATE, describe


def conversations(path: Path, count: int = 200) -> Path:
    rows = [
        {
            "user": f"u{at % 20}",
            "messages": [
                {"role": "user", "content": f"hi {at}"},
                {"role": "assistant", "content": "hello"},
                {"role": "user", "content": "and now ?"},
                {"role": "assistant", "content": f"bye \x1b[2J{at}" + " more" * at},
            ],
        }
        for at in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path: Path, **values: Any) -> Config:
    fixed = {"data.name": "files", "data.path": str(path), "data.train_size": None, "privacy.delta": 1e-4}
    fixed |= {"data.test_size": None, "data.validation_size": None, "hyperparameter.expected_batch_size": 20}
    fixed |= {"compute.output_root": str(path.parent / "outputs"), "environment.sequence_length": 64}
    given = {name.replace("__", "."): value for name, value in values.items()}
    return with_values(Config(), [*(fixed | given).items()])


def lines(config: Config) -> dict[str, list[str]]:
    """What is said, by the first word of its line."""
    said: dict[str, list[str]] = {}
    for line in describe(config).splitlines():
        word, _, value = line.strip().partition(" ")
        said.setdefault(word, []).append(value.strip())
    return said


def test_private_records_are_shown_under_a_mark_and_nothing_is_written(tmp_path: Path) -> None:
    path = conversations(tmp_path / "talk.jsonl")
    text = describe(config(path))
    assert text.startswith(PRIVATE) and "as the model sees them (NON_PRIVATE)" in text
    assert "NON_PRIVATE" not in describe(Config())  # Its records are made up.
    assert [item.name for item in tmp_path.iterdir()] == ["talk.jsonl"]


def test_format_splits_tasks_users_and_lengths_are_said(tmp_path: Path) -> None:
    said = lines(config(conversations(tmp_path / "talk.jsonl")))
    assert said["format"] == [
        "200 conversations, 4.0 turns, roles user/assistant (detected; data.layout=... overrules it)"
    ]
    assert said["file"] == [str(tmp_path / "talk.jsonl")]
    numbers = [int(part.split()[1]) for part in said["splits"][0].split(", ")]
    assert sum(numbers) == 200 and said["task"] == [f"instructions: {numbers[0]} training records, free form"]
    assert said["users"][0].startswith("20 with ")
    assert "tokens (median), nine of ten up to" in said["lengths"][0] and "sequence_length=64" in said["lengths"][0]
    assert "of 200 records are cut" in said["cut"][0]
    assert said["N"][0].startswith(f"{numbers[0]} records (counted, and treated as public; data.declared_size=...")
    named = lines(config(tmp_path / "talk.jsonl", data__layout="conversations", data__declared_size=500))
    assert named["format"][0].endswith("(data.layout=conversations)")
    assert named["N"] == ["500 records (declared); privacy.unit=example"]


def test_three_records_are_shown_as_the_model_sees_them(tmp_path: Path) -> None:
    text = describe(config(conversations(tmp_path / "talk.jsonl")))
    shown = text.partition("stands between [[ and ]]:\n")[2]
    assert shown.count("--- ") == 3 and "\n>[[ hello]]\nand now ?\n>[[ bye " in shown and "<eos>]]" in shown
    sizes = [int(line.split()[2]) for line in shown.splitlines() if line.startswith("--- ")]
    assert sizes == sorted(sizes) and sizes[-1] == 64
    assert "\x1b" not in text and r"\x1b[2J" in text.replace(" ", "")


def test_options_are_counted(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"is it {at} ?", "output": "yes" if at % 4 else "no", "options": ["yes", "no"]}
        | {"split": "train" if at < 40 else "test"}
        for at in range(60)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert lines(config(path))["task"] == ["instructions: 40 training records, 2 options: yes 75%, no 25%"]
    rows[0]["options"] = ["yes", "no", "why"]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, "bad"]))
    said = lines(config(path, data__on_bad="skip"))
    assert said["task"] == ["instructions: 40 training records, 2 to 3 options of each record's own"]
    assert said["skipped"] == [f"1 bad records; first: {path}: line 61 is not a JSON object"]
    assert said["users"] == ["the records name none; data.columns.user=FIELD does"]


def test_the_largest_sensible_batch_and_delta_follow_from_n(tmp_path: Path) -> None:
    path = conversations(tmp_path / "talk.jsonl", 400)
    said = lines(config(path, data__declared_size=400))
    assert said["delta"] == ["privacy.delta=0.0001; largest sensible 1/(10 N) = 0.0002, never above 1/N"]
    noise = [entry.split() for entry in said["noise"][0].partition("by batch: ")[2].split(", ")]
    batches, values = [int(batch) for batch, _ in noise], [float(value) for _, value in noise]
    assert batches == [12, 25, 50, 100, 200] and values == sorted(values, reverse=True)
    best = int(said["batch"][0].partition("largest sensible ")[2].partition(",")[0])
    after = values[batches.index(best) + 1] if best < 200 else 0.0
    assert best == 200 or after > (1 - GAIN) * values[batches.index(best)] * 0.95
    assert "noise" not in lines(config(path, privacy__enabled=False, privacy__target_epsilon=None))


def test_what_a_run_would_refuse_is_said_and_the_rest_too(tmp_path: Path) -> None:
    path = conversations(tmp_path / "talk.jsonl", 100)
    said = lines(config(path, hyperparameter__expected_batch_size=256))
    assert said["refused"][0].startswith("a run would be: expected_batch_size must lie in") and "batch" in said
    said = lines(config(conversations(path, 1), data__splits=["hash:hash"]))
    assert said["format"][0].startswith("1 conversations, 4.0 turns") and "---" in said
    assert "split is empty; give it records" in said["refused"][0]
    assert "refused" in lines(config(conversations(path, 0)))
    with pytest.raises(ConfigError, match="data.template=chat: the backbone's tokenizer has no chat template"):
        describe(config(path, data__template="chat"))


def test_rows_of_one_record_are_said(tmp_path: Path) -> None:
    rows = [{"Definition": "say", "input": f"{at}", "output": ["a", "b", "c"]} for at in range(100)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = lines(config(path, data__layout="instances", data__examples_per_record=2, privacy__delta=1e-3))
    assert said["rows"] == ["one record is up to 2 training rows, which the plan accounts for"]


def test_the_command_takes_keys_only_and_names_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Handlers that earlier tests left behind have streams that are closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    path = conversations(tmp_path / "talk.jsonl")
    cli.main(["data", "data=chat", f"data.path={path}", f"compute.output_root={tmp_path}", "privacy.delta=1e-4"])
    assert "200 conversations" in capsys.readouterr().out
    for arguments, message in [
        (["data", "foo"], "data foo: give key=value only"),
        (["data", "data.columns.instruction==Good?"], "its value cannot be read"),
        (["data", "data=chat", f"data.path={tmp_path / 'gone.jsonl'}"], "is not a file"),
    ]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and message in error and error.count("\n") == 1
