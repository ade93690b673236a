"""From files and the Hub to rows, one at a time, so that memory does not grow with the file. No torch here.

A reader yields each row with its place ("line 3"), or a `Fault` in place of what cannot be read. A fault that is more
than one row's own, such as the end of what can be read, is marked as one that stops the run (SPECIFICATION.md 1.8).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import IO, Any

from dptune.config.extras import require
from dptune.config.files import ENDINGS, SPLIT_WORDS, data_files, ending, file_splits, is_saved, readable, stem
from dptune.config.schema import ConfigError, DataConfig, split_names


class DataError(ConfigError):
    """Data that cannot be used: file, line, field, and what to do."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, or with the rest of a file."""

    message: str
    stops: bool = False
    """It decides on other rows too: leaving it out would not be leaving out one record."""


Row = dict[str, Any]
Items = Iterator[tuple[str, Row] | Fault]

_UNREADABLE = (OSError, EOFError, zlib.error)
_LONGEST_RECORD = 1 << 24  # characters of one record of a JSON array
_LONGEST_CELL = 1 << 30  # characters
_LONGEST_INTEGER = 4000  # digits; Python reads no more than 4,300


@dataclass(frozen=True)
class Part:
    """Rows that were read from one place."""

    name: str
    """File, or data set and split."""
    split: str | None
    """What the source calls the split, if the whole part belongs to one."""
    items: Items
    header: bool = False
    """Whether the first line of a file names the fields of all rows."""


def parts(data: DataConfig) -> Iterator[Part]:
    """Everything that `data.path` or `data.hub_id` names.

    Raises:
        DataError: when it cannot be opened at all.
    """
    if data.path is None:
        yield from _hub(data)
    elif is_saved(data.path):
        yield from _saved(data)
    else:
        yield from _files(data)


def _files(data: DataConfig) -> Iterator[Part]:
    path = str(data.path)
    files = data_files(path)
    known = readable(path)
    if not known or (len(known) < len(files) and not Path(path).is_dir()):
        wrong = next(file for file in files if file not in known)
        raise DataError(f"{wrong}: not a kind of file that can be read; use {', '.join(READERS)} (or with .gz)")
    # Of several files each may be of one split: train.jsonl, dev.jsonl, data/test-00000-of-00001.parquet.
    try:
        splits = file_splits(path, known, split_names(data) if data.splits else None)
    except ValueError as error:
        raise DataError(str(error)) from None
    for file, split in zip(known, splits, strict=True):
        kind = ending(file)
        yield Part(str(file), split, READERS[kind](file, data), kind in (".csv", ".tsv") and data.field_names is None)


