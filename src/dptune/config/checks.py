"""What a composed tree must satisfy before anything is loaded: known keys, types, bounds, possible combinations."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from dptune.config.adapters import ADAPTERS
from dptune.config.files import data_files, file_splits, readable
from dptune.config.ranges import OF_INTEGERS, OF_NUMBERS, RANGES, SMALLEST_STABILITY
from dptune.config.schema import (
    EMBEDDED,
    EMBEDDED_DATA,
    ON_PUBLIC_GRADIENTS,
    PRETRAINED_ON,
    SPLITS,
    AdapterConfig,
    Config,
    ConfigError,
    DataConfig,
    EnvironmentConfig,
    ModelConfig,
    is_public,
    noise_mode,
    public_sources,
    split_names,
)


def strict(tree: DictConfig | Mapping[str, Any]) -> Config:
    """The config of a composed tree, with every unknown key, wrong type and impossible combination refused.

    Hydra's own check lets `+group.typo=1` pass; merging the plain values into a fresh schema does not.

    Raises:
        ConfigError: with one line for a person.
    """
    source = tree if isinstance(tree, DictConfig) else OmegaConf.create(dict(tree))
    with _errors_for_people():
        config = OmegaConf.to_object(OmegaConf.merge(_schema(), OmegaConf.to_container(source, resolve=True)))
    assert isinstance(config, Config)
    return _checked(config)


def with_values(config: Config, values: Iterable[tuple[str, Any]]) -> Config:
    """A copy of a config with some fields, by their dotted names, replaced: as `strict`, a hundred times as fast.

    Raises:
        ConfigError: with one line for a person.
    """
    made = copy.deepcopy(config)
    for name, value in values:
        *parents, leaf = name.split(".")
        node: Any = made
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else getattr(node, parent, None)
        if not dataclasses.is_dataclass(node) or not hasattr(node, leaf):
            raise ConfigError(unknown_key(name))
        setattr(node, leaf, _typed(type(node), name, leaf, repr(value), value))
    return _checked(made)


def from_values(values: Mapping[str, Any]) -> Config:
    """The config that `dataclasses.asdict` made these values of.

    Raises:
        TypeError: when they are of another schema.
    """
    made = _group(Config(), values)
    assert isinstance(made, Config)
    return made


def _group(default: Any, values: Mapping[str, Any]) -> Any:
    groups = {
        name: _group(group, values[name]) for name, group in vars(default).items() if dataclasses.is_dataclass(group)
    }
    sources = {
        name: {key: _group(DataConfig(), value) for key, value in values[name].items()}
        for name, group in vars(default).items()
        if isinstance(group, dict)
    }
    return type(default)(**{**values, **groups, **sources})


def _typed(group: type[Any], name: str, leaf: str, text: str, value: Any) -> Any:
    """A value as the field `leaf` of a group has it."""
    if (group, leaf, text) not in _TYPED:
        tree = OmegaConf.structured(group)
        with _errors_for_people(name):
            tree[leaf] = value
        _TYPED[group, leaf, text] = getattr(OmegaConf.to_object(tree), leaf)
    return copy.deepcopy(_TYPED[group, leaf, text])


_TYPED: dict[tuple[type[Any], str, str], Any] = {}


@contextmanager
def _errors_for_people(name: str | None = None) -> Iterator[None]:
    """Errors of OmegaConf as one line each; `name` is the field, where OmegaConf sees a part of the tree only."""
    try:
        yield
    except InterpolationKeyError as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from None
    except InterpolationResolutionError as error:
        lacking = re.search(r"Environment variable '(\w+)' not found", str(error))
        reason = f"the environment variable {lacking[1]} is not set" if lacking else _first_line(error)
        raise ConfigError(f"{error.full_key}: {reason}; set it, or give {error.full_key}=...") from None
    except ConfigKeyError as error:
        raise ConfigError(unknown_key(name or str(error.full_key))) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name or error.full_key}: {_first_line(error)}") from None
    except OverflowError as error:  # An integer of hundreds of digits where a number is wanted.
        where = re.search(r"full_key: (\S+)", str(error))
        key = name or (where[1] if where else "the config")
        raise ConfigError(f"{key}: the number is too large; take one below {OF_NUMBERS.most:g}") from None


def _checked(config: Config) -> Config:
    _check_fields(config)
    _check_together(config)
    return config


@functools.cache
def _schema() -> DictConfig:
    """The tree of the dataclasses; slow to make, and merging copies it."""
    tree: DictConfig = OmegaConf.structured(Config)
    return tree


def unknown_key(key: str) -> str:
    """A sentence about a key that the schema does not have, with the nearest one that it has."""
    known = [name for name, _, _ in _leaves(Config())]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    if not near:
        leaf = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == leaf][:1]
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; see `dptune --cfg job`")


def unknown_choice(given: str, name: str, kind: str, choices: Sequence[str]) -> str:
    """A sentence about a name that is none of the choices of a kind, with the nearest one."""
    near = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{given} does not exist; {hint}{kind} can be: {', '.join(choices)}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every field of the tree that is not itself a group: dotted name, field, value."""
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
            continue
        yield f"{prefix}{item.name}", item, value
        for key, source in value.items() if isinstance(value, dict) else ():
            yield from _leaves(source, f"{prefix}{item.name}.{key}.")


