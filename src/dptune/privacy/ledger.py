"""The write-ahead ledger: what a step will release is on disk before its data are touched (SPECIFICATION.md 10.4).

After a crash the ledger says which steps were begun. Doing a step again is free if nobody saw what it released, or with
the same keys, plan, data and code, because then the release is the same. The same noise with another plan or other data
would cancel out in a difference and is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose


class LedgerError(RuntimeError):
    """A step that must not be done: its noise was already used for something else."""


class WriteAheadLedger:
    """One JSON line for each step that was begun, over all attempts at a run."""

    def __init__(self, path: Path, plan: PrivacyPlan, keys: KeyRing, manifest: str, code: str = "") -> None:
        """Open or continue a ledger. A last line without an end was never begun, and is dropped.

        Args:
            path: the file; only ever appended to.
            plan: what is accounted for.
            keys: of this attempt; the ledger keeps hashes of them.
            manifest: names the data and the model that gradients come from.
            code: version of the code. Another version is another attempt, whose noise is the same only in reproducible
                mode, where it is published anyway.

        Raises:
            LedgerError: when a row cannot be read.
        """
        self.path, self.plan, self.keys, self.manifest, self.code = path, plan, keys, manifest, code
        self._sigmas = plan.noise_multipliers()
        content = path.read_bytes() if path.exists() else b""
        if torn := len(content) - (content.rfind(b"\n") + 1):
            os.truncate(path, len(content) - torn)
        try:
            self.rows: list[dict[str, Any]] = [json.loads(line) for line in content[: len(content) - torn].splitlines()]
            self._by_key = {row["noise_key"]: row for row in self.rows}
        except (ValueError, KeyError, TypeError):
            raise LedgerError(f"{path} is damaged: move the run's folder away and start it anew") from None

    def begin(self, step: int) -> None:
        """Write the row of a step; call it before the step's batch is drawn.

        Raises:
            LedgerError: when the step's noise was used before with another plan, other data or other batches.
        """
        row = {
            "step": step,
            "sample_rate": self.plan.sample_rate,
            "noise_multiplier": float(self._sigmas[step]),
            "plan": self.plan.fingerprint(),
            "sampling_key": self.keys.key_hash(Purpose.SAMPLING, step),
            "noise_key": self.keys.key_hash(Purpose.NOISE, step),
            "manifest": self.manifest,
            "code": self.code,
        }
        if (before := self._by_key.get(row["noise_key"])) is not None:
            changed = {name for name in row if row[name] != before.get(name, "")}
            if changed - {"code"}:
                raise LedgerError(
                    f"{self.path}: the noise of step {step} was used before with another {', '.join(sorted(changed))}; "
                    "use another seed, or fresh keys"
                )
            if not changed:
                return
        new = not self.rows
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            _sync_names(self.path.parent)
        self.rows.append(row)
        self._by_key[row["noise_key"]] = row

    @property
    def attempts(self) -> int:
        """How many different transcripts were begun; each counts as a run (SPECIFICATION.md 8)."""
        return sum(row["step"] == 0 for row in self.rows)


def _sync_names(folder: Path) -> None:
    """Wait until a new file's name is on the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def begun_steps(path: Path) -> list[dict[str, Any]]:
    """The rows of steps in a ledger, for whoever only reads it. A last line without an end was never begun.

    Raises:
        LedgerError: when a row cannot be read.
    """
    content = path.read_bytes() if path.exists() else b""
    try:
        rows = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
        steps: list[dict[str, Any]] = [row for row in rows if "checkpoint" not in row]
        if not all({"step", "sample_rate", "noise_multiplier"} <= row.keys() for row in steps):
            raise ValueError
    except (ValueError, TypeError, AttributeError):
        raise LedgerError(f"{path} is damaged: move the run's folder away and start it anew") from None
    return steps
