"""Coordinates in which a run clips and noises: what the config names, and what may learn from releases."""

import dataclasses

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from numerics import assert_close_to_largest, differs
from omegaconf import DictConfig, OmegaConf

from dptune.config.checks import strict
from dptune.config.schema import Config, ConfigError
from dptune.data.batches import InputFormat, Ladder
from dptune.data.encoding import Encoded
from dptune.privacy.allocation import Group
from dptune.privacy.events import Event
from dptune.privacy.mechanism import Mechanism
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose
from dptune.privacy.subspace import gradient_carriers
from dptune.sweeps.expand import ROOT, without_hydra
from dptune.training.projection import (
    FixedSubspace,
    FullSpace,
    HistorySubspace,
    MovingSubspace,
    ReparametrizedGradients,
    ScaledSpace,
    make_projection,
    scales_of,
)

pytestmark = pytest.mark.numerical

KEYS = KeyRing.reproducible(0, "public")
SHAPES = {"w": (10, 6), "b": (10,), "v": (6, 8)}
GROUPS = (Group("first", ("w", "b"), 70, (SHAPES["w"], SHAPES["b"])), Group("second", ("v",), 48, (SHAPES["v"],)))
PLAN = PrivacyPlan(
    num_units=100,
    expected_batch_size=10,
    steps=60,
    delta=1e-3,
    noise_multiplier=0.8,
    max_grad_norm=2.0,
    noise_mode="reproducible",
)


def gradients(seed: int, *rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*rows, *shape, generator=generator) for name, shape in SHAPES.items()}


def carriers(projection: ReparametrizedGradients) -> list[torch.Tensor]:
    return [half for pair in projection.subspace.pairs.values() for half in pair]


def same(one: ReparametrizedGradients, other: ReparametrizedGradients) -> bool:
    return all(map(torch.equal, carriers(one), carriers(other)))


