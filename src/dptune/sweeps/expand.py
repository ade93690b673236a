"""What a sweep is: a file of `sweeps/` expanded to the runs that it asks for. No torch here.

A sweep file has, under `hydra.sweeper`, `params` (parameters of every run) and `axes`: a list of small grids that are
joined, so that "each setting varied alone around a reference" is one file. Both use Hydra's sweep syntax
(`"1,2,3"`, `range(...)`), and what the command line says of a parameter wins over the file.

A file may be made of others: `include: [hyperparameter/rank, ...]` puts their runs behind its own. Each axis of an
included file brings along what that file sets and its `params`; like any axis it wins over the `params` of the file
that includes it. Runs that are the same in several files appear once, and belong to the sweep that was asked for.

A search (sweeper `random`) has `prior` instead of `axes`, one grid of candidates, and releases one run.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dptune.config.checks import strict, unknown_choice, with_values
from dptune.config.schema import Config, ConfigError
from dptune.identity import run_id
from dptune.sweeps.jobs import ROOT, Job, remembered

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("dptune_root", lambda: str(ROOT), replace=True)


def grid(overrides: Iterable[str], loader: ConfigLoader | None = None) -> list[list[str]]:
    """All combinations of some overrides, one list a job; the last word on a key counts.

    Args:
        overrides: in sweep syntax.
        loader: knows the choices of each group, which `group=glob(lora*)` asks for.

    Raises:
        ConfigError: when an override cannot be parsed or is a continuous interval.
    """
    choices: dict[str, list[str]] = {}
    try:
        for item in OverridesParser.create(config_loader=loader).parse_overrides(list(overrides)):
            key = item.get_key_element()
            if not item.is_sweep_override():
                choices[key] = [f"{key}={item.get_value_element_as_str()}"]
            elif item.is_discrete_sweep():
                choices[key] = [f"{key}={value}" for value in item.sweep_string_iterator()]
            else:
                raise ConfigError(f"{item.input_line}: a sweep needs values that can be listed, not an interval")
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    return [list(job) for job in itertools.product(*choices.values())]


def expand(
    params: Mapping[str, Any],
    axes: Sequence[Mapping[str, Any]],
    arguments: Sequence[str],
    loader: ConfigLoader | None = None,
) -> list[tuple[list[str], list[str]]]:
    """The jobs of a sweep as (all overrides, those that set a job apart), in the order of the file.

    Args:
        params: parameters of every run, in sweep syntax.
        axes: grids that are joined.
        arguments: overrides of the command line; a parameter that they name is taken out of `params` and `axes`.
        loader: as of `grid`.
    """

    def key(override: str) -> str:
        return override.lstrip("+~").partition("=")[0]

    given = {key(argument) for argument in arguments}
    shared = [f"{name}={value}" for name, value in params.items() if name not in given]
    several = {key(override) for override in (*arguments, *shared) if len(grid([override], loader)) > 1}
    jobs: list[tuple[list[str], list[str]]] = []
    for axis in axes or [{}]:
        varied = [f"{name}={value}" for name, value in axis.items() if name not in given]
        names = several | {key(override) for override in varied}
        for overrides in grid([*arguments, *shared, *varied], loader):
            if (job := (overrides, [item for item in overrides if key(item) in names])) not in jobs:
                jobs.append(job)
    return jobs


def names() -> list[str]:
    """All sweeps, those in folders as `folder/name`."""
    folder = ROOT / "sweeps"
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def parts(name: str) -> list[str]:
    """The sweeps that the sweep `name` consists of, if it does nothing but include others; else itself."""
    sweeper = _file(name).get("hydra", {}).get("sweeper", {})
    whole = sweeper.get("params") or sweeper.get("axes") or not sweeper.get("include")
    return [name] if whole else [part for other in sweeper["include"] for part in parts(other)]


def included(name: str) -> list[dict[str, Any]]:
    """The axes of the sweep `name`, each with everything that its file says, as part of another sweep.

    Raises:
        ConfigError: when there is no such sweep, or it chooses groups in a way that cannot be joined with others.
    """
    content = _file(name)
    if "defaults" in content:
        raise ConfigError(f"sweeps={name} cannot be included: let `params` choose its groups instead of `defaults`")
    sweeper = content.pop("hydra", {}).get("sweeper", {})
    shared = {**_flat(content), **sweeper.get("params", {})}
    shared.pop("sweep", None)
    own = sweeper.get("axes") or ([] if sweeper.get("include") else [{}])
    return [
        {**shared, **axis}
        for axis in (*own, *(axis for other in sweeper.get("include", ()) for axis in included(other)))
    ]


def _file(name: str) -> dict[str, Any]:
    """A file of `sweeps/` as it is written."""
    if name not in names():
        raise ConfigError(unknown_choice(f"sweeps={name}", name, "sweeps", names()))
    content = OmegaConf.to_container(OmegaConf.load(ROOT / "sweeps" / f"{name}.yaml"))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as dotted parameters, in override syntax."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat


def jobs_of(
    loader: ConfigLoader,
    master: DictConfig,
    params: Mapping[str, Any],
    axes: Sequence[Mapping[str, Any]],
    include: Sequence[str],
    arguments: Sequence[str],
) -> list[Job]:
    """The runs of a sweep, each composed and checked; runs that are the same appear once.

    Raises:
        ConfigError: naming the overrides of the first job that cannot be run. Nothing has been started then.
    """
    jobs: dict[str, Job] = {}
    composer = Composer(loader, master)
    own = axes or ([] if include else [{}])
    every = [*own, *(axis for name in include for axis in included(name))]
    for overrides, varied in expand(params, every, arguments, loader):
        config = composer.config(overrides)
        identity = run_id(config)
        jobs.setdefault(identity, Job(identity, config, tuple(overrides), tuple(varied)))
    return list(jobs.values())


def released_by(candidates: Sequence[Job], mean: float, eta: float) -> Job:
    """The run that a search among some candidates releases; its name is a hash of them and of how many are tried."""
    text = json.dumps([[job.run_id for job in candidates], float(mean), str(float(eta))])
    first = candidates[0]
    return Job(hashlib.sha256(text.encode()).hexdigest()[:12], first.config, first.overrides, (), is_search=True)


class Composer:
    """Composes the configs of many jobs.

    Composing is slow, so that jobs with the same choices of groups share it; values, which have dotted names, are put
    on top as Hydra does it.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader, self._master = loader, master
        self._composed: dict[tuple[str, ...], tuple[DictConfig, Config | None]] = {}

    def config(self, overrides: Sequence[str]) -> Config:
        """The checked config of one job.

        Raises:
            ConfigError: for a job that cannot be run.
        """
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        # Only plain values: what adds or removes a key is left to Hydra.
        plain = [item for item in parsed if item.type == OverrideType.CHANGE and item.package is None]
        values = [item for item in plain if "." in item.key_or_group and not item.key_or_group.startswith("hydra.")]
        tree, config = self._shared([item for item in parsed if item not in values])
        if config is not None and not any(isinstance(item.value(), dict) for item in values):
            return with_values(config, ((item.key_or_group, item.value()) for item in values))
        tree = tree.copy()
        for item in values:
            try:
                OmegaConf.update(tree, item.key_or_group, item.value(), merge=True)
            except (ConfigAttributeError, ConfigKeyError) as error:
                raise ConfigCompositionException(f"Could not override '{item.key_or_group}'.") from error
            except OmegaConfBaseException as error:
                raise ConfigCompositionException(f"Error merging override {item.input_line}") from error
        return strict(tree)

    def _shared(self, choices: Sequence[Override]) -> tuple[DictConfig, Config | None]:
        """What choices of groups make: the tree and, if nothing in it waits for a value of a job, the config."""
        key = tuple(str(item.input_line) for item in choices)
        if key not in self._composed:
            tree, config = without_hydra(self._loader.load_sweep_config(self._master, list(key))), None
            if "${" not in OmegaConf.to_yaml(tree):
                with contextlib.suppress(ConfigError):  # Data without its path, say, which each job gives.
                    config = strict(tree)
            self._composed[key] = tree, config
        return self._composed[key]


