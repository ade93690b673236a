"""Mirrors of a run while it goes on. The record on disk is the truth; a mirror that fails never stops a run."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dptune.config import TrackingConfig
from dptune.records import RunRecord


class Tracker(Protocol):
    """Receives steps and, at the end, the record."""

    def step(self, row: Mapping[str, Any]) -> None:
        """One line of the history."""
        ...

    def finish(self, record: RunRecord) -> None:
        """The finished record."""
        ...


class NoTracker:
    """No mirror."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Nothing."""

    def finish(self, record: RunRecord) -> None:
        """Nothing."""


NONE = NoTracker()


class WandbTracker:
    """Weights & Biases: config, history and summary under `id=run_id`, grouped by sweep."""

    def __init__(self, config: TrackingConfig, record: RunRecord, folder: Path) -> None:
        import wandb

        self.allow_private = config.allow_private
        online = config.name == "wandb" and has_account()
        if config.name == "wandb" and not online:
            print("tracking=wandb: no account is configured, writing offline files", file=sys.stderr)
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=record.run_id,
            name=record.run_id,
            group=record.sweep,
            job_type=record.method or record.config["privacy"]["name"],
            config=record.config,
            dir=str(folder),
            mode="online" if online else "offline",
            resume="allow" if online else None,
            settings=wandb.Settings(x_disable_stats=True, console="off", silent=True, init_timeout=30),
        )

    def step(self, row: Mapping[str, Any]) -> None:
        """Log one line of the history; telemetry that is not paid for stays here unless allowed."""
        shown = {key: value for key, value in row.items() if self.allow_private or not key.startswith("NON_PRIVATE/")}
        self.run.log(shown, step=int(row["step"]))

    def finish(self, record: RunRecord) -> None:
        """Write accuracy, epsilon and parameter counts to the summary and close the run."""
        content = dataclasses.asdict(record)
        summary: dict[str, Any] = {"status": record.status}
        for part, names in SUMMARY.items():
            if part == "cost" and not (self.allow_private or record.privacy is None or record.privacy.stand_in):
                continue  # How long steps take depends on the batches that were really drawn.
            summary |= {f"{part}/{name}": (content[part] or {}).get(name) for name in names}
        if record.parameters is not None:
            summary["parameters/fraction"] = record.parameters.fraction
        self.run.summary.update(summary)
        self.run.finish(exit_code=0 if record.status == "done" else 1)


SUMMARY = {
    "metrics": ("accuracy", "accuracy_unseen", "worst_task", "spread_over_tasks", "response_perplexity"),
    "zero_shot": ("accuracy",),
    "privacy": ("epsilon", "target_epsilon", "delta", "noise_multiplier", "noise_mode"),
    "parameters": ("total", "trainable"),
    "cost": ("seconds", "examples_per_second", "peak_memory_mb"),
}
"""What the summary of a mirror shows, by part of the record."""


class Guarded:
    """A mirror that goes silent, after one warning, instead of stopping the run."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self.tracker: Tracker | None = None
        self._try(lambda: setattr(self, "tracker", make()))

    def step(self, row: Mapping[str, Any]) -> None:
        """One line of the history."""
        if (tracker := self.tracker) is not None:
            self._try(lambda: tracker.step(row))

    def finish(self, record: RunRecord) -> None:
        """The finished record."""
        if (tracker := self.tracker) is not None:
            self._try(lambda: tracker.finish(record))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            print(f"tracking={self.name} is off for this run: {error}", file=sys.stderr)
            self.tracker = None


def start(config: TrackingConfig, record: RunRecord, folder: Path) -> Tracker:
    """The mirror that the config asks for."""
    if config.name == "none":
        return NoTracker()
    return Guarded(config.name, lambda: WandbTracker(config, record, folder))


def has_account() -> bool:
    """Whether W&B has a key, asked without prompting or waiting."""
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
