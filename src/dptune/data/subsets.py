"""Which records are kept: those with the smallest keys, each a hash of the record and a public seed. No torch here.

The key decides, not the place, so that the same records are kept whatever their order is, and a bound on their number
bounds the memory of reading. Of training records each is kept or not for its own sake (SPECIFICATION.md 1.8).
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

    def examples(self) -> list[Example]:
        """The kept examples in the order in which they were offered."""
        if self._size is None:
            return self._all
        return [example for _, _, example in sorted(self._heap, key=lambda entry: -entry[1])]


class Share:
    """The examples whose key is below a public share: each is kept or not whatever the others are.

    Args:
        size: number of examples wanted, on average, of all that are offered (None: all).
        seed: makes the keys.
        count: public number of examples that there are; None counts those that are offered.
    """

    def __init__(self, size: float | None, seed: int, count: int | None = None):
        self._size, self._seed, self._count = size, seed, count
        self._heap: list[tuple[float, int, Example]] = []
        self._offered = 0

    @property
    def count(self) -> int:
        """Number of examples that there are, as far as is known."""
        return self._offered if self._count is None else self._count

    def offer(self, example: Example) -> None:
        """Look at one more example."""
        self._offered += 1
        share = self.share
        key = uniform(self._seed, "subset", *content(example))
        if key < share:
            heapq.heappush(self._heap, (-key, -self._offered, example))
        # The more there are, the smaller is the share.
        while self._heap and -self._heap[0][0] >= share:
            heapq.heappop(self._heap)

    @property
    def share(self) -> float:
        """The probability to be kept, of all that were offered so far."""
        return 1.0 if self._size is None else min(1.0, self._size / max(self.count, 1))

    def examples(self, share: float | None = None) -> list[Example]:
        """The kept examples, or of a smaller share, in the order in which they were offered."""
        limit = self.share if share is None else share
        kept = ((-place, example) for key, place, example in self._heap if -key < limit)
        return [example for _, example in sorted(kept, key=lambda entry: entry[0])]


class Mixture:
    """Examples of several tasks in stated proportions on average, the most that there are or `size` of them.

    Args:
        weights: of every task that is offered, each above 0; their sum counts as one.
        size: number of examples wanted, on average (None: all that the proportions permit).
        seed: decides which examples of a task are kept.
        counts: public number of examples of each task; None counts those that are offered.
    """

    def __init__(self, weights: Mapping[str, float], size: int | None, seed: int, counts: Mapping[str, int] | None):
        self._weights, self._size = weights, size
        total = sum(weights.values())
        self._kept = {
            task: Share(None if size is None else size * weight / total, seed, counts[task] if counts else None)
            for task, weight in weights.items()
        }

    def offer(self, example: Example) -> None:
        """Look at one more example."""
        self._kept[example.task].offer(example)

    def examples(self) -> list[Example]:
        """The kept examples, task by task. Raises ConfigError when a task has none."""
        counts = {task: kept.count for task, kept in self._kept.items()}
        if missing := sorted(task for task, count in counts.items() if not count):
            raise ConfigError(f"data.task_weights: no training record has the task {', '.join(missing)}")
        sizes = mixture(self._weights, self._size, counts)
        return [
            example
            for task, kept in sorted(self._kept.items())
            # The small number undoes rounding: a task that is kept whole is.
            for example in kept.examples(sizes[task] / counts[task] + 1e-9)
        ]


def mixture(weights: Mapping[str, float], size: int | None, counts: Mapping[str, int]) -> dict[str, float]:
    """How many examples of each task a mixture has, on average, of so many that there are."""
    total = sum(weights.values())
    most = min(counts[task] * total / weight for task, weight in weights.items())
    whole = most if size is None else min(most, size)
    return {task: whole * weight / total for task, weight in weights.items()}
