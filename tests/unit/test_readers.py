import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptune.config.schema import DataConfig
from dptune.data.readers import READERS, Fault, parts

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


def read(path: Path) -> list[Any]:
    (part,) = parts(DataConfig(name="files", path=str(path)))
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
        (
            "a.json",
            b'{"output": "yes"}',
            "one JSON object, in which no list of records was found; give",
        ),
        ("a.json", b'[{"output": "yes"}, 5]', "record 2 is not a JSON object"),
        ("a.json", b'[{"output": "yes"}, {broken}]', "record 2 is not JSON (Expecting property name"),
        ("a.json", b'[{"output": "yes"}', "record 2 is not JSON (Expecting value); not readable after it"),
        ("a.json", b'[{"output": "\xe9"}]', "not UTF-8 after record 0; convert the file"),
        ("a.json.gz", gzip.compress(b'[{"output": "yes"}]', mtime=0)[:-9], "not readable after record"),
        ("a.jsonl.gz", b"no gzip", "not readable after line 0 (Not a gzipped file"),
        ("a.csv", b"a,b\n1,2\n3\n", "line 3 has 1 fields but the header has 2"),
        ("a.csv", b'a,b\n1,2\n3,"4\n', "line 3 is not CSV (unexpected end of data); not readable after it"),
        ("a.csv", b"a,a\n1,2\n", "line 1 names a field twice, no row can be read after it; if line 1 is a record"),
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
    from dptune.data.mapping import BadRecord, ColumnMapping

    mapping = ColumnMapping(DataConfig(name="files"))
    row = {"instruction": "say", "output": "a", "options": '["a", "b"]', "user": "", "split": "", "input": ""}
    example = mapping.example(row, "train")
    assert example is not None and example.options == ("a", "b") and example.user is None and example.split == "train"
    with pytest.raises(BadRecord, match="field 'options' is not a JSON list"):
        mapping.example({**row, "options": "[a, b"}, "train")
    free = mapping.example({**row, "options": ""}, "train")
    assert free is not None and free.options is None
