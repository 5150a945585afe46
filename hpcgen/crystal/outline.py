"""Whether two reduced crystals are the same: the comparison that pymatgen's StructureMatcher makes, many times faster.

StructureMatcher (Ong et al., Comput. Mater. Sci. 68, 314, 2013) scales two reduced cells to one volume and then looks
for (1) three vectors v_k of the first lattice L that span it (an integer matrix of determinant ±1) and are like the
cell vectors c_k of the second: |v_k| / |c_k| within 1 + ltol of one either way, angles within angle_tol; (2) for one
of these mappings a shift, of one site of the second's rarest element onto a site of the first, after which every site
of the second has one of its element in the first within 2 stol (V/N)^(1/3) |b*_k| in each fractional coordinate, b*_k
being the reciprocal vectors (without 2π) of the mean cell; and (3) whether the sites so paired that the sum of squared
distances is least lie within stol (V/N)^(1/3), once the mean of the steps between them is taken off. `same` asks the
three in this order: (1) and (2) for all mappings at once, a little more loosely than rounding errors are large, and
(3) of what is left, as StructureMatcher does.

`short_enough` asks a consequence of (1) of many lattices at once. The v_k are independent, so the k-th shortest of
them is no shorter than the k-th successive minimum λ_k of L, the least radius that holds k independent vectors:
λ_k(L) <= (1 + ltol) c_(k), the lengths c of the second cell in ascending order. So it never parts what matches.
Within stol = 0.3 two sites may move by half of a bond length: no bound on distances between atoms would part much.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np

from hpcgen.crystal.crystals import Crystals

if TYPE_CHECKING:
    from pymatgen.core import Lattice

SLACK = 1e-6  # relative, in lengths and coordinates, and in degrees: what rounding may not decide
_SUMS = np.array([[1, 1, 0], [-1, 1, 0], [1, 0, 1], [-1, 0, 1], [0, 1, 1], [0, -1, 1],
                  [1, 1, 1], [1, -1, 1], [-1, 1, 1], [-1, -1, 1]])  # of the sides a <= b <= c  # fmt: skip
_OF = [1, 1, 2, 2, 2, 2, 2, 2, 2, 2]  # the longest side in each
_FAR = 1e10  # a squared distance that stands for a pair that may not be made


@dataclass
class Outline:
    """One reduced crystal, its cell scaled to volume 1."""

    lattice: np.ndarray  # (3, 3) rows a, b, c
    frac: np.ndarray  # (N, 3)
    numbers: np.ndarray  # (N,)
    lengths: np.ndarray  # (3,)
    angles: np.ndarray  # (3,) degrees alpha, beta, gamma
    _reach: float = 0.0  # how far the points found go
    _found: tuple[np.ndarray, np.ndarray, np.ndarray] = field(default=(), repr=False)  # type: ignore[assignment]

    def points(self, radius: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lattice points within `radius` and some beyond, by distance. -> (P, 3) integers, (P, 3), (P,) distances."""
        if radius > self._reach:
            self._reach = 1.25 * radius
            points = _points(self.lattice, self._reach)
            cart = points @ self.lattice
            self._found = points, cart, np.linalg.norm(cart, axis=1)
        return self._found


def outlines(crystals: Crystals) -> list[Outline]:
    """Of reduced crystals, one each."""
    lattices, frac = crystals.lattice.double().numpy(), crystals.frac_coords.double().numpy()
    numbers, ptr = crystals.atomic_numbers.numpy(), crystals.ptr.tolist()
    return [
        outline(lattice, frac[first:end], numbers[first:end])
        for lattice, first, end in zip(lattices, ptr, ptr[1:], strict=False)
    ]


def outline(lattice: np.ndarray, frac: np.ndarray, numbers: np.ndarray) -> Outline:
    """Of one reduced crystal. (3, 3) Å, (N, 3), (N,)."""
    cell = lattice / abs(np.linalg.det(lattice)) ** (1 / 3)
    return Outline(cell, frac, numbers, np.linalg.norm(cell, axis=1), _angles(cell[None])[0])


def sides(lattices: np.ndarray) -> np.ndarray:
    """Lengths of the cells' sides, volumes scaled to 1. (M, 3, 3) -> (M, 3)."""
    return np.linalg.norm(lattices, axis=-1) / np.cbrt(np.abs(np.linalg.det(lattices)))[:, None]


