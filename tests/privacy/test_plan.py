"""The plan: what it derives, and what it refuses to be."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from dptune.privacy import accounting
from dptune.privacy.accounting import Event
from dptune.privacy.plan import (
    Allocation,
    Clipping,
    PlanError,
    PrivacyPlan,
    QuantileTracking,
    Schedule,
)
from dptune.privacy.rules import SCHEDULES
from dptune.privacy.streams import KeyRing

KEYS = KeyRing.reproducible(0, "run")


def plan(**changes: Any) -> PrivacyPlan:
    fields = {
        "num_units": 4000,
        "expected_batch_size": 256,
        "steps": 50,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "noise_mode": "reproducible",
    }
    return PrivacyPlan(**(fields | changes))


def users_of(count: int, rows: int) -> list[str]:
    return [f"u{row % count}" for row in range(rows)]


def test_events_follow_from_the_plan() -> None:
    assert plan().sample_rate == 0.064
    assert plan().events() == (Event(1.0, 0.064, 50),)
    assert plan().events(20) == (Event(1.0, 0.064, 20),)
    assert plan(unit="user_els", examples_per_user=3).events() == (Event(1.0, 0.064, 50, 3),)
    assert plan(unit="user_uls", examples_per_user=3).events() == (Event(1.0, 0.064, 50),)
    paid = Event(10.0, 1.0)
    assert plan(one_shot=(paid,)).events(0) == (paid,)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_a_plan_without_steps_releases_nothing(kind: str) -> None:
    built = plan(steps=0, schedule=Schedule(kind, 0.5))
    assert built.events() == () and built.epsilon() == 0.0 and built.side_by_side() == {}
    assert built.noise_multipliers().shape == (0,)


def test_epsilon_is_the_reference_and_grows_with_steps() -> None:
    built = plan()
    spent = [built.epsilon(steps) for steps in (0, 10, 25, 50)]
    assert spent[0] == 0 and spent == sorted(spent) and spent[-1] == built.epsilon()
    assert built.epsilon() == accounting.epsilon(built.events(), 1e-5)
    assert built.side_by_side()["pld"].value == built.epsilon()
    with pytest.raises(PlanError, match="steps"):
        built.epsilon(51)


def test_calibrate_returns_a_plan_that_keeps_the_target() -> None:
    built = plan(schedule=Schedule("step", 0.5, 4)).calibrate(3.0)
    assert 2.99 < built.epsilon() <= 3.0
    assert dataclasses.replace(built, noise_multiplier=1.0) == plan(schedule=Schedule("step", 0.5, 4))


def test_unreachable_target_is_a_plan_error() -> None:
    with pytest.raises(PlanError, match="cannot be reached"):
        plan(one_shot=(Event(0.5, 1.0),)).calibrate(1.0)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_executed_in_blocks_that_the_events_count(kind: Any) -> None:
    built = plan(schedule=Schedule(kind, 0.9), steps=47)
    noise = built.noise_multipliers()
    assert noise.shape == (47,) and np.all(noise > 0)
    assert np.unique(noise).size <= 20
    assert sum(event.count for event in built.events()) == 47
    for event in built.events():
        assert np.count_nonzero(noise == event.noise_multiplier) == event.count


@pytest.mark.parametrize("kind", ["linear", "cosine", "step", "exponential"])
def test_schedules_go_from_one_to_their_ratio(kind: Any) -> None:
    shape = Schedule(kind, 0.5).shape(100)
    assert shape[0] == 1 and shape[-1] == pytest.approx(0.5)
    assert np.all(np.diff(shape) <= 0)
    assert Schedule(kind, 0.5).factors(1) == pytest.approx([1.0])


def test_quantile_bits_are_paid_inside_the_pinned_multiplier() -> None:
    built = plan(clipping=Clipping("group"), quantile=QuantileTracking(share=0.36))
    assert built.events() == plan().events()


def test_non_private_plan_is_the_same_loop_without_clip_and_noise() -> None:
    built = PrivacyPlan.non_private(num_units=4000, expected_batch_size=256, steps=50)
    assert not built.private and built.max_grad_norm == math.inf
    assert not built.noise_multipliers().any()
    assert built.events() == () and built.epsilon() == math.inf and built.side_by_side() == {}
    assert np.array_equal(built.sampler(KEYS).batch(3).indices, plan().sampler(KEYS).batch(3).indices)
    with pytest.raises(PlanError, match="no epsilon"):
        built.calibrate(1.0)


PLANS = [
    plan(),
    PrivacyPlan.non_private(num_units=10, expected_batch_size=2.5, steps=3),
    plan(
        unit="user_els",
        examples_per_user=4,
        clipping=Clipping("group"),
        grouping="matrix",
        allocation=Allocation("joint", "adam", 0.9, 0.01),
        quantile=QuantileTracking(),
        schedule=Schedule("cosine", 0.4, 10),
        one_shot=(Event(10.0, 1.0, 1, 4),),
        noise_mode="secure",
    ),
]


@pytest.mark.parametrize("built", PLANS)
def test_round_trip_through_json(built: PrivacyPlan) -> None:
    again = PrivacyPlan.from_dict(json.loads(json.dumps(built.to_dict(), allow_nan=False)))
    assert again == built and hash(again) == hash(built)
    assert again.fingerprint() == built.fingerprint()


def test_fingerprints_tell_plans_apart() -> None:
    variants = [*PLANS, plan(steps=51), plan(schedule=Schedule("linear")), plan(clipping=Clipping("auto_s"))]
    assert len({built.fingerprint() for built in variants}) == len(variants)


def test_equal_plans_have_equal_fingerprints() -> None:
    assert plan(expected_batch_size=256) == plan(expected_batch_size=256.0)
    assert plan(expected_batch_size=256).fingerprint() == plan(expected_batch_size=256.0).fingerprint()


def test_planning_needs_neither_torch_nor_the_accounting_libraries() -> None:
    modules = ("plan", "accounting", "sampling", "streams", "selection", "allocation")
    code = "import sys;" + "".join(f"import dptune.privacy.{module};" for module in modules)
    code += "assert not {'torch', 'dp_accounting', 'prv_accountant'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_and_missing_keys_are_refused() -> None:
    values = plan().to_dict()
    for wrong in (values | {"epsilom": 3}, {k: v for k, v in values.items() if k != "steps"}, {}):
        with pytest.raises(PlanError, match="not a privacy plan"):
            PrivacyPlan.from_dict(wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": "shuffle"}, "shuffled"),
        ({"num_units": 0}, "num_units"),
        ({"num_units": 4000.0}, "num_units"),
        ({"steps": -1}, "steps"),
        ({"steps": True}, "steps"),
        ({"expected_batch_size": 4001}, "expected_batch_size"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"expected_batch_size": math.nan}, "expected_batch_size"),
        ({"delta": 1e-3}, "delta"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1e-13}, "accountant resolves"),
        ({"delta": math.nan}, "delta"),
        ({"noise_multiplier": 0.0}, "privacy=none"),
        ({"noise_multiplier": 0.01}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"private": False}, "non_private"),
        ({"unit": "document"}, "unit"),
        ({"unit": "user_els"}, "examples_per_user"),
        ({"unit": "user_uls", "examples_per_user": 0}, "examples_per_user"),
        ({"examples_per_user": 3}, "user-level"),
        ({"grouping": "tensor"}, "grouping"),
        ({"noise_mode": "fast"}, "noise_mode"),
        ({"allocation": Allocation("min_energy")}, "scaled_flat"),
        ({"allocation": Allocation("joint"), "clipping": Clipping("group")}, "quantile"),
    ],
)
def test_plans_that_could_not_be_true_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as raised:
        plan(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("part", "arguments", "message"),
    [
        (Clipping, {"kind": "median"}, "clipping kind"),
        (Clipping, {"stability": 0.0}, "stability"),
        (Allocation, {"rule": "best"}, "allocation rule"),
        (Allocation, {"weights": "raw_gradients"}, "released"),
        (Allocation, {"ema": 1.0}, "ema"),
        (Allocation, {"floor": 0.0}, "floor"),
        (QuantileTracking, {"share": 1.0}, "share"),
        (QuantileTracking, {"share": 0.0}, "share"),
        (QuantileTracking, {"quantile": 1.0}, "quantile"),
        (QuantileTracking, {"minimum": 2.0, "maximum": 1.0}, "maximum"),
        (QuantileTracking, {"learning_rate": math.inf}, "learning_rate"),
        (Schedule, {"kind": "adaptive"}, "is not a public schedule"),
        (Schedule, {"kind": "linear", "ratio": 0.0}, "ratio"),
        (Schedule, {"kind": "linear", "blocks": 0}, "blocks"),
    ],
)
def test_parts_that_could_not_be_true_are_refused(part: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        part(**arguments)


def test_non_private_plan_takes_no_quantile() -> None:
    with pytest.raises(PlanError, match="non-private"):
        PrivacyPlan.non_private(num_units=10, expected_batch_size=2, steps=1, quantile=QuantileTracking())


def test_sampler_of_each_unit() -> None:
    rows = users_of(1000, 4000)
    assert plan().sampler(KEYS, users=rows).sample_rate == 0.064
    els = plan(unit="user_els", examples_per_user=3).sampler(KEYS, users=rows)
    assert len(els.rows) == 3000
    uls = plan(unit="user_uls", examples_per_user=3, num_units=1000).sampler(KEYS, users=rows)
    assert len(uls.rows) == 1000


@pytest.mark.parametrize(
    ("changes", "users", "message"),
    [
        ({}, users_of(10, 3999), "4000 examples"),
        ({"unit": "user_els", "examples_per_user": 3}, None, "user of every row"),
        ({"unit": "user_els", "examples_per_user": 3}, [None] * 4000, "no user"),
        ({"unit": "user_uls", "examples_per_user": 3}, users_of(1000, 4000), "the data have 1000"),
        ({"noise_mode": "secure"}, None, "noise_mode"),
    ],
)
def test_data_without_the_plans_units_are_refused(
    changes: dict[str, Any], users: list[str] | None, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**changes).sampler(KEYS, users=users)


def test_the_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan().steps = 3  # type: ignore[misc]


def test_one_shot_releases_count_the_same_unit_as_the_steps() -> None:
    with pytest.raises(PlanError, match="count 4 records of a unit"):
        plan(unit="user_els", examples_per_user=4, one_shot=(Event(10.0, 1.0),))
    with pytest.raises(PlanError, match="bound records, not users"):
        plan(unit="user_uls", examples_per_user=4, one_shot=(Event(10.0, 1.0),))
