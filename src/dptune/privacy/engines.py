"""Fast engines of per-example gradients, and the check that they equal the loop (SPECIFICATION.md 1.3).

All of them do one backward pass of the model. What each record contributes is computed layer by layer from what the
layer read and from the gradient at its output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

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


class HookEngine:
    """Our own hooks: closed forms for linear layers and embeddings.

    The hook hangs on the output tensor and keeps the input in its closure, so that it also works when the forward pass
    is done again for gradient checkpointing. A layer, or a weight, that is used several times adds up.
    """

    def __init__(self, model: torch.nn.Module, loss: LossFunction) -> None:
        """Raises EngineError, naming the parameter, when one is trained in a layer that the engine does not know."""
        self.model, self.loss = model, loss
        self.parameters = trainable_parameters(model)
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._busy = False
        self._handles = []
        covered: set[torch.nn.Parameter] = set()
        for layer in self._layers():
            covered.update(value for value in layer.parameters() if value.requires_grad)
            self._handles.append(layer.register_forward_hook(self._watch, with_kwargs=True))
        if lacking := [name for name, value in self.parameters.items() if value not in covered]:
            self.close()
            raise EngineError(f"{lacking[0]} is not of a linear layer or embedding: set environment.engine=functional")

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        """Losses [b] and gradients [b, *shape] of a physical batch."""
        losses = self.loss(self.model, batch)
        try:
            torch.autograd.backward(losses.sum())
            rows = rows_of(batch)
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, the hooks look away."""
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _layers(self) -> Iterable[torch.nn.Module]:
        """The layers whose parameters are trained."""
        return [module for module in self.model.modules() if _is_closed(module) and _own(module)]

    def _rows(self, layer: torch.nn.Module, inputs: Inputs, grad: torch.Tensor) -> ByParameter:
        """Gradients of the rows by parameter of one call of a layer."""
        return CLOSED_FORMS[type(layer)](layer, inputs[0][0], grad)

    def _watch(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._busy or not isinstance(output, torch.Tensor) or not output.requires_grad:
            return
        inputs = (tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()})

        def collect(grad: torch.Tensor) -> None:
            for parameter, rows in self._rows(layer, inputs, grad.detach()).items():
                before = self._sums.get(parameter)
                self._sums[parameter] = rows if before is None else before + rows

        output.register_hook(collect)  # type: ignore[no-untyped-call]


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer was called with: positional and named arguments, detached."""

ByParameter = dict[torch.nn.Parameter, torch.Tensor]


def _linear(layer: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> ByParameter:
    grad, x = _flat(grad), _flat(x).to(grad.dtype)
    # Conv1D keeps its weight transposed.
    weight = (lambda: x.mT @ grad) if isinstance(layer, Conv1D) else (lambda: grad.mT @ x)
    return _wanted(layer, {"weight": weight, "bias": lambda: grad.sum(dim=1)})


def _embedding(layer: torch.nn.Module, tokens: torch.Tensor, grad: torch.Tensor) -> ByParameter:
    assert isinstance(layer, torch.nn.Embedding)
    flat, kept = tokens.reshape(len(tokens), -1), _flat(grad)
    if layer.padding_idx is not None:
        kept = kept.masked_fill((flat == layer.padding_idx).unsqueeze(2), 0.0)
    rows = grad.new_zeros(len(tokens), layer.num_embeddings, layer.embedding_dim)
    return _wanted(layer, {"weight": lambda: rows.scatter_add_(1, flat.unsqueeze(2).expand_as(kept), kept)})


def _layer_norm(layer: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> ByParameter:
    assert isinstance(layer, torch.nn.LayerNorm)
    normal = torch.nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return _wanted(layer, {"weight": lambda: _flat(grad * normal).sum(dim=1), "bias": lambda: _flat(grad).sum(dim=1)})


CLOSED_FORMS: dict[type, Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], ByParameter]] = {
    torch.nn.Linear: _linear,
    Conv1D: _linear,
    torch.nn.Embedding: _embedding,
    torch.nn.LayerNorm: _layer_norm,
}
"""Gradients of the rows of a layer from its input [b, ...] and the gradient at its output [b, ...]."""


def _is_closed(layer: torch.nn.Module) -> bool:
    return type(layer) in CLOSED_FORMS


def _own(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [value for value in layer.parameters(recurse=False) if value.requires_grad]


def _wanted(layer: torch.nn.Module, forms: dict[str, Callable[[], torch.Tensor]]) -> ByParameter:
    parameters = dict(layer.named_parameters(recurse=False))
    wanted = [name for name in forms if name in parameters and parameters[name].requires_grad]
    return {parameters[name]: forms[name]() for name in wanted}


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[b, ..., d] as [b, n, d]."""
    return x.reshape(len(x), -1, x.shape[-1])


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


