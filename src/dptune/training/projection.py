"""The coordinates in which gradients are clipped and noised: all of them, or a subspace (SPECIFICATION.md 5).

A subspace is public, a function of past releases, or found on the private data at a price that the plan has paid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dptune.config.schema import ON_PUBLIC_GRADIENTS, Config
from dptune.data.batches import Ladder, collate, physical_batches
from dptune.data.encoding import Encoded
from dptune.privacy.allocation import Group
from dptune.privacy.gradients import Engine
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose
from dptune.privacy.subspace import (
    Carriers,
    PaidSubspace,
    Subspace,
    gradient_carriers,
    principal_subspace,
    random_subspace,
)

Gradients = Mapping[str, torch.Tensor]


class FullSpace:
    """All coordinates: nothing is projected. The other projections derive from it."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        """What the mechanism clips and noises."""

    def project(self, per_example: Gradients) -> Gradients:
        """Gradients of rows in the coordinates that are released."""
        return per_example

    def lift(self, released: Gradients) -> Gradients:
        """A released vector as gradients of the parameters."""
        return released

    def after_step(self, step: int, gradients: Gradients) -> None:
        """Called with the released gradients of a step, from which a moving subspace may be drawn."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: it is public, or a function of what was released."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class FixedSubspace(FullSpace):
    """One subspace for all steps."""

    def __init__(self, subspace: Subspace | Carriers) -> None:
        super().__init__(subspace.reduced_groups)
        self.subspace = subspace

    def project(self, per_example: Gradients) -> Gradients:
        """Coordinates of rows, each [b, ...]."""
        return self.subspace.project(per_example)

    def lift(self, released: Gradients) -> Gradients:
        """The released coordinates as gradients of the parameters."""
        return self.subspace.lift(released)

    def state_dict(self) -> dict[str, Any]:
        """The subspace."""
        if isinstance(self.subspace, Subspace):
            return {"bases": list(self.subspace.bases)}
        return {"pairs": {name: list(pair) for name, pair in self.subspace.pairs.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the subspace."""
        self.subspace = stored_subspace(self.subspace.groups, state)


class ScaledSpace(FullSpace):
    """All coordinates, each divided by a public scale, so that one that is usually small gets less noise."""

    def __init__(self, groups: Sequence[Group], scales: Gradients) -> None:
        """`scales`, all positive, by parameter."""
        super().__init__(groups)
        self.scales = scales

    def project(self, per_example: Gradients) -> Gradients:
        """Gradients of rows over their scales."""
        return {name: value / self.scales[name].to(value) for name, value in per_example.items()}

    def lift(self, released: Gradients) -> Gradients:
        """A release times the scales."""
        return {name: value * self.scales[name].to(value) for name, value in released.items()}

    def state_dict(self) -> dict[str, Any]:
        """The scales."""
        return {"scales": dict(self.scales)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the scales."""
        self.scales = dict(state["scales"])


def stored_subspace(groups: Sequence[Group], state: Mapping[str, Any]) -> Subspace | Carriers:
    """The subspace in the state of a `FixedSubspace`."""
    if "bases" in state:
        return Subspace(tuple(groups), tuple(state["bases"]))
    return Carriers(tuple(groups), {name: (left, right) for name, (left, right) in state["pairs"].items()})


class MovingSubspace(FixedSubspace):
    """A subspace that is drawn anew every `refresh` steps, from public coins or from what was released so far."""

    def __init__(self, draw: Callable[[int], Subspace | Carriers], refresh: int) -> None:
        """Start with `draw(0)`; `draw(step)` gives the subspace that is used from that step on."""
        super().__init__(draw(0))
        self.draw, self.refresh = draw, refresh

    def after_step(self, step: int, gradients: Gradients) -> None:
        """Draw the next subspace when it is time."""
        if (step + 1) % self.refresh == 0:
            self.subspace = self.draw(step + 1)


class HistorySubspace(MovingSubspace):
    """Half of the directions from past releases, half random: releases alone would never leave their own span."""

    def __init__(self, groups: Sequence[Group], dimension: int, refresh: int, keys: KeyRing) -> None:
        """Start with a random subspace; `keys` must be public."""
        self._history: dict[str, list[torch.Tensor]] = {}

        def draw(step: int) -> Subspace:
            coins = random_subspace(groups, dimension, keys.stream(Purpose.PROJECTION, step=step))
            if len(next(iter(self._history.values()), [])) < refresh:
                return coins
            past = {name: torch.stack(values) for name, values in self._history.items()}
            found = principal_subspace(groups, past, min(dimension // 2, refresh))
            return Subspace(tuple(groups), tuple(map(_joined, found.bases, coins.bases)))

        super().__init__(draw, refresh)

    def after_step(self, step: int, gradients: Gradients) -> None:
        """Remember the release, then draw the next subspace when it is time."""
        for name, value in gradients.items():
            self._history.setdefault(name, []).append(value.detach().to("cpu", copy=True))
        super().after_step(step, gradients)

    def state_dict(self) -> dict[str, Any]:
        """The subspace and all past releases."""
        return {**super().state_dict(), "history": {name: torch.stack(past) for name, past in self._history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state)
        # In place: `draw` holds on to this dictionary.
        self._history.update({name: list(past) for name, past in state["history"].items()})


class ReparametrizedGradients(MovingSubspace):
    """RGP (arXiv:2106.09352): carriers of each matrix from a power iteration on what was released so far.

    The sum of the released gradients stands for the update of the weights, which it is, up to scale, under plain SGD at
    a constant rate. Unlike a `HistorySubspace` it can leave its own span: one half of the coordinates covers the whole
    column space of a matrix, the other its whole row space.
    """

    def __init__(self, groups: Sequence[Group], rank: int, refresh: int, keys: KeyRing) -> None:
        """Start with random carriers; `keys` must be public."""
        self._update: dict[str, torch.Tensor] = {}

        def draw(step: int) -> Carriers:
            stream = keys.stream(Purpose.PROJECTION, step=step)
            return gradient_carriers(groups, rank, stream, self._update or None)

        super().__init__(draw, refresh)

    def after_step(self, step: int, gradients: Gradients) -> None:
        """Add the release, then draw the next carriers when it is time."""
        for name, value in gradients.items():
            change = value.detach().to("cpu", copy=True)
            self._update[name] = self._update[name] + change if name in self._update else change
        super().after_step(step, gradients)

    def state_dict(self) -> dict[str, Any]:
        """The carriers and the sum of past releases."""
        return {**super().state_dict(), "update": dict(self._update)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state)
        self._update.update(state["update"])


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis with as many columns as `second`: the span of `first`, filled up from `second`."""
    columns = torch.cat([first, second], dim=1)[:, : second.shape[1]]
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


@dataclass(frozen=True)
class Sources:
    """What a subspace is drawn from or found on."""

    groups: Sequence[Group]
    """Groups of the parameters."""
    dimension: int
    """Coordinates kept of each group."""
    refresh: int
    """Steps between two draws of a subspace that moves."""
    coins: KeyRing
    """Public randomness."""
    plan: PrivacyPlan
    """Pays for a subspace of private gradients."""
    keys: KeyRing
    """Secret randomness, for the noise of a subspace of private gradients."""
    gradients: Callable[[Sequence[Encoded]], Iterator[dict[str, torch.Tensor]]]
    """Per-example gradients of some records, one physical batch at a time."""
    private_rows: Sequence[Encoded]
    """Each record that training may see, once."""
    public_rows: Callable[[], Sequence[Encoded]]
    """Records of public data."""


def _random(given: Sources) -> FullSpace:
    def draw(step: int) -> Subspace:
        return random_subspace(given.groups, given.dimension, given.coins.stream(Purpose.PROJECTION, step=step))

    return MovingSubspace(draw, given.refresh)


def _of_public_gradients(given: Sources) -> FullSpace:
    # More rows than directions, so that the leading ones stand out.
    parts = list(given.gradients(given.public_rows()[: 4 * given.dimension]))
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return FixedSubspace(principal_subspace(given.groups, together, given.dimension))


def _scaled(given: Sources) -> FullSpace:
    rows, squares = 0, dict[str, torch.Tensor]()
    for part in given.gradients(given.public_rows()[:SCALED_BY]):
        rows += len(next(iter(part.values())))
        for name, value in part.items():
            squares[name] = squares.get(name, 0.0) + value.double().square().sum(dim=0)
    return ScaledSpace(given.groups, scales_of({name: value / rows for name, value in squares.items()}))


def scales_of(moments: Gradients) -> dict[str, torch.Tensor]:
    """A scale for each coordinate from its second moment: its root, not far below that of the mean over all.

    They are such that a scaled gradient is as long as a plain one on average: the clip norm keeps its meaning.
    """
    total = sum(float(value.sum()) for value in moments.values())
    mean = max(total / sum(value.numel() for value in moments.values()), torch.finfo(torch.float32).tiny)
    scales = {name: (value + SCALE_FLOOR**2 * mean).sqrt() for name, value in moments.items()}
    length = sum(float((moments[name] / scale.square()).sum()) for name, scale in scales.items())
    factor = math.sqrt(length / total) if total > 0 else 1.0
    return {name: (scale * factor).float() for name, scale in scales.items()}


SCALED_BY, SCALE_FLOOR = 512, 0.1
"""Public records whose gradients give the scales, and the smallest scale over the root of the mean square."""


def _of_private_gradients(given: Sources) -> FullSpace:
    paid = PaidSubspace(given.groups, given.plan, given.keys)
    for part in given.gradients(given.private_rows):
        paid.accumulate(part)
    return FixedSubspace(paid.release(given.dimension)[0])


PROJECTIONS: Mapping[str, Callable[[Sources], FullSpace]] = {
    "none": lambda given: FullSpace(given.groups),
    "random": _random,
    "history": lambda given: HistorySubspace(given.groups, given.dimension, given.refresh, given.coins),
    "rgp": lambda given: ReparametrizedGradients(given.groups, given.dimension, given.refresh, given.coins),
    "public": _of_public_gradients,
    "scale": _scaled,
    "private": _of_private_gradients,
}
"""What each choice of `privacy.projection` does (SPECIFICATION.md 5)."""

FOUND_ON_DATA = (*ON_PUBLIC_GRADIENTS, "private")
"""Projections that are found once, on gradients of records."""


def make_projection(
    config: Config,
    groups: Sequence[Group],
    *,
    plan: PrivacyPlan,
    keys: KeyRing,
    engine: Engine,
    private_rows: Sequence[Encoded],
    public_rows: Callable[[], Sequence[Encoded]],
    ladder: Ladder,
    stored: Mapping[str, Any] | None = None,
) -> FullSpace:
    """The projection that the config names.

    Args:
        config: of the run.
        groups: groups of the parameters.
        plan: pays for a private subspace.
        keys: secret keys of the run, for the noise of a private subspace.
        engine: gives gradients for a public or private subspace.
        private_rows: each record that training may see, once.
        public_rows: encoded records of public data.
        ladder: shapes of the physical batches.
        stored: its state in a checkpoint. A subspace that was found on data is taken from there: on private data it
            is paid for once, and must not be released a second time.
    """
    device, privacy = config.compute.device, config.privacy
    if stored is not None and privacy.projection in FOUND_ON_DATA:
        if "scales" in stored:
            return ScaledSpace(groups, stored["scales"])
        return FixedSubspace(stored_subspace(groups, stored))

    def gradients(rows: Sequence[Encoded]) -> Iterator[dict[str, torch.Tensor]]:
        for piece in physical_batches(rows, ladder):
            own = [rows[row] for row in piece.positions.tolist()]
            found = engine(collate(own, ladder.layout, piece.shape, device))[1]
            yield {name: value[: len(own)] for name, value in found.items()}

    return PROJECTIONS[privacy.projection](
        Sources(
            groups=groups,
            dimension=privacy.projection_dimension,
            refresh=privacy.projection_refresh,
            coins=KeyRing.reproducible(config.environment.seed, "public"),
            plan=plan,
            keys=keys,
            gradients=gradients,
            private_rows=private_rows,
            public_rows=public_rows,
        )
    )
