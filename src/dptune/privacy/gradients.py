"""Per-example gradients of the trained parameters: what an engine is, and the loop that is the oracle of all others.

An engine is called with one physical batch and gives each row's gradient. It neither clips nor averages. The fast ones
are in `engines.py`. SPECIFICATION.md 1.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

Batch = Mapping[str, torch.Tensor]
"""Named tensors whose first dimension is the row."""

LossFunction = Callable[[torch.nn.Module, Batch], torch.Tensor]
"""Loss of each row [b], a function of that row alone."""

Gradients = dict[str, torch.Tensor]
"""For each trained parameter its gradients by row, [b, *shape]."""


class Engine(Protocol):
    """Gives the loss [b] and the gradients of each row of a physical batch."""

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        """Losses, detached, and gradients."""
        ...

    def paused(self) -> AbstractContextManager[None]:
        """Inside, backward passes of the model are not the engine's."""
        ...

    def close(self) -> None:
        """Take everything off the model that the engine hung on it."""
        ...


LOW_PRECISION_TOLERANCE = 0.2
"""Largest difference of gradients that should be equal, relative to a parameter's largest, where the backbone is not in
float32: tells what is wrong from what rounds otherwise."""


class EngineError(RuntimeError):
    """An engine that does not give one gradient for each row and trained parameter."""


class LoopEngine:
    """One backward pass for each row: slow, and right by construction."""

    def __init__(self, model: torch.nn.Module, loss: LossFunction) -> None:
        self.model, self.loss = model, loss
        self.parameters = trainable_parameters(model)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        """Losses [b] and gradients [b, *shape] of a physical batch."""
        losses, rows = [], []
        for row in range(rows_of(batch)):
            loss = self.loss(self.model, {name: value[row : row + 1] for name, value in batch.items()}).sum()
            rows.append(torch.autograd.grad(loss, list(self.parameters.values())))
            losses.append(loss.detach())
        gradients = {name: torch.stack([row[index] for row in rows]) for index, name in enumerate(self.parameters)}
        return torch.stack(losses), gradients

    def paused(self) -> AbstractContextManager[None]:
        """Nothing is watched in any case."""
        return nullcontext()

    def close(self) -> None:
        """Nothing was hung on the model."""


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trained parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rows_of(batch: Batch) -> int:
    """Number of rows of a physical batch."""
    return int(next(iter(batch.values())).shape[0])


@contextmanager
def moved(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Weights that are moved a little inside of the `with`: a factor that is zero hides its partner's gradient."""
    before = {name: value.detach().clone() for name, value in parameters.items()}
    try:
        with torch.no_grad():
            for value in parameters.values():
                wave = torch.arange(value.numel(), device=value.device, dtype=value.dtype).sin()
                value.add_(0.02 * wave.reshape(value.shape))
        yield
    finally:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(before[name])
