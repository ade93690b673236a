"""The claims of arXiv:2512.06711 as tests on records.

The paper's own numbers are not available; what is tested is what its abstract claims, on the runs that are there. The
method under test is `dptune` (LoRA with adaptive noise); it is held against the strongest baseline, the one that leaves
it the smallest advantage. Seeds are the unit of replication: an effect is one number a seed, paired with the baseline's
run of the same seed on the same data. Over the claims that can be tested, p-values are corrected after Holm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dptune.config.schema import EMBEDDED_DATA
from dptune.report.intervals import Estimate, holm, mean_over_runs, t_quantile
from dptune.report.pairing import Evidence, Key, Pairs, evidence, groups
from dptune.report.results import Results
from dptune.report.tables import ACCURACY, NONE, SPREAD, Cell, Column, Measure, Table, cells_of

Verdict = Literal["supported", "not supported", "undecided"]
LEVEL, FEWEST_SEEDS, FEWEST_CONDITIONS = 0.05, 3, 3
MATTERS = 0.01
"""Smallest difference of accuracy, or of its spread, that is worth having."""


@dataclass(frozen=True)
class Contrast:
    """The subject against one baseline, in one group of comparable runs."""

    baseline: str
    where: str
    effect: Estimate
    run_ids: tuple[str, ...]
    accuracy: float
    """Mean difference of accuracy over the same runs."""


@dataclass(frozen=True)
class Claim:
    """One claim and what the records say of it."""

    number: int
    text: str
    unit: str
    """Unit of the effect; positive is in favour of the claim."""
    how: str
    """What is computed, in a sentence."""
    verdict: Verdict
    reason: str
    """Why, with the numbers."""
    decide: str
    """What would decide it; empty if decided."""
    contrast: Contrast | None = None
    """The deciding contrast: the strongest baseline where most runs are."""
    contrasts: tuple[Contrast, ...] = ()
    """All of them, never pooled over data, deltas, units or noise modes."""
    p: float | None = None
    """P-value, corrected after Holm."""


@dataclass(frozen=True)
class _Test:
    number: int
    text: str
    unit: str
    how: str
    held: tuple[str, ...]
    """Parts of the config that are equal within a group."""
    condition: str
    """Part of the config that takes several values within a group."""
    effect: Callable[[Results, Evidence, Pairs], Estimate | None]
    needs: str
    """What a sweep must hold for a test."""
    matters: float = MATTERS
    guarded: bool = False
    """Evenness that costs accuracy does not count."""


def claims(results: Results) -> list[Claim]:
    """All claims, each with its verdict."""
    found = evidence(results) if len(results.runs) else None
    tested = [_examined(test, results, found) for test in TESTS]
    able = [at for at, claim in enumerate(tested) if claim.p is not None]
    for at, p in zip(able, holm([tested[at].p or 0.0 for at in able]), strict=True):
        tested[at] = _judged(replace(tested[at], p=p), TESTS[at])
    return tested


def _of_contrast(cell: Callable[[Claim, Contrast], Cell]) -> Callable[[Claim], Cell | None]:
    return lambda claim: None if claim.contrast is None else cell(claim, claim.contrast)


def _effect_cell(claim: Claim, contrast: Contrast) -> Cell:
    effect = contrast.effect
    interval = "" if effect.low is None else f" [{effect.low:+.3g}, {effect.high:+.3g}]"
    text = f"{effect.mean:+.3g}{interval} ({effect.n})"
    return Cell(text, effect.mean, effect.low, effect.high, effect.n, contrast.run_ids)


COLUMNS = (
    Column("claim", "claim", "", lambda claim: Cell(f"{claim.number}. {claim.text}")),
    Column("verdict", "verdict", "", lambda claim: Cell(claim.verdict)),
    Column("effect", "effect [95 %] (seeds)", "", _of_contrast(_effect_cell)),
    Column("unit", "unit", "", _of_contrast(lambda claim, _: Cell(claim.unit))),
    Column(
        "p",
        "p (Holm)",
        "",
        _of_contrast(lambda claim, _: Cell(f"{claim.p:.3g}" if claim.p is not None else NONE, claim.p)),
    ),
    Column(
        "runs",
        "runs",
        "",
        _of_contrast(lambda _, item: Cell(str(len(item.run_ids)), len(item.run_ids), run_ids=item.run_ids)),
    ),
    Column(
        "why",
        "why, and what would decide it",
        "",
        lambda claim: Cell(claim.reason + (f" To decide: {claim.decide}" if claim.decide else "")),
    ),
)


def claims_table(found: Sequence[Claim]) -> Table:
    """The claims as a table."""
    notes = (
        "Claims of arXiv:2512.06711 by its abstract, tested on the records here; no number is the paper's.",
        "Effect: positive is in favour of the claim; against the strongest baseline, paired by seed. Supported: "
        f"p below {LEVEL} after Holm. Not supported: with 95 % confidence (one-sided) the effect is negative or below "
        f"what matters ({MATTERS} of accuracy). Undecided: anything else, and fewer than {FEWEST_SEEDS} seeds.",
    )
    return Table("claims", "Claims", COLUMNS, tuple(cells_of(COLUMNS, claim) for claim in found), notes)


def _examined(test: _Test, results: Results, found: Evidence | None) -> Claim:
    """A claim with its contrasts and the uncorrected p-value of the deciding one."""
    claim = Claim(test.number, test.text, test.unit, test.how, "undecided", "", test.needs)
    if found is None or found.subject is None:
        return replace(claim, reason="The method under test (dptune: LoRA with adaptive noise) was not run.")
    by_group: list[list[Contrast]] = []
    for baselines in groups(found, test.held, test.condition).values():
        contrasts = [_contrast(test, results, found, key, pairs) for key, pairs in baselines.items()]
        if known := [item for item in contrasts if item is not None]:
            by_group.append(known)
    if not by_group:
        return replace(claim, reason="No runs that can be compared: they are missing, or differ in more than this.")
    # Baselines with enough seeds first; of those the strongest; of groups the one with most seeds, then most runs.
    chosen = [min(group, key=lambda c: (c.effect.n < FEWEST_SEEDS, c.effect.mean)) for group in by_group]
    contrast = max(chosen, key=lambda c: (min(c.effect.n, FEWEST_SEEDS), len(c.run_ids)))
    every = tuple(item for group in by_group for item in group)
    claim = replace(claim, contrast=contrast, contrasts=every)
    if contrast.effect.n < FEWEST_SEEDS:
        return replace(claim, reason=f"{contrast.effect.n} seed(s) in common; {FEWEST_SEEDS} are the fewest.")
    p = contrast.effect.p
    # Without any spread over seeds there is no test; an effect of exactly zero is none.
    return replace(claim, p=p if p is not None else (1.0 if contrast.effect.mean == 0 else 0.0))


def _judged(claim: Claim, test: _Test) -> Claim:
    """The verdict, given the corrected p-value."""
    contrast, p = claim.contrast, claim.p
    assert contrast is not None and p is not None
    effect = contrast.effect
    low, high = (effect.mean, effect.mean) if effect.low is None or effect.high is None else (effect.low, effect.high)
    said = f"{effect.mean:+.3g} [{low:+.3g}, {high:+.3g}] {test.unit} against {contrast.baseline} ({contrast.where})"
    if test.guarded and effect.mean > 0 and contrast.accuracy < -MATTERS:
        reason = f"{said}, but its accuracy is {-contrast.accuracy:.3f} lower, which makes anything more even."
        return replace(claim, verdict="undecided", reason=reason, decide="the same at equal accuracy")
    if effect.mean > 0 and p < LEVEL:
        return replace(claim, verdict="supported", reason=f"{said}.", decide="")
    error = (high - low) / 2 / t_quantile(effect.n - 1)
    if effect.mean + t_quantile(effect.n - 1, 0.95) * error <= test.matters:
        words = "the records contradict it" if high < 0 else "no effect, or one too small to matter"
        return replace(claim, verdict="not supported", reason=f"{said}: {words}.", decide="")
    if effect.mean <= 0:
        reason = f"{said}: no sign of it, but too few seeds to rule it out."
        return replace(claim, verdict="undecided", reason=reason, decide=f"more seeds than {effect.n}")
    # A power of 80 % at the level that Holm's correction leaves to the smallest of seven p-values.
    wanted = max(effect.n + 1, math.ceil(effect.n * (3.5 * error / effect.mean) ** 2))
    seeds = f"about {wanted} seeds" if wanted <= 200 else "more seeds than are sensible"
    decide = f"{seeds} instead of {effect.n}, if the effect is as large as it seems"
    return replace(claim, verdict="undecided", reason=f"{said}: could be chance.", decide=decide)


def _contrast(test: _Test, results: Results, found: Evidence, baseline: Key, pairs: Pairs) -> Contrast | None:
    effect = test.effect(results, found, pairs)
    if effect is None:
        return None
    rows = [row for seeds in pairs.values() for chosen in seeds.values() for pair in chosen for row in pair]
    ids = tuple(dict.fromkeys(str(found.columns["run_id"][row]) for row in rows))
    accuracy = _by_seed(found, pairs, ACCURACY)
    return Contrast(
        found.names[baseline], _where(found, test, pairs), effect, ids, float(np.mean(list(accuracy.values())))
    )


def _where(found: Evidence, test: _Test, pairs: Pairs) -> str:
    """The group of a contrast, for people."""
    columns = found.columns
    rows = [pair[0] for seeds in pairs.values() for chosen in seeds.values() for pair in chosen]
    spent = {float(columns["privacy.target_epsilon"][row] or columns["privacy.epsilon"][row]) for row in rows}
    data = columns["config.data.name"][rows[0]]
    if (variant := EMBEDDED_DATA.get(data)) and f"config.data.{variant}" in columns:
        data = f"{data}, {columns[f'config.data.{variant}'][rows[0]]} {variant}"
    many = f", {len(pairs)} conditions" if test.condition != "target" else ""
    return f"ε {', '.join(f'{value:g}' for value in sorted(spent))}{many}, {data}"


def _by_seed(found: Evidence, pairs: Pairs, measure: Measure) -> dict[Any, float]:
    """Difference of a measure, subject minus baseline: the mean over the conditions that a seed has."""
    differences: dict[Any, list[float]] = {}
    for seeds in pairs.values():
        for seed, chosen in seeds.items():
            values = [_value(found, a, measure) - _value(found, b, measure) for a, b in chosen]
            differences.setdefault(seed, []).append(float(np.mean(values)))
    return {seed: float(np.mean(values)) for seed, values in differences.items()}


def _value(found: Evidence, row: int, measure: Measure) -> float:
    return float(found.columns[measure.key][row])


def _difference(sign: float, measure: Measure) -> Callable[[Results, Evidence, Pairs], Estimate | None]:
    """Mean difference over seeds; its interval covers seeds and test items."""

    def effect(results: Results, found: Evidence, pairs: Pairs) -> Estimate | None:
        by_seed = {seed: sign * value for seed, value in _by_seed(found, pairs, measure).items()}
        weights: dict[int, float] = {}
        for seeds in pairs.values():
            for seed, chosen in seeds.items():
                share = sign / (len(by_seed) * sum(seed in other for other in pairs.values()) * len(chosen))
                for ours, theirs in chosen:
                    weights[ours] = weights.get(ours, 0.0) + share
                    weights[theirs] = weights.get(theirs, 0.0) - share
        items = results.judgements([str(found.columns["run_id"][row]) for row in weights])
        if items is None or measure.of is None:
            return mean_over_runs(list(by_seed.values()))
        # `influence` takes the mean over runs: their number times the weight is the weighted sum.
        gradient = measure.of(items.accuracies()) * np.array(list(weights.values()))[:, None] * len(weights)
        variance = items.variance(items.influence(gradient))
        return mean_over_runs(list(by_seed.values()), item_variance=variance, items=len(items.task_of))

    return effect


def _efficiency(results: Results, found: Evidence, pairs: Pairs) -> Estimate | None:
    """Difference of the accuracy gained over zero-shot per thousand trainable parameters."""
    if "zero_shot.accuracy" not in found.columns or "parameters.trainable" not in found.columns:
        return None

    def gain(row: int) -> float:
        floor = found.columns["zero_shot.accuracy"][row]
        trained = found.columns["parameters.trainable"][row]
        return math.nan if floor is None or not trained else 1000 * (_value(found, row, ACCURACY) - floor) / trained

    differences: dict[Any, list[float]] = {}
    for seeds in pairs.values():
        for seed, chosen in seeds.items():
            differences.setdefault(seed, []).extend(gain(a) - gain(b) for a, b in chosen)
    means = [float(np.mean(values)) for values in differences.values()]
    return None if any(math.isnan(value) for value in means) else mean_over_runs(means)


def _steadiness(results: Results, found: Evidence, pairs: Pairs) -> Estimate | None:
    """How much less the accuracy varies over conditions: standard deviation of the baseline minus the subject's."""
    seeds = [seed for seed in next(iter(pairs.values())) if all(seed in other for other in pairs.values())]
    if len(pairs) < FEWEST_CONDITIONS or not seeds:
        return None

    def spread(seed: Any, side: int) -> float:
        by_condition = [np.mean([_value(found, pair[side], ACCURACY) for pair in at[seed]]) for at in pairs.values()]
        return float(np.std(by_condition, ddof=1))

    return mean_over_runs([spread(seed, 1) - spread(seed, 0) for seed in seeds])


