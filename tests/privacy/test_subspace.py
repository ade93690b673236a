"""Subspaces of the update and free post-processing: SPECIFICATION.md 5 and 6."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numerics import FLOAT32, assert_close_to_largest, differs

from dptune.privacy.accounting import Event
from dptune.privacy.allocation import Group
from dptune.privacy.clipping import MARGIN
from dptune.privacy.mechanism import Mechanism
from dptune.privacy.plan import Allocation, Clipping, PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose
from dptune.privacy.subspace import (
    Carriers,
    PaidSubspace,
    Subspace,
    adam_bc,
    ema,
    gavish_donoho,
    gradient_carriers,
    james_stein,
    principal_subspace,
    random_subspace,
    shrink_singular_values,
)

pytestmark = pytest.mark.numerical

VECTORS = {
    vector["id"]: vector
    for vector in json.loads((Path(__file__).parent / "vectors.json").read_text(encoding="utf-8"))["vectors"]
}
GROUPS = (Group("x", ("x.a", "x.b"), 30, ((4, 6), (6,))), Group("y", ("y",), 3))
KEYS = KeyRing.reproducible(5, "subspace")


def paying(*events: Event, noise_mode: str = "reproducible") -> PrivacyPlan:
    return PrivacyPlan(
        num_units=3000,
        expected_batch_size=30,
        steps=3,
        delta=1e-5,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        one_shot=events,
        noise_mode=noise_mode,
    )


def batch_of(rows, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.a": (4, 6), "x.b": (6,), "y": (3,)}
    return {n: scale * torch.randn(rows, *shape, generator=generator) for n, shape in shapes.items()}


def row(gradients, i):
    return {name: value[i].double() for name, value in gradients.items()}


# --- subspaces


def test_projecting_and_lifting_is_an_orthogonal_projection():
    subspace = random_subspace(GROUPS, 8, KEYS.stream(Purpose.PROJECTION))
    assert [tuple(basis.shape) for basis in subspace.bases] == [(30, 8), (3, 3)]
    for basis in subspace.bases:
        assert_close_to_largest(basis.mT @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    batch = batch_of(5)
    reduced = subspace.project(batch)
    assert {name: tuple(value.shape) for name, value in reduced.items()} == {"x": (5, 8), "y": (5, 3)}
    lifted = subspace.lift({name: value[2] for name, value in reduced.items()})
    assert {name: value.shape for name, value in lifted.items()} == {n: v.shape[1:] for n, v in batch.items()}
    assert_close_to_largest(lifted["y"], batch["y"][2])  # nothing is lost where k = d
    again = subspace.project({name: value.unsqueeze(0) for name, value in lifted.items()})
    assert_close_to_largest(again["x"][0], reduced["x"][2], FLOAT32)
    flat = torch.cat([batch["x.a"][2].flatten(), batch["x.b"][2]])
    inside = torch.cat([lifted["x.a"].flatten(), lifted["x.b"]])
    assert_close_to_largest(flat @ inside, inside @ inside)  # what is left over is orthogonal


def test_a_random_subspace_keeps_k_of_d_of_the_energy():
    fixed, kept = batch_of(1), []
    for step in range(300):
        subspace = random_subspace(GROUPS, 6, KEYS.stream(Purpose.PROJECTION, step=step))
        kept.append(float(subspace.project(fixed)["x"].square().sum()))
    energy = sum(float(fixed[name].square().sum()) for name in ("x.a", "x.b"))
    assert np.mean(kept) == pytest.approx(energy * 6 / 30, rel=0.06)


def test_a_random_subspace_is_reproduced_and_refreshed_by_its_stream():
    one, same, next_one = (random_subspace(GROUPS, 4, KEYS.stream(Purpose.PROJECTION, step=s)) for s in (0, 0, 1))
    assert torch.equal(one.bases[0], same.bases[0])
    assert differs(one.bases[0], next_one.bases[0])


def test_clipping_and_noise_happen_in_the_reduced_coordinates():
    subspace = random_subspace(GROUPS, 2, KEYS.stream(Purpose.PROJECTION))
    plan = PrivacyPlan(
        num_units=100,
        expected_batch_size=10.0,
        steps=1,
        delta=1e-3,
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        clipping=Clipping("group"),
        allocation=Allocation("equal_budget"),
        noise_mode="reproducible",
    )
    batch, released = batch_of(1, scale=100.0), {}
    for name, part in (("with", batch), ("without", {n: v[:0] for n, v in batch.items()})):
        mechanism = Mechanism(plan, subspace.reduced_groups, KEYS)
        mechanism.accumulate(subspace.project(part))
        released[name] = mechanism.release(0).gradients
    for group in ("x", "y"):
        moved = (released["with"][group] - released["without"][group]).double() * 10.0
        assert float(moved.norm()) == pytest.approx(MARGIN / math.sqrt(2), rel=2e-3)  # saturated: C / sqrt(G)
    lifted = subspace.lift(released["with"])
    lifted_noise = torch.cat([lifted["x.a"].flatten(), lifted["x.b"]])
    noise = lifted_noise.double()
    assert_close_to_largest(subspace.bases[0] @ (subspace.bases[0].mT @ noise), lifted_noise)


def test_the_principal_subspace_holds_the_leading_directions():
    generator = torch.Generator().manual_seed(1)
    strong = torch.linalg.qr(torch.randn(30, 2, generator=generator, dtype=torch.float64)).Q
    rows = 10 * torch.randn(50, 2, generator=generator, dtype=torch.float64) @ strong.mT
    rows += 0.01 * torch.randn(50, 30, generator=generator, dtype=torch.float64)
    gradients = {"x.a": rows[:, :24].reshape(50, 4, 6), "x.b": rows[:, 24:], "y": torch.randn(50, 3)}
    basis = principal_subspace(GROUPS, gradients, 2).bases[0]
    assert_close_to_largest(basis @ (basis.mT @ strong), strong, rtol=0.02)  # noise of a thousandth
    with pytest.raises(ValueError, match="fewer than k=8"):
        principal_subspace(GROUPS, batch_of(5), 8)


def test_history_gives_a_subspace_without_new_data():
    releases = [row(batch_of(6, seed=9), i) for i in range(6)]
    history = {name: torch.stack([release[name] for release in releases]) for name in releases[0]}
    subspace = principal_subspace(GROUPS, history, 6)
    lifted = subspace.lift({name: value[3] for name, value in subspace.project(history).items()})
    assert_close_to_largest(lifted["x.a"], releases[3]["x.a"])


def test_wrong_bases_are_refused():
    with pytest.raises(ValueError, match="expected"):
        Subspace(GROUPS, (torch.zeros(29, 2), torch.zeros(3, 1)))
    with pytest.raises(ValueError, match="expected"):
        Subspace(GROUPS, (torch.zeros(30, 31), torch.zeros(3, 1)))


# --- gradient carriers

SQUARED = 1e-9
"""Normal equations square the condition of a matrix: float64, times up to ten thousand."""

MATRICES = (
    Group("x", ("x.w", "x.b"), 9 * 7 + 9, ((9, 7), (9,))),
    Group("y", ("y.w", "y.small"), 5 * 12 + 4 * 2, ((5, 12), (4, 2))),
)
CARRIED = {"x.w": (9, 7), "y.w": (5, 12)}


def matrices_of(rows, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.w": (9, 7), "x.b": (9,), "y.w": (5, 12), "y.small": (4, 2)}
    return {
        n: scale * torch.randn(rows, *shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()
    }


def carriers(rank=2, step=0, update=None):
    return gradient_carriers(MATRICES, rank, KEYS.stream(Purpose.PROJECTION, step=step), update)


@pytest.mark.parametrize("update", [None, "full", "rank one", "zero"])
def test_carriers_are_orthonormal(update):
    sums = None if update is None else row(matrices_of(1), 0)
    if update == "rank one":
        sums = {n: torch.ones_like(v) for n, v in sums.items()}
    elif update == "zero":
        sums = {n: torch.zeros_like(v) for n, v in sums.items()}
    made = carriers(update=sums)
    assert {name: (len(left), right.shape[1]) for name, (left, right) in made.pairs.items()} == CARRIED
    for left, right in made.pairs.values():
        for columns in (left, right.mT):
            assert_close_to_largest(columns.mT @ columns, torch.eye(2, dtype=torch.float64))


def test_coordinates_are_the_gradients_of_the_carriers():
    """Of the loss <G, W' + L R>, whose gradient by W is G, by autograd; and the groups have their shapes."""
    made, batch = carriers(), matrices_of(3)
    coordinates = made.project(batch)
    assert made.reduced_groups == (
        Group("x", ("x.w left", "x.w right", "x.b"), 18 + 14 + 9, ((9, 2), (2, 7), (9,))),
        Group("y", ("y.w left", "y.w right", "y.small"), 10 + 24 + 8, ((5, 2), (2, 12), (4, 2))),
    )
    for i in range(3):
        for name in CARRIED:
            left, right = (carrier.clone().requires_grad_() for carrier in made.pairs[name])
            (batch[name][i] * (left @ right)).sum().backward()
            assert_close_to_largest(coordinates[f"{name} left"][i], left.grad)
            assert_close_to_largest(coordinates[f"{name} right"][i], right.grad)
    for name in ("x.b", "y.small"):  # no matrix, and a matrix that 2 (4 + 2) coordinates would enlarge
        assert torch.equal(coordinates[name], batch[name])
    single = made.project({name: value.float() for name, value in batch.items()})
    assert {value.dtype for value in single.values()} == {torch.float32}
    assert_close_to_largest(single["x.w left"], coordinates["x.w left"])


