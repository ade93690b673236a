"""Packages that only some runs and views need, and what is said where one is missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from dptune.config.schema import Config, ConfigError, public_sources

MODULES = {
    "gguf": ("gguf",),
    "hub": ("datasets", "pyarrow"),
    "opacus": ("opacus",),
    "report": ("altair", "great_tables", "vl_convert"),
    "slurm": ("submitit",),
    "text": ("rouge_score", "sacrebleu"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "workspace": ("wandb_workspaces",),
}
"""What each extra of pyproject.toml is asked for, by the name that is imported."""

TRACKING = {"wandb": "wandb", "wandb_offline": "wandb", "trackio": "trackio"}
"""The extra of each mirror."""


def require(extra: str, what: str) -> None:
    """Go on only if all packages of an extra can be imported.

    Args:
        extra: one of `MODULES`.
        what: what needs it, for the message.

    Raises:
        ConfigError: saying how to get it.
    """
    if not all(_can_be_imported(name) for name in MODULES[extra]):
        raise ConfigError(needs(extra, what))


def _can_be_imported(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def needs(extra: str, what: str) -> str:
    """What is said where an extra is missing."""
    return f"{what} needs the extra `{extra}`: pip install 'dptune[{extra}]', or in a clone make setup EXTRAS={extra}"


def check_extras(config: Config) -> None:
    """What a run needs by its config alone.

    Raises:
        ConfigError: for the first extra that is missing.
    """
    data, model = config.data, config.model
    if config.tracking.name in TRACKING:
        require(TRACKING[config.tracking.name], f"tracking={config.tracking.name}")
    if config.environment.engine == "opacus":
        require("opacus", "environment.engine=opacus")
    if model.path is not None and Path(model.path).suffix == ".gguf":
        require("gguf", f"model.path={model.path}")
    sources = {"data": data} | {f"public.data.{name}": source for name, source in public_sources(config.public).items()}
    for name, source in sources.items():
        if source.path is not None and Path(source.path).suffix == ".parquet":
            require("hub", f"{name}.path={source.path}")
        if source.path is None and source.hub_id is not None:
            require("hub", f"{name}.hub_id={source.hub_id}")
