"""Configurations of somebody who wants an epsilon that is not true: each is refused in one line, or accounted rightly.

One table. A row is a config, as overrides of a small run, and what must come of it. What is accounted is compared with
an epsilon that is computed here, from the numbers of the row, by a convolution of privacy losses that shares no code
with the accountant, and the sampler of the plan is asked for its rate. Nothing is trained.

A second table is what such a person does with folders, files and accounts of runs, one thing after the other.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import math
import os
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import signal, special, stats

from dptune.config.checks import strict, with_values
from dptune.config.schema import Config, ConfigError, noise_mode
from dptune.data.sources import load_dataset
from dptune.identity import run_id
from dptune.privacy.budget import Spending
from dptune.privacy.events import Event
from dptune.privacy.selection import Repetitions
from dptune.privacy.streams import KeyRing
from dptune.runs.budget import ACCOUNT_FILE, TOKEN_FILE, accounts_of, book, home, mark_begun, mark_done
from dptune.runs.privacy import make_plan
from dptune.runs.search import Search
from dptune.sweeps.jobs import Job

# --- what is expected


@dataclass(frozen=True)
class Refused:
    """A `ConfigError` of one line with this in it, before a model is loaded."""

    fragment: str


@dataclass(frozen=True)
class Accounted:
    """Epsilon of `steps` releases of the same mechanism, and what is special.

    Attributes:
        rate: probability that a unit (ELS: a row) is in a batch.
        sigma: noise multiplier where it is given; None: it is calibrated to `target`, and taken from the plan.
        steps: number of steps.
        group: rows of one unit, each sampled on its own.
        factors: of the noise multiplier from step to step; None: all 1.
        beside: noise multiplier and group size of a one-shot release.
        target: what epsilon must not exceed.
        mode: of the noise.
    """

    rate: float = 0.1
    sigma: float | None = 1.0
    steps: int = 10
    group: int = 1
    factors: Callable[[float], float] | None = None
    beside: tuple[float, int] | None = None
    target: float = math.inf
    mode: str | None = None


@dataclass(frozen=True)
class NonPrivate:
    """Trained without an epsilon: it is infinite, and no accountant is asked."""


@dataclass(frozen=True)
class Searched:
    """A search over values of one field: epsilon of its dearest candidate, by Theorem 6 of arXiv:2110.03620.

    Attributes:
        field: what differs.
        values: of the candidates.
        mean: of the Poisson number of trials.
        sigma: noise multiplier of the dearest training.
        score: of the score.
    """

    field: str
    values: Sequence[Any]
    mean: float
    sigma: float = 1.0
    score: float = 20.0
    refused: str | None = None

    @property
    def name(self) -> str:
        return f"{self.mean:g} trials of {self.field}={','.join(map(str, self.values))}"


# --- epsilon, computed again

CELLS = 2**16


@lru_cache(maxsize=64)
def _losses(sigma: float, rate: float, group: int, width: float, remove: bool) -> tuple[np.ndarray, float]:
    """Distribution of the privacy loss of one release on a grid of `CELLS` cells around 0, split between neighbours."""
    shifts = np.arange(group + 1)
    weights = stats.binom.pmf(shifts, group, rate)
    x = np.linspace(-10 * sigma, group + 10 * sigma, 20_001)
    spacing = x[1] - x[0]
    without = stats.norm.logpdf(x, scale=sigma)
    with np.errstate(divide="ignore"):
        parts = np.log(weights)[:, None] + stats.norm.logpdf(x[None, :], loc=shifts[:, None], scale=sigma)
    with_unit = special.logsumexp(parts, axis=0)
    loss, density = (with_unit - without, with_unit) if remove else (without - with_unit, without)
    mass = np.exp(density) * spacing
    mass /= mass.sum()
    cell = width / CELLS
    place = np.clip(loss / cell + CELLS / 2, 0, CELLS - 2)
    low = np.floor(place).astype(int)
    share = place - low
    pmf = np.bincount(low, mass * (1 - share), CELLS) + np.bincount(low + 1, mass * share, CELLS)
    return pmf, cell


def oracle(events: Sequence[tuple[float, float, int, int]], delta: float) -> float:
    """Epsilon of releases (noise multiplier, rate, count, group), of the worse direction."""
    # As many releases as the unit takes part in, but for once in 10^8, each with its largest number of rows.
    taken = [(stats.binom.ppf(1 - 1e-8, n, 1 - (1 - q) ** k), k / s) for s, q, n, k in events]
    width = 2.2 * max(1.0, sum(n * reach * (reach / 2 + 9 / math.sqrt(n)) for n, reach in taken))
    found = []
    for remove in (True, False):
        spectrum = np.ones(CELLS // 2 + 1, dtype=complex)
        for sigma, rate, count, group in events:
            pmf, cell = _losses(sigma, rate, group, width, remove)
            spectrum *= np.fft.rfft(np.roll(pmf, -CELLS // 2)) ** count
        total = np.roll(np.fft.irfft(spectrum, CELLS), CELLS // 2)
        losses = (np.arange(CELLS) - CELLS / 2) * cell
        # delta(e) = sum over l > e of (1 - exp(e - l)) p(l), from the top down.
        tail = np.cumsum(total[::-1])[::-1]
        deltas = tail - signal.lfilter([1.0], [1.0, -math.exp(-cell)], total[::-1])[::-1]
        first = CELLS // 2  # where the loss is 0
        at = first + int(np.argmax(deltas[first:] <= delta))
        if at == first:
            found.append(0.0)
            continue
        before, after = (math.log(max(deltas[place], 1e-300)) for place in (at - 1, at))
        found.append(float(losses[at] - cell * (math.log(delta) - after) / (before - after)))
    return max(found)


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Exact delta of one Gaussian release (Balle & Wang 2018)."""
    return float(
        stats.norm.cdf(0.5 / sigma - epsilon * sigma)
        - math.exp(epsilon) * stats.norm.cdf(-0.5 / sigma - epsilon * sigma)
    )


@pytest.mark.parametrize(("sigma", "count"), [(1.0, 1), (2.0, 10), (0.5, 1)])
def test_the_oracle_is_right_where_there_is_a_formula(sigma: float, count: int) -> None:
    found = oracle([(sigma, 1.0, count, 1)], 1e-5)
    assert gaussian_delta(sigma / math.sqrt(count), found) == pytest.approx(1e-5, rel=0.02)


# --- the configurations

BASE = (
    "privacy.target_epsilon=null privacy.noise_multiplier=1 data.train_size=200 data.validation_size=40 "
    "data.test_size=40 hyperparameter.steps=10 hyperparameter.warmup_steps=0 hyperparameter.expected_batch_size=20"
)
FILES = "data.name=files data.train_size=null data.path={files}"
"""Private files have 150 training records of 30 users, five each."""


def target(epsilon: str) -> str:
    return f"privacy.noise_multiplier=null privacy.target_epsilon={epsilon}"


def users(unit: str, cap: int, file: str = "people") -> str:
    return f"{FILES}/{file}.jsonl privacy.unit={unit} privacy.examples_per_user={cap} privacy.delta=1e-3"


LINEAR = lambda u: 1 - 0.5 * u  # noqa: E731
COSINE = lambda u: 0.75 + 0.25 * math.cos(math.pi * u)  # noqa: E731
STEP = lambda u: 0.5 ** (min(int(4 * u), 3) / 3)  # noqa: E731
EXPONENTIAL = lambda u: 0.5**u  # noqa: E731

