"""Which records are kept: those with the smallest keys, each a hash of the record and a public seed. No torch here.

The order of the records does not matter, and no more of them are in memory than are kept. In a neighbouring data set a
ghost stands in the place of a kept record, so that no other record moves up (SPECIFICATION.md 1.1).
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping

from dptune.config.schema import ConfigError
from dptune.data.schema import Example


def uniform(seed: int, purpose: str, *texts: str) -> float:
    """A number in [0, 1) that depends on the arguments alone."""
    content = "\0".join((str(seed), purpose, *texts))
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=7).digest()) / 2**56


def content(example: Example) -> tuple[str, ...]:
    """The parts of a record that its key is made of."""
    return (example.task, example.instruction, example.input, example.output)


class Smallest:
    """The `size` examples with the smallest keys of all that are offered (None: all), in memory of that size."""

    def __init__(self, size: int | None, seed: int):
        self._size, self._seed = size, seed
        self._all: list[Example] = []
        # The largest key first; of copies of a record the first is kept.
        self._heap: list[tuple[float, int, Example]] = []
        self._offered = 0

    def offer(self, example: Example) -> None:
        """Look at one more example."""
        self._offered += 1
        if self._size is None:
            self._all.append(example)
        elif len(self._heap) < self._size:
            heapq.heappush(self._heap, self._entry(example, self._offered))
        else:
            heapq.heappushpop(self._heap, self._entry(example, self._offered))

    def _entry(self, example: Example, place: int) -> tuple[float, int, Example]:
        return (-uniform(self._seed, "subset", *content(example)), -place, example)

    def __len__(self) -> int:
        return len(self._all) + len(self._heap)

    def examples(self, size: int | None = None) -> list[Example]:
        """The kept examples, or the `size` of them with the smallest keys, in the order in which they were offered."""
        if self._size is None and size is None:
            return self._all
        entries = self._heap or [self._entry(example, place) for place, example in enumerate(self._all)]
        if size is not None:
            entries = heapq.nlargest(size, entries)
        return [example for _, _, example in sorted(entries, key=lambda entry: -entry[1])]


class Mixture:
    """Examples of several tasks in given proportions.

    Args:
        weights: by task, above 0, for every task that is offered; they are divided by their sum.
        size: most examples to keep; None: as many as the proportions permit.
        seed: decides which examples of a task are kept.
    """

    def __init__(self, weights: Mapping[str, float], size: int | None, seed: int):
        total = sum(weights.values())
        self._shares = {task: weight / total for task, weight in weights.items()}
        self._size = size
        self._kept = {
            task: Smallest(None if size is None else int(size * share) + 1, seed)
            for task, share in self._shares.items()
        }

    def offer(self, example: Example) -> None:
        """Look at one more example."""
        self._kept[example.task].offer(example)

    def examples(self) -> list[Example]:
        """The kept examples, task by task. Raises ConfigError when a task has none."""
        missing = [task for task, kept in self._kept.items() if not len(kept)]
        if missing:
            raise ConfigError(f"data.task_weights: no training record has the task {', '.join(sorted(missing))}")
        most = min(len(kept) / self._shares[task] for task, kept in self._kept.items())
        size = most if self._size is None else min(most, self._size)
        # The small number undoes rounding: three times a third of 9 must be 9.
        return [
            example
            for task, kept in sorted(self._kept.items())
            for example in kept.examples(int(size * self._shares[task] + 1e-6))
        ]
