"""The runs of a sweep, and a memory of them: composing hundreds of configs takes seconds, reading them a moment."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dptune.config.checks import from_values
from dptune.config.schema import Config
from dptune.records.files import write_atomically

ROOT = next(folder for folder in (Path(__file__).parents[1], Path(__file__).parents[3]) if (folder / "conf").is_dir())
"""Where `conf/` and `sweeps/` lie: in the repository, or inside an installed package."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    run_id: str
    config: Config
    overrides: tuple[str, ...]
    """All overrides, as given to Hydra."""
    varied: tuple[str, ...]
    """What sets it apart: those that take several values, in the file or on the command line, and those of its axis."""
    is_search: bool = False
    """It is the run that a search releases: its config is known when the search is finished."""

    @property
    def setting(self) -> str:
        """What sets it apart, for people: the last part of each name, the seed at the end."""
        items = [item.lstrip("+~").partition("=") for item in self.varied]
        words = [f"{name.rpartition('.')[2]}{equals}{value}" for name, equals, value in items]
        return ", ".join(sorted(words, key=lambda word: word.startswith("seed=")))


def remembered(cache: Path, asked: Sequence[str], expand: Callable[[], list[Job]]) -> list[Job]:
    """The jobs that `expand` gives, or gave when the same was asked for with the same files and code.

    Names that follow the content of a file of the user's are not remembered.
    """
    path = cache / f"{_state_of(asked)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # None yet, or a damaged one.
        return [_job(values) for values in json.loads(path.read_text(encoding="utf-8"))]
    jobs = expand()
    configs = [job.config for job in jobs]
    paths = [config.model.path for config in configs]
    paths += [source.path for config in configs for source in (config.data, *config.public.data.values())]
    if not any(paths):
        with contextlib.suppress(OSError):  # A folder that cannot be written costs time, nothing else.
            write_atomically(path, json.dumps([asdict(job) for job in jobs]))
    return jobs


def _job(values: dict[str, Any]) -> Job:
    lists = {name: tuple(values[name]) for name in ("overrides", "varied")}
    return Job(**{**values, **lists, "config": from_values(values["config"])})


def _state_of(asked: Sequence[str]) -> str:
    """Hash of everything that decides what a sweep consists of."""
    versions = [importlib.metadata.version(name) for name in ("hydra-core", "omegaconf")]
    digest = hashlib.sha256(json.dumps([*asked, versions]).encode())
    package = Path(__file__).parents[1]
    sources = [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml"), package / "identity.py"]
    sources += [*(package / "config").glob("*.py"), *(package / "sweeps").glob("*.py")]
    shipped = (package / "models" / "shipped").glob("*/SHA256SUMS")
    for path in sorted({*sources, *shipped}):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:24]
