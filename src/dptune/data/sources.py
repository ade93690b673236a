"""Where instructions come from: name -> function. No torch here."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from dptune.config import ColumnsConfig, Config, ConfigError, DataConfig, keyed_hash, local_key
from dptune.data.conditions import apply, subset
from dptune.data.schema import Example

SPLITS = ("train", "validation", "test")


class DataError(ConfigError):
    """Data that cannot be used: file, line, field, and what to do."""


@dataclass(frozen=True)
class Dataset:
    """The three splits of one run."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    public: bool
    """The records are a public stand-in; epsilon is stated as if they were private."""

    key: bytes = field(default=b"", repr=False)
    """Secret key of the fingerprint of private records."""

    @property
    def fingerprint(self) -> str:
        """Hash of all records in their order, keyed if they are private."""
        splits = (self.train, self.validation, self.test)
        return keyed_hash(self.key, (json.dumps(astuple(example)) for split in splits for example in split))


def load(config: Config) -> Dataset:
    """The data of a run, with its conditions applied to the training split.

    Raises:
        DataError: naming file, line and field, or the split that is empty.
    """
    data = config.data
    splits = SOURCES[data.name](data)
    sizes = {"train": data.train_size, "validation": data.validation_size, "test": data.test_size}
    chosen: dict[str, list[Example]] = {}
    for split in SPLITS:
        examples = splits.get(split, [])
        if data.tasks is not None:
            unknown = set(data.tasks) - {item.task for part in splits.values() for item in part}
            if unknown:
                raise DataError(f"data.tasks: no record has the task {', '.join(sorted(unknown))}")
            examples = [example for example in examples if example.task in data.tasks]
        size = sizes[split]
        chosen[split] = subset(examples, len(examples) if size is None else size, data.seed)
    chosen["train"] = apply(chosen["train"], config.data_sensitivity, data.seed)
    for split in ("train", "test"):
        if not chosen[split]:
            where = data.path or data.name
            raise DataError(
                f"{where}: the {split} split is empty; give it records or change data.tasks and data.{split}_size"
            )
    public = data.path is None
    key = b"" if public else local_key(Path(config.compute.output_root))
    return Dataset(**chosen, public=public, key=key)


def supportdesk(data: DataConfig) -> dict[str, list[Example]]:
    """The embedded customer-support desk."""
    from dptune.data.supportdesk import generate

    sizes = {
        split: size
        for split, size in zip(SPLITS, (data.train_size, data.validation_size, data.test_size), strict=True)
        if size is not None
    }
    return generate(data.organisation, data.seed, **sizes)


def jsonl(data: DataConfig) -> dict[str, list[Example]]:
    """A JSON Lines file, plain or gzip, read line by line."""
    path = Path(str(data.path))
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is not a JSON object")
        example = _example(row, data.columns, f"{path}: line {number}")
        splits[example.split].append(example)
    return splits


SOURCES: dict[str, Callable[[DataConfig], dict[str, list[Example]]]] = {
    "supportdesk": supportdesk,
    "jsonl": jsonl,
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError:
        raise DataError(f"{path}: line {number + 1} is not UTF-8; convert the file") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: not readable after line {number} ({error})") from None


def _example(row: dict[str, Any], columns: ColumnsConfig, where: str) -> Example:
    def text(column: str, default: str | None = None) -> str:
        value = row.get(column, default)
        if value is None:
            raise DataError(f"{where}: field {column!r} is missing; map it with data.columns.{_role(columns, column)}")
        if not isinstance(value, str):
            raise DataError(f"{where}: field {column!r} is not text")
        return value

    options = row.get(columns.options)
    output = text(columns.output).strip()
    if not output:
        raise DataError(f"{where}: field {columns.output!r} is empty")
    if options is not None:
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise DataError(f"{where}: field {columns.options!r} is not a list of texts")
        options = tuple(option.strip() for option in options)
        if output not in options:
            raise DataError(f"{where}: field {columns.output!r} is not among the options")
    instruction, body = text(columns.instruction), text(columns.input, "")
    user = row.get(columns.user)
    split = row.get(columns.split)
    if split is None:
        # 80 / 10 / 10 by the record's own content: adding a record moves no other.
        digit = hashlib.sha256(f"{instruction}\0{body}\0{output}".encode()).digest()[0]
        split = "test" if digit < 26 else "validation" if digit < 51 else "train"
    if split not in SPLITS:
        raise DataError(f"{where}: field {columns.split!r} is {split!r}, not one of {', '.join(SPLITS)}")
    return Example(
        task=text(columns.task, "instructions"),
        instruction=instruction,
        input=body,
        options=options,
        output=output,
        user=None if user is None else str(user),
        split=split,
    )


def _role(columns: ColumnsConfig, column: str) -> str:
    return next(role for role, name in vars(columns).items() if name == column) + "=..."