class FunctionalEngine(HookEngine):
    """Closed forms where there are any, and `torch.func` for every other layer whose rows are independent.

    Such a layer is done again and differentiated row by row: all rows together by `vmap`, or one after the other where
    `vmap` cannot do it (an `autograd.Function` of its own, control flow). Only layers that own trained parameters are
    done again, so that what the backbone does (attention kernels, masks) does not matter.
    """

    def __init__(self, model: torch.nn.Module, loss: LossFunction) -> None:
        self._one_by_one: set[torch.nn.Module] = set()
        super().__init__(model, loss)

    def _layers(self) -> Iterable[torch.nn.Module]:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        found: dict[torch.nn.Module, None] = {}
        # Each name of a tied weight: it adds up over the layers that use it.
        for name, value in self.model.named_parameters(remove_duplicate=False):
            if not value.requires_grad:
                continue
            path = name.split(".")[:-1]
            around = [modules[".".join(path[:length])] for length in range(len(path) + 1)]
            owner = [module for module in around if not isinstance(module, CONTAINERS)][-1]
            # An adapted layer is done as a whole, unless all that is trained in it has a closed form.
            tuned = [module for module in around if hasattr(module, "adapter_layer_names")][:1]
            if tuned and any(_own(module) and not _is_closed(module) for module in tuned[0].modules()):
                owner = tuned[0]
            found[owner] = None
        # What is done as a whole covers the layers inside of it.
        whole = [layer for layer in found if not _is_closed(layer)]
        inside = {part for layer in whole for part in layer.modules() if part is not layer}
        return [layer for layer in found if layer not in inside]

    def _rows(self, layer: torch.nn.Module, inputs: Inputs, grad: torch.Tensor) -> ByParameter:
        if _is_closed(layer):
            return super()._rows(layer, inputs, grad)
        values = {name: value for name, value in layer.named_parameters() if value.requires_grad}
        plain = {name: value.detach() for name, value in values.items()}
        args, kwargs = inputs
        batched = [index for index, value in enumerate(args) if isinstance(value, torch.Tensor)]

        def one(row: list[torch.Tensor], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
            given = list(args)
            for index, value in zip(batched, row, strict=True):
                given[index] = value.unsqueeze(0)
            pull = vjp(lambda weights: functional_call(layer, weights, tuple(given), kwargs), plain)[1]
            result: dict[str, torch.Tensor] = pull(upstream.unsqueeze(0))[0]
            return result

        def alone(row: list[torch.Tensor], upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = list(args)
            for index, value in zip(batched, row, strict=True):
                given[index] = value.unsqueeze(0)
            with torch.enable_grad():
                output = layer(*given, **kwargs)
            return torch.autograd.grad(output, list(values.values()), upstream.unsqueeze(0), materialize_grads=True)

        rows = [args[index] for index in batched]
        self._busy = True
        try:
            if layer not in self._one_by_one:
                try:
                    found = vmap(one)(rows, grad)
                    return {values[name]: value for name, value in found.items()}
                except RuntimeError:
                    self._one_by_one.add(layer)
            parts = [alone([value[at] for value in rows], grad[at]) for at in range(len(grad))]
            stacked = [torch.stack(columns) for columns in zip(*parts, strict=True)]
            return dict(zip(values.values(), stacked, strict=True))
        finally:
            self._busy = False


CONTAINERS = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.ParameterList)
"""Modules without a forward pass."""


class OpacusEngine:
    """Opacus' hooks: one backward pass of the summed loss, per-example gradients from activations and back-props.

    Exact for adapters on linear layers; what it cannot do raises `EngineError` instead of passing unnoticed.
    """

    def __init__(self, model: torch.nn.Module, loss: LossFunction) -> None:
        """Raises EngineError when Opacus refuses the model."""
        from opacus import GradSampleModule

        self.parameters = trainable_parameters(model)
        self.loss = loss
        with _opacus_limits():
            self.wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Gradients]:
        """Losses [b] and gradients [b, *shape] of a physical batch.

        Raises:
            EngineError: when a parameter has no gradient for each row.
        """
        with warnings.catch_warnings(), _opacus_limits():
            losses = self.loss(self.wrapped, batch)
            # The first adapted layer reads frozen embeddings; its hooks fire all the same.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            torch.autograd.backward(losses.sum())
        gradients: Gradients = {}
        for name, parameter in self.parameters.items():
            sample = getattr(parameter, "grad_sample", None)
            if not isinstance(sample, torch.Tensor) or sample.shape != (rows_of(batch), *parameter.shape):
                shape = tuple(sample.shape) if isinstance(sample, torch.Tensor) else None
                raise EngineError(
                    f"Opacus gives gradients of shape {shape} for {name}, not {(rows_of(batch), *parameter.shape)}; "
                    "set environment.engine=functional"
                )
            gradients[name] = sample
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        return losses.detach(), gradients

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, Opacus' hooks look away."""
        self.wrapped.disable_hooks()
        try:
            yield
        finally:
            self.wrapped.enable_hooks()

    def close(self) -> None:
        """Remove the hooks and the attributes that Opacus added."""
        self.wrapped.to_standard_module()


