import json
from dataclasses import replace
from pathlib import Path

import pytest

from dptune.privacy.ledger import LedgerError, WriteAheadLedger
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.streams import KeyRing

PLAN = PrivacyPlan(
    num_units=100,
    expected_batch_size=10,
    steps=3,
    delta=1e-3,
    noise_multiplier=1.0,
    max_grad_norm=1.0,
    noise_mode="reproducible",
)
KEYS = KeyRing.reproducible(0, "run")


def test_a_step_is_on_disk_when_it_begins(tmp_path: Path) -> None:
    ledger = WriteAheadLedger(tmp_path / "ledger.jsonl", PLAN, KEYS, "data")
    for step in range(3):
        ledger.begin(step)
        rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(step + 1))
    assert rows[0]["noise_multiplier"] == 1.0 and rows[0]["sample_rate"] == 0.1
    assert len({row["noise_key"] for row in rows}) == 3
    assert KEYS.master.hex() not in (tmp_path / "ledger.jsonl").read_text()


def test_the_same_step_again_is_free_and_adds_no_row(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    WriteAheadLedger(path, PLAN, KEYS, "data").begin(0)
    before = path.read_text()
    again = WriteAheadLedger(path, PLAN, KEYS, "data")
    again.begin(0)
    assert path.read_text() == before and again.attempts == 1


@pytest.mark.parametrize(
    ("plan", "manifest", "changed"),
    [(PLAN, "other data", "manifest"), (replace(PLAN, max_grad_norm=2.0), "data", "plan")],
)
def test_the_same_noise_for_something_else_is_refused(
    tmp_path: Path, plan: PrivacyPlan, manifest: str, changed: str
) -> None:
    path = tmp_path / "ledger.jsonl"
    WriteAheadLedger(path, PLAN, KEYS, "data").begin(0)
    with pytest.raises(LedgerError, match=f"another {changed}"):
        WriteAheadLedger(path, plan, KEYS, manifest).begin(0)


def test_fresh_keys_are_another_attempt(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    secure = replace(PLAN, noise_mode="secure")
    for _ in range(2):
        ledger = WriteAheadLedger(path, secure, KeyRing.secure("run"), "data")
        ledger.begin(0)
        ledger.begin(1)
    assert ledger.attempts == 2


@pytest.mark.parametrize("damage", ['{"step": 0\n', "[]\n", "{}\n"])
def test_a_damaged_ledger_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(damage)
    with pytest.raises(LedgerError, match="damaged"):
        WriteAheadLedger(tmp_path / "ledger.jsonl", PLAN, KEYS, "data")


def test_a_row_that_was_being_written_was_never_begun(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    WriteAheadLedger(path, PLAN, KEYS, "data").begin(0)
    whole = path.read_text()
    path.write_text(whole + whole[:30])
    again = WriteAheadLedger(path, PLAN, KEYS, "data")
    assert path.read_text() == whole
    again.begin(1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]


def test_other_code_is_another_attempt(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for code in ("one", "one", "two"):
        ledger = WriteAheadLedger(path, PLAN, KEYS, "data", code)
        ledger.begin(0)
        ledger.begin(1)
    assert ledger.attempts == 2 and [row["code"] for row in ledger.rows] == ["one", "one", "two", "two"]


def test_steps_done_again_with_fresh_keys_are_the_same_attempt(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    secure = replace(PLAN, noise_mode="secure")
    for steps in ((0, 1), (1, 2)):
        ledger = WriteAheadLedger(path, secure, KeyRing.secure("run"), "data")
        for step in steps:
            ledger.begin(step)
    assert ledger.attempts == 1 and len({row["noise_key"] for row in ledger.rows}) == 4
