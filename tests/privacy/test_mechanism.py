"""The one release of a step, from plan to vector: SPECIFICATION.md 1.3, 2, 4.1, 7.5, 10.4 and 10.5."""

import copy
import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close_to_largest

from dptune.privacy.allocation import AllocationState, Group, PrecisionError, lora_group_weights
from dptune.privacy.clipping import MARGIN, ClippedSum, Sensitivity
from dptune.privacy.mechanism import Mechanism, groups_of
from dptune.privacy.plan import Allocation, Clipping, PrivacyPlan, QuantileTracking, Schedule
from dptune.privacy.streams import KeyRing
from dptune.privacy.units import UNCOUNTED, UnitMeans

pytestmark = pytest.mark.numerical

GROUPS = (
    Group("x", ("x.a", "x.b"), 8, ((2, 3), (2,))),
    Group("y", ("y",), 50, ((5, 10),)),
    Group("z", ("z",), 200),
)
PARAMETERS = {"x.a": (2, 3), "x.b": (2,), "y": (5, 10), "z": (200,)}
KEYS = KeyRing.reproducible(11, "test")
CASES = [
    ("flat", "uniform", "static"),
    ("scaled_flat", "uniform", "static"),
    ("scaled_flat", "min_energy", "released_energy"),
    ("scaled_flat", "min_energy", "adam"),
    ("group", "equal_snr", "released_energy"),
    ("group", "equal_budget", "static"),
    ("auto_s", "min_energy", "static"),
    ("auto_v", "uniform", "static"),
    ("psac", "uniform", "static"),
]


def plan_of(kind="flat", rule="uniform", weights="static", **changes):
    defaults = {
        "num_units": 1000,
        "expected_batch_size": 20.0,
        "steps": 4,
        "delta": 1e-5,
        "noise_multiplier": 0.8,
        "max_grad_norm": 1.5,
        "grouping": "matrix",
        "clipping": Clipping(kind),
        "allocation": Allocation(rule, weights),
        "noise_mode": "reproducible",
    }
    return PrivacyPlan(**(defaults | changes))


def batch_of(rows, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(rows, *shape, generator=generator) for n, shape in PARAMETERS.items()}


def rows_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def flat(gradients):
    return torch.cat([gradients[name].double().flatten() for name in PARAMETERS]).numpy()


def assert_same_up_to_the_grid(found, expected):
    """Sums of another order may end on the next point of the public grid, at most a thousandth of the noise away."""
    assert found.noise_std == pytest.approx(expected.noise_std)
    stds = np.repeat([expected.noise_std[g.name] for g in GROUPS], [g.dimension for g in GROUPS])
    assert (np.abs(flat(found.gradients) - flat(expected.gradients)) / stds).max() <= 2**-10 * 1.01


def run(plan, batches, keys=KEYS, groups=GROUPS):
    mechanism = Mechanism(plan, groups, keys)
    releases = []
    for step, batch in enumerate(batches):
        if batch is not None:
            mechanism.accumulate(batch)
        releases.append(mechanism.release(step))
    return mechanism, releases


# --- what one release is


@pytest.mark.parametrize(("kind", "rule", "weights"), CASES)
@pytest.mark.parametrize("quantile", [None, QuantileTracking(share=0.1)])
def test_one_record_moves_every_release_by_at_most_the_planned_bound(kind, rule, weights, quantile):
    """In each step of an adaptive run, with the noise of the same keys subtracted."""
    plan = plan_of(kind, rule, weights, quantile=quantile, schedule=Schedule("linear", ratio=0.5))
    mechanism, neighbour = Mechanism(plan, GROUPS, KEYS), Mechanism(plan, GROUPS, KEYS)
    for step in range(plan.steps):
        neighbour.load_state_dict(mechanism.state_dict())  # the same history up to here
        batch = batch_of(12, seed=step, scale=10.0 ** (step - 1))
        mechanism.accumulate(batch)
        neighbour.accumulate(rows_of(batch, slice(1, None)))
        one, other = mechanism.release(step), neighbour.release(step)
        sigma = plan.noise_multipliers()[step]
        assert one.effective_noise_multiplier == pytest.approx(sigma, rel=1e-9)
        assert one.noise_std == other.noise_std
        stds = np.repeat([one.noise_std[g.name] for g in GROUPS], [g.dimension for g in GROUPS])
        moved = (flat(one.gradients) - flat(other.gradients)) / stds
        grid = 2.0**-10 * math.sqrt(len(stds))  # rounding of both to the grid and to float32
        left = 1.0 if quantile is None else math.sqrt(1 - quantile.share)
        assert np.linalg.norm(moved) <= MARGIN * left / sigma + grid
        assert np.linalg.norm(moved) >= 0.05 / sigma