def _check_fields(config: Config) -> None:
    for name, item, value in _leaves(config):
        rules = item.metadata
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_size(name, value)
        if value is None or not rules:
            continue
        choices = rules.get("choices")
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"{name}={value} is not one of {', '.join(choices)}{hint}")
        if choices is None:
            _check_bounds(name, value, rules)
            _check_range(name, value)


def _check_size(name: str, value: float) -> None:
    """What is too large to be compared, or to be written in a message."""
    if isinstance(value, int) and abs(value) > 2**63:
        raise ConfigError(f"{name}: an integer of {len(str(abs(value)))} digits is too large; take one below 2**63")


def _check_range(name: str, value: float) -> None:
    fitting = RANGES.get(name, OF_INTEGERS if isinstance(value, int) else OF_NUMBERS)
    if not fitting.least <= value <= fitting.most:
        raise ConfigError(f"{name}={value:g} must lie between {fitting.least:g} and {fitting.most:g}: {fitting.why}")


def _check_bounds(name: str, value: float, bounds: Mapping[str, float]) -> None:
    holds = {
        "above": lambda bound: value > bound,
        "least": lambda bound: value >= bound,
        "below": lambda bound: value < bound,
        "most": lambda bound: value <= bound,
    }
    words = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
    if not math.isfinite(value) or not all(holds[kind](bound) for kind, bound in bounds.items()):
        wanted = " and ".join(f"{words[kind]} {bound:g}" for kind, bound in bounds.items())
        raise ConfigError(f"{name}={value:g} must be {wanted}")


