"""Version of the code that makes numbers, words not counted."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@functools.cache
def code_version() -> str:
    """Twelve hexadecimal digits of the source files that can change a run's numbers, as they are at the first call."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in NOT_NUMBERS:
            digest.update(f"{name.as_posix()} {path.stat().st_size} ".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


NOT_NUMBERS = (
    *("report", "cli.py", "sweep.py", "search.py", "status.py", "tracking.py", "lease.py", "sync.py"),
    *("progress.py", "watch.py", "slurm.py", "installation.py", "extras.py"),
)
"""Parts of the package that only look at runs, or decide when they are done."""
