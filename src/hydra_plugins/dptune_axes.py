"""A Hydra sweeper that joins several small grids; see dptune.sweeps.expand. Hydra finds it by its place."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from dptune.sweeps.jobs import Job
    from dptune.sweeps.progress import NotDone


@dataclass
class AxesSweeperConf:
    """`params` goes with every run, `axes` are grids that are joined; both in Hydra's sweep syntax.

    `include` names sweeps whose runs are done, too.
    """

    _target_: str = "hydra_plugins.dptune_axes.AxesSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    axes: list[Any] = field(default_factory=list)
    include: list[str] = field(default_factory=list)


ConfigStore.instance().store(group="hydra/sweeper", name="axes", node=AxesSweeperConf, provider="dptune")


class AxesSweeper(Sweeper):
    """Checks every run of a sweep, then hands those that are not finished to the launcher."""

    def __init__(self, params: dict[str, Any], axes: Sequence[dict[str, Any]], include: Sequence[str]) -> None:
        self.params, self.axes, self.include = params, axes, include
        self.expand: Callable[[list[str]], list[Job]]
        self.settings: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        from dptune.sweeps.expand import jobs_of

        self.settings = config.hydra.launcher
        self.expand = partial(jobs_of, hydra_context.config_loader, config, self.params, self.axes, self.include)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def jobs(self, arguments: list[str]) -> list["Job"]:
        """The runs, by the names that other processes give them, too: their key is kept from now on."""
        from dptune.identity import keep_local_key

        jobs = self.expand(arguments)
        late = [keep_local_key(job.config) for job in jobs]
        return self.expand(arguments) if any(late) else jobs

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run what is missing; a run that fails does not stop the others."""
        from dptune.config.extras import check_extras
        from dptune.records.record import RunFailed
        from dptune.runs.watch import Watch
        from dptune.sweeps.progress import workers_of

        refuse_torchrun()
        jobs = self.jobs(arguments)
        missing = [job for job in jobs if job.config.compute.force or not _is_done(job)]
        print(f"{len(jobs)} runs: {len(jobs) - len(missing)} finished before, {len(missing)} to do", flush=True)
        if not missing:
            return []
        for job in missing:
            check_extras(job.config)
        with Watch(missing, len(jobs), workers_of(self.settings)) as watch:
            refused = self.launched(missing, _is_done, watch.say)
            watch.look()
            others = [(job, why) for job, why in refused if not why.failed and not _is_done(job)]
            for job, why in refused:
                if why.failed:
                    watch.fail(job, why.why)
                    if why.trace and os.environ.get("DPTUNE_TRACEBACK"):
                        print(why.trace, file=sys.stderr, flush=True)
            for _, why in others:
                watch.say(f"left out: {why.why}")
        if watch.failed:
            raise RunFailed(
                f"{watch.failed} of {len(missing)} runs failed, named above; the same command does them again"
            )
        if others:
            print(f"{len(others)} runs are being done by other processes; `dptune status` shows them", flush=True)
        return []

    def launched(
        self, missing: Sequence["Job"], is_done: Callable[["Job"], bool], say: Callable[[str], None]
    ) -> list[tuple["Job", "NotDone"]]:
        """Jobs that the launcher did not do, and why; it is asked again when the system killed one of its workers.

        Raises:
            RunFailed: when workers were killed too often.
        """
        from dptune.records.record import RunFailed

        if str(self.settings.get("_target_", "")).endswith("SlurmLauncher"):
            from dptune.sweeps.slurm import be_quiet_without_accounting

            be_quiet_without_accounting(say)
        for _ in range(LAUNCHES):
            try:
                results = self.launcher.launch([list(job.overrides) for job in missing], initial_job_idx=0)
                returned = [(job, result.return_value) for job, result in zip(missing, results, strict=True)]
                return [(job, value) for job, value in returned if value is not None]
            except BrokenExecutor:
                missing = [job for job in missing if not is_done(job)]
                say("a worker process was killed; what it did not finish is launched again")
                if not missing:
                    return []
        raise RunFailed(f"worker processes were killed {LAUNCHES} times: is there enough memory for so many at once?")


LAUNCHES = 5
"""How often a sweep is launched in all when workers are killed."""


def refuse_torchrun() -> None:
    """Raises ConfigError inside torchrun."""
    from dptune.config.schema import ConfigError

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("torchrun is for one run; give a sweep a launcher (hydra/launcher=joblib or slurm)")


def _is_done(job: "Job") -> bool:
    from dptune.records.record import is_done

    return is_done(Path(job.config.compute.output_root) / job.run_id)
