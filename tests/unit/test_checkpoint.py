"""What is saved is what is loaded, in one step, or it is refused with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dptune.training import checkpoint
from dptune.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, remove, save

STAMP = {"plan": "p", "code": "c"}


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
    return Checkpoint(step, 1.25, [{"step": step, "loss": None, "std": 0.1 + 0.2}], state())


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
    save(tmp_path / "checkpoint", saved, STAMP)
    found = load_checkpoint(tmp_path / "checkpoint", STAMP)
    assert found is not None and (found.step, found.seconds, found.history) == (3, 1.25, saved.history)
    assert_equal(found.state, saved.state)


def test_there_is_one_at_a_time_and_none_after_it_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    assert load_checkpoint(folder, STAMP) is None
    save(folder, made(3), STAMP)
    save(folder, made(6), STAMP)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "step-6.safetensors"]
    remove(folder)
    assert load_checkpoint(folder, STAMP) is None and not folder.exists()
    remove(folder)


@pytest.mark.parametrize("moment", ["save_file", "sync", "write_atomically"])
def test_a_full_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    from safetensors import SafetensorError

    save(tmp_path, made(3), STAMP)

    def full(*_: object) -> None:
        raise (
            SafetensorError("No space left on device") if moment == "save_file" else OSError("No space left on device")
        )

    monkeypatch.setattr(checkpoint, moment, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, made(6), STAMP)
    monkeypatch.undo()
    found = load_checkpoint(tmp_path, STAMP)
    assert found is not None and found.step == 3
    save(tmp_path, made(6), STAMP)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_another_plan_or_code_is_named(tmp_path: Path) -> None:
    save(tmp_path, made(), STAMP)
    with pytest.raises(CheckpointError, match="another code$"):
        load_checkpoint(tmp_path, {**STAMP, "code": "d"})
    with pytest.raises(CheckpointError, match="another code and another plan$"):
        load_checkpoint(tmp_path, {"plan": "q", "code": "d"})


def test_damage_is_named(tmp_path: Path) -> None:
    save(tmp_path, made(), STAMP)
    path = tmp_path / "step-3.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="step-3.safetensors is damaged"):
        load_checkpoint(tmp_path, STAMP)
    path.unlink()
    with pytest.raises(CheckpointError, match="step-3.safetensors is missing"):
        load_checkpoint(tmp_path, STAMP)
    for text in ("{", "{}", "[]", json.dumps({"stamp": STAMP})):
        (tmp_path / "checkpoint.json").write_text(text)
        with pytest.raises(CheckpointError, match="checkpoint.json is damaged"):
            load_checkpoint(tmp_path, STAMP)
