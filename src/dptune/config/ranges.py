"""How large and how small each number of a config may be, and why: what the arithmetic behind it can still carry.

The bounds in `schema` say what a number means (a share lies in [0, 1]); these say where a computation with it would
overflow, divide by zero or last for ever. Nobody trains beyond them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Least and greatest value of a number, and the reason."""

    least: float
    most: float
    why: str


SMALLEST_STABILITY = 1e-3
"""Least constant of automatic clipping over the clip norm. The rule multiplies what rounding does to a gradient near
zero by up to the clip norm over this constant (SPECIFICATION.md 4.2): at most 1000."""

_NOISE = "less noise protects nothing and more hides everything"

RANGES: Mapping[str, Range] = {
    "privacy.target_epsilon": Range(
        1e-3, 1e3, "the accountant rounds by about 1e-4; without protection use privacy=none"
    ),
    # As in `privacy.accounting`, which a config does not load.
    "privacy.noise_multiplier": Range(0.1, 1e3, f"{_NOISE}; for a run without protection use privacy=none"),
    "privacy.projection_noise_multiplier": Range(
        0.1, 1e4, f"{_NOISE}; for a free subspace use privacy.projection=random"
    ),
    "privacy.score_noise_multiplier": Range(0.1, 1e4, f"{_NOISE}; without a score leave it null"),
    "privacy.delta": Range(1e-8, 1, "the accountant does not resolve a smaller one"),
    "privacy.budget": Range(1e-3, 1e3, "the accountant rounds by about 1e-4; for no limit leave it null"),
    "privacy.examples_per_user": Range(1, 256, "a group of more records has no epsilon that means anything"),
    "privacy.clipping_stability": Range(1e-9, 1e6, "it is added to norms of gradients"),
    "privacy.allocation_floor": Range(1e-9, 1, "noise would differ by more than rounding keeps"),
    "privacy.quantile": Range(1e-3, 0.999, "noisy bits do not show a rarer event"),
    "privacy.quantile_learning_rate": Range(1e-6, 10, "the clip norm moves by a factor of exp of it"),
    "privacy.quantile_share": Range(1e-6, 0.99, "the bits or the gradients would drown in noise"),
    "privacy.schedule_ratio": Range(1e-2, 1e2, "noise this uneven is all spent in a few steps"),
    "hyperparameter.learning_rate": Range(1e-12, 1e4, "weights do not move, or overflow"),
    "hyperparameter.max_grad_norm": Range(1e-6, 1e6, "clipped gradients and their noise must fit float32"),
    "hyperparameter.weight_decay": Range(0, 1e4, "weights would overflow"),
    "hyperparameter.steps": Range(0, 10**7, "each step has a noise multiplier and a row in the ledger"),
    "environment.adam_bc_floor": Range(1e-6, 1e6, "it is a denominator"),
    "adapter.alpha": Range(1e-6, 1e6, "weights do not move, or overflow"),
    "adapter.sparsity": Range(1e-6, 0.9999, "a matrix without zeros, or with nothing else, is no sparse one"),
    "data.seed": Range(0, 2**63 - 1, "generators take 63 bits"),
    "environment.seed": Range(0, 2**63 - 1, "generators take 63 bits"),
    "data_sensitivity.train_fraction": Range(1e-6, 1, "nothing would be left"),
    "data_sensitivity.class_imbalance": Range(1, 1e6, "nothing of the rarest would be left"),
    "data_sensitivity.task_imbalance": Range(1, 1e6, "nothing of the rarest would be left"),
    "data_sensitivity.test_class_shift": Range(1, 1e6, "nothing of the rarest would be left"),
    "data_sensitivity.user_tail": Range(0, 100, "nothing of the other users would be left"),
}
"""Numbers with a range of their own, by their dotted names."""

OF_INTEGERS = Range(-(10**9), 10**9, "no memory holds as many")
OF_NUMBERS = Range(-1e12, 1e12, "float32 keeps no more")
"""Every other number."""
