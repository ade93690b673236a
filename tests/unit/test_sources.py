import gzip
import json
import os
from pathlib import Path

import pytest

from dptune.config import Config, ConfigError, DataSensitivityConfig
from dptune.data import sources
from dptune.data.conditions import apply, subset
from dptune.data.sources import DataError

ROW = {
    "task": "team",
    "instruction": "which ?",
    "input": "reset",
    "options": ["a", "b"],
    "output": "a",
    "user": 7,
}


def config(path: Path, **columns: str) -> Config:
    made = Config()
    made.data.name, made.data.path = "jsonl", str(path)
    made.compute.output_root = str(path.parent / "outputs")
    made.data.train_size = made.data.validation_size = made.data.test_size = None
    for name, value in columns.items():
        setattr(made.data.columns, name, value)
    return made


def write(path: Path, rows: list[object]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def rows(count: int) -> list[object]:
    return [{**ROW, "input": f"message {index}", "split": "train" if index % 2 else "test"} for index in range(count)]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_a_file_becomes_examples(tmp_path: Path, name: str) -> None:
    data = sources.load(config(write(tmp_path / name, rows(6))))
    assert len(data.train) == 3 and len(data.test) == 3 and not data.public
    first = data.test[0]
    assert (first.task, first.input, first.options, first.output, first.user) == (
        "team",
        "message 0",
        ("a", "b"),
        "a",
        "7",
    )


def test_columns_are_mapped_and_missing_ones_have_defaults(tmp_path: Path) -> None:
    plain = [{"question": f"q{index}", "answer": "yes"} for index in range(200)]
    data = sources.load(config(write(tmp_path / "x.jsonl", plain), instruction="question", output="answer"))
    assert {item.task for item in data.train} == {"instructions"} and data.train[0].options is None
    assert len(data.train) + len(data.validation) + len(data.test) == 200
    assert 130 < len(data.train) < 190 and 5 < len(data.test) < 40


def test_the_split_by_content_moves_no_other_record(tmp_path: Path) -> None:
    plain = [{"instruction": f"q{index}", "output": "yes"} for index in range(100)]
    whole = sources.load(config(write(tmp_path / "x.jsonl", plain)))
    fewer = sources.load(config(write(tmp_path / "y.jsonl", plain[1:])))
    assert {item.instruction for item in fewer.train} == {item.instruction for item in whole.train} - {"q0"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 is not a JSON object"),
        (
            {**ROW, "instruction": None},
            r"line 2: field 'instruction' is missing; map it with data.columns.instruction",
        ),
        ({**ROW, "instruction": 5}, "line 2: field 'instruction' is not text"),
        ({**ROW, "output": "  "}, "line 2: field 'output' is empty"),
        ({**ROW, "output": "c"}, "line 2: field 'output' is not among the options"),
        ({**ROW, "options": "a,b"}, "line 2: field 'options' is not a list"),
        ({**ROW, "split": "holdout"}, "line 2: field 'split' is 'holdout'"),
    ],
)
def test_a_malformed_record_names_file_line_and_field(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", [ROW, row])
    with pytest.raises(DataError, match=message) as caught:
        sources.load(config(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_a_truncated_gzip_and_another_encoding_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(("".join(json.dumps(row) + "\n" for row in rows(2000))).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut.jsonl.gz: not readable after line"):
        sources.load(config(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "latin.jsonl").write_bytes('{"instruction": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="latin.jsonl: line 1 is not UTF-8"):
        sources.load(config(tmp_path / "latin.jsonl"))


def test_an_empty_split_and_an_unknown_task_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{**ROW, "split": "train"}])
    with pytest.raises(DataError, match="the test split is empty"):
        sources.load(config(path))
    wrong = config(write(tmp_path / "y.jsonl", rows(4)))
    wrong.data.tasks = ["nope"]
    with pytest.raises(DataError, match="no record has the task nope"):
        sources.load(wrong)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one = sources.load(config(write(tmp_path / "a.jsonl", rows(6)))).fingerprint
    assert one == sources.load(config(write(tmp_path / "b.jsonl", rows(6)))).fingerprint
    changed = rows(6)
    changed[0] = {**ROW, "input": "other", "split": "test"}
    assert one != sources.load(config(write(tmp_path / "c.jsonl", changed))).fingerprint


def test_conditions_are_record_wise_and_as_strong_as_they_say(tmp_path: Path) -> None:
    train = sources.load(config(write(tmp_path / "a.jsonl", rows(4000)))).train
    noisy = apply(train, DataSensitivityConfig(label_noise=0.2), seed=0)
    share = sum(one.output != two.output for one, two in zip(train, noisy, strict=True)) / len(train)
    assert share == pytest.approx(0.2, abs=0.03)
    assert apply(train[5:], DataSensitivityConfig(label_noise=0.2), seed=0) == noisy[5:]
    assert len(apply(train, DataSensitivityConfig(train_fraction=0.25), seed=0)) == 500
    assert subset(train, 10**6, 0) == train and subset(train, 10, 0) != subset(train, 10, 1)


REAL = Path(os.environ.get("DPTUNE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


# The data is not part of the repository: its licences differ and it is large.
@pytest.mark.skipif(not REAL.is_dir(), reason="real instruction data is not here; DPTUNE_TEST_DATA can name its folder")
@pytest.mark.parametrize(
    ("name", "train", "with_options", "with_users"),
    [
        ("sentiment_sst2", 30000, True, False),
        ("bigbench_mc", 36312, True, False),
        ("data2text_e2e", 7268, False, False),
        ("sgd_dialogues", 12230, True, True),
    ],
)
def test_real_instruction_files_load(
    name: str, train: int, with_options: bool, with_users: bool, tmp_path: Path
) -> None:
    wanted = config(REAL / f"{name}.jsonl.gz")
    wanted.compute.output_root = str(tmp_path)
    data = sources.load(wanted)
    assert len(data.train) == train and data.validation and data.test
    assert any(item.options for item in data.train) == with_options
    assert all(item.user for item in data.train) == with_users
    assert all(item.output in item.options for item in data.train if item.options)
