"""What the page about data tells a stranger to type exists."""

import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dptune.cli import VERBS
from dptune.config.schema import EMBEDDED_DATA, Config
from dptune.sweeps.expand import without_hydra
from dptune.sweeps.jobs import ROOT

PAGE = (ROOT / "src" / "dptune" / "data" / "README.md").read_text(encoding="utf-8")
LINES = [shlex.split(line)[2:] for line in PAGE.splitlines() if line.startswith("$ dptune")]
COMMANDS = [line[line[0] in VERBS :] for line in LINES]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_composes_into_a_config(arguments: list[str]) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        tree = without_hydra(compose("config", arguments))
    OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(tree)))


def test_every_preset_is_listed() -> None:
    presets = {path.stem for path in (ROOT / "conf" / "data").glob("*.yaml")} - set(EMBEDDED_DATA)
    assert len(COMMANDS) >= 8 and presets == set(
        re.findall(r"`(\w+)`", PAGE.partition("## Presets")[2].split("|---|---|")[1].split("\n\n")[0])
    )


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "src" / "dptune" / "data" / target).exists(), target