@contextmanager
def _opacus_limits() -> Iterator[None]:
    """Say in one sentence what Opacus raises on a model that it does not support."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise EngineError(f"Opacus cannot do this adapter ({reason}); set environment.engine=functional") from error


ENGINES: dict[str, Callable[[torch.nn.Module, LossFunction], Engine]] = {
    "hooks": HookEngine,
    "functional": FunctionalEngine,
    "opacus": OpacusEngine,
    "loop": LoopEngine,
}


TOLERANCE = 5e-5
"""Largest difference of an engine from the loop, relative to a parameter's largest gradient, in a model of up to
LAYERS layers; deeper ones round more, in proportion. Rows must be as independent of one another in any model."""
LAYERS = 8


def checked_engine(name: str, model: torch.nn.Module, loss: LossFunction, batch: Batch, changed: Batch) -> Engine:
    """An engine that was compared with the loop, before any budget is spent.

    Every trained parameter must have one gradient for each row, equal to the loop's; changing the last record must
    change its row only; dropout and batch statistics must be off. The weights are moved a little for the comparison: a
    factor that is zero hides its partner's gradient. To the last bit, and in every shape, `independence` compares.

    Args:
        name: of the engine, one of `ENGINES`.
        model: the model to be trained.
        loss: loss of each row.
        batch: a few records, public or made up, of different lengths; not as many as a row has tokens.
        changed: the same with another last record; same shapes.

    Raises:
        EngineError: naming the parameter or the layer that is wrong.
    """
    parameters = trainable_parameters(model)
    if not parameters:
        raise EngineError("nothing is trained: the adapter has no trainable parameters")
    # Layers that contain others come before them: the last one is what a person can find.
    if astray := [key for key, module in model.named_modules() if module.training and not _own(module)]:
        raise EngineError(f"{astray[-1] or 'the model'} is in training mode, where dropout and batch statistics are on")
    with ExitStack() as undo:
        with moved(parameters):
            expected = LoopEngine(model, loss)(batch)[1]
            # Made after the loop has run, whose backward passes its hooks would take for their own.
            engine = ENGINES[name](model, loss)
            undo.callback(engine.close)
            found, other = engine(batch)[1], engine(changed)[1]
        if frozen := [key for key, value in model.named_parameters() if _frozen_with_gradient(value)]:
            raise EngineError(f"{frozen[0]} is frozen but has a gradient")
        _compare_with_loop(name, model, expected, found, other)
        undo.pop_all()
    return engine


def _frozen_with_gradient(value: torch.nn.Parameter) -> bool:
    return not value.requires_grad and value.grad is not None


def _compare_with_loop(
    name: str, model: torch.nn.Module, expected: Gradients, found: Gradients, other: Gradients
) -> None:
    low = any(value.is_floating_point() and value.itemsize < 4 for value in model.parameters())
    depth = max((len(part) for part in model.modules() if isinstance(part, torch.nn.ModuleList)), default=1)
    tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE * max(1.0, depth / LAYERS)
    # Where all gradients of a parameter are small beside the others', they are differences of large numbers.
    least = 0.1 * max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        size = max(float(value.abs().max()), least)
        if key not in found or found[key].shape != value.shape:
            raise EngineError(f"the engine gives no gradient for each row of {key}; set environment.engine=loop")
        if not float((other[key] - found[key])[:-1].abs().max()) <= TOLERANCE * size:
            rest = "no privacy is possible" if name == "loop" else "set environment.engine=loop"
            raise EngineError(f"the gradient of {key} depends on other records of its batch: {rest}")
        if not float((found[key] - value).abs().max()) <= tolerance * size:
            raise EngineError(f"the engine's gradient of {key} differs from the loop's; set environment.engine=loop")