def test_the_sum_is_divided_by_the_declared_batch_size():
    """Whatever was sampled, the divisor is L: 5 records of 1/2 in L = 20."""
    plan = plan_of(noise_multiplier=0.1, max_grad_norm=1e3)
    batch = {name: torch.full((5, *shape), 0.5) for name, shape in PARAMETERS.items()}
    gradients = run(plan, [batch])[1][0].gradients
    noise = run(plan, [None])[1][0].gradients
    for name, shape in PARAMETERS.items():
        assert gradients[name].shape == torch.Size(shape)
        assert gradients[name].dtype == torch.float32
        signal = gradients[name] - noise[name]
        # Two releases with noise of 100 in the sum, each on a grid of at most a thousandth of it.
        assert float((signal - MARGIN * 2.5 / 20).abs().max()) <= 100 / 1024 / 20 * 1.01
    everything = flat(gradients) - flat(noise)
    assert everything.mean() == pytest.approx(MARGIN * 2.5 / 20, rel=0.01)


def test_an_empty_batch_is_released_as_noise():
    _, (release,) = run(plan_of(), [None])
    assert {name: tuple(value.shape) for name, value in release.gradients.items()} == PARAMETERS
    assert all(bool((value != 0.0).all()) for value in release.gradients.values())
    assert release.telemetry["NON_PRIVATE/batch_size"] == 0.0


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(CASES))
@settings(max_examples=30)
def test_physical_batches_do_not_matter(cuts, case):
    batch = batch_of(9, scale=0.3)
    whole = run(plan_of(*case), [batch])[1][0]
    mechanism, start = Mechanism(plan_of(*case), GROUPS, KEYS), 0
    for cut in [*cuts, 9]:
        mechanism.accumulate(rows_of(batch, slice(start, start + cut)))
        start = min(9, start + cut)
    parts = mechanism.release(0)
    assert_same_up_to_the_grid(parts, whole)
    assert parts.telemetry == pytest.approx(whole.telemetry)


def test_sums_start_anew_in_each_step():
    batch = batch_of(6)
    _, twice = run(plan_of(), [batch, batch])
    _, once = run(plan_of(), [None, batch])
    assert np.array_equal(flat(twice[1].gradients), flat(once[1].gradients))
    assert twice[1].telemetry["NON_PRIVATE/batch_size"] == 6.0


def test_ranks_share_one_noise():
    """Two ranks with half the batch each release what one process releases."""
    batch, plan = batch_of(8), plan_of("scaled_flat", "min_energy", quantile=QuantileTracking())
    alone, (expected,) = run(plan, [batch])
    ranks = [Mechanism(plan, GROUPS, KEYS) for _ in range(2)]
    ranks[0].accumulate(rows_of(batch, slice(0, 3)))
    ranks[1].accumulate(rows_of(batch, slice(3, 8)))
    parts = []
    for rank in ranks:
        copy.deepcopy(rank).release(0, all_reduce=lambda packed: parts.append(packed.clone()))
    for rank in ranks:
        release = rank.release(0, all_reduce=lambda packed: packed.copy_(parts[0] + parts[1]))
        assert_same_up_to_the_grid(release, expected)
        assert release.telemetry == pytest.approx(expected.telemetry)
        assert rank.state.thresholds == pytest.approx(alone.state.thresholds)


