"""Reduced crystals side by side, ready to be compared, and a bound that parts most lattices that are not alike.

`short_enough` asks a consequence of what a mapping is (crystal/mappings.py). The vectors v_k of the first lattice L
that are like the cell vectors c_k of the second are independent, so the k-th shortest of them is no shorter than the
k-th successive minimum λ_k of L, the least radius that holds k independent vectors: λ_k(L) <= (1 + ltol) c_(k), the
lengths c of the second cell in ascending order. So it never parts what matches. Within stol = 0.3 two sites may move by
half of a bond length: no bound on distances between atoms would part much.
"""

from dataclasses import dataclass

import numpy as np

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.mappings import SLACK, angles_of, lattice_points

_SUMS = np.array([[1, 1, 0], [-1, 1, 0], [1, 0, 1], [-1, 0, 1], [0, 1, 1], [0, -1, 1],
                  [1, 1, 1], [1, -1, 1], [-1, 1, 1], [-1, -1, 1]])  # of the sides a <= b <= c  # fmt: skip
_OF = [1, 1, 2, 2, 2, 2, 2, 2, 2, 2]  # the longest side in each


@dataclass(frozen=True)
class Outlines:
    """M reduced crystals, their cells scaled to volume 1, A sites in all, those of the rarest element first in each.

    Equally many sites of two elements go by atomic number.
    """

    lattice: np.ndarray  # (M, 3, 3) rows a, b, c
    lengths: np.ndarray  # (M, 3)
    angles: np.ndarray  # (M, 3) degrees alpha, beta, gamma
    frac: np.ndarray  # (A, 3)
    ptr: np.ndarray  # (M + 1,)
    rare: np.ndarray  # (M,) place, in its crystal, of the first of all sites of a rarest element as they were given
    kind: np.ndarray  # (M,) equal for equal compositions
    form: np.ndarray  # (M,) place in `forms`
    forms: list[tuple[int, ...]]  # numbers of sites of each element, ascending

    def sites(self, which: np.ndarray, count: int) -> np.ndarray:
        """Of crystals that all have `count` sites. (Q,) -> (Q, count, 3)."""
        return self.frac[self.ptr[which][:, None] + np.arange(count)]


def outlines(crystals: Crystals) -> Outlines:
    """Of reduced crystals."""
    frac, numbers = crystals.frac_coords.double().numpy(), crystals.atomic_numbers.numpy()
    ptr, batch = crystals.ptr.numpy(), crystals.batch.numpy()
    lattice = scaled(crystals.lattice.double().numpy())
    _, element, counts = np.unique(batch * 119 + numbers, return_inverse=True, return_counts=True)
    many = counts[element]  # (A,) sites of the same element
    order = np.lexsort((numbers, many, batch))  # stable
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    rarest = np.minimum.reduceat(many, ptr[:-1])[batch] == many
    first = np.minimum.reduceat(np.where(rarest, np.arange(len(many)), len(many)), ptr[:-1])
    numbers, many = numbers[order], many[order]
    kinds: dict[bytes, int] = {}
    forms: dict[tuple[int, ...], int] = {}
    kind, form = np.empty(len(crystals), dtype=np.int64), np.empty(len(crystals), dtype=np.int64)
    for at, (start, end) in enumerate(zip(ptr.tolist(), ptr[1:].tolist(), strict=False)):
        mine = numbers[start:end]
        begins = np.flatnonzero(np.diff(mine, prepend=0))
        kind[at] = kinds.setdefault(mine.tobytes(), len(kinds))
        form[at] = forms.setdefault(tuple(many[start:end][begins].tolist()), len(forms))
    return Outlines(
        lattice, np.linalg.norm(lattice, axis=-1), angles_of(lattice), frac[order], ptr, place[first] - ptr[:-1],
        kind, form, list(forms),
    )  # fmt: skip


def scaled(lattices: np.ndarray) -> np.ndarray:
    """Cells of volume 1. (M, 3, 3) -> (M, 3, 3)."""
    return lattices / np.cbrt(np.abs(np.linalg.det(lattices)))[:, None, None]


def minima(lattices: np.ndarray) -> np.ndarray:
    """Successive minima of the lattices, volumes scaled to 1. (M, 3, 3) -> (M, 3) ascending.

    Of a cell a, b, c that is reduced as Minkowski has it, none of b ± a, c ± a, c ± b, c ± a ± b being shorter than its
    first term (a <= b <= c), they are the sides. Others are searched point by point.
    """
    cells = scaled(lattices)
    order = np.argsort(np.linalg.norm(cells, axis=-1), axis=1)
    cells = np.take_along_axis(cells, order[:, :, None], axis=1)
    found = np.linalg.norm(cells, axis=-1)
    sums = np.linalg.norm(_SUMS @ cells, axis=-1)  # (M, 10)
    reduced = (sums >= found[:, _OF] * (1 - 1e-9)).all(1)
    for k in np.flatnonzero(~reduced).tolist():
        found[k] = _minima(cells[k], float(found[k].max()))
    return found


def _minima(cell: np.ndarray, radius: float) -> np.ndarray:
    """Successive minima of the lattice, of whose cell `radius` is the longest side. (3,) ascending."""
    points, _, far, _ = lattice_points(cell[None], np.array([radius]))
    points = points[np.argsort(far, kind="stable")]  # three independent ones, the sides of the cell, are among them
    first = points[0]
    second = points[np.flatnonzero(np.cross(first, points).any(1))[0]]
    third = points[np.flatnonzero(points @ np.cross(first, second))[0]]
    return np.linalg.norm(np.array([first, second, third]) @ cell, axis=1)


def short_enough(least: np.ndarray, lengths: np.ndarray, ltol: float) -> np.ndarray:
    """Whether lattices of these minima (M, 3) may map onto a cell of these side lengths (3,), volumes 1. (M,) bool."""
    return np.all(least < (1 + ltol) * (1 + SLACK) * np.sort(lengths), axis=1)
