"""Where the numbers of a run come from: commit, code, packages, data, backbone, seed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dptune.config.schema import Config
from dptune.installation import unlike_lock
from dptune.records.code import code_version
from dptune.records.files import write_atomically
from dptune.records.record import COST_FILE, Cost
from dptune.runs.setup import Setup


def provenance(config: Config, setup: Setup, overrides: Sequence[str]) -> dict[str, Any]:
    """Where the numbers come from."""
    seen = setup.data.seen.layout
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "overrides": list(overrides),
        "git": git_commit(),
        "code": code_version(),
        "versions": versions(),
        "lock": unlike_lock(),
        "data": setup.data.fingerprint,
        "backbone": setup.backbone.fingerprint,
        "engine": setup.path.engine,
        "seed": config.environment.seed,
        **({} if seen in (None, config.data.layout) else {"layout": seen}),
        **({} if setup.start is None else {"public": setup.start.to_dict()}),
    }


def keep_cost(cost: Cost, folder: Path, public: bool) -> Cost | None:
    """What the record may say a run cost, which of private data is nothing: the exact number is in a file beside it.

    How long steps take, and how much memory, depends on the batches that were drawn.
    """
    path = folder / COST_FILE
    if public:
        path.unlink(missing_ok=True)  # Left by an earlier attempt.
        return cost
    write_atomically(path, json.dumps(dataclasses.asdict(cost), indent=1) + "\n")
    return None


def versions() -> dict[str, str]:
    """Versions of what computes the numbers, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


PACKAGES = ("dptune", "torch", "transformers", "peft", "opacus", "dp-accounting", "hydra-core", "numpy")


@functools.cache
def git_commit() -> str | None:
    """Commit of the code, with `+` when the working tree differs; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")


def peak_memory_mb(device: str) -> float:
    """Peak device memory on a GPU, else the peak resident memory of this process, in MiB."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