NUMBERS: list[Any] = [
    # Noise and target.
    ("", Accounted(mode="reproducible")),
    ("privacy.noise_multiplier=0.5", Accounted(sigma=0.5)),
    ("privacy.noise_multiplier=0.1 hyperparameter.steps=1", Accounted(sigma=0.1, steps=1)),
    ("privacy.noise_multiplier=0.0999", Refused("0.0999")),
    ("privacy.noise_multiplier=0.05", Refused("noise_multiplier")),
    ("privacy.noise_multiplier=1e-300", Refused("noise_multiplier")),
    ("privacy.noise_multiplier=1000", Accounted(sigma=1000.0)),
    ("privacy.noise_multiplier=1001", Refused("noise_multiplier")),
    ("privacy.noise_multiplier=1e300", Refused("noise_multiplier")),
    ("privacy.noise_multiplier=0", Refused("privacy.noise_multiplier=0 must be above 0")),
    ("privacy.noise_multiplier=-1", Refused("privacy.noise_multiplier=-1 must be above 0")),
    ("privacy.noise_multiplier=.nan", Refused("privacy.noise_multiplier=nan")),
    ("privacy.noise_multiplier=.inf", Refused("privacy.noise_multiplier=inf")),
    ("privacy.noise_multiplier=null", Refused("exactly one of privacy.target_epsilon and privacy.noise_multiplier")),
    ("privacy.target_epsilon=8", Refused("exactly one of privacy.target_epsilon and privacy.noise_multiplier")),
    (target("8"), Accounted(sigma=None, target=8)),
    (target("1"), Accounted(sigma=None, target=1)),
    (target("0.1"), Accounted(sigma=None, target=0.1)),
    (target("100"), Accounted(sigma=None, target=100)),
    (target("900"), Accounted(sigma=0.1, target=900)),
    (target("1e-3"), Accounted(sigma=None, target=1e-3)),
    (target("1e-9"), Refused("1e-09")),
    (target("1e-300"), Refused("1e-300")),
    (target("0"), Refused("privacy.target_epsilon=0 must be above 0")),
    (target("-8"), Refused("privacy.target_epsilon=-8 must be above 0")),
    (target(".nan"), Refused("privacy.target_epsilon=nan")),
    (target(".inf"), Refused("privacy.target_epsilon=inf")),
    (target("eight"), Refused("privacy.target_epsilon: Value 'eight'")),
    ("privacy.noise_multiplier=strong", Refused("privacy.noise_multiplier: Value 'strong'")),
    # Delta.
    ("privacy.delta=5e-3", Accounted()),
    ("privacy.delta=5.1e-3", Refused("delta must lie in (0, 1/num_units")),
    ("privacy.delta=0.5", Refused("delta must lie in (0, 1/num_units")),
    ("privacy.delta=1", Refused("privacy.delta=1 must be above 0 and below 1")),
    ("privacy.delta=0", Refused("privacy.delta=0 must be above 0")),
    ("privacy.delta=1e-8", Accounted()),
    ("privacy.delta=1e-9", Refused("1e-08")),
    ("privacy.delta=1e-300", Refused("1e-08")),
    ("privacy.delta=.nan", Refused("privacy.delta=nan")),
    ("privacy.delta=-1e-5", Refused("privacy.delta=-1e-05 must be above 0")),
    # Steps, and what one batch is.
    ("hyperparameter.steps=1", Accounted(steps=1)),
    ("hyperparameter.steps=1000 privacy.noise_multiplier=5", Accounted(steps=1000, sigma=5.0)),
    ("hyperparameter.steps=0", Accounted(steps=0)),
    (f"hyperparameter.steps=0 {target('8')}", Accounted(steps=0)),
    ("hyperparameter.steps=-1", Refused("hyperparameter.steps=-1 must be at least 0")),
    ("hyperparameter.steps=1.5", Refused("hyperparameter.steps: Value '1.5'")),
    ("hyperparameter.warmup_steps=10", Refused("hyperparameter.warmup_steps=10 leaves nothing")),
    ("hyperparameter.expected_batch_size=200", Accounted(rate=1.0)),
    ("hyperparameter.expected_batch_size=199", Accounted(rate=0.995)),
    ("hyperparameter.expected_batch_size=201", Refused("hyperparameter.expected_batch_size=201 is above the 200")),
    ("hyperparameter.expected_batch_size=1", Accounted(rate=0.005)),
    ("hyperparameter.expected_batch_size=0", Refused("hyperparameter.expected_batch_size=0 must be at least 1")),
    ("hyperparameter.expected_batch_size=-20", Refused("hyperparameter.expected_batch_size=-20")),
    ("hyperparameter.expected_batch_size=20.5", Refused("hyperparameter.expected_batch_size: Value '20.5'")),
    ("compute.physical_batch_size=1", Accounted()),
    ("compute.physical_batch_size=0", Refused("compute.physical_batch_size=0 must be at least 1")),
    # What cannot be computed.
    ("hyperparameter.max_grad_norm=1e-6", Accounted()),
    ("hyperparameter.max_grad_norm=1e300", Refused("max_grad_norm")),
    ("hyperparameter.max_grad_norm=0", Refused("hyperparameter.max_grad_norm=0 must be above 0")),
    ("hyperparameter.max_grad_norm=-1", Refused("hyperparameter.max_grad_norm=-1 must be above 0")),
    ("hyperparameter.max_grad_norm=.inf", Refused("hyperparameter.max_grad_norm=inf")),
    ("hyperparameter.max_grad_norm=.nan", Refused("hyperparameter.max_grad_norm=nan")),
    ("hyperparameter.learning_rate=.nan", Refused("hyperparameter.learning_rate=nan")),
    ("hyperparameter.learning_rate=.inf", Refused("hyperparameter.learning_rate=inf")),
    ("privacy.clipping_stability=0", Refused("privacy.clipping_stability=0 must be above 0")),
    ("privacy.clipping_stability=.nan", Refused("privacy.clipping_stability=nan")),
    ("privacy.clipping=auto_s privacy.clipping_stability=1e-300", Refused("stability")),
    ("privacy.clipping=psac privacy.clipping_stability=1e-300", Refused("stability")),
    ("privacy.allocation_floor=0", Refused("privacy.allocation_floor=0 must be above 0")),
    ("privacy.allocation_floor=1", Accounted()),
    ("privacy.allocation_floor=1.01", Refused("privacy.allocation_floor=1.01 must be above 0 and at most 1")),
    ("privacy.allocation_ema=0", Accounted()),
    ("privacy.allocation_ema=1", Refused("privacy.allocation_ema=1 must be at least 0 and below 1")),
    ("privacy.allocation_ema=-0.1", Refused("privacy.allocation_ema=-0.1")),
    ("privacy.quantile=0", Refused("privacy.quantile=0 must be above 0 and below 1")),
    ("privacy.quantile=1", Refused("privacy.quantile=1 must be above 0 and below 1")),
    ("privacy.quantile=.nan", Refused("privacy.quantile=nan")),
    ("privacy.quantile=0.5 privacy.quantile_share=0", Refused("privacy.quantile_share=0 must be above 0")),
    ("privacy.quantile=0.5 privacy.quantile_share=1", Refused("privacy.quantile_share=1 must be above 0 and below 1")),
    ("privacy.quantile=0.5 privacy.quantile_share=0.9", Accounted()),
    ("privacy.quantile=0.5 privacy.quantile_share=1e-5", Accounted()),
    ("privacy.quantile=0.5 privacy.quantile_learning_rate=.inf", Refused("privacy.quantile_learning_rate=inf")),
    ("privacy.quantile=0.5 privacy.quantile_learning_rate=0", Refused("privacy.quantile_learning_rate=0")),
    # Schedules.
    ("privacy.schedule=constant privacy.schedule_ratio=0.02", Accounted()),
    ("privacy.schedule=linear hyperparameter.steps=22", Accounted(steps=22, factors=LINEAR)),
    ("privacy.schedule=linear hyperparameter.steps=4", Accounted(steps=4, factors=LINEAR)),
    ("privacy.schedule=cosine hyperparameter.steps=4", Accounted(steps=4, factors=COSINE)),
    ("privacy.schedule=step hyperparameter.steps=8", Accounted(steps=8, factors=STEP)),
    ("privacy.schedule=exponential hyperparameter.steps=4", Accounted(steps=4, factors=EXPONENTIAL)),
    (
        f"privacy.schedule=exponential hyperparameter.steps=3 {target('2')}",
        Accounted(sigma=None, steps=3, target=2, factors=EXPONENTIAL),
    ),
    ("privacy.schedule=linear privacy.schedule_ratio=1", Accounted()),
    (
        "privacy.schedule=linear privacy.schedule_ratio=2 hyperparameter.steps=4",
        Accounted(steps=4, factors=lambda u: 1 + u),
    ),
    ("privacy.schedule=linear hyperparameter.steps=1", Accounted(steps=1)),
    (
        "privacy.schedule=exponential privacy.schedule_ratio=0.2 hyperparameter.steps=4",
        Accounted(steps=4, factors=lambda u: 0.2**u),
    ),
    ("privacy.schedule=exponential privacy.schedule_ratio=1e-6", Refused("schedule")),
    ("privacy.schedule=exponential privacy.schedule_ratio=1e-9", Refused("schedule")),
    (f"privacy.schedule=exponential privacy.schedule_ratio=1e-9 {target('8')}", Refused("schedule")),
    ("privacy.schedule=linear privacy.schedule_ratio=1e-9", Refused("schedule")),
    ("privacy.schedule=linear privacy.schedule_ratio=0", Refused("privacy.schedule_ratio=0 must be above 0")),
    ("privacy.schedule=linear privacy.schedule_ratio=-1", Refused("privacy.schedule_ratio=-1 must be above 0")),
    ("privacy.schedule=linear privacy.schedule_ratio=.nan", Refused("privacy.schedule_ratio=nan")),
    ("privacy.schedule=linear privacy.schedule_ratio=.inf", Refused("privacy.schedule_ratio=inf")),
    ("privacy.schedule=adaptive", Refused("privacy.schedule=adaptive is not one of")),
]