def test_lifting_is_the_formula_of_the_paper():
    """Entry by entry in numpy, of coordinates that are no projection of anything."""
    made, generator = carriers(), torch.Generator().manual_seed(3)
    released = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for group in made.reduced_groups
        for name, shape in zip(group.parameters, group.shapes, strict=True)
    }
    lifted = made.lift(released)
    for name, (rows, columns) in CARRIED.items():
        left, right = (carrier.numpy() for carrier in made.pairs[name])
        of_left, of_right = released[f"{name} left"].numpy(), released[f"{name} right"].numpy()
        expected = np.zeros((rows, columns))
        for i in range(rows):
            for j in range(columns):
                for a in range(2):
                    expected[i, j] += of_left[i, a] * right[a, j] + left[i, a] * of_right[a, j]
                    for b in range(2):
                        inner = sum(left[k, a] * of_left[k, b] for k in range(rows))
                        expected[i, j] -= left[i, a] * inner * right[b, j]
        assert_close_to_largest(lifted[name], expected)
        assert lifted[name].dtype == torch.float32
    assert torch.equal(lifted["x.b"], released["x.b"].float())
    assert torch.equal(lifted["y.small"], released["y.small"].float())


def test_lifting_a_projected_gradient_keeps_what_touches_the_carriers():
    made, batch = carriers(), matrices_of(1, seed=4)
    lifted = made.lift(row(made.project(batch), 0))
    for name in CARRIED:
        left, right = (carrier.numpy() for carrier in made.pairs[name])
        gradient = batch[name][0].numpy()
        lost = (np.eye(len(left)) - left @ left.T) @ gradient @ (np.eye(right.shape[1]) - right.T @ right)
        assert_close_to_largest(lifted[name], gradient - lost)
        assert np.linalg.norm(lost) > 0.1
        # A gradient with its columns in L, or its rows in R, is in the span: nothing of it is lost.
        for inside in (left @ gradient[:2], gradient[:, :2] @ right):
            one = {**batch, name: torch.from_numpy(inside)[None]}
            assert_close_to_largest(made.lift(row(made.project(one), 0))[name], inside)


