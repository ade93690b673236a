"""The privacy plan: one frozen object from which sampler, mechanism and accounting all follow.

Sample rate, clipping, noise and events are read from the same object, so that they cannot disagree. A plan whose
epsilon could not be true is refused when it is built (SPECIFICATION.md 1 and 2.1).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from dptune.privacy import accounting
from dptune.privacy.accounting import Reported
from dptune.privacy.events import Event, PlanError
from dptune.privacy.rules import (
    ALLOCATIONS,
    CLIPPINGS,
    GROUPINGS,
    UNITS,
    WEIGHTS,
    AllocationRule,
    NoiseMode,
)
from dptune.privacy.sampling import PoissonSampler, cap_per_user
from dptune.privacy.schedules import Schedule
from dptune.privacy.streams import KeyRing

__all__ = ["Allocation", "Clipping", "PlanError", "PrivacyPlan", "QuantileTracking", "Schedule"]


def _floats(value: Any) -> Any:
    """The same tree with every number a float, so that 256 and 256.0 are written alike."""
    if isinstance(value, dict):
        return {key: _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _one_of(name: str, value: str, choices: Iterable[str], why: str = "") -> None:
    allowed = tuple(choices)
    if value not in allowed:
        reason = f"; {why}" if why else ""
        raise PlanError(f"{name} must be one of {', '.join(allowed)}, not {value!r}{reason}")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise PlanError(f"{name} must lie between {low:g} and {high:g}, not {value}")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{name} must be an integer of at least {least}, not {value!r}")


@dataclass(frozen=True)
class Clipping:
    """How one unit's gradient is bounded (SPECIFICATION.md 2.1 and 4.2).

    Attributes:
        kind: a key of `CLIPPINGS`.
        stability: the constant gamma of AUTO-S and r of PSAC.
    """

    kind: str = "flat"
    stability: float = 0.01

    def __post_init__(self) -> None:
        _one_of("clipping kind", self.kind, CLIPPINGS)
        _within("clipping stability", self.stability, 0, math.inf)


@dataclass(frozen=True)
class Allocation:
    """How noise is shared over the groups at a pinned joint noise multiplier (SPECIFICATION.md 2.2 to 2.6).

    Attributes:
        rule: a key of `ALLOCATIONS`.
        weights: a key of `WEIGHTS`: how important a group is.
        ema: memory of the released energies, in [0, 1).
        floor: smallest over largest weight, in (0, 1].
    """

    rule: str = "uniform"
    weights: str = "static"
    ema: float = 0.8
    floor: float = 1e-3

    def __post_init__(self) -> None:
        _one_of("allocation rule", self.rule, ALLOCATIONS)
        _one_of("allocation weights", self.weights, WEIGHTS, "only functions of released gradients are free")
        if not 0 <= self.ema < 1:
            raise PlanError(f"allocation ema must lie in [0, 1), not {self.ema}")
        if not 0 < self.floor <= 1:
            raise PlanError(f"allocation floor must lie in (0, 1], not {self.floor}")

    @property
    def row(self) -> AllocationRule:
        """The rule's row of `ALLOCATIONS`."""
        return ALLOCATIONS[self.rule]