RULES = ("flat", "group", "scaled_flat", "auto_s", "auto_v", "psac")
ALLOCATED = ("uniform", "equal_budget", "min_energy", "equal_snr", "lora_weight_space")
SHARING: list[Any] = [
    # Every way to clip with every way to share the noise: one epsilon, or flat clipping under uneven noise.
    *(
        (
            f"privacy.clipping={clip} privacy.allocation={rule}",
            Refused("flat clipping fits uniform noise only") if clip == "flat" and rule != "uniform" else Accounted(),
        )
        for clip in RULES
        for rule in ALLOCATED
    ),
    *(
        (
            f"privacy.clipping={clip} privacy.allocation={rule} privacy.quantile=0.5 {target('3')}",
            Refused("flat clipping fits uniform noise only")
            if clip == "flat" and rule != "uniform"
            else Accounted(sigma=None, target=3),
        )
        for clip in RULES
        for rule in ("uniform", "joint")
    ),
    ("privacy.allocation=joint", Refused("allocation joint needs released norms")),
    *(
        (f"privacy.grouping={grouping} privacy.allocation_weights={weights}", Accounted())
        for grouping in ("all", "matrix", "module", "layer", "kind")
        for weights in ("static", "adam")
    ),
    ("privacy.grouping=example", Refused("privacy.grouping=example is not one of")),
    ("privacy.allocation=min_noise", Refused("privacy.allocation=min_noise is not one of")),
    ("privacy.allocation_weights=gradients", Refused("privacy.allocation_weights=gradients is not one of")),
    ("privacy.clipping=none", Refused("privacy.clipping=none is not one of")),
]

BESIDE: list[Any] = [
    # What is released beside the steps.
    *((f"privacy.projection={kind}", Accounted()) for kind in ("none", "random", "history", "rgp", "public", "scale")),
    ("data.organisation=dev privacy.projection=public", Refused("privacy.projection=public")),
    ("data.organisation=dev privacy.projection=scale", Refused("privacy.projection=scale takes its gradients from")),
    ("data.organisation=dev privacy.projection=scale public.method=joint", Accounted()),
    ("data.organisation=dev public.method=joint public.steps=1", Accounted()),
    ("public.method=meta public.data.x.organisation=private", Refused("public.data.x.organisation=private stands for")),
    ("public.method=joint adapter.name=pst", Refused("a start has no meaning for it")),
    ("privacy.projection=private", Refused("paid for with privacy.projection_noise_multiplier")),
    ("privacy.projection_noise_multiplier=5", Refused("paid for with privacy.projection_noise_multiplier")),
    (
        "privacy.projection=random privacy.projection_noise_multiplier=5",
        Refused("paid for with privacy.projection_noise_multiplier"),
    ),
    ("privacy.projection=private privacy.projection_noise_multiplier=5", Accounted(beside=(5.0, 1))),
    (
        f"privacy.projection=private privacy.projection_noise_multiplier=5 {target('3')}",
        Accounted(sigma=None, target=3, beside=(5.0, 1)),
    ),
    (f"privacy.projection=private privacy.projection_noise_multiplier=1 {target('3')}", Refused("cannot be reached")),
    ("privacy.projection=private privacy.projection_noise_multiplier=1e-6", Refused("projection_noise_multiplier")),
    (
        f"privacy.projection=private privacy.projection_noise_multiplier=1e-6 {target('8')}",
        Refused("projection_noise_multiplier"),
    ),
    ("privacy.projection=private privacy.projection_noise_multiplier=0", Refused("must be above 0")),
    ("privacy.projection=private privacy.projection_noise_multiplier=.nan", Refused("projection_noise_multiplier=nan")),
    (
        "privacy.projection=random environment.optimizer=dp_adam_bc",
        Refused("privacy.projection=random spreads noise unevenly"),
    ),
    (
        "privacy.projection=rgp environment.shrinkage=james_stein",
        Refused("privacy.projection=rgp spreads noise unevenly"),
    ),
    ("environment.shrinkage=james_stein environment.optimizer=dp_adam_bc environment.iterate_ema=0.9", Accounted()),
    ("environment.iterate_ema=1", Refused("environment.iterate_ema=1 must be at least 0 and below 1")),
    # The score.
    ("privacy.score_noise_multiplier=10", Accounted()),
    (f"privacy.score_noise_multiplier=2 {target('8')}", Accounted(sigma=None, target=8)),
    ("privacy.score_noise_multiplier=0.5 privacy.noise_multiplier=10", Refused("alone costs epsilon")),
    (f"privacy.score_noise_multiplier=0.5 {target('8')}", Refused("alone costs epsilon")),
    ("privacy.score_noise_multiplier=0", Refused("privacy.score_noise_multiplier=0 must be above 0")),
    ("privacy.score_noise_multiplier=.nan", Refused("privacy.score_noise_multiplier=nan")),
    ("privacy.score_noise_multiplier=1e-6 hyperparameter.steps=0", Refused("score_noise_multiplier")),
    (f"privacy.score_noise_multiplier=1e-6 {target('8')}", Refused("score_noise_multiplier")),
    (f"privacy.score_noise_multiplier=1e-6 hyperparameter.steps=0 {target('8')}", Refused("score_noise_multiplier")),
    (
        "privacy.score_noise_multiplier=10 privacy.enabled=false privacy.noise_multiplier=null",
        Refused("a non-private run cannot be chosen privately"),
    ),
    (
        "privacy.score_noise_multiplier=10 privacy.unit=user_els privacy.examples_per_user=2",
        Refused("one user may change many answers"),
    ),
    (
        "privacy.score_noise_multiplier=10 privacy.unit=user_uls privacy.examples_per_user=2",
        Refused("one user may change many answers"),
    ),
    # Without privacy.
    ("privacy.enabled=false privacy.noise_multiplier=null", NonPrivate()),
    ("privacy.enabled=false", Refused("with privacy=none: a non-private run has no epsilon")),
    (f"privacy.enabled=false {target('8')}", Refused("with privacy=none: a non-private run has no epsilon")),
    ("privacy.enabled=false privacy.noise_multiplier=null hyperparameter.steps=0", NonPrivate()),
    (
        "privacy.enabled=false privacy.noise_multiplier=null privacy.projection=private "
        "privacy.projection_noise_multiplier=5",
        Refused("privacy.projection"),
    ),
]

