"""What is computed for a claim: one number a seed from pairs of runs, and the mean over seeds with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dptune.report.intervals import Estimate, mean_over_runs
from dptune.report.pairing import Evidence, Pairs, common_seeds, rows_of
from dptune.report.results import Results
from dptune.report.tables import ACCURACY, Measure

FEWEST_CONDITIONS = 3
Effect = Callable[[Results, Evidence, Pairs], Estimate | None]
"""From pairs of runs, the effect in favour of the subject; None where they cannot tell."""


def by_seed(pairs: Pairs, value: Callable[[int], float]) -> dict[Any, float]:
    """Difference of a number, subject minus baseline: the mean over the conditions that a seed has."""
    differences: dict[Any, list[float]] = {}
    for seeds in pairs.values():
        for seed, chosen in seeds.items():
            differences.setdefault(seed, []).append(float(np.mean([value(a) - value(b) for a, b in chosen])))
    return {seed: float(np.mean(values)) for seed, values in differences.items()}


def value_of(found: Evidence, measure: Measure) -> Callable[[int], float]:
    """A measure of the run in a row."""
    return lambda row: float(found.columns[measure.key][row])


def difference(sign: float, measure: Measure) -> Effect:
    """Mean difference over seeds; its interval covers seeds and test items."""

    def effect(results: Results, found: Evidence, pairs: Pairs) -> Estimate | None:
        values = {seed: sign * value for seed, value in by_seed(pairs, value_of(found, measure)).items()}
        weights: dict[int, float] = {}
        for seeds in pairs.values():
            for seed, chosen in seeds.items():
                # The weight of each run in the mean over seeds of the mean over conditions of the mean over pairs.
                share = sign / (len(values) * sum(seed in other for other in pairs.values()) * len(chosen))
                for ours, theirs in chosen:
                    weights[ours] = weights.get(ours, 0.0) + share
                    weights[theirs] = weights.get(theirs, 0.0) - share
        items = results.test_items([str(found.columns["run_id"][row]) for row in weights])
        if items is None or measure.of is None:
            return mean_over_runs(list(values.values()))
        # `influence` takes the mean over runs: their number times the weight is the weighted sum.
        gradient = measure.of(items.accuracies()) * np.array(list(weights.values()))[:, None] * len(weights)
        variance = items.variance(items.influence(gradient))
        return mean_over_runs(list(values.values()), item_variance=variance, items=len(items.task_of))

    return effect


def efficiency(results: Results, found: Evidence, pairs: Pairs) -> Estimate | None:
    """Difference of the accuracy gained over zero-shot per thousand trainable parameters."""
    floors, sizes = found.columns.get(ACCURACY.before), found.columns.get("parameters.trainable")
    if floors is None or sizes is None or any(floors[row] is None or not sizes[row] for row in rows_of(pairs)):
        return None
    accuracy = value_of(found, ACCURACY)
    gain = {row: 1000 * (accuracy(row) - floors[row]) / sizes[row] for row in rows_of(pairs)}
    differences: dict[Any, list[float]] = {}
    for seeds in pairs.values():
        for seed, chosen in seeds.items():
            differences.setdefault(seed, []).extend(gain[a] - gain[b] for a, b in chosen)
    return mean_over_runs([float(np.mean(values)) for values in differences.values()])


def steadiness(results: Results, found: Evidence, pairs: Pairs) -> Estimate | None:
    """How much less the accuracy varies over conditions: standard deviation of the baseline minus the subject's."""
    seeds, accuracy = common_seeds(pairs), value_of(found, ACCURACY)
    if len(pairs) < FEWEST_CONDITIONS or not seeds:
        return None

    def spread(seed: Any, side: int) -> float:
        by_condition = [np.mean([accuracy(pair[side]) for pair in at[seed]]) for at in pairs.values()]
        return float(np.std(by_condition, ddof=1))

    return mean_over_runs([spread(seed, 1) - spread(seed, 0) for seed in seeds])


def saving(results: Results, found: Evidence, pairs: Pairs) -> Estimate | None:
    """Doublings of epsilon that are saved at the baseline's accuracies, with a jackknife over seeds."""
    seeds = common_seeds(pairs)
    whole = _saved(found, pairs, seeds) if len(pairs) > 1 and seeds else None
    if whole is None or len(seeds) < 2:
        return None if whole is None else mean_over_runs([whole])
    without = [_saved(found, pairs, [other for other in seeds if other != seed]) for seed in seeds]
    known = [value for value in without if value is not None]
    # Pseudo-values of the jackknife, of which the mean and its standard error are those of the saving.
    pseudo = [len(seeds) * whole - (len(seeds) - 1) * value for value in known]
    return mean_over_runs(pseudo) if len(known) == len(seeds) else None


def _saved(found: Evidence, pairs: Pairs, seeds: Sequence[Any]) -> float | None:
    """How much less log2 epsilon the subject needs for the baseline's accuracies, on the mean over some seeds."""
    ours, theirs = _curve(found, pairs, seeds, 0), _curve(found, pairs, seeds, 1)
    # The least epsilon that reaches an accuracy: only inside what was measured, never extrapolated.
    reached = np.maximum.accumulate([accuracy for _, accuracy in ours])
    inside = [(at, accuracy) for at, accuracy in theirs if reached[0] <= accuracy <= reached[-1]]
    gains = [at - float(np.interp(accuracy, reached, [at for at, _ in ours])) for at, accuracy in inside]
    return float(np.mean(gains)) if gains else None


def _curve(found: Evidence, pairs: Pairs, seeds: Sequence[Any], side: int) -> list[tuple[float, float]]:
    """Mean accuracy of the subject (side 0) or the baseline (1) over log2 of the mean epsilon, by condition."""
    points = []
    for at in pairs.values():
        rows = [pair[side] for seed in seeds for pair in at[seed]]
        epsilon = np.mean([found.columns["guarantee.epsilon"][row] for row in rows])
        points.append((math.log2(epsilon), float(np.mean([value_of(found, ACCURACY)(row) for row in rows]))))
    return sorted(points)
