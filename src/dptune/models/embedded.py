"""The embedded backbones, shipped with the package: the same weights, and so the same runs, on every machine.

`dptune.runs.pretraining` made them from public records alone, so that using them costs no privacy budget; the model
card in each folder has the recipe.
"""

import functools
import hashlib
from pathlib import Path

from dptune.config.schema import CHECKSUMS, SHIPPED, ConfigError


@functools.cache
def folder_of(name: str) -> Path:
    """Folder of an embedded backbone in Hugging Face format, its files compared with their checksums.

    Raises:
        ConfigError: when a file is missing or is not as it was shipped.
    """
    folder = SHIPPED / name
    for file, expected in checksums(folder).items():
        path = folder / file
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ConfigError(f"model={name}: {path} is not as it was shipped; install dptune again, or check it out")
    return folder


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that decides numbers, as written down beside them in the format of `sha256sum`."""
    lines = (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines()
    return {file: digest for digest, file in (line.split("  ", 1) for line in lines)}