UNITS: list[Any] = [
    (users("user_els", 1), Accounted(rate=20 / 150)),
    (users("user_els", 2), Accounted(rate=20 / 150, group=2)),
    (users("user_els", 5), Accounted(rate=20 / 150, group=5)),
    (f"{users('user_els', 10)} hyperparameter.steps=2", Accounted(rate=20 / 150, group=10, steps=2)),
    (f"{users('user_els', 3)} {target('4')}", Accounted(rate=20 / 150, group=3, sigma=None, target=4)),
    (f"{users('user_els', 3)} privacy.quantile=0.5", Accounted(rate=20 / 150, group=3)),
    (
        f"{users('user_els', 3)} privacy.schedule=linear hyperparameter.steps=2",
        Accounted(rate=20 / 150, group=3, steps=2, factors=LINEAR),
    ),
    (
        f"{users('user_els', 3)} privacy.projection=private privacy.projection_noise_multiplier=20",
        Accounted(rate=20 / 150, group=3, beside=(20.0, 3)),
    ),
    (f"{users('user_els', 3)} privacy.clipping=flat privacy.allocation=equal_snr", Refused("uniform noise only")),
    (f"{users('user_els', 3)} hyperparameter.expected_batch_size=151", Refused("expected_batch_size")),
    (f"{users('user_els', 3)} privacy.delta=0.01", Refused("delta must lie in (0, 1/num_units")),
    (users("user_uls", 1), Accounted(rate=20 / 30)),
    (users("user_uls", 5), Accounted(rate=20 / 30)),
    (f"{users('user_uls', 50)} hyperparameter.expected_batch_size=30", Accounted(rate=1.0)),
    (f"{users('user_uls', 3)} {target('4')}", Accounted(rate=20 / 30, sigma=None, target=4)),
    (f"{users('user_uls', 3)} hyperparameter.expected_batch_size=31", Refused("expected_batch_size must lie in (0,")),
    (f"{users('user_uls', 3)} privacy.delta=0.04", Refused("delta must lie in (0, 1/num_units")),
    (
        f"{users('user_uls', 3)} privacy.projection=private privacy.projection_noise_multiplier=20",
        Refused("one_shot releases bound records, not users"),
    ),
    (f"{users('user_uls', 3)} privacy.noise_mode=secure", Accounted(rate=20 / 30, mode="secure")),
    ("privacy.unit=user_els", Refused("privacy.unit=user_els needs privacy.examples_per_user")),
    ("privacy.unit=user_uls", Refused("privacy.unit=user_uls needs privacy.examples_per_user")),
    ("privacy.examples_per_user=3", Refused("privacy.examples_per_user is for users")),
    (users("user_els", 0), Refused("privacy.examples_per_user=0 must be at least 1")),
    ("privacy.unit=user_els privacy.examples_per_user=2.5", Refused("privacy.examples_per_user: Value '2.5'")),
    ("privacy.unit=user privacy.examples_per_user=2", Refused("privacy.unit=user is not one of")),
    (users("user_els", 3, "nobody"), Refused("needs the author of every training record")),
    (users("user_uls", 3, "nobody"), Refused("needs the author of every training record")),
    (users("user_uls", 3, "one_without"), Refused("needs the author of every training record")),
    (users("user_els", 3, "empty_name"), Refused("needs the author of every training record")),
    (users("user_uls", 3, "not_a_number"), Refused("needs the author of every training record")),
    # One person by two names: 10 users, not 20.
    (f"{users('user_uls', 3, 'numbers')} hyperparameter.expected_batch_size=5", Accounted(rate=0.5)),
    (f"{users('user_uls', 3, 'accents')} hyperparameter.expected_batch_size=5", Accounted(rate=0.5)),
    (users("user_els", 3, "two_splits"), Refused("the same user is in")),
    (f"{users('user_uls', 3, 'two_splits')} data.on_bad=skip", Refused("the same user is in")),
    (f"{FILES}/two_splits.jsonl", Accounted(rate=20 / 150)),
    (f"{users('user_els', 3, 'messages')} data.layout=messages data.split_by=user", Refused("data.layout=messages")),
    (f"{users('user_uls', 3, 'messages')} data.layout=messages data.split_by=user", Refused("data.layout=messages")),
    (f"{FILES}/messages.jsonl data.layout=messages", Refused("data.layout=messages")),
]

