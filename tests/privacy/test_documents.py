"""The documents say what the code says: citations, tests, modules, constants and the snippet."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

from dptune.privacy import plan as plan_module
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.spent import Circumstances, guarantee_of

ROOT = Path(__file__).parents[2]
PRIVACY = Path(plan_module.__file__).parent
SPECIFICATION = (PRIVACY / "SPECIFICATION.md").read_text(encoding="utf-8")
README = (PRIVACY / "README.md").read_text(encoding="utf-8")

HEADING = re.compile(r"^#{2,3} (.+)$", re.M)
HEADINGS = [match[1] for match in HEADING.finditer(SPECIFICATION)]
SECTIONS = {heading.split()[0] for heading in HEADINGS if heading[0].isdigit()}
CITATION = re.compile(r"SPECIFICATION\.md((?:\s*(?:,|and|to)?\s*\d+(?:\.\d+)?(?:\s[a-d]\d?\b)?)+)")


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def named_tests(text: str) -> list[tuple[str, str]]:
    """Pairs of file and function; a bare `::name` belongs to the file named before it."""
    pairs, file = [], ""
    for match in re.finditer(r"`(tests/[\w/]+\.py)?::(\w+)`", text):
        file = match[1] or file
        pairs.append((file, match[2]))
    return pairs


def citations(text: str) -> list[str]:
    """Numbers of the sections that a source file cites."""
    return [number for match in CITATION.finditer(text) for number in re.findall(r"\d+(?:\.\d+)?", match[1])]


def test_citations_are_found_in_every_form_the_code_uses() -> None:
    text = "(SPECIFICATION.md 2.2 to 2.6). SPECIFICATION.md 2.1, 4.2, 10.3; SPECIFICATION.md 3.3 a, SPECIFICATION.md 5"
    assert citations(text) == ["2.2", "2.6", "2.1", "4.2", "10.3", "3.3", "5"]


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: path.stem)
def test_cited_sections_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not set(citations(text)) - SECTIONS
    assert len(CITATION.findall(text)) == text.count("SPECIFICATION.md"), "a citation without a section number"


def test_sections_are_numbered_in_order_and_once() -> None:
    numbers = [tuple(map(int, heading.split()[0].split("."))) for heading in HEADINGS if heading[0].isdigit()]
    assert numbers == sorted(set(numbers))
    assert {number[0] for number in numbers} == set(range(1, 11))


@pytest.mark.parametrize("document", ["SPECIFICATION.md", "README.md"])
def test_links_lead_somewhere(document: str) -> None:
    anchors = {anchor(heading) for heading in HEADINGS}
    links = re.findall(r"\]\(([\w./]*)(?:#([\w-]+))?\)", (PRIVACY / document).read_text(encoding="utf-8"))
    assert links
    for file, fragment in links:
        assert not file or (PRIVACY / file).is_file()
        assert not fragment or fragment in anchors, fragment


def test_every_test_that_is_named_exists() -> None:
    named = named_tests(README)
    assert len(named) >= 10
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{function}"


def test_every_module_is_on_the_map() -> None:
    paragraph = re.search(r"^\*\*Modules\*\*.*?\n\n", README, re.M | re.S)
    assert paragraph is not None
    words = set(re.findall(r"`(\w+)`", paragraph[0]))
    assert words == {path.stem for path in PRIVACY.glob("*.py")} - {"__init__"}


def test_quoted_constants_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| [\d.]+ \| `(\w+)\.([\w.]+)` \| (.+) \|$", SPECIFICATION, re.M)
    assert len(rows) >= 10
    for module, names, value in rows:
        actual = reduce(getattr, names.split("."), importlib.import_module(f"dptune.privacy.{module}"))
        assert actual == eval(value, {"__builtins__": {}}), f"{module}.{names}"


def test_the_snippet_recomputes_an_epsilon_from_a_record(tmp_path: Path) -> None:
    plan = PrivacyPlan(
        num_units=10_000,
        expected_batch_size=256,
        steps=200,
        delta=1e-5,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    privacy = {"plan": plan.to_dict(), "steps": plan.steps}
    guarantee = dataclasses.asdict(guarantee_of(plan, tmp_path / "ledger.jsonl", Circumstances("done")))
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"privacy": privacy, "guarantee": guarantee}), encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)

    def snippet() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

    done = snippet()
    assert done.returncode == 0, done.stderr
    assert f"`{done.stdout.strip()}`" in README
    # A record whose epsilon is not that of its releases is noticed.
    guarantee["epsilon"] /= 2
    record.write_text(json.dumps({"privacy": privacy, "guarantee": guarantee}), encoding="utf-8")
    assert snippet().returncode != 0
