"""The shared loop against a plain one: the same batches and noise, one backward pass an example, sums by hand."""

import math

import numpy as np
import pytest
import torch
from backbones_for_tests import tiny_llama
from numerics import assert_close_to_largest, differs

from dptune.config.schema import AdapterConfig, EnvironmentConfig, HyperparameterConfig
from dptune.data.batches import InputFormat, Ladder, collate, example_losses
from dptune.data.encoding import encode
from dptune.models import adapters
from dptune.privacy.engines import ENGINES
from dptune.privacy.mechanism import Mechanism, groups_of
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.sampling import Batch
from dptune.privacy.streams import KeyRing, Purpose
from dptune.training.loop import Batches, PrivatePath, train
from dptune.training.optimizers import IterateAverage, learning_rate_factor, make_optimizer, update
from dptune.training.projection import FullSpace, HistorySubspace

pytestmark = pytest.mark.numerical

HYPER = HyperparameterConfig(
    learning_rate=0.05,
    steps=4,
    expected_batch_size=6,
    max_grad_norm=0.5,
    rank=2,
    warmup_steps=1,
    weight_decay=0.1,
)
PLAN = PrivacyPlan(
    num_units=12,
    expected_batch_size=6,
    steps=4,
    delta=0.01,
    noise_multiplier=0.7,
    max_grad_norm=0.5,
    noise_mode="reproducible",
)
OPEN = PrivacyPlan.non_private(num_units=12, expected_batch_size=6, steps=4)
KEYS = KeyRing.reproducible(3, "run")


class Scripted:
    """A sampler with known batches, an empty one among them."""

    def batch(self, step: int) -> Batch:
        rows = np.array([[0, 3, 5, 7], [], [1, 2, 3, 4, 8, 9, 11], [6]][step], dtype=np.int64)
        return Batch(rows, np.arange(len(rows)), len(rows))


def pairs() -> list[tuple[str, str]]:
    return [
        (f"which team ? message {index} " * (1 + index % 3), ["yes", "no", "support kim"][index % 3])
        for index in range(12)
    ]


def model_and_rows(tokenizer):
    model = adapters.attach(tiny_llama().requires_grad_(False), AdapterConfig(), rank=2, steps=4, seed=1)
    return model, encode(pairs(), tokenizer, 96)


def run_shared(plan, tokenizer, *, engine: str = "opacus", physical: int = 3, **environment):
    model, rows = model_and_rows(tokenizer)
    parameters = adapters.trainable_parameters(model)
    groups = groups_of({name: value.shape for name, value in parameters.items()}, plan.grouping)
    steps = list(
        train(
            parameters,
            Batches(rows, Scripted(), Ladder(96, physical, InputFormat(pad=0)), "cpu"),
            PrivatePath(ENGINES[engine](model, example_losses), FullSpace(groups), Mechanism(plan, groups, KEYS)),
            groups=groups,
            hyperparameter=HYPER,
            environment=EnvironmentConfig(**environment),
        )
    )
    return parameters, steps


def run_by_hand(plan, tokenizer, optimizer: str):
    """Written from the formulas: flat clip, sum, noise on the sum, division by the declared batch size, optimizer."""
    model, rows = model_and_rows(tokenizer)
    parameters = adapters.trainable_parameters(model)
    dimension = sum(value.numel() for value in parameters.values())
    moments = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in parameters.items()}
    rates = [0.05 * 1 / 2, 0.05, 0.05 * 2 / 3, 0.05 * 1 / 3]
    for step in range(4):
        total = torch.zeros(dimension, dtype=torch.float64)
        for index in Scripted().batch(step).indices.tolist():
            model.zero_grad()
            example_losses(model, collate([rows[index]], InputFormat(pad=0))).sum().backward()
            gradient = torch.cat([value.grad.flatten() for value in parameters.values()]).double()
            if plan.private:
                gradient = gradient * min(1.0, 0.5 / float(gradient.norm())) / (1 + 2**-10)
            total += gradient
        if plan.private:
            noise = KEYS.stream(Purpose.NOISE, step=step, group="all").normal(dimension)
            total += 0.7 * 0.5 * torch.from_numpy(noise)
        mean = (total / 6).float()
        with torch.no_grad():
            at = 0
            for name, value in parameters.items():
                part = mean[at : at + value.numel()].reshape(value.shape)
                at += value.numel()
                first, second = moments[name]
                if optimizer == "adamw":
                    value.mul_(1 - rates[step] * 0.1)
                    first.mul_(0.9).add_(part, alpha=0.1)
                    second.mul_(0.999).add_(part * part, alpha=0.001)
                    scale = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                    value.sub_(rates[step] * first / (1 - 0.9 ** (step + 1)) / scale)
                else:
                    part = part + 0.1 * value
                    first.mul_(0.9).add_(part)
                    value.sub_(rates[step] * first)
    return parameters