def _check_together(config: Config) -> None:
    """Combinations of fields that no run can have; what depends on data or model is checked when these are read."""
    privacy, data, hyper = config.privacy, config.data, config.hyperparameter
    if not privacy.enabled:
        for name in ("target_epsilon", "noise_multiplier"):
            if getattr(privacy, name) is not None:
                raise ConfigError(
                    f"privacy.{name}={getattr(privacy, name):g} with privacy=none: a non-private run has no epsilon; "
                    f"take another privacy=... or leave privacy.{name} out"
                )
        if privacy.budget is not None:
            raise ConfigError(
                f"privacy.budget={privacy.budget:g} with privacy=none: a non-private run has no epsilon that a budget "
                "could hold; leave it out"
            )
    elif (privacy.target_epsilon is None) == (privacy.noise_multiplier is None):
        raise ConfigError(
            "give exactly one of privacy.target_epsilon and privacy.noise_multiplier (set the other to null)"
        )
    if privacy.projection == "private" and not privacy.enabled:
        raise ConfigError(
            "privacy.projection=private with privacy=none: nothing pays for a subspace of private gradients; use "
            "projection=history or leave it out"
        )
    if (privacy.projection == "private") != (privacy.projection_noise_multiplier is not None):
        raise ConfigError(
            "privacy.projection=private is paid for with privacy.projection_noise_multiplier=..., and only it is; "
            "give both or neither"
        )
    needs_public = privacy.projection in ON_PUBLIC_GRADIENTS and config.public.method == "none"
    if needs_public and data.name not in EMBEDDED_DATA:
        raise ConfigError(
            f"privacy.projection={privacy.projection} needs public data, which of itself only "
            f"data={', '.join(EMBEDDED_DATA)} has; start from public data with public=joint, or use history"
        )
    if needs_public and data.organisation == "dev":
        raise ConfigError(
            f"privacy.projection={privacy.projection} takes its gradients from the support desk's dev, which "
            "data.organisation=dev protects: public data must be other data; start from public data with public=joint, "
            "or use history"
        )
    check_unit(privacy.unit, data.layout, data.columns.user)
    if privacy.projection != "none" and (
        config.environment.optimizer == "dp_adam_bc" or config.environment.shrinkage != "none"
    ):
        raise ConfigError(
            f"privacy.projection={privacy.projection} spreads noise unevenly over coordinates, which "
            "environment.optimizer=dp_adam_bc and environment.shrinkage do not know; use neither with it"
        )
    if privacy.unit != "example" and privacy.examples_per_user is None:
        raise ConfigError(
            f"privacy.unit={privacy.unit} needs privacy.examples_per_user=..., a public bound on each user's examples"
        )
    if privacy.unit == "example" and privacy.examples_per_user is not None:
        raise ConfigError(
            "privacy.examples_per_user is for users: set privacy.unit=user_els or user_uls, or leave it out"
        )
    if privacy.score_noise_multiplier is not None:
        _check_score(config)
    if privacy.budget is not None and is_public(data):
        raise ConfigError(
            f"privacy.budget={privacy.budget:g}: public data have no budget and are not booked; leave it out"
        )
    least = SMALLEST_STABILITY * hyper.max_grad_norm
    if privacy.enabled and privacy.clipping in ("auto_s", "psac") and privacy.clipping_stability < least:
        raise ConfigError(
            f"privacy.clipping_stability={privacy.clipping_stability:g} with privacy.clipping={privacy.clipping} would "
            f"let rounding count for a gradient; take at least {least:g}, {SMALLEST_STABILITY:g} of "
            "hyperparameter.max_grad_norm"
        )
    _check_permissions(config)
    check_adapter(config.adapter, config.environment)
    _check_data(data)
    _check_start(config)
    _check_model(config.model)
    if privacy.unit == "example" and data.train_size is not None:
        size = math.floor(data.train_size * config.data_sensitivity.train_fraction)
        if hyper.expected_batch_size > size:
            raise ConfigError(
                f"hyperparameter.expected_batch_size={hyper.expected_batch_size} is above the {size} training records; "
                "lower it or raise data.train_size"
            )
    if hyper.warmup_steps >= max(hyper.steps, 1):
        raise ConfigError(
            f"hyperparameter.warmup_steps={hyper.warmup_steps} leaves nothing of hyperparameter.steps={hyper.steps}; "
            "lower the warm-up"
        )


WHOLES = {
    "messages": ("message_tree_id", "conversation"),
    "trees": ("message_tree_id", "conversation"),
    "articles": ("title", "article"),
}
"""Layouts that put more than one person's words into an example: the field of what must be the unit, and its name."""


def check_unit(unit: str, layout: str, user: str) -> None:
    """Raises ConfigError when users are protected by examples that also have other users' words."""
    field, name = WHOLES.get(layout, (user, ""))
    if unit != "example" and user != field:
        raise ConfigError(
            f"privacy.unit={unit} with data.layout={layout}: an example has the words of two users, and one of "
            f"them would not be protected; set data.columns.user={field}, so that a {name} is the unit"
        )