def test_one_power_iteration_from_the_random_carriers():
    """Column spaces by their projectors, from the normal equations in numpy; a low-rank update is found at once."""

    def span(columns):
        return columns @ np.linalg.solve(columns.T @ columns, columns.T)

    update = row(matrices_of(1, seed=5), 0)
    start, made = carriers(step=7), carriers(step=7, update=update)
    for name in CARRIED:
        matrix, (left, right) = update[name].numpy(), made.pairs[name]
        expected = span(matrix @ start.pairs[name][1].numpy().T)
        assert_close_to_largest(span(left.numpy()), expected, rtol=SQUARED)
        assert_close_to_largest(span(right.numpy().T), span(matrix.T @ left.numpy()), rtol=SQUARED)
    low = {n: v[:, :2] @ v[:2] if v.ndim == 2 else v for n, v in update.items()}
    made = carriers(update=low)
    for name in CARRIED:
        left, right = made.pairs[name]
        assert_close_to_largest(left @ left.mT @ low[name] @ right.mT @ right, low[name], rtol=SQUARED)


def test_carriers_are_reproduced_by_their_stream_and_the_update():
    update = row(matrices_of(1), 0)
    for given in (None, update):
        for one, same in zip(carriers(update=given).pairs.values(), carriers(update=given).pairs.values(), strict=True):
            assert torch.equal(one[0], same[0]) and torch.equal(one[1], same[1])
    scaled = carriers(update={n: 8.0 * v for n, v in update.items()})
    assert_close_to_largest(scaled.pairs["x.w"][0], carriers(update=update).pairs["x.w"][0])
    assert differs(carriers(step=0).pairs["x.w"][0], carriers(step=1).pairs["x.w"][0])


