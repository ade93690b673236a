import json
from dataclasses import replace
from pathlib import Path

import pytest

from dptune.privacy.ledger import LedgerError, WriteAheadLedger
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.rules import NoiseMode
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


def test_other_code_is_another_attempt_on_public_data(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    for code in ("one", "one", "two"):
        ledger = WriteAheadLedger(path, PLAN, KEYS, "data", code, stand_in=True)
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


def test_the_same_noise_with_other_code_is_refused_on_private_data(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    WriteAheadLedger(path, PLAN, KEYS, "data", "one").begin(0)
    with pytest.raises(LedgerError, match="another code; use another seed, or fresh keys"):
        WriteAheadLedger(path, PLAN, KEYS, "data", "two").begin(0)


@pytest.mark.parametrize("stand_in", [False, True])
def test_the_same_noise_at_other_weights_is_refused_once_it_may_have_been_seen(tmp_path: Path, stand_in: bool) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = WriteAheadLedger(path, PLAN, KEYS, "data", stand_in=stand_in)
    ledger.begin(0, "fresh")
    ledger.begin(1, "after one")
    ledger.begin(1, "after one, rounded otherwise")  # Nobody saw the first one.
    ledger.seen(2)
    again = WriteAheadLedger(path, PLAN, KEYS, "data", stand_in=stand_in)
    again.begin(0, "fresh")
    again.begin(1, "after one, rounded otherwise")
    before = path.read_text()
    for step, weights in ((0, "after two"), (1, "after one"), (1, "after two")):
        with pytest.raises(LedgerError, match=f"the noise of step {step} was used before with another state"):
            again.begin(step, weights)
    assert path.read_text() == before
    again.begin(2, "after two")


def test_rows_of_earlier_versions_say_nothing_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    WriteAheadLedger(path, PLAN, KEYS, "data").begin(0)
    row = {key: value for key, value in json.loads(path.read_text()).items() if key != "state"}
    path.write_text(json.dumps(row) + "\n")
    WriteAheadLedger(path, PLAN, KEYS, "data").begin(0, "fresh")
    assert len(path.read_text().splitlines()) == 1


def test_a_secure_run_goes_on_from_its_last_checkpoint_only(tmp_path: Path) -> None:
    """Steps that were seen would be released twice for the price of once."""
    path = tmp_path / "ledger.jsonl"
    secure = replace(PLAN, noise_mode="secure")
    ledger = WriteAheadLedger(path, secure, KeyRing.secure("run"), "data")
    positions = []
    for step in range(3):
        ledger.begin(step)
        positions.append(ledger.position)
        if step < 2:
            ledger.seen(step + 1)
            ledger.seen(step + 1)
    assert sum("checkpoint" in row for row in ledger.rows) == 2 and ledger.attempts == 1
    later = WriteAheadLedger(path, secure, KeyRing.secure("run"), "data")
    assert later.position == ledger.position
    later.check_start(2, positions[1])
    later.check_start(3, positions[2])  # It died before it could say that there is this checkpoint.
    with pytest.raises(LedgerError, match="of step 1, but step 2 was reached"):
        later.check_start(1, positions[0])
    later.begin(2)
    later.check_start(2, positions[1])
    later.begin(0)
    with pytest.raises(LedgerError, match="another attempt was begun"):
        later.check_start(2, positions[1])


@pytest.mark.parametrize("lost", ["all", "first", "last", "changed"])
@pytest.mark.parametrize("mode", ["secure", "reproducible"])
def test_a_ledger_that_lost_a_row_stops_what_goes_on(tmp_path: Path, mode: NoiseMode, lost: str) -> None:
    path, plan = tmp_path / "ledger.jsonl", replace(PLAN, noise_mode=mode)
    keys = KEYS if mode == "reproducible" else KeyRing.secure("run")
    ledger = WriteAheadLedger(path, plan, keys, "data")
    for step in range(3):
        ledger.begin(step)
    lines = path.read_text().splitlines(keepends=True)
    changed = [line.replace('"noise_multiplier": 1.0', '"noise_multiplier": 2.0') for line in lines]
    path.write_text("".join({"all": [], "first": lines[1:], "last": lines[:-1], "changed": changed}[lost]))
    with pytest.raises(LedgerError, match="lacks rows"):
        WriteAheadLedger(path, plan, keys, "data").check_start(3, ledger.position)


def test_with_the_same_keys_any_checkpoint_will_do(tmp_path: Path) -> None:
    ledger = WriteAheadLedger(tmp_path / "ledger.jsonl", PLAN, KEYS, "data")
    ledger.begin(0)
    position = ledger.position
    ledger.begin(1)
    ledger.seen(2)
    WriteAheadLedger(tmp_path / "ledger.jsonl", PLAN, KEYS, "data").check_start(1, position)