@pytest.mark.parametrize(
    ("name", "kind", "seen"),
    [
        ("none", FullSpace, []),
        ("random", MovingSubspace, []),
        ("history", HistorySubspace, []),
        ("rgp", ReparametrizedGradients, []),
        ("public", FixedSubspace, list(range(100, 108))),
        ("scale", ScaledSpace, list(range(100, 120))),
        ("private", FixedSubspace, list(range(1, 8))),
    ],
)
def test_each_projection_sees_the_data_that_it_may(name: str, kind: type, seen: list[int]) -> None:
    config = Config()
    config.privacy.projection, config.privacy.projection_dimension = name, 2
    tokens = []

    def engine(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        first = batch["input_ids"][:, 0].tolist()
        tokens.extend(token for token in first if token)  # the others fill the batch up
        return torch.zeros(len(first)), gradients(sum(first), len(first))

    projection = make_projection(
        config,
        GROUPS,
        plan=dataclasses.replace(PLAN, one_shot=(Event(2.0, 1.0),) if name == "private" else ()),
        keys=KEYS,
        engine=engine,
        private_rows=[Encoded((row, 1, 2), 1) for row in range(1, 8)],
        public_rows=lambda: [Encoded((row, 1, 2), 1) for row in range(100, 120)],
        ladder=Ladder(96, 3, InputFormat(pad=0)),
    )
    assert type(projection) is kind
    assert sorted(tokens) == seen
    batch = gradients(1, 5)
    coordinates = projection.project(batch)
    reduced = {
        name: shape for group in projection.groups for name, shape in zip(group.parameters, group.shapes, strict=True)
    }
    assert {name: tuple(value.shape) for name, value in coordinates.items()} == {
        name: (5, *shape) for name, shape in reduced.items()
    }
    assert [group.name for group in projection.groups] == ["first", "second"]
    lifted = projection.lift({name: value[0].float() for name, value in coordinates.items()})
    assert {name: tuple(value.shape) for name, value in lifted.items()} == SHAPES


def test_scales_even_gradients_out_and_leave_their_length() -> None:
    """What is usually small is as long as the rest before it is clipped; an idle coordinate is not blown up."""
    rows = gradients(3, 4000)
    rows["w"] = rows["w"] * 100
    rows["v"] = rows["v"] * 0
    moments = {name: value.double().square().mean(dim=0) for name, value in rows.items()}
    space = ScaledSpace(GROUPS, scales_of(moments))
    scaled = space.project(rows)

    def square(some: dict[str, torch.Tensor]) -> float:
        return sum(float(value.double().square().sum()) for value in some.values()) / 4000

    assert square(dict(scaled)) == pytest.approx(square(rows), rel=1e-4)
    spread = [float(scaled[name].square().mean().sqrt()) for name in ("w", "b")]
    # A tenth of the root of the mean square, 71, is the smallest scale: 100 to 1 becomes 7 to 1, and 0 stays there.
    assert spread[0] / spread[1] == pytest.approx(7.2, rel=0.05)
    assert float(space.scales["w"].mean() / space.scales["v"].mean()) == pytest.approx(100 / 7.1, rel=0.05)
    for name, value in space.lift(scaled).items():
        assert_close_to_largest(value, rows[name])
    other = ScaledSpace(GROUPS, {name: torch.ones(shape) for name, shape in SHAPES.items()})
    other.load_state_dict(space.state_dict())
    assert all(torch.equal(other.scales[name], value) for name, value in space.scales.items())


def test_carriers_come_from_the_sum_of_releases_at_each_refresh() -> None:
    projection = ReparametrizedGradients(GROUPS, 2, 3, KEYS)
    start, total = carriers(projection), {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for step in range(7):
        released = gradients(step)
        total = {name: value + released[name] for name, value in total.items()}
        projection.after_step(step, released)
        if step == 2:
            expected = gradient_carriers(GROUPS, 2, KEYS.stream(Purpose.PROJECTION, step=3), total)
            for (left, right), pair in zip(expected.pairs.values(), projection.subspace.pairs.values(), strict=True):
                for found, carrier in zip(pair, (left, right), strict=True):
                    assert_close_to_largest(found, carrier)
            third = carriers(projection)
        elif step < 2:
            assert all(map(torch.equal, carriers(projection), start))
        elif step < 5:
            assert all(map(torch.equal, carriers(projection), third))
    assert differs(carriers(projection)[0], third[0])


def test_carriers_depend_on_releases_alone() -> None:
    """Other private gradients and the same releases: the same carriers. One other release: others."""
    one, other = ReparametrizedGradients(GROUPS, 1, 1, KEYS), ReparametrizedGradients(GROUPS, 1, 1, KEYS)
    assert same(one, other)
    for step in range(4):
        coordinates = one.project(gradients(50 + step, 5))
        assert differs(coordinates["w left"], other.project(gradients(90 + step, 5))["w left"])
        for projection in (one, other):
            projection.after_step(step, gradients(step))
        assert same(one, other)
    one.after_step(4, gradients(4))
    other.after_step(4, gradients(5))
    assert not same(one, other)


def test_carriers_find_a_target_outside_the_first_ones() -> None:
    """Descent to a matrix of rank 1: moving carriers turn to it, fixed ones stay away from it."""
    target = gradients(7)
    target["w"] = torch.outer(target["w"][:, 0], target["w"][0])
    left_over = {}
    for refresh in (1, 1000):
        projection = ReparametrizedGradients(GROUPS, 1, refresh, KEYS)
        mechanism = Mechanism(
            PrivacyPlan.non_private(num_units=1, expected_batch_size=1, steps=60), projection.groups, KEYS
        )
        weights = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for step in range(60):
            mechanism.accumulate(projection.project({n: (weights[n] - target[n]).unsqueeze(0) for n in SHAPES}))
            released = projection.lift(mechanism.release(step).gradients)
            weights = {name: value - 0.5 * released[name] for name, value in weights.items()}
            projection.after_step(step, released)
        left_over[refresh] = float((weights["w"] - target["w"]).norm() / target["w"].norm())
    assert left_over[1] < 0.05 < 0.3 < left_over[1000]


def test_noise_is_in_the_coordinates_and_as_planned() -> None:
    """Empty batches: every coordinate of the mechanism has the planned noise, whichever carriers are in place."""
    projection = ReparametrizedGradients(GROUPS, 2, 1, KEYS)
    secret = KeyRing.reproducible(1, "run")
    mechanism = Mechanism(PLAN, projection.groups, secret)
    assert [group.dimension for group in mechanism.groups] == [20 + 12 + 10, 12 + 16]
    noise = []
    for step in range(60):
        release = mechanism.release(step)
        assert release.noise_std == pytest.approx({"first": 0.16, "second": 0.16})
        assert release.effective_noise_multiplier == pytest.approx(0.8)
        noise.append(np.concatenate([value.numpy().ravel() for value in release.gradients.values()]))
        projection.after_step(step, projection.lift(release.gradients))
    everything = np.stack(noise)  # 60 releases of 70 coordinates
    assert everything.shape == (60, 70)
    assert everything.std() == pytest.approx(0.16, rel=0.04)
    assert everything.std(axis=0) == pytest.approx(0.16, rel=0.45)


def composed(privacy: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return without_hydra(compose("config", [f"privacy={privacy}"]))


@pytest.mark.parametrize("setting", [{"optimizer": "dp_adam_bc"}, {"shrinkage": "james_stein"}])
def test_what_needs_even_noise_is_refused_with_carriers(setting: dict[str, str]) -> None:
    tree = composed("ew_tune")
    assert strict(tree).privacy.projection == "rgp"
    tree.environment = OmegaConf.merge(tree.environment, setting)
    with pytest.raises(ConfigError, match="privacy.projection=rgp spreads noise unevenly"):
        strict(tree)


def test_the_subspace_of_dp_sft_cannot_be_had_for_free() -> None:
    tree = composed("dp_sft")
    assert strict(tree).privacy.projection_noise_multiplier
    tree.privacy.projection_noise_multiplier = None
    with pytest.raises(ConfigError, match="paid for with privacy.projection_noise_multiplier"):
        strict(tree)