@dataclass(frozen=True)
class QuantileTracking:
    """Private tracking of a quantile of the gradient norms as clip norm (SPECIFICATION.md 4.1).

    Its bits join the same release: they take `share` of the precision, and the gradients get the multiplier
    sigma / sqrt(1 - share), so that the joint multiplier stays the plan's.

    Attributes:
        quantile: target fraction of unclipped norms, gamma, in (0, 1).
        learning_rate: step eta of the tracker in log scale.
        share: share phi of each step's precision, in (0, 1).
        minimum: smallest clip norm; public.
        maximum: largest clip norm; public.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    share: float = 0.01
    minimum: float = 1e-4
    maximum: float = 1e2

    def __post_init__(self) -> None:
        _within("quantile", self.quantile, 0, 1)
        _within("quantile learning_rate", self.learning_rate, 0, math.inf)
        if not 0 < self.share < 1:
            raise PlanError(f"quantile share must lie in (0, 1), not {self.share}: the gradients need the rest")
        _within("quantile minimum", self.minimum, 0, math.inf)
        _within("quantile maximum", self.maximum, self.minimum, math.inf)


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything that decides the privacy of one training run.

    Neighbouring data sets differ in one unit whose gradient is replaced by zero (zero-out adjacency), so that
    `num_units`, the sample rate, `steps` and `expected_batch_size` are the same public constants for
    both (SPECIFICATION.md 1.1). The guarantee is for the whole transcript of releases.

    Attributes:
        num_units: N, the public number of sampled units: examples, or users for `user_uls`.
        expected_batch_size: L = q N, the public divisor of the noised sum.
        steps: number of releases T; with 0 nothing is released and epsilon is 0.
        delta: fixed before training, at most 1/N; 1/(10 N) or less is the usual choice.
        private: False for the same loop without clip and noise.
        noise_multiplier: sigma where the schedule's factor is 1; 0 if and only if not private.
        max_grad_norm: clip norm C of one unit; infinite if and only if not private.
        unit: one example; one user by sampling examples (ELS); one user by sampling users (ULS).
        examples_per_user: ELS: the cap k per user; ULS: rows G of a sampled user that take part; else None.
        sampling: only `poisson`.
        clipping: how a unit's gradient is bounded.
        grouping: what one parameter group is.
        allocation: how noise is shared over the groups.
        quantile: tracking of clip norms, or None.
        schedule: public schedule of the noise multiplier.
        one_shot: releases paid beside the steps, such as a private subspace.
        noise_mode: `secure`, or `reproducible` (accounted, not realised, for whoever knows the seed).
        rows_per_record: unit example: rows that one record becomes before training (SPECIFICATION.md 1.8); each is
            sampled and clipped on its own.
        size_declared: num_units was stated without counting; the data may have another number of units.
    """

    num_units: int
    expected_batch_size: float
    steps: int
    delta: float
    private: bool = True
    noise_multiplier: float
    max_grad_norm: float
    unit: str = "example"
    examples_per_user: int | None = None
    sampling: str = "poisson"
    clipping: Clipping = field(default_factory=Clipping)
    grouping: str = "all"
    allocation: Allocation = field(default_factory=Allocation)
    quantile: QuantileTracking | None = None
    schedule: Schedule = field(default_factory=Schedule)
    one_shot: tuple[Event, ...] = ()
    noise_mode: NoiseMode = "secure"
    rows_per_record: int = 1
    size_declared: bool = False

    def __post_init__(self) -> None:
        _at_least("num_units", self.num_units, 1)
        _at_least("steps", self.steps, 0)
        _one_of("unit", self.unit, UNITS)
        _one_of("grouping", self.grouping, GROUPINGS)
        _one_of("noise_mode", self.noise_mode, get_args(NoiseMode))
        if self.sampling != "poisson":
            raise PlanError(
                f"sampling must be 'poisson', not {self.sampling!r}: shuffled or truncated batches do not"
                " enjoy this epsilon (arXiv:2403.17673)"
            )
        if not 0 < self.expected_batch_size <= self.num_units:
            raise PlanError(
                f"expected_batch_size must lie in (0, num_units = {self.num_units}], not {self.expected_batch_size}"
            )
        if not 0 < self.delta <= 1 / self.num_units:
            raise PlanError(
                f"delta must lie in (0, 1/num_units = {1 / self.num_units:.3g}], not {self.delta};"
                " 1/(10 num_units) or less is usual"
            )
        if self.unit == "example" and self.examples_per_user is not None:
            raise PlanError("examples_per_user needs a user-level unit: set unit to user_els or user_uls")
        _at_least("rows_per_record", self.rows_per_record, 1)
        if self.unit != "example":
            if self.rows_per_record != 1:
                raise PlanError("rows_per_record is for unit example: examples_per_user bounds the rows of a user")
            if self.examples_per_user is None:
                raise PlanError(f"unit {self.unit} needs examples_per_user, the public cap of rows of one user")
            _at_least("examples_per_user", self.examples_per_user, 1)
        if self.private:
            self._check_private()
        elif self.noise_multiplier != 0 or self.max_grad_norm != math.inf or self.quantile or self.one_shot:
            raise PlanError("a non-private plan has no noise, clip, quantile or one-shot release: use non_private")

    def _check_private(self) -> None:
        if self.delta < accounting.SMALLEST_DELTA:
            raise PlanError(f"delta must be at least {accounting.SMALLEST_DELTA}, what the accountant resolves")
        smallest, largest = accounting.SMALLEST_NOISE_MULTIPLIER, accounting.LARGEST_NOISE_MULTIPLIER
        if not smallest <= self.noise_multiplier <= largest:
            raise PlanError(
                f"noise_multiplier must lie in [{smallest:g}, {largest:g}], not {self.noise_multiplier};"
                " for a run without protection use privacy=none"
            )
        _within("max_grad_norm", self.max_grad_norm, 0, math.inf)
        if self.one_shot and self.unit == "user_uls":
            raise PlanError("one_shot releases bound records, not users: use unit example or user_els with them")
        if any(event.group_size != self._group_size for event in self.one_shot):
            raise PlanError(f"each one_shot event must count {self._group_size} records of a unit: set its group_size")
        if CLIPPINGS[self.clipping.kind].uniform_only and self.allocation.rule != "uniform":
            raise PlanError(
                f"{self.clipping.kind} clipping fits uniform noise only;"
                f" with allocation {self.allocation.rule} use scaled_flat clipping"
            )
        if self.allocation.row.solves_thresholds and self.quantile is None:
            raise PlanError(f"allocation {self.allocation.rule} needs released norms: set quantile tracking")

    @classmethod
    def non_private(cls, **fields: Any) -> PrivacyPlan:
        """Build the plan of the same loop with infinite clip and no noise; it has no epsilon.

        Args:
            **fields: fields of the plan; at least `num_units`, `expected_batch_size` and `steps`.
        """
        defaults = {"delta": 0.1 / max(fields["num_units"], 1), "noise_mode": "reproducible"}
        return cls(**(defaults | fields), private=False, noise_multiplier=0.0, max_grad_norm=math.inf)

    @property
    def sample_rate(self) -> float:
        """Inclusion probability q of each unit, L / N."""
        return self.expected_batch_size / self.num_units

    @property
    def _group_size(self) -> int:
        """Rows of one unit that each release may see: k for ELS, those of a record for examples, else 1."""
        return (self.examples_per_user or 1) if self.unit == "user_els" else self.rows_per_record

    def noise_multipliers(self) -> NDArray[np.float64]:
        """Joint noise multiplier of each step, shape (steps,)."""
        return self.noise_multiplier * self.schedule.factors(self.steps)

    def events(self, steps: int | None = None) -> tuple[Event, ...]:
        """What the first `steps` steps (all by default) and the one-shot releases are to an accountant.

        Empty for a non-private plan, which no accountant accepts.
        """
        done = self.steps if steps is None else steps
        if not 0 <= done <= self.steps:
            raise PlanError(f"steps must lie in [0, {self.steps}], not {done}")
        if not self.private:
            return ()
        multipliers, counts = np.unique(self.noise_multipliers()[:done], return_counts=True)
        return self.one_shot + tuple(
            Event(float(sigma), self.sample_rate, int(count), self._group_size)
            for sigma, count in zip(multipliers, counts, strict=True)
        )

    def epsilon(self, steps: int | None = None) -> float:
        """Upper bound on epsilon at the plan's delta after `steps` steps, all by default.

        Infinite if the plan is not private.
        """
        if not self.private:
            return math.inf
        events = self.events(steps)
        return accounting.epsilon(events, self.delta) if events else 0.0

    def side_by_side(self) -> dict[str, Reported]:
        """Epsilon of the whole plan by every accountant (SPECIFICATION.md 7); empty without releases."""
        return accounting.side_by_side(events, self.delta) if (events := self.events()) else {}

    def calibrate(self, target_epsilon: float) -> PrivacyPlan:
        """Return the plan with the smallest noise multiplier (1e-4 grid) whose epsilon is at most the target.

        Raises:
            PlanError: if the plan is not private, or no noise multiplier reaches the target.
        """
        if not self.private:
            raise PlanError("a non-private plan has no epsilon to calibrate: set private")

        def events(noise_multiplier: float) -> tuple[Event, ...]:
            return dataclasses.replace(self, noise_multiplier=noise_multiplier).events()

        return dataclasses.replace(self, noise_multiplier=accounting.calibrate(events, target_epsilon, self.delta))

    def sampler(
        self, keys: KeyRing, users: Sequence[Hashable] | None = None, examples: int | None = None
    ) -> PoissonSampler:
        """The Poisson sampler of this plan over a data set.

        Args:
            keys: keys of the run, of the plan's noise mode if private.
            users: user of each row; needed for user-level units.
            examples: number of rows, if users are not given; by default `num_units`.

        Raises:
            PlanError: if the data do not have the units the plan speaks of.
        """
        if self.private and keys.mode != self.noise_mode:
            raise PlanError(f"noise_mode is {self.noise_mode} but the keys are {keys.mode}: make them agree")
        if self.unit == "example":
            rows = len(users) if users is not None else self.num_units if examples is None else examples
            self._check_units("examples", rows)
            return PoissonSampler.over_examples(keys, self.sample_rate, np.arange(rows))
        if users is None or self.examples_per_user is None:
            raise PlanError(f"unit {self.unit} needs the user of every row: pass users or set unit to example")
        if self.unit == "user_els":
            self._check_units("examples", len(users))
            rows_kept = cap_per_user(users, self.examples_per_user, keys)
            return PoissonSampler.over_examples(keys, self.sample_rate, rows_kept)
        sampler = PoissonSampler.over_users(keys, self.sample_rate, users, self.examples_per_user)
        self._check_units("users", len(sampler.rows))
        return sampler

    def _check_units(self, what: str, found: int) -> None:
        if found != self.num_units and not self.size_declared:
            raise PlanError(f"the plan is for {self.num_units} {what}, the data have {found}: set num_units to match")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` inverts it."""
        values = dataclasses.asdict(self)
        values["max_grad_norm"] = self.max_grad_norm if self.private else "inf"
        values["one_shot"] = list(values["one_shot"])
        for name in ("rows_per_record", "size_declared"):
            if values[name] == getattr(type(self), name):
                del values[name]  # Plans from before it keep their fingerprints, and so their noise.
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyPlan:
        """Rebuild a plan from `to_dict`.

        Raises:
            PlanError: if a key is unknown or missing.
        """
        parts: dict[str, Any] = dict(values)
        try:
            parts["max_grad_norm"] = float(parts["max_grad_norm"])
            parts["clipping"] = Clipping(**parts["clipping"])
            parts["allocation"] = Allocation(**parts["allocation"])
            parts["schedule"] = Schedule(**parts["schedule"])
            parts["quantile"] = QuantileTracking(**parts["quantile"]) if parts["quantile"] else None
            parts["one_shot"] = tuple(Event(**event) for event in parts["one_shot"])
            return cls(**parts)
        except (KeyError, TypeError) as error:
            raise PlanError(f"not a privacy plan: {error}") from error

    def fingerprint(self) -> str:
        """32 hex digits that name the plan; equal plans have equal fingerprints."""
        text = json.dumps(_floats(self.to_dict()), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]
