import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report.planted import config, plant

from dptune.report.intervals import Answers, holm, mean_over_runs, wilson
from dptune.report.results import load_results
from dptune.report.settings import settings_of
from dptune.report.tables import ACCURACY, SPREAD, WORST, estimate, paired


def test_wilson_against_its_published_form() -> None:
    # Brown, Cai, DasGupta (2001): 0 of n has the upper limit z^2 / (n + z^2).
    low, high = wilson(0.0, 20)
    assert low == 0.0 and high == pytest.approx(1.959964**2 / (20 + 1.959964**2))
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


def test_without_items_the_interval_over_runs_is_students() -> None:
    # Three values with standard deviation 0.1: half width 4.302653 * 0.1 / sqrt(3).
    found = mean_over_runs([0.4, 0.5, 0.6])
    assert (found.low, found.high) == pytest.approx((0.5 - 4.302653 * 0.1 / 3**0.5, 0.5 + 4.302653 * 0.1 / 3**0.5))
    # t = 0.5 / (0.1 / sqrt(3)) = 8.660 with two degrees of freedom.
    assert found.p == pytest.approx(0.01307, abs=1e-5)


def test_items_never_make_an_interval_narrower() -> None:
    alone = mean_over_runs([0.4, 0.5, 0.6])
    both = mean_over_runs([0.4, 0.5, 0.6], item_variance=1e-4, items=800)
    assert both.low is not None and alone.low is not None and both.low <= alone.low


@pytest.mark.parametrize("measure", [ACCURACY, WORST, SPREAD])
def test_the_variance_over_items_is_the_bootstraps(measure) -> None:
    """Against 20,000 bootstrap draws of the items within each task, which all runs share."""
    random = np.random.default_rng(0)
    task_of = np.repeat([0, 1, 2], [200, 300, 250])
    chance = np.array([0.3, 0.6, 0.9])[task_of]
    hard = random.normal(0, 0.1, len(task_of))
    correct = (random.random((4, len(task_of))) < np.clip(chance + hard, 0, 1)).astype(float)
    items = Answers(("a", "b", "c"), task_of, correct)
    assert measure.of is not None
    claimed = items.variance(items.influence(measure.of(items.accuracies())))

    statistic = {ACCURACY: lambda x: x.mean(-1), WORST: lambda x: x.min(-1), SPREAD: lambda x: x.std(-1)}[measure]
    draws = np.empty((20_000, 4, 3))
    for task in range(3):
        part = correct[:, task_of == task]
        draws[:, :, task] = random.multinomial(part.shape[1], [1 / part.shape[1]] * part.shape[1], 20_000) @ part.T
        draws[:, :, task] /= part.shape[1]
    assert claimed == pytest.approx(statistic(draws).mean(axis=1).var(), rel=0.05)


def test_intervals_cover_what_they_promise() -> None:
    """Seeds and items drawn from a model with a known mean: at least 93 of 100 intervals hold it."""
    random = np.random.default_rng(1)
    tasks, covered, rounds = np.repeat([0, 1], 100), 0, 400
    for _ in range(rounds):
        easy = random.normal(0, 0.15, 200)
        seeds = random.normal(0, 0.03, 3)[:, None]
        correct = (random.random((3, 200)) < np.clip(0.6 + easy + seeds, 0, 1)).astype(float)
        items = Answers(("a", "b"), tasks, correct)
        accuracies = items.accuracies()
        variance = items.variance(items.influence(np.full_like(accuracies, 0.5)))
        found = mean_over_runs(accuracies.mean(axis=1).tolist(), item_variance=variance, items=200)
        assert found.low is not None and found.high is not None
        covered += found.low <= 0.6 <= found.high
    assert covered / rounds >= 0.93


def test_cells_can_be_computed_from_the_files_with_pandas_alone(tmp_path: Path) -> None:
    for seed, (a, b) in enumerate([(0.5, 0.6), (0.6, 0.5), (0.55, 0.7)]):
        plant(tmp_path, config("uniform", seed), a, b)
    results = load_results(tmp_path)
    (setting,) = settings_of(results.runs)
    found = estimate(setting, ACCURACY, results.test_items(setting.run_ids))
    assert found is not None

    frames = []
    for path in tmp_path.glob("*/evaluation.jsonl"):
        frame = pd.read_json(path, lines=True).assign(run=path.parent.name).reset_index(names="item")
        frames.append(frame)
    items = pd.concat(frames)
    by_run = items.groupby(["run", "task"])["correct"].mean().groupby("run").mean()
    assert found.mean == pytest.approx(by_run.mean())
    over_items = items.groupby(["task", "item"])["correct"].mean().groupby("task").agg(["var", "count"])
    n = over_items["count"]
    item_variance = ((over_items["var"] * (n - 1) / n) / n / 2**2).sum()
    error = math.sqrt(by_run.var() / 3 + item_variance)
    assert found.high is not None and (found.high - found.mean) / error > 1.9
    degrees = error**4 / ((by_run.var() / 3) ** 2 / 2 + item_variance**2 / 59)
    from scipy.stats import t

    assert found.high == pytest.approx(found.mean + t.ppf(0.975, degrees) * error)


def test_a_paired_difference_is_by_seed_and_item(tmp_path: Path) -> None:
    for seed in range(3):
        plant(tmp_path, config("uniform", seed), 0.5, 0.5)
        plant(tmp_path, config("adaptive", seed), 0.6 + 0.1 * seed, 0.5)
    results = load_results(tmp_path)
    adaptive, uniform = sorted(settings_of(results.runs), key=lambda item: item.arm)
    found, run_ids = paired(results, adaptive, uniform)
    # Differences of accuracy 0.05, 0.10 and 0.15; half of them come from task a only.
    assert found.mean == pytest.approx(0.1) and found.n == 3 and len(run_ids) == 6
    flipped, _ = paired(results, uniform, adaptive)
    assert flipped.mean == pytest.approx(-0.1)
    assert flipped.low is not None and found.high is not None and flipped.low == pytest.approx(-found.high)


def test_holm_against_a_worked_example() -> None:
    # Holm (1979): 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, made monotone.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_items_that_contradict_their_record_are_not_used(tmp_path: Path) -> None:
    record = plant(tmp_path, config(), 0.5, 0.5)
    path = tmp_path / record.run_id / "evaluation.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**line, "correct": True}) for line in lines))
    results = load_results(tmp_path)
    assert not results.correct and "does not agree" in results.unreadable[0] and str(path) in results.unreadable[0]
