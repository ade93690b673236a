"""Clipping of one unit's gradient and what it guarantees: SPECIFICATION.md 1.3, 2.1, 4.2, 7.5 and 10.3."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close_to_largest

from dptune.privacy.allocation import Group, PrecisionBudget, noise_stds
from dptune.privacy.clipping import (
    MARGIN,
    ClippedSum,
    ClipRule,
    Sensitivity,
    SensitivityError,
    clip_and_sum,
)
from dptune.privacy.rules import CLIPPINGS, SMALLEST_NORM

pytestmark = pytest.mark.numerical

VECTORS = {
    vector["id"]: vector
    for vector in json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))["vectors"]
}
KINDS = tuple(CLIPPINGS)
GROUPS = (
    Group("x", ("x.a", "x.b"), 6 + 2, ((2, 3), (2,))),
    Group("y", ("y",), 5),
    Group("z", ("z",), 1, ((),)),
)


def rule_of(kind, thresholds, unit_stds=None, stability=0.01):
    thresholds = tuple(map(float, thresholds))
    unit_stds = tuple(map(float, unit_stds if unit_stds is not None else thresholds))
    return ClipRule(kind, thresholds, thresholds, unit_stds, stability)


def gradients_of(rows, groups):
    """Per-example gradients from an array of shape (b, D) that has the groups' coordinates side by side."""
    out, start = {}, 0
    for group in groups:
        for name, shape, size in zip(group.parameters, group.shapes, group.sizes, strict=True):
            out[name] = torch.as_tensor(rows[:, start : start + size]).reshape(len(rows), *shape)
            start += size
    return out


def loop_oracle(rows, groups, kind, thresholds, unit_stds, stability):
    """Clipped vectors, shape (b, D), one example and one group at a time, without the margin."""
    ends = np.cumsum([group.dimension for group in groups])
    starts = ends - [group.dimension for group in groups]
    clipped = np.zeros_like(rows)
    for i, row in enumerate(rows):
        pieces = [row[a:b] for a, b in zip(starts, ends, strict=True)]
        if not np.isfinite(row).all():
            continue
        whitened = math.sqrt(sum(float(p @ p) / s**2 for p, s in zip(pieces, unit_stds, strict=True) if s > 0))
        for a, b, piece, c, s in zip(starts, ends, pieces, thresholds, unit_stds, strict=True):
            norm = math.sqrt(float(piece @ piece))
            if kind == "flat":
                total, radius = math.sqrt(float(row @ row)), math.sqrt(sum(t * t for t in thresholds))
                factor = min(1.0, radius / total) if total else 1.0
            elif kind == "group":
                factor = min(1.0, c / norm) if norm else 1.0
            elif kind == "scaled_flat":
                factor = 0.0 if s == 0 else (min(1.0, 1.0 / whitened) if whitened else 1.0)
            elif kind == "auto_s":
                factor = c / max(norm + stability, SMALLEST_NORM)
            elif kind == "auto_v":
                factor = c / max(norm, SMALLEST_NORM)
            elif kind == "psac":
                factor = c / max(norm + stability / (norm + stability), SMALLEST_NORM)
            else:
                raise NotImplementedError(f"clipping {kind} has no oracle")
            clipped[i, a:b] = factor * piece
    return clipped


# --- golden numbers


def golden(vector, kind, unit_stds=None):
    u = np.concatenate(vector["inputs"]["u"]).astype(float)
    groups = tuple(Group(str(i), (str(i),), len(part)) for i, part in enumerate(vector["inputs"]["u"]))
    return (
        clip_and_sum(gradients_of(u[None], groups), groups, rule_of(kind, vector["inputs"]["C"], unit_stds)).values
        / MARGIN
    )


def test_golden_group_clip():
    vector = VECTORS["golden-clip-m1"]
    assert_close_to_largest(golden(vector, "group"), np.concatenate(vector["expected"]))


def test_golden_scaled_flat_clip():
    vector = VECTORS["golden-clip"]
    stds, expected = np.array(vector["inputs"]["s"], float), vector["expected"]
    ledger = PrecisionBudget(Sensitivity(tuple(map(float, vector["inputs"]["C"])), joint=False).rows(stds))
    sigma = ledger.effective_noise_multiplier
    assert sigma == pytest.approx(expected["sigma_eff"], rel=1e-6)
    clipped = golden(vector, "scaled_flat", stds / sigma)
    assert_close_to_largest(clipped, np.concatenate(expected["out"]), rtol=1e-6)


