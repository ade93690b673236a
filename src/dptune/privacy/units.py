"""The vector of a privacy unit that has several rows: the mean of their gradients (SPECIFICATION.md 7.5, ULS)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

UNCOUNTED = -1
"""Unit of a row that only fills a physical batch up."""


class UnitMeans:
    """Means over the rows of each unit, added up one row after the other: a function of the unit to the last bit."""

    def __init__(self, rows_of: Mapping[int, int], size: int) -> None:
        """Start a block of units.

        Args:
            rows_of: number of rows of each unit.
            size: units of a full block, a public number; what is missing is filled up.
        """
        self._rows_of, self._size = dict(rows_of), size
        self._slots = {unit: slot for slot, unit in enumerate(rows_of)}
        self._missing = dict(rows_of)
        self._sums: dict[str, Tensor] = {}

    def add(self, per_example: Mapping[str, Tensor], units: Tensor) -> None:
        """Add the rows (b, *shape) of one physical batch; those that are not finite count as 0.

        Raises:
            ValueError: if a unit has more rows than it should.
        """
        norms = [value.flatten(1).double().norm(dim=1) for value in per_example.values()]
        finite = torch.stack(norms).isfinite().all(dim=0).tolist()
        for name, value in per_example.items():
            self._sums.setdefault(name, value.new_zeros((self._size, *value.shape[1:]), dtype=torch.float64))
        for row, unit in enumerate(units.tolist()):
            if unit == UNCOUNTED:
                continue
            if self._missing.get(unit, 0) == 0:
                raise ValueError("a unit has more rows in a step than it should; add each row once")
            self._missing[unit] -= 1
            if finite[row]:
                for name, value in per_example.items():
                    self._sums[name][self._slots[unit]] += value[row]

    def take(self) -> tuple[dict[str, Tensor], Tensor]:
        """One row a unit, float64, and the units; the rows that fill the block up are `UNCOUNTED`.

        Raises:
            ValueError: if rows of a unit are missing.
        """
        if any(self._missing.values()):
            raise ValueError("rows of a unit are missing; add all of them before its mean is taken")
        units = torch.full((self._size,), UNCOUNTED)
        counts = torch.ones(self._size, dtype=torch.float64)
        for unit, slot in self._slots.items():
            units[slot], counts[slot] = unit, max(self._rows_of[unit], 1)
        means = {
            name: value / counts.to(value.device).reshape(-1, *[1] * (value.dim() - 1))
            for name, value in self._sums.items()
        }
        return means, units
