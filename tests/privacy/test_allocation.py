"""Allocation of one step's privacy over groups: SPECIFICATION.md 2.1 to 2.6 and 4.1."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dptune.privacy.accounting import Event, delta
from dptune.privacy.allocation import (
    AllocationState,
    Group,
    PrecisionBudget,
    PrecisionError,
    PrecisionRow,
    clamp_weights,
    debiased_energy,
    joint_thresholds,
    lora_group_weights,
    mean_of_quantile,
    noise_stds,
    share_std,
)

pytestmark = pytest.mark.numerical

VECTORS = {
    vector["id"]: vector
    for vector in json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))["vectors"]
}
RULES = ("uniform", "equal_budget", "min_energy", "equal_snr")


def ledger(sensitivities, stds):
    rows = zip(sensitivities, stds, strict=True)
    return PrecisionBudget(tuple(PrecisionRow(f"row {i}", *map(float, row)) for i, row in enumerate(rows)))


def numbers(low, high):
    return st.floats(low, high, allow_nan=False, allow_infinity=False)


@st.composite
def problems(draw):
    size = draw(st.integers(1, 6))
    thresholds = draw(st.lists(numbers(1e-4, 1e3), min_size=size, max_size=size))
    dimensions = draw(st.lists(st.integers(1, 10**6), min_size=size, max_size=size))
    weights = draw(st.lists(numbers(1e-3, 1.0), min_size=size, max_size=size))
    return np.array(thresholds), np.array(dimensions, float), np.array(weights), draw(numbers(0.3, 20.0))


# --- the precision ledger


def test_ledger_of_shares_is_the_planned_multiplier():
    vector = VECTORS["ledger-shares"]
    sigma, rows = vector["inputs"]["sigma"], vector["inputs"]["rows"]
    stds = [share_std(sigma, row["Delta"], row["phi"]) for row in rows]
    assert stds == pytest.approx(vector["expected"]["s"], rel=1e-12)
    effective = ledger([row["Delta"] for row in rows], stds).check(sigma)
    assert effective == pytest.approx(vector["expected"]["sigma_eff"], rel=1e-12)


@pytest.mark.parametrize("name", ["clip-andrew-0", "clip-andrew-1", "clip-andrew-3", "clip-andrew-4"])
def test_quantile_bits_leave_the_published_multiplier(name):
    inputs = VECTORS[name]["inputs"]
    bits = ledger([0.5] * inputs["G"], [inputs["sigma_b"]] * inputs["G"])
    assert bits.remaining(inputs["z"]) == pytest.approx(VECTORS[name]["expected"], rel=1e-9)


@pytest.mark.parametrize("name", ["clip-phi-5", "clip-phi-6", "clip-phi-7"])
def test_quantile_bits_by_share(name):
    z, phi, count = (VECTORS[name]["inputs"][key] for key in ("z", "phi", "G"))
    std = share_std(z, 0.5, phi / count)
    assert std == pytest.approx(VECTORS[name]["expected"]["sigma_b"], rel=1e-9)
    assert ledger([0.5] * count, [std] * count).remaining(z) == pytest.approx(
        VECTORS[name]["expected"]["z_delta"], rel=1e-9
    )


def test_ledger_refuses_too_little_noise():
    assert ledger([1.0], [1.0 - 1e-10]).check(1.0) == pytest.approx(1.0)
    with pytest.raises(PrecisionError, match="below the planned"):
        ledger([1.0], [1.0 - 1e-8]).check(1.0)
    with pytest.raises(PrecisionError):  # two rows are one mechanism, not two
        ledger([1.0, 1.0], [1.0, 1.0]).check(1.0)
    with pytest.raises(PrecisionError):
        ledger([1.0, 1e-9], [1.5, 0.0]).check(1.0)
    with pytest.raises(PrecisionError):
        ledger([math.nan], [1.0]).check(1.0)


def test_a_row_that_cannot_move_needs_no_noise():
    assert ledger([1.0, 0.0], [2.0, 0.0]).effective_noise_multiplier == 2.0
    assert ledger([0.0], [0.0]).effective_noise_multiplier == math.inf


def test_bits_that_cost_everything_are_refused():
    with pytest.raises(PrecisionError, match="leaves nothing"):
        ledger([0.5] * 8, [1.414] * 8).remaining(1.0)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        share_std(1.0, 1.0, share)


# --- the family of noise allocations


@pytest.mark.parametrize("name", [f"grp-{i}-{RULES[i % 4]}" for i in range(1, 15)])
def test_noise_of_the_family(name):
    inputs, expected = VECTORS[name]["inputs"], VECTORS[name]["expected"]
    stds = noise_stds(inputs["rule"], inputs["C"], inputs["d"], inputs["w"], inputs["sigma"])
    assert stds == pytest.approx(expected["s"], rel=1e-6)
    assert float(np.sum(np.multiply(inputs["w"], inputs["d"]) * stds**2)) == pytest.approx(expected["energy"], rel=1e-6)
    assert ledger(inputs["C"], stds).effective_noise_multiplier == pytest.approx(expected["sigma_eff"], rel=1e-6)


@given(problems(), st.sampled_from(RULES))
def test_every_rule_spends_exactly_the_budget(problem, rule):
    thresholds, dimensions, weights, sigma = problem
    stds = noise_stds(rule, thresholds, dimensions, weights, sigma)
    assert ledger(thresholds, stds).effective_noise_multiplier == pytest.approx(sigma, rel=1e-11)
    assert stds == pytest.approx(noise_stds(rule, thresholds, dimensions, 7.0 * weights, sigma), rel=1e-11)


@given(problems(), st.integers(0, 2**32 - 1))
def test_no_other_allocation_has_less_energy(problem, seed):
    thresholds, dimensions, weights, sigma = problem
    best = noise_stds("min_energy", thresholds, dimensions, weights, sigma)
    energy = np.sum(weights * dimensions * best**2)
    for scale in (0.01, 0.3, 3.0):
        other = best * np.exp(np.random.default_rng(seed).normal(0.0, scale, len(best)))
        other *= math.sqrt(np.sum((thresholds / other) ** 2)) * sigma
        assert energy <= np.sum(weights * dimensions * other**2) * (1 + 1e-9)


@pytest.mark.parametrize("rule", ["equal_budget", "min_energy", "equal_snr", "joint", "lora_weight_space"])
def test_a_frozen_group_gets_no_noise_and_costs_nothing(rule):
    stds = noise_stds(rule, [1.0, 0.0, 2.0], [10, 20, 30], [1, 1, 1], 0.7)
    live = noise_stds(rule, [1.0, 2.0], [10, 30], [1, 1], 0.7)
    assert stds == pytest.approx([live[0], 0.0, live[1]])


def test_wrong_allocations_are_refused():
    with pytest.raises(ValueError, match="unknown"):
        noise_stds("best", [1.0], [1], [1.0], 1.0)
    with pytest.raises(ValueError, match="max_grad_norm"):
        noise_stds("uniform", [0.0], [1], [1.0], 1.0)


# --- joint thresholds


def expected_error(thresholds, m, d, w, sigma, batch):
    """J(C) of 2.4 for exponential norms, where E[(n - C)_+^2] = 2 m^2 exp(-C/m)."""
    noise = sigma**2 * np.sum(np.sqrt(w * d) * thresholds) ** 2 / batch**2
    return float(np.sum(w * 2 * m**2 * np.exp(-thresholds / m)) + noise)


@pytest.mark.parametrize("name", ["grp-jointC-9", "grp-jointC-10"])
def test_joint_thresholds(name):
    inputs, expected = VECTORS[name]["inputs"], VECTORS[name]["expected"]
    m, d, w = (np.array(inputs[key]) for key in "mdw")
    thresholds = joint_thresholds(m, d, w, inputs["sigma"], inputs["L"])
    assert thresholds == pytest.approx(expected["C"], rel=1e-6)
    assert np.sum(np.sqrt(w * d) * thresholds) == pytest.approx(expected["S"], rel=1e-6)
    best = expected_error(thresholds, m, d, w, inputs["sigma"], inputs["L"])
    assert best == pytest.approx(expected["objective"], rel=1e-6)


@given(problems(), numbers(4.0, 4096.0), st.integers(0, 2**32 - 1))
def test_no_other_thresholds_have_less_error(problem, batch, seed):
    m, d, w, sigma = problem
    thresholds = joint_thresholds(m, d, w, sigma, batch)
    assert thresholds.max() > 0.0
    best = expected_error(thresholds, m, d, w, sigma, batch)
    rng = np.random.default_rng(seed)
    for scale in (1e-3, 0.1, 1.0):
        other = np.abs(thresholds + scale * m * rng.normal(size=len(m)))
        assert best <= expected_error(other, m, d, w, sigma, batch) * (1 + 1e-9)


def test_mean_of_an_exponential_from_its_quantile():
    assert mean_of_quantile([math.log(2.0), 2 * math.log(2.0)], 0.5) == pytest.approx([1.0, 2.0])
    draws = np.random.default_rng(0).exponential(3.0, 200_000)
    assert mean_of_quantile([np.quantile(draws, 0.8)], 0.8) == pytest.approx([3.0], rel=0.01)


# --- weights


def test_lora_weights_minimise_noise_in_weight_space():
    inputs, expected = VECTORS["grp-lora-ws"]["inputs"], VECTORS["grp-lora-ws"]["expected"]
    rank, dims = inputs["r"], [inputs["di"] * inputs["r"], inputs["do"] * inputs["r"]]
    shapes = {"lora_A": (rank, inputs["di"]), "lora_B": (inputs["do"], rank)}
    factors = [Group(name, (name,), math.prod(shape), (shape,)) for name, shape in shapes.items()]
    weights = list(lora_group_weights(factors, {"lora_A": inputs["normA2"], "lora_B": inputs["normB2"]}).values())
    stds = noise_stds("lora_weight_space", [1.0, 1.0], dims, weights, 1.0)
    assert stds == pytest.approx([expected["s_A"], expected["s_B"]], rel=1e-6)
    assert np.sum(np.multiply(weights, dims) * stds**2) == pytest.approx(expected["E"], rel=1e-6)


def test_weights_of_groups_of_lora_factors():
    a, b = "q.lora_A.default.weight", "q.lora_B.default.weight"
    norms = {a: 3.0, b: 5.0}
    separate = (Group(a, (a,), 8 * 4, ((4, 8),)), Group(b, (b,), 16 * 4, ((16, 4),)))
    assert lora_group_weights(separate, norms) == pytest.approx({a: 5.0 / 4, b: 3.0 / 4})
    together = (Group("q", (a, b), 96, ((4, 8), (16, 4))), Group("bias", ("bias",), 16))
    mean = (32 * 5.0 / 4 + 64 * 3.0 / 4) / 96
    assert lora_group_weights(together, norms) == pytest.approx({"q": mean, "bias": 1.0})
    with pytest.raises(ValueError, match=r"norm of q.lora_A.default.weight"):
        lora_group_weights(separate[1:], {b: 5.0})


def test_weights_are_clamped_to_the_floor():
    assert clamp_weights([2.0, 1.0, 1e-9, 0.0], 1e-3) == pytest.approx([1.0, 0.5, 1e-3, 1e-3])
    assert clamp_weights([np.inf, 4.0, 2.0], 1e-3) == pytest.approx([1.0, 1.0, 0.5])
    assert clamp_weights([0.0, 0.0], 1e-3) == pytest.approx([1.0, 1.0])


def test_debiased_energy():
    inputs = VECTORS["post-debias"]["inputs"]
    energy = debiased_energy([inputs["y_norm2"]], [inputs["d"]], [inputs["s"]], inputs["L"])
    assert energy == pytest.approx([VECTORS["post-debias"]["expected"]])
    rng, signal, std = np.random.default_rng(1), np.array([3.0, -4.0, 1.0]), 2.0
    draws = np.square(signal + std * rng.normal(size=(100_000, 3))).sum(axis=1)
    energies = debiased_energy(draws, 3, std, 10.0)
    deviation = math.sqrt(2 * 3 * std**4 + 4 * std**2 * 26) / 100
    assert energies.mean() == pytest.approx(26 / 100, abs=4 * deviation / math.sqrt(100_000))
    assert energies.std() == pytest.approx(deviation, rel=0.02)


GROUPS = (Group("a", ("a",), 4), Group("b", ("b",), 100))


def test_weights_of_released_energy():
    state = AllocationState.start(GROUPS, [1.0, 1.0])
    assert state.weights("released_energy", 1e-3) == pytest.approx([1.0, 1.0])
    first = state.update([400.0, 100.0], [2.0, 1.0], [4, 100], 10.0, 0.8)
    second = first.update([84.0, 0.0], [1.0, 3.0], [4, 100], 10.0, 0.8)
    energy_a = 0.8 * 0.2 * (400 - 16) / 100 + 0.2 * (84 - 4) / 100
    resolution_b = 0.8 * 0.2 * math.sqrt(200) / 100 + 0.2 * 9 * math.sqrt(200) / 100  # b's energy is below
    assert second.weights("released_energy", 1e-3) == pytest.approx([resolution_b / energy_a, 1.0])
    assert second.weights("static", 1e-3) == pytest.approx([1.0, 1.0])
    assert (state.steps, first.steps, second.steps) == (0, 1, 2)
    assert state == AllocationState.start(GROUPS, [1.0, 1.0])
    with pytest.raises(ValueError, match="unknown"):
        second.weights("private", 1e-3)


def test_adam_weights_are_those_of_the_optimizer():
    generator, batch = torch.Generator().manual_seed(0), 16.0
    parameters = [torch.nn.Parameter(torch.zeros(group.dimension)) for group in GROUPS]
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.97))
    state = AllocationState.start(GROUPS, [1.0, 1.0])
    for _ in range(7):
        released = [
            scale * torch.randn(len(p), generator=generator) for scale, p in zip((5, 1), parameters, strict=True)
        ]
        for parameter, y in zip(parameters, released, strict=True):
            parameter.grad = y / batch
        optimizer.step()
        state = state.update([float(y.square().sum()) for y in released], [1.0, 1.0], [4, 100], batch, 0.97)
    second_moments = np.array([float(optimizer.state[p]["exp_avg_sq"].mean()) for p in parameters])
    assert state.weights("adam", 1e-6) == pytest.approx(second_moments.min() / second_moments, rel=1e-5)


def test_state_survives_a_checkpoint():
    state = AllocationState.start(GROUPS, [0.1, 1 / 3]).update([1.1, 2.2], [0.3, 0.7], [4, 100], 3.0, 0.8)
    assert AllocationState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_thresholds_follow_the_quantile():
    norms = np.random.default_rng(2).exponential([1.0, 5.0], size=(4000, 2))
    state = AllocationState.start(GROUPS, [10.0, 0.01])
    for _ in range(200):
        state = state.track((norms <= state.thresholds).mean(axis=0), 0.5, 0.2, 1e-3, 100.0)
    assert state.thresholds == pytest.approx(np.median(norms, axis=0), rel=0.01)
    assert state.track([-50.0, 50.0], 0.5, 0.2, 1e-3, 100.0).thresholds == (100.0, 1e-3)
    one = state.track([0.9, 0.5], 0.5, 0.2, 1e-3, 100.0)
    assert one.thresholds == pytest.approx([state.thresholds[0] * math.exp(-0.2 * 0.4), state.thresholds[1]])


def test_groups_are_checked():
    with pytest.raises(ValueError, match="no parameters"):
        Group("empty", (), 0)
    with pytest.raises(ValueError, match="one shape for each"):
        Group("two", ("a", "b"), 2)
    with pytest.raises(ValueError, match="dimension 3"):
        Group("wrong", ("a",), 3, ((2, 2),))
    assert Group("flat", ("a",), 3).shapes == ((3,),)


# --- theorem B: adapting to what was released costs nothing


def test_an_adaptive_run_is_as_private_as_the_plan():
    """Monte Carlo, stratified by the steps that sample the record, of the privacy loss of a three-step run.

    Thresholds and noise follow the history; the record saturates every group in every step.
    """
    vector = VECTORS["grp-adapt-mc-1"]
    q, sigma, steps, epsilon = (vector["inputs"][key] for key in ("q", "sigma_eff", "steps", "eps"))
    planned = delta([Event(sigma, q, steps)], epsilon)
    assert planned == pytest.approx(vector["expected"], abs=vector["tolerance"])
    groups = (Group("a", ("a",), 1), Group("b", ("b",), 6))
    dimensions = np.array([1.0, 6.0])
    rng = np.random.default_rng(20261123)

    def privacy_loss(pattern):
        state, loss = AllocationState.start(groups, [1.0, 1.0]), 0.0
        for sampled in pattern:
            rule = "min_energy" if state.energy[0] > 0.01 else "equal_snr"
            weights = state.weights("released_energy", 1e-3)
            thresholds = np.array(state.thresholds)
            stds = noise_stds(rule, thresholds, dimensions, weights, sigma)
            y = [std * rng.normal(size=group.dimension) for std, group in zip(stds, groups, strict=True)]
            if sampled:
                for vector, threshold in zip(y, thresholds, strict=True):
                    vector[0] += threshold
            # log of the density ratio at y with and without the record: mean C_g e_1 against 0, noise s_g
            scores = [v[0] * c / s**2 - (c / s) ** 2 / 2 for v, c, s in zip(y, thresholds, stds, strict=True)]
            loss += math.log1p(q * math.expm1(sum(scores)))
            squared = [float(np.sum(v**2)) for v in y]
            state = state.update(squared, stds, dimensions, 4.0, 0.5)
            state = state.track([0.5 + np.tanh(v[-1]) / 2 for v in y], 0.5, 2.0, 0.05, 20.0)
        return loss

    estimate, variance = 0.0, 0.0
    for sampled, paths in ((0, 9000), (1, 8000), (2, 2500), (3, 500)):
        losses = np.array([privacy_loss(rng.permutation([i < sampled for i in range(steps)])) for _ in range(paths)])
        terms = np.maximum(-np.expm1(epsilon - losses), 0.0)
        probability = math.comb(steps, sampled) * q**sampled * (1 - q) ** (steps - sampled)
        estimate += probability * terms.mean()
        variance += probability**2 * terms.var() / paths
    assert 4 * math.sqrt(variance) < 0.2 * planned
    assert estimate == pytest.approx(planned, abs=4 * math.sqrt(variance))
