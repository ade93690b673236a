"""By what data are known again however they are exported: hashes of what a few of their records say. No torch here.

Nothing here changes a record or decides about one: it is for the account of what all runs on the same people cost
together (SPECIFICATION.md 8.3).
"""

from __future__ import annotations

import hashlib
import heapq
import re
import unicodedata
from collections.abc import Iterator

from dptune.data.schema import Example

SIZE = 1024
"""Hashes that are kept: of two sources that share two per cent of what they say together, a single one in common is
missed once in a thousand million times; at half a per cent, six times in a thousand."""
TELLING = 16
"""Letters and digits from which on a part of a record counts as its own: people share shorter ones."""


def words(text: str) -> list[str]:
    """What a text says, however it is spelled, spaced or punctuated."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


class Sketch:
    """The lowest hashes of what the records say that are offered, each once: the same for any order of them.

    The hash decides which are kept, and not the source they are from. So two sources keep the same ones of those that
    they share, and one in common tells that they do (bottom-k sketches; Cohen & Kaplan 2007).
    """

    def __init__(self, size: int = SIZE) -> None:
        self._size = size
        self._kept: set[int] = set()
        self._highest: list[int] = []
        """The kept ones with the sign changed, as a heap."""

    def offer(self, example: Example) -> None:
        """Look at one more record, as it is read."""
        for mark in marks_of(example):
            if mark in self._kept:
                continue
            if len(self._highest) < self._size:
                heapq.heappush(self._highest, -mark)
            elif mark < -self._highest[0]:
                self._kept.discard(-heapq.heapreplace(self._highest, -mark))
            else:
                continue
            self._kept.add(mark)

    def lowest(self) -> tuple[int, ...]:
        """The hashes that are kept, ascending. They have no key: they are not to be written anywhere."""
        return tuple(sorted(self._kept))


def marks_of(example: Example) -> Iterator[int]:
    """Hashes of a record: of all its words, in whichever columns they are, and of its input and its free answer alone.

    So a record is the same one with columns that are mapped otherwise, and with another instruction or label.
    """
    instruction, body, answer = words(example.instruction), words(example.input), words(example.output)
    yield _hash(sorted((*instruction, *body, *answer)))
    for part in (body or instruction, [] if example.options else answer):
        if sum(map(len, part)) >= TELLING:
            yield _hash(part)


def _hash(found: list[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(found).encode(), digest_size=16).digest())
