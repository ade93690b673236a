import csv
import gzip
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptune.config.checks import with_values
from dptune.config.schema import Config, ConfigError, DataConfig
from dptune.data.mapping import BadRecord, ColumnMapping
from dptune.data.readers import READERS, DataError, Fault, parts
from dptune.data.sources import load_dataset

ROWS: list[dict[str, Any]] = [
    {"instruction": "say", "output": "yes", "user": 'é, "quoted"\nand broken'},
    {"instruction": "say] [", "output": "no", "user": "你好"},
    {"instruction": "{}", "output": "yes", "user": "c"},
]


def text(kind: str, rows: list[dict[str, Any]]) -> bytes:
    """The rows as a file of a kind."""
    if kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hub: pip install 'dptune[hub]'")
        from pyarrow import parquet

        sink = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind in (".jsonl", ".ndjson"):
        return b"\n".join(json.dumps(row).encode() for row in rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], delimiter="\t" if kind == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def read(path: Path, **fields: Any) -> list[Any]:
    (part,) = parts(DataConfig(name="files", path=str(path), **fields))
    assert part.name == str(path) and part.split is None
    return [item.message if isinstance(item, Fault) else item[1] for item in part.items]


@pytest.mark.parametrize(
    ("kind", "packed"),
    [(kind, packed) for kind in READERS for packed in (False, True) if not (packed and kind == ".parquet")],
    ids=lambda value: {False: "plain", True: "gzip"}.get(value, value),
)
def test_every_kind_of_file_gives_the_same_rows(kind: str, packed: bool, tmp_path: Path) -> None:
    """Parquet packs its own columns."""
    path = tmp_path / f"rows{kind}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(text(kind, ROWS)) if packed else text(kind, ROWS))
    assert read(path) == ROWS


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_is_no_part_of_the_first_field(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + text(kind, ROWS))
    assert read(path) == ROWS


@pytest.mark.parametrize("size", [10, 70_000, 200_000])
def test_a_json_array_is_decoded_across_the_borders_of_what_is_read(size: int, tmp_path: Path) -> None:
    rows = [{"output": f"{index}" * size} for index in range(9)]
    path = tmp_path / "rows.json"
    path.write_bytes(text(".json", rows))
    assert read(path) == rows


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers() | st.none()), max_size=5))
def test_any_rows_survive_a_json_array(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows))
    assert read(path) == rows


