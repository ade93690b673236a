"""Public records with other answers: what a label means must then be learned from the records. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from random import Random

from dptune.data.schema import Example


class Relabelling:
    """Injective random maps from the options of each task to public options of the same task.

    A task is left as it is where its records do not share their options: there an option names no class.
    """

    def __init__(self, sources: Iterable[Sequence[Example]]) -> None:
        """Collect the options of each task over all public sources."""
        self._options: dict[str, set[tuple[str, ...]]] = {}
        for examples in sources:
            for task, options in shared_options(examples).items():
                self._options.setdefault(task, set()).add(options)

    def drawn(self, examples: Sequence[Example], coins: Random) -> list[Example]:
        """Records of one source with the options of each of its tasks renamed."""
        maps = {task: self._map(task, options, coins) for task, options in shared_options(examples).items()}
        return [_renamed(example, maps[example.task]) if example.task in maps else example for example in examples]

    def _map(self, task: str, options: tuple[str, ...], coins: Random) -> dict[str, str]:
        """Of two options another pair, or the same one, in either order; of more any others of the task."""
        known = self._options[task]
        pool = tuple(sorted({option for each in known for option in each}))
        if len(options) == 2:
            pool = coins.choice(sorted(each for each in known if len(each) == 2))
        return dict(zip(options, coins.sample(pool, len(options)), strict=True))


def shared_options(examples: Sequence[Example]) -> dict[str, tuple[str, ...]]:
    """The options of each task all of whose records have the same ones, sorted."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for example in examples:
        found.setdefault(example.task, set()).add(tuple(sorted(set(example.options or ()))))
    return {
        task: next(iter(options))
        for task, options in sorted(found.items())
        if len(options) == 1 and len(next(iter(options))) > 1
    }


def _renamed(example: Example, names: Mapping[str, str]) -> Example:
    assert example.options is not None
    options = tuple(names[option] for option in example.options)
    return dataclasses.replace(example, options=options, output=names[example.output])