DATA: list[Any] = [
    (f"{FILES}/people.jsonl", Accounted(rate=20 / 150, mode="secure")),
    (f"{FILES}/people.jsonl hyperparameter.expected_batch_size=150", Accounted(rate=1.0)),
    (f"{FILES}/people.jsonl hyperparameter.expected_batch_size=151", Refused("expected_batch_size must lie in (0,")),
    (f"{FILES}/people.jsonl privacy.delta=7e-3", Refused("delta must lie in (0, 1/num_units")),
    (f"{FILES}/people.jsonl privacy.noise_mode=secure", Accounted(rate=20 / 150, mode="secure")),
    (f"{FILES}/people.jsonl privacy.noise_mode=reproducible", Refused("noise_mode=reproducible")),
    (f"{FILES}/people.jsonl privacy.noise_mode=random", Refused("privacy.noise_mode=random is not one of")),
    ("privacy.noise_mode=secure", Accounted(mode="secure")),
    (f"{FILES}/people.jsonl data.tasks=[sort]", Accounted(rate=20 / 75)),
    (f"{FILES}/people.jsonl data.tasks=[nothing]", Refused("no record has the task nothing")),
    (f"{FILES}/people.jsonl privacy.projection=public", Refused("privacy.projection=public needs public data")),
    (
        f"{FILES}/people.jsonl privacy.projection=private privacy.projection_noise_multiplier=8",
        Accounted(rate=20 / 150, beside=(8.0, 1)),
    ),
    (f"{FILES}/people.jsonl data.train_size=4000", Refused("data.train_size")),
    (f"{FILES}/people.jsonl data_sensitivity.task_imbalance=4", Refused("data_sensitivity.task_imbalance")),
    (f"{FILES}/people.jsonl data.tasks=[sort,tell] data.task_weights=[1,3]", Refused("data.task_weights")),
    # A record that dptune itself wrote twice is two rows.
    ("data_sensitivity.duplicates=1 hyperparameter.expected_batch_size=40", Accounted(rate=0.1, group=2)),
    (f"{FILES}/people.jsonl data_sensitivity.duplicates=1", Accounted(rate=20 / 300, group=2)),
    (f"{users('user_els', 3)} data_sensitivity.duplicates=1", Accounted(rate=20 / 300, group=3)),
    (f"{users('user_uls', 3)} data_sensitivity.duplicates=1", Accounted(rate=20 / 30)),
    (
        f"{FILES}/people.jsonl data_sensitivity.duplicates=1 privacy.projection=private "
        "privacy.projection_noise_multiplier=8",
        Accounted(rate=20 / 300, group=2, beside=(8.0, 2)),
    ),
    (f"{FILES}/people.jsonl data_sensitivity.duplicates=1e-9", Accounted(rate=20 / 150, group=2)),
    (f"{FILES}/people.jsonl data_sensitivity.label_noise=0.5", Accounted(rate=20 / 150)),
    (f"{FILES}/people.jsonl data_sensitivity.instruction_perturbation=1", Accounted(rate=20 / 150)),
    (f"{FILES}/people.jsonl data_sensitivity.test_distraction=1", Accounted(rate=20 / 150)),
    (f"{FILES}/people.jsonl data_sensitivity.train_fraction=0", Refused("data_sensitivity.train_fraction=0 must be")),
    (f"{FILES}/people.jsonl data_sensitivity.label_noise=1.5", Refused("data_sensitivity.label_noise=1.5")),
    (f"{FILES}/people.jsonl data_sensitivity.duplicates=2", Refused("data_sensitivity.duplicates=2")),
    (f"{FILES}/nobody.jsonl data_sensitivity.user_tail=1", Refused("user_tail needs the author")),
    ("data_sensitivity.duplicates=.nan", Refused("data_sensitivity.duplicates=nan")),
    (f"{FILES}/broken.jsonl", Refused("broken.jsonl")),
    (f"{FILES}/twice.jsonl data.columns.id=id", Refused("has occurred before")),
    (f"{FILES}/twice.jsonl data.columns.id=id data.on_bad=skip", Refused("has occurred before")),
    (f"{FILES}/people.jsonl data.columns.id=number", Refused("field 'number' is missing")),
    (f"{FILES}/one.jsonl hyperparameter.expected_batch_size=1", Accounted(rate=1.0)),
    (f"{FILES}/one.jsonl", Refused("expected_batch_size must lie in (0,")),
    (f"{FILES}/nothing.jsonl", Refused("split is empty")),
    ("data.name=files data.path={files}/absent.jsonl", Refused("is not a file")),
    ("data.name=files", Refused("data=files needs data.path")),
    ("data.path={files}/people.jsonl", Refused("data=supportdesk is embedded")),
    (f"{FILES}/people.jsonl data.splits=[train:train,test:train]", Refused("the test split is empty")),
    (f"{FILES}/people.jsonl data.splits=[train:train,test:exam]", Refused("is not SOURCE:OURS")),
    ("data.train_size=100", Accounted(rate=0.2)),
    ("data.train_size=19", Refused("is above the 19 training records")),
    ("data.train_size=0", Refused("data.train_size=0 must be at least 1")),
    ("data.organisation=dev", Accounted()),
    ("data.organisation=public", Refused("data.organisation=public is not one of")),
    ("data.organisation=acorn", Refused("the embedded backbones were pretrained on it")),
]

COMPUTED: list[Any] = [
    # What the numbers are computed with.
    ("environment.precision=bfloat16", Accounted()),
    ("environment.precision=float16", Refused("environment.precision=float16 is not one of")),
    ("environment.backbone_quantization=int8", Accounted()),
    ("environment.backbone_quantization=nf4 environment.precision=bfloat16", Accounted()),
    ("environment.backbone_quantization=int4", Refused("environment.backbone_quantization=int4 is not one of")),
    ("adapter.name=bitfit environment.precision=bfloat16", Refused("trains the backbone's own weights")),
    ("adapter.name=full environment.precision=bfloat16", Refused("trains the backbone's own weights")),
    ("adapter.name=full environment.backbone_quantization=int8", Refused("changes the backbone's own matrices")),
    ("adapter.name=pst environment.backbone_quantization=nf4", Refused("changes the backbone's own matrices")),
    ("adapter.dropout=0.1", Refused("adapter.dropout=0.1 would be noise that the privacy plan did not draw")),
    ("adapter.dropout=1e-9", Refused("adapter.dropout=1e-09 would be noise")),
    ("adapter.name=dora adapter.embeddings=true", Refused("adapter.embeddings=true is for adapter=lora")),
    ("adapter.name=prompt adapter.target_modules=[q_proj]", Refused("adapter.target_modules has no meaning")),
    ("adapter.name=prefix adapter.top_layers=1", Refused("adapter.top_layers has no meaning")),
    ("adapter.name=batch_norm", Refused("adapter.name=batch_norm is not one of")),
    *(
        (f"adapter.name={name} privacy.allocation=lora_weight_space", Accounted())
        for name in ("lora", "prompt", "full", "ia3")
    ),
    ("environment.optimizer=lion", Refused("environment.optimizer=lion is not one of")),
    ("environment.engine=none", Refused("environment.engine=none is not one of")),
    # What nobody knows.
    ("privacy.epsilon=3", Refused("unknown key privacy.epsilon")),
    ("privacy.sampling=shuffle", Refused("unknown key privacy.sampling")),
    ("privacy.private=false", Refused("unknown key privacy.private")),
    ("privacy.accountant=rdp", Refused("unknown key privacy.accountant")),
    ("privacy.num_units=1000000", Refused("unknown key privacy.num_units")),
    ("privacy.sample_rate=0.001", Refused("unknown key privacy.sample_rate")),
    ("privacy.one_shot=[]", Refused("unknown key privacy.one_shot")),
    ("secret=1", Refused("unknown key secret")),
    ("environment.noise_seed=1", Refused("unknown key environment.noise_seed")),
    ("privacy=null", Refused("privacy")),
]