def _opened(path: Path) -> IO[bytes]:
    # gzip.open gives a GzipFile, which has all of the IO that is used here.
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, *, any_end: bool = False) -> Iterator[tuple[int, str] | Fault]:
    """Lines with their numbers. With `any_end` also of files whose lines end in a carriage return alone."""
    number = 0
    try:
        with _opened(path) as stream:
            lines: Iterator[bytes] = iter(stream)
            if any_end:
                start = stream.read(_PEEK)
                rest = io.BytesIO(start)
                lines = _ended_by_returns(start, stream) if _only_returns(start) else _continued(rest, stream)
            for number, line in enumerate(lines, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield Fault(f"line {number} is not UTF-8 (byte {error.start + 1} of it); convert the file")
    except _UNREADABLE as error:
        yield Fault(f"not readable after line {number} ({error})", stops=True)


_PEEK = 1 << 16


def _only_returns(start: bytes) -> bool:
    """Whether lines end in a carriage return alone, as old spreadsheets write them."""
    return b"\r" in start[:-1] and b"\n" not in start


def _continued(start: IO[bytes], rest: IO[bytes]) -> Iterator[bytes]:
    """Lines of what was read already and of what follows it."""
    for line in start:
        yield line if line.endswith(b"\n") else line + rest.readline()
    yield from rest


def _ended_by_returns(start: bytes, rest: IO[bytes]) -> Iterator[bytes]:
    while True:
        *whole, start = start.split(b"\r")
        yield from (line + b"\n" for line in whole)
        more = rest.read(_PEEK)
        if not more:
            break
        start += more
    if start:
        yield start


def _jsonl(path: Path, data: DataConfig) -> Items:
    for line in _lines(path):
        if isinstance(line, Fault):
            yield line
        elif line[1].strip():
            yield _json_row(f"line {line[0]}", line[1], data)


def _json_row(place: str, text: str, data: DataConfig) -> tuple[str, Row] | Fault:
    try:
        row = _DECODER.decode(text)
    except ValueError as error:
        more = "; what goes over several lines is read from .json" if text.strip() in ("[", "{") else ""
        return Fault(f"{place} is not JSON ({error}){more}")
    except RecursionError:
        return Fault(f"{place} is nested too deeply to be read; leave out the field with so many brackets")
    return _object(place, row, data)


def _object(place: str, row: Any, data: DataConfig) -> tuple[str, Row] | Fault:
    """A row of JSON: an object, or a list of as many values as `data.field_names` has names."""
    if isinstance(row, list) and data.field_names:
        if len(row) != len(data.field_names):
            return Fault(f"{place} has {len(row)} values but data.field_names has {len(data.field_names)}")
        row = dict(zip(data.field_names, row, strict=True))
    if isinstance(row, dict):
        return place, row
    if isinstance(row, list) and any(isinstance(value, dict) for value in row):
        return Fault(f"{place} is an array of JSON objects; that is read from .json, as all that the file holds")
    more = "; name its values with data.field_names=[...]" if isinstance(row, list) else ""
    return Fault(f"{place} is not a JSON object{more}")


def _integer(digits: str) -> int | Decimal:
    """A JSON integer; of thousands of digits a Decimal, which is no text, no option and no user that can be named."""
    return int(digits) if len(digits) <= _LONGEST_INTEGER else Decimal(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)
_JSON = "give one array of objects, or one object a line"


def _json(path: Path, data: DataConfig) -> Items:
    """An array of objects, each decoded by itself, or one object that holds the rows."""
    gap = re.compile(r"[\s,]*")
    text, at, number, size = "", 0, 0, 1 << 16
    try:
        with _opened(path) as stream:
            chunks = codecs.iterdecode(iter(lambda: stream.read(size), b""), "utf-8-sig")
            text = next(chunks, "").lstrip()
            if not text.startswith("["):
                yield from _json_lines_or_object(path, data, text, chunks)
                return
            at = 1
            while True:
                at = _end(gap, text, at)
                if text.startswith("]", at):
                    if text[at + 1 :].strip() or any(chunk.strip() for chunk in chunks):
                        yield Fault(f"goes on after the end of its array, behind record {number}; {_JSON}", stops=True)
                    return
                row: Any = None
                deep = False
                try:
                    row, end = _DECODER.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    end, why = 0, error.msg
                except RecursionError:
                    deep = True
                    end, why = _end_of_brackets(text, at), "its brackets do not end"
                if not end:
                    more = next(chunks, "")
                    if not more or len(text) - at > _LONGEST_RECORD:
                        yield Fault(f"record {number + 1} is not JSON ({why}); not readable after it", stops=True)
                        return
                    text, at, size = text[at:] + more, 0, 2 * size
                    continue
                number, at, size = number + 1, end, 1 << 16
                if deep:
                    what = "is nested too deeply to be read; leave out the field with so many brackets"
                    yield Fault(f"record {number} {what}")
                else:
                    yield _object(f"record {number}", row, data)
    except UnicodeDecodeError:
        yield Fault(f"not UTF-8 after record {number}; convert the file", stops=True)
    except _UNREADABLE as error:
        yield Fault(f"not readable after record {number} ({error})", stops=True)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.S)


