"""A run does what its plan says: which rows, how many units, which update, and what is charged."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import optimize, stats

from dptune.config.checks import with_values
from dptune.config.schema import Config
from dptune.data.sources import load_dataset
from dptune.identity import run_id
from dptune.models import adapters
from dptune.privacy.events import Event
from dptune.privacy.mechanism import Mechanism, Release
from dptune.privacy.renyi import optimum, renyi_curve
from dptune.privacy.sampling import PoissonSampler, cap_per_user
from dptune.privacy.selection import Repetitions
from dptune.privacy.streams import KeyRing
from dptune.privacy.subspace import PaidSubspace
from dptune.records.record import RunRecord
from dptune.runs import run
from dptune.runs.search import Search
from dptune.sweeps.jobs import Job

pytestmark = pytest.mark.numerical


def changed(config: Config, **values: Any) -> Config:
    return with_values(config, [(name.replace("__", "."), value) for name, value in values.items()])


def done(config: Config) -> RunRecord:
    record = run.run(config)
    assert record.status == "done", record.error
    assert record.privacy is not None
    return record


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Epsilon of one Gaussian release of sensitivity 1, from its exact curve (Balle & Wang 2018)."""

    def excess(epsilon: float) -> float:
        upper = stats.norm.cdf(0.5 / sigma - epsilon * sigma)
        return float(upper - math.exp(epsilon) * stats.norm.cdf(-0.5 / sigma - epsilon * sigma) - delta)

    return float(optimize.brentq(excess, 0.0, 200.0))


@pytest.fixture
def config(config: Config) -> Config:
    """The noise is given: calibrating it takes longer than the run."""
    return changed(config, privacy__target_epsilon=None, privacy__noise_multiplier=1.0)


@pytest.fixture
def releases(monkeypatch: pytest.MonkeyPatch) -> list[Release]:
    """Everything that mechanisms let out."""
    seen: list[Release] = []
    release = Mechanism.release

    def noted(mechanism: Mechanism, *arguments: Any, **named: Any) -> Release:
        seen.append(release(mechanism, *arguments, **named))
        return seen[-1]

    monkeypatch.setattr(Mechanism, "release", noted)
    return seen


def test_the_optimizer_gets_what_was_released_to_the_last_bit(
    config: Config, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[torch.Tensor]] = []
    step = torch.optim.SGD.step

    def noted(optimizer: torch.optim.SGD, *arguments: Any) -> Any:
        taken.append([value.grad.clone() for group in optimizer.param_groups for value in group["params"]])
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    done(changed(config, environment__optimizer="sgd"))
    assert len(taken) == len(releases) == config.hyperparameter.steps
    for gradients, released in zip(taken, releases, strict=True):
        assert len(gradients) == len(released.gradients)
        assert all(map(torch.equal, gradients, released.gradients.values()))