@pytest.mark.parametrize(
    ("name", "content", "last"),
    [
        ("a.json", b'{"output": "yes"}', "one JSON value, in which no list of records was found; give one array of"),
        ("a.json", b'{"output": "yes"}\n{"output": ', "line 2 is not JSON"),
        (
            "a.json",
            b'{\n"output": "yes"}\n{\n"output": "no"}',
            "not JSON (Extra data: line 3 column 1",
        ),
        (
            "a.json",
            b'[{"output": "yes"}] [{"output": "no"}]',
            "goes on after the end of its array, behind record 1; give",
        ),
        ("a.json", b'[{"output": "yes"}, 5]', "record 2 is not a JSON object"),
        ("a.json", b'[{"output": "yes"}, {broken}]', "record 2 is not JSON (Expecting property name"),
        ("a.json", b'[{"output": "yes"}', "record 2 is not JSON (Expecting value); not readable after it"),
        ("a.json", b'[{"output": "\xe9"}]', "not UTF-8 after record 0; convert the file"),
        ("a.jsonl", b'[{"output": "yes"}]', "line 1 is an array of JSON objects; that is read from .json"),
        (
            "a.jsonl",
            b"{",
            "line 1 is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        ("a.json.gz", gzip.compress(b'[{"output": "yes"}]', mtime=0)[:-9], "not readable after record"),
        ("a.jsonl.gz", b"no gzip", "not readable after line 0 (Not a gzipped file"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3 has 1 fields but the header has 2"),
        ("a.csv", b'a,b\n1,2\n3,"4\n', "line 3 is not CSV (unexpected end of data); not readable after it"),
        ("a.csv", b"a,a\n1,2\n", "line 1 names a field twice, no row can be read after it; if line 1 is a record"),
        ("a.csv", b"a;b\n1;2\n", "line 1 is one field; divide the fields of a .csv file by commas"),
        ("a.csv", b"a,b\n1,2\n\xe9,4\n5,6\n", "line 3 is not UTF-8 (byte 1 of it); convert the file"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(name: str, content: bytes, last: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    found = read(tmp_path / name)
    assert isinstance(found[-1], str) and found[-1].startswith(last)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra hub: pip install 'dptune[hub]'")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    (found,) = read(tmp_path / "a.parquet")
    assert found.startswith("not readable after row 0 (") and "\n" not in found


def test_options_of_a_text_file_are_a_json_list(tmp_path: Path) -> None:
    mapping = ColumnMapping(DataConfig(name="files"))
    row = {"instruction": "say", "output": "a", "options": '["a", "b"]', "user": "", "split": "", "input": ""}
    example = mapping.example(row, "train")
    assert example is not None and example.options == ("a", "b") and example.user is None and example.split == "train"
    with pytest.raises(BadRecord, match="field 'options' is not a JSON list"):
        mapping.example({**row, "options": "[a, b"}, "train")
    free = mapping.example({**row, "options": ""}, "train")
    assert free is not None and free.options is None


GLUE = [
    ("a good film", "1"),
    ('"a film', "0"),
    ('he said "no"', "1"),
    ('"bad" is no word', "0"),
    ('"', "1"),
    ('""', "0"),
]


def tabs(*rows: tuple[str, ...]) -> str:
    return "".join("\t".join(row) + "\n" for row in (("sentence", "label"), *rows))


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_a_quote_in_a_file_with_tabs_is_a_letter(on_bad: str, tmp_path: Path) -> None:
    for rows in (GLUE, GLUE[::-1], [(label, text) for text, label in GLUE]):
        (tmp_path / "a.tsv").write_text(tabs(*rows))
        found = read(tmp_path / "a.tsv", on_bad=on_bad)
        assert [(row["sentence"], row["label"]) for row in found] == rows


def test_quotes_that_a_field_with_tabs_needs_are_read(tmp_path: Path) -> None:
    rows = [{"sentence": text, "label": "1"} for text in ("a\ttab", "two\nlines", 'a "word"', '"and\nmore\n', "plain")]
    (tmp_path / "a.tsv").write_bytes(text(".tsv", rows))
    assert read(tmp_path / "a.tsv") == rows
    with (tmp_path / "b.tsv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], delimiter="\t", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    assert read(tmp_path / "b.tsv") == rows


def test_a_bad_row_of_a_file_with_tabs_is_lost_alone(tmp_path: Path) -> None:
    # A quote alone would close what the bad row opens, and stop the run as in the next test.
    good = [row for row in GLUE if row[0] != '"']
    lines = tabs(*good).splitlines(keepends=True)
    for bad in ("no label\n", '"no label\n', "a\tb\tc\n"):
        for place in range(1, len(lines) + 1):
            (tmp_path / "a.tsv").write_text("".join((*lines[:place], bad, *lines[place:])))
            found = read(tmp_path / "a.tsv", on_bad="skip")
            assert [(row["sentence"], row["label"]) for row in found if isinstance(row, dict)] == good, (bad, place)
            assert [row for row in found if not isinstance(row, dict)] == [
                f"line {place + 1} has {1 + bad.count(chr(9))} fields but the header has 2"
            ]


def test_lines_that_a_quote_holds_together_stop_where_bad_rows_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(tabs(('"two\nlines"', "1"), *GLUE))
    (part,) = parts(DataConfig(name="files", path=str(tmp_path / "a.tsv"), on_bad="skip"))
    (fault,) = part.items
    assert isinstance(fault, Fault) and fault.stops and fault.message.startswith("line 2 opens a quote that ends in")


@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.tsv", "a.csv.gz", "A.TSV.GZ"])
@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_lines_may_end_in_any_of_three_ways(name: str, end: str, tmp_path: Path) -> None:
    by = "\t" if "tsv" in name.lower() else ","
    lines = [f"a{by}b", *(f"{'x' * 50_000}{by}{number}" for number in range(5))]
    content = end.join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert [row["b"] for row in read(tmp_path / name)] == list("01234")


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"a,b\n{'x' * 140_000},1\n2,3\n")
    assert [len(row["a"]) for row in read(tmp_path / "a.csv")] == [140_000, 1]


@pytest.mark.parametrize(("name", "by"), [("a.csv", ","), ("a.tsv", "\t")])
def test_a_file_without_a_header_gets_its_names_from_the_config(name: str, by: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(f"1{by}2\n3{by}4\n")
    assert read(tmp_path / name, field_names=["a", "b"]) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    with pytest.raises(DataError, match=r"line 2: field 'instruction' is missing.*no header.*data.field_names=\[...\]"):
        load_dataset(Config(data=DataConfig(name="files", path=str(tmp_path / name), on_bad="skip", train_size=None)))


HUGE, DEEP = "9" * 5000, "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSON"])
def test_what_python_cannot_hold_is_a_fault_of_its_record_alone(name: str, tmp_path: Path) -> None:
    rows = ['{"output": "yes"}', f'{{"more": {DEEP}}}', f'{{"more": {HUGE}}}', '{"output": "no"}']
    whole = name.lower() == "a.json"
    (tmp_path / name).write_text(f"[{','.join(rows)}]" if whole else "\n".join(rows))
    found = read(tmp_path / name)
    assert found[0] == {"output": "yes"} and found[3] == {"output": "no"} and str(found[2]["more"]) == HUGE
    assert found[1].startswith(f"{'record' if whole else 'line'} 2 is nested too deeply to be read")


@pytest.mark.parametrize("role", ["instruction", "input", "output", "options", "user", "task", "split"])
def test_half_a_character_is_named_with_its_field(role: str) -> None:
    mapping = ColumnMapping(DataConfig(name="files"))
    row: dict[str, Any] = {"instruction": "say", "output": "a", "options": ["a"]}
    assert mapping.example(row, "train") is not None
    row[role] = ["a", "\ud800"] if role == "options" else "\ud800"
    with pytest.raises(BadRecord, match=f"field '{role}'.*half a character"):
        mapping.example(row, "train")


def test_a_label_that_is_a_long_number_is_no_position() -> None:
    mapping = ColumnMapping(DataConfig(name="files", options=["a", "b"]))
    for output in (HUGE, Decimal(HUGE), 2):
        with pytest.raises(BadRecord, match="field 'output' is"):
            mapping.example({"instruction": "say", "output": output}, "train")


def test_a_table_is_read_by_the_columns_that_are_asked_for(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra hub: pip install 'dptune[hub]'")
    from pyarrow import parquet

    late = pyarrow.array([0, 1 << 60, 0], pyarrow.timestamp("us"))
    table = {"instruction": list("abc"), "output": list("def"), "when": late}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    assert [row["output"] for row in read(tmp_path / "a.parquet")] == list("def")
    wanted = DataConfig(name="files", path=str(tmp_path / "a.parquet"))
    wanted.columns.id = "when"
    (part,) = parts(wanted)
    found = list(part.items)
    assert isinstance(found[1], Fault) and found[1].message.startswith("row 2: field 'when' cannot be read (")
    assert not found[1].stops and not isinstance(found[0], Fault) and not isinstance(found[2], Fault)
    wanted.columns.output = "answer"
    (part,) = parts(wanted)
    (fault,) = part.items
    assert isinstance(fault, Fault) and fault.message.startswith("field 'answer' is missing; map it with data.columns.")
    assert fault.message.endswith("the table has instruction, output, when")


FOLDERS: list[tuple[dict[str, str | None], list[str] | None]] = [
    # Names of files with the split that each is, and data.splits.
    ({"data/train-00000-of-00002.jsonl": "train", "data/train-00001-of-00002.jsonl": "train"}, None),
    ({"data/train-00000-of-00001.jsonl": "train", "data/test-00000-of-00001.jsonl": "test"}, None),
    ({"train.jsonl": "train", "dev.jsonl": "validation", "test.jsonl": "test"}, None),
    ({"training.csv": "train", "VALID.csv": "validation", "eval.csv": "test"}, None),
    ({"train/a.jsonl": "train", "val/a.jsonl": "validation", "test/b.json": "test"}, None),
    ({"trainset.jsonl": "train", "devset.jsonl": "validation", "testData.jsonl": "test"}, None),
    ({"snli_1.0_train.jsonl.gz": "train", "snli_1.0_test.jsonl.gz": "test"}, None),
    ({"train.jsonl": "train", "dev.jsonl": "dev", "extra.jsonl": "extra"}, ["train:train", "dev:test", "extra:train"]),
    ({"contest.jsonl": None, "latest.jsonl": None, "trainer.jsonl": None}, None),
]


@pytest.mark.parametrize(("names", "splits"), FOLDERS)
def test_names_of_files_say_the_split(names: dict[str, str | None], splits: list[str] | None, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    made = DataConfig(name="files", path=str(tmp_path), splits=splits)
    found = {str(Path(part.name).relative_to(tmp_path)): part.split for part in parts(made)}
    # Of nothing but training files a part is held out.
    expected = dict.fromkeys(names) if splits is None and {*names.values()} == {"train"} else names
    assert found == expected


@pytest.mark.parametrize(
    "names", [("train.jsonl", "more.jsonl"), ("a/test.jsonl", "b.jsonl"), ("train_test.jsonl", "b.jsonl")]
)
def test_a_folder_in_which_only_some_names_look_like_splits_stops(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"instruction": "say", "output": "yes"}\n')
    with pytest.raises(ConfigError, match=r"data.path=.*looks like"):
        with_values(Config(), [("data.name", "files"), ("data.path", str(tmp_path))])


def test_a_split_in_a_row_may_have_any_of_the_usual_names() -> None:
    mapping = ColumnMapping(DataConfig(name="files"))
    row = {"instruction": "say", "output": "a"}
    for name, ours in (("dev", "validation"), ("Valid", "validation"), ("eval", "test"), ("training", "train")):
        example = mapping.example({**row, "split": name}, None)
        assert example is not None and example.split == ours
    with pytest.raises(BadRecord, match="field 'split' is 'part 1', not one of"):
        mapping.example({**row, "split": "part 1"}, None)
