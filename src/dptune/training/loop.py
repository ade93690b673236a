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

from dptune.config.schema import EnvironmentConfig, HyperparameterConfig
from dptune.data.batches import InputFormat, collate, physical_batches
from dptune.data.encoding import Encoded
from dptune.privacy.allocation import Group
from dptune.privacy.gradients import Engine
from dptune.privacy.mechanism import Mechanism
from dptune.privacy.sampling import Batch
from dptune.training.checkpoint import Checkpoint, Stateful, restore, state_of
from dptune.training.optimizers import IterateAverage, learning_rate_factor, make_optimizer, update
from dptune.training.projection import FullSpace
from dptune.training.ranks import Ranks

ALONE = Ranks()


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
    """Since the first step began, interruptions aside."""
    state: Callable[[], dict[str, Any]]
    """Everything that later steps depend on, until the next step begins; for a checkpoint."""


def train(
    parameters: Mapping[str, torch.nn.Parameter],
    rows: Sequence[Encoded],
    *,
    sampler: Sampler,
    engine: Engine,
    mechanism: Mechanism,
    groups: Sequence[Group],
    projection: FullSpace,
    hyperparameter: HyperparameterConfig,
    environment: EnvironmentConfig,
    layout: InputFormat,
    physical_batch_size: int,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, Mapping[str, torch.Tensor]], None] = lambda step, released: None,
    ranks: Ranks = ALONE,
    adapter: Stateful | None = None,
    start: Checkpoint | None = None,
) -> Iterator[Step]:
    """Train `parameters` in place, yielding after each step.

    Args:
        parameters: all trained parameters by name.
        rows: the encoded training split; the sampler draws positions in it.
        sampler: from the privacy plan.
        engine: per-example gradients.
        mechanism: from the privacy plan; the only way from gradients to an update.
        groups: groups of the parameters.
        projection: coordinates in which gradients are clipped and noised.
        hyperparameter: learning rate and its schedule, number of steps.
        environment: kind of optimizer and free post-processing of what was released.
        layout: how the backbone reads an example.
        before_step: called with each step before its data are touched; writes the ledger.
        after_step: called with each step, from 0, and what was released in it, once the weights have moved.
        physical_batch_size: rows in one forward pass; cannot change the numbers beyond rounding.
        ranks: the processes that do the run together.
        adapter: state of the model, for checkpoints.
        start: go on from there.
    """
    device = next(iter(parameters.values())).device
    group_of = {name: group.name for group in groups for name in group.parameters}
    optimizer = make_optimizer(parameters, hyperparameter, environment)
    average = IterateAverage(parameters, environment.iterate_ema)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(hyperparameter))
    parts: dict[str, Stateful] = {
        "optimizer": optimizer,
        "schedule": schedule,
        "average": average,
        "mechanism": mechanism,
        "projection": projection,
    }
    if adapter is not None:
        parts["adapter"] = adapter
    if start is not None:
        restore(parts, start.state)
    begin = time.perf_counter() - (start.seconds if start else 0.0)
    for step in range(start.step if start else 0, hyperparameter.steps):
        before_step(step)
        batch = sampler.batch(step)
        logical = [rows[row] for row in batch.indices.tolist()]
        losses = torch.zeros(1, dtype=torch.float64)
        # Pieces small enough for every rank to get one; a unit is in one piece, hence on one rank.
        size = min(physical_batch_size, max(1, -(-len(logical) // ranks.size)))
        for piece in list(physical_batches(logical, batch.units, size))[ranks.rank :: ranks.size]:
            tensors = collate([logical[position] for position in piece.tolist()], layout, device)
            loss, gradients = engine(tensors)
            mechanism.accumulate(projection.project(gradients), torch.from_numpy(batch.units[piece]))
            losses += float(loss.sum())
        ranks.sum(losses)
        together = ranks.sum if ranks.size > 1 else None
        release = mechanism.release(step, all_reduce=together, num_units=batch.num_units)
        released = projection.lift(release.gradients)
        noise_std = {name: release.noise_std[group_of[name]] for name in parameters}
        update(parameters, released, noise_std, optimizer, environment.shrinkage)
        projection.after_step(step, released)
        after_step(step, released)
        average.step()
        if step + 1 == hyperparameter.steps:
            average.finish()
        rate = float(schedule.get_last_lr()[0])
        schedule.step()
        yield Step(
            step=step + 1,
            learning_rate=rate,
            effective_noise_multiplier=release.effective_noise_multiplier,
            noise_std=release.noise_std,
            telemetry={**release.telemetry, "NON_PRIVATE/loss": float(losses) / max(len(logical), 1)},
            seconds=time.perf_counter() - begin,
            state=lambda: state_of(parts),
        )