def check_adapter(config: AdapterConfig, environment: EnvironmentConfig) -> None:
    """Raises ConfigError for an adapter that no backbone of this environment can carry."""
    kind = ADAPTERS[config.name]
    if config.dropout > 0:
        raise ConfigError(
            f"adapter.dropout={config.dropout:g} would be noise that the privacy plan did not draw; leave it 0"
        )
    if config.embeddings and config.name != "lora":
        raise ConfigError(f"adapter.embeddings=true is for adapter=lora, not for adapter={config.name}; leave it false")
    if config.target_modules is not None and (kind.top_only or not kind.placed):
        raise ConfigError(f"adapter.target_modules has no meaning for adapter={config.name}; leave it null")
    if config.top_layers is not None and not kind.placed:
        raise ConfigError(f"adapter.top_layers has no meaning for adapter={config.name}; leave it null")
    if kind.changes_matrices and environment.backbone_quantization != "none":
        raise ConfigError(
            f"adapter={config.name} changes the backbone's own matrices, which "
            f"environment.backbone_quantization={environment.backbone_quantization} rounds; set it to none, or choose "
            "adapter=lora"
        )
    if kind.own_weights and environment.precision != "float32":
        raise ConfigError(
            f"adapter={config.name} trains the backbone's own weights, which must be float32; set "
            f"environment.precision=float32 instead of {environment.precision}, or choose adapter=lora"
        )


def _check_start(config: Config) -> None:
    """Raises ConfigError where the adapter could not start from public data, or they would not be public."""
    public, data = config.public, config.data
    if data.name in EMBEDDED_DATA and data.organisation in PRETRAINED_ON:
        raise ConfigError(
            f"data.organisation={data.organisation}: the embedded backbones were pretrained on it, so that it cannot "
            "stand for private data; take private or dev"
        )
    if public.method == "none":
        if public.data:
            raise ConfigError("public.data is given, but public=none uses none; take public=joint, or leave it out")
        return
    if ADAPTERS[config.adapter.name].after_step is not None:
        raise ConfigError(
            f"public.method={public.method} with adapter={config.adapter.name}, which changes its shape as training "
            "goes on: a start has no meaning for it; take public=none, or adapter=lora"
        )
    if public.method == "basis" and config.adapter.name != "lora_xs":
        raise ConfigError(
            f"public=basis is for adapter=lora_xs, not for adapter={config.adapter.name}; take it, or public=joint"
        )
    if public.method == "basis" and config.environment.backbone_quantization != "none":
        raise ConfigError(
            "public=basis needs gradients of the backbone's own matrices, which "
            f"environment.backbone_quantization={config.environment.backbone_quantization} rounds; set it to none"
        )
    for name, source in public_sources(public).items():
        where = f"public.data.{name}"
        try:
            _check_data(source)
        except ConfigError as error:
            raise ConfigError(re.sub(r"\bdata\.", f"{where}.", str(error))) from None
        if name in public.data and public.data[name].public is False:
            raise ConfigError(f"{where}.public=false: a start is made of public data alone; take another source")
        if source.name not in EMBEDDED_DATA:
            continue
        if source.organisation == "private":
            raise ConfigError(
                f"{where}.organisation=private stands for data to protect; take dev or {', '.join(PRETRAINED_ON)}"
            )
        if (source.name, source.organisation) == (data.name, data.organisation):
            raise ConfigError(
                f"{where}.organisation={source.organisation} is what data.organisation={data.organisation} protects: "
                "public data must be other data; leave that source out"
            )


