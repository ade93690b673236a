"""Folders that are made once, each in one piece, by one of the processes that want them."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from dptune.records.files import whole_folder


def made_once(cache_dir: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of a cache; made when the cache does not hold it.

    It appears in one piece. Of several processes that ask at once one makes it and the others wait.

    Args:
        cache_dir: folder of the cache; made when missing.
        name: name of the folder, with a hash of all that decides its content.
        make: fills the empty folder that it is given.
    """
    folder = cache_dir / name
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(cache_dir / f"{name}.lock"):
        if folder.is_dir():
            return folder
        with whole_folder(folder) as draft:
            make(draft)
    return folder
