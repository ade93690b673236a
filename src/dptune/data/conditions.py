"""Conditions of the training data. Each is record-wise: what happens to a record depends on that record alone."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from dptune.config import DataSensitivityConfig
from dptune.data.schema import Example


def apply(examples: Sequence[Example], condition: DataSensitivityConfig, seed: int) -> list[Example]:
    """The training examples under a condition."""
    kept = scarce(examples, condition.train_fraction, seed)
    return [with_label_noise(example, condition.label_noise, seed) for example in kept]


def scarce(examples: Sequence[Example], fraction: float, seed: int) -> list[Example]:
    """A share of the examples; the number kept is exact and public."""
    return subset(examples, int(len(examples) * fraction), seed + 1)


def subset(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """At most `size` examples, chosen by a seeded shuffle and kept in their order."""
    if size >= len(examples):
        return list(examples)
    keys = [hashlib.sha256(f"{seed} {position}".encode()).digest() for position in range(len(examples))]
    kept = sorted(sorted(range(len(examples)), key=keys.__getitem__)[:size])
    return [examples[position] for position in kept]


def with_label_noise(example: Example, share: float, seed: int) -> Example:
    """With probability `share`, the example with one of its other options as the answer."""
    if example.options is None or len(example.options) < 2 or share == 0:
        return example
    digest = hashlib.sha256(f"{seed} {example.instruction}\0{example.input}\0{example.output}".encode()).digest()
    if int.from_bytes(digest[:8]) >= share * 2**64:
        return example
    others = [option for option in example.options if option != example.output]
    return dataclasses.replace(example, output=others[digest[8] % len(others)])
