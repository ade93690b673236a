"""The shared loop: private and non-private training take the same path.

One step: the plan's sampler draws a Poisson batch, an engine gives each example's gradient, the plan's mechanism clips,
sums and adds noise once, and the released vector goes to the optimizer. Nothing else leaves the data.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from dptune.config.schema import EnvironmentConfig, HyperparameterConfig
from dptune.data.batches import Ladder, collate, physical_batches
from dptune.data.encoding import Encoded
from dptune.privacy.allocation import Group
from dptune.privacy.gradients import Engine, Gradients
from dptune.privacy.mechanism import Mechanism, Release
from dptune.privacy.sampling import Batch, Rows
from dptune.privacy.units import UNCOUNTED, UnitMeans
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


@dataclass(frozen=True)
class Batches:
    """Where the rows of each step come from."""

    rows: Sequence[Encoded]
    """The encoded training split; the sampler draws positions in it."""
    sampler: Sampler
    """From the privacy plan."""
    ladder: Ladder
    """Shapes of the physical batches; they cannot change the numbers beyond rounding."""
    device: torch.device | str


@dataclass(frozen=True)
class PrivatePath:
    """The only way from rows to an update: per-example gradients, projected, clipped, summed and noised."""

    engine: Engine
    projection: FullSpace
    mechanism: Mechanism
    """From the privacy plan."""

    def release(self, step: int, batches: Batches, ranks: Ranks) -> tuple[Release, float]:
        """What a step releases, and the mean loss of its rows, which is not to be released."""
        batch = batches.sampler.batch(step)
        rows = [batches.rows[row] for row in batch.indices.tolist()]
        losses = torch.zeros(1, dtype=torch.float64)
        if self.mechanism.plan.unit == "user_uls":
            for block in _blocks(batch, batches.ladder.rows)[ranks.rank :: ranks.size]:
                means = UnitMeans(Counter(batch.units[block].tolist()), batches.ladder.rows)
                for gradients, units, loss in self._gradients(block, rows, batch, batches):
                    means.add(gradients, units)
                    losses += loss
                self.mechanism.accumulate(*means.take())
        else:
            everything = np.arange(len(rows))
            for gradients, units, loss in self._gradients(everything, rows, batch, batches, ranks):
                self.mechanism.accumulate(gradients, units)
                losses += loss
        ranks.sum(losses)
        together = ranks.sum if ranks.size > 1 else None
        release = self.mechanism.release(step, all_reduce=together, num_units=batch.num_units)
        return release, float(losses) / max(len(rows), 1)

    def _gradients(
        self, positions: Rows, rows: Sequence[Encoded], batch: Batch, batches: Batches, ranks: Ranks = ALONE
    ) -> Iterator[tuple[Gradients, torch.Tensor, float]]:
        """Gradients and units of each physical batch of some rows, and the sum of their losses."""
        own = [rows[position] for position in positions.tolist()]
        for piece in list(physical_batches(own, batches.ladder))[ranks.rank :: ranks.size]:
            taken = [own[position] for position in piece.positions.tolist()]
            loss, gradients = self.engine(collate(taken, batches.ladder.layout, piece.shape, batches.device))
            units = piece.padded(batch.units[positions], UNCOUNTED)
            yield dict(self.projection.project(gradients)), units, float(loss[: len(taken)].sum())


def _blocks(batch: Batch, size: int) -> list[Rows]:
    """Positions of the rows of up to `size` units each, so that few means are in memory at a time."""
    return [
        np.flatnonzero((batch.units >= first) & (batch.units < first + size))
        for first in range(0, batch.num_units, size)
    ]


def train(
    parameters: Mapping[str, torch.nn.Parameter],
    batches: Batches,
    path: PrivatePath,
    *,
    groups: Sequence[Group],
    hyperparameter: HyperparameterConfig,
    environment: EnvironmentConfig,
    before_step: Callable[[int], None] = lambda step: None,
    after_step: Callable[[int, Mapping[str, torch.Tensor]], None] = lambda step, released: None,
    ranks: Ranks = ALONE,
    adapter: Stateful | None = None,
    start: Checkpoint | None = None,
) -> Iterator[Step]:
    """Train `parameters` in place, yielding after each step.

    Args:
        parameters: all trained parameters by name.
        batches: what each step sees.
        path: what each step does with it.
        groups: groups of the parameters.
        hyperparameter: learning rate and its schedule, number of steps.
        environment: kind of optimizer and free post-processing of what was released.
        before_step: called with each step before its data are touched; writes the ledger.
        after_step: called with each step, from 0, and what was released in it, once the weights have moved.
        ranks: the processes that do the run together.
        adapter: state of the model, for checkpoints.
        start: go on from there.
    """
    group_of = {name: group.name for group in groups for name in group.parameters}
    optimizer = make_optimizer(parameters, hyperparameter, environment)
    average = IterateAverage(parameters, environment.iterate_ema)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(hyperparameter))
    parts: dict[str, Stateful] = {
        "optimizer": optimizer,
        "schedule": schedule,
        "average": average,
        "mechanism": path.mechanism,
        "projection": path.projection,
    }
    if adapter is not None:
        parts["adapter"] = adapter
    if start is not None:
        restore(parts, start.state)
    begin = time.perf_counter() - (start.seconds if start else 0.0)
    for step in range(start.step if start else 0, hyperparameter.steps):
        before_step(step)
        release, loss = path.release(step, batches, ranks)
        released = path.projection.lift(release.gradients)
        noise_std = {name: release.noise_std[group_of[name]] for name in parameters}
        update(parameters, released, noise_std, optimizer, environment.shrinkage)
        path.projection.after_step(step, released)
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
            telemetry={**release.telemetry, "NON_PRIVATE/loss": loss},
            seconds=time.perf_counter() - begin,
            state=lambda: state_of(parts),
        )
