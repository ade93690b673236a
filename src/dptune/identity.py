"""What names a run: a hash of all that can change its numbers, data and model by their content. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import secrets
from collections.abc import Iterable
from pathlib import Path

from dptune.config.files import data_files, file_splits, readable
from dptune.config.schema import (
    CHECKSUMS,
    EMBEDDED,
    EMBEDDED_DATA,
    SHIPPED,
    Config,
    ConfigError,
    DataConfig,
    has_plain_hashes,
    public_sources,
    split_names,
)
from dptune.records.files import write_once

NOT_IDENTITY = ("compute", "tracking", "method", "sweep")
"""Parts of the config that do not name a run: they cannot change its numbers."""

KEY_FILE = ".fingerprint-key"
"""Name of the file that holds the key of hashes of private data and of checkpoints, in the output folder."""
KEY_BYTES = 32
PERMISSIONS = {"privacy": ("allow_known_noise",), "data": ("plain_hashes", "diagnostics")}
"""Fields that name a run only when they permit something: runs from before them keep their names."""


def run_id(config: Config) -> str:
    """Twelve hexadecimal digits that name a run: a hash of everything that can change its numbers.

    Defaults are hashed too. A data file or a model counts by its content, not by where it lies. A data file's hash is
    keyed by `local_key`, so that a published id tells nothing about the file.
    """
    identity = {key: value for key, value in dataclasses.asdict(config).items() if key not in NOT_IDENTITY}
    del identity["privacy"]["budget"]  # It decides whether a run may be done, and none of its numbers.
    if config.privacy.score_noise_multiplier is None:
        del identity["privacy"]["score_noise_multiplier"]  # Runs from before it keep their names.
    for name in ("declared_size", "declared_task_sizes", "declared_users"):
        if identity["data"][name] is None:
            del identity["data"][name]
    if identity["data"]["layout"] == "auto":
        # What it is else, the content says; runs from before it keep their names.
        identity["data"]["layout"] = "records"
    for name, default in (("examples_per_record", 1), ("field_names", None)):
        if identity["data"][name] == default:
            del identity["data"][name]
    if selects_by_content(config):
        identity["data"]["selection"] = "content"  # Runs from before it had other rows.
    for group, names in PERMISSIONS.items():
        for name in names:
            if not identity[group][name]:
                del identity[group][name]
    if config.model.path is not None:
        # The path is what is loaded; where the Hub has the same is not part of it.
        identity["model"] |= {"path": content_hash(Path(config.model.path)), "repo": None, "revision": None}
    elif config.model.repo is None and config.model.name in EMBEDDED:
        identity["model"]["path"] = content_hash(SHIPPED / config.model.name / CHECKSUMS)
    output_root = Path(config.compute.output_root)
    if config.data.path is not None:
        identity["data"] |= _files(config.data, output_root)
    if config.public.method == "none":
        del identity["public"]  # Runs from before it keep their names.
    else:
        sources = public_sources(config.public)
        identity["public"]["data"] = {
            name: dataclasses.asdict(source) | (_files(source, output_root) if source.path else {})
            for name, source in sources.items()
        }
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _files(data: DataConfig, output_root: Path) -> dict[str, object]:
    """What the files of a source are: their hash, keyed unless everybody may know them, and what their names say."""
    assert data.path is not None
    key = b"" if has_plain_hashes(data) else local_key(output_root)
    splits = file_splits(data.path, readable(data.path), split_names(data) if data.splits else None)
    found: dict[str, object] = {"path": keyed_hash(key, [content_hash(file) for file in data_files(data.path)])}
    return found | ({"file_splits": splits} if any(splits) else {})


def selects_by_content(config: Config) -> bool:
    """Whether training rows are a share of all, or their copies cost more: both once were otherwise."""
    data, condition = config.data, config.data_sensitivity
    cut = data.name not in EMBEDDED_DATA and data.train_size is not None
    return cut or data.task_weights is not None or condition.train_fraction < 1 or condition.duplicates > 0


def local_key(output_root: Path) -> bytes:
    """32 secret bytes that stay beside the runs, kept from the first run on; until then those of this process.

    A plain hash of private records is an exact function of them: whoever knows all records but one could test guesses
    of that one. What is published therefore carries hashes under this key. Checkpoints are signed with it.

    Raises:
        ConfigError: when the file holds something else.
    """
    path = output_root / KEY_FILE
    try:
        key = path.read_bytes()
    except FileNotFoundError:
        return _new_key(output_root.absolute())
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{path} must have {KEY_BYTES} bytes: restore it, or use another compute.output_root")
    return key


def kept_key(output_root: Path) -> bytes:
    """The same, written to its file if it is not there yet."""
    path = output_root / KEY_FILE
    if not path.exists():
        write_once(path, _new_key(output_root.absolute()))
    return local_key(output_root)


def keep_local_key(config: Config) -> bool:
    """Write the key that names runs on private data, once and for all; what makes runs calls it before it makes any.

    Returns:
        Whether another process was faster, so that names that this one has given already no longer hold.
    """
    output_root = Path(config.compute.output_root)
    keyed = not all(map(has_plain_hashes, (config.data, *public_sources(config.public).values())))
    return keyed and local_key(output_root) != kept_key(output_root)


@functools.cache
def _new_key(output_root: Path) -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def keyed_hash(key: bytes, parts: Iterable[str]) -> str:
    """Sixteen hexadecimal digits of some texts; an empty key makes a plain hash."""
    digest = hashlib.blake2b(key=key, digest_size=8)
    for part in parts:
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file, or of a model folder by its small files and the head and tail of its large ones."""
    files = [path] if path.is_file() else sorted(item for item in path.iterdir() if item.is_file())
    return _hash_of(path, tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=64)
def _hash_of(path: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """The hash of some files as they are at these sizes and times of change."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{file.name if file != path else ''} {size} ".encode())
        with file.open("rb") as stream:
            if file == path or size < 1 << 24:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                # Weights of a trained model differ everywhere; reading gigabytes to name a run would be slow.
                digest.update(stream.read(1 << 22))
                stream.seek(-(1 << 22), 2)
                digest.update(stream.read())
    return digest.hexdigest()