@pytest.mark.parametrize(("name", "kind", "stability"), [("clip-auto", "auto_s", "gamma"), ("clip-psac", "psac", "r")])
def test_golden_automatic_clips(name, kind, stability):
    inputs = VECTORS[name]["inputs"]
    groups = (Group("g", ("g",), 2),)
    rule = rule_of(kind, [inputs["R"]], stability=inputs[stability])
    clipped = clip_and_sum({"g": torch.tensor([inputs["g"]], dtype=torch.float64)}, groups, rule).values / MARGIN
    assert_close_to_largest(clipped, VECTORS[name]["expected"])


# --- against loops


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    groups = tuple(Group(f"g{i}", (f"g{i}",), size) for i, size in enumerate(sizes))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(draw(st.integers(1, 6)), sum(sizes)))
    rows *= 10.0 ** rng.uniform(-6, 6, size=(len(rows), 1))
    rows[rng.random(rows.shape) < 0.2] = 0.0
    thresholds = 10.0 ** rng.uniform(-3, 3, size=len(sizes))
    weights = 10.0 ** rng.uniform(-3, 0, size=len(sizes))
    return groups, rows, thresholds, weights, draw(st.sampled_from((0.01, 0.1, 1.0)))


@given(problems(), st.sampled_from(KINDS), st.sampled_from(("equal_budget", "min_energy", "equal_snr")))
def test_every_kind_against_loops(problem, kind, allocation):
    groups, rows, thresholds, weights, stability = problem
    unit_stds = noise_stds(allocation, thresholds, [g.dimension for g in groups], weights, 1.0)
    rule = rule_of(kind, thresholds, unit_stds, stability)
    expected = loop_oracle(rows, groups, kind, thresholds, unit_stds, stability)
    total = clip_and_sum(gradients_of(rows, groups), groups, rule)
    scale = np.abs(expected).sum(axis=0)
    assert np.all(np.abs(total.values.numpy() - MARGIN * expected.sum(axis=0)) <= 1e-12 * scale)
    norms = np.stack(
        [np.linalg.norm(part, axis=1) for part in np.split(rows, np.cumsum([g.dimension for g in groups])[:-1], axis=1)]
    )
    inside = (norms <= thresholds[:, None]).sum(axis=1) - len(rows) / 2
    assert total.inside.numpy() == pytest.approx(inside)


@given(problems(), st.sampled_from(KINDS), st.sampled_from(("equal_budget", "min_energy", "equal_snr")))
def test_removing_one_record_moves_the_sum_by_at_most_its_bound(problem, kind, allocation):
    groups, rows, thresholds, weights, stability = problem
    sigma = 0.7
    allocation = "uniform" if kind == "flat" else allocation
    stds = noise_stds(allocation, thresholds, [g.dimension for g in groups], weights, sigma)
    rule = rule_of(kind, thresholds, stds / sigma, stability)
    whole = clip_and_sum(gradients_of(rows, groups), groups, rule)
    rest = clip_and_sum(gradients_of(rows[1:], groups), groups, rule)
    assert PrecisionBudget(whole.sensitivity.rows(stds)).check(sigma) == pytest.approx(sigma, rel=1e-9)
    moved = (whole.values - rest.values).numpy() / np.repeat(stds, [g.dimension for g in groups])
    rounding = 1e-12 * (1.0 + len(rows)) / sigma
    assert np.linalg.norm(moved) <= MARGIN / sigma + rounding


@given(problems())
def test_scaled_flat_with_equal_noise_is_flat(problem):
    groups, rows, thresholds, _, _ = problem
    radius = float(np.linalg.norm(thresholds))
    flat = clip_and_sum(gradients_of(rows, groups), groups, rule_of("flat", thresholds))
    scaled = clip_and_sum(
        gradients_of(rows, groups), groups, rule_of("scaled_flat", thresholds, [radius] * len(groups))
    )
    assert_close_to_largest(scaled.values, flat.values)
    assert scaled.sensitivity == flat.sensitivity


def test_a_saturated_record_reaches_its_bound():
    """The bound is not loose: sigma is not smaller than it needs to be by more than the margin."""
    rows = 1e3 * np.random.default_rng(0).normal(size=(1, 14))
    stds = noise_stds("min_energy", [1.0, 2.0, 0.5], [8, 5, 1], [1, 1, 1], 0.9)
    for kind in ("group", "scaled_flat", "auto_v"):
        total = clip_and_sum(gradients_of(rows, GROUPS), GROUPS, rule_of(kind, [1.0, 2.0, 0.5], stds / 0.9))
        moved = np.linalg.norm(total.values.numpy() / np.repeat(stds, [8, 5, 1]))
        assert moved == pytest.approx(MARGIN / 0.9, rel=1e-9)


