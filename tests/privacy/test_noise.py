"""The noise: its size in each group, its independence, its grid (SPECIFICATION.md 2.1, 10.2, 10.3, 10.5)."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dptune.privacy.allocation import Group, noise_stds
from dptune.privacy.mechanism import Mechanism, round_to_grid
from dptune.privacy.plan import Allocation, Clipping, PrivacyPlan, QuantileTracking
from dptune.privacy.streams import KeyRing, Purpose

pytestmark = pytest.mark.numerical

GROUPS = (Group("a", ("a",), 64), Group("b", ("b.0", "b.1"), 512, ((16, 16), (256,))), Group("c", ("c",), 64))
STEPS, SIGMA, CLIP, BATCH = 12, 0.7, 2.0, 30.0


def plan_of(kind, rule, **changes):
    return PrivacyPlan(
        num_units=1000,
        expected_batch_size=BATCH,
        steps=STEPS,
        delta=1e-5,
        noise_multiplier=SIGMA,
        max_grad_norm=CLIP,
        clipping=Clipping(kind),
        grouping="matrix",
        allocation=Allocation(rule),
        noise_mode="reproducible",
        **changes,
    )


def noise_of(plan, keys, batch=None):
    """Released gradients of each step and group, shape (steps, d_g); of empty batches pure noise."""
    mechanism, out = Mechanism(plan, GROUPS, keys), {group.name: [] for group in GROUPS}
    for step in range(plan.steps):
        if batch is not None:
            mechanism.accumulate(batch)
        gradients = mechanism.release(step).gradients
        for group in GROUPS:
            out[group.name].append(torch.cat([gradients[n].flatten() for n in group.parameters]).double().numpy())
    return {name: np.stack(steps) for name, steps in out.items()}


def fits(noise, std):
    """Two-sided chi-square test of the standard deviation at level 1e-6."""
    p = stats.chi2(noise.size).cdf(float(np.sum(noise**2)) / std**2)
    return 5e-7 < p < 1 - 5e-7


KEYS = KeyRing.reproducible(3, "noise")


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("flat", "uniform"), ("group", "min_energy"), ("scaled_flat", "equal_snr"), ("auto_s", "equal_budget")],
)
@pytest.mark.parametrize("share", [None, 0.36])
def test_each_group_gets_the_noise_that_the_plan_pays_for(kind, rule, share):
    quantile = None if share is None else QuantileTracking(share=share, learning_rate=1e-9)
    thresholds = [CLIP / math.sqrt(3)] * 3
    sigma = SIGMA if share is None else SIGMA / math.sqrt(1 - share)
    expected = noise_stds(rule, thresholds, [64, 512, 64], [1.0] * 3, sigma) / BATCH
    if kind == "flat":
        assert expected == pytest.approx([sigma * CLIP / BATCH] * 3)
    noise = noise_of(plan_of(kind, rule, quantile=quantile), KEYS)
    for group, std in zip(GROUPS, expected, strict=True):
        assert fits(noise[group.name], std)
        assert not fits(noise[group.name], std * 2 / 3)
        assert not fits(noise[group.name], std * 3 / 2)
        assert stats.kstest(noise[group.name].ravel() / std, "norm").pvalue > 1e-4


def test_noise_is_independent_between_groups_steps_and_runs():
    noise = noise_of(plan_of("flat", "uniform"), KEYS)
    other_run = noise_of(plan_of("flat", "uniform"), KeyRing.reproducible(3, "another run"))
    other_seed = noise_of(plan_of("flat", "uniform"), KeyRing.reproducible(4, "noise"))
    draws = np.concatenate(
        [noise["a"], noise["c"], noise["b"][:, :64], noise["b"][:, 256:320], other_run["a"], other_seed["a"]]
    )
    correlation = np.corrcoef(draws)  # 72 vectors of 64 coordinates
    np.fill_diagonal(correlation, 0.0)
    assert np.abs(correlation).max() < 0.7
    pairs = draws.shape[0] * (draws.shape[0] - 1) / 2
    assert np.sum(correlation**2) / 2 == pytest.approx(pairs / 63, rel=0.15)


def test_every_draw_has_its_own_key(monkeypatch):
    """One stream for each group and step and one for the bits of a step, each opened once, none shared."""
    opened, stream = [], KeyRing.stream
    monkeypatch.setattr(
        KeyRing,
        "stream",
        lambda self, purpose, *, step=0, group="", rank=0: (
            opened.append((purpose, step, group, rank)) or stream(self, purpose, step=step, group=group, rank=rank)
        ),
    )
    noise_of(plan_of("group", "uniform", quantile=QuantileTracking()), KEYS)
    assert len(opened) == len(set(opened)) == STEPS * (len(GROUPS) + 1)
    assert {purpose for purpose, *_ in opened} == {Purpose.NOISE}


def test_noise_does_not_depend_on_the_batch():
    """With gradients of 0 the release is the noise of the empty batch, bit for bit."""
    zeros = {
        "a": torch.zeros(5, 64),
        "b.0": torch.zeros(5, 16, 16),
        "b.1": torch.zeros(5, 256),
        "c": torch.zeros(5, 64),
    }
    plan = plan_of("scaled_flat", "min_energy")
    with_batch, without = noise_of(plan, KEYS, zeros), noise_of(plan, KEYS)
    assert all(np.array_equal(with_batch[name], without[name]) for name in with_batch)


def test_quantile_bits_are_noised_with_their_own_stream():
    """Empty batches: the tracker moves by its noise alone, sigma_b = sigma/2 sqrt(G/share) (4.1)."""
    tracker = QuantileTracking(quantile=0.5, learning_rate=1.0, share=0.09, minimum=1e-9, maximum=1e9)
    plan = plan_of("group", "equal_budget", quantile=tracker)
    mechanism, moves = Mechanism(plan, GROUPS, KEYS), []
    noise = noise_of(plan, KEYS)
    for step in range(STEPS):
        before = np.log(mechanism.state.thresholds)
        mechanism.release(step)
        moves.append((before - np.log(mechanism.state.thresholds)) * BATCH)
    bits = np.array(moves)
    std = SIGMA / 2 * math.sqrt(3 / 0.09)
    p = stats.chi2(bits.size).cdf(float(np.sum(bits**2)) / std**2)
    assert 1e-4 < p < 1 - 1e-4
    assert len(np.unique(bits)) == bits.size
    for group in GROUPS:  # not the numbers that went into the gradients
        scaled = noise[group.name][:, :3] / noise[group.name].std()
        assert np.abs(scaled - bits / std).max() > 0.5


def test_released_sums_lie_on_a_public_grid():
    for std in (1.0, 0.7, 3e-5, 1234.5):
        values = std * torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        rounded = round_to_grid(values, std)
        grid = 2.0 ** math.floor(math.log2(std / 1024))
        assert torch.equal(rounded / grid, (rounded / grid).round())
        assert float((rounded - values).abs().max()) <= grid / 2
        assert len(torch.unique(rounded)) > 1000


def test_a_release_is_rounded_to_the_grid_before_float32():
    plan = plan_of("flat", "uniform")
    gradients = Mechanism(plan, GROUPS, KEYS).release(0).gradients
    grid = 2.0 ** math.floor(math.log2(SIGMA * CLIP / 1024))
    for value in gradients.values():
        multiples = value.double() * BATCH / grid
        assert float((multiples - multiples.round()).abs().max()) < 1e-2
        assert float((multiples / 2 - (multiples / 2).round()).abs().max()) > 0.4  # the grid is not coarser
