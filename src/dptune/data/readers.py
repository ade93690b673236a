"""From files and the Hub to rows, one at a time, so that memory does not grow with the file. No torch here.

A reader yields each row with its place ("line 3"), or a `Fault` in place of what cannot be read. A fault that is more
than one row's own, such as the end of what can be read, is marked as one that stops the run (SPECIFICATION.md 1.8).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from dptune.config.extras import require
from dptune.config.files import data_files
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


@dataclass(frozen=True)
class Part:
    """Rows that were read from one place."""

    name: str
    """File, or data set and split."""
    split: str | None
    """What the source calls the split, if the whole part belongs to one."""
    items: Items


def parts(data: DataConfig) -> Iterator[Part]:
    """Everything that `data.path` or `data.hub_id` names.

    Raises:
        DataError: when it cannot be opened at all.
    """
    if data.path is None:
        yield from _hub(data)
    elif any((Path(data.path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
        yield from _saved(data.path)
    else:
        yield from _files(data)


def _files(data: DataConfig) -> Iterator[Part]:
    files = data_files(str(data.path))
    known = [file for file in files if _kind(file) in READERS]
    if not known or (len(known) < len(files) and not Path(str(data.path)).is_dir()):
        wrong = next(file for file in files if _kind(file) not in READERS)
        raise DataError(f"{wrong}: not a kind of file that can be read; use {', '.join(READERS)} (or with .gz)")
    for file in known:
        # A folder may have one file a split: train.jsonl, test.jsonl.
        stem = file.name.partition(".")[0]
        split = stem if len(known) > 1 and stem in split_names(data) else None
        kind = _kind(file)
        by_line = {"by_line": True} if kind in (".csv", ".tsv") and data.on_bad == "skip" else {}
        yield Part(str(file), split, READERS[kind](file, **by_line))


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _opened(path: Path) -> IO[bytes]:
    # gzip.open gives a GzipFile, which has all of the IO that is used here.
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str] | Fault]:
    number = 0
    try:
        with _opened(path) as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield Fault(f"line {number} is not UTF-8 (byte {error.start + 1} of it); convert the file")
    except _UNREADABLE as error:
        yield Fault(f"not readable after line {number} ({error})", stops=True)


def _jsonl(path: Path) -> Items:
    for line in _lines(path):
        if isinstance(line, Fault):
            yield line
        elif line[1].strip():
            yield _json_row(f"line {line[0]}", line[1])


def _json_row(place: str, text: str) -> tuple[str, Row] | Fault:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Fault(f"{place} is not JSON ({error})")
    return (place, row) if isinstance(row, dict) else Fault(f"{place} is not a JSON object")


def _json(path: Path) -> Items:
    """An array of objects, each decoded by itself."""
    decode, gap = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    text, at, number, size = "", 0, 0, 1 << 16
    try:
        with _opened(path) as stream:
            chunks = codecs.iterdecode(iter(lambda: stream.read(size), b""), "utf-8-sig")
            text = next(chunks, "").lstrip()
            if not text.startswith("["):
                yield Fault("not an array of JSON objects; give one object a line the ending .jsonl", stops=True)
                return
            at = 1
            while True:
                at = _end(gap, text, at)
                if text.startswith("]", at):
                    return
                try:
                    row, end = decode(text, at)
                except json.JSONDecodeError as error:
                    more = next(chunks, "")
                    if not more or len(text) - at > _LONGEST_RECORD:
                        yield Fault(f"record {number + 1} is not JSON ({error.msg}); not readable after it", stops=True)
                        return
                    text, at, size = text[at:] + more, 0, 2 * size
                    continue
                number, at, size = number + 1, end, 1 << 16
                if isinstance(row, dict):
                    yield f"record {number}", row
                else:
                    yield Fault(f"record {number} is not a JSON object")
    except UnicodeDecodeError:
        yield Fault(f"not UTF-8 after record {number}; convert the file", stops=True)
    except RecursionError:
        yield Fault(f"record {number + 1} is nested too deeply; not readable after it", stops=True)
    except _UNREADABLE as error:
        yield Fault(f"not readable after record {number} ({error})", stops=True)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _csv(path: Path, *, by_line: bool = False) -> Items:
    """A header and rows of as many fields; an empty cell is the empty text.

    With `by_line` no row may run over lines: where bad rows are left out, a stray quote would decide on the rows up to
    the next quote, of whomever they are.
    """
    faults: list[Fault] = []

    def lines() -> Iterator[str]:
        for line in _lines(path):
            if isinstance(line, Fault):
                # A quoted field may hold the line break, so that rows cannot be told apart any more.
                faults.append(replace(line, stops=True))
                return
            yield line[1]

    reader = csv.reader(lines(), delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            yield Fault("line 1 names a field twice; no row can be read after it", stops=True)
            return
        before = reader.line_num
        for values in reader:
            place, first, before = f"line {reader.line_num}", before + 1, reader.line_num
            if by_line and before > first:
                yield Fault(f"{place} ends a quoted field that begins in line {first}; write JSON lines", stops=True)
                return
            if values and len(values) != len(header):
                yield Fault(f"{place} has {len(values)} fields but the header has {len(header)}")
            elif values:
                yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        yield Fault(f"line {reader.line_num} is not CSV ({error}); not readable after it", stops=True)
    yield from faults


def _parquet(path: Path) -> Items:
    require("hub", f"data.path={path}")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        # Pre-buffering would read all row groups ahead.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        yield Fault(f"not readable after row {number} ({_one_line(error)})", stops=True)


READERS: dict[str, Callable[..., Items]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def messages(items: Items) -> Items:
    """Conversation trees as pairs: what an assistant said (`output`) and the message it answers (`instruction`).

    A row has `message_tree_id`, `message_id`, `parent_id`, `role` and `text`, as in oasst1 (arXiv:2304.07327); rows of
    a tree follow each other, a message after the one that it answers. Its other fields stay.
    """
    tree, said = None, dict[str, str]()
    for item in items:
        if isinstance(item, Fault):
            yield item
            continue
        place, row = item
        missing = [name for name in ("message_tree_id", "message_id", "parent_id", "role", "text") if name not in row]
        if missing:
            yield Fault(f"{place}: field {missing[0]!r} is missing; data.layout=messages needs it")
            continue
        if row["message_tree_id"] != tree:
            tree, said = row["message_tree_id"], {}
        said[row["message_id"]] = row["text"]
        if row["role"] != "assistant":
            continue
        if row["parent_id"] in said:
            yield place, {**row, "instruction": said[row["parent_id"]], "output": row["text"]}
        else:
            yield Fault(f"{place}: field 'parent_id' names no message that stands before it in its tree", stops=True)


LAYOUTS: dict[str, Callable[[Items], Items]] = {"records": lambda items: items, "messages": messages}
