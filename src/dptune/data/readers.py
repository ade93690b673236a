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
from dptune.config.files import ENDINGS, data_files, ending, file_splits, is_saved, readable
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
        yield from _saved(data.path)
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
            yield _json_row(f"line {line[0]}", line[1])


def _json_row(place: str, text: str) -> tuple[str, Row] | Fault:
    try:
        row = _DECODER.decode(text)
    except ValueError as error:
        return Fault(f"{place} is not JSON ({error})")
    except RecursionError:
        return Fault(f"{place} is nested too deeply to be read; leave out the field with so many brackets")
    return (place, row) if isinstance(row, dict) else Fault(f"{place} is not a JSON object")


def _integer(digits: str) -> int | Decimal:
    """A JSON integer; of thousands of digits a Decimal, which is no text, no option and no user that can be named."""
    return int(digits) if len(digits) <= _LONGEST_INTEGER else Decimal(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


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
                elif isinstance(row, dict):
                    yield f"record {number}", row
                else:
                    yield Fault(f"record {number} is not a JSON object")
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
    if after.strip() and not isinstance(_json_row("", first), Fault):
        yield from _jsonl(path, data)
        return
    try:
        whole = _DECODER.decode("".join(chain([start], rest)))
    except ValueError as error:
        yield Fault(f"not JSON ({error})", stops=True)
        return
    except RecursionError:
        yield Fault("nested too deeply to be read; leave out the field with so many brackets", stops=True)
        return
    rows = rows_of(whole, data, path.name.partition(".")[0])
    if rows is None:
        yield Fault(
            "one JSON object, in which no list of records was found; give an array of objects, or one object a line",
            stops=True,
        )
        return
    for number, row in enumerate(rows, start=1):
        yield (f"record {number}", row) if isinstance(row, dict) else Fault(f"record {number} is not a JSON object")


def rows_of(whole: Any, data: DataConfig, name: str) -> list[Any] | None:
    """The rows that one JSON object holds; None if it is not seen where.

    A task of Natural Instructions (each instance with the task's definition and name), a list under `data` as in SQuAD,
    fields each with a list of values, and what pandas' `to_json` writes by its orients columns, index, split and table.
    """
    if not isinstance(whole, dict):
        return None
    if isinstance(instances := whole.get("Instances"), list) and "Definition" in whole:
        return [{"task": name, "Definition": whole["Definition"], **row} for row in instances if isinstance(row, dict)]
    values = list(whole.values())
    if isinstance(table := whole.get("data"), list):
        if isinstance(names := whole.get("columns"), list):
            return [dict(zip(map(str, names), row, strict=True)) if len(row) == len(names) else row for row in table]
        return table
    if values and all(isinstance(value, list) for value in values):
        if len({len(value) for value in values}) == 1 and not all(isinstance(item, dict) for item in chain(*values)):
            return [dict(zip(whole, row, strict=True)) for row in zip(*values, strict=True)]
        return None
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
    tab or a doubled quote inside, or for a line break, after which the next line is no row by itself.
    """
    header, open_since, text = data.field_names, 0, ""
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\n").removesuffix("\r")
        if not header:
            header = [_unquoted(field) for field in line.split("\t")]
            if len(set(header)) < len(header):
                yield Fault(f"line 1 names a field twice, no row can be read after it; {HEADERLESS}", stops=True)
                return
            continue
        if open_since:
            fields = _tab_fields(joined := f"{text}\n{line}", len(header))
            short = len(_tab_fields(text, len(header))) < len(header)
            if line.count("\t") + 1 == len(header) and not (short and len(fields) == len(header)):
                # A row by itself: what opened before was a letter.
                yield _tab_row(open_since, text, header)
                open_since, text = 0, ""
            elif data.on_bad == "skip":
                yield Fault(f"line {open_since} opens a quote that does not end in it; write JSON lines", stops=True)
                return
            elif _opens_a_quote(fields[-1]):
                text = joined
                continue
            else:
                yield _tab_row(number, joined, header)
                open_since, text = 0, ""
                continue
        fields = _tab_fields(line, len(header))
        if len(fields) <= len(header) and _opens_a_quote(fields[-1]):
            open_since, text = number, line
        elif line:
            yield _tab_row(number, line, header)
    if open_since:
        yield _tab_row(open_since, text, header or [])


def _tab_row(number: int, text: str, header: Sequence[str]) -> tuple[str, Row] | Fault:
    fields = _tab_fields(text, len(header))
    if len(fields) != len(header) or ("\n" in text and _opens_a_quote(fields[-1])):
        opens = ", and a quote that opens in it does not end" if _opens_a_quote(fields[-1]) else ""
        return Fault(f"line {number} has {len(fields)} fields but the header has {len(header)}{opens}")
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
    """The fields that the config or a layout asks for; all where one that a record must have is missing."""
    require("hub", f"data.path={path}")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # Pre-buffering would read all row groups ahead.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in named_fields(data) or name in LAYOUT_FIELDS]
            for batch in file.iter_batches(batch_size=256, columns=wanted if _complete(wanted, data) else None):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        yield Fault(f"not readable after row {number} ({_one_line(error)})", stops=True)


LAYOUT_FIELDS = frozenset(
    (
        *("messages", "conversations", "system", "prompt", "completion", "message_tree_id", "message_id", "parent_id"),
        *("role", "text", "paragraphs", "title", "Definition", "input", "output"),
    )
)
"""Fields that a layout may need besides those that the config names."""


def _complete(fields: Sequence[str], data: DataConfig) -> bool:
    """Whether a record can be made of these fields: its instruction and output, or a layout's own."""
    own = {"messages", "conversations", "completion", "message_tree_id", "paragraphs", "Definition"}
    needed = (data.columns.instruction, data.columns.output)
    return bool(own & {*fields}) or all(name.startswith("=") or name.partition(".")[0] in fields for name in needed)


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
    yield from _splits(str(data.hub_id), found)


def _saved(path: str) -> Iterator[Part]:
    datasets = _datasets(f"data.path={path}")
    try:
        found = datasets.load_from_disk(path)
    except (OSError, ValueError, LookupError) as error:
        raise DataError(f"data.path={path} is no folder of save_to_disk ({_one_line(error)})") from None
    yield from _splits(path, found)


def _datasets(what: str) -> Any:
    require("hub", what)
    import datasets

    return datasets


def _splits(name: str, found: Any) -> Iterator[Part]:
    """A `datasets.DatasetDict` split by split, or a `datasets.Dataset`; rows stay on disk until they are read."""
    for split, rows in found.items() if isinstance(found, dict) else [(None, found)]:
        items = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        yield Part(f"{name} {split}" if split else name, split, items)


def unpaired(text: str) -> bool:
    """Whether a text has half of a character that takes two (a lone surrogate): JSON can write it, and nothing read."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