# --- what goes in


def test_groups_span_parameters_of_any_shape_and_dtype():
    rows = np.random.default_rng(3).normal(size=(7, 14)) * 5
    rule = rule_of("group", [1.0, 2.0, 0.5])
    exact = clip_and_sum(gradients_of(rows, GROUPS), GROUPS, rule)
    assert exact.values.dtype == torch.float64
    oracle = loop_oracle(rows, GROUPS, "group", rule.thresholds, rule.unit_stds, 0.0).sum(axis=0)
    assert_close_to_largest(exact.values, MARGIN * oracle)
    for dtype in (torch.float32, torch.bfloat16):
        coarse = {name: value.to(dtype) for name, value in gradients_of(rows, GROUPS).items()}
        same = {name: value.double() for name, value in coarse.items()}
        assert torch.equal(clip_and_sum(coarse, GROUPS, rule).values, clip_and_sum(same, GROUPS, rule).values)


def test_sums_of_float32_gradients_are_float64():
    """4,096 records of norm 1 beside one of 2^24: float32 sums would lose them."""
    rows = torch.full((4097, 1), 1.0)
    rows[0] = 2.0**24
    groups = (Group("g", ("g",), 1),)
    total = clip_and_sum({"g": rows}, groups, rule_of("flat", [2.0**25]))
    assert_close_to_largest(total.values[0], MARGIN * (2.0**24 + 4096))


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(kind, bad):
    rows = np.random.default_rng(4).normal(size=(5, 14))
    broken = rows.copy()
    broken[2, 9] = bad
    zeroed = rows.copy()
    zeroed[2] = 0.0
    rule = rule_of(kind, [1.0, 2.0, 0.5])
    total = clip_and_sum(gradients_of(broken, GROUPS), GROUPS, rule)
    reference = clip_and_sum(gradients_of(zeroed, GROUPS), GROUPS, rule)
    assert torch.equal(total.values, reference.values)
    assert total.telemetry[2] == 1.0
    assert total.telemetry[0] == 5.0
    assert reference.telemetry[2] == 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.0, 1e-300, 1e-160, 1e-45, 1e150, 1e200])
def test_extreme_gradients_stay_within_bounds(kind, size):
    rows = np.full((3, 14), size)
    stds = (3.0, 1.0, 2.0)
    total = clip_and_sum(gradients_of(rows, GROUPS), GROUPS, rule_of(kind, [1.0, 2.0, 0.5], stds))
    assert bool(total.values.isfinite().all())
    if size == 0.0:
        assert bool((total.values == 0.0).all())


def test_a_frozen_group_is_left_out():
    rows = np.random.default_rng(5).normal(size=(4, 14))
    without = rows.copy()
    without[:, 8:13] = 0.0
    for kind in ("group", "scaled_flat"):
        rule = rule_of(kind, [1.0, 0.0, 0.5], [1.0, 0.0, 2.0])
        total = clip_and_sum(gradients_of(rows, GROUPS), GROUPS, rule).values
        assert bool((total[8:13] == 0.0).all())
        assert torch.equal(total, clip_and_sum(gradients_of(without, GROUPS), GROUPS, rule).values)


def test_rows_that_fill_a_batch_up_do_not_count():
    rows = 3 * np.random.default_rng(6).normal(size=(6, 14))
    rows[4, 0] = math.nan
    rows[5, 1] = math.inf
    counted = torch.tensor([True, False, True, True, True, False])
    for kind in KINDS:
        rule = rule_of(kind, [1.0, 2.0, 0.5])
        found = clip_and_sum(gradients_of(rows, GROUPS), GROUPS, rule, counted)
        expected = clip_and_sum(gradients_of(rows[counted.numpy()], GROUPS), GROUPS, rule)
        assert_close_to_largest(found.values, expected.values)
        assert torch.equal(found.inside, expected.inside)
        assert found.telemetry.tolist() == pytest.approx(expected.telemetry.tolist())


def test_a_short_gradient_is_not_blown_up_by_a_rule_that_normalises():
    rows = np.random.default_rng(6).normal(size=(2, 14))
    for scale in (1e-9, 1e-120, 0.0):
        for kind in ("auto_s", "auto_v", "psac"):
            found = clip_and_sum(
                gradients_of(scale * rows, GROUPS), GROUPS, rule_of(kind, [1.0, 2.0, 0.5], stability=1e-300)
            )
            assert float(found.values.abs().max()) <= 2.0 * 4 * scale / SMALLEST_NORM