def _saving(results: Results, found: Evidence, pairs: Pairs) -> Estimate | None:
    """Doublings of epsilon that are saved at the baseline's accuracies, with a jackknife over seeds."""
    seeds = [seed for seed in next(iter(pairs.values())) if all(seed in other for other in pairs.values())]
    if len(pairs) < 2 or not seeds:
        return None

    def curve(side: int, chosen: Sequence[Any]) -> tuple[list[float], list[float]]:
        points = []
        for at in pairs.values():
            rows = [pair[side] for seed in chosen for pair in at[seed]]
            epsilon = np.mean([found.columns["privacy.epsilon"][row] for row in rows])
            points.append((math.log2(epsilon), float(np.mean([_value(found, row, ACCURACY) for row in rows]))))
        points.sort()
        return [at for at, _ in points], [accuracy for _, accuracy in points]

    def saved(chosen: Sequence[Any]) -> float | None:
        ours, theirs = curve(0, chosen), curve(1, chosen)
        # The least epsilon that reaches an accuracy: only inside what was measured, never extrapolated.
        reached = np.maximum.accumulate(ours[1])
        inside = [(e, a) for e, a in zip(*theirs, strict=True) if reached[0] <= a <= reached[-1]]
        gains = [e - float(np.interp(a, reached, ours[0])) for e, a in inside]
        return float(np.mean(gains)) if gains else None

    whole = saved(seeds)
    if whole is None:
        return None
    if len(seeds) < 2:
        return mean_over_runs([whole])
    without = [saved([other for other in seeds if other != seed]) for seed in seeds]
    if any(value is None for value in without):
        return None
    return mean_over_runs([len(seeds) * whole - (len(seeds) - 1) * float(value or 0.0) for value in without])