SEARCHES: list[Any] = [
    ("", Searched("privacy.noise_multiplier", (1.0, 2.0), 5.0)),
    ("", Searched("privacy.noise_multiplier", (2.0, 1.0), 5.0)),
    ("", Searched("privacy.noise_multiplier", (4.0, 3.0, 0.7), 2.0, sigma=0.7)),
    ("", Searched("hyperparameter.learning_rate", (0.1, 0.2), 10.0)),
    ("", Searched("hyperparameter.learning_rate", (0.1,), 1.0)),
    ("privacy.noise_multiplier=5", Searched("privacy.score_noise_multiplier", (30.0, 20.0), 3.0, sigma=5.0)),
    ("", Searched("privacy.score_noise_multiplier", (5.0, None), 3.0, refused="set privacy.score_noise_multiplier")),
    ("", Searched("privacy.delta", (1e-5, 1e-6), 3.0, refused="privacy.delta must be the same in all trials")),
    ("", Searched("data.seed", (0, 1), 3.0, refused="data must be the same in all trials")),
    (
        "",
        Searched("data_sensitivity.label_noise", (0.0, 0.5), 3.0, refused="data_sensitivity must be the same"),
    ),
    ("", Searched("privacy.noise_mode", ("secure", "auto"), 3.0, refused="privacy.noise_mode must be the same")),
    ("", Searched("environment.seed", (0, 1), 3.0, refused="environment.seed must be the same")),
    ("compute.force=true", Searched("hyperparameter.learning_rate", (0.1, 0.2), 3.0, refused="compute.force=true")),
    (
        "tracking.name=wandb_offline",
        Searched("hyperparameter.learning_rate", (0.1, 0.2), 3.0, refused="would show losing trials"),
    ),
]

DECLARED: list[Any] = [
    # N is what is said of the data, and not what is counted.
    (f"{FILES}/people.jsonl data.declared_size=1000", Accounted(rate=0.02)),
    (f"{FILES}/people.jsonl data.declared_size=100", Accounted(rate=0.2)),
    (f"{FILES}/people.jsonl data.declared_size=10", Refused("expected_batch_size")),
    (f"{FILES}/people.jsonl data.declared_size=1000 privacy.delta=2e-3", Refused("delta must lie in (0, 1/num_units")),
    (f"{FILES}/people.jsonl data.declared_size=0", Refused("data.declared_size=0 must be at least 1")),
    (f"{FILES}/people.jsonl data.declared_size=1500 data.train_size=1000", Accounted(rate=0.02)),
    (f"{users('user_els', 2)} data.declared_size=200", Accounted(rate=0.1, group=2)),
    (f"{users('user_uls', 2)} data.declared_users=40", Accounted(rate=0.5)),
    (f"{users('user_uls', 2)} data.declared_users=10", Refused("expected_batch_size")),
]

TABLE = [*NUMBERS, *SHARING, *BESIDE, *UNITS, *DATA, *COMPUTED, *DECLARED, *SEARCHES]


def row_of(overrides: str, outcome: Any) -> Any:
    what = outcome.name if isinstance(outcome, Searched) else type(outcome).__name__.lower()
    name = f"{overrides.replace('{files}/', '')} {what}".strip()
    return pytest.param(overrides, outcome, id=name)


def test_there_are_more_than_three_hundred_of_them_and_none_twice() -> None:
    assert len(TABLE) >= 300
    assert len({f"{overrides} {outcome}" for overrides, outcome in TABLE}) == len(TABLE)


# --- the data


def _row(number: int, split: str, user: Any, **more: Any) -> dict[str, Any]:
    task = ("sort", "tell")[number % 2]
    row = {"instruction": f"{task} this: {number}", "output": f"answer {number}", "task": task, "split": split}
    return row | ({} if user is None else {"user": user}) | more


def _rows(user_of: Callable[[int], Any], count: int = 150, **more: Any) -> list[dict[str, Any]]:
    held_out = [(2000 + n, split, f"{split} {n}") for split in ("validation", "test") for n in range(20)]
    train = [_row(n, "train", user_of(n), **more) for n in range(count)]
    return train + [_row(n, split, user, **more) for n, split, user in held_out]


def _messages() -> list[dict[str, Any]]:
    made = []
    for tree in range(200):
        for turn, role in enumerate(("prompter", "assistant")):
            made.append(
                {
                    "message_tree_id": f"t{tree}",
                    "message_id": f"t{tree}.{turn}",
                    "parent_id": None if turn == 0 else f"t{tree}.0",
                    "role": role,
                    "text": f"{role} says {turn} in {tree}",
                    "user": f"u{(tree + turn) % 40}",
                }
            )
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    names = [unicodedata.normalize(form, "zoë") for form in ("NFC", "NFD")]
    contents: Mapping[str, list[dict[str, Any]]] = {
        "people": _rows(lambda n: f"person {n % 30}"),
        "nobody": _rows(lambda n: None),
        "one_without": _rows(lambda n: None if n == 77 else f"person {n % 30}"),
        "empty_name": _rows(lambda n: "" if n == 77 else f"person {n % 30}"),
        "not_a_number": _rows(lambda n: math.nan if n == 77 else n % 30),
        "numbers": _rows(lambda n: n % 10 if n % 4 < 2 else float(n % 10)),
        "accents": _rows(lambda n: f"{names[n % 4 < 2]} {n % 10}"),
        "two_splits": [*_rows(lambda n: f"person {n % 30}"), _row(9000, "test", "person 3")],
        "messages": _messages(),
        "broken": [*_rows(lambda n: f"person {n % 30}"), {"instruction": "no answer", "split": "train"}],
        "twice": [{**row, "id": str(n % 180)} for n, row in enumerate(_rows(lambda n: f"person {n % 30}"))],
        "one": _rows(lambda n: "person", count=1),
        "nothing": [],
    }
    for name, rows in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


# --- the test


def composed(overrides: str, files: Path, root: Path) -> Config:
    text = f"{BASE} {overrides} compute.output_root={root}".replace("{files}", str(files))
    parts = text.replace(", ", ",").split(" ")
    tree = OmegaConf.create(dataclasses.asdict(Config()))
    return strict(OmegaConf.merge(tree, OmegaConf.from_dotlist([part for part in parts if part])))


def check_accounted(expected: Accounted, config: Config) -> None:
    data = load_dataset(config)
    plan = make_plan(config, data)
    assert plan.private
    factors = [1.0] * expected.steps
    if expected.factors is not None:
        factors = [expected.factors(step / max(expected.steps - 1, 1)) for step in range(expected.steps)]
    # At most twenty blocks of one noise each.
    blocks = np.array_split(np.array(factors), max(1, min(20, expected.steps)))
    factors = [float(block.mean()) for block in blocks for _ in block]
    sigma = plan.noise_multiplier if expected.sigma is None else expected.sigma
    noise = [sigma * factor for factor in factors]
    events = [(value, expected.rate, noise.count(value), expected.group) for value in dict.fromkeys(noise)]
    if expected.beside is not None:
        events.append((expected.beside[0], 1.0, 1, expected.beside[1]))
    found = plan.epsilon()
    if not events:
        assert found == 0.0
        return
    # The oracle rounds losses to a grid that is a little coarser than the reference's, which rounds up.
    assert found == pytest.approx(oracle(events, config.privacy.delta), rel=4e-3, abs=4e-4)
    if found > 1e-2:
        assert found <= expected.target
    assert sorted(plan.noise_multipliers()) == pytest.approx(sorted(noise))
    keys = KeyRing.reproducible(0, "table") if plan.noise_mode == "reproducible" else KeyRing.secure("table")
    sampler = plan.sampler(keys, users=[example.user for example in data.train])
    assert sampler.sample_rate == pytest.approx(expected.rate)
    if expected.mode is not None:
        assert plan.noise_mode == noise_mode(config) == expected.mode


