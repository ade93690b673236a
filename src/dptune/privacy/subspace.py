"""Subspaces of the update, and free post-processing of what was released (SPECIFICATION.md 5 and 6).

A subspace projects the gradient of each example *before* it is clipped: the mechanism clips and adds noise in
the k reduced coordinates, and the released vector is lifted back.

    subspace = random_subspace(groups, k, stream)
    mechanism = Mechanism(plan, subspace.reduced_groups, keys)
    mechanism.accumulate(subspace.project(per_example))
    gradients = subspace.lift(mechanism.release(step).gradients)

FFA-LoRA (2403.12313) needs nothing of this: its frozen public A is not among the trainable parameters, so that B alone
is clipped and noised, and the noise in BA is linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dptune.privacy.allocation import Group
from dptune.privacy.clipping import MARGIN, SensitivityError
from dptune.privacy.events import Event
from dptune.privacy.mechanism import round_to_grid
from dptune.privacy.plan import PrivacyPlan
from dptune.privacy.streams import KeyRing, Purpose, Stream


@dataclass(frozen=True)
class Subspace:
    """One orthonormal basis for each group; it must be public or a function of released quantities.

    Privacy does not need orthonormal columns: any linear map before clipping is covered. They make `lift` after
    `project` the orthogonal projection, which on average keeps k/D of a gradient's energy if the basis is random.

    Attributes:
        groups: the groups of the full parameters.
        bases: for each group a float64 matrix of shape (d_g, k_g) with orthonormal columns.
    """

    groups: tuple[Group, ...]
    bases: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        for group, basis in zip(self.groups, self.bases, strict=True):
            if basis.ndim != 2 or len(basis) != group.dimension or not 1 <= basis.shape[1] <= len(basis):
                raise ValueError(f"basis of {group.name!r} has shape {tuple(basis.shape)}; expected (d, k <= d)")

    @property
    def reduced_groups(self) -> tuple[Group, ...]:
        """Groups of the same names, each with its k_g coordinates as one parameter: for the mechanism."""
        return tuple(
            Group(group.name, (group.name,), basis.shape[1])
            for group, basis in zip(self.groups, self.bases, strict=True)
        )

    def project(self, per_example: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Coordinates by group, float64 (b, k_g), of gradients by parameter, (b, *shape)."""
        return {
            group.name: _each(_flat(group, per_example), basis.mT.contiguous().to(_device(per_example)).matmul)
            for group, basis in zip(self.groups, self.bases, strict=True)
        }

    def lift(self, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Released coordinates, (k_g,) by group, as gradients by parameter, float32."""
        lifted = {}
        for group, basis in zip(self.groups, self.bases, strict=True):
            full = basis.to(released[group.name].device) @ released[group.name].double()
            parts = torch.split_with_sizes(full, group.sizes)
            for name, shape, part in zip(group.parameters, group.shapes, parts, strict=True):
                lifted[name] = part.float().reshape(shape)
        return lifted


def random_subspace(groups: Sequence[Group], k: int, stream: Stream) -> Subspace:
    """Uniformly random bases of at most k columns (5 b).

    Args:
        groups: the groups.
        k: coordinates of each group; a smaller group keeps all of its own.
        stream: public, of purpose `projection`; one of a later step refreshes the subspace.
    """
    generator = torch.Generator().manual_seed(stream.seed())
    bases = []
    for group in groups:
        shape = (group.dimension, min(k, group.dimension))
        bases.append(_orthonormal(torch.randn(shape, generator=generator, dtype=torch.float64)))
    return Subspace(tuple(groups), tuple(bases))


@dataclass(frozen=True)
class Carriers:
    """Low-rank gradient carriers of each matrix: the coordinates of RGP (5 c4; Yu et al. 2021, 2106.09352).

    The gradient G (out, in) of W = W' + L R with respect to L is G R^T and with respect to R it is L^T G; those
    r (out + in) numbers are what is clipped and noised. A parameter that is no matrix, or for which they would not be
    fewer than its entries, keeps its own coordinates.

    Like the bases of a `Subspace`, carriers must be public or a function of released quantities.

    Attributes:
        groups: the groups of the full parameters.
        pairs: by parameter L (out, r) with orthonormal columns and R (r, in) with orthonormal rows, float64.
    """

    groups: tuple[Group, ...]
    pairs: Mapping[str, tuple[Tensor, Tensor]]

    def __post_init__(self) -> None:
        shapes = _shapes(self.groups)
        for name, (left, right) in self.pairs.items():
            if (len(left), *right.shape[1:]) != shapes.get(name) or left.shape[1:] != right.shape[:1]:
                raise ValueError(
                    f"carriers of {name!r} have shapes {tuple(left.shape)} and {tuple(right.shape)};"
                    " expected (out, r) and (r, in)"
                )

    @property
    def reduced_groups(self) -> tuple[Group, ...]:
        """Groups of the same names, in which the two halves of its coordinates replace a matrix."""
        reduced = []
        for group in self.groups:
            shapes: dict[str, tuple[int, ...]] = {}
            for name, shape in _shapes([group]).items():
                if name in self.pairs:
                    shapes |= zip(_halves(name), (tuple(half.shape) for half in self.pairs[name]), strict=True)
                else:
                    shapes[name] = shape
            dimension = sum(math.prod(shape) for shape in shapes.values())
            reduced.append(Group(group.name, tuple(shapes), dimension, tuple(shapes.values())))
        return tuple(reduced)

    def project(self, per_example: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """G R^T (b, out, r) and L^T G (b, r, in) of each matrix, other parameters as they are; dtypes stay.

        The engine computes each G first, which takes b * out * in numbers per matrix. The paper puts the carriers into
        the model and never forms G, which takes b * r * (out + in) numbers; this is not implemented here.
        """
        coordinates: dict[str, Tensor] = {}
        for name, shape in _shapes(self.groups).items():
            value = per_example[name].detach()
            if name in self.pairs:
                left, right = (carrier.to(value) for carrier in self.pairs[name])
                matrices = value.reshape(len(value), *shape)
                sides = _each(matrices, lambda g: g @ right.mT), _each(matrices, lambda g: left.mT @ g)  # noqa: B023
                coordinates |= zip(_halves(name), sides, strict=True)
            else:
                coordinates[name] = value
        return coordinates

    def lift(self, released: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Released coordinates as gradients by parameter, float32: dL R + L dR - L L^T dL R of each matrix.

        After `project` this is the orthogonal projection G - (1 - L L^T) G (1 - R^T R).
        """
        lifted = {}
        for name in _shapes(self.groups):
            if name in self.pairs:
                of_left, of_right = (released[half].double() for half in _halves(name))
                left, right = (carrier.to(of_left.device) for carrier in self.pairs[name])
                lifted[name] = ((of_left - left @ (left.mT @ of_left)) @ right + left @ of_right).float()
            else:
                lifted[name] = released[name].float()
        return lifted


def _shapes(groups: Sequence[Group]) -> dict[str, tuple[int, ...]]:
    return {name: shape for group in groups for name, shape in zip(group.parameters, group.shapes, strict=True)}


def _halves(name: str) -> tuple[str, str]:
    return f"{name} left", f"{name} right"


def gradient_carriers(
    groups: Sequence[Group], rank: int, stream: Stream, update: Mapping[str, Tensor] | None = None
) -> Carriers:
    """Carriers by one power iteration on an update, from a random start (5 c4; 2106.09352).

    Args:
        groups: the groups.
        rank: r >= 1; a matrix with out * in <= r (out + in) gets no carriers.
        stream: public, of purpose `projection`.
        update: by parameter the update so far, or the sum of the gradients that were released; the scale does
            not matter. It must be a function of released quantities. None: the carriers are random.

    Raises:
        ValueError: if no matrix would have fewer coordinates than entries.
    """
    generator = torch.Generator().manual_seed(stream.seed())

    def random(rows: int) -> Tensor:
        return _orthonormal(torch.randn((rows, rank), generator=generator, dtype=torch.float64))

    pairs = {}
    for name, shape in _shapes(groups).items():
        if len(shape) == 2 and rank * sum(shape) < math.prod(shape):
            left, right = map(random, shape)
            if update is not None:
                matrix = update[name].double()
                left = _orthonormal(matrix @ right.to(matrix.device))
                right = _orthonormal(matrix.mT @ left)
            pairs[name] = (left, right.mT.contiguous())
    if not pairs:
        raise ValueError(f"carriers of rank {rank} have as many coordinates as the largest matrix; lower the rank")
    return Carriers(tuple(groups), pairs)


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def principal_subspace(groups: Sequence[Group], gradients: Mapping[str, Tensor], k: int) -> Subspace:
    """The k directions with most energy in the given gradients (5 c1 and c3).

    Free if the gradients are of public data (2007.03813) or are past releases; those of private data must be
    paid for (`PaidSubspace`). Past releases that were lifted from a subspace lie in it, so their directions do, too.

    Args:
        groups: the groups.
        gradients: rows (n, *shape) of each parameter.
        k: directions of each group, at most n; a smaller group keeps all of its own.

    Raises:
        ValueError: if there are fewer rows than directions.
    """
    rows = len(next(iter(gradients.values())))
    bases = []
    for group in groups:
        directions = min(k, group.dimension)
        if directions > rows:
            raise ValueError(f"{rows} gradients span fewer than k={directions} directions; lower k")
        bases.append(torch.linalg.svd(_flat(group, gradients), full_matrices=False).Vh[:directions].mT)
    return Subspace(tuple(groups), tuple(basis.contiguous() for basis in bases))


_MOST_ENTRIES = 2**28  # 2 GiB of float64


class PaidSubspace:
    """The k leading directions of private gradients, from a noised sum of v v^T (5 c2; Dwork et al. 2014).

    Each record's v_g is clipped to |v_g|^2 <= 1/sqrt(G), so that the matrices v_g v_g^T of one record have a
    joint Frobenius norm of at most 1. It keeps d_g^2 numbers for each group, so it is for small groups.
    """

    def __init__(self, groups: Sequence[Group], plan: PrivacyPlan, keys: KeyRing) -> None:
        """Start an empty sum.

        Args:
            groups: the groups.
            plan: of the training that will use the subspace; its one-shot event is what this release costs and
                how much noise it gets.
            keys: where the noise comes from.

        Raises:
            ValueError: if the plan does not pay for exactly one one-shot release, the keys are of another mode, or
                the sums do not fit into memory.
        """
        if len(plan.one_shot) != 1:
            raise ValueError(
                f"a subspace of private gradients must be paid for: the plan has {len(plan.one_shot)} one_shot events,"
                " give it the one of this release"
            )
        if keys.mode != plan.noise_mode:
            raise ValueError(f"noise_mode is {plan.noise_mode} but the keys are {keys.mode}; make them agree")
        if (entries := sum(group.dimension**2 for group in groups)) > _MOST_ENTRIES:
            raise ValueError(
                f"a subspace of private gradients sums {entries:.1e} entries of v v^T, above {_MOST_ENTRIES:.1e};"
                " train fewer parameters or group them more finely"
            )
        self.event = plan.one_shot[0]
        """What it costs: part of the plan's events."""
        self._groups, self._keys = tuple(groups), keys
        self._sums = [torch.zeros(group.dimension, group.dimension, dtype=torch.float64) for group in groups]
        self._released = False

    def accumulate(self, per_example: Mapping[str, Tensor]) -> None:
        """Add v v^T of each record; rows (b, *shape) of each parameter, each record once.

        Raises:
            ValueError: if the subspace is released already.
        """
        self._require_unreleased()
        flats = [_flat(group, per_example).cpu() for group in self._groups]
        finite = torch.stack([torch.linalg.vector_norm(flat, dim=1) for flat in flats]).isfinite().all(dim=0)
        bound = len(self._groups) ** -0.25
        clipped = []
        for flat in flats:
            rows = torch.where(finite.unsqueeze(1), flat, 0.0)
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            clipped.append(rows * torch.where(norms > bound, bound / norms, 1.0) * MARGIN)
        frobenius = sum(torch.linalg.vector_norm(rows, dim=1) ** 4 for rows in clipped)
        if not bool((torch.as_tensor(frobenius) <= 1.0).all()):
            raise SensitivityError("a clipped second moment is larger than 1; nothing is released")
        for total, rows in zip(self._sums, clipped, strict=True):
            total += rows.mT @ rows

    def release(self, k: int) -> tuple[Subspace, Event]:
        """Add noise, once, and return the leading eigenvectors and what they cost.

        Raises:
            ValueError: if it is called again.
        """
        self._require_unreleased()
        self._released = True
        bases = []
        for group, total in zip(self._groups, self._sums, strict=True):
            upper = torch.triu_indices(group.dimension, group.dimension)
            noise = self._keys.stream(Purpose.NOISE, group=f"subspace {group.name}").normal(upper.shape[1])
            std = self.event.noise_multiplier
            entries = round_to_grid(total[upper[0], upper[1]] + std * torch.from_numpy(noise), std)
            matrix = torch.zeros_like(total)
            matrix[upper[0], upper[1]] = entries
            matrix[upper[1], upper[0]] = entries
            vectors = torch.linalg.eigh(matrix).eigenvectors  # eigenvalues ascend
            bases.append(vectors[:, -min(k, group.dimension) :].flip(1).contiguous())
        return Subspace(self._groups, tuple(bases)), self.event

    def _require_unreleased(self) -> None:
        if self._released:
            raise ValueError("the subspace is released; a second one needs its own event and its own keys")


def _each(rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of each row, one after the other: a product over all rows rounds by their place (10.3)."""
    if not len(rows):
        return function(rows.new_zeros(rows.shape[1:])).unsqueeze(0)[:0]
    return torch.stack([function(row.clone()) for row in rows])


def _flat(group: Group, gradients: Mapping[str, Tensor]) -> Tensor:
    parts = [gradients[name].detach() for name in group.parameters]
    sizes = group.sizes
    return torch.cat([part.reshape(len(part), n).double() for part, n in zip(parts, sizes, strict=True)], dim=1)


def _device(gradients: Mapping[str, Tensor]) -> torch.device:
    return next(iter(gradients.values())).device


def ema(average: Tensor, value: Tensor, beta: float) -> Tensor:
    """Beta average + (1 - beta) value: of iterates (2204.13650), or of the noise variance for `adam_bc` (6).

    Of white noise of variance 1 it keeps the variance (1 - beta) / (1 + beta).
    """
    return beta * average + (1.0 - beta) * value


def adam_bc(first_moment: Tensor, second_moment: Tensor, noise_variance: float, floor: float) -> Tensor:
    """Adam's direction without the bias of the noise: m / sqrt(max(v - Phi, floor)) (6; 2312.14334).

    Args:
        first_moment: bias-corrected m of y / L.
        second_moment: bias-corrected v of y / L, same shape.
        noise_variance: phi = (s_g / L)^2; if s_g changes, its moving average with beta_2, bias-corrected as v is.
        floor: smallest second moment; sets the largest step.
    """
    return first_moment / (second_moment - noise_variance).clamp(min=floor).sqrt()


def james_stein(vector: Tensor, std: float) -> Tensor:
    """(1 - (d - 2) s^2 / |y|^2)_+ y: shrink a released vector of noise s towards 0 (6)."""
    energy = vector.square().sum()
    if vector.numel() <= 2 or energy == 0.0:
        return vector
    return vector * (1.0 - (vector.numel() - 2) * std**2 / energy).clamp(min=0.0)


def shrink_singular_values(matrix: Tensor, std: float) -> Tensor:
    """Least-squares shrinkage of the singular values of a matrix with noise s (6; Gavish & Donoho 2017).

    Args:
        matrix: released, shape (m, n); one noise level for all entries.
        std: s > 0, on the same scale.
    """
    rows, columns = matrix.shape
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    scale = std * math.sqrt(max(rows, columns))
    shrunk = scale * gavish_donoho(values / scale, min(rows, columns) / max(rows, columns))
    return torch.matmul(u * shrunk, vh).to(matrix.dtype)


def gavish_donoho(y: Tensor, beta: float) -> Tensor:
    """Frobenius shrinker sqrt((y^2 - beta - 1)^2 - 4 beta) / y above 1 + sqrt(beta), else 0 (1405.7511).

    Args:
        y: singular values in units of s sqrt(n), n the longer side.
        beta: aspect ratio in (0, 1].
    """
    above = y > 1.0 + math.sqrt(beta)
    inner = ((y.square() - beta - 1.0).square() - 4.0 * beta).clamp(min=0.0)
    return torch.where(above, inner.sqrt() / torch.where(above, y, 1.0), 0.0)
