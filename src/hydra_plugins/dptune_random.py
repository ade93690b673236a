"""A Hydra sweeper that tries a random, secret number of configs and releases the best; see dptune.runs.search."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from hydra_plugins.dptune_axes import AxesSweeper, refuse_torchrun


@dataclass
class RandomSweeperConf:
    """`prior` lists, in Hydra's sweep syntax, the values of each parameter that a trial draws uniformly."""

    _target_: str = "hydra_plugins.dptune_random.RandomSweeper"
    params: dict[str, Any] = field(default_factory=dict)
    prior: dict[str, Any] = field(default_factory=dict)
    mean: float = 8.0
    """Expected number of trials."""
    eta: float = 0.0
    """Shape of their distribution: 0 logarithmic, 1 geometric, .inf Poisson."""


ConfigStore.instance().store(group="hydra/sweeper", name="random", node=RandomSweeperConf, provider="dptune")


class RandomSweeper(AxesSweeper):
    """Checks every config that can be drawn, does the trials, and lets one run out."""

    def __init__(self, params: dict[str, Any], prior: dict[str, Any], mean: float, eta: float) -> None:
        super().__init__(params, [prior], [])
        self.mean, self.eta = mean, eta
        self.launcher_below: Callable[[str], Launcher]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`; trials are silent, so that the task function is not the usual one."""
        from dptune.runs.search import trial

        super().setup(hydra_context=hydra_context, task_function=trial, config=config)

        def launcher_below(folder: str) -> Launcher:
            inside = config.copy()
            with open_dict(inside):
                inside.hydra.sweep.dir = folder  # A launcher may keep logs of its jobs there.
            return Plugins.instance().instantiate_launcher(
                hydra_context=hydra_context, task_function=trial, config=inside
            )

        self.launcher_below = launcher_below

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Do the trials that are missing, then release the best."""
        from dptune.privacy.guarantee import epsilon_text
        from dptune.records.record import RunFailed
        from dptune.runs.search import trial_is_done

        refuse_torchrun()
        search = self.search(arguments)
        search.check()
        name = f"search {search.released.run_id}"
        if search.is_finished:
            print(f"{name} is finished: {search.folder}", flush=True)
            return []
        delta = search.candidates[0].config.privacy.delta
        print(
            f"{name}: a secret number of trials among {len(search.candidates)} configs ({self.mean:g} expected); "
            f"epsilon of the whole {epsilon_text(search.epsilon)} at delta {delta:g}",
            flush=True,
        )
        missing = [job for job in search.trials() if not trial_is_done(job)]
        if missing:
            self.launcher = self.launcher_below(str(search.secret))
            refused = self.launched(missing, trial_is_done, partial(print, flush=True))
            if errors := [why.why for _, why in refused if why.failed]:
                raise RunFailed(f"{name} is not finished; NON-PRIVATE: {errors[0]}")
        said = search.release()
        if said is None:
            print(f"{name} is not finished: other processes do some of its trials", flush=True)
            return []
        print(said)
        print(f"NON-PRIVATE: keep {search.secret}, and how long this took, secret; or delete the folder", flush=True)
        return []

    def search(self, arguments: list[str]) -> Any:
        """The search that some overrides ask for, as a `dptune.runs.search.Search`."""
        from dptune.config.schema import ConfigError
        from dptune.privacy.events import PlanError
        from dptune.privacy.selection import Repetitions
        from dptune.runs.search import ZERO_SHOT, Search

        try:
            repetitions = Repetitions(self.mean, self.eta)
        except PlanError as error:
            raise ConfigError(f"hydra.sweeper: {error}") from None
        replaced = {item.partition("=")[0] for item in ZERO_SHOT}
        others = [item for item in arguments if item.partition("=")[0] not in replaced]
        zero_shot = self.jobs([*others, *ZERO_SHOT])[0] if self.eta == float("inf") else None
        return Search(tuple(self.jobs(arguments)), repetitions, zero_shot)