def test_the_weights_move_by_the_rate_times_what_was_released(
    config: Config, releases: list[Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum and the schedule of the rate by hand, against the adapter that is saved."""
    before: list[dict[str, torch.Tensor]] = []
    trainable = adapters.trainable_parameters
    monkeypatch.setattr(
        adapters,
        "trainable_parameters",
        lambda model: before.append({n: v.detach().clone() for n, v in trainable(model).items()}) or trainable(model),
    )
    saved: list[dict[str, torch.Tensor]] = []
    save = adapters.save

    def noted(model: torch.nn.Module, folder: Path) -> None:
        saved.append({name: value.detach().clone() for name, value in trainable(model).items()})
        save(model, folder)

    monkeypatch.setattr(adapters, "save", noted)
    done(changed(config, environment__optimizer="sgd", hyperparameter__learning_rate=0.5))
    expected = {name: value.double() for name, value in before[0].items()}
    momentum = dict.fromkeys(expected, 0.0)
    # Three steps, one of them warm-up, then linearly to zero.
    for rate, released in zip((0.25, 0.5, 0.25), releases, strict=True):
        for name, gradient in released.gradients.items():
            momentum[name] = 0.9 * momentum[name] + gradient.double()
            expected[name] = expected[name] - rate * momentum[name]
    assert saved[-1].keys() == expected.keys()
    moved = max(float((expected[name] - before[0][name]).abs().max()) for name in expected)
    for name, value in saved[-1].items():
        # Rounding of float32 is a hundred-thousandth of this.
        assert float((value - expected[name]).abs().max()) < 1e-4 * moved


def test_each_step_says_how_many_units_its_batch_has(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that says one unit too many stands for a row that got lost on the way: nothing is released."""
    batch = PoissonSampler.batch
    monkeypatch.setattr(
        PoissonSampler,
        "batch",
        lambda sampler, step: dataclasses.replace(found := batch(sampler, step), num_units=found.num_units + 1),
    )
    record = run.run(config)
    assert record.status == "failed" and record.error is not None and "units, but the sum has" in record.error


def test_a_row_takes_part_once_where_the_sampler_put_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose gradient is added, step by step, are those of the batch: as many, and no unit twice."""
    drawn: list[int] = []
    added: list[int] = []
    batch, accumulate = PoissonSampler.batch, Mechanism.accumulate

    def noted_batch(sampler: PoissonSampler, step: int) -> Any:
        drawn.append((found := batch(sampler, step)).num_units)
        added.append(0)
        return found

    def noted_rows(mechanism: Mechanism, per_example: Mapping[str, torch.Tensor], units: Any = None) -> None:
        assert units is not None
        added[-1] += int((units >= 0).sum())
        accumulate(mechanism, per_example, units)

    monkeypatch.setattr(PoissonSampler, "batch", noted_batch)
    monkeypatch.setattr(Mechanism, "accumulate", noted_rows)
    done(config)
    assert len(drawn) == config.hyperparameter.steps and drawn == added and sum(drawn) > 0


def test_a_paid_subspace_sees_no_more_rows_of_a_user_than_it_is_charged_for(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = 2
    config = changed(
        config,
        privacy__unit="user_els",
        privacy__examples_per_user=cap,
        privacy__projection="private",
        privacy__projection_noise_multiplier=40.0,
        privacy__projection_dimension=4,
    )
    rows, prices = [], []
    accumulate, release = PaidSubspace.accumulate, PaidSubspace.release

    def noted(paid: PaidSubspace, per_example: Mapping[str, torch.Tensor]) -> None:
        rows.append(len(next(iter(per_example.values()))))
        accumulate(paid, per_example)

    def priced(paid: PaidSubspace, k: int) -> Any:
        found = release(paid, k)
        prices.append(found[1])
        return found

    monkeypatch.setattr(PaidSubspace, "accumulate", noted)
    monkeypatch.setattr(PaidSubspace, "release", priced)
    record = done(config)
    users = Counter(example.user for example in load_dataset(config).train)
    assert max(users.values()) > cap
    kept = sum(min(count, cap) for count in users.values())
    assert sum(rows) == kept < sum(users.values())
    assert kept == len(cap_per_user(list(users.elements()), cap, KeyRing.reproducible(0, "any")))
    assert prices == [Event(40.0, 1.0, 1, cap)]
    assert record.privacy is not None
    assert {"noise_multiplier": 40.0, "sample_rate": 1.0, "count": 1, "group_size": cap} in [
        dict(event) for event in record.privacy.plan["one_shot"]
    ]


def test_the_score_is_in_the_epsilon_of_a_run(config: Config) -> None:
    """Without a step the score is all that is released."""
    scored = changed(config, privacy__score_noise_multiplier=3.0)
    alone = done(changed(scored, hyperparameter__steps=0, hyperparameter__warmup_steps=0))
    cost = gaussian_epsilon(3.0, config.privacy.delta)
    assert cost == pytest.approx(1.3, rel=0.2)
    assert alone.privacy is not None and alone.guarantee.epsilon == pytest.approx(cost, rel=2e-3)
    assert alone.guarantee.epsilon >= cost * (1 - 1e-9)
    assert alone.privacy.score is not None


@pytest.mark.parametrize("order", [(0.8, 4.0), (4.0, 0.8)])
def test_a_search_is_charged_for_the_dearest_of_its_candidates(config: Config, order: tuple[float, float]) -> None:
    """Two candidates that differ in their noise, in either order: what the weaker noise alone would cost."""
    config = changed(config, privacy__score_noise_multiplier=60.0)
    configs = [changed(config, privacy__noise_multiplier=sigma) for sigma in order]
    jobs = tuple(Job(run_id(item), item, (), ()) for item in configs)
    search = Search(jobs, Repetitions(4.0, math.inf), None)
    curve = Repetitions(4.0, math.inf).renyi_curve(renyi_curve([Event(0.8, 0.1, 3)]))
    assert search.epsilon == pytest.approx(optimum(curve, config.privacy.delta)[0], rel=1e-9)
    assert {event.noise_multiplier for events in search.events for event in events} == {0.8, 4.0, 60.0}


def test_no_record_is_trained_on_and_judged(config: Config) -> None:
    """What a score costs rests on it (SPECIFICATION.md 8.2)."""
    data = load_dataset(config)
    splits = [data.train, data.validation, data.test]
    assert [len(split) for split in splits] == [200, 20, 40]
    for name, split in zip(("train", "validation", "test"), splits, strict=True):
        assert {example.split for example in split} == {name}
