"""One run on several processes that `torchrun` has started: which of them this is, and what they tell each other.

Each rank draws the same batch from the same keys and takes some of its physical batches; clipped sums are added up over
ranks in float64. Every rank then draws the same noise, so that it is in the sum once, and makes the same update. All
ranks hold the secret keys of sampling in any case, so that holding those of the noise tells them nothing more. Sums are
broadcast after they are added up, so that ranks cannot drift apart by rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(hours=24)
"""How long a rank waits for another one; the others wait while the first evaluates."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that do one run together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> None:
        """Add a tensor up over the ranks, in place; all ranks get the same bits."""
        if self.size > 1:
            # Through the CPU: vectors are as small as the adapter, and gloo is the same everywhere.
            total = values.to("cpu", copy=True)
            dist.all_reduce(total)
            dist.broadcast(total, src=0)
            values.copy_(total)

    def broadcast(self, message: bytes) -> bytes:
        """The first rank's message, on every rank; all must pass messages of one length."""
        if self.size == 1:
            return message
        buffer = torch.tensor(list(message), dtype=torch.uint8)
        dist.broadcast(buffer, src=0)
        return bytes(buffer.tolist())

    def barrier(self) -> None:
        """Go on when all ranks are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The ranks that `torchrun` started, or this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
