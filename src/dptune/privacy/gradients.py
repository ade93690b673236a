"""Per-example gradients of the trained parameters: engines and the loop that is their oracle (SPECIFICATION.md 1.3).

An engine is called with one physical batch and gives each row's gradient. It neither clips nor averages.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
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

    def close(self) -> None:
        """Take everything off the model that the engine hung on it."""
        ...


class EngineError(RuntimeError):
    """An engine that does not give one gradient for each row and trained parameter."""


class LoopEngine:
    """One backward pass for each row: slow, and right by construction."""

    def __init__(self, model: torch.nn.Module, loss: LossFunction) -> None:
        self.model, self.loss = model, loss
        self.parameters = _trained(model)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        """Losses [b] and gradients [b, *shape] of a physical batch."""
        losses, rows = [], []
        for row in range(_rows(batch)):
            loss = self.loss(self.model, {name: value[row : row + 1] for name, value in batch.items()}).sum()
            rows.append(torch.autograd.grad(loss, list(self.parameters.values())))
            losses.append(loss.detach())
        gradients = {name: torch.stack([row[index] for row in rows]) for index, name in enumerate(self.parameters)}
        return torch.stack(losses), gradients

    def close(self) -> None:
        """Nothing was hung on the model."""


class OpacusEngine:
    """Opacus' hooks: one backward pass of the summed loss, per-example gradients from activations and back-props.

    Exact for adapters on linear layers; what it cannot do raises `EngineError` instead of passing unnoticed.
    """

    def __init__(self, model: torch.nn.Module, loss: LossFunction) -> None:
        from opacus import GradSampleModule

        self.parameters = _trained(model)
        self.loss = loss
        self.wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        """Losses [b] and gradients [b, *shape] of a physical batch.

        Raises:
            EngineError: when a parameter has no gradient for each row.
        """
        losses = self.loss(self.wrapped, batch)
        with warnings.catch_warnings():
            # The first adapted layer reads frozen embeddings; its hooks fire all the same.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(losses.sum())
        gradients: Gradients = {}
        for name, parameter in self.parameters.items():
            sample = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, torch.Tensor) or sample.shape != (_rows(batch), *parameter.shape):
                shape = tuple(sample.shape) if isinstance(sample, torch.Tensor) else None
                raise EngineError(
                    f"Opacus gives gradients of shape {shape} for {name}, not {(_rows(batch), *parameter.shape)}; "
                    "set environment.engine=loop"
                )
            gradients[name] = sample
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        return losses.detach(), gradients

    def close(self) -> None:
        """Remove the hooks and the attributes that Opacus added."""
        self.wrapped.to_standard_module()


class HookEngine:
    """Our own hooks on linear layers: one backward pass, g_i = (grad of the output)^T (input) of each example.

    The hook hangs on the output tensor and keeps the input in its closure, so that it also works when the forward pass
    is done again for gradient checkpointing. A layer that is used several times adds up.
    """

    def __init__(self, model: torch.nn.Module, loss: LossFunction) -> None:
        """Raises EngineError, naming the parameter, when one is trained that is not of a linear layer."""
        self.model, self.loss = model, loss
        self.parameters = _trained(model)
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        covered: set[torch.nn.Parameter] = set()
        self._handles = []
        for module in model.modules():
            own = [value for value in module.parameters(recurse=False) if value.requires_grad]
            if isinstance(module, torch.nn.Linear) and own:
                covered.update(own)
                self._handles.append(module.register_forward_hook(self._watch))
        if lacking := [name for name, value in self.parameters.items() if value not in covered]:
            self.close()
            raise EngineError(f"{lacking[0]} is not of a linear layer: set environment.engine=opacus or loop")

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        """Losses [b] and gradients [b, *shape] of a physical batch."""
        losses = self.loss(self.model, batch)
        try:
            torch.autograd.backward(losses.sum())
            rows = _rows(batch)
            gradients = {
                name: self._sums.get(value, value.new_zeros(rows, *value.shape))
                for name, value in self.parameters.items()
            }
        finally:
            self._sums = {}
            for parameter in self.parameters.values():
                parameter.grad = None
        if wrong := [name for name, value in gradients.items() if len(value) != rows]:
            raise EngineError(f"{wrong[0]} is not used once for each row: set environment.engine=loop")
        return losses.detach(), gradients

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _watch(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda grad: self._collect(module, x, grad))  # type: ignore[no-untyped-call]

    def _collect(self, module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
        grad = grad.detach().reshape(len(grad), -1, grad.shape[-1])
        if isinstance(weight := module.weight, torch.nn.Parameter) and weight.requires_grad:
            self._add(weight, grad.mT @ x.reshape(len(x), -1, x.shape[-1]).to(grad.dtype))
        if isinstance(bias := module.bias, torch.nn.Parameter) and bias.requires_grad:
            self._add(bias, grad.sum(dim=1))

    def _add(self, parameter: torch.nn.Parameter, rows: torch.Tensor) -> None:
        before = self._sums.get(parameter)
        self._sums[parameter] = rows if before is None else before + rows


ENGINES: dict[str, Callable[[torch.nn.Module, LossFunction], Engine]] = {
    "hooks": HookEngine,
    "opacus": OpacusEngine,
    "loop": LoopEngine,
}


TOLERANCE = 1e-5
"""Largest difference of an engine from the loop, relative to a parameter's largest gradient."""


def checked_engine(
    name: str, model: torch.nn.Module, loss: LossFunction, batch: Batch, changed: Batch, row: int
) -> Engine:
    """An engine that was compared with the loop, before any budget is spent.

    Every trained parameter must have one gradient for each row, equal to the loop's, and changing one record must
    change that row only. The weights are moved a little meanwhile: a factor that starts at zero hides its partner.

    Args:
        name: of the engine, one of `ENGINES`.
        model: the model to be trained.
        loss: loss of each row.
        batch: a few rows of public or made-up tokens, not as many as a row has tokens.
        changed: the same with another record in one row; same shapes.
        row: which one.

    Raises:
        EngineError: naming the parameter that is wrong.
    """
    parameters = _trained(model)
    if not parameters:
        raise EngineError("nothing is trained: the adapter has no trainable parameters")
    before = {name: value.detach().clone() for name, value in parameters.items()}
    try:
        with torch.no_grad():
            for value in parameters.values():
                wave = torch.arange(value.numel(), device=value.device, dtype=value.dtype).sin()
                value.add_(0.02 * wave.reshape(value.shape))
        expected = LoopEngine(model, loss)(batch)[1]
        # Made after the loop has run, whose backward passes its hooks would take for their own.
        engine = ENGINES[name](model, loss)
        found, moved = engine(batch)[1], engine(changed)[1]
    finally:
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(before[name])
    if frozen := [key for key, value in model.named_parameters() if not value.requires_grad and value.grad is not None]:
        raise EngineError(f"{frozen[0]} is frozen but has a gradient")
    for name in parameters:
        allowed = TOLERANCE * float(expected[name].abs().max())
        if name not in found or found[name].shape != expected[name].shape:
            raise EngineError(f"the engine gives no gradient for each row of {name}; set environment.engine=loop")
        if not float((found[name] - expected[name]).abs().max()) <= allowed:
            raise EngineError(f"the engine's gradient of {name} differs from the loop's; set environment.engine=loop")
        others = torch.arange(len(found[name]), device=found[name].device) != row
        if not float((moved[name] - found[name])[others].abs().max()) <= allowed:
            raise EngineError(f"the gradient of {name} depends on other records of its batch: no privacy is possible")
    return engine


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _rows(batch: Batch) -> int:
    return int(next(iter(batch.values())).shape[0])
