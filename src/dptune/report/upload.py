"""Upload of finished records to W&B: what a run with `tracking=wandb` mirrors, made from records alone.

A marker beside each record says where it was uploaded to, and of which content, so that the same command again does
the rest. Whether a run was tracked before, online, in offline files or not at all, W&B has it once, under its run id.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dptune.config.checks import strict
from dptune.config.extras import require
from dptune.config.schema import ConfigError, TrackingConfig
from dptune.records.files import write_atomically
from dptune.records.lock import locked
from dptune.records.mirror import WandbTracker, file_hash, has_account, is_protected, open_run, wandb_table
from dptune.records.record import RECORD_FILE, RunFailed, read
from dptune.report.commands import Request, selected, titled
from dptune.report.render import to_csv
from dptune.report.results import history
from dptune.report.tables import Table, main_table

MARKER = ".wandb-uploaded"
"""File beside a record, and with a sweep's name beside all runs: by destination, the hash of what was uploaded."""


def sync(arguments: Sequence[str]) -> None:
    """`dptune sync [SWEEP] [key=value ...]`: upload what is finished and not uploaded yet, and a table of each sweep.

    Keys that begin with `tracking.` say where to and what, over what the runs were made with; others choose runs, and
    then no table is uploaded.

    Raises:
        ConfigError: without an account, or for settings that are not known.
        RunFailed: at the end, when something could not be uploaded.
    """
    ours = [item for item in arguments if item.startswith(("tracking.", "tracking="))]
    overrides = [item.replace("tracking=", "tracking.name=", 1) for item in ours]
    settings = tracking_of({}, overrides)
    if settings.name == "none":
        raise ConfigError("tracking=none uploads nothing: leave it out, or give tracking=wandb_offline to write files")
    if settings.name == "wandb" and not has_account():
        raise ConfigError(
            "no W&B account is configured: set WANDB_API_KEY or run `wandb login`, "
            "or write files without one with tracking=wandb_offline"
        )
    require("wandb", "dptune sync")
    request = Request.of([item for item in arguments if item not in ours])
    # The table of some runs of a sweep must not replace that of all.
    whole = all(item.startswith("compute.output_root=") for item in request.filters)
    uploaded, there, failed = 0, 0, 0
    for name, results in selected(request):
        jobs = {run_id: partial(upload, request.root / run_id, overrides) for run_id in results.done["run_id"]}
        if whole and not settings.allow_test_metrics and any_protected(request.root, results.done["run_id"]):
            print(
                f"dptune: the table of {name} stays here: its private test records have no guarantee, and it describes "
                "them exactly; tracking.allow_test_metrics=true uploads it",
                file=sys.stderr,
                flush=True,
            )
        elif whole:
            table = main_table(name, results, titled(name))
            jobs[f"the table of {name}"] = partial(upload_table, name, table, request.root, settings)
        for what, job in jobs.items():
            try:
                if job():
                    uploaded += 1
                else:
                    there += 1
            except Exception as error:
                failed += 1
                print(f"dptune: {what} was not uploaded: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    print(f"{uploaded} uploaded, {there} there already (runs and tables of sweeps)")
    if failed:
        raise RunFailed(f"{failed} not uploaded, named above; the same command tries them again")


def any_protected(root: Path, run_ids: Iterable[str]) -> bool:
    """Whether one of some runs has private data."""
    return any(record is not None and is_protected(record) for record in (read(root / run_id) for run_id in run_ids))


def tracking_of(recorded: Mapping[str, Any], overrides: Sequence[str]) -> TrackingConfig:
    """The tracking settings of a run, with some on top. Without an override they are online.

    Raises:
        ConfigError: for settings that are not known.
    """
    tree = OmegaConf.merge({"tracking": {**recorded, "name": "wandb"}}, OmegaConf.from_dotlist(list(overrides)))
    return strict(OmegaConf.to_container(tree)).tracking  # type: ignore[arg-type]  # a mapping, as it was


def upload(folder: Path, overrides: Sequence[str]) -> bool:
    """Upload the finished run in a folder; False when that was done before."""
    with locked(folder) as lock:
        record = read(folder)
        if lock is None or record is None or not record.is_done:
            raise BlockingIOError("another process is doing it again, or uploading it")
        config = tracking_of(record.config["tracking"], overrides)
        allowed = (config.allow_private, config.allow_times, config.allow_test_metrics, config.allow_adapters)
        shown = (file_hash(folder / RECORD_FILE), history(folder), *allowed, config.upload_adapters)
        marker = Marker(folder / MARKER, config, shown)
        if marker.holds:
            return False
        tracker = WandbTracker(config, record, folder, anew=marker.outdated)
        try:
            for row in history(folder):
                # Of a search, older histories hold the epsilons of one trial.
                tracker.step(row | {"epsilon": None} if record.guarantee and record.guarantee.of_search else row)
            tracker.finish(record)
        except BaseException:
            if tracker.run is not None:
                tracker.run.finish(exit_code=1)
            raise
        marker.write()
        return True


def upload_table(name: str, table: Table, root: Path, config: TrackingConfig) -> bool:
    """Upload the main table of a sweep as a run of its own; False when that was done before."""
    marker = Marker(root / f"{MARKER}-{name}", config, to_csv(table))
    if marker.holds:
        return False
    rows = [[row[column.key].text if column.key in row else None for column in table.columns] for row in table.rows]
    shown = wandb_table([column.head for column in table.columns], rows)
    run = open_run(
        config, root, id=f"report-{name}", group=name, job_type="report", notes="\n".join(table.notes), anew=True
    )
    try:
        run.log({SWEEP_TABLE: shown})
    finally:
        run.finish()
    marker.write()
    return True


SWEEP_TABLE = "tables/main"
"""Key of a sweep's table."""


class Marker:
    """Which content was uploaded to which destination."""

    def __init__(self, path: Path, config: TrackingConfig, content: object) -> None:
        self.path = path
        self.destination = f"{config.name}:{config.entity or ''}/{config.project}"
        self.hash = hashlib.sha256(repr(content).encode()).hexdigest()
        self.uploaded: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def holds(self) -> bool:
        """Whether this content is there."""
        return self.uploaded.get(self.destination) == self.hash

    @property
    def outdated(self) -> bool:
        """Whether other content is there."""
        return self.destination in self.uploaded and not self.holds

    def write(self) -> None:
        """Note that this content is there now."""
        write_atomically(self.path, json.dumps(self.uploaded | {self.destination: self.hash}) + "\n")
