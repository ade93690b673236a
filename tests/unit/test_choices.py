"""No idle menus: what can be chosen is carried out, differs from the default, and is reached by a sweep."""

import ast
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dptune.config.checks import strict
from dptune.config.schema import EMBEDDED_DATA, Config
from dptune.data.layouts import LAYOUTS
from dptune.data.sources import SOURCES
from dptune.models.quantization import FORMATS
from dptune.privacy.engines import ENGINES
from dptune.runs.public import METHODS
from dptune.sweeps.expand import ROOT, grid, names, without_hydra
from dptune.training.optimizers import OPTIMIZERS, SHRINKAGES
from dptune.training.projection import PROJECTIONS

CONF = ROOT / "conf"
GROUPS = ("method", "adapter", "privacy", "public", "hyperparameter", "environment", "data_sensitivity")
"""Groups whose files are cases of an experiment; models, data, mirrors and machines are the user's own."""
DECIDED_BY_THE_DATA = {"privacy.noise_mode"}
FOR_AUDITS = {"membership_ceiling", "delta"}


def choices_of(key: str) -> set[str]:
    node: Any = Config()
    *groups, leaf = key.split(".")
    for group in groups:
        node = getattr(node, group)
    return set(next(item for item in dataclasses.fields(node) if item.name == leaf).metadata["choices"])


@pytest.mark.parametrize(
    ("key", "table", "more"),
    [
        ("environment.optimizer", OPTIMIZERS, set()),
        ("environment.shrinkage", SHRINKAGES, set()),
        ("environment.engine", ENGINES, {"auto"}),
        ("environment.backbone_quantization", FORMATS, {"none"}),
        ("privacy.projection", PROJECTIONS, set()),
        ("data.layout", LAYOUTS, {"auto"}),
        ("public.method", METHODS, {"none"}),
    ],
)
def test_every_choice_is_carried_out_by_a_row_of_a_table(key: str, table: Mapping[str, Any], more: set[str]) -> None:
    assert choices_of(key) == table.keys() | more


def test_embedded_data_has_a_source_that_is_public_and_can_be_reworded() -> None:
    assert SOURCES.keys() == set(EMBEDDED_DATA)
    assert all(source.public and source.reword and source.rename for source in SOURCES.values())


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read(path: Path) -> dict[str, Any]:
    return dict(OmegaConf.to_container(OmegaConf.load(path)) or {})


def own(group: str, name: str) -> dict[str, Any]:
    """What a file of `conf` sets itself, as dotted keys of the config."""
    content = read(CONF / group / f"{name}.yaml")
    content.pop("defaults", None)
    return dict(flat(content, "" if group == "method" else f"{group}."))


def bases(group: str, name: str) -> list[tuple[str, str]]:
    """Files of `conf` that a file builds on or chooses, as group and name."""
    found = []
    for item in read(CONF / group / f"{name}.yaml").get("defaults", ()):
        chosen = item.items() if isinstance(item, Mapping) else [(group, item)]
        found += [(key.split("/")[-1].partition("@")[0], value) for key, value in chosen if value != "_self_"]
    return found


DEFAULTS = dict(flat(dataclasses.asdict(Config())))
FILES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/*.yaml"))


@pytest.mark.parametrize(("group", "name"), FILES, ids=map("=".join, FILES))
def test_a_file_says_only_what_differs_from_what_it_builds_on(group: str, name: str) -> None:
    before = dict(DEFAULTS)
    todo = bases(group, name)
    while todo:
        base = todo.pop()
        before |= own(*base)
        todo += bases(*base)
    said = own(group, name)
    # A file that has nothing else to say still says its name.
    assert len(said) == 1 or not {key for key, value in said.items() if before[key] == value}


def test_the_defaults_of_the_command_line_are_those_of_the_schema() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert strict(without_hydra(compose("config"))) == Config()


@cache
def reached() -> tuple[set[tuple[str, str]], dict[str, set[str]]]:
    """Files of `conf`, and values of each key, that some sweep reaches."""
    files = {("privacy", "adaptive"), ("adapter", "lora"), ("hyperparameter", "default"), ("environment", "reference")}
    files |= {("data_sensitivity", "clean"), ("public", "none")}
    values = {key: {str(value)} for key, value in DEFAULTS.items()}
    for sweep in names():
        content = read(ROOT / "sweeps" / f"{sweep}.yaml")
        files |= {(key.split("/")[-1], name) for item in content.pop("defaults", ()) for key, name in item.items()}
        sweeper = content.pop("hydra")["sweeper"]
        parts = [sweeper.get("params", {}), sweeper.get("prior", {}), *sweeper.get("axes", ())]
        said = [f"{key}={value}" for part in parts for key, value in part.items()]
        for job in (job for override in said for job in grid([override])):
            key, _, value = job[0].partition("=")
            values.setdefault(key, set()).add(value)
            files.add((key, value))
        for key, value in flat(content):
            values.setdefault(key, set()).add(str(value))
    todo = [file for file in files if file[0] in GROUPS]
    while todo:
        group, name = todo.pop()
        for key, value in own(group, name).items():
            values.setdefault(key, set()).add(str(value))
        new = [file for file in bases(group, name) if file[0] in GROUPS and file not in files]
        files.update(new)
        todo += new
    return files, values


CASES = [file for file in FILES if file[0] in GROUPS]


@pytest.mark.parametrize(("group", "name"), CASES, ids=map("=".join, CASES))
def test_every_case_is_in_a_sweep(group: str, name: str) -> None:
    assert (group, name) in reached()[0]


CHOICES = [
    f"{group}.{item.name}"
    for group in GROUPS[1:]
    for item in dataclasses.fields(getattr(Config(), group))
    if "choices" in item.metadata and f"{group}.{item.name}" not in DECIDED_BY_THE_DATA
]


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_of_a_field_is_in_a_sweep(key: str) -> None:
    assert choices_of(key) <= reached()[1][key]


def used(tree: ast.AST) -> Counter[str]:
    """How often each name is used, not defined."""
    found: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found[node.id] += 1
        elif isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif isinstance(node, ast.alias):
            found[node.name] += 1
    return found


def test_every_public_name_of_privacy_is_used_outside_of_tests() -> None:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")}
    total = sum((used(tree) for tree in trees.values()), Counter[str]())
    for path, tree in trees.items():
        if path.parent.name != "privacy" or path.stem == "audit":
            continue
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert total[node.name] > used(node)[node.name] or node.name in FOR_AUDITS, f"{path.stem}.{node.name}"
