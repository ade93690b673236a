"""What the README tells a stranger to type exists."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from dptune.sweeps.expand import jobs_of_sweep
from dptune.sweeps.jobs import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.removeprefix("$ ").split("  #")[0] for line in README.splitlines() if line.startswith("$ ")]
DPTUNE = [shlex.split(line)[1:] for line in COMMANDS if line.startswith(".venv/bin/dptune")]
MAKE = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("make")]


def test_the_readme_has_commands() -> None:
    assert len(DPTUNE) >= 5 and len(MAKE) >= 2


@pytest.mark.parametrize("arguments", DPTUNE, ids=" ".join)
def test_a_dptune_command_composes(arguments: list[str]) -> None:
    if arguments[:1] == ["table"]:
        assert jobs_of_sweep(arguments[1])
        return
    overrides = [re.sub(r"=([^=,]+),.*", r"=\1", item) for item in arguments if "=" in item]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("config", overrides)


@pytest.mark.parametrize("arguments", MAKE, ids=" ".join)
def test_a_make_command_has_its_target_and_variables(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for argument in arguments:
        name, _, value = argument.partition("=")
        assert re.search(rf"^{name}\s*(:|\?=)", makefile, re.MULTILINE)
        if name == "SWEEP":
            assert jobs_of_sweep(value)


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_files_of_the_repository_hold_no_path_of_a_machine() -> None:
    pattern = re.compile(r"/(home|root|Users|work)/")
    for path in [*Path(ROOT, "conf").rglob("*.yaml"), *Path(ROOT, "sweeps").rglob("*.yaml"), ROOT / "Makefile"]:
        assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_the_analysis_page_runs_on_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from dptune.config.schema import Config
    from dptune.records.record import Metrics, Privacy, RunRecord

    for name in ("uniform", "adaptive"):
        for seed in (0, 1):
            config = Config()
            config.privacy.name, config.environment.seed = name, seed
            accuracy = 0.5 + 0.25 * (name == "adaptive")
            RunRecord(
                run_id=f"{name}{seed}",
                status="done",
                config=dataclasses.asdict(config),
                metrics=Metrics(accuracy, {"a": accuracy}, "a", 0.0, None, 1.0, 4, 0, {"a": 4}),
                privacy=Privacy(True),
            ).write(tmp_path / "outputs" / f"{name}{seed}")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "analysis" / "README.md").read_text(encoding="utf-8")
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    shown = capsys.readouterr().out
    assert "0.75" in shown and re.search(r"mean\s+0\.25", shown)
