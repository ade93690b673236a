"""The write-ahead ledger: what a step will release is on disk before its data are touched (SPECIFICATION.md 10.4).

After a crash the ledger says which steps may have been observed. Doing a step again is free only with the same keys,
plan and data, because then the release is the same; the same noise with anything else would cancel out in a difference
and is refused.
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

    def __init__(self, path: Path, plan: PrivacyPlan, keys: KeyRing, manifest: str) -> None:
        """Open or continue a ledger.

        Args:
            path: the file; only ever appended to.
            plan: what is accounted for.
            keys: of this attempt; the ledger keeps hashes of them.
            manifest: names the data, the model and the code that gradients come from.

        Raises:
            LedgerError: when a row cannot be read.
        """
        self.path, self.plan, self.keys, self.manifest = path, plan, keys, manifest
        self._sigmas = plan.noise_multipliers()
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        except ValueError:
            raise LedgerError(f"{path} is damaged: move the run's folder away and start it anew") from None
        self._by_key = {row["noise_key"]: row for row in self.rows}

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
        }
        if (before := self._by_key.get(row["noise_key"])) is not None:
            if before != row:
                changed = ", ".join(sorted(name for name in row if row[name] != before[name]))
                raise LedgerError(
                    f"{self.path}: the noise of step {step} was used before with another {changed}; "
                    "use another seed, or fresh keys"
                )
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.append(row)
        self._by_key[row["noise_key"]] = row

    @property
    def attempts(self) -> int:
        """How many different transcripts were begun; each counts as a run (SPECIFICATION.md 8)."""
        return sum(row["step"] == 0 for row in self.rows)
