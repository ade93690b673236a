"""A Hydra sweeper that joins several small grids; see dptune.sweep. Hydra finds it by its place in `hydra_plugins`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from dptune.sweep import Job


@dataclass
class AxesSweeperConf:
    """`common` goes with every run, `axes` are grids that are joined; both in Hydra's sweep syntax."""

    _target_: str = "hydra_plugins.dptune_axes.AxesSweeper"
    common: dict[str, Any] = field(default_factory=dict)
    axes: list[Any] = field(default_factory=list)


ConfigStore.instance().store(group="hydra/sweeper", name="axes", node=AxesSweeperConf, provider="dptune")


class AxesSweeper(Sweeper):
    """Checks every run of a sweep, then hands those that are not finished to the launcher."""

    def __init__(self, common: dict[str, Any], axes: Sequence[dict[str, Any]]) -> None:
        self.common, self.axes = common, axes
        self.jobs: Callable[[list[str]], list[Job]]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        from dptune.sweep import jobs_of

        self.jobs = partial(jobs_of, hydra_context.config_loader, config, self.common, self.axes)
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run what is missing; a run that fails does not stop the others."""
        from dptune.records import RunFailed, read

        jobs = self.jobs(arguments)
        missing = []
        for job in jobs:
            record = read(Path(job.config.compute.output_root) / job.run_id)
            if job.config.compute.force or record is None or record.status != "done":
                missing.append(job)
        print(f"{len(jobs)} runs: {len(jobs) - len(missing)} finished before, {len(missing)} to do", flush=True)
        if not missing:
            return []
        results = self.launcher.launch([list(job.overrides) for job in missing], initial_job_idx=0)
        failed = [result._return_value for result in results if result.status == JobStatus.FAILED]
        if failed:
            raise RunFailed("; ".join([f"{len(failed)} of {len(missing)} runs failed", *map(str, failed)]))
        return list(results)
