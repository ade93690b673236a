"""The one private release of a step: clip, sum, noise, normalise (SPECIFICATION.md 2 and 4).

    plan, groups, keys -> Mechanism
    for each step:  accumulate(physical batch) ...  then  release(step) -> Release

Clip bounds and noise are functions of the plan and of what was released before, so that adapting them is free
(theorem B); `set_public_weights` is the only other input, and takes released quantities only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dptune.privacy.allocation import (
    AllocationState,
    Group,
    PrecisionBudget,
    PrecisionRow,
    Vector,
    clamp_weights,
    joint_thresholds,
    mean_of_quantile,
    noise_stds,
    share_std,
)
from dptune.privacy.clipping import NONE, ClippedSum, ClipRule, clip_and_sum
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.rules import GROUPINGS, row_of
from dptune.privacy.streams import KeyRing, Purpose, grid_of
from dptune.privacy.units import UNCOUNTED

_BITS = "quantile bits"  # name of the noise stream of the quantile tracker


def groups_of(named_shapes: Mapping[str, torch.Size], grouping: str) -> tuple[Group, ...]:
    """Cut trainable parameters into groups, in their order of appearance.

    Args:
        named_shapes: shape of each trainable parameter, by its name in the model.
        grouping: a key of `GROUPINGS`.

    Raises:
        ValueError: if the grouping is unknown or there are no parameters.
    """
    group_of = row_of(GROUPINGS, grouping, "grouping")
    if not named_shapes:
        raise ValueError("the adapter has no trainable parameters; nothing can be trained")
    members: dict[str, list[str]] = {}
    for name in named_shapes:
        members.setdefault(group_of(name), []).append(name)
    return tuple(
        Group(
            name=group,
            parameters=tuple(names),
            dimension=sum(named_shapes[name].numel() for name in names),
            shapes=tuple(tuple(named_shapes[name]) for name in names),
        )
        for group, names in members.items()
    )


@dataclass(frozen=True)
class Release:
    """What one step lets out. Everything but `telemetry` may be published.

    Attributes:
        step: the step, from 0.
        private: False if the plan is not private: then `gradients` are exact.
        gradients: y / L by parameter, float32, on the device of the gradients (the CPU after an empty batch).
        noise_std: s_g / L by group, the noise in each coordinate of `gradients`.
        thresholds: C_g by group that this step clipped with.
        effective_noise_multiplier: of everything released in this step together; 0 without privacy.
        telemetry: must not leave the trust boundary (1.5); keys start with `NON_PRIVATE/`.
    """

    step: int
    private: bool
    gradients: dict[str, Tensor]
    noise_std: dict[str, float]
    thresholds: dict[str, float]
    effective_noise_multiplier: float
    telemetry: dict[str, float]


@dataclass(frozen=True)
class _Step:
    """The public part of one step: fixed before its data are touched."""

    sigma: float  # noise multiplier of the whole step
    gradient_sigma: float  # what is left of it for the gradients
    bit_std: float  # noise of the quantile bits; 0 without a tracker
    rule: ClipRule

    @property
    def stds(self) -> Vector:
        return self.gradient_sigma * np.asarray(self.rule.unit_stds)


class Mechanism:
    """Turns per-example gradients into one noised vector a step.

    Theorem A holds in every step: each unit's clipped vector keeps |S^-1 v| <= 1/sigma_t, which the ledger
    checks on the bound that the clipped sum itself carries. `scaled_flat` (M2) clips to the ellipsoid whose
    semi-axes s_g/sigma come from the allocation rule at thresholds C_g with sum_g C_g^2 = C^2 (C_g =
    C/sqrt(G), or tracked): with equal s_g this is flat clipping to C with noise sigma C. Another scale would
    be as private, and a change of learning rate.
    """

    def __init__(self, plan: PrivacyPlan, groups: Sequence[Group], keys: KeyRing) -> None:
        """Prepare step 0.

        Args:
            plan: what was accounted for.
            groups: from `groups_of`; names and parameters must be unique.
            keys: where the noise comes from.

        Raises:
            ValueError: if groups overlap, or the keys are not of the plan's noise mode.
        """
        names = [group.name for group in groups]
        parameters = [name for group in groups for name in group.parameters]
        if not groups or len(set(names)) < len(names) or len(set(parameters)) < len(parameters) or _BITS in names:
            raise ValueError(f"groups need distinct names (not {_BITS!r}) and distinct parameters; use groups_of")
        if plan.private and keys.mode != plan.noise_mode:
            raise ValueError(f"noise_mode is {plan.noise_mode} but the keys are {keys.mode}; make them agree")
        self.plan = plan
        self.groups = tuple(groups)
        self._keys = keys
        self._dimensions = np.array([group.dimension for group in groups], dtype=float)
        self._sigmas = plan.noise_multipliers()
        self._state = AllocationState.start(groups, [plan.max_grad_norm / math.sqrt(len(groups))] * len(groups))
        self._public_weights: dict[str, float] | None = None
        self._sum: ClippedSum | None = None
        self._units: set[int] = set()
        self._next_step = 0

    @property
    def next_step(self) -> int:
        """The step that the next `accumulate` and `release` belong to."""
        return self._next_step

    @property
    def state(self) -> AllocationState:
        """What is kept of the released history."""
        return self._state

    def set_public_weights(self, weights: Mapping[str, float]) -> None:
        """Set the weights w_g of the rule `lora_weight_space` for the steps to come.

        Call it between steps, with functions of public and released quantities only, such as
        `lora_group_weights` of the adapter's current parameters: those are free (2.5, 2.6); anything else is
        not accounted for.

        Args:
            weights: one finite weight >= 0 a group; clamped to [floor, 1] of the largest.

        Raises:
            ValueError: in the middle of a step, or if groups or values are wrong.
        """
        self._require_between_steps("weights are set")
        if weights.keys() != {group.name for group in self.groups}:
            raise ValueError("weights must be given for exactly the groups of the mechanism")
        if not all(math.isfinite(weight) and weight >= 0.0 for weight in weights.values()):
            raise ValueError("weights must be finite and not negative")
        self._public_weights = dict(weights)

    def accumulate(self, per_example: Mapping[str, Tensor], units: Tensor | None = None) -> None:
        """Clip the gradients of one physical batch and add them to the sum of the step.

        Args:
            per_example: for every parameter of every group, the gradients of each row, shape (b, *shape).
            units: position of each row's privacy unit in the logical batch, integers of shape (b,); rows of
                `UNCOUNTED` only fill the physical batch up. Needed for `user_uls`, where a row is the mean over
                one user (`UnitMeans`). With `user_els` a unit may have several rows, each of which counts.

        Raises:
            ValueError: if all steps are spent, parameters or rows disagree, or a unit comes twice in a step.
        """
        step = self._public_step()
        if units is None and self.plan.unit == "user_uls":
            raise ValueError("unit is user_uls; pass the unit of each row")
        if units is not None and self.plan.unit != "user_els":
            present = [unit for unit in units.tolist() if unit != UNCOUNTED]
            if len(self._units | set(present)) < len(self._units) + len(present):
                raise ValueError("a unit comes twice in a step; add a row once, and a user's mean once")
            self._units |= set(present)
        counted = None if units is None else units != UNCOUNTED
        part = clip_and_sum(per_example, self.groups, step.rule, counted)
        self._sum = part if self._sum is None else self._sum + part

    def release(
        self, step: int, *, all_reduce: Callable[[Tensor], object] | None = None, num_units: int | None = None
    ) -> Release:
        """Add noise to the sum of the step, once, and go to the next; an empty batch is noise alone.

        Args:
            step: must be `next_step`: noise is never drawn twice for a step, and never skipped.
            all_reduce: adds a float64 vector over the ranks in place. Every rank then draws the same noise
                from the same keys, so that it is in the reduced sum once.
            num_units: units of the whole batch, those of other ranks included. Needed for `user_uls` with
                `all_reduce`: a user whose rows are on two ranks would be clipped twice.

        Raises:
            PrecisionError: if the noise falls short of the plan; nothing is released.
            ValueError: if it is not this step's turn, or the sum is not of `num_units` units.
        """
        public = self._public_step()
        if step != self._next_step:
            raise ValueError(f"release of step {step}, but step {self._next_step} is due; release each step once")
        total = ClippedSum.empty(self.groups, public.rule.sensitivity) if self._sum is None else self._sum
        if all_reduce is not None:
            if self.plan.unit == "user_uls" and num_units is None:
                raise ValueError("a user's rows could be on two ranks: pass the number of units in the batch")
            total = total.reduced(all_reduce)
        if num_units is not None and int(total.telemetry[0]) != num_units:
            raise ValueError(
                f"the batch has {num_units} units, but the sum has {int(total.telemetry[0])}; add each unit once,"
                " with all its rows on one rank"
            )
        bits = self._bit_rows(public.bit_std)
        effective = 0.0
        if self.plan.private:
            effective = PrecisionBudget(total.sensitivity.rows(public.stds) + bits).check(public.sigma)

        released = [
            self._noised(values, float(std), step, group.name)
            for values, std, group in zip(self._split(total.values), public.stds, self.groups, strict=True)
        ]
        self._state = self._state.update(
            [float(y.square().sum()) for y in released],
            public.stds,
            self._dimensions,
            self.plan.expected_batch_size,
            self.plan.allocation.ema,
        )
        if (tracker := self.plan.quantile) is not None:
            counts = self._noised(total.inside, public.bit_std, step, _BITS)
            self._state = self._state.track(
                0.5 + counts.numpy(force=True) / self.plan.expected_batch_size,
                tracker.quantile,
                tracker.learning_rate,
                tracker.minimum,
                tracker.maximum,
            )
        self._sum, self._units, self._next_step = None, set(), step + 1
        return Release(
            step=step,
            private=self.plan.private,
            gradients=self._gradients(released),
            noise_std=self._by_group(public.stds / self.plan.expected_batch_size),
            thresholds=self._by_group(public.rule.thresholds),
            effective_noise_multiplier=effective,
            telemetry=_telemetry(total),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later steps depend on; plain values, released quantities only.

        Raises:
            ValueError: in the middle of a step: sums without noise do not go into a checkpoint.
        """
        self._require_between_steps("the state is saved")
        return {
            "plan": self.plan.fingerprint(),
            "next_step": self._next_step,
            "allocation": self._state.to_dict(),
            "public_weights": self._public_weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: in the middle of a step, or if the state is of another plan, of other groups or of an
                earlier step.
        """
        self._require_between_steps("a state is loaded")
        allocation = AllocationState.from_dict(state["allocation"])
        if state["plan"] != self.plan.fingerprint() or allocation.groups != self._state.groups:
            raise ValueError(
                "the state is of another privacy plan or of other groups; resume with the run's own config"
            )
        if int(state["next_step"]) < self._next_step:
            raise ValueError(
                f"the state is of step {state['next_step']}, but step {self._next_step} is due; going back would"
                " draw the same noise for another sum"
            )
        self._state = allocation
        self._public_weights = state["public_weights"]
        self._next_step = int(state["next_step"])

    def _require_between_steps(self, what: str) -> None:
        if self._sum is not None:
            raise ValueError(f"{what} in the middle of step {self._next_step}; release it first")

    def _public_step(self) -> _Step:
        """The public part of the step under way, from the plan and the released history."""
        if self._next_step >= self.plan.steps:
            raise ValueError(f"all {self.plan.steps} steps of the plan are released; a longer run needs its own plan")
        if not self.plan.private:
            nothing = (0.0,) * len(self.groups)
            return _Step(0.0, 0.0, 0.0, ClipRule(NONE, self._state.thresholds, self._state.thresholds, nothing, 0.0))
        allocation, tracker = self.plan.allocation, self.plan.quantile
        sigma = float(self._sigmas[self._next_step])
        bit_std = share_std(sigma, 0.5, tracker.share / len(self.groups)) if tracker else 0.0
        gradient_sigma = PrecisionBudget(self._bit_rows(bit_std)).remaining(sigma)
        weights = self._weights()
        thresholds = np.asarray(self._state.thresholds)
        if allocation.row.solves_thresholds and tracker is not None:
            means = mean_of_quantile(thresholds, tracker.quantile)
            thresholds = joint_thresholds(
                means, self._dimensions, weights, gradient_sigma, self.plan.expected_batch_size
            )
        stds = noise_stds(allocation.rule, thresholds, self._dimensions, weights, 1.0)
        clipping = self.plan.clipping
        rule = ClipRule(
            kind=clipping.kind,
            thresholds=tuple(thresholds.tolist()),
            tracked=self._state.thresholds,
            unit_stds=tuple(stds.tolist()),
            stability=clipping.stability,
        )
        return _Step(sigma, gradient_sigma, bit_std, rule)

    def _weights(self) -> Vector:
        allocation = self.plan.allocation
        if not allocation.row.takes_weights:
            return self._state.weights(allocation.weights, allocation.floor)
        if self._public_weights is None:
            raise ValueError(f"allocation rule {allocation.rule}: call set_public_weights before the first step")
        return clamp_weights([self._public_weights[group.name] for group in self.groups], allocation.floor)

    def _bit_rows(self, bit_std: float) -> tuple[PrecisionRow, ...]:
        if bit_std == 0.0:
            return ()
        return tuple(PrecisionRow(f"{_BITS} {group.name}", 0.5, bit_std) for group in self.groups)

    def _noised(self, values: Tensor, std: float, step: int, stream: str) -> Tensor:
        """Add float64 noise and round to the public grid; with std 0 the values as they are."""
        if std == 0.0:
            return values
        noise = self._keys.stream(Purpose.NOISE, step=step, group=stream).normal(len(values))
        return round_to_grid(values + std * torch.from_numpy(noise).to(values.device), std)

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split_with_sizes(values, [group.dimension for group in self.groups])

    def _gradients(self, released: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            name: (part / self.plan.expected_batch_size).float().reshape(shape)
            for group, y in zip(self.groups, released, strict=True)
            for name, shape, part in zip(
                group.parameters, group.shapes, torch.split_with_sizes(y, group.sizes), strict=True
            )
        }

    def _by_group(self, values: Sequence[float] | Vector) -> dict[str, float]:
        return {group.name: float(value) for group, value in zip(self.groups, values, strict=True)}


def round_to_grid(values: Tensor, std: float) -> Tensor:
    """Round to multiples of the largest power of two that is at most std / 2^10 (10.3)."""
    grid = grid_of(std)
    return (values / grid).round() * grid


def _telemetry(total: ClippedSum) -> dict[str, float]:
    units, shortened, non_finite = total.telemetry.tolist()
    return {
        "NON_PRIVATE/batch_size": units,
        "NON_PRIVATE/clip_fraction": shortened / units if units else 0.0,
        "NON_PRIVATE/non_finite": non_finite,
    }