def check_search(expected: Searched, overrides: str, files: Path, root: Path) -> None:
    jobs = []
    for value in expected.values:
        score = "" if "score" in expected.field else f"privacy.score_noise_multiplier={expected.score}"
        text = "null" if value is None else str(value)
        config = composed(f"{score} {overrides} {expected.field}={text}", files, root)
        jobs.append(Job(run_id(config), config, (), ()))
    search = Search(tuple(jobs), Repetitions(expected.mean, math.inf), None)
    if expected.refused is not None:
        with pytest.raises(ConfigError) as caught:
            search.check()
        assert expected.refused in str(caught.value) and "\n" not in str(caught.value)
        return
    search.check()
    orders = np.array([*np.arange(1.1, 12, 0.05), *range(12, 65)])

    def renyi(sigma: float, rate: float, steps: int) -> np.ndarray:
        x = np.linspace(-12 * sigma, 64 + 12 * sigma, 40_001)
        q = stats.norm.logpdf(x, scale=sigma)
        loss = np.logaddexp(math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + (2 * x - 1) / (2 * sigma**2))
        moments = [special.logsumexp(order * loss + q) + math.log(x[1] - x[0]) for order in orders]
        return np.asarray(steps * np.array(moments) / (orders - 1))

    def epsilon_of(curve: np.ndarray) -> float:
        delta = config.privacy.delta
        return float(min(curve + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)))

    score = min((value for value in expected.values if "score" in expected.field), default=expected.score)
    curve = np.maximum(renyi(expected.sigma, 0.1, 10), orders / (2 * score**2))
    hidden = [
        min(
            1.0,
            math.exp(
                min((a - 1) * (r - e + math.log1p(-1 / a)) - math.log(a) for a, r in zip(orders, curve, strict=True))
            ),
        )
        for e in np.log1p(1 / (orders - 1))
    ]
    oracle_epsilon = epsilon_of(curve + expected.mean * np.array(hidden) + math.log(expected.mean) / (orders - 1))
    assert search.epsilon == pytest.approx(oracle_epsilon, rel=1e-2)


@pytest.mark.parametrize(("overrides", "outcome"), [row_of(*row) for row in TABLE])
def test_what_comes_of_a_config(overrides: str, outcome: Any, files: Path, tmp_path: Path) -> None:
    match outcome:
        case Refused(fragment):
            with pytest.raises(ConfigError) as caught:
                config = composed(overrides, files, tmp_path)
                make_plan(config, load_dataset(config))
            assert fragment in str(caught.value)
            assert "\n" not in str(caught.value)
        case Accounted():
            check_accounted(outcome, composed(overrides, files, tmp_path))
        case NonPrivate():
            config = composed(overrides, files, tmp_path)
            plan = make_plan(config, load_dataset(config))
            assert not plan.private and plan.epsilon() == math.inf and plan.events() == ()
        case Searched():
            check_search(outcome, overrides, files, tmp_path)


# --- what is done with folders, files and accounts

LIMIT = 4.0
"""A budget that a run with the first of two noise multipliers keeps, and not one with the second."""
SMALL, LARGE = 8.0, 0.9


