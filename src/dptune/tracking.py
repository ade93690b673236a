"""Mirrors of a run while it goes on. The record on disk is the truth; a mirror that fails never stops a run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dptune.config import ConfigError, TrackingConfig
from dptune.records import ADAPTER_FOLDER, RECORD_FILE, Metrics, RunRecord


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
    """Weights & Biases: config, history, summary, tables and adapter under `id=run_id`, grouped by sweep.

    Args:
        config: where to, and what may be shown.
        record: the run; its privacy and results may still be missing.
        folder: its folder, which gets W&B's files and has the adapter.
        anew: overwrite what W&B holds of this run instead of going on with it.
    """

    def __init__(self, config: TrackingConfig, record: RunRecord, folder: Path, *, anew: bool = False) -> None:
        self.config, self.folder = config, folder
        self.run = open_run(
            config,
            folder,
            id=record.run_id,
            group=record.sweep,
            job_type=method_of(record),
            tags=tags(record),
            config=record.config | {"provenance": record.provenance},
            anew=anew,
        )
        self.first = int(self.run.step)  # Of a run that goes on, W&B holds the steps before.
        self.last = 0

    def step(self, row: Mapping[str, Any]) -> None:
        """Log one line of the history."""
        self._log(visible(row, self.config), int(row["step"]))

    def finish(self, record: RunRecord) -> None:
        """Write tables, summary and adapter, and close the run."""
        if record.metrics is not None:
            self._log({TASK_TABLE: task_table(record.metrics, record.zero_shot)}, self.last)
        self.run.summary.update(summary(record, self.config.allow_private))
        self.run.tags = tags(record)
        wanted = self.config.upload_adapters and (self.config.allow_private or releasable(record))
        if wanted and (self.folder / ADAPTER_FOLDER).is_dir():
            self.run.log_artifact(adapter_artifact(record, self.folder))
        self.run.finish(exit_code=0 if record.status == "done" else 1)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self.first:
            self.run.log(dict(values), step=step)
            self.last = step


class TrackioTracker:
    """Trackio: config, history and summary in a database beside the runs, which `trackio show` draws.

    Args:
        config: which project, and what may be shown.
        record: the run; its privacy and results may still be missing.
        folder: its folder.
    """

    def __init__(self, config: TrackingConfig, record: RunRecord, folder: Path) -> None:
        # Trackio reads it when it is imported; its own place is in the home directory.
        os.environ.setdefault("TRACKIO_DIR", str((folder.parent / TRACKIO_FOLDER).absolute()))
        import trackio

        self.config, self.last = config, 0
        with contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(ValueError):  # The project does not exist yet.
                for earlier in trackio.Api().runs(config.project):
                    if earlier.name == record.run_id:
                        earlier.delete()  # A run that goes on is shown from its first step again.
            self.run = trackio.init(
                config.project,
                name=record.run_id,
                group=record.sweep,
                config=record.config | {"provenance": record.provenance, "tags": tags(record)},
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def step(self, row: Mapping[str, Any]) -> None:
        """Log one line of the history."""
        self.last = int(row["step"])
        self.run.log(visible(row, self.config), step=self.last)

    def finish(self, record: RunRecord) -> None:
        """Log the summary as of the last step, and close the run."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            self.run.log(summary(record, self.config.allow_private), step=self.last)
            trackio.finish()


TRACKIO_FOLDER = "trackio"
"""Name of the folder of Trackio's databases, in the output folder."""


def visible(row: Mapping[str, Any], config: TrackingConfig) -> dict[str, Any]:
    """What a mirror may have of a line of the history: telemetry that is not paid for stays here unless allowed."""
    return {key: value for key, value in row.items() if config.allow_private or not key.startswith("NON_PRIVATE/")}


def open_run(tracking: TrackingConfig, folder: Path, *, id: str, anew: bool = False, **fields: Any) -> Any:
    """A W&B run with this id: online where that is asked for and there is an account, else as files in `folder`."""
    import wandb

    online = tracking.name == "wandb" and has_account()
    if tracking.name == "wandb" and not online:
        print("tracking=wandb: no account is configured, writing offline files", file=sys.stderr)
    return wandb.init(
        project=tracking.project,
        entity=tracking.entity,
        id=id,
        name=id,
        dir=str(folder),
        mode="online" if online else "offline",
        resume="allow" if online and not anew else None,
        settings=wandb.Settings(x_disable_stats=True, console="off", silent=True, init_timeout=30),
        **fields,
    )


