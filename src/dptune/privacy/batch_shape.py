"""Physical batches of one public shape, in which a row's gradient does not depend on the others to the last bit.

Rounding depends on which kernels run and how they cut up their work, and that depends on the shape of a batch. In
float32 the differences drown in the margin of the clip; in lower precision they do not (SPECIFICATION.md 10.3).
"""

from __future__ import annotations

import torch

from dptune.privacy.gradients import Batch, Engine, EngineError, Gradients, moved, rows_of, trainable_parameters


class FixedShapeEngine:
    """Gives an engine batches of one shape only: rows are filled up with copies, whose gradients are dropped."""

    def __init__(self, engine: Engine, shapes: dict[str, torch.Size]) -> None:
        """Shapes are those of the batches that the engine will see, by name; the first dimension is the row."""
        self.engine, self.shapes = engine, shapes

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        """Losses [b] and gradients [b, *shape], for any number of rows b above 0.

        Raises:
            EngineError: when the rows are not of the public shape.
        """
        if wrong := [name for name, shape in self.shapes.items() if batch[name].shape[1:] != shape[1:]]:
            raise EngineError(f"{wrong[0]} of a physical batch has not the public shape that was checked")
        size, count = next(iter(self.shapes.values()))[0], rows_of(batch)
        parts = []
        for start in range(0, count, size):
            here = torch.arange(start, start + size)
            here = here.where(here < count, 0).to(next(iter(batch.values())).device)
            losses, gradients = self.engine({name: value[here] for name, value in batch.items()})
            kept = min(size, count - start)
            parts.append((losses[:kept], {name: value[:kept] for name, value in gradients.items()}))
        if len(parts) == 1:
            return parts[0]
        together = {name: torch.cat([gradients[name] for _, gradients in parts]) for name in parts[0][1]}
        return torch.cat([losses for losses, _ in parts]), together

    def close(self) -> None:
        """Take everything off the model that the engine hung on it."""
        self.engine.close()


def fixed_shape_engine(engine: Engine, model: torch.nn.Module, rows: Batch, others: Batch) -> FixedShapeEngine:
    """The engine on batches of one shape, once a row's gradient was seen to be its own to the last bit.

    Every row must get the same bits when the same batch is computed again, when all rows move one place further (which
    compares all places, pair by pair), and when every second row is replaced, first the odd ones, then the even ones.

    Args:
        engine: already compared with the loop.
        model: whose parameters are trained; their values are put back.
        rows: a whole physical batch of records, public or made up, of various lengths.
        others: as many others, of the same shape, so that replacing every second row makes a batch of long rows only
            and one with short rows.

    Raises:
        EngineError: naming the parameter whose gradient changed.
    """
    fixed = FixedShapeEngine(engine, {name: value.shape for name, value in rows.items()})
    second = torch.arange(rows_of(rows), device=next(iter(rows.values())).device) % 2

    def mixed(kept: int) -> Batch:
        return {
            name: value.where((second == kept).reshape(-1, *[1] * (value.dim() - 1)), others[name])
            for name, value in rows.items()
        }

    def check(batch: Batch, wanted: Gradients, what: str, part: slice = EVERY) -> None:
        found = fixed(batch)[1]
        if wrong := [name for name, value in wanted.items() if not torch.equal(found[name][part], value[part])]:
            raise EngineError(
                f"the last bits of the gradient of {wrong[0]} depend on {what}; set compute.physical_batch_size=1, or "
                "environment.precision=float32 and environment.batch_shape=auto"
            )

    with moved(trainable_parameters(model)):
        first = fixed(rows)[1]
        check(rows, first, "chance")
        check(_further(rows), _further(first), "a row's place in its batch")
        for kept in (0, 1):
            check(mixed(kept), first, "the other rows of its batch", slice(kept, None, 2))
    return fixed


EVERY = slice(None)


def _further(rows: Batch) -> Gradients:
    """Every row one place further, the last one in front."""
    return {name: value.roll(1, 0) for name, value in rows.items()}