def _check_model(model: ModelConfig) -> None:
    """Where the backbone is, without reading it."""
    if model.path is not None:
        path = Path(model.path)
        if not (path / "config.json").is_file() and not (path.suffix == ".gguf" and path.is_file()):
            raise ConfigError(
                f"model.path={model.path} is no model: a folder with config.json, weights and a tokenizer, or a .gguf "
                "file is needed"
            )
    elif model.repo is not None:
        if re.fullmatch("[0-9a-f]{40}", model.revision or "") is None:
            given = "is missing" if model.revision is None else f"{model.revision} is no full commit"
            raise ConfigError(
                f"model.revision {given}: set model.revision=<commit>, 40 digits from "
                f"https://huggingface.co/{model.repo}/commits/main (or give a local model.path)"
            )
    elif model.name not in EMBEDDED:
        raise ConfigError(
            f"model={model.name} needs model.path=..., a folder in Hugging Face format or a .gguf file (or model.repo)"
        )


def _check_permissions(config: Config) -> None:
    """Raises ConfigError where private data would lose a protection that nobody gave up by its own key."""
    privacy, data = config.privacy, config.data
    public = is_public(data)
    if privacy.enabled and noise_mode(config) == "reproducible" and not public and not privacy.allow_known_noise:
        raise ConfigError(
            "privacy.noise_mode=reproducible on private data: whoever knows the seed, which is in the record, can take "
            "the noise off, so that nothing is guaranteed; leave noise_mode out, or say privacy.allow_known_noise=true"
        )
    for name in ("plain_hashes", "diagnostics"):
        if getattr(data, name) and not public:
            raise ConfigError(
                f"data.{name}=true would tell about single private records; leave it out (data.public=true says that "
                "everybody may read them)"
            )


def _check_score(config: Config) -> None:
    """Raises ConfigError where the proof for the score does not hold (SPECIFICATION.md 8.2)."""
    privacy = config.privacy
    given = f"privacy.score_noise_multiplier={privacy.score_noise_multiplier:g}"
    if not privacy.enabled:
        raise ConfigError(f"{given} with privacy=none: a non-private run cannot be chosen privately; leave it out")
    if privacy.unit != "example":
        raise ConfigError(
            f"{given} with privacy.unit={privacy.unit}: one user may change many answers; set privacy.unit=example, "
            "or leave the score out"
        )


def _check_data(data: DataConfig) -> None:
    """Where the data is, and names and weights that can be seen to be wrong without reading it."""
    given = [name for name in ("path", "hub_id") if getattr(data, name) is not None]
    if data.name not in EMBEDDED_DATA and not given:
        raise ConfigError(f"data={data.name} needs data.path=..., the file to read (or data.hub_id)")
    if data.name in EMBEDDED_DATA and given:
        raise ConfigError(f"data.{given[0]} is given but data={data.name} is embedded: add data=files to read it")
    if data.path is not None and not data_files(data.path):
        raise ConfigError(f"data.path={data.path} is not a file, nor a folder or a pattern with files")
    if data.path is not None:
        try:
            file_splits(data.path, readable(data.path), split_names(data) if data.splits else None)
        except ValueError as error:
            raise ConfigError(f"data.path={data.path}: {error}") from None
    for pair in data.splits or ():
        if pair.rpartition(":")[2] not in {*SPLITS, "hash"} or ":" not in pair:
            raise ConfigError(f"data.splits: {pair} is not SOURCE:OURS, with one of {', '.join(SPLITS)}, hash as OURS")
    if data.task_weights is not None:
        if len(data.task_weights) != len(data.tasks or ()):
            raise ConfigError("data.task_weights must have one number for each of data.tasks; give both or neither")
        if not all(0 < weight < math.inf for weight in data.task_weights):
            raise ConfigError("data.task_weights must be above 0 and finite; leave a task out with data.tasks")
    if data.declared_task_sizes is not None:
        if len(data.declared_task_sizes) != len(data.tasks or ()) or min(data.declared_task_sizes) < 1:
            raise ConfigError(
                "data.declared_task_sizes must have one number of at least 1 for each of data.tasks; give both or none"
            )
        if data.declared_size is not None:
            raise ConfigError("data.declared_size is the sum of data.declared_task_sizes; leave one of them out")
