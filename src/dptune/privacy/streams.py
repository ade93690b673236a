"""Keyed random streams: every random bit that privacy rests on (SPECIFICATION.md 10.1 and 10.2).

A `KeyRing` holds one 32-byte master key. Each purpose, step, parameter group and rank gets its own
stream, whose key is a SHA-256 hash of all of them, so that streams are independent of each other and any
of them can be opened again without replaying the others. Both noise modes take this one path; they differ
only in where the master key comes from.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from dptune.privacy.rules import NoiseMode

GRID_BITS = 10
"""Released values are multiples of the largest power of two that is at most their noise / 2**GRID_BITS (10.3)."""

_KEY_BYTES = 32
_CHUNK = 1 << 17  # normals drawn at a time: bounds the memory of a long draw to a few megabytes


class Purpose(StrEnum):
    """What a stream is used for; streams of different purposes are independent."""

    INIT = "init"
    """Initial adapter weights (public)."""
    PROJECTION = "projection"
    """Random projections (public)."""
    COHORT = "cohort"
    """Which of a user's own records are used (public)."""
    SAMPLING = "sampling"
    """Membership of the Poisson batch (secret)."""
    NOISE = "noise"
    """Gaussian noise of the releases (secret)."""
    CANARY = "canary"
    """Construction and inclusion of canaries."""
    SWEEP_K = "sweep_k"
    """The secret number of runs of a private selection, and their configs."""
    SCORE = "score"
    """Noise of the score that a private selection chooses by (secret)."""


@dataclass(frozen=True)
class KeyRing:
    """The master key of one run, and the streams derived from it.

    Attributes:
        master: 32 secret bytes; never part of `repr`.
        run: identity of the run, including the hash of its data manifest: two runs that differ in data,
            batch or clipping must never share a noise key (SPECIFICATION.md 10.4).
        mode: `secure` (operating-system entropy) or `reproducible` (derived from a public seed, so the
            reported epsilon is accounted, not realised; SPECIFICATION.md 10.1).
    """

    master: bytes = field(repr=False)
    run: str
    mode: NoiseMode

    def __post_init__(self) -> None:
        if len(self.master) != _KEY_BYTES:
            raise ValueError(f"master must be {_KEY_BYTES} bytes, not {len(self.master)}: use KeyRing.secure")
        if self.mode not in get_args(NoiseMode):
            raise ValueError(f"mode must be {' or '.join(get_args(NoiseMode))}, not {self.mode!r}")

    @classmethod
    def reproducible(cls, seed: int, run: str) -> KeyRing:
        """Key ring of a published seed (any integer): the same seed and run give the same streams."""
        return cls(hashlib.sha256(_encode("dptune reproducible seed", seed)).digest(), run, "reproducible")

    @classmethod
    def secure(cls, run: str) -> KeyRing:
        """Key ring of 256 fresh bits of operating-system entropy."""
        return cls(os.urandom(_KEY_BYTES), run, "secure")

    def stream(self, purpose: Purpose, *, step: int = 0, group: str = "", rank: int = 0) -> Stream:
        """Open the stream of a purpose, step, parameter group and rank, at its beginning."""
        return Stream(self._key(purpose, step, group, rank))

    def key_hash(self, purpose: Purpose, step: int = 0) -> str:
        """16 hex digits that identify a stream's key in a ledger without giving it away."""
        return hashlib.sha256(b"key hash" + self._key(purpose, step, "", 0)).hexdigest()[:16]

    def _key(self, purpose: Purpose, step: int, group: str, rank: int) -> bytes:
        return hashlib.sha256(self.master + _encode(str(Purpose(purpose)), self.run, step, group, rank)).digest()


class Stream:
    """A SHAKE-256 extendable-output stream; consecutive calls continue it.

    The numbers depend on the sequence of calls and their lengths, not only on the total drawn.
    """

    __slots__ = ("_call", "_key")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._call = 0

    def __repr__(self) -> str:
        return f"Stream(calls={self._call})"

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Draw `n` uniforms in the open interval (0, 1): odd multiples of 2**-53."""
        words = np.frombuffer(self._bytes(8 * n), dtype="<u8")
        return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, n: int) -> NDArray[np.float64]:
        """Draw `n` standard normals, each half the sum of four independent ones.

        The four come from the Box-Muller transform. Summing them blurs the floating-point grid of a single
        draw (Holohan & Braghin 2021, arXiv:2107.10138; SPECIFICATION.md 10.3).
        """
        out = np.empty(n, dtype=np.float64)
        for start in range(0, n, _CHUNK):
            part = out[start : start + _CHUNK]
            radius, angle = self.uniform(4 * part.size).reshape(2, 2, part.size)
            radius = np.sqrt(-2.0 * np.log(radius))
            angle *= 2.0 * np.pi
            np.sum(radius * (np.cos(angle) + np.sin(angle)), axis=0, out=part)
            part *= 0.5
        return out

    def seed(self) -> int:
        """Draw a 63-bit seed, for generators of public or non-private randomness only."""
        return int.from_bytes(self._bytes(8), "little") >> 1

    def _bytes(self, n: int) -> bytes:
        block = hashlib.shake_256(self._key + self._call.to_bytes(8, "little"))
        self._call += 1
        return block.digest(n)


def grid_of(std: float) -> float:
    """Spacing of the public grid of values that are released with noise `std` > 0."""
    return 2.0 ** (math.frexp(std)[1] - 1 - GRID_BITS)


def _encode(*parts: str | int) -> bytes:
    """Join parts so that no two different sequences of parts give the same bytes."""
    texts = [str(part).encode() for part in parts]
    return b"".join(len(text).to_bytes(8, "little") + text for text in texts)
