"""Which files a path of the config stands for, and which split the name of a file says. No torch here."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Endings of files that can be read, however their letters are written; each but the last also with .gz."""

DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
"""Files that lie beside data on the Hub and hold none."""

SPLIT_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""What the splits are called in names of files and folders, as the library `datasets` has it."""

_SET = re.compile(r"(?<=.)(data)?(set|split)?$")
"""What may follow a word at once, as in testset."""
_SHARD = re.compile(r"-\d+-of-\d+$")


def data_files(path: str) -> list[Path]:
    """The files that `data.path` stands for, sorted: a file, all files of a folder, or those that a pattern matches."""
    if Path(path).is_dir():
        found = (file for file in Path(path).rglob("*") if file.is_file())
        return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if Path(path).is_file():
        return [Path(path)]
    return sorted(Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file())


def readable(path: str) -> list[Path]:
    """Those of `data_files` that hold rows; none of a folder of `save_to_disk`, which `datasets` reads by itself."""
    if is_saved(path):
        return []
    return [file for file in data_files(path) if ending(file) in ENDINGS and file.name not in DESCRIPTIONS]


def is_saved(path: str) -> bool:
    """Whether a folder was written by `save_to_disk` of the library `datasets`."""
    return any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def split_words(root: Path, file: Path) -> list[str]:
    """One word for each split that the name of a file says, or else its nearest folder inside `root`."""
    for part in (stem(file), *reversed(file.relative_to(root).parts[:-1])):
        words: dict[str, str] = {}
        for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", part):
            word = _SET.sub("", word.lower())
            if word in SPLIT_WORDS:
                words.setdefault(SPLIT_WORDS[word], word)
        if words:
            return list(words.values())
    return []


def ending(file: Path) -> str:
    """What kind of file it is by its name, without .gz."""
    suffix = file.suffix.lower()
    return file.with_suffix("").suffix.lower() if suffix == ".gz" else suffix


def stem(file: Path) -> str:
    """Name of a file without its endings and without the number of its part, as in `train-00000-of-00002.parquet`."""
    name = file.name[:-3] if file.suffix.lower() == ".gz" else file.name
    return _SHARD.sub("", Path(name).stem)


def file_splits(path: str, files: Sequence[Path], names: Mapping[str, str] | None) -> list[str | None]:
    """What the source calls the split of each file; None for all where the names say none, or nothing but `train`.

    Args:
        path: `data.path`.
        files: of it, those that can be read.
        names: the names of splits that the config gives; None when it gives none.

    Raises:
        ValueError: naming files whose split is not clear.
    """
    if len(files) < 2:
        return [None] * len(files)
    root = Path(path) if Path(path).is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    found: list[str | None] = []
    for file in files:
        words = split_words(root, file)
        asked = [name for name in (stem(file), *words, *(SPLIT_WORDS[word] for word in words)) if name in (names or ())]
        if len(words) > 1 and not asked:
            raise ValueError(f"{file} looks like {' and '.join(words)}; say which it is by its name")
        found.append(asked[0] if asked else SPLIT_WORDS[words[0]] if words else None)
    if None in found and any(found):
        named = next(file for file, split in zip(files, found, strict=True) if split is not None)
        raise ValueError(
            f"{named} looks like a split, but {files[found.index(None)]} like none; name every file train..., "
            "validation... or test..., map their names with data.splits, or choose files with a pattern in data.path"
        )
    return [None] * len(files) if set(found) == {"train"} and names is None else found
