"""The front door: which command is meant, what its page says, and which argument cannot be read."""

import re

import pytest

from dptune import cli
from dptune.sweeps.expand import names


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    cli.main(arguments)
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    return error


def test_the_overview_lists_commands_groups_and_sweeps(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--help")
    words = set(re.findall(r"[\w/]+", text))
    assert set(cli.VERBS) <= words and set(names()) <= words
    assert {"adapter", "lora_xs", "privacy", "adaptive", "model", "nano"} <= words
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", cli.VERBS)
def test_each_command_has_a_page_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, name, "--help").startswith(f"dptune {name} ")


@pytest.mark.parametrize(("typed", "meant"), [("tabel", "table"), ("stauts", "status"), ("reports", "report")])
def test_a_mistyped_command_gets_the_nearest(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"did you mean dptune {meant}?" in refused(capsys, typed)


def test_a_word_near_to_nothing_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert "dptune can: run, sweep, status" in refused(capsys, "zzz")


@pytest.mark.parametrize("argument", ["data.columns.instruction==Good?", "data.columns.input=a,b{"])
def test_a_value_that_cannot_be_read_names_the_argument_and_a_way(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key, _, value = argument.partition("=")
    error = refused(capsys, argument)
    assert f"{argument}: its value cannot be read" in error and f"""'{key}="{value}"'""" in error


def test_a_sweep_is_asked_for_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert "sweep needs a name first" in refused(capsys, "sweep")
    assert "did you mean smoke?" in refused(capsys, "sweep", "smok")
    assert "above the 512 training records" in refused(
        capsys, "sweep", "smoke", "hyperparameter.expected_batch_size=9999"
    )


@pytest.mark.parametrize("flag", ["--cfg", "--info"])
def test_what_shows_something_runs_nothing_also_in_a_sweep(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "-m", "sweeps=smoke", flag, "hydra" if flag == "--cfg" else "config")
    assert "sweeper" in shown
