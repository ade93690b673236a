"""Which files a path of the config stands for."""

from __future__ import annotations

import glob
from pathlib import Path


def data_files(path: str) -> list[Path]:
    """The files that `data.path` stands for, sorted: a file, all files of a folder, or those that a pattern matches."""
    if Path(path).is_dir():
        return sorted(file for file in Path(path).rglob("*") if file.is_file() and not file.name.startswith("."))
    if Path(path).is_file():
        return [Path(path)]
    return sorted(Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file())
