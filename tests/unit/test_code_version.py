"""The version of the code counts what can change a number, and nothing else."""

import shutil
from pathlib import Path

import pytest

from dptune.records import code
from dptune.records.code import code_version

PACKAGE = Path(code.__file__).parents[1]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, whose version `version` says."""
    copy = tmp_path / "dptune"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "shipped"))
    monkeypatch.setattr(code, "__file__", str(copy / "records" / "code.py"))
    assert version() == code_version()
    return copy


def version() -> str:
    return code_version.__wrapped__()


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_docstrings_comments_and_layout_are_free(package: Path) -> None:
    replace(package / "privacy" / "plan.py", '"""', '"""In other words: ')
    replace(package / "privacy" / "plan.py", "import dataclasses\n", "# A comment.\n\nimport dataclasses\n")
    replace(package / "config" / "schema.py", '    """Peak learning rate."""', '    """The largest learning rate."""')
    assert version() == code_version()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("privacy/clipping.py", "0.0", "0.5"),
        ("config/schema.py", "_number(0.02, above=0)", "_number(0.03, above=0)"),
        ("training/loop.py", "        yield ", "        return "),
        ("data/templates.py", 'f"', '"'),
    ],
)
def test_what_can_change_a_number_is_not(package: Path, file: str, old: str, new: str) -> None:
    replace(package / file, old, new)
    assert version() != code_version()


def test_a_default_that_is_an_empty_text_counts(package: Path) -> None:
    (package / "data" / "new.py").write_text('def f(x, y=""):\n    """Words."""\n')
    with_default = version()
    (package / "data" / "new.py").write_text("def f(x, y):\n    pass\n")
    assert version() != with_default


def test_parts_that_only_look_at_runs_do_not_count(package: Path) -> None:
    for name in code.NOT_NUMBERS:
        path = package / name
        assert path.exists(), name
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            file.write_text("")
    assert version() == code_version()