def without_hydra(tree: DictConfig) -> DictConfig:
    """A composed tree without Hydra's own part."""
    tree = tree.copy()
    with open_dict(tree):
        tree.pop("hydra", None)
    return tree


def jobs_of_sweep(name: str, arguments: Sequence[str] = ()) -> list[Job]:
    """The runs of the sweep `name` with some overrides on top, without running anything; of a search the released one.

    What was expanded once is remembered below the cache folder.

    Raises:
        ConfigError: for an unknown name or a job that cannot be run.
    """
    given = dict(item.split("=", 1) for item in arguments if "=" in item)
    cache = Path(given.get("compute.cache_dir", Config().compute.cache_dir)) / "sweeps"
    return remembered(cache, [name, *arguments], lambda: _composed_jobs(name, arguments))


def _composed_jobs(name: str, arguments: Sequence[str]) -> list[Job]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3", job_name="dptune"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [f"sweeps={name}", *arguments], RunMode.MULTIRUN)
        sweeper, overrides = master.hydra.sweeper, [f"sweeps={name}", *arguments]
        if "prior" not in sweeper:
            return jobs_of(loader, master, sweeper.params, sweeper.axes, sweeper.include, overrides)
        candidates = jobs_of(loader, master, sweeper.params, [sweeper.prior], [], overrides)
        return [released_by(candidates, sweeper.mean, sweeper.eta)]
