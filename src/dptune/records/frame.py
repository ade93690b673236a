"""Many records as one pandas frame."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
from dptune.privacy.guarantee import Guarantee
from dptune.records.record import RECORD_FILE, Cost, Metrics, Parameters, Privacy, RecordError, RunRecord, read


@dataclass(frozen=True)
class Collection:
    """What lies in an output folder."""

    records: tuple[RunRecord, ...]
    """Records that can be read, in the order of their run ids."""
    unreadable: tuple[str, ...] = ()
    """One line for each record that was left out: its path and the reason."""


def collect(root: Path) -> Collection:
    """All records below `root`; those that cannot be read are named, not hidden."""
    records: dict[str, RunRecord] = {}
    unreadable = []
    with without_collector():
        for folder in sorted(str(path.parent) for path in root.glob(f"*/{RECORD_FILE}")):
            try:
                record = read(Path(folder))
            except RecordError as error:
                unreadable.append(str(error))
                continue
            if record is not None and records.setdefault(record.run_id, record) is not record:
                unreadable.append(f"{folder}/{RECORD_FILE}: a copy of run {record.run_id}, which would count twice")
    return Collection(tuple(records.values()), tuple(unreadable))


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause the search for reference cycles: many records have none, and looking for them takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_all(root: Path) -> list[RunRecord]:
    """All records below `root`, in the order of their names; a corrupt one is left out with a warning."""
    found = collect(root)
    for reason in found.unreadable:
        warnings.warn(f"left out {reason}", stacklevel=2)
    return list(found.records)


def to_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row a run; nested names are joined by dots (`metrics.accuracy`, `config.hyperparameter.rank`).

    Parts that are read as such and would be many columns stay whole, such as `privacy.groups` and `privacy.plan`.
    """
    import pandas as pd

    with without_collector():
        return pd.DataFrame(dict(_columns([vars(record) for record in records])))


def _columns(parts: Sequence[Mapping[str, Any]], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Name and values of each column below some parts of records: by column, which is faster than by record."""
    shapes = {tuple(part): None for part in parts}
    for key in dict.fromkeys(key for shape in shapes for key in shape):
        name, values = prefix + key, [part.get(key) for part in parts]
        kinds = set(map(type, values))
        nested = kinds & _NESTED if name not in _WHOLE else set()
        if not nested:
            yield name, values
            continue
        if kinds - nested - {NoneType}:
            yield name, [None if type(value) in nested else value for value in values]
        yield from _columns([_inside(value) for value in values], name + ".")


def _inside(value: Any) -> Mapping[str, Any]:
    """What lies below a value; nothing below a number, a text or null."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Parameters):
        return vars(value) | {"fraction": value.fraction}
    return vars(value) if type(value) in _NESTED else {}


_NESTED = {dict, Metrics, Privacy, Guarantee, Parameters, Cost}


_WHOLE = (
    "privacy.groups",
    "privacy.plan",
    "guarantee.accountants",
    "provenance.versions",
    "provenance.lock",
    "config.data.columns",
    "config.public.data",
    "provenance.public.sources",
)
