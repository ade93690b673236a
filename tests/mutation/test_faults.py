"""The table of faults stays alive: each can still be planted, and its tests still exist."""

import ast
from pathlib import Path

import pytest
from faults import FAULTS, Fault
from run import SOURCE, planted

TESTS = Path(__file__).parents[1]


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_can_be_planted_and_its_tests_exist(fault: Fault) -> None:
    broken = planted((SOURCE / fault.file).read_text(encoding="utf-8"), fault)
    ast.parse(broken)
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(TESTS / file), test


def test_there_are_many_faults_and_each_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 60
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)
    assert {fault.file.partition("/")[0] for fault in FAULTS} >= {"privacy", "training", "runs", "report", "data"}


def test_a_place_that_is_gone_or_not_the_only_one_is_named() -> None:
    fault = Fault("sums", "privacy/clipping.py", "a + b", "a - b", ())
    with pytest.raises(ValueError, match="found 0 times in privacy/clipping.py"):
        planted("a * b", fault)
    with pytest.raises(ValueError, match="found 2 times"):
        planted("a + b + a + b", fault)
    assert planted("c = a + b", fault) == "c = a - b"