def minima(lattices: np.ndarray) -> np.ndarray:
    """Successive minima of the lattices, volumes scaled to 1. (M, 3, 3) -> (M, 3) ascending.

    Of a cell a, b, c that is reduced as Minkowski has it, none of b ± a, c ± a, c ± b, c ± a ± b being shorter than its
    first term (a <= b <= c), they are the sides. Others are searched point by point.
    """
    cells = lattices / np.cbrt(np.abs(np.linalg.det(lattices)))[:, None, None]
    order = np.argsort(np.linalg.norm(cells, axis=-1), axis=1)
    cells = np.take_along_axis(cells, order[:, :, None], axis=1)
    found = np.linalg.norm(cells, axis=-1)
    sums = np.linalg.norm(_SUMS @ cells, axis=-1)  # (M, 10)
    reduced = (sums >= found[:, _OF] * (1 - 1e-9)).all(1)
    for k in np.flatnonzero(~reduced).tolist():
        found[k] = _minima(cells[k], float(found[k].max()))
    return found


def _angles(cells: np.ndarray) -> np.ndarray:
    """(M, 3, 3) -> (M, 3) degrees alpha, beta, gamma."""
    one, other = cells[:, [1, 0, 0]], cells[:, [2, 2, 1]]
    cosine = (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)
    return np.rad2deg(np.arccos(np.clip(cosine, -1, 1)))


def _points(cell: np.ndarray, radius: float) -> np.ndarray:
    """All lattice points but the origin within `radius`, by distance. (3, 3) -> (P, 3) int64."""
    # A point n @ cell has n_k = its product with the reciprocal vector k, so |n_k| <= radius |b*_k|.
    most = np.floor(radius * np.linalg.norm(np.linalg.inv(cell), axis=0) * (1 + SLACK)).astype(np.int64)
    axes = [np.arange(-m, m + 1) for m in most]
    every = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    far = np.linalg.norm(every @ cell, axis=1)
    near = np.flatnonzero((far <= radius * (1 + SLACK)) & (far > 0))
    return every[near[np.argsort(far[near], kind="stable")]]


def _minima(cell: np.ndarray, radius: float) -> np.ndarray:
    """Successive minima of the lattice, of whose cell `radius` is the longest side. (3,) ascending."""
    points = _points(cell, radius)  # ascending; three independent ones, the sides of the cell, are among them
    first = points[0]
    second = points[np.flatnonzero(np.cross(first, points).any(1))[0]]
    third = points[np.flatnonzero(points @ np.cross(first, second))[0]]
    return np.linalg.norm(np.array([first, second, third]) @ cell, axis=1)


def short_enough(least: np.ndarray, lengths: np.ndarray, ltol: float) -> np.ndarray:
    """Whether lattices of these minima (M, 3) may map onto a cell of these side lengths (3,), volumes 1. (M,) bool."""
    return np.all(least < (1 + ltol) * (1 + SLACK) * np.sort(lengths), axis=1)


def same(one: Outline, other: Outline, ltol: float, stol: float, angle_tol: float) -> bool:
    """What StructureMatcher(ltol, stol, angle_tol).fit(one, other, skip_structure_reduction=True) says."""
    if len(one.frac) != len(other.frac):
        return False
    from pymatgen.core import Lattice

    matrices = _mappings(one, other, ltol, angle_tol)
    if not len(matrices):
        return False
    kind = other.numbers[:, None] == one.numbers[None, :]  # (N, N)
    if (kind.sum(1) != (other.numbers[:, None] == other.numbers).sum(1)).any():
        return False  # another composition
    cells = _mean_cells(matrices @ one.lattice, other)
    frac = one.frac @ np.linalg.inv(matrices)  # (M, N, 3)
    meetings = _meetings(frac, other, kind, 2 * stol * cells.reciprocal * cells.unit[:, None])
    for mapping, some in groupby(meetings, key=itemgetter(0)):
        unit = cells.unit[mapping]
        lattice = Lattice.from_parameters(*cells.lengths[mapping], *cells.angles[mapping])
        short = lattice.get_lll_reduced_lattice()
        turn = lattice.matrix @ short.inv_matrix  # of fractional coordinates
        near = 2 * stol * unit * np.linalg.norm(short.inv_matrix, axis=0)  # times the reciprocal vectors
        for _, shift in some:
            if _farthest(lattice, turn, near, other.frac + shift, frac[mapping], kind) < stol * unit:
                return True
    return False


