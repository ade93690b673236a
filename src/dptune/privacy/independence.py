"""The check that a row's gradient is a function of that row, to the last bit (SPECIFICATION.md 1.3 and 10.3).

Rounding depends on which kernels run and how they cut up their work, and that depends on the shape of a batch. In a
batch of a public shape it must depend on nothing else: neither on the other rows, nor on the place of a row, nor on the
batches before. What is seen here is assumed of the kernels ever after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dptune.privacy.gradients import (
    LOW_PRECISION_TOLERANCE,
    Batch,
    Engine,
    EngineError,
    Gradients,
    LoopEngine,
    LossFunction,
    moved,
    rows_of,
    trainable_parameters,
)


@dataclass(frozen=True)
class Probe:
    """Made-up rows in one of the shapes that training will use."""

    name: str
    """The shape, for a person."""
    rows: Batch
    """A whole batch, of the lengths that this shape takes."""
    other: Batch
    """One more row of this shape."""
    alone: Batch
    """Its first row by itself, without padding."""


PADDING_TOLERANCE = 1e-3
"""Largest difference of a gradient with and without padding, relative to a parameter's largest one: sums of another
length round otherwise. It says that padding is not read; privacy does not rest on it."""

_MOST = 4096
"""Coordinates of a parameter that are compared with those of the row alone."""


def check_independence(engine: Engine, model: torch.nn.Module, loss: LossFunction, probes: Sequence[Probe]) -> None:
    """Raise unless each row's gradient is its own, in every shape, and is that of the row without padding.

    Args:
        engine: compared with the loop already.
        model: whose parameters are trained; their values are put back.
        loss: of each row.
        probes: one for each shape, in ascending order.

    Raises:
        EngineError: naming the shape, the parameter and what its gradient depends on.
    """
    low = any(value.is_floating_point() and value.itemsize < 4 for value in model.parameters())
    with moved(trainable_parameters(model)):
        # First, while nothing but short rows was seen: what an earlier batch leaves behind must make a difference.
        check_bits(lambda batch: engine(batch)[1], probes)
        oracle = LoopEngine(model, loss)
        for probe in probes:
            with engine.paused():
                alone = _thinned(oracle(probe.alone)[1])
            found = _thinned(engine(probe.rows)[1])
            _compare(probe.name, found, alone, LOW_PRECISION_TOLERANCE if low else PADDING_TOLERANCE)


def check_bits(vectors_of: Callable[[Batch], Gradients], probes: Sequence[Probe]) -> None:
    """Raise unless what is computed of each row has the same bits wherever it stands, beside and after whatever.

    All shapes are computed twice: upwards; and downwards, with all rows one place further and one of them exchanged.
    So each place is compared with the next one, each row meets other mates, and each shape comes after smaller and
    after larger ones.

    Args:
        vectors_of: gives named vectors [b, ...] for the rows of a batch.
        probes: one for each shape, in ascending order.

    Raises:
        EngineError: naming the shape and the parameter.
    """
    seen = [_bits(vectors_of(probe.rows)) for probe in probes]
    for probe, before in zip(reversed(probes), reversed(seen), strict=True):
        count = rows_of(probe.rows)
        batch, exchanged = _moved_on(probe)
        found = _bits(vectors_of(batch))
        for row in range(count):
            place = (row + 1) % count
            if place != exchanged and (wrong := [key for key in found if found[key][place] != before[key][row]]):
                raise EngineError(
                    f"the last bits of the gradient of {wrong[0]} in batches of {probe.name} depend on their place, on "
                    "the other rows or on earlier batches"
                )


def _moved_on(probe: Probe) -> tuple[Batch, int | None]:
    """All rows one place further, and the place where another one stands; None where there is one row only."""
    count = rows_of(probe.rows)
    exchanged = count // 2 if count > 1 else None
    batch = {name: value.roll(1, 0) for name, value in probe.rows.items()}
    if exchanged is not None:
        for name, value in batch.items():
            value[exchanged] = probe.other[name][0]
    return batch, exchanged


def _bits(gradients: Gradients) -> dict[str, list[bytes]]:
    """A digest of each row's gradient by parameter; both zeros count as one."""
    return {
        name: [hashlib.blake2b(memoryview(row.view(torch.uint8).numpy()), digest_size=16).digest() for row in rows]
        for name, rows in ((name, (value.flatten(1) + 0.0).cpu().contiguous()) for name, value in gradients.items())
    }


def _thinned(gradients: Gradients) -> Gradients:
    """Some coordinates of each parameter, in single precision."""
    flat = {name: value.flatten(1) for name, value in gradients.items()}
    return {name: value[:, :: -(-value.shape[1] // _MOST)].float() for name, value in flat.items()}


def _compare(shape: str, found: Gradients, alone: Gradients, tolerance: float) -> None:
    least = 0.1 * max(float(value.abs().max()) for value in alone.values())
    for name, value in alone.items():
        size = max(float(value.abs().max()), least)
        if not float((found[name][:1] - value).abs().max()) <= tolerance * size:
            raise EngineError(f"the gradient of {name} in batches of {shape} depends on padding")