def _end_of_brackets(text: str, at: int) -> int:
    """Where the JSON value that begins here ends, by its brackets alone; 0 if it does not."""
    depth = 0
    for match in _BRACKET.finditer(text, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return 0


def _json_lines_or_object(path: Path, data: DataConfig, start: str, rest: Iterator[str]) -> Items:
    """What a .json file holds that does not begin with a bracket: JSON lines by another name, or one object."""
    first, _, after = start.partition("\n")
    if after.strip() and not isinstance(_json_row("", first, data), Fault):
        yield from _jsonl(path, data)
        return
    try:
        whole = _DECODER.decode("".join(chain([start], rest)))
    except ValueError as error:
        yield Fault(f"not JSON ({error}); {_JSON}", stops=True)
        return
    except RecursionError:
        yield Fault("nested too deeply to be read; leave out the field with so many brackets", stops=True)
        return
    rows = rows_of(whole, data, stem(path))
    if rows is None:
        yield Fault(f"one JSON value, in which no list of records was found; {_JSON}", stops=True)
        return
    for number, row in enumerate(rows, start=1):
        yield _object(f"record {number}", row, data)


def rows_of(whole: Any, data: DataConfig, name: str) -> list[Any] | None:
    """The rows that one JSON object holds; None if it is not seen where.

    One record, a task of Natural Instructions (each instance with the task's definition and name), a list under `data`
    as in SQuAD or the only list of objects, a list for each split, fields each with a list of values, and what pandas'
    `to_json` writes by its orients columns, index, split and table.
    """
    if not isinstance(whole, dict):
        return None
    columns = (data.columns.instruction, data.columns.output)
    said = [whole.get(name) for name in ("messages", "conversations", "conversation")]
    if all(isinstance(whole.get(column), str) for column in columns) or any(
        isinstance(turns, list) and turns and isinstance(turns[0], dict) for turns in said
    ):
        return [whole]
    if isinstance(found := whole.get("Instances"), list) and "Definition" in whole:
        task = {"task": name, "Definition": whole["Definition"]}
        return [{**task, **row} if isinstance(row, dict) else row for row in found]
    if isinstance(table := whole.get("data"), list):
        if isinstance(names := whole.get("columns"), list):
            return [dict(zip(map(str, names), row, strict=True)) if len(row) == len(names) else row for row in table]
        return table
    values = list(whole.values())
    objects = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    if objects and whole.keys() <= SPLIT_WORDS.keys():
        return [
            {data.columns.split: split, **row} if isinstance(row, dict) else row
            for split, rows in whole.items()
            for row in (rows if isinstance(rows, list) else [rows])
        ]
    if len(objects) == 1:
        return list(objects[0])
    if values and all(isinstance(value, list) for value in values):
        one_length = len({len(value) for value in values}) == 1
        return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)] if one_length else None
    if not values or not all(isinstance(value, dict) for value in values):
        return None
    if named_fields(data) & whole.keys() or all(label.isdecimal() for label in values[0]):
        return [{field: column.get(label) for field, column in whole.items()} for label in values[0]]
    return values


def named_fields(data: DataConfig) -> set[str]:
    """Names of the fields of a row, at its top, that the config asks for."""
    columns = [column for column in vars(data.columns).values() if column is not None]
    names = {hole for column in columns if column.startswith("=") for hole in HOLE.findall(column)}
    names |= {column for column in columns if not column.startswith("=")}
    return names | {name.partition(".")[0] for name in names}


HOLE = re.compile(r"\{([^{}]+)\}")
"""A field in a text of a column."""


