"""Mirrors of a run while it goes on. The record on disk is the truth; a mirror that fails never stops a run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dptune.config.schema import DataConfig, TrackingConfig, is_published
from dptune.records.record import ADAPTER_FOLDER, COST_FILE, RECORD_FILE, RunRecord


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


class Mirror:
    """What mirrors have in common: which part of a run they show, and when.

    A mirror notes when it gets a row, and the time of a step depends on how large its batch was. Of private data it
    therefore gets everything in one go at the end, unless times are allowed to leave.

    Args:
        config: where to, and what may be shown.
        record: the run; its privacy and results may still be missing.
        folder: of the run.
    """

    run: Any = None
    """The library's own object of the run, once it is open."""
    first = 0
    """Of a run that goes on, the mirror holds the steps before."""

    def __init__(self, config: TrackingConfig, record: RunRecord, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.last = 0
        self.timeless = is_protected(record) and not config.allow_times
        self.waiting: list[Mapping[str, Any]] = []
        if not self.timeless:
            self.open(record)

    def open(self, record: RunRecord) -> None:
        """Begin the run in the mirror."""
        raise NotImplementedError

    def close(self, record: RunRecord) -> None:
        """Write the results, and end the run in the mirror."""
        raise NotImplementedError

    def step(self, row: Mapping[str, Any]) -> None:
        """Log one line of the history; telemetry that is not paid for stays here unless allowed."""
        if self.run is None:
            self.waiting.append(row)
            return
        hidden = [*([] if self.config.allow_private else ["NON_PRIVATE/"]), *([STEP_SECONDS] if self.timeless else [])]
        self._log({key: value for key, value in row.items() if not key.startswith(tuple(hidden))}, int(row["step"]))

    def finish(self, record: RunRecord) -> None:
        """Log what was kept back, and the results."""
        if self.run is None:
            self.open(record)
            for row in self.waiting:
                self.step(row)
        self.close(record)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if step >= self.first:
            self.run.log(dict(values), step=step)
            self.last = step


STEP_SECONDS = "NON_PRIVATE/seconds"
"""Key of a step's time in the history."""


class WandbTracker(Mirror):
    """Weights & Biases: config, history, summary, tables and adapter under `id=run_id`, grouped by sweep.

    Args:
        config: where to, and what may be shown.
        record: the run; its privacy and results may still be missing.
        folder: its folder, which gets W&B's files and has the adapter.
        anew: overwrite what W&B holds of this run instead of going on with it.
    """

    def __init__(self, config: TrackingConfig, record: RunRecord, folder: Path, *, anew: bool = False) -> None:
        self.anew = anew
        self.opened = 0.0
        super().__init__(config, record, folder)

    def open(self, record: RunRecord) -> None:
        """Begin the run, or go on with it."""
        self.opened = time.time()
        self.run = open_run(
            self.config,
            self.folder,
            id=record.run_id,
            group=record.sweep,
            job_type=method_of(record),
            tags=tags(record),
            config=shown_config(record, timeless=self.timeless),
            anew=self.anew,
        )
        self.first = int(self.run.step)

    def close(self, record: RunRecord) -> None:
        """Write tables, summary and adapter, and close the run."""
        if record.metrics is not None and shows_metrics(self.config, record):
            self._log({TASK_TABLE: wandb_table(TASK_COLUMNS, task_rows(record))}, self.last)
        self.run.summary.update(mirrored_summary(record, self.config, self.folder))
        self.run.tags = tags(record)
        wanted = self.config.upload_adapters and (self.config.allow_adapters or releasable(record))
        if wanted and (self.folder / ADAPTER_FOLDER).is_dir():
            self.run.log_artifact(adapter_artifact(record, self.folder, shows_metrics(self.config, record)))
        self.run.finish(exit_code=0 if record.is_done else 1)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        # W&B makes _runtime of its own of the time that it is told.
        super()._log({**values, "_timestamp": self.opened} if self.timeless else values, step)


class TrackioTracker(Mirror):
    """Trackio: config, history, summary and the table of tasks under the run's id, in a folder beside the runs.

    The folder is a database that `trackio show` makes a page of; nothing is sent, and no server is started. A run that
    goes on hands in its rows from the first one again, so that what is there of an earlier attempt is replaced.
    """

    def open(self, record: RunRecord) -> None:
        """Begin the run, in place of an earlier one of its name."""
        self.trackio = trackio = local_trackio(self.folder.parent / TRACKIO_FOLDER)
        with contextlib.suppress(ValueError):  # There is no such project yet.
            for earlier in [run for run in trackio.Api().runs(self.config.project) if run.name == record.run_id]:
                earlier.delete()
        shown = shown_config(record, timeless=self.timeless)
        with without_words(), without_hub():
            self.run = trackio.init(
                project=self.config.project,
                name=record.run_id,
                group=record.sweep,
                config=shown | {"method": method_of(record), "tags": tags(record)},
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def close(self, record: RunRecord) -> None:
        """Write table and summary, of which Trackio draws the numbers, behind the last step, and close the run."""
        results = mirrored_summary(record, self.config, self.folder)
        if record.metrics is not None and shows_metrics(self.config, record):
            results[TASK_TABLE] = self.trackio.Table(columns=list(TASK_COLUMNS), data=task_rows(record))
        self._log(results, self.last)
        with without_words():
            self.trackio.finish()

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        super()._log({key: value for key, value in values.items() if key != "step" and value is not None}, step)


TRACKIO_FOLDER = "trackio"
"""Folder, inside the output folder, of Trackio's database."""
ELSEWHERE = ("SPACE_ID", "SERVER_URL", "BUCKET_ID", "DATASET_ID", "WEBHOOK_URL")
"""Endings of the variables by which Trackio would send what it gets to somebody."""


def local_trackio(folder: Path) -> Any:
    """The library, writing into a folder and nowhere else.

    Raises:
        RuntimeError: when this process has it write into another folder, which cannot be changed.
    """
    os.environ["TRACKIO_DIR"] = str(folder.absolute())
    for name in ELSEWHERE:
        os.environ.pop(f"TRACKIO_{name}", None)
    import trackio

    if Path(trackio.TRACKIO_DIR) != folder.absolute():
        raise RuntimeError(f"one process writes to one Trackio folder, and this one has {trackio.TRACKIO_DIR}")
    return trackio


@contextlib.contextmanager
def without_words() -> Iterator[None]:
    """Nothing on standard output: a library's greetings would stand between the lines of a sweep."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def without_hub() -> Iterator[None]:
    """No request to the Hugging Face Hub, of which Trackio asks the name behind a token to write it down."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


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
    "privacy": ("target_epsilon", "delta", "noise_multiplier", "noise_mode"),
    "parameters": ("total", "trainable"),
    "cost": ("seconds", "examples_per_second", "peak_memory_mb"),
}
"""What the summary of a mirror shows, by part of the record."""
TASK_TABLE = "evaluation/by_task"
"""Key of the table of tasks."""


def mirrored_summary(record: RunRecord, config: TrackingConfig, folder: Path) -> dict[str, Any]:
    """Accuracy, guarantee, parameter counts and cost, with names such as `metrics/accuracy` and `tasks/<task>`."""
    content = dataclasses.asdict(record)
    protected, metrics = is_protected(record), shows_metrics(config, record)
    found: dict[str, Any] = {"status": record.status}
    if (guarantee := record.guarantee) is not None:
        found |= {f"guarantee/{name}": value for name, value in guarantee.summary().items()}
        # The key by which plots know it; and that of the history, of whose last row a mirror makes its summary.
        found |= dict.fromkeys(("privacy/epsilon", "epsilon"), guarantee.shown)
        if guarantee.of_search:
            content["privacy"]["target_epsilon"] = None  # It was that of one trial.
    if protected and config.allow_times and (folder / COST_FILE).is_file():
        content["cost"] = json.loads((folder / COST_FILE).read_text(encoding="utf-8"))
    for part, names in SUMMARY.items():
        if part == "cost" and protected and not config.allow_times:
            continue  # How long steps take depends on the batches that were really drawn.
        if part in TEST_PARTS and not metrics:
            continue
        found |= {f"{part}/{name}": (content[part] or {}).get(name) for name in names}
    if record.parameters is not None:
        found["parameters/fraction"] = record.parameters.fraction
    if record.metrics is not None and metrics:
        found |= {f"tasks/{task}": value for task, value in record.metrics.accuracy_by_task.items()}
    if record.privacy is not None and record.privacy.not_covered:
        found["privacy/not_covered"] = "; ".join(record.privacy.not_covered)
    return found


TEST_PARTS = ("metrics", "zero_shot")
"""Parts of the record that are exact functions of the test split."""


def is_protected(record: RunRecord) -> bool:
    """Whether the data is private, or is public only by somebody's word for a file."""
    config = record.config.get("data", {})
    data = DataConfig(**{name: config[name] for name in ("name", "path", "public") if name in config})
    return not config or not is_published(data) or (record.privacy is not None and not record.privacy.stand_in)


def shows_metrics(config: TrackingConfig, record: RunRecord) -> bool:
    """Whether exact metrics of the test split, which no guarantee covers, may leave."""
    return config.allow_test_metrics or not is_protected(record)


def shown_config(record: RunRecord, *, timeless: bool) -> dict[str, Any]:
    """The config of a run and where it comes from; of a timeless one with the day of its beginning only."""
    origin = dict(record.provenance)
    if timeless and "started" in origin:
        origin["started"] = origin["started"][: len("2026-01-31")]
    return record.config | {"provenance": origin}


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


TASK_COLUMNS = ("task", "accuracy", "zero-shot accuracy", "test examples")


def task_rows(record: RunRecord) -> list[tuple[Any, ...]]:
    """Accuracy of each task, after and before training: the rows of the table of tasks."""
    metrics = record.metrics
    assert metrics is not None
    before = record.zero_shot.accuracy_by_task if record.zero_shot else {}
    return [
        (task, value, before.get(task), metrics.n_by_task.get(task)) for task, value in metrics.accuracy_by_task.items()
    ]


def wandb_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A W&B table."""
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows])


def releasable(record: RunRecord) -> bool:
    """Whether the adapter may be shown to others.

    It may when the data is public, or when it was trained with a guarantee whose noise nobody can compute again.
    """
    privacy = record.privacy
    return privacy is not None and (not is_protected(record) or (privacy.private and privacy.noise_mode == "secure"))


def adapter_artifact(record: RunRecord, folder: Path, with_hash: bool) -> Any:
    """The adapter's folder as a W&B artifact that says what it guarantees.

    Args:
        record: of the run that made it.
        folder: of the run.
        with_hash: also say the hash of the record, by which guesses of its exact metrics can be tested.
    """
    import wandb

    assert record.guarantee is not None
    stated = record.guarantee.summary()
    if with_hash:
        stated["record"] = file_hash(folder / RECORD_FILE)
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
    kind = TrackioTracker if config.name == "trackio" else WandbTracker
    return Guarded(config.name, lambda: kind(config, record, folder))


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