@pytest.mark.parametrize("clipping", ["flat", "group"])
@pytest.mark.parametrize("scale", [1e3, 0.03])
def test_one_record_moves_the_coordinates_by_the_clip_at_most(clipping, scale):
    """With and without one record at the same noise, against clipping by hand in the coordinates."""
    plan = PrivacyPlan(
        num_units=100,
        expected_batch_size=10.0,
        steps=1,
        delta=1e-3,
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        clipping=Clipping(clipping),
        noise_mode="reproducible",
    )
    made, batch, released = carriers(), matrices_of(4, scale=scale), []
    for rows in (4, 3):
        mechanism = Mechanism(plan, made.reduced_groups, KEYS)
        mechanism.accumulate(made.project({name: value[:rows] for name, value in batch.items()}))
        released.append(mechanism.release(0))
    moved = {n: 10.0 * (v - released[1].gradients[n]).double() for n, v in released[0].gradients.items()}
    coordinates = row(made.project(batch), 3)
    parts = [group.parameters for group in made.reduced_groups]
    bound, clipped_together = (1.0, [parts[0] + parts[1]]) if clipping == "flat" else (math.sqrt(0.5), parts)
    for names in clipped_together:
        norm = math.sqrt(sum(float(coordinates[name].square().sum()) for name in names))
        factor = min(1.0, bound / norm) * MARGIN
        for name in names:
            # Two releases, each on a grid of at most a thousandth of the noise.
            assert float((moved[name] - factor * coordinates[name]).abs().max()) <= 2**-10 * 0.5 * bound
        assert sum(float(moved[name].square().sum()) for name in names) <= bound**2 * (1 + 1e-3)
    assert released[0].noise_std == pytest.approx({"x": 0.05, "y": 0.05})


def test_carriers_that_do_not_fit_are_refused():
    left, right = carriers().pairs["x.w"]
    for pair in ((left[1:], right), (left, right[:, 1:]), (left[:, 1:], right)):
        with pytest.raises(ValueError, match=r"expected \(out, r\) and \(r, in\)"):
            Carriers(MATRICES, {"x.w": pair})
    with pytest.raises(ValueError, match="lower the rank"):
        carriers(rank=4)


# --- private subspaces


def test_one_record_moves_the_paid_second_moment_by_at_most_one():
    """Frobenius norm over all groups, against a loop; large, small and broken gradients."""
    for scale in (1e-3, 0.3, 1e4):
        batch = batch_of(4, scale=scale)
        whole, rest = (
            PaidSubspace(GROUPS, paying(Event(5.0, 1.0)), KEYS),
            PaidSubspace(GROUPS, paying(Event(5.0, 1.0)), KEYS),
        )
        whole.accumulate(batch)
        rest.accumulate({name: value[1:] for name, value in batch.items()})
        moved, expected = 0.0, 0.0
        for g, (one, other) in enumerate(zip(whole._sums, rest._sums, strict=True)):
            moved += float((one - other).square().sum())
            flat = torch.cat([batch[n][0].flatten() for n in GROUPS[g].parameters]).double()
            clipped = flat * min(1.0, 2**-0.25 / float(flat.norm())) * MARGIN
            expected += float(torch.outer(clipped, clipped).square().sum())
        assert moved == pytest.approx(expected, rel=1e-6)
        assert moved <= 1.0
    broken = batch_of(1)
    broken["y"][0, 0] = math.nan
    paid = PaidSubspace(GROUPS, paying(Event(5.0, 1.0)), KEYS)
    paid.accumulate(broken)
    assert all(bool((total == 0.0).all()) for total in paid._sums)


def test_a_paid_subspace_finds_the_direction_and_names_its_price():
    direction = torch.zeros(30, dtype=torch.float64)
    direction[[0, 29]] = math.sqrt(0.5)
    rows = torch.randn(3000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * direction
    paid = PaidSubspace(GROUPS, paying(Event(20.0, 0.5)), KEYS)
    paid.accumulate({"x.a": rows[:, :24].reshape(-1, 4, 6), "x.b": rows[:, 24:], "y": torch.zeros(3000, 3)})
    subspace, event = paid.release(1)
    assert event == Event(20.0, 0.5, 1)
    assert abs(float(subspace.bases[0][:, 0] @ direction)) > 0.9
    with pytest.raises(ValueError, match="released"):
        paid.release(1)
    with pytest.raises(ValueError, match="released"):
        paid.accumulate(batch_of(1))


def test_the_noise_of_a_paid_subspace_is_what_its_event_says(monkeypatch):
    """Without data the released matrix is noise of std sigma in each entry; its eigenvectors are random."""
    seen = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: seen.append(matrix) or eigh(matrix))
    PaidSubspace(GROUPS, paying(Event(5.0, 1.0)), KEYS).release(2)
    matrix = seen[0]
    assert torch.equal(matrix, matrix.mT)
    upper = matrix[tuple(torch.triu_indices(30, 30))].numpy()
    assert np.std(upper) == pytest.approx(5.0, rel=0.12)  # 465 entries: 3.7 standard errors
    assert len(seen) == 2
    assert differs(seen[0][:3, :3], seen[1])


