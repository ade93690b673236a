"""The write-ahead ledger: what a step will release is on disk before its data are touched (SPECIFICATION.md 10.4).

After a crash the ledger says which steps were begun, and which of them are in a checkpoint, so that somebody may have
seen them. Doing a step again is free if nobody saw what it released, or with the same keys, plan, data, code and
weights, because then the release is the same. The same noise for anything else would cancel out in a difference and is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose

CHECKPOINT = "checkpoint"
"""Key of the number of steps in a row that says that a checkpoint was made."""


class LedgerError(RuntimeError):
    """A step that must not be done: its noise was already used for something else."""


class WriteAheadLedger:
    """One JSON line for each step that was begun, and for each checkpoint, over all attempts at a run."""

    def __init__(
        self, path: Path, plan: PrivacyPlan, keys: KeyRing, manifest: str, code: str = "", *, stand_in: bool = False
    ) -> None:
        """Open or continue a ledger. A last line without an end was never begun, and is dropped.

        Args:
            path: the file; only ever appended to.
            plan: what is accounted for.
            keys: of this attempt; the ledger keeps hashes of them.
            manifest: names the data and the model that gradients come from.
            code: version of the code. It may compute other gradients, so that the same noise with another version is
                refused, as with other data; with fresh keys it is another attempt.
            stand_in: the data is public: the same noise with other code is another attempt instead.

        Raises:
            LedgerError: when a row cannot be read.
        """
        self.path, self.plan, self.keys, self.manifest, self.code = path, plan, keys, manifest, code
        self.stand_in = stand_in
        self._sigmas = plan.noise_multipliers()
        content = path.read_bytes() if path.exists() else b""
        if torn := len(content) - (content.rfind(b"\n") + 1):
            os.truncate(path, len(content) - torn)
        self.rows: list[dict[str, Any]] = []
        self._by_key: dict[str, dict[str, Any]] = {}
        self._marks: set[tuple[int, str]] = set()
        """Checkpoints since step 0 was last begun."""
        self._hashes = [b""]
        """Hash of the first 0, 1, 2, ... rows."""
        try:
            for line in content[: len(content) - torn].splitlines():
                self._note(json.loads(line))
        except (ValueError, KeyError, TypeError):
            raise LedgerError(f"{path} is damaged: move the run's folder away and start it anew") from None

    def begin(self, step: int, state: str = "") -> None:
        """Write the row of a step; call it before the step's batch is drawn.

        Args:
            step: from 0.
            state: hash of the weights that gradients are taken at.

        Raises:
            LedgerError: when the step's noise was used before with another plan, other data, other code or, in a
                release that may have been seen, other weights.
        """
        row: dict[str, Any] = {
            "step": step,
            "sample_rate": self.plan.sample_rate,
            "noise_multiplier": float(self._sigmas[step]),
            "plan": self.plan.fingerprint(),
            "sampling_key": self.keys.key_hash(Purpose.SAMPLING, step),
            "noise_key": self.keys.key_hash(Purpose.NOISE, step),
            "manifest": self.manifest,
            "code": self.code,
            "state": state,
        }
        if (before := self._by_key.get(row["noise_key"])) is not None:
            # Rows of earlier versions say nothing of the weights.
            changed = {name for name in row if row[name] != before.get(name, state if name == "state" else "")}
            if not changed:
                return
            if changed == {"state"} and not self._seen(before):
                changed = set()  # Rounding may differ, say on another number of processes: that release died unseen.
            elif self.stand_in and "code" in changed:
                changed -= {"code", "state"}
            if changed:
                raise LedgerError(
                    f"{self.path}: the noise of step {step} was used before with another {', '.join(sorted(changed))}; "
                    "use another seed, or fresh keys"
                )
        self._append(row)

    def seen(self, step: int) -> None:
        """Write that so many steps are in a checkpoint; call it once it is on disk, before anything else shows them."""
        key = self.keys.key_hash(Purpose.NOISE, step - 1)
        if (step, key) not in self._marks:
            self._append({CHECKPOINT: step, "noise_key": key})

    @property
    def position(self) -> str:
        """Names all rows up to now, for a checkpoint that is made here."""
        return self._position(len(self.rows))

    def check_start(self, step: int, position: str) -> None:
        """Refuse to go on from a checkpoint that is not the last one, or that was not made here.

        With the same keys the steps after it are the same releases, so that any checkpoint of an attempt will do; with
        fresh ones they would be released twice for the price of once.

        Args:
            step: number of steps that the checkpoint holds.
            position: of the ledger when it was made.

        Raises:
            LedgerError: saying what does not fit.
        """
        count = int(position.partition(" ")[0])
        if count > len(self.rows) or self._position(count) != position:
            raise LedgerError(f"{self.path.name} lacks rows that were there when the checkpoint was made")
        if any(row.get("step") == 0 for row in self.rows[count:]):
            raise LedgerError("another attempt was begun since the checkpoint was made")
        last = max((reached for reached, _ in self._marks), default=0)
        if self.keys.mode == "secure" and step < last:
            raise LedgerError(f"the checkpoint is of step {step}, but step {last} was reached")

    def _seen(self, row: dict[str, Any]) -> bool:
        """Whether the release of a row is in a checkpoint that came after it."""
        return any(later.get(CHECKPOINT, 0) > row["step"] for later in self.rows[self.rows.index(row) :])

    def _position(self, count: int) -> str:
        """Number and hash of the first rows."""
        return f"{count} {self._hashes[count].hex()}"

    def _note(self, row: dict[str, Any]) -> None:
        """Take in a row that is on disk."""
        key = row["noise_key"]
        if CHECKPOINT in row:
            self._marks.add((row[CHECKPOINT], key))
        else:
            self._by_key[key] = row
            if row["step"] == 0:
                self._marks.clear()
        self.rows.append(row)
        self._hashes.append(hashlib.sha256(self._hashes[-1] + json.dumps(row).encode()).digest())

    def _append(self, row: dict[str, Any]) -> None:
        new = not self.rows
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            _sync_names(self.path.parent)
        self._note(row)

    @property
    def attempts(self) -> int:
        """How many different transcripts were begun; each counts as a run (SPECIFICATION.md 8)."""
        return sum(row.get("step") == 0 for row in self.rows)


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
