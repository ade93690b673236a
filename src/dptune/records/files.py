"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, text: str) -> Path:
    """Replace `path` by `text` in one step, on disk before it is visible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def write_once(path: Path, content: bytes) -> bool:
    """Create a file, which only its owner may read, with all of its content, unless it exists.

    Returns:
        Whether this call made it: of several processes the first one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.touch(mode=0o600)
    try:
        draft.write_bytes(content)
        sync(draft)
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


@contextmanager
def whole_folder(folder: Path, within: Path | None = None) -> Iterator[Path]:
    """An empty folder to fill, which then becomes `folder` in one step; nothing is left of it when filling it fails.

    Args:
        folder: what it becomes.
        within: where it is filled, on the same file system; None is beside `folder`.

    Raises:
        OSError: if `folder` is there by then, with something in it.
    """
    draft = (within or folder.parent) / f".{folder.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)  # Of a process that was killed and had the same number.
    draft.mkdir(parents=True)
    try:
        yield draft
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or for a folder the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
