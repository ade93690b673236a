"""Subspaces of the update and free post-processing: SPECIFICATION.md 5 and 6."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dptune.privacy.accounting import Event
from dptune.privacy.allocation import Group
from dptune.privacy.clipping import MARGIN
from dptune.privacy.mechanism import Mechanism
from dptune.privacy.plan import Allocation, Clipping, PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose
from dptune.privacy.subspace import (
    PaidSubspace,
    Subspace,
    adam_bc,
    ema,
    gavish_donoho,
    james_stein,
    principal_subspace,
    random_subspace,
    shrink_singular_values,
)

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
        assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-12)
    batch = batch_of(5)
    reduced = subspace.project(batch)
    assert {name: tuple(value.shape) for name, value in reduced.items()} == {"x": (5, 8), "y": (5, 3)}
    lifted = subspace.lift({name: value[2] for name, value in reduced.items()})
    assert {name: value.shape for name, value in lifted.items()} == {n: v.shape[1:] for n, v in batch.items()}
    assert torch.allclose(lifted["y"], batch["y"][2], atol=1e-6)  # nothing is lost where k = d
    again = subspace.project({name: value.unsqueeze(0) for name, value in lifted.items()})
    assert torch.allclose(again["x"][0], reduced["x"][2], atol=1e-6)
    flat = torch.cat([batch["x.a"][2].flatten(), batch["x.b"][2]])
    inside = torch.cat([lifted["x.a"].flatten(), lifted["x.b"]])
    assert float((flat - inside) @ inside) == pytest.approx(0.0, abs=1e-5)


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
    assert not torch.allclose(one.bases[0], next_one.bases[0])


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
    noise = torch.cat([lifted["x.a"].flatten(), lifted["x.b"]]).double()
    assert torch.allclose(noise, subspace.bases[0] @ (subspace.bases[0].mT @ noise), atol=1e-6)


def test_the_principal_subspace_holds_the_leading_directions():
    generator = torch.Generator().manual_seed(1)
    strong = torch.linalg.qr(torch.randn(30, 2, generator=generator, dtype=torch.float64)).Q
    rows = 10 * torch.randn(50, 2, generator=generator, dtype=torch.float64) @ strong.mT
    rows += 0.01 * torch.randn(50, 30, generator=generator, dtype=torch.float64)
    gradients = {"x.a": rows[:, :24].reshape(50, 4, 6), "x.b": rows[:, 24:], "y": torch.randn(50, 3)}
    basis = principal_subspace(GROUPS, gradients, 2).bases[0]
    assert torch.allclose(basis @ (basis.mT @ strong), strong, atol=1e-2)
    with pytest.raises(ValueError, match="fewer than k=8"):
        principal_subspace(GROUPS, batch_of(5), 8)


def test_history_gives_a_subspace_without_new_data():
    releases = [row(batch_of(6, seed=9), i) for i in range(6)]
    history = {name: torch.stack([release[name] for release in releases]) for name in releases[0]}
    subspace = principal_subspace(GROUPS, history, 6)
    lifted = subspace.lift({name: value[3] for name, value in subspace.project(history).items()})
    assert torch.allclose(lifted["x.a"], releases[3]["x.a"].float(), atol=1e-5)


def test_wrong_bases_are_refused():
    with pytest.raises(ValueError, match="expected"):
        Subspace(GROUPS, (torch.zeros(29, 2), torch.zeros(3, 1)))
    with pytest.raises(ValueError, match="expected"):
        Subspace(GROUPS, (torch.zeros(30, 31), torch.zeros(3, 1)))


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
    assert not torch.allclose(seen[0][:3, :3], seen[1])


# --- free post-processing


@pytest.mark.parametrize("name", sorted(name for name in VECTORS if name.startswith("post-gd-")))
def test_gavish_donoho(name):
    inputs = VECTORS[name]["inputs"]
    y = torch.tensor([inputs["y"]], dtype=torch.float64)
    assert float(gavish_donoho(y, inputs["beta"])) == pytest.approx(VECTORS[name]["expected"], abs=1e-9)


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
        assert variance == pytest.approx(phi, abs=1e-12)
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
    with pytest.raises(ValueError, match="keys are reproducible"):
        PaidSubspace(GROUPS, paying(Event(5.0, 1.0), noise_mode="secure"), KEYS)
    assert paying(Event(5.0, 1.0)).epsilon() > paying().epsilon()
