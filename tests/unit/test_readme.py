"""What the pages tell a stranger to type, read and import exists."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dptune.records.record import read
from dptune.sweeps.expand import jobs_of_sweep
from dptune.sweeps.jobs import ROOT

PAGES = [*ROOT.glob("*.md")]
PAGES += [page for folder in ("analysis", "src", "sweeps") for page in (ROOT / folder).rglob("*.md")]
PAGES = sorted(page for page in PAGES if page.name != "CHANGELOG.md")  # It names what was.
SOURCE = ROOT / "src" / "dptune"
MADE = {
    "record.json",
    "NON_PRIVATE_skipped.txt",
    "NON_PRIVATE_cost.json",
    "adapter/",
    "adapter/GUARANTEE.md",
    "NON_PRIVATE/",
}
"""What a run makes, and a prefix of names in it."""
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


def of_pages(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What a page marks as code within a line."""
    return re.findall(r"`([^`\n]+)`", prose(page))


@of_pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", prose(page))):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@of_pages
def test_paths_lead_to_files(page: Path) -> None:
    places = (page.parent, ROOT, SOURCE, ROOT / "sweeps", SOURCE / "privacy")
    for span in spans(page):
        path = span.partition("::")[0]
        if not re.fullmatch(r"(\.\./)*[\w*][\w./*-]*(/|\.(py|md|yaml|toml|json|ipynb|txt))", path) or path in MADE:
            continue
        if path.startswith("outputs/") or re.search(
            r"\b[A-Z]+\.(?!md)", path
        ):  # Made by runs; NAME.yaml stands for any.
            continue
        assert any(next(place.glob(path), None) or (place / path).exists() for place in places), path


@of_pages
def test_tests_that_are_named_exist(page: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", prose(page)):
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), f"{path}::{name}"


def test_the_table_of_sharp_edges_says_what_their_sections_say() -> None:
    page = (SOURCE / "privacy" / "SHARP_EDGES.md").read_text(encoding="utf-8")
    head, *parts = re.split(r"^## (\w+)\n", page, flags=re.MULTILINE)
    told, found = set(), set()
    for severity, *cells in re.findall(r"^\| (critical|high|medium|low) \|(.*)\|(.*)\|(.*)\|$", head, re.MULTILINE):
        for who, cell in zip(("you", "maintainer", "guarded"), cells, strict=True):
            told |= {(severity, who, number) for number in re.findall(r"\[(\d+)\]", cell)}
    for severity, text in zip(parts[::2], parts[1::2], strict=True):
        for number, actors in re.findall(r"^### (\d+) .+\n\n\*(.+?)\.\*", text, re.MULTILINE):
            found |= {(severity.lower(), who.lower(), number) for who in actors.split(", and ")}
    assert told == found and len({number for _, _, number in found}) == page.count("\n### ")


def has_name(dotted: str) -> bool:
    """Whether `dptune.room.module.name` is a module, or a name that stands at the top of one."""
    parts = dotted.split(".")[1:]
    for length in range(len(parts), -1, -1):
        file = SOURCE.joinpath(*parts[:length])
        module = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        if module.is_file():
            break
    if length == len(parts):
        return True
    name = re.escape(parts[length])
    return bool(re.search(rf"^(def |class |){name}\b", module.read_text(encoding="utf-8"), re.MULTILINE))


@of_pages
def test_code_that_is_named_exists(page: Path) -> None:
    names = [match[0] for span in spans(page) if (match := re.match(r"dptune(\.\w+)+", span))]
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dptune"):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        assert has_name(name), name


def test_the_readmes_python_does_a_run_and_opens_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block, found)
    record, model = found["record"], found["model"]
    assert record.status == "done" and 0 < record.guarantee.epsilon <= 8
    assert read(tmp_path / "outputs" / record.run_id) == record
    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert (
        sum(value.numel() for name, value in model.named_parameters() if "lora_" in name) == record.parameters.trainable
    )
    assert trained and all(bool(value.any()) for value in trained), "a fresh B is zero"


def test_hooks_before_a_commit_do_what_make_check_does() -> None:
    hooks = OmegaConf.load(ROOT / ".pre-commit-config.yaml").repos[0].hooks
    recipe = re.search(r"^check:.*\n((\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    checks = [line.strip().removesuffix(" .").replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert [hook.entry for hook in hooks] == checks
    assert {hook.language for hook in hooks} == {"system"}


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
