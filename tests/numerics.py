"""How close two computations of the same numbers must be, on any CPU.

Kernels of other CPUs add in another order, or multiply and add in one step, so that no two need agree to the last
bit. What is small beside the other entries of the same tensor is often a difference of large numbers, and its rounding
is theirs: a tolerance of its own size, or one that knows no size at all, holds on one machine and not on the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

ROUNDINGS = 300
"""Rounding errors of a computation, in units of the last place of its largest entry.

A backbone of the tests has two layers; forward and back that is some forty sums of up to 300 terms, one after another,
of which each is off by a few units and passes on, magnified by norms and softmax, what came before. The largest that
was measured, with AVX-512, AVX2 and neither, is 25 of them. In float32 these are 3.6e-5 of the largest entry; formulas
that are wrong are off by percents.
"""

FLOAT32 = ROUNDINGS * torch.finfo(torch.float32).eps
"""The same of numbers that were computed in float32 and are Python's by now."""

LEAST = 0.1
"""Share of the largest entry of all tensors below which a tensor's own largest entry is no scale, as in the check of
engines before training: where all gradients of a parameter are small, they are differences of large numbers."""


def rounding(*values: torch.Tensor) -> float:
    """Tolerance of the coarsest of these, relative to the largest entry."""
    return ROUNDINGS * max(torch.finfo(value.dtype).eps for value in values)


def _tensor(value: Any) -> torch.Tensor:
    made = value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.asarray(value))
    return made if made.is_floating_point() else made.double()


def distance(actual: Any, expected: Any, least: float = 0.0) -> float:
    """Largest difference relative to the largest expected entry, or to `least` where that is larger."""
    actual, expected = _tensor(actual), _tensor(expected)
    assert actual.shape == expected.shape, f"shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    difference = float((actual.double() - expected.double()).abs().max())
    scale = max(float(expected.double().abs().max()), least)
    return difference / scale if difference else 0.0


def assert_close_to_largest(actual: Any, expected: Any, rtol: float | None = None, what: str = "") -> None:
    """Fail where an entry is off by more than a share of the largest one.

    Args:
        actual: a tensor, an array, a number, or tensors by name.
        expected: the same of the other computation.
        rtol: the share; by default `ROUNDINGS` of the coarser of both number formats.
        what: named where this fails.
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), what
        least = LEAST * max((float(_tensor(value).abs().max()) for value in expected.values()), default=0.0)
        pairs = [(f"{what} {name}".strip(), actual[name], value) for name, value in expected.items()]
    else:
        least, pairs = 0.0, [(what, actual, expected)]
    for name, found, right in pairs:
        limit = rounding(_tensor(found), _tensor(right)) if rtol is None else rtol
        off = distance(found, right, least)
        assert off <= limit, f"{name or 'it'} is off by {off:.3g} of the largest entry, more than {limit:.3g}"


def differs(one: Any, other: Any) -> bool:
    """Whether two are further apart than any rounding."""
    return distance(one, other) > 2 * rounding(_tensor(one), _tensor(other))