SUMMARY = {
    "metrics": (
        "accuracy",
        "accuracy_unseen",
        "worst_task",
        "spread_over_tasks",
        "response_perplexity",
        "bleu",
        "rouge_l",
    ),
    "zero_shot": ("accuracy", "bleu", "rouge_l"),
    "privacy": ("epsilon", "target_epsilon", "delta", "noise_multiplier", "noise_mode"),
    "parameters": ("total", "trainable"),
    "cost": ("seconds", "examples_per_second", "peak_memory_mb"),
}
"""What the summary of a mirror shows, by part of the record."""
TASK_TABLE = "evaluation/by_task"
"""Key of the table of tasks."""


def summary(record: RunRecord, allow_private: bool = False) -> dict[str, Any]:
    """Accuracy, epsilon, parameter counts and cost, with names such as `metrics/accuracy` and `tasks/<task>`."""
    content = dataclasses.asdict(record)
    found: dict[str, Any] = {"status": record.status}
    for part, names in SUMMARY.items():
        if part == "cost" and not (allow_private or record.privacy is None or record.privacy.stand_in):
            continue  # How long steps take depends on the batches that were really drawn.
        found |= {f"{part}/{name}": (content[part] or {}).get(name) for name in names}
    if record.parameters is not None:
        found["parameters/fraction"] = record.parameters.fraction
    if record.metrics is not None:
        found |= {f"tasks/{task}": value for task, value in record.metrics.accuracy_by_task.items()}
    return found


def method_of(record: RunRecord) -> str:
    """The name that the method was asked for by, else its adapter and privacy setting."""
    return record.method or f"{record.config['adapter']['name']} + {record.config['privacy']['name']}"


def tags(record: RunRecord) -> list[str]:
    """Model, adapter, data and privacy setting, and what limits the meaning of epsilon."""
    found = [f"{group}={record.config[group]['name']}" for group in ("model", "adapter", "data", "privacy")]
    if (privacy := record.privacy) is not None:
        flags = {
            "not-private": not privacy.private,
            "reproducible-noise": privacy.noise_mode == "reproducible",
            "stand-in-data": privacy.stand_in,
        }
        found += [name for name, holds in flags.items() if holds]
    return [tag[:LONGEST_TAG] for tag in found]


LONGEST_TAG = 64
"""Characters that W&B allows."""


def task_table(metrics: Metrics, zero_shot: Metrics | None) -> Any:
    """Accuracy of each task, before and after training, as a W&B table."""
    before = zero_shot.accuracy_by_task if zero_shot else {}
    rows = [
        (task, value, before.get(task), metrics.n_by_task.get(task)) for task, value in metrics.accuracy_by_task.items()
    ]
    return wandb_table(("task", "accuracy", "zero-shot accuracy", "test examples"), rows)


def wandb_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A W&B table."""
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def releasable(record: RunRecord) -> bool:
    """Whether the adapter may be shown to others.

    It may when the data is public, or when it was trained with a guarantee whose noise nobody can compute again.
    """
    privacy = record.privacy
    return privacy is not None and (privacy.stand_in or (privacy.private and privacy.noise_mode == "secure"))


def adapter_artifact(record: RunRecord, folder: Path) -> Any:
    """The adapter's folder as a W&B artifact that says what it guarantees."""
    import wandb

    assert record.privacy is not None
    stated = {name: getattr(record.privacy, name) for name in ("private", "epsilon", "delta", "unit", "noise_mode")}
    stated |= {"stand_in": record.privacy.stand_in, "record": file_hash(folder / RECORD_FILE)}
    artifact = wandb.Artifact(f"adapter-{record.run_id}", type="adapter", metadata=stated)
    for path in sorted((folder / ADAPTER_FOLDER).iterdir()):
        artifact.add_file(str(path))
    return artifact


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    mirror = TrackioTracker if config.name == "trackio" else WandbTracker
    return Guarded(config.name, lambda: mirror(config, record, folder))


def check(config: TrackingConfig) -> None:
    """Raises ConfigError when the package that a mirror needs is not installed."""
    package = config.name.partition("_")[0]
    if package != "none" and importlib.util.find_spec(package) is None:
        raise ConfigError(f"tracking={config.name} needs the extra `{package}`: pip install 'dptune[{package}]'")


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