def assert_moved_alike(found, expected, tokenizer) -> None:
    """Relative to how far the weights went: released sums lie on a grid of a thousandth of the noise, and Adam divides
    by a second moment, so that rounding of a tiny gradient, or its place on the grid, is a part of a whole step."""
    start = adapters.trainable_parameters(model_and_rows(tokenizer)[0])
    moves = [{name: value.detach() - start[name].detach() for name, value in of.items()} for of in (found, expected)]
    assert_close_to_largest(*moves, rtol=5e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("plan", [PLAN, OPEN], ids=["private", "non-private"])
def test_training_equals_the_plain_loop(plan, optimizer: str, tokenizer) -> None:
    shared, _ = run_shared(plan, tokenizer, optimizer=optimizer)
    by_hand = run_by_hand(plan, tokenizer, optimizer)
    assert_moved_alike(shared, by_hand, tokenizer)


def test_physical_batches_and_engines_do_not_change_the_result(tokenizer) -> None:
    reference, _ = run_shared(PLAN, tokenizer, physical=3)
    for engine, physical in (("opacus", 1), ("opacus", 50), ("loop", 4)):
        other, _ = run_shared(PLAN, tokenizer, engine=engine, physical=physical)
        assert_moved_alike(other, reference, tokenizer)


def test_the_same_run_twice_is_bit_equal(tokenizer) -> None:
    one, _ = run_shared(PLAN, tokenizer)
    two, _ = run_shared(PLAN, tokenizer)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_empty_batch_is_stepped_with_noise(tokenizer) -> None:
    _, steps = run_shared(PLAN, tokenizer)
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert steps[1].telemetry["NON_PRIVATE/batch_size"] == 0
    assert steps[1].telemetry["NON_PRIVATE/loss"] == 0
    assert steps[1].effective_noise_multiplier == pytest.approx(0.7)
    assert steps[1].noise_std["all"] == pytest.approx(0.7 * 0.5 / 6)


def test_every_trained_parameter_moves_and_no_frozen_one(tokenizer) -> None:
    model, _ = model_and_rows(tokenizer)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trained, _ = run_shared(PLAN, tokenizer)
    for name, value in before.items():
        assert name not in trained or not torch.equal(trained[name], value)
    assert all(".lora_" in name for name in trained)


def test_an_update_without_all_gradients_is_refused(tokenizer) -> None:
    parameters, _ = run_shared(OPEN, tokenizer)
    groups = groups_of({name: value.shape for name, value in parameters.items()}, "all")
    gradients = Mechanism(OPEN, groups, KEYS).release(0).gradients
    gradients.pop(next(iter(parameters)))
    with pytest.raises(ValueError, match="differ in"):
        update(parameters, gradients, dict.fromkeys(parameters, 0.0), torch.optim.SGD(parameters.values(), lr=0.1))


def test_the_learning_rate_warms_up_and_decays() -> None:
    hyper = HyperparameterConfig(steps=10, warmup_steps=2)
    factor = learning_rate_factor(hyper)
    assert [factor(step) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factor(9) == pytest.approx(1 / 8) and factor(10) == 0
    hyper.decay = "constant"
    assert learning_rate_factor(hyper)(9) == 1.0
    assert math.isclose(learning_rate_factor(hyper)(0), 1 / 3)


def test_dp_adam_bc_removes_the_noise_from_the_second_moment() -> None:
    """By hand for one coordinate over three steps with changing noise; without noise it is Adam."""
    weight = torch.nn.Parameter(torch.tensor([1.0]))
    environment = EnvironmentConfig(optimizer="dp_adam_bc", adam_bc_floor=0.1)
    optimizer = make_optimizer({"w": weight}, HyperparameterConfig(learning_rate=0.1), environment)
    m = v = phi = 0.0
    expected = 1.0
    for step, (gradient, std) in enumerate([(0.5, 0.1), (-0.2, 0.3), (0.4, 0.2)], start=1):
        weight.grad = torch.tensor([gradient])
        optimizer.set_noise({weight: std})
        optimizer.step()
        m, v, phi = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, 0.999 * phi + 0.001 * std**2
        unbias = 1 - 0.999**step
        second = max((v - phi) / unbias, 0.1 * phi / unbias)
        expected -= 0.1 * m / (1 - 0.9**step) / math.sqrt(second)
        assert weight.item() == pytest.approx(expected, rel=1e-5)
    plain, other = torch.nn.Parameter(torch.tensor([1.0])), torch.nn.Parameter(torch.tensor([1.0]))
    adam = torch.optim.Adam([plain], lr=0.1)
    corrected = make_optimizer({"w": other}, HyperparameterConfig(learning_rate=0.1), environment)
    for gradient in (0.5, -0.2, 0.4):
        plain.grad, other.grad = torch.tensor([gradient]), torch.tensor([gradient])
        corrected.set_noise({other: 0.0})
        adam.step()
        corrected.step()
    assert other.item() == pytest.approx(plain.item(), rel=1e-5)


def test_the_average_of_the_weights_is_kept(tokenizer) -> None:
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    average = IterateAverage({"w": weight}, 0.5)
    for value in (1.0, 2.0, 4.0):
        with torch.no_grad():
            weight.fill_(value)
        average.step()
    average.finish()
    assert weight.item() == pytest.approx((0.125 * 1 + 0.25 * 2 + 0.5 * 4) / 0.875)
    last, _ = run_shared(PLAN, tokenizer)
    averaged, _ = run_shared(PLAN, tokenizer, iterate_ema=0.5)
    assert any(differs(last[name], averaged[name]) for name in last)


@pytest.mark.parametrize("shrinkage", ["james_stein", "singular_value"])
def test_shrinkage_moves_released_gradients_towards_zero(shrinkage: str, tokenizer) -> None:
    plain, _ = run_shared(PLAN, tokenizer, optimizer="sgd")
    shrunk, _ = run_shared(PLAN, tokenizer, optimizer="sgd", shrinkage=shrinkage)
    start = adapters.trainable_parameters(model_and_rows(tokenizer)[0])

    def moved(trained) -> float:
        return sum(float((trained[name] - start[name]).detach().norm()) ** 2 for name in start)

    assert 0 < moved(shrunk) < moved(plain)


def test_a_history_subspace_keeps_what_was_released_and_explores() -> None:
    groups = groups_of({"w": torch.Size([6, 5])}, "matrix")
    subspace = HistorySubspace(groups, dimension=4, refresh=2, keys=KEYS)
    first = subspace.subspace
    released = [torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for step, value in enumerate(released):
        assert subspace.subspace is first
        subspace.after_step(step, {"w": value})
    basis = subspace.subspace.bases[0]
    assert basis.shape == (30, 4)
    assert_close_to_largest(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    for value in released:
        # Both past releases lie in the new subspace, which has two more directions.
        kept = basis @ (basis.T @ value.flatten().double())
        assert_close_to_largest(kept, value.flatten())
    assert subspace.lift(subspace.project({"w": value[None]}) and {"w": torch.zeros(4)})["w"].shape == (6, 5)