def _csv(path: Path, data: DataConfig) -> Items:
    """A header and rows of as many fields; an empty cell is the empty text.

    Where bad rows are left out, no row may run over lines: a stray quote would decide on the rows up to the next quote,
    of whomever they are. A .tsv file has no quotes unless its header has them, or a field needs them (`_tab_fields`).
    """
    faults: list[Fault] = []
    by_line = data.on_bad == "skip"

    def lines() -> Iterator[str]:
        for line in _lines(path, any_end=True):
            if isinstance(line, Fault):
                # A quoted field may hold the line break, so that rows cannot be told apart any more.
                faults.append(replace(line, stops=True))
                return
            yield line[1]

    source = lines()
    first = next(source, "")
    csv.field_size_limit(_LONGEST_CELL)
    if ending(path) == ".tsv" and not all(_QUOTED.fullmatch(cell) for cell in first.rstrip("\r\n").split("\t")):
        yield from _tsv(chain([first], source), data)
        yield from faults
        return
    reader = csv.reader(chain([first], source), delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
    try:
        header = data.field_names or next(reader, [])
        if len(set(header)) < len(header):
            yield Fault(f"line 1 names a field twice, no row can be read after it; {HEADERLESS}", stops=True)
            return
        if len(header) == 1 and re.search(r"[;\t|]", header[0]):
            yield Fault("line 1 is one field; divide the fields of a .csv file by commas, of .tsv by tabs", stops=True)
            return
        before = reader.line_num
        for values in reader:
            place, start, before = f"line {reader.line_num}", before + 1, reader.line_num
            if by_line and before > start:
                yield Fault(f"{place} ends a quoted field that begins in line {start}; write JSON lines", stops=True)
                return
            if values and len(values) != len(header):
                yield Fault(f"{place} has {len(values)} fields but the header has {len(header)}")
            elif values:
                yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        yield Fault(f"line {reader.line_num} is not CSV ({error}); not readable after it", stops=True)
    yield from faults


HEADERLESS = "if line 1 is a record and no header, name the fields with data.field_names=[...]"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_TAB_FIELD = re.compile(r'"(?:[^"]|"")*"(?=\t|\Z)|[^\t]*')


def _tsv(lines: Iterator[str], data: DataConfig) -> Items:
    """Rows of a text with tabs, line by line.

    A quote is a letter like any other, unless it is the first of a field that has quotes because it needs them: for a
    tab or a doubled quote inside, or for a line break, where the lines are no rows by themselves and together are one.
    """
    header = data.field_names
    held: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if not header:
            header = [_unquoted(field) for field in line.split("\t")]
            if len(set(header)) < len(header):
                yield Fault(f"line 1 names a field twice, no row can be read after it; {HEADERLESS}", stops=True)
                return
            continue
        if held:
            joined = "\n".join((*(text for _, text in held), line))
            is_row = line.count("\t") + 1 == len(header)
            was_row = held[0][1].count("\t") + 1 == len(header)
            if not (is_row and was_row) and _is_whole(joined, len(header)):
                if data.on_bad == "skip":
                    what = "opens a quote that ends in another line; write JSON lines"
                    yield Fault(f"line {held[0][0]} {what}", stops=True)
                    return
                yield _tab_row(number, joined, header)
                held = []
                continue
            if not is_row and len(held) < _MOST_LINES:
                held.append((number, line))
                continue
            # What opened before was a letter.
            yield from (_tab_row(at, text, header) for at, text in held if text)
            held = []
        fields = _tab_fields(line, len(header))
        if len(fields) <= len(header) and _opens_a_quote(fields[-1]):
            held = [(number, line)]
        elif line:
            yield _tab_row(number, line, header)
    yield from (_tab_row(at, text, header or []) for at, text in held if text)


_MOST_LINES = 1000
"""Lines that a quoted field of a .tsv file may have."""


def _is_whole(text: str, count: int) -> bool:
    """Whether lines together are a row, and their breaks are in fields with quotes."""
    fields = _tab_fields(text, count)
    return len(fields) == count and all(_QUOTED.fullmatch(field) for field in fields if "\n" in field)


def _tab_row(number: int, text: str, header: Sequence[str]) -> tuple[str, Row] | Fault:
    fields = _tab_fields(text, len(header))
    if len(fields) != len(header):
        return Fault(f"line {number} has {len(fields)} fields but the header has {len(header)}")
    return f"line {number}", dict(zip(header, map(_unquoted, fields), strict=True))


def _opens_a_quote(field: str) -> bool:
    return field.startswith('"') and _QUOTED.fullmatch(field) is None


def _tab_fields(text: str, count: int) -> list[str]:
    """Fields between tabs; where that makes another number of them than `count`, a tab in quotes is no end."""
    plain, quoted, at = text.split("\t"), list[str](), 0
    if len(plain) == count and "\n" not in text:
        return plain
    while at <= len(text):
        match = _TAB_FIELD.match(text, at)
        assert match is not None  # The pattern fits the empty text.
        quoted.append(match[0])
        at = match.end() + 1
    return quoted


def _unquoted(field: str) -> str:
    if len(field) < 2 or _QUOTED.fullmatch(field) is None:
        return field
    inside = field[1:-1]
    return inside.replace('""', '"') if re.search('""|[\t\r\n]', inside) else field


def _parquet(path: Path, data: DataConfig) -> Items:
    """The fields that the config or a layout asks for, and no others."""
    require("hub", f"data.path={path}")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # Pre-buffering would read all row groups ahead.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            wanted = _wanted(file.schema_arrow.names, data)
            if isinstance(wanted, Fault):
                yield wanted
                return
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for row in _rows(batch):
                    number += 1
                    yield (f"row {number}", row) if isinstance(row, dict) else Fault(f"row {number}: {row}")
    except (OSError, pyarrow.ArrowException) as error:
        yield Fault(f"not readable after row {number} ({_one_line(error)})", stops=True)


def _rows(batch: Any) -> list[Row | str]:
    """Rows of a batch of Parquet, and in place of one that has no counterpart in Python why not."""
    try:
        found: list[Row | str] = batch.to_pylist()
        return found
    except (ValueError, OverflowError):  # A time beyond the year 9999.
        rows: list[Row | str] = []
        for at in range(len(batch)):
            row: Row = {}
            for name in batch.schema.names:
                try:
                    row[name] = batch.column(name)[at].as_py()
                except (ValueError, OverflowError) as error:
                    rows.append(f"field {name!r} cannot be read ({_one_line(error)}); make it a text")
                    break
            else:
                rows.append(row)
        return rows


LAYOUT_FIELDS = frozenset(
    (
        *(
            "messages",
            "conversations",
            "conversation",
            "system",
            "prompt",
            "completion",
            "message_tree_id",
            "message_id",
            "parent_id",
        ),
        *("role", "text", "paragraphs", "title", "Definition", "input", "output"),
    )
)
"""Fields that a layout may need besides those that the config names."""


def _wanted(names: Sequence[str], data: DataConfig) -> list[str] | Fault:
    """Of the fields of a table, those that are asked for; a fault where no record can be made of them."""
    wanted = [name for name in names if name in named_fields(data) or name in LAYOUT_FIELDS]
    own = {"messages", "conversations", "conversation", "completion", "message_tree_id", "paragraphs", "Definition"}
    if own & {*wanted}:
        return wanted
    for role in ("instruction", "output"):
        field = getattr(data.columns, role)
        if not field.startswith("=") and not {field, field.partition(".")[0]} & {*names}:
            has = ", ".join(sorted(names)[:12]) or "no field"
            what = f"field {field!r} is missing; map it with data.columns.{role}=...; the table has {has}"
            return Fault(what, stops=True)
    return wanted


READERS: dict[str, Callable[[Path, DataConfig], Items]] = dict(
    zip(ENDINGS, (_jsonl, _jsonl, _json, _csv, _csv, _parquet), strict=True)
)


def _hub(data: DataConfig) -> Iterator[Part]:
    datasets = _datasets(f"data.hub_id={data.hub_id}")
    try:
        found = datasets.load_dataset(data.hub_id, data.hub_config, revision=data.hub_revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.hub_id={data.hub_id} cannot be read from the Hub ({_one_line(error)}); without network, call "
            "save_to_disk where there is one and give its folder as data.path"
        ) from None
    yield from _splits(str(data.hub_id), found, data)


def _saved(data: DataConfig) -> Iterator[Part]:
    path = str(data.path)
    datasets = _datasets(f"data.path={path}")
    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"data.path={path} is no folder of save_to_disk ({_one_line(error)})") from None
    yield from _splits(str(data.path), found, data)


def _datasets(what: str) -> Any:
    require("hub", what)
    import datasets

    return datasets


def _splits(name: str, found: Any, data: DataConfig) -> Iterator[Part]:
    """A `datasets.DatasetDict` split by split, or a `datasets.Dataset`; rows stay on disk until they are read."""
    for split, rows in found.items() if isinstance(found, dict) else [(None, found)]:
        yield Part(f"{name} {split}" if split else name, split, _of_dataset(rows, data))


def _of_dataset(rows: Any, data: DataConfig) -> Items:
    wanted = _wanted(rows.column_names, data)
    if isinstance(wanted, Fault):
        yield wanted
        return
    number = 0
    try:
        for number, row in enumerate(rows.select_columns(wanted), start=1):
            yield f"row {number}", row
    except (ValueError, OverflowError) as error:
        yield Fault(f"not readable after row {number} ({_one_line(error)})", stops=True)


def unpaired(text: str) -> bool:
    """Whether a text has half of a character that takes two (a lone surrogate): JSON can write it, and nothing read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
