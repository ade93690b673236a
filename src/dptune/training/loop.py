"""The shared loop: private and non-private training take the same path.

One step: the plan's sampler draws a Poisson batch, an engine gives each example's gradient, the plan's mechanism clips,
sums and adds noise once, and the released vector goes to the optimizer. Nothing else leaves the data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dptune.config import EnvironmentConfig, HyperparameterConfig
from dptune.data.encoding import Encoded, collate, physical_batches
from dptune.privacy.gradients import Engine
from dptune.privacy.mechanism import Mechanism, Release
from dptune.privacy.sampling import Batch


class Sampler(Protocol):
    """Draws the batch of a step."""

    def batch(self, step: int) -> Batch:
        """Rows of the training split, possibly none."""
        ...


@dataclass(frozen=True)
class Step:
    """What one step leaves behind. Keys of `telemetry` begin with NON_PRIVATE/: it is not paid for."""

    step: int
    """Number of steps done, from 1."""
    learning_rate: float
    effective_noise_multiplier: float
    noise_std: Mapping[str, float]
    """Noise on the mean gradient by group."""
    telemetry: Mapping[str, float]
    seconds: float
    """Since the first step began."""


def train(
    parameters: Mapping[str, torch.nn.Parameter],
    rows: Sequence[Encoded],
    *,
    sampler: Sampler,
    engine: Engine,
    mechanism: Mechanism,
    hyperparameter: HyperparameterConfig,
    environment: EnvironmentConfig,
    pad: int,
    physical_batch_size: int,
) -> Iterator[Step]:
    """Train `parameters` in place, yielding after each step.

    Args:
        parameters: all trained parameters by name.
        rows: the encoded training split; the sampler draws positions in it.
        sampler: from the privacy plan.
        engine: per-example gradients.
        mechanism: from the privacy plan; the only way from gradients to an update.
        hyperparameter: learning rate and its schedule, number of steps.
        environment: kind of optimizer.
        pad: token that pads.
        physical_batch_size: rows in one forward pass; cannot change the numbers beyond rounding.
    """
    device = next(iter(parameters.values())).device
    optimizer = make_optimizer(list(parameters.values()), hyperparameter, environment.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(hyperparameter))
    begin = time.perf_counter()
    for step in range(hyperparameter.steps):
        batch = sampler.batch(step)
        logical = [rows[row] for row in batch.indices.tolist()]
        losses = 0.0
        for piece in physical_batches(logical, batch.units, physical_batch_size):
            tensors = collate([logical[position] for position in piece.tolist()], pad, device)
            loss, gradients = engine(tensors)
            mechanism.accumulate(gradients, torch.from_numpy(batch.units[piece]))
            losses += float(loss.sum())
        release = mechanism.release(step)
        update(parameters, release, optimizer)
        rate = float(schedule.get_last_lr()[0])
        schedule.step()
        yield Step(
            step=step + 1,
            learning_rate=rate,
            effective_noise_multiplier=release.effective_noise_multiplier,
            noise_std=release.noise_std,
            telemetry={**release.telemetry, "NON_PRIVATE/loss": losses / max(len(logical), 1)},
            seconds=time.perf_counter() - begin,
        )


def update(parameters: Mapping[str, torch.nn.Parameter], release: Release, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step on released gradients. Raises ValueError when one is missing."""
    if release.gradients.keys() != parameters.keys():
        differing = sorted(release.gradients.keys() ^ parameters.keys())
        raise ValueError(f"released gradients and trained parameters differ in {', '.join(differing)}")
    for name, parameter in parameters.items():
        parameter.grad = release.gradients[name].to(parameter.device, parameter.dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_optimizer(
    parameters: list[torch.nn.Parameter], hyperparameter: HyperparameterConfig, name: str
) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum 0.9."""
    settings: dict[str, Any] = {
        "lr": hyperparameter.learning_rate,
        "weight_decay": hyperparameter.weight_decay,
    }
    if name == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, **settings)
    return torch.optim.AdamW(parameters, **settings)


def learning_rate_factor(hyperparameter: HyperparameterConfig) -> Callable[[int], float]:
    """Learning rate over its peak, by step from 0: linear warm-up, then linear decay to zero or constant."""
    warmup, steps = hyperparameter.warmup_steps, hyperparameter.steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 1.0 if hyperparameter.decay == "constant" else (steps - step) / (steps - warmup)

    return factor
