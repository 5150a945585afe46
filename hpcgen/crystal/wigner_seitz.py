"""Exact minimum images in any cell, however skewed: the step from a site to the nearest image of another."""

import math
from itertools import product

import torch
from torch import Tensor

from hpcgen.crystal.lattice import inverse_transform, niggli_reduce

TIE = 1e-9  # images whose squared lengths differ by less than this share are equally near


def wigner_seitz_offsets(transform: Tensor) -> Tensor:
    """Translations among which the minimum image lies. `transform` (B, 3, 3) of niggli_reduce -> (B, 27, 3).

    Those of -1, 0, 1 along each vector of the Niggli cell, in multiples of the *Niggli* vectors, ordered as
    the same translations written in the given cell are: by the first, then the second, then the third.

    Why 27 are enough: let u be the step in Niggli coordinates, rounded to |u_k| <= 1/2, and y = u + t its
    minimum image, a point of the Wigner-Seitz cell. A Niggli cell is Minkowski-reduced, and in three
    dimensions points of the Wigner-Seitz cell have |y_k| <= 1 in a Minkowski-reduced basis (Nguyen and
    Stehlé, ACM Trans. Algorithms 5, 46, 2009, section 5). So |t_k| <= 3/2, and t_k is whole: -1, 0 or 1. The
    spare half holds the tolerance of the reduction; all images of a tie are among them, too.
    """
    offsets = torch.tensor(list(product((-1, 0, 1), repeat=3)), device=transform.device)  # (27, 3)
    given = torch.einsum("mi,bij->bmj", offsets.double(), transform.double())  # (B, 27, 3) whole numbers
    order = torch.arange(27, device=transform.device).expand(len(transform), 27)
    for axis in (2, 1, 0):
        key = given[..., axis].gather(1, order)
        order = order.gather(1, key.argsort(dim=1, stable=True))
    return offsets[order]


def minimum_image(
    step: Tensor, lattice: Tensor, batch: Tensor | None = None, transform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shortest image of a step: vector = (step + image) @ lattice. Any step, any cell; exact.

    step (P, 3) fractional, lattice (B, 3, 3) Å, batch (P,) the crystal of each step; or, without `batch`,
    step (B, ..., 3), dense. -> vector Å and image int64, both shaped as `step`. Of equally short images
    (squared lengths within 1e-9 of each other) the one is taken that comes first by its three integers.
    Differentiable by step and lattice, the image being constant. A step of NaN gives a vector of NaN.
    transform: that of niggli_reduce(lattice), to save its time where a lattice is used again.
    Raises ValueError for a flat or non-finite cell.
    """
    if transform is None:
        transform = niggli_reduce(lattice)[1]
    shape = step.shape
    if batch is None:
        step = step.reshape(len(lattice), math.prod(shape[1:-1]), 3)  # (B, X, 3); -1 is ambiguous for B = 0
    with torch.no_grad():
        image = _image(step, lattice.double(), transform, batch)
    vector = _times(step + image, _per_step(lattice, batch))
    return vector.reshape(shape), image.reshape(shape)


def _image(step: Tensor, lattice: Tensor, transform: Tensor, batch: Tensor | None) -> Tensor:
    """Image of the shortest step. (P, 3) or (B, X, 3), lattice (B, 3, 3) float64 -> int64, as step."""
    reduced = transform.double() @ lattice
    gram = reduced @ reduced.mT  # (B, 3, 3)
    offsets = wigner_seitz_offsets(transform)  # (B, 27, 3)
    moves = offsets.double()
    squares = torch.einsum("bmi,bij,bmj->bm", moves, gram, moves)

    coords = _times(step.double(), _per_step(inverse_transform(transform).double(), batch))
    whole = coords.round()
    rest = coords - whole  # in [-1/2, 1/2] of the Niggli cell
    pull = 2 * _times(rest, _per_step(gram, batch))
    tie = TIE * (rest * pull).sum(-1)

    best = torch.full_like(rest[..., 0], torch.inf)
    which = torch.zeros_like(best, dtype=torch.int64)
    for m in range(moves.shape[1]):
        # |rest + move|² without its part |rest|², which is the same for all
        longer = (pull * _per_step(moves[:, m], batch)).sum(-1) + _per_step(squares[:, m], batch)
        nearer = longer < best - tie
        best = torch.where(nearer, longer, best)
        which = torch.where(nearer, m, which)
    moved = _chosen(offsets, which, batch).double() - whole
    return _times(moved, _per_step(transform.double(), batch)).round().long()


def _chosen(offsets: Tensor, which: Tensor, batch: Tensor | None) -> Tensor:
    if batch is not None:
        return offsets[batch, which]
    return offsets.gather(1, which.unsqueeze(-1).expand(*which.shape, 3))


def _per_step(value: Tensor, batch: Tensor | None) -> Tensor:
    """A value of each crystal (B, ...), so that it meets steps (P, 3) or (B, X, 3)."""
    return value[batch] if batch is not None else value.unsqueeze(1)


def _times(row: Tensor, matrix: Tensor) -> Tensor:
    """Row times matrix. (..., 3), (..., 3, 3) broadcast -> (..., 3)."""
    x, y, z = row.split(1, dim=-1)
    return x * matrix[..., 0, :] + y * matrix[..., 1, :] + z * matrix[..., 2, :]
