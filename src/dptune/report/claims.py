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
from typing import Literal

import numpy as np

from dptune.config.schema import EMBEDDED_DATA
from dptune.report.effects import Effect, by_seed, difference, efficiency, saving, steadiness, value_of
from dptune.report.intervals import Estimate, holm, t_quantile
from dptune.report.pairing import Evidence, Key, Pairs, evidence, groups, rows_of
from dptune.report.results import Results
from dptune.report.tables import ACCURACY, NONE, SPREAD, Cell, Column, Table, cells_of

Verdict = Literal["supported", "not supported", "undecided"]
LEVEL, FEWEST_SEEDS = 0.05, 3
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
    effect: Effect
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
        tested[at] = _verdict(replace(tested[at], p=p), TESTS[at])
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
    contrast = _deciding(by_group)
    claim = replace(claim, contrast=contrast, contrasts=tuple(item for group in by_group for item in group))
    if contrast.effect.n < FEWEST_SEEDS:
        return replace(claim, reason=f"{contrast.effect.n} seed(s) in common; {FEWEST_SEEDS} are the fewest.")
    p = contrast.effect.p
    # Without any spread over seeds there is no test; an effect of exactly zero is none.
    return replace(claim, p=p if p is not None else (1.0 if contrast.effect.mean == 0 else 0.0))


def _deciding(by_group: Sequence[Sequence[Contrast]]) -> Contrast:
    """The strongest baseline of each group, if it can be one with enough seeds; of groups the one with most of them."""
    chosen = [min(group, key=lambda c: (c.effect.n < FEWEST_SEEDS, c.effect.mean)) for group in by_group]
    return max(chosen, key=lambda c: (min(c.effect.n, FEWEST_SEEDS), len(c.run_ids)))


def _verdict(claim: Claim, test: _Test) -> Claim:
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
    ids = tuple(dict.fromkeys(str(found.columns["run_id"][row]) for row in rows_of(pairs)))
    accuracy = float(np.mean(list(by_seed(pairs, value_of(found, ACCURACY)).values())))
    return Contrast(found.names[baseline], _where(found, test, pairs), effect, ids, accuracy)


def _where(found: Evidence, test: _Test, pairs: Pairs) -> str:
    """The group of a contrast, for people."""
    columns, rows = found.columns, list(rows_of(pairs))[::2]  # Those of the subject.
    spent = {float(columns["privacy.target_epsilon"][row] or columns["guarantee.epsilon"][row]) for row in rows}
    data = columns["config.data.name"][rows[0]]
    if (variant := EMBEDDED_DATA.get(data)) and f"config.data.{variant}" in columns:
        data = f"{data}, {columns[f'config.data.{variant}'][rows[0]]} {variant}"
    many = f", {len(pairs)} conditions" if test.condition != "target" else ""
    return f"ε {', '.join(f'{value:g}' for value in sorted(spent))}{many}, {data}"


TESTS: Sequence[_Test] = (
    _Test(
        1,
        "Higher accuracy than the baselines at equal epsilon",
        "accuracy",
        "Accuracy minus the baseline's at the same target epsilon, by seed; mean over the epsilons.",
        ("data", "environment"),
        "target",
        difference(1.0, ACCURACY),
        f"at least {FEWEST_SEEDS} common seeds of the method and a baseline: `make sweep SWEEP=allocation`",
    ),
    _Test(
        2,
        "Less privacy budget at equal accuracy",
        "doublings of ε saved",
        "Where the method's curve of accuracy over log2 epsilon reaches each accuracy of the baseline.",
        ("data", "environment"),
        "target",
        saving,
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
        efficiency,
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
        steadiness,
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
        steadiness,
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
        steadiness,
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
        difference(-1.0, SPREAD),
        f"at least {FEWEST_SEEDS} common seeds of the method and a baseline: `make sweep SWEEP=allocation`",
        guarded=True,
    ),
)