def test_disagreeing_gradients_are_refused():
    rows, rule = np.zeros((4, 14)), rule_of("flat", [1.0, 1.0, 1.0])
    good = gradients_of(rows, GROUPS)
    with pytest.raises(ValueError, match=r"no per-example gradients of x\.b"):
        clip_and_sum({name: value for name, value in good.items() if name != "x.b"}, GROUPS, rule)
    with pytest.raises(ValueError, match="w is in no group"):
        clip_and_sum({**good, "w": torch.zeros(4, 1)}, GROUPS, rule)
    with pytest.raises(ValueError, match=r"gradients of y have shape \(3, 5\)"):
        clip_and_sum({**good, "y": torch.zeros(3, 5)}, GROUPS, rule)
    with pytest.raises(ValueError, match=r"gradients of y have shape \(5,\)"):
        clip_and_sum({**good, "y": torch.zeros(5)}, GROUPS, rule)
    with pytest.raises(ValueError, match="expected"):
        clip_and_sum(good, GROUPS, rule, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="unknown"):
        clip_and_sum(good, GROUPS, rule_of("hard", [1.0, 1.0, 1.0]))


def test_an_empty_physical_batch_is_a_zero_sum():
    total = clip_and_sum(gradients_of(np.zeros((0, 14)), GROUPS), GROUPS, rule_of("flat", [1.0] * 3))
    empty = ClippedSum.empty(GROUPS, total.sensitivity)
    assert total.values.tolist() == empty.values.tolist() == [0.0] * 14
    assert total.telemetry.tolist() == [0.0] * 3


# --- what comes out


def test_clip_fraction_counts_shortened_records():
    rows = np.zeros((4, 14))
    rows[:, 0] = [0.5, 1.0, 1.5, 9.0]
    assert clip_and_sum(gradients_of(rows, GROUPS), GROUPS, rule_of("flat", [1.0, 0, 0])).telemetry[1] == 2.0
    by_group = clip_and_sum(gradients_of(rows, GROUPS), GROUPS, rule_of("group", [1.0, 1.0, 1.0]))
    assert float(by_group.telemetry[1]) == pytest.approx(2 / 3)


def test_the_bound_is_measured():
    box = Sensitivity((1.0, 2.0, 0.0), joint=False)
    box.check(torch.tensor([[1.0], [2.0], [0.0]], dtype=torch.float64))
    for outside in ([1.0 + 1e-9, 0.0, 0.0], [0.0, 2.1, 0.0], [0.0, 0.0, 1e-9], [math.nan, 0.0, 0.0]):
        with pytest.raises(SensitivityError):
            box.check(torch.tensor(outside, dtype=torch.float64).unsqueeze(1))
    ellipsoid = Sensitivity((1.0, 2.0, 0.0), joint=True)
    ellipsoid.check(torch.tensor([[0.6], [1.6], [0.0]], dtype=torch.float64))
    with pytest.raises(SensitivityError):
        ellipsoid.check(torch.tensor([[0.7], [1.6], [0.0]], dtype=torch.float64))


def test_a_wrong_clip_factor_is_caught(monkeypatch):
    rows = np.random.default_rng(8).normal(size=(4, 14))
    for kind in KINDS:
        honest = ClipRule.factors
        with monkeypatch.context() as patch:
            patch.setattr(ClipRule, "factors", lambda self, norms, honest=honest: honest(self, norms) * 1.01)
            with pytest.raises(SensitivityError):
                clip_and_sum(gradients_of(100 * rows, GROUPS), GROUPS, rule_of(kind, [1.0, 2.0, 0.5]))


def test_the_bound_meets_the_noise_in_the_ledger():
    box, ellipsoid = Sensitivity((3.0, 4.0), joint=False), Sensitivity((3.0, 4.0), joint=True)
    assert PrecisionBudget(box.rows([3.0, 4.0])).effective_noise_multiplier == pytest.approx(1 / math.sqrt(2))
    assert PrecisionBudget(ellipsoid.rows([3.0, 4.0])).effective_noise_multiplier == pytest.approx(1.0)
    assert PrecisionBudget(ellipsoid.rows([3.0, 2.0])).effective_noise_multiplier == pytest.approx(0.5)
    for bound in (box, ellipsoid):
        assert PrecisionBudget(bound.rows([3.0, 0.0])).effective_noise_multiplier == 0.0


def test_sums_with_different_bounds_do_not_add():
    rows = gradients_of(np.ones((2, 14)), GROUPS)
    one, other = (clip_and_sum(rows, GROUPS, rule_of("flat", [c] * 3)) for c in (1.0, 2.0))
    assert torch.equal((one + one).values, 2 * one.values)
    with pytest.raises(SensitivityError, match="different clip bounds"):
        one + other
