"""What is saved is what is loaded, in one step, or it is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dptune.training import checkpoint
from dptune.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointForged,
    hash_of,
    load_checkpoint,
    remove,
    save,
)

STAMP = {"plan": "p", "code": "c"}
KEY = bytes(range(32))


def state() -> dict[str, Any]:
    return {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, 3)}, 1: {"step": 3}},
            "betas": (0.9, 0.99),
        },
        "adapter": {"tensors": {"a.b/c": torch.tensor([True, False]), "h": torch.randn(3).half()}, "pattern": None},
        "mechanism": {"thresholds": [0.1 + 0.2, 1e-300], "name": "x"},
    }


def made(step: int = 3) -> Checkpoint:
    return Checkpoint(step, 1.25, [{"step": step, "loss": None, "std": 0.1 + 0.2}], state(), "2 rows")


def assert_equal(one: Any, two: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_equal(first, second)
    else:
        assert one == two


def test_it_is_loaded_bit_by_bit(tmp_path: Path) -> None:
    saved = made()
    save(tmp_path / "checkpoint", saved, STAMP, KEY)
    found = load_checkpoint(tmp_path / "checkpoint", STAMP, KEY)
    assert found is not None and (found.step, found.seconds, found.history, found.ledger) == (
        3,
        1.25,
        saved.history,
        "2 rows",
    )
    assert_equal(found.state, saved.state)


def test_there_is_one_at_a_time_and_none_after_it_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert load_checkpoint(folder, STAMP, KEY) is None
    save(folder, made(3), STAMP, KEY)
    save(folder, made(6), STAMP, KEY)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "step-6.safetensors"]
    remove(folder)
    assert load_checkpoint(folder, STAMP, KEY) is None and not folder.exists()
    remove(folder)


@pytest.mark.parametrize("moment", ["save_file", "sync", "write_atomically"])
def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    from safetensors import SafetensorError

    save(tmp_path, made(3), STAMP, KEY)

    def full(*_: object) -> None:
        raise (
            SafetensorError("No space left on device") if moment == "save_file" else OSError("No space left on device")
        )

    monkeypatch.setattr(checkpoint, moment, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, made(6), STAMP, KEY)
    monkeypatch.undo()
    found = load_checkpoint(tmp_path, STAMP, KEY)
    assert found is not None and found.step == 3
    save(tmp_path, made(6), STAMP, KEY)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_another_plan_or_code_is_named(tmp_path: Path) -> None:
    save(tmp_path, made(), STAMP, KEY)
    with pytest.raises(CheckpointError, match="another code$"):
        load_checkpoint(tmp_path, {**STAMP, "code": "d"}, KEY)
    with pytest.raises(CheckpointError, match="another code and another plan$"):
        load_checkpoint(tmp_path, {"plan": "q", "code": "d"}, KEY)


def test_damage_is_named(tmp_path: Path) -> None:
    save(tmp_path, made(), STAMP, KEY)
    path = tmp_path / "step-3.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="step-3.safetensors is damaged"):
        load_checkpoint(tmp_path, STAMP, KEY)
    path.unlink()
    with pytest.raises(CheckpointError, match="step-3.safetensors is missing"):
        load_checkpoint(tmp_path, STAMP, KEY)
    for text in ("{", "{}", "[]", json.dumps({"stamp": STAMP}), ""):
        (tmp_path / "checkpoint.json").write_text(text)
        with pytest.raises(CheckpointError, match="is not signed"):
            load_checkpoint(tmp_path, STAMP, KEY)


def changed(content: dict[str, Any], name: str) -> dict[str, Any]:
    values = {
        "step": 0,
        "seconds": 0.0,
        "history": [],
        "stamp": {**STAMP, "attempt": "1"},
        "state": {**content["state"], "mechanism": {"thresholds": [], "name": "x"}},
        "tensors": {**content["tensors"], "hash": "0" * 64},
        "ledger": "0 rows",
    }
    return {**content, name: values[name]}


@pytest.mark.parametrize("name", ["step", "seconds", "history", "stamp", "state", "tensors", "ledger"])
def test_nothing_of_a_checkpoint_can_be_changed_without_the_key(tmp_path: Path, name: str) -> None:
    save(tmp_path, made(6), STAMP, KEY)
    path = tmp_path / "checkpoint.json"
    text, signature = path.read_text().splitlines()
    assert name in json.loads(text)
    path.write_text(f"{json.dumps(changed(json.loads(text), name))}\n{signature}\n")
    with pytest.raises(CheckpointForged, match=r"^checkpoint.json was changed, or is of another output folder$"):
        load_checkpoint(tmp_path, STAMP, KEY)
    path.write_text(f"{text}\n{signature}\n")
    assert load_checkpoint(tmp_path, STAMP, KEY) is not None
    with pytest.raises(CheckpointForged):
        load_checkpoint(tmp_path, STAMP, bytes(32))


def test_weights_of_another_checkpoint_are_not_taken(tmp_path: Path) -> None:
    save(tmp_path / "one", made(3), STAMP, KEY)
    save(tmp_path / "two", made(3), STAMP, KEY)
    (tmp_path / "one" / "step-3.safetensors").write_bytes((tmp_path / "two" / "step-3.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / "one", STAMP, KEY)


def test_a_hash_sees_every_bit_name_and_shape() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1).half()}
    others = [
        {**one, "a": torch.zeros(2, 3).index_fill_(0, torch.tensor(1), -0.0)},
        {**one, "a": torch.zeros(3, 2)},
        {"c": one["a"], "b": one["b"]},
        {**one, "b": one["b"].float()},
    ]
    assert hash_of(one) == hash_of(dict(reversed(one.items())))
    assert len({hash_of(item) for item in [one, *others]}) == 5
