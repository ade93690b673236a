"""The house rules, read from the source: imports go one way, and only the privacy package draws batches and noise."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "dptune"
FILES = sorted(SOURCE.rglob("*.py"))

# Rooms stand on floors: each imports from those that it names, all of them below. privacy stands alone; of it, config
# sees the choices of a plan, which are plain Python.
ALLOWED: dict[str, set[str]] = {
    "privacy": set(),
    "config": {"privacy"},
    "records": {"config", "privacy"},
    "identity": {"config", "records"},
    "data": {"config", "identity"},
    "models": {"config", "data", "identity", "records"},
    "evaluation": {"config", "data", "records"},
    "training": {"config", "data", "models", "privacy", "records"},
    "sweeps": {"config", "identity", "records"},
    "report": {"config", "privacy", "records", "sweeps"},
    "installation": set(),
    "runs": {
        *("config", "identity", "records", "privacy", "data", "models", "training", "evaluation", "sweeps"),
        "installation",
    },
    "cli": {"config", "records", "runs", "sweeps", "report"},
}
LIGHT = [
    "config",
    "identity",
    "records",
    "sweeps",
    "runs.privacy",
    "runs.budget",
    "runs.preview",
    "models.tokenizers",
    "runs.watch",
    "report",
    "installation",
]
LIGHT_PRIVACY = ["plan", "accounting", "sampling", "streams", "allocation", "selection", "guarantee", "spent"]
CHOICES = {"dptune.privacy.rules"} | {
    f"dptune.privacy.rules.{name}"
    for name in ("ALLOCATIONS", "CLIPPINGS", "GROUPINGS", "SCHEDULES", "UNITS", "WEIGHTS", "NoiseMode")
}
HEAVY = {"torch", "transformers", "peft", "opacus", "wandb"}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """Modules that a file imports; with `at_import` only those that importing it loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if at_import and node in inner:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not {name for name in imports(path) if name.startswith("dptune")}
        return
    parts = {name.split(".")[1] for name in imports(path) if name.startswith("dptune.") and name != "dptune"}
    assert parts - {part} <= ALLOWED[part]
    if part == "config":
        assert {name for name in imports(path) if name.startswith("dptune.privacy")} <= CHOICES


def test_a_config_is_checked_without_anything_heavy() -> None:
    code = "import sys, dptune.config.checks; assert not {'numpy', 'scipy', 'torch', 'pandas'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("room", ["config", "records", "privacy", "data", "models", "training", "sweeps", "runs"])
def test_no_module_imports_itself_by_way_of_others(room: str) -> None:
    """Wherever an import stands: at the top, in a function or for the type checker alone."""
    modules = {f"dptune.{room}.{path.stem}": path for path in (SOURCE / room).glob("*.py")}
    TopologicalSorter({name: imports(path) & modules.keys() for name, path in modules.items()}).prepare()


@pytest.mark.parametrize("part", [*LIGHT, *(f"privacy.{name}" for name in LIGHT_PRIVACY)])
def test_what_reads_configs_and_records_imports_no_torch(part: str) -> None:
    start = SOURCE / Path(*part.split("."))
    todo = sorted(start.rglob("*.py")) if start.is_dir() else [start.with_suffix(".py")]
    done: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in done:
            continue
        done.add(path)
        names = imports(path, at_import=True)
        assert not {name.split(".")[0] for name in names} & HEAVY, path
        for name in names:
            if name.startswith("dptune."):
                module = SOURCE / Path(*name.split(".")[1:]).with_suffix(".py")
                if module.is_file():
                    todo.append(module)


def test_only_the_privacy_package_draws_noise_or_batches() -> None:
    """Gaussian draws and random choices of rows; the only other randomness is named for what it is."""
    drawing = re.compile(
        r"torch\.(randn|normal|rand|randint|randperm|bernoulli)\w*\(|\.(normal_|uniform_|bernoulli_)\(|default_rng"
        r"|RandomState|random\.(choice|sample|shuffle|normal|gauss)|Generator\(|DataLoader|RandomSampler"
    )
    public = {
        # Generates the embedded public stand-in records.
        Path("data/supportdesk.py"),
        # Pretrains the embedded backbone on the public split.
        Path("runs/pretraining.py"),
        # Initial weights of adapters, under a public seed.
        Path("models/own_adapters.py"),
        Path("models/peft_adapters.py"),
        Path("models/pst.py"),
    }
    for path in FILES:
        inside = path.relative_to(SOURCE)
        if inside.parts[0] == "privacy" or inside in public:
            continue
        assert not drawing.search(path.read_text(encoding="utf-8")), inside


def test_no_file_uses_what_the_project_forbids() -> None:
    forbidden = re.compile(
        r"trust_remote_code\s*=\s*True|torch\.load\((?!.*weights_only=True)|pickle\.load|_target_\s*=|hydra\._internal"
    )
    for path in FILES:
        assert not forbidden.search(path.read_text(encoding="utf-8")), path