# --- free post-processing


@pytest.mark.parametrize("name", sorted(name for name in VECTORS if name.startswith("post-gd-")))
def test_gavish_donoho(name):
    inputs = VECTORS[name]["inputs"]
    y = torch.tensor([inputs["y"]], dtype=torch.float64)
    assert float(gavish_donoho(y, inputs["beta"])) == pytest.approx(VECTORS[name]["expected"], rel=1e-9)


@pytest.mark.parametrize("tall", [False, True])
def test_shrinkage_recovers_a_low_rank_matrix(tall):
    generator = torch.Generator().manual_seed(0)
    signal = 8 * torch.randn(16, 2, generator=generator) @ torch.randn(2, 768, generator=generator) / math.sqrt(16)
    noisy = signal + torch.randn(16, 768, generator=generator)
    shrunk = shrink_singular_values(noisy.mT, 1.0).mT if tall else shrink_singular_values(noisy, 1.0)
    before, after = float((noisy - signal).norm()), float((shrunk - signal).norm())
    assert shrunk.dtype == noisy.dtype
    assert after < 0.45 * before
    assert float(shrink_singular_values(torch.randn(16, 768, generator=generator), 1.5).norm()) == 0.0


def test_adam_without_the_bias_of_the_noise():
    inputs, expected = VECTORS["post-adambc-phi"]["inputs"], VECTORS["post-adambc-phi"]["expected"]
    for std, phi in zip(inputs["s"], expected, strict=True):
        variance = (std / inputs["L"]) ** 2
        assert variance == pytest.approx(phi, rel=1e-9)
        step = adam_bc(torch.tensor([0.5, -0.5]), torch.tensor([variance + 0.25, variance / 2]), variance, 1e-4)
        assert step.tolist() == pytest.approx([1.0, -50.0], rel=1e-4)


def test_average_of_white_noise():
    beta = VECTORS["post-ema"]["inputs"]["beta"]
    noise = torch.randn(300, 2000, generator=torch.Generator().manual_seed(0))
    average = torch.zeros(2000)
    for value in noise:
        average = ema(average, value, beta)
    assert float(average.var()) == pytest.approx(VECTORS["post-ema"]["expected"], rel=0.15)


def test_james_stein_has_less_error_than_the_release():
    generator, signal = torch.Generator().manual_seed(0), torch.full((50,), 0.5)
    errors = np.zeros(2)
    for _ in range(200):
        y = signal + 2.0 * torch.randn(50, generator=generator)
        errors += [float((y - signal).square().sum()), float((james_stein(y, 2.0) - signal).square().sum())]
    assert errors[1] < 0.25 * errors[0]
    y = torch.tensor([3.0, 4.0, 0.0])
    assert james_stein(y, 2.0).tolist() == pytest.approx(((1 - 4 / 25) * y).tolist())
    assert james_stein(y, 10.0).tolist() == [0.0] * 3
    assert james_stein(y[:2], 10.0).tolist() == [3.0, 4.0]
    assert james_stein(torch.zeros(3), 1.0).tolist() == [0.0] * 3


def test_a_subspace_of_private_gradients_must_be_in_the_plan():
    with pytest.raises(ValueError, match="must be paid for"):
        PaidSubspace(GROUPS, paying(), KEYS)
    with pytest.raises(ValueError, match="train fewer parameters"):
        PaidSubspace([Group("embedding", ("embedding",), 1 << 15)], paying(Event(5.0, 1.0)), KEYS)
    with pytest.raises(ValueError, match="keys are reproducible"):
        PaidSubspace(GROUPS, paying(Event(5.0, 1.0), noise_mode="secure"), KEYS)
    assert paying(Event(5.0, 1.0)).epsilon() > paying().epsilon()
