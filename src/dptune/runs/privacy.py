"""From a config to the privacy plan of a run, and from a plan to what it guarantees. No torch here."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dptune.config.schema import Config, ConfigError, noise_mode
from dptune.data.sources import Dataset
from dptune.data.stability import declared_units, stability_of
from dptune.privacy.accounting import calibrate
from dptune.privacy.accounting import epsilon as accountant
from dptune.privacy.events import Event
from dptune.privacy.guarantee import epsilon_text
from dptune.privacy.plan import Allocation, Clipping, PlanError, PrivacyPlan, QuantileTracking, Schedule
from dptune.privacy.selection import score_event
from dptune.privacy.spent import events_before
from dptune.records.record import GroupPrivacy, Privacy, RunRecord


def make_plan(config: Config, data: Dataset) -> PrivacyPlan:
    """The privacy plan of a run, calibrated to its target epsilon.

    Raises:
        ConfigError: when no plan with these settings can be true, or the target cannot be reached.
    """
    # Any: the values are names that the config has checked and the plan checks again.
    privacy: Any = config.privacy
    hyper, mode = config.hyperparameter, noise_mode(config)
    users = {example.user for example in data.train}
    if privacy.unit != "example" and None in users:
        raise ConfigError(
            f"privacy.unit={privacy.unit} needs the author of every training record; "
            "map it with data.columns.user or set privacy.unit=example"
        )
    counted = len(users) if privacy.unit == "user_uls" else len(data.train)
    stability, declared = stability_of(config, data.seen.layout), declared_units(config)
    num_units = counted if declared is None else declared
    rows = stability.rows if privacy.unit == "example" else 1
    try:
        if not privacy.enabled:
            return PrivacyPlan.non_private(
                num_units=num_units,
                expected_batch_size=hyper.expected_batch_size,
                steps=hyper.steps,
                size_declared=declared is not None,
            )
        plan = PrivacyPlan(
            num_units=num_units,
            expected_batch_size=hyper.expected_batch_size,
            steps=hyper.steps,
            delta=privacy.delta,
            noise_multiplier=privacy.noise_multiplier or 1.0,
            max_grad_norm=hyper.max_grad_norm,
            unit=privacy.unit,
            examples_per_user=privacy.examples_per_user,
            clipping=Clipping(kind=privacy.clipping, stability=privacy.clipping_stability),
            grouping=privacy.grouping,
            allocation=Allocation(
                rule=privacy.allocation,
                weights=privacy.allocation_weights,
                ema=privacy.allocation_ema,
                floor=privacy.allocation_floor,
            ),
            quantile=None
            if privacy.quantile is None
            else QuantileTracking(
                quantile=privacy.quantile,
                learning_rate=privacy.quantile_learning_rate,
                share=privacy.quantile_share,
            ),
            schedule=Schedule(kind=privacy.schedule, ratio=privacy.schedule_ratio),
            one_shot=()
            if privacy.projection != "private"
            else (Event(privacy.projection_noise_multiplier, 1.0, 1, privacy.examples_per_user or rows),),
            noise_mode=mode,
            rows_per_record=rows,
            size_declared=declared is not None,
        )
        if privacy.target_epsilon is not None and plan.events():
            plan = calibrated(plan, privacy.target_epsilon)
        if privacy.score_noise_multiplier is not None:
            check_score(privacy.score_noise_multiplier, privacy.target_epsilon, plan, len(data.validation))
        return plan
    except PlanError as error:
        raise ConfigError(str(error)) from None


def check_score(noise_multiplier: float, target_epsilon: float | None, plan: PrivacyPlan, records: int) -> None:
    """Raises ConfigError when the score on so many validation records would cost more than the run may."""
    field = f"privacy.score_noise_multiplier={noise_multiplier:g}"
    if not records:
        raise ConfigError(f"{field} needs validation records, there are none; see data.validation_size and data.splits")
    if plan.delta > 1 / records:
        raise ConfigError(f"{field}: privacy.delta={plan.delta:g} is above one over the {records} validation records")
    limit = target_epsilon or plan.epsilon()
    if limit and (own := score_epsilon(noise_multiplier, plan.delta)) > limit:
        least = calibrate(lambda sigma: [score_event(sigma)], limit, plan.delta)
        raise ConfigError(
            f"{field} alone costs epsilon {epsilon_text(own)}, more than the {limit:g} of the run; "
            f"take at least {least:g}, or leave the score out"
        )


@functools.lru_cache(maxsize=64)
def score_epsilon(noise_multiplier: float, delta: float) -> float:
    """Epsilon of the score alone."""
    return accountant([score_event(noise_multiplier)], delta)


@functools.lru_cache(maxsize=256)
def calibrated(plan: PrivacyPlan, target_epsilon: float) -> PrivacyPlan:
    """The plan with the least noise that keeps the target; the runs of a sweep share the search."""
    with said_if_slow(f"calibrating the noise of {plan.steps:,} steps to epsilon {target_epsilon:g}"):
        return plan.calibrate(target_epsilon)


PATIENCE = 10.0
"""Seconds that accounting may take in silence."""


@contextmanager
def said_if_slow(what: str) -> Iterator[None]:
    """Say on standard error what is being computed, should it take longer than `PATIENCE`. What is said is public."""

    def say() -> None:
        print(f"dptune: {what}; this may take some minutes", file=sys.stderr, flush=True)

    timer = threading.Timer(PATIENCE, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def privacy_of(
    plan: PrivacyPlan, config: Config, data: Dataset, steps: int, groups: dict[str, GroupPrivacy] | None = None
) -> Privacy:
    """How a run was trained privately, after some steps."""
    if not plan.private:
        return Privacy(
            private=False,
            steps=steps,
            stand_in=data.public,
            not_covered=not_covered(config, data),
            plan=plan.to_dict(),
        )
    return Privacy(
        private=True,
        unit=plan.unit,
        target_epsilon=config.privacy.target_epsilon,
        delta=plan.delta,
        noise_multiplier=plan.noise_multiplier,
        sample_rate=plan.sample_rate,
        steps=steps,
        noise_mode=plan.noise_mode,
        stand_in=data.public,
        not_covered=not_covered(config, data),
        groups=groups or {},
        plan=plan.to_dict(),
    )


def epsilon_marks(plan: PrivacyPlan, rows: Sequence[dict[str, Any]] = ()) -> dict[int, float | None]:
    """Epsilon after about every tenth of the steps, None without privacy: of the plan, and of earlier attempts.

    Args:
        plan: of the run.
        rows: of the ledger once a step was begun.
    """
    return _epsilon_marks(plan, events_before(plan, rows) if plan.private else ())


@functools.lru_cache(maxsize=256)
def _epsilon_marks(plan: PrivacyPlan, before: tuple[Event, ...]) -> dict[int, float | None]:
    marks = np.unique(np.linspace(0, plan.steps, 11)[1:].round().astype(int))
    events = {int(step): (*before, *plan.events(int(step))) for step in marks}
    if not plan.private:
        return dict.fromkeys(events)
    with said_if_slow(f"accounting for every tenth of {plan.steps:,} steps"):
        return {step: accountant(done, plan.delta) if done else 0.0 for step, done in events.items()}


def not_covered(config: Config, data: Dataset) -> list[str]:
    """What the guarantee of a run says nothing about, or nothing to whom; of private data only."""
    if data.public:
        return []
    found = [f"the {len(data.test)} records of the test split: metrics are exact functions of them"]
    if config.privacy.enabled and noise_mode(config) == "reproducible":
        found.append(
            f"anyone who knows the seed ({config.environment.seed}, in this record): none against them, they can take "
            "the noise off"
        )
    return found


def uncovered_test(config: Config, data: Dataset) -> str:
    """What is said before records are judged that no guarantee covers."""
    leave = "are mirrored" if config.tracking.allow_test_metrics else "stay here (tracking.allow_test_metrics=false)"
    return (
        f"test split: no guarantee for its {len(data.test)} records, whose metrics are exact and {leave}; "
        "data.columns.split and data.splits say which records these are"
    )


def spent(record: RunRecord) -> str:
    """What a run guarantees and its target, in a few words."""
    assert record.guarantee is not None and record.privacy is not None
    return record.guarantee.in_brief(record.privacy.target_epsilon)


def describe(plan: PrivacyPlan) -> str:
    """The plan in one line."""
    start = f"{plan.steps} steps of {plan.expected_batch_size:g} of {plan.num_units} expected"
    if not plan.private:
        return f"{start}, non-private"
    return f"{start}, noise multiplier {plan.noise_multiplier:.4f}, delta {plan.delta:g}, {plan.noise_mode} noise"