def _mappings(one: Outline, other: Outline, ltol: float, angle_tol: float) -> np.ndarray:
    """Integer matrices whose rows make of one's cell a basis like other's cell. (M, 3, 3)."""
    wide = (1 + ltol) * (1 + SLACK)
    points, cart, far = one.points(float(other.lengths.max()) * wide)
    spans = [slice(*np.searchsorted(far, (length / wide, length * wide))) for length in other.lengths.tolist()]
    units = [cart[span] / far[span, None] for span in spans]
    low = np.cos(np.deg2rad(np.minimum(other.angles + angle_tol + SLACK, 180.0)))
    high = np.cos(np.deg2rad(np.maximum(other.angles - angle_tol - SLACK, 0.0)))

    def fits(k: int, first: int, second: int) -> np.ndarray:
        cosine = units[first] @ units[second].T
        return (cosine >= low[k] - 1e-12) & (cosine <= high[k] + 1e-12)

    alpha, beta, gamma = fits(0, 1, 2), fits(1, 0, 2), fits(2, 0, 1)
    a, b = np.nonzero(gamma)
    pair, c = np.nonzero(alpha[b] & beta[a])
    matrices = np.stack([points[spans[0]][a[pair]], points[spans[1]][b[pair]], points[spans[2]][c]], axis=1)
    return matrices[np.abs(np.abs(np.linalg.det(matrices)) - 1) < 0.5]


@dataclass(frozen=True)
class _Cells:
    """M cells of mean lengths and angles."""

    lengths: np.ndarray  # (M, 3)
    angles: np.ndarray  # (M, 3) degrees
    reciprocal: np.ndarray  # (M, 3) lengths of the reciprocal vectors, without 2π
    unit: np.ndarray  # (M,) (V/N)^(1/3)


def _mean_cells(cells: np.ndarray, other: Outline) -> _Cells:
    """Between each of the cells (M, 3, 3) and that of `other`.

    The angles that make a cell are a convex set, no one above the sum of the others and all below 360° together, so the
    means of two cells make one.
    """
    lengths = (np.linalg.norm(cells, axis=-1) + other.lengths) / 2
    angles = (_angles(cells) + other.angles) / 2
    cosine, sine = np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))
    share = np.sqrt(1 - (cosine**2).sum(1) + 2 * cosine.prod(1))  # volume over a b c
    unit = np.cbrt(lengths.prod(1) * share / len(other.frac))
    return _Cells(lengths, angles, sine / lengths / share[:, None], unit)  # |a*| = b c sin(alpha) / V


def _meetings(
    frac: np.ndarray, other: Outline, kind: np.ndarray, reach: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Mappings, and shifts (3,) of other's sites, under which each of these has one of its element within `reach`.

    frac (M, N, 3), kind (N, N) bool, reach (M, 3).
    """
    rare = int(np.argmin(kind.sum(1)))  # the first site of the rarest element, as StructureMatcher chooses it
    anchors = np.flatnonzero(kind[rare])
    shifts = (frac[:, anchors] - other.frac[rare]).reshape(-1, 3)  # (M * T, 3)
    mapping = np.repeat(np.arange(len(frac)), len(anchors))
    for site in np.argsort(kind.sum(1), kind="stable").tolist():
        step = frac[:, kind[site]][mapping] - (other.frac[site] + shifts)[:, None]  # (alive, some, 3)
        step -= np.round(step)
        near = (np.abs(step) <= reach[mapping][:, None] * (1 + SLACK)).all(2).any(1)
        shifts, mapping = shifts[near], mapping[near]
    yield from zip(mapping.tolist(), shifts, strict=True)


def _farthest(
    lattice: "Lattice", turn: np.ndarray, near: np.ndarray, sites: np.ndarray, onto: np.ndarray, kind: np.ndarray
) -> float:
    """Largest distance between sites (N, 3) and those (N, 3) that they are paired with; inf where there is no pairing.

    Pairs are not made where they differ by more than near (3,) in a fractional coordinate of the LLL-reduced cell, to
    which `turn` (3, 3) leads.
    """
    from pymatgen.util.coord import pbc_shortest_vectors
    from scipy.optimize import linear_sum_assignment

    step = (onto[None, :] - sites[:, None]) @ turn
    apart = (np.abs(step - np.round(step)) > near).any(-1)
    if (apart | ~kind).all(1).any():
        return np.inf
    steps, squares = pbc_shortest_vectors(lattice, sites, onto, (apart | ~kind).astype(np.int64), return_d2=True)
    rows, columns = linear_sum_assignment(squares)
    if squares[rows, columns].max() > _FAR:
        return np.inf
    taken = steps[rows, columns]
    return float(np.linalg.norm(taken - taken.mean(0), axis=1).max())