def test_without_privacy_the_same_loop_is_exact():
    plan = PrivacyPlan.non_private(num_units=1000, expected_batch_size=20.0, steps=4, grouping="matrix")
    batch = batch_of(7, scale=100.0)
    mechanism, releases = run(plan, [batch, None])
    for name, value in batch.items():
        assert_close_to_largest(releases[0].gradients[name], value.double().sum(dim=0) / 20)
        assert bool((releases[1].gradients[name] == 0.0).all())
    assert not releases[0].private
    assert releases[0].effective_noise_multiplier == 0.0
    assert set(releases[0].noise_std.values()) == {0.0}
    assert releases[0].telemetry["NON_PRIVATE/clip_fraction"] == 0.0
    assert mechanism.next_step == 2
    assert run(plan_of(), [batch])[1][0].private


def test_telemetry_is_marked():
    batch = batch_of(4, scale=100.0)
    batch["z"][1, 3] = math.nan
    telemetry = run(plan_of(), [batch])[1][0].telemetry
    assert telemetry == {
        "NON_PRIVATE/batch_size": 4.0,
        "NON_PRIVATE/clip_fraction": 0.75,
        "NON_PRIVATE/non_finite": 1.0,
    }


# --- the ledger stands between a bug and a release


@pytest.mark.parametrize("quantile", [None, QuantileTracking(share=0.2, learning_rate=1e-12)])
def test_the_schedule_is_executed_and_checked(quantile):
    plan = plan_of("scaled_flat", "min_energy", quantile=quantile, steps=6, schedule=Schedule("linear", ratio=0.5))
    _, releases = run(plan, [None] * 6)
    assert [r.effective_noise_multiplier for r in releases] == pytest.approx(list(plan.noise_multipliers()))
    first, last = (np.array(list(releases[i].noise_std.values())) for i in (0, -1))
    assert first / last == pytest.approx(plan.noise_multipliers()[0] / plan.noise_multipliers()[-1])


def test_noise_that_does_not_fit_the_bound_is_not_released(monkeypatch):
    """A sum clipped to a larger bound than the noise was made for: what a second, stale C would do."""
    for kind in ("flat", "group", "scaled_flat"):
        mechanism = Mechanism(plan_of(kind), GROUPS, KEYS)
        mechanism.accumulate(batch_of(3))
        honest = mechanism._sum
        bounds = tuple(1.01 * bound for bound in honest.sensitivity.bounds)
        mechanism._sum = dataclasses.replace(honest, sensitivity=Sensitivity(bounds, honest.sensitivity.joint))
        with pytest.raises(PrecisionError):
            mechanism.release(0)
        assert mechanism.next_step == 0


def test_quantile_bits_are_paid_out_of_the_same_multiplier():
    tracker = QuantileTracking(share=0.19)
    with_bits = run(plan_of(quantile=tracker), [None])[1][0]
    without = run(plan_of(), [None])[1][0]
    for name in with_bits.noise_std:
        assert with_bits.noise_std[name] == pytest.approx(without.noise_std[name] / math.sqrt(0.81))
    assert with_bits.effective_noise_multiplier == pytest.approx(0.8, rel=1e-9)


# --- order and input


def test_steps_go_in_order():
    mechanism = Mechanism(plan_of(steps=2), GROUPS, KEYS)
    with pytest.raises(ValueError, match="step 0 is due"):
        mechanism.release(1)
    mechanism.release(0)
    with pytest.raises(ValueError, match="step 1 is due"):
        mechanism.release(0)
    mechanism.release(1)
    with pytest.raises(ValueError, match="all 2 steps"):
        mechanism.accumulate(batch_of(2))
    with pytest.raises(ValueError, match="all 2 steps"):
        mechanism.release(2)


