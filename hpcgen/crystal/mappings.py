"""Bases of one lattice that are like the cell of another one, for many pairs of lattices at once.

A mapping takes three lattice vectors v_k that span the first lattice (an integer matrix of determinant ±1) and are like
the cell vectors c_k of the second: |v_k| / |c_k| within 1 + ltol of one either way, the angles between them within
angle_tol. StructureMatcher calls it so (pymatgen's `Lattice.find_all_mappings`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SLACK = 1e-6  # relative, in lengths and coordinates, and in degrees: what rounding may not decide
_TOGETHER = 500_000  # combinations looked at at a time


@dataclass(frozen=True)
class Mappings:
    """Q mappings of P pairs."""

    pair: np.ndarray  # (Q,)
    matrix: np.ndarray  # (Q, 3, 3) int64; matrix @ first lattice is the basis found
    lengths: np.ndarray  # (Q, 3) of the basis
    angles: np.ndarray  # (Q, 3) degrees alpha, beta, gamma

    def some(self, which: np.ndarray) -> "Mappings":
        """Those at these places."""
        return Mappings(self.pair[which], self.matrix[which], self.lengths[which], self.angles[which])

    def close(self, lengths: np.ndarray, angles: np.ndarray, ltol: float, angle_tol: float) -> np.ndarray:
        """Which are like these cells within other tolerances. (Q, 3), (Q, 3) -> (Q,) bool."""
        ratio = self.lengths / lengths
        wide = (1 + ltol) * (1 + SLACK)
        near = np.abs(self.angles - angles) <= angle_tol + SLACK
        return ((ratio < wide) & (ratio * wide > 1) & near).all(1)


def angles_of(cells: np.ndarray) -> np.ndarray:
    """(M, 3, 3) -> (M, 3) degrees alpha, beta, gamma."""
    one, other = cells[:, [1, 0, 0]], cells[:, [2, 2, 1]]
    cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    return np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))


def mappings(
    lattices: np.ndarray, which: np.ndarray, lengths: np.ndarray, angles: np.ndarray, ltol: float, angle_tol: float
) -> Mappings:
    """All mappings of lattices[which] (P, 3, 3) onto cells of these lengths and angles (P, 3), a little too many.

    They are found within tolerances that are wider by SLACK.
    """
    wide = (1 + ltol) * (1 + SLACK)
    used, which = np.unique(which, return_inverse=True)
    radius = np.zeros(len(used))
    np.maximum.at(radius, which, lengths.max(1) * wide)
    lattices = lattices[used]
    points, cart, far, first = lattice_points(lattices, radius)

    pair, rank = ragged(np.diff(first)[which])
    point = first[which][pair] + rank
    ratio = far[point][:, None] / lengths[pair]
    inside = (ratio < wide) & (ratio * wide > 1)  # (..., 3)
    inside[:, 0] &= _is_first(points)[point]  # -v_k are like c_k where the v_k are
    sides = [np.flatnonzero(inside[:, k]) for k in range(3)]
    owners, sides = [pair[side] for side in sides], [point[side] for side in sides]
    low = np.cos(np.deg2rad(np.minimum(angles + angle_tol + SLACK, 180.0))) - 1e-12
    high = np.cos(np.deg2rad(np.maximum(angles - angle_tol - SLACK, 0.0))) + 1e-12
    unit = cart / far[:, None]

    def fits(k: int, pair: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        cosine = (unit[one] * unit[other]).sum(1)
        return (cosine >= low[pair, k]) & (cosine <= high[pair, k])

    parts = []
    for rows, partner in _combined(owners[0], owners[1], len(lengths)):
        a, b = sides[0][rows], sides[1][partner]
        good = fits(2, owners[0][rows], a, b)
        a, b, owner = a[good], b[good], owners[0][rows][good]
        for rows, partner in _combined(owner, owners[2], len(lengths)):
            c = sides[2][partner]
            good = np.flatnonzero(fits(1, owner[rows], a[rows], c))
            good = good[fits(0, owner[rows[good]], b[rows[good]], c[good])]
            rows, c = rows[good], c[good]
            matrix = np.stack([points[a[rows]], points[b[rows]], points[c]], axis=1)
            basis = np.abs(determinants(matrix)) == 1
            rows, c = rows[basis], c[basis]
            parts.append((owner[rows], matrix[basis], np.stack([a[rows], b[rows], c], axis=1)))
    owner, matrix, chosen = (np.concatenate(column) for column in zip(*parts, strict=True))
    half = owner, far[chosen], angles_of(cart[chosen])
    owner, far, angles = (np.concatenate([each, each]) for each in half)
    return Mappings(owner, np.concatenate([matrix, -matrix]), far, angles)


def _is_first(points: np.ndarray) -> np.ndarray:
    """Of each point (P, 3) and its opposite one is: that whose first number that is not 0 is positive. (P,) bool."""
    a, b, c = points.T
    return (a > 0) | (a == 0) & ((b > 0) | (b == 0) & (c > 0))


def lattice_points(lattices: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All points but the origin within `radius` (L,) of it.

    -> (P, 3) int64, (P, 3) Cartesian, (P,) distances, (L + 1,) where those of each lattice start.
    """
    # A point n @ cell has n_k = its product with the reciprocal vector k, so |n_k| <= radius |b*_k|.
    reciprocal = np.linalg.norm(np.linalg.inv(lattices), axis=1)
    most = np.floor(radius[:, None] * reciprocal * (1 + SLACK)).astype(np.int64)
    width = 2 * most + 1
    lattice, rank = ragged(width.prod(1))
    _, second, third = width[lattice].T
    points = np.stack([rank // (second * third), rank // third % second, rank % third], axis=1) - most[lattice]
    cart = np.matmul(points[:, None].astype(float), lattices[lattice])[:, 0]
    far = np.linalg.norm(cart, axis=1)
    near = np.flatnonzero((far <= radius[lattice] * (1 + SLACK)) & points.any(1))
    starts = np.concatenate([[0], np.cumsum(np.bincount(lattice[near], minlength=len(lattices)))])
    return points[near], cart[near], far[near], starts


def ragged(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Owner and number within it of `counts` (n,) things each. -> (total,), (total,)."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def determinants(matrix: np.ndarray) -> np.ndarray:
    """(Q, 3, 3) integers -> (Q,)."""
    (a, b, c), (d, e, f), (g, h, i) = matrix.transpose(1, 2, 0)
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def pieces(counts: np.ndarray, most: int) -> Iterator[slice]:
    """Runs of things of these sizes that come to at most `most` together, or are one thing. At least one run."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = ends[start - 1] if start else 0
        end = max(int(np.searchsorted(ends, done + most, side="right")), start + 1)
        yield slice(start, end)
        start = end
    if not len(counts):
        yield slice(0, 0)


def _combined(one: np.ndarray, other: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each of `one` with every one of `other` of the same owner: places in both, some at a time. Owners ascending."""
    sizes = np.bincount(other, minlength=count)
    first = np.cumsum(sizes) - sizes
    for piece in pieces(sizes[one], _TOGETHER):
        row, rank = ragged(sizes[one[piece]])
        row += piece.start
        yield row, first[one[row]] + rank