TESTS: Sequence[_Test] = (
    _Test(
        1,
        "Higher accuracy than the baselines at equal epsilon",
        "accuracy",
        "Accuracy minus the baseline's at the same target epsilon, by seed; mean over the epsilons.",
        ("data", "environment"),
        "target",
        _difference(1.0, ACCURACY),
        f"at least {FEWEST_SEEDS} common seeds of the method and a baseline: `make sweep SWEEP=allocation`",
    ),
    _Test(
        2,
        "Less privacy budget at equal accuracy",
        "doublings of ε saved",
        "Where the method's curve of accuracy over log2 epsilon reaches each accuracy of the baseline.",
        ("data", "environment"),
        "target",
        _saving,
        "curves that overlap, of two or more epsilons each: `make sweep SWEEP=hyperparameter/target_epsilon`",
        matters=0.0,
    ),
    _Test(
        3,
        "More accuracy per trainable parameter",
        "accuracy gained per 1,000 parameters",
        "Accuracy above zero-shot over thousands of trainable parameters, minus the baseline's, by seed.",
        ("data", "environment"),
        "target",
        _efficiency,
        f"at least {FEWEST_SEEDS} common seeds of methods that train different numbers of parameters",
        matters=0.0,
    ),
    _Test(
        4,
        "More stable under hyperparameter settings",
        "accuracy (standard deviation over conditions)",
        "Standard deviation of accuracy over shared settings: the baseline's minus the method's, by seed.",
        ("data", "environment", "target"),
        "hyperparameter",
        _steadiness,
        "three or more settings of both, at equal epsilon: `make sweep SWEEP=hyperparameter/learning_rate`",
        guarded=True,
    ),
    _Test(
        5,
        "More stable under conditions of the environment",
        "accuracy (standard deviation over conditions)",
        "Standard deviation of accuracy over shared environments: the baseline's minus the method's, by seed.",
        ("data", "target"),
        "environment",
        _steadiness,
        "three or more environments of both, at equal epsilon: `make sweep SWEEP=environment/sequence_length`",
        guarded=True,
    ),
    _Test(
        6,
        "More stable under conditions of the data",
        "accuracy (standard deviation over conditions)",
        "Standard deviation of accuracy over shared data conditions: the baseline's minus the method's, by seed.",
        ("environment", "target"),
        "data",
        _steadiness,
        "three or more conditions of both, at equal epsilon: `make sweep SWEEP=data_sensitivity/label_noise`",
        guarded=True,
    ),
    _Test(
        7,
        "More even over tasks",
        "accuracy (standard deviation over tasks)",
        "Standard deviation of accuracy over tasks: the baseline's minus the method's at the same epsilon, by seed.",
        ("data", "environment"),
        "target",
        _difference(-1.0, SPREAD),
        f"at least {FEWEST_SEEDS} common seeds of the method and a baseline: `make sweep SWEEP=allocation`",
        guarded=True,
    ),
)
