"""Everything that a killed run needs to go on exactly where it was, as safetensors and JSON, replaced in one step.

What training releases is seen outside of the process only through a checkpoint: history and mirrors get a step's row
once the checkpoint that holds the step is on disk. Steps after the last checkpoint of a killed process were therefore
never seen, and are done again for free (SPECIFICATION.md 10.4): with the same keys they are the same releases, and with
fresh ones they are what an uninterrupted run would have drawn. A checkpoint holds releases, functions of them and the
rows of the history; never a key, and no sum without noise.

It is signed: with its step set back, or other weights put in, the same noise would be added to other gradients.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dptune.records.files import sync, write_atomically

STATE_FILE = "checkpoint.json"

_TENSOR, _ITEMS = "$tensor", "$items"


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from: why, in one line."""


class CheckpointForged(CheckpointError):
    """A checkpoint that is not what this run wrote last: it must not be used, and starting anew is for a person."""


class Stateful(Protocol):
    """A part of training that changes from step to step."""

    def state_dict(self) -> dict[str, Any]:
        """Nested mappings and lists of tensors and plain values."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """Go on where `state_dict` was taken."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A moment between two steps."""

    step: int
    """Number of steps done."""
    seconds: float
    """Time that they took."""
    history: list[dict[str, Any]]
    """Their rows of the history."""
    state: Mapping[str, Any]
    """State of each part by its name, from `state_of`."""
    ledger: str = ""
    """Position of the ledger when it was made, of a private run."""


def state_of(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """State of each part; tensors are not copied."""
    return {name: part.state_dict() for name, part in parts.items()}


def restore(parts: Mapping[str, Stateful], state: Mapping[str, Any]) -> None:
    """Give each part its state."""
    for name, part in parts.items():
        part.load_state_dict(state[name])


def hash_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Sixteen hexadecimal digits of some tensors to the last bit."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(folder: Path, checkpoint: Checkpoint, stamp: Mapping[str, str], key: bytes) -> None:
    """Replace the checkpoint in a folder; a process killed meanwhile leaves the old one or the new one.

    Args:
        folder: of the checkpoint alone.
        checkpoint: the new one.
        stamp: what must be the same when it is loaded, such as the plan and the code.
        key: secret of this machine, by which the whole of it is signed.

    Raises:
        OSError: when the disk is full or the folder cannot be written; the old checkpoint stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    state = _to_plain(checkpoint.state, "", tensors)
    path = folder / f"step-{checkpoint.step}.safetensors"
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path}: {error}") from None
    sync(path)
    content = {
        "stamp": dict(stamp),
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "tensors": {"file": path.name, "hash": _hash(path)},
        "state": state,
        "history": checkpoint.history,
        "ledger": checkpoint.ledger,
    }
    text = json.dumps(content)
    write_atomically(folder / STATE_FILE, f"{text}\n{_signature(text, key)}\n")
    for other in folder.glob("*.safetensors"):
        if other != path:
            other.unlink()


def load_checkpoint(folder: Path, stamp: Mapping[str, str], key: bytes) -> Checkpoint | None:
    """The checkpoint in a folder, or None when there is none.

    Raises:
        CheckpointForged: when its signature is not that of its content.
        CheckpointError: when it is damaged, not signed (older versions), or of another plan, other data or other code.
    """
    try:
        text, _, signature = (folder / STATE_FILE).read_text(encoding="utf-8").rstrip("\n").partition("\n")
        if not signature:
            raise CheckpointError(f"{STATE_FILE} is not signed, as those of older versions were")
        if not hmac.compare_digest(signature.encode(), _signature(text, key).encode()):
            raise CheckpointForged(f"{STATE_FILE} was changed, or is of another output folder")
        content = json.loads(text)
        changed = sorted(name for name in stamp if content["stamp"].get(name) != stamp[name])
        if changed:
            raise CheckpointError(f"it was made with another {' and another '.join(changed)}")
        path = folder / content["tensors"]["file"]
        if _hash(path) != content["tensors"]["hash"]:
            raise CheckpointError(f"{path.name} is damaged")
        state = _from_plain(content["state"], load_file(path))
        return Checkpoint(content["step"], content["seconds"], content["history"], state, content["ledger"])
    except FileNotFoundError as error:
        if error.filename is not None and Path(error.filename).name == STATE_FILE:
            return None
        raise CheckpointError(f"{error.filename} is missing") from None


def remove(folder: Path) -> None:
    """Forget the checkpoint in a folder, if there is one."""
    (folder / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _signature(text: str, key: bytes) -> str:
    return hmac.digest(key, b"dptune checkpoint\n" + text.encode(), "sha256").hex()


def _to_plain(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The value with its tensors moved to `tensors`; keys that are no strings survive JSON as pairs."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu").contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        items = {key: _to_plain(item, f"{name}/{key}", tensors) for key, item in value.items()}
        return items if all(isinstance(key, str) for key in items) else {_ITEMS: [list(item) for item in items.items()]}
    if isinstance(value, list | tuple):
        return [_to_plain(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _from_plain(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of `_to_plain`, but for tuples, which become lists."""
    if isinstance(value, list):
        return [_from_plain(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _ITEMS in value:
        return {key: _from_plain(item, tensors) for key, item in value[_ITEMS]}
    return {key: _from_plain(item, tensors) for key, item in value.items()}
