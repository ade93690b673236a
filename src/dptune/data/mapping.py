"""From a row to an example: which field holds what, fixed texts and options, and the split. No torch here."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from dptune.config.files import SPLIT_WORDS
from dptune.config.schema import SPLITS, ColumnsConfig, DataConfig, split_names
from dptune.data.layouts import PART, RECORD, TURNS
from dptune.data.readers import HOLE, Row, unpaired
from dptune.data.schema import Example

_WHOLE = re.compile(r"^(-?(?:0|[1-9][0-9]*))\.0+$")


class BadRecord(ValueError):
    """What is wrong with a record, beginning with its field; a row of a data file that makes no example."""


class MissingField(BadRecord):
    """A field that the record should have, and has not."""


_NO_USER = frozenset(("", "nan", "NaN", "NAN", "NaT", "None", "null", "NULL", "<NA>"))
"""What programs write where there is no value."""


def user_name(value: Any) -> str | None:
    """The one name of a user, however a source writes it; None where it says nothing.

    A number is the same as text and as another type of number (7, 7.0, "7.0"), a letter the same however it is composed
    (Unicode NFKC), and spaces at the ends and invisible characters count for nothing. "007" is not 7: it is a code.
    """
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return None
    if isinstance(value, float):
        value = int(value) if value == int(value) else value
    elif isinstance(value, Decimal):
        value = format(value, "f")
    text = "".join(letter for letter in str("" if value is None else value) if unicodedata.category(letter) != "Cf")
    text = unicodedata.normalize("NFKC", " ".join(unicodedata.normalize("NFKC", text).split()))
    text = _WHOLE.sub(r"\1", text)
    return None if text in _NO_USER else "0" if text == "-0" else text


class ColumnMapping:
    """The rules of a config, applied row by row."""

    def __init__(self, data: DataConfig):
        self._data, self._splits = data, split_names(data)
        self._options = None if data.options is None else tuple(option.strip() for option in data.options)
        defaults = ColumnsConfig()
        self._named = {
            column: role
            for role, column in vars(data.columns).items()
            if column is not None and column != getattr(defaults, role) and not column.startswith("=")
        }

    def example(self, row: Row, split: str | None) -> Example | None:
        """The example of a row, or None if it is in a split that is left out.

        Args:
            row: one row of the source.
            split: what the source calls the split of all its rows, if it says; a field of the row goes first.

        Raises:
            BadRecord: naming the field.
        """
        columns = self._data.columns
        named = _text(row, columns.split, "split") or split
        if named is not None:
            named = self._split(named, columns.split)
            if named is None:
                return None
        for column, role in self._named.items():
            if not _has(row, column):
                raise MissingField(
                    f"field {column!r} is missing, but data.columns.{role} names it; the row has {_names(row)}"
                )
        instruction = self._required(row, "instruction")
        options = self._options_of(row)
        output = self._output(row, options)
        body = _text(row, columns.input, "input") or ""
        user = _user(row, columns.user)
        return Example(
            # Task, instruction and user are the same for many records: keep one text of each.
            task=sys.intern(_text(row, columns.task, "task") or "instructions"),
            instruction=sys.intern(instruction),
            input=body,
            options=options,
            output=output,
            user=None if user is None else sys.intern(user),
            split=self._hashed(row, instruction, body, output, user) if named in (None, "hash") else str(named),
            # Unless the config puts something else together from the fields of the row.
            turns=row.get(TURNS, ()) if instruction == row.get("instruction") and not body else (),
        )

    def identifier(self, row: Row) -> Any:
        """Identifier of the row, None if the records have none. Raises BadRecord when this one lacks it."""
        if self._data.columns.id is None:
            return None
        value = _value(row, self._data.columns.id)
        if value is None:
            raise BadRecord(f"field {self._data.columns.id!r} is missing; data.columns.id names it")
        return (value, row[PART]) if row.get(PART) else value

    def _required(self, row: Row, role: str) -> str:
        column = getattr(self._data.columns, role)
        value = _text(row, column, role)
        if value is None:
            raise MissingField(
                f"field {column!r} is missing; map it with data.columns.{role}=...; the row has {_names(row)}"
            )
        if not value.strip():
            raise BadRecord(f"field {column!r} is empty")
        return value

    def _split(self, name: str, column: str) -> str | None:
        if self._data.splits is not None:
            return self._splits.get(name)
        if (ours := SPLIT_WORDS.get(name.strip().lower())) is None:
            raise BadRecord(f"field {column!r} is {name!r}, not one of {', '.join(SPLITS)}; map it with data.splits")
        return ours

    def _hashed(self, row: Row, instruction: str, body: str, output: str, user: str | None) -> str:
        if self._data.split_by == "user":
            if user is None:
                raise BadRecord(
                    f"field {self._data.columns.user!r} is missing; data.split_by=user needs the author, "
                    "map it with data.columns.user"
                )
            content = f"user {user}"
        else:
            # Examples of one record stay together.
            content = row.get(RECORD) or f"{instruction}\0{body}\0{output}"
        digit = hashlib.sha256(content.encode()).digest()[0]
        return "test" if digit < 26 else "validation" if digit < 51 else "train"

    def _options_of(self, row: Row) -> tuple[str, ...] | None:
        column = self._data.columns.options
        options = _value(row, column)
        if options is None or options == "":
            return self._options
        if isinstance(options, str) and options.startswith("["):  # A cell of a CSV file.
            try:
                options = json.loads(options)
            except (ValueError, RecursionError):
                raise BadRecord(f"field {column!r} is not a JSON list of texts") from None
        if not isinstance(options, Sequence) or isinstance(options, str):
            raise BadRecord(f"field {column!r} is not a list of texts")
        if not options or not all(isinstance(option, str) for option in options):
            raise BadRecord(f"field {column!r} is not a list of one or more texts")
        if any(map(unpaired, options)):
            raise BadRecord(f"field {column!r} {_HALF}")
        return _shared(tuple(option.strip() for option in options))

    def _output(self, row: Row, options: tuple[str, ...] | None) -> str:
        column = self._data.columns.output
        value = _value(row, column)
        if options is not None and value is not None:
            # Text files have no integers; there only the fixed options of a label column are counted.
            digits = options is self._options and isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value)
            if (isinstance(value, int) and not isinstance(value, bool)) or (digits and value.strip() not in options):
                if not 0 <= int(value) < len(options):
                    raise BadRecord(f"field {column!r} is {value}, which is no position among {len(options)} options")
                return options[int(value)]
        output = self._required(row, "output").strip()
        if options is None:
            return output
        if output not in options:
            raise BadRecord(f"field {column!r} is not among the options")
        return options[options.index(output)]


@functools.lru_cache(maxsize=1024)
def _shared(options: tuple[str, ...]) -> tuple[str, ...]:
    """The same options as one object, so that a million records do not hold a million of them."""
    return options


def _value(row: Row, column: str) -> Any:
    """Field of a row, or the text of a `=` column; None when there is none."""
    if not column.startswith("="):
        return _field(row, column)

    def fill(hole: re.Match[str]) -> str:
        value = _field(row, hole[1])
        if value is None:
            raise MissingField(
                f"field {hole[1]!r} is missing, but the text {column!r} needs it; the row has {_names(row)}"
            )
        return str(value)

    return HOLE.sub(fill, column[1:]) or None


def _field(row: Row, name: str) -> Any:
    """A field by its name, or by names with dots between, where a number counts in a list; None when there is none."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for step in name.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _has(row: Row, name: str) -> bool:
    """Whether a row has a field; of nested fields, whether it has the first."""
    return name in row or name.partition(".")[0] in row


def _user(row: Row, column: str) -> str | None:
    """Name of the user; of a text with fields, each field is a name, and nobody if one of them is."""
    value = _value(row, column)
    if column.startswith("="):
        parts = {name: user_name(_field(row, name)) for name in HOLE.findall(column)}
        value = None if None in parts.values() else HOLE.sub(lambda hole: str(parts[hole[1]]), column[1:])
    if isinstance(value, str) and unpaired(value):
        raise BadRecord(f"field {column!r} {_HALF}")
    return user_name(value)


def _text(row: Row, column: str, role: str) -> str | None:
    value = _value(row, column)
    if value is not None and not isinstance(value, str):
        raise BadRecord(f"field {column!r} is not text; data.columns.{role} must name a text")
    if value is not None and unpaired(value):
        raise BadRecord(f"field {column!r} {_HALF}")
    return value


_HALF = "has half a character (a lone surrogate); repair its text"


def _names(row: Row) -> str:
    return ", ".join(sorted(name for name in map(str, row) if not name.startswith("\0"))[:12]) or "no field"
