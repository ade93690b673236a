"""Slurm without accounting: what submitit asks `sacct` every few seconds has no answer there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable


def be_quiet_without_accounting(say: Callable[[str], None]) -> None:
    """Ask `sacct` once; where it fails, say so in one line and let submitit ask no more.

    Each of its questions would print three lines of error. Runs that end are seen by the files that they leave.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    try:
        command = ["sacct", "--parsable2", "--format=JobID", "--jobs=1"]
        subprocess.run(command, capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        say("this cluster keeps no accounting (sacct fails): a job that dies without a word is not noticed here")

        class Silent(SlurmInfoWatcher):
            """Knows nothing of the state of jobs."""

            def update(self) -> None:
                """Ask nobody."""

        SlurmJob.watcher = Silent()