class World:
    """A machine with data, output folders and an account."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = [
            {
                "instruction": "Say what this is about.",
                "input": f"Case {n}: the parcel for house {n * 17} was not delivered on day {n}.",
                "output": f"post {n}",
                "task": ("sort", "tell")[n % 2],
                "user": f"person {n // 3}",
                "split": (*["train"] * 8, "validation", "test")[n // 3 % 10],
            }
            for n in range(240)
        ]
        self.file = self.written("people.jsonl", self.rows)

    def written(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def config(self, file: Path | None = None, root: str = "out", **values: Any) -> Config:
        given = {
            "data.name": "files",
            "data.path": str(file or self.file),
            "data.train_size": None,
            "compute.output_root": str(self.folder / root),
            "privacy.delta": 1e-4,
            "hyperparameter.expected_batch_size": 16,
            **{name.replace("__", "."): value for name, value in values.items()},
        }
        return with_values(Config(), given.items())

    def run(
        self, name: str = "run", sigma: float = SMALL, *, goes_on: bool = False, done: bool = True, **more: Any
    ) -> Path:
        """Book a run as `runs.booking` does, let it look at data, and perhaps end it; its folder."""
        config = self.config(**more)
        folder = Path(config.compute.output_root) / name
        group = config.privacy.examples_per_user or 1
        spending = Spending.of_run([Event(sigma, 0.1, 50, group)], [], config.privacy.delta)
        book(config, load_dataset(config), name, folder, spending, goes_on=goes_on)
        if not goes_on:
            mark_begun(config, folder)
        if done:
            mark_done(config, folder)
        return folder

    @property
    def charged(self) -> list[int]:
        """Number of charged runs of each account of examples."""
        return [len(account.private) for account in accounts_of() if account.unit == "example"]


USERS = {"privacy__unit": "user_els", "privacy__examples_per_user": 3}


def runs_in_two_output_folders(world: World) -> None:
    world.run(root="a")
    world.run(root="b")


def copies_the_name_of_a_booking_to_another_run(world: World) -> None:
    first = world.run("one")
    (world.folder / "out" / "two").mkdir()
    shutil.copy2(first / TOKEN_FILE, world.folder / "out" / "two" / TOKEN_FILE)
    world.run("two")


def links_the_name_of_a_booking_to_another_run(world: World) -> None:
    first = world.run("one", done=False)
    (world.folder / "out" / "two").mkdir()
    os.link(first / TOKEN_FILE, world.folder / "out" / "two" / TOKEN_FILE)
    world.run("two", goes_on=True)


def links_a_run_to_another_output_folder(world: World) -> None:
    first = world.run("one", done=False)
    (world.folder / "b" / "one").mkdir(parents=True)
    os.link(first / TOKEN_FILE, world.folder / "b" / "one" / TOKEN_FILE)
    world.run("one", root="b", goes_on=True)


def puts_a_folder_back_where_it_had_been(world: World) -> None:
    folder = world.run(done=False)
    shutil.copytree(folder, world.folder / "copy")
    shutil.rmtree(folder)
    shutil.copytree(world.folder / "copy", folder)
    world.run(goes_on=True)


def swaps_a_folder_with_its_copy(world: World) -> None:
    folder = world.run(done=False)
    shutil.copytree(folder, world.folder / "copy")
    world.run(goes_on=True)
    folder.rename(world.folder / "old")
    (world.folder / "copy").rename(folder)
    world.run(goes_on=True)


def does_a_run_again_without_its_checkpoint(world: World) -> None:
    world.run(done=False)
    world.run(done=False)


def empties_the_ledger(world: World) -> None:
    folder = world.run(done=False)
    (folder / "ledger.jsonl").write_bytes(b"")
    world.run()


def puts_the_checkpoint_of_a_done_run_back(world: World) -> None:
    world.run()
    world.run(goes_on=True)


def removes_all_but_the_name_of_the_booking(world: World) -> None:
    folder = world.run()
    for path in folder.iterdir():
        if path.name != TOKEN_FILE:
            path.unlink()
    world.run()


def writes_the_name_of_a_booking_by_hand(world: World) -> None:
    token = accounts_of()[0].bookings[0].token if world.run(done=False) else ""
    (world.folder / "b" / "run").mkdir(parents=True)
    (world.folder / "b" / "run" / TOKEN_FILE).write_text(token)
    world.run(root="b", goes_on=True)


def tears_the_last_line_of_the_account(world: World) -> None:
    world.run()
    with (home() / ACCOUNT_FILE).open("ab") as stream:
        stream.write(b'{"kind": "ended", "acc')
    world.run("other")


def takes_each_task_by_itself(world: World) -> None:
    world.run("sort", data__tasks=["sort"])
    world.run("tell", data__tasks=["tell"])


def compresses_the_file(world: World) -> None:
    world.run("one")
    packed = world.folder / "other.jsonl.gz"
    packed.write_bytes(gzip.compress(world.file.read_bytes()))
    world.run("two", file=packed)


def writes_the_file_as_a_table(world: World) -> None:
    world.run("one")
    table = world.folder / "people.csv"
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, sorted(world.rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(world.rows)
    world.run("two", file=table)


def puts_the_file_among_others(world: World) -> None:
    world.run("one")
    others = [
        {**row, "input": f"Nobody asked about this, {n}.", "output": f"x {n}"} for n, row in enumerate(world.rows)
    ]
    world.written("all/others.jsonl", others * 3)
    shutil.copy(world.file, world.folder / "all" / "more.jsonl")
    world.run("two", file=world.folder / "all")


def moves_everybody_to_another_split(world: World) -> None:
    world.run("one")
    moved = [{**row, "split": ("test", "train")[n > 200]} for n, row in enumerate(world.rows)]
    world.run("two", file=world.written("moved.jsonl", moved))


def trains_on_halves_and_on_the_whole(world: World) -> None:
    """Halves of which neither has anything in common with the other, until the whole does with both."""
    halves = [world.written(f"half{n}.jsonl", world.rows[n * 120 : n * 120 + 120]) for n in range(2)]
    world.run("first", file=halves[0])
    world.run("second", file=halves[1])
    world.run("whole")
    world.run("again", file=halves[0])


SEQUENCES: list[tuple[Callable[[World], None], list[int]]] = [
    (runs_in_two_output_folders, [2]),
    (copies_the_name_of_a_booking_to_another_run, [2]),
    (links_the_name_of_a_booking_to_another_run, [2]),
    (links_a_run_to_another_output_folder, [2]),
    (puts_a_folder_back_where_it_had_been, [2]),
    (swaps_a_folder_with_its_copy, [2]),
    (does_a_run_again_without_its_checkpoint, [2]),
    (empties_the_ledger, [2]),
    (puts_the_checkpoint_of_a_done_run_back, [2]),
    (removes_all_but_the_name_of_the_booking, [2]),
    (writes_the_name_of_a_booking_by_hand, [2]),
    (tears_the_last_line_of_the_account, [2]),
    (takes_each_task_by_itself, [2]),
    (compresses_the_file, [2]),
    (writes_the_file_as_a_table, [2]),
    (puts_the_file_among_others, [2]),
    (moves_everybody_to_another_split, [2]),
    (trains_on_halves_and_on_the_whole, [3, 3]),
]
"""What is done, and how many runs are charged to each account of examples then."""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("DPTUNE_HOME", str(tmp_path / "home"))
    return World(tmp_path)


@pytest.mark.parametrize(("act", "charged"), SEQUENCES, ids=[act.__name__ for act, _ in SEQUENCES])
def test_what_is_done_with_files_is_charged(act: Callable[[World], None], charged: list[int], world: World) -> None:
    act(world)
    assert world.charged == charged


def test_a_run_that_goes_on_where_it_is_is_charged_once(world: World) -> None:
    """Of the sequences above none would mean anything if everything were charged again."""
    world.run(done=False)
    world.run(goes_on=True, done=False)
    (world.folder / "out").rename(world.folder / "elsewhere")
    world.run(root="elsewhere", goes_on=True)
    assert world.charged == [1]


def names_no_limit_in_another_folder(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    world.run("large", LARGE, root="b")


def names_a_higher_limit(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    world.run("large", LARGE, privacy__budget=100.0)


def takes_users_for_examples(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    world.run("large", LARGE, **USERS)


def takes_users_by_their_mean(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    world.run("large", 2.0, privacy__unit="user_uls", privacy__examples_per_user=3)


def takes_examples_for_users(world: World) -> None:
    world.run(privacy__budget=LIMIT, **USERS)
    world.run("large")


def names_a_budget_of_users_after_runs_on_examples(world: World) -> None:
    world.run()
    world.run("users", privacy__budget=LIMIT, **USERS)


def takes_another_delta(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    world.run("other", privacy__budget=LIMIT, privacy__delta=1e-3)


def takes_another_delta_without_a_limit(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    world.run("other", LARGE, privacy__delta=1e-3)


def says_that_the_file_is_public(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    world.run("open", data__public=True)


def adds_other_people_to_the_file(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    others = [{**row, "input": f"Nobody asked about this, {n}."} for n, row in enumerate(world.rows)]
    world.run("large", LARGE, file=world.written("more.jsonl", [*others, *world.rows[:40]]))


def mixes_two_files_of_which_one_has_a_budget(world: World) -> None:
    halves = [world.written(f"half{n}.jsonl", world.rows[n * 120 : n * 120 + 120]) for n in range(2)]
    world.run("limited", file=halves[0], privacy__budget=LIMIT)
    world.run("free", file=halves[1])
    world.run("large", LARGE)


def puts_the_lines_of_the_account_in_another_order(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    file = home() / ACCOUNT_FILE
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    world.run("large", LARGE)


def breaks_a_line_of_the_account(world: World) -> None:
    world.run(privacy__budget=LIMIT)
    file = home() / ACCOUNT_FILE
    file.write_text(file.read_text().replace('"limit": 4.0', '"limit": 4.0.0'))
    world.run("large", LARGE)


REFUSALS: list[tuple[Callable[[World], None], str]] = [
    (names_no_limit_in_another_folder, "of 4 is left after 1 runs"),
    (names_a_higher_limit, "the account's limit is 4"),
    (takes_users_for_examples, "unit example"),
    (takes_users_by_their_mean, "unit example"),
    (takes_examples_for_users, "protects single examples, and bounds nothing for a user"),
    (names_a_budget_of_users_after_runs_on_examples, "no budget of unit user can hold"),
    (takes_another_delta, "kept at delta 0.0001, not at 0.001"),
    (takes_another_delta_without_a_limit, "of 4 is left after 1 runs"),
    (says_that_the_file_is_public, "has a budget of 4"),
    (adds_other_people_to_the_file, "of 4 is left after 1 runs"),
    (mixes_two_files_of_which_one_has_a_budget, "of 4 is left after 1 runs"),
    (puts_the_lines_of_the_account_in_another_order, "is damaged"),
    (breaks_a_line_of_the_account, "is damaged"),
]
"""What is done, and why its last run is refused."""


@pytest.mark.parametrize(("act", "why"), REFUSALS, ids=[act.__name__ for act, _ in REFUSALS])
def test_what_is_done_to_get_around_a_budget_is_refused(act: Callable[[World], None], why: str, world: World) -> None:
    with pytest.raises(ConfigError) as caught:
        act(world)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any((world.folder / root / "large").exists() for root in ("out", "b"))