def test_a_dropped_or_unknown_parameter_is_refused():
    mechanism, batch = Mechanism(plan_of(), GROUPS, KEYS), batch_of(3)
    with pytest.raises(ValueError, match="no per-example gradients of y"):
        mechanism.accumulate({name: value for name, value in batch.items() if name != "y"})
    with pytest.raises(ValueError, match="head is in no group"):
        mechanism.accumulate({**batch, "head": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="gradients of z have shape"):
        mechanism.accumulate({**batch, "z": torch.zeros(4, 200)})
    assert set(mechanism.release(0).gradients) == set(PARAMETERS)


def test_groups_and_keys_must_fit():
    with pytest.raises(ValueError, match="distinct"):
        Mechanism(plan_of(), (*GROUPS, GROUPS[0]), KEYS)
    with pytest.raises(ValueError, match="distinct"):
        Mechanism(plan_of(), (Group("a", ("p",), 3), Group("b", ("p",), 3)), KEYS)
    with pytest.raises(ValueError, match="distinct"):
        Mechanism(plan_of(), (), KEYS)
    with pytest.raises(ValueError, match="noise_mode is secure"):
        Mechanism(plan_of(noise_mode="secure"), GROUPS, KEYS)


def means_of(batch, users, size=4):
    means = UnitMeans(Counter(users.tolist()), size)
    means.add(batch, users)
    return means.take()


def test_the_mean_of_a_user_is_its_own_to_the_last_bit():
    """Whoever else is there, and however the rows are cut up: they are added one after the other."""
    batch, users = batch_of(7), torch.tensor([0, 1, 0, 1, 1, 0, 2])
    expected = means_of(batch, users)[0]
    means = UnitMeans({0: 3, 5: 1}, 4)
    for piece in ([0, 2], [6, 5]):
        part = {name: value[piece] for name, value in batch.items()}
        means.add(part, torch.tensor([{0: 0, 2: 5}[int(users[row])] for row in piece]))
    found, units = means.take()
    assert units.tolist() == [0, 5, UNCOUNTED, UNCOUNTED]
    assert all(torch.equal(found[name][0], value[0]) for name, value in expected.items())


def test_rows_of_a_user_must_all_be_there_and_those_that_are_not_finite_count_as_zero():
    batch, users = batch_of(3), torch.tensor([0, UNCOUNTED, 0])
    short, long = UnitMeans({0: 3}, 2), UnitMeans({0: 1}, 2)
    short.add(batch, users)
    with pytest.raises(ValueError, match="rows of a unit are missing"):
        short.take()
    with pytest.raises(ValueError, match="more rows in a step"):
        long.add(batch, users)
    name = next(iter(batch))
    bad = {**batch, name: batch[name].clone()}
    bad[name][0].view(-1)[0] = math.nan
    means = UnitMeans({0: 2}, 2)
    means.add(bad, users)
    for key, value in means.take()[0].items():
        assert torch.equal(value[0], bad[key][2].double() / 2) and not value[1].any()


def test_a_user_whose_gradients_are_no_numbers_counts_as_zero_like_any_row():
    """Whether a step succeeds must not tell that somebody is there."""
    plan = plan_of("group", unit="user_uls", examples_per_user=3)
    mechanism, batch = Mechanism(plan, GROUPS, KEYS), batch_of(2)
    nothing = {name: torch.full_like(value, math.nan) for name, value in batch.items()}
    mechanism.accumulate(*means_of(nothing, torch.tensor([0, 0])))
    found = mechanism.release(0, num_units=1)
    empty = Mechanism(plan, GROUPS, KEYS).release(0, num_units=0)
    assert all(torch.equal(found.gradients[name], value) for name, value in empty.gradients.items())


def test_users_are_averaged_and_kept_together():
    plan = plan_of("group", unit="user_uls", examples_per_user=3)
    batch, users = batch_of(5), torch.tensor([0, 1, 0, 1, 1])
    mechanism = Mechanism(plan, GROUPS, KEYS)
    with pytest.raises(ValueError, match="pass the unit"):
        mechanism.accumulate(batch)
    mechanism.accumulate(*means_of(batch, users))
    with pytest.raises(ValueError, match="a unit comes twice"):
        mechanism.accumulate(*means_of(batch, torch.tensor([2, 1, 2, 2, 2])))
    release = mechanism.release(0)
    means = {n: torch.stack([v[users == u].double().mean(dim=0) for u in (0, 1)]) for n, v in batch.items()}
    expected = run(plan_of("group"), [means])[1][0]
    assert_same_up_to_the_grid(release, expected)
    assert release.telemetry["NON_PRIVATE/batch_size"] == 2.0
    mechanism.accumulate(*means_of(batch, users))  # the next step may see the same users again
    assert mechanism.release(1).telemetry["NON_PRIVATE/batch_size"] == 2.0


def test_a_row_that_is_added_twice_is_refused():
    mechanism, batch = Mechanism(plan_of(), GROUPS, KEYS), batch_of(3)
    mechanism.accumulate(batch, torch.tensor([0, 1, 2]))
    for again in ([3, 4, 1], [5, 6, 6]):
        with pytest.raises(ValueError, match="a unit comes twice"):
            mechanism.accumulate(batch, torch.tensor(again))
    mechanism.accumulate(batch, torch.tensor([3, 4, 5]))
    assert mechanism.release(0).telemetry["NON_PRIVATE/batch_size"] == 6.0
    mechanism.accumulate(batch, torch.tensor([0, 1, 2]))  # positions start anew in each step


def test_examples_of_a_user_count_one_by_one_under_els():
    plan = plan_of(unit="user_els", examples_per_user=3)
    mechanism = Mechanism(plan, GROUPS, KEYS)
    mechanism.accumulate(batch_of(5), torch.zeros(5, dtype=torch.long))
    assert mechanism.release(0).telemetry["NON_PRIVATE/batch_size"] == 5.0


# --- adapting to the released history, and to nothing else


@pytest.mark.parametrize("weights", ["released_energy", "adam"])
@pytest.mark.parametrize("kind", ["scaled_flat", "group"])
def test_noise_follows_from_what_was_released(kind, weights):
    """The state, and with it clip and noise of every step, can be rebuilt from the releases alone."""
    plan = plan_of(kind, "min_energy", weights, expected_batch_size=50.0, noise_multiplier=0.5)
    batches = [batch_of(40, seed=s) for s in range(3)]
    for batch in batches:
        batch["y"] *= 30.0
    mechanism, releases = run(plan, batches)
    thresholds = [plan.max_grad_norm / math.sqrt(3)] * 3
    state = AllocationState.start(GROUPS, thresholds)
    for release in releases:
        stds = np.array([release.noise_std[g.name] for g in GROUPS]) * 50.0
        y = [sum(float((release.gradients[n].double() * 50.0).square().sum()) for n in g.parameters) for g in GROUPS]
        state = state.update(y, stds, [8, 50, 200], 50.0, plan.allocation.ema)
    assert mechanism.state.energy == pytest.approx(state.energy, rel=1e-4)
    assert mechanism.state.weights(weights, 1e-3) == pytest.approx(state.weights(weights, 1e-3), rel=1e-4)
    assert releases[1].noise_std != releases[0].noise_std
    allocation_of_first = np.array(list(releases[0].noise_std.values()))
    assert allocation_of_first * np.sqrt(np.sqrt([8, 50, 200])) == pytest.approx([allocation_of_first[0] * 8**0.25] * 3)


def test_tracked_thresholds_take_effect_in_the_next_step():
    tracker = QuantileTracking(quantile=0.5, learning_rate=0.2, share=0.5, minimum=0.01, maximum=50.0)
    plan = plan_of("group", "equal_budget", quantile=tracker, expected_batch_size=400.0, steps=60)
    batch = batch_of(400, scale=2.0)
    mechanism, releases = run(plan, [batch] * 60)
    assert set(releases[0].thresholds.values()) == {plan.max_grad_norm / math.sqrt(3)}
    assert releases[1].thresholds != releases[0].thresholds
    norms = [
        torch.cat([batch[name].flatten(start_dim=1) for name in group.parameters], dim=1).norm(dim=1)
        for group in GROUPS
    ]
    medians = [float(norm.median()) for norm in norms]
    assert mechanism.state.thresholds == pytest.approx(medians, rel=0.1)
    assert list(releases[-1].thresholds.values()) == pytest.approx(medians, rel=0.1)


def test_joint_thresholds_freeze_a_group_that_is_not_worth_its_noise():
    groups = (Group("small", ("small",), 4), Group("large", ("large",), 40_000))
    plan = plan_of("scaled_flat", "joint", quantile=QuantileTracking(minimum=1e-3), expected_batch_size=8.0)
    mechanism = Mechanism(plan, groups, KEYS)
    mechanism.accumulate({"small": torch.ones(6, 4), "large": torch.ones(6, 40_000)})
    release = mechanism.release(0)
    assert release.thresholds["large"] == release.noise_std["large"] == 0.0
    assert bool((release.gradients["large"] == 0.0).all())
    assert release.thresholds["small"] > 0.0
    assert bool((release.gradients["small"] != 0.0).all())
    assert release.effective_noise_multiplier == pytest.approx(0.8, rel=1e-9)


def test_weight_space_allocation_needs_public_weights():
    a, b = "q.lora_A.default.weight", "q.lora_B.default.weight"
    groups = groups_of({a: torch.Size((4, 8)), b: torch.Size((16, 4))}, "matrix")
    mechanism = Mechanism(plan_of("scaled_flat", "lora_weight_space"), groups, KEYS)
    batch = {a: torch.zeros(2, 4, 8), b: torch.zeros(2, 16, 4)}
    with pytest.raises(ValueError, match="set_public_weights"):
        mechanism.accumulate(batch)
    mechanism.set_public_weights(lora_group_weights(groups, {a: 9.0, b: 1.0}))
    mechanism.accumulate(batch)
    with pytest.raises(ValueError, match="middle of step 0"):
        mechanism.set_public_weights({a: 1.0, b: 1.0})
    first = mechanism.release(0).noise_std
    # s^4 is proportional to 1 / (w d): w_A d_A = 1/4 * 32, w_B d_B = 9/4 * 64
    assert first[a] / first[b] == pytest.approx(18**0.25)
    mechanism.set_public_weights({a: 0.0, b: 1.0})
    second = mechanism.release(1).noise_std
    assert second[a] / second[b] == pytest.approx((1e3 * 64 / 32) ** 0.25)
    resumed = Mechanism(mechanism.plan, groups, KEYS)
    resumed.load_state_dict(json.loads(json.dumps(mechanism.state_dict())))
    assert resumed.release(2).noise_std == mechanism.release(2).noise_std == second
    for wrong in ({a: 1.0}, {a: 1.0, b: math.nan}, {a: 1.0, b: -1.0}):
        with pytest.raises(ValueError, match="weights must"):
            mechanism.set_public_weights(wrong)


# --- resume


@pytest.mark.parametrize(("kind", "rule", "weights"), CASES)
def test_a_resumed_run_releases_the_same(kind, rule, weights):
    plan = plan_of(kind, rule, weights, quantile=QuantileTracking(share=0.3))
    batches = [batch_of(10, seed=s, scale=3.0) for s in range(4)]
    _, expected = run(plan, batches)
    mechanism, _ = run(plan, batches[:2])
    resumed = Mechanism(PrivacyPlan.from_dict(plan.to_dict()), GROUPS, KeyRing.reproducible(11, "test"))
    resumed.load_state_dict(json.loads(json.dumps(mechanism.state_dict())))
    for step in (2, 3):
        resumed.accumulate(batches[step])
        release = resumed.release(step)
        assert np.array_equal(flat(release.gradients), flat(expected[step].gradients))
        assert release.noise_std == expected[step].noise_std


def test_a_state_holds_nothing_private_and_fits_its_own_run_only():
    mechanism = Mechanism(plan_of(), GROUPS, KEYS)
    mechanism.accumulate(batch_of(2))
    for call in (mechanism.state_dict, lambda: mechanism.load_state_dict({})):
        with pytest.raises(ValueError, match="middle of step 0"):
            call()
    mechanism.release(0)
    state = mechanism.state_dict()
    with pytest.raises(ValueError, match="another privacy plan"):
        Mechanism(plan_of(noise_multiplier=0.9), GROUPS, KEYS).load_state_dict(state)
    with pytest.raises(ValueError, match="other groups"):
        Mechanism(plan_of(), GROUPS[:2], KEYS).load_state_dict(state)


# --- groups


NAMES = (
    "base.layers.0.attn.q_proj.lora_A.default.weight",
    "base.layers.0.attn.q_proj.lora_B.default.weight",
    "base.layers.0.mlp.norm.bias",
    "base.layers.1.attn.q_proj.lora_A.default.weight",
    "base.layers.1.attn.q_proj.lora_B.default.weight",
    "base.classifier.modules_to_save.default.weight",
    "base.classifier.modules_to_save.default.bias",
)


@pytest.mark.parametrize(
    ("grouping", "expected"),
    [
        ("all", {"all": NAMES}),
        ("matrix", {name: (name,) for name in NAMES}),
        (
            "module",
            {
                "base.layers.0.attn.q_proj": NAMES[0:2],
                "base.layers.0.mlp.norm": NAMES[2:3],
                "base.layers.1.attn.q_proj": NAMES[3:5],
                "base.classifier": NAMES[5:7],
            },
        ),
        (
            "layer",
            {"base.layers.0": NAMES[0:3], "base.layers.1": NAMES[3:5], "outside the layers": NAMES[5:7]},
        ),
        (
            "kind",
            {
                "base.layers.*.attn.q_proj.lora_A.default.weight": NAMES[0:4:3],
                "base.layers.*.attn.q_proj.lora_B.default.weight": NAMES[1:5:3],
                "base.layers.*.mlp.norm.bias": NAMES[2:3],
                NAMES[5]: NAMES[5:6],
                NAMES[6]: NAMES[6:7],
            },
        ),
    ],
)
def test_groupings(grouping, expected):
    shapes = {name: torch.Size((2, i + 1)) for i, name in enumerate(NAMES)}
    groups = groups_of(shapes, grouping)
    assert {group.name: group.parameters for group in groups} == {n: tuple(p) for n, p in expected.items()}
    assert sum(group.dimension for group in groups) == sum(shape.numel() for shape in shapes.values())
    assert all(g.shapes == tuple(tuple(shapes[name]) for name in g.parameters) for g in groups)


def test_wrong_groupings_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        groups_of({"a": torch.Size((1,))}, "block")
    with pytest.raises(ValueError, match="no trainable parameters"):
        groups_of({}, "all")


def test_an_empty_sum_adds_to_any_batch():
    mechanism = Mechanism(plan_of(), GROUPS, KEYS)
    mechanism.accumulate(batch_of(3))
    total = mechanism._sum
    assert torch.equal((ClippedSum.empty(GROUPS, total.sensitivity) + total).values, total.values)


def test_going_back_to_an_earlier_step_is_refused() -> None:
    """The same step with another batch would draw the same noise, which cancels in the difference."""
    mechanism = Mechanism(plan_of(), GROUPS, KEYS)
    before = mechanism.state_dict()
    mechanism.accumulate(batch_of(3))
    mechanism.release(0)
    with pytest.raises(ValueError, match="going back would draw the same noise"):
        mechanism.load_state_dict(before)


def test_users_are_not_reduced_over_ranks() -> None:
    mechanism = Mechanism(plan_of(unit="user_uls", examples_per_user=2), GROUPS, KEYS)
    with pytest.raises(ValueError, match="two ranks"):
        mechanism.release(0, all_reduce=lambda values: values)
