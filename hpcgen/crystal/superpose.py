"""Whether reduced crystals are the same: the comparison that pymatgen's StructureMatcher makes, of many pairs at once.

StructureMatcher (Ong et al., Comput. Mater. Sci. 68, 314, 2013) scales two reduced cells to one volume and then looks
for (1) a mapping of the first lattice onto the second cell (crystal/mappings.py); (2) for one of these a shift, of one
site of the second's rarest element onto a site of the first, after which every site of the second has one of its
element in the first within 2 stol (V/N)^(1/3) |b*_k| in each fractional coordinate, b*_k being the reciprocal vectors
(without 2π) of the mean cell; and (3) whether the sites so paired that the sum of squared distances is least lie within
stol (V/N)^(1/3), once the mean of the steps between them is taken off. `same` asks the three in this order, (1) and (2)
a little more loosely than rounding errors are large.

(3) needs no assignment where the nearest site of each is another one for each: no pairing has a lesser sum. Then it is
left to know that StructureMatcher sees these same steps. It looks for pairs in the box |y_k| <= 2 stol (V/N)^(1/3)
|b*_k| of the LLL-reduced mean cell, which holds all steps y up to 2 stol (V/N)^(1/3) long, whatever the cell, and for
the shortest of a step among the 27 nearest images, which finds all with |y_k| <= 1. As |y_k| <= |y| |b*_k|, and
|b*_k| <= 2^(3/2) / λ in an LLL-reduced cell, λ being the shortest lattice vector, it finds those up to 0.353 λ long. We
round each coordinate of a step in the mean cell itself, which finds the shortest one if |y_k| <= 1/2, so all up to
h / 2 long, h <= λ being the least height of that cell. So steps up to 0.35 h and 2 stol (V/N)^(1/3) are seen alike.
For what is not so clear the boxes are made and the assignment problem is solved, element by element.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcgen.crystal.mappings import SLACK, Mappings, mappings, pieces
from hpcgen.crystal.match import Matcher
from hpcgen.crystal.outline import Outlines
from hpcgen.crystal.pairing import lll_reduced, paired, shorten

_PAIRS = 4096  # of cells compared at a time
_SITES = 300_000  # pairs of sites looked at at a time
_SHORT = 0.35  # of the least height of a cell


def same(cells: Outlines, one: np.ndarray, other: np.ndarray, tolerances: Sequence[Matcher]) -> np.ndarray:
    """What StructureMatcher.fit(one, other, skip_structure_reduction=True) says of the cells at these places (P,).

    -> (P, T) bool.
    """
    verdicts = Verdicts(tolerances, len(one))
    alike = np.flatnonzero(cells.kind[one] == cells.kind[other])
    for start in range(0, len(alike), _PAIRS):
        pairs = alike[start : start + _PAIRS]
        target = other[pairs]
        ltol, angle_tol = (max(getattr(each, name) for each in tolerances) for name in ("ltol", "angle_tol"))
        maps = mappings(cells.lattice, one[pairs], cells.lengths[target], cells.angles[target], ltol, angle_tol)
        maps = Mappings(pairs[maps.pair], maps.matrix, maps.lengths, maps.angles)
        form = cells.form[other[maps.pair]]
        for number in np.unique(form).tolist():
            some = np.flatnonzero(form == number)
            sizes = cells.forms[number]
            for piece in pieces(np.full(len(some), sizes[0] * sum(sizes)), _SITES):
                _Superposed(cells, maps.some(some[piece]), one, other, sizes).judge(verdicts)
    return verdicts.matched


def compared(
    cells: Outlines, one: np.ndarray, other: np.ndarray, tolerances: Sequence[Matcher]
) -> tuple[np.ndarray, np.ndarray]:
    """The same, and which pairs could not be compared. (P,), (P,) -> (P, T) bool, (P,) bool."""
    try:
        return same(cells, one, other, tolerances), np.zeros(len(one), dtype=bool)
    except (ValueError, ArithmeticError, LookupError, RuntimeError):  # of linear algebra and pymatgen
        if len(one) == 1:
            return np.zeros((1, len(tolerances)), dtype=bool), np.ones(1, dtype=bool)
        half = len(one) // 2
        parts = [compared(cells, one[some], other[some], tolerances) for some in (slice(half), slice(half, None))]
        matched, failed = (np.concatenate(column) for column in zip(*parts, strict=True))
        return matched, failed


class Verdicts:
    """Of P pairs at T tolerances, as they become known."""

    def __init__(self, tolerances: Sequence[Matcher], pairs: int) -> None:
        self.tolerances = tolerances
        self.stol = np.array([each.stol for each in tolerances])
        self.matched = np.zeros((pairs, len(tolerances)), dtype=bool)


@dataclass(frozen=True)
class _Rows:
    """R superpositions: a mapping, and a shift of the second crystal's sites."""

    map: np.ndarray  # (R,)
    shift: np.ndarray  # (R, 3)
    stol: np.ndarray  # (R,) from which on (2) holds

    def __getitem__(self, which: np.ndarray) -> "_Rows":
        return _Rows(self.map[which], self.shift[which], self.stol[which])


class _Superposed:
    """Q mappings of pairs of crystals of N sites that fall into the same numbers of sites of each element."""

    def __init__(self, cells: Outlines, maps: Mappings, one: np.ndarray, other: np.ndarray, sizes: tuple[int, ...]):
        self.maps, self.sizes, self.count = maps, sizes, sum(sizes)
        ends = np.cumsum(sizes).tolist()
        self.spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        first, second = one[maps.pair], other[maps.pair]
        turned = _inverse(maps.matrix).astype(float)
        self.first = cells.sites(first, self.count) @ turned  # (Q, N, 3) in the mapped basis
        self.second = cells.sites(second, self.count)
        self.rare = cells.rare[second]
        self.target = cells.lengths[second], cells.angles[second]
        self.lengths, self.angles = (maps.lengths + self.target[0]) / 2, (maps.angles + self.target[1]) / 2
        self.unit, self.reciprocal, self.lattice = _mean_cells(self.lengths, self.angles, self.count)

    def judge(self, verdicts: Verdicts) -> None:
        """Add what these mappings say."""
        fits = np.stack([self.maps.close(*self.target, each.ltol, each.angle_tol) for each in verdicts.tolerances], 1)
        fits &= ~verdicts.matched[self.maps.pair]
        rows = self._meetings(np.where(fits, verdicts.stol, -1.0).max(1))
        pair = self.maps.pair[rows.map]
        order = np.lexsort((rows.stol, pair))  # the most promising of each pair first
        begins = np.diff(pair[order], prepend=-1) != 0
        for some in (order[begins], order[~begins]):
            for piece in pieces(np.full(len(some), self.count * max(self.sizes)), _SITES):
                self._decide(rows[some[piece]], fits, verdicts)

    def _meetings(self, most: np.ndarray) -> _Rows:
        """Superpositions for which (2) holds with stol up to `most` (Q,)."""
        starts = np.repeat([span.start for span in self.spans], self.sizes)[self.rare]
        anchors = starts[:, None] + np.arange(self.sizes[0])  # as many of the rarest element, whichever it is
        every = np.flatnonzero(most > 0)
        rare = self.second[every, self.rare[every]]
        shift = (self.first[every[:, None], anchors[every]] - rare[:, None]).reshape(-1, 3)
        map, stol = np.repeat(every, self.sizes[0]), np.zeros(len(shift))
        most, reach = most * (1 + SLACK), 2 * self.unit[:, None] * self.reciprocal
        for span in self.spans:
            for site in range(span.start, span.stop):
                step = self.first[:, span][map] - (self.second[map, site] + shift)[:, None]  # (R, n, 3)
                step -= np.round(step)
                stol = np.maximum(stol, (np.abs(step) / reach[map][:, None]).max(2).min(1))
                alive = np.flatnonzero(stol <= most[map])
                map, shift, stol = map[alive], shift[alive], stol[alive]
        return _Rows(map, shift, stol)

    def _decide(self, rows: _Rows, fits: np.ndarray, verdicts: Verdicts) -> None:
        """Add what (3) says of these."""
        pair = self.maps.pair[rows.map]
        asked = fits[rows.map] & (rows.stol[:, None] <= verdicts.stol * (1 + SLACK)) & ~verdicts.matched[pair]
        some = np.flatnonzero(asked.any(1))
        rows, pair, asked = rows[some], pair[some], asked[some]
        farthest, longest = self._nearest(rows)
        clear = longest[:, None] <= 2 * verdicts.stol * (1 - SLACK)
        row, t = np.nonzero(asked & clear & (farthest[:, None] < verdicts.stol))
        verdicts.matched[pair[row], t] = True
        asked &= ~clear & ~verdicts.matched[pair]
        for k, stol in enumerate(verdicts.stol.tolist()):
            some = np.flatnonzero(asked[:, k])
            if len(some):
                verdicts.matched[pair[some[self._assigned(rows[some], stol) < stol]], k] = True

    def _nearest(self, rows: _Rows) -> tuple[np.ndarray, np.ndarray]:
        """The largest distance, mean step taken off, and the largest step, in (V/N)^(1/3), of paired sites. (R,), (R,).

        The largest step is inf where it is not sure that StructureMatcher makes these pairs.
        """
        taken = np.empty((len(rows.map), self.count, 3))
        paired = np.ones(len(taken), dtype=bool)
        lattice = self.lattice[rows.map]
        for span in self.spans:
            sites = self.second[rows.map, span] + rows.shift[:, None]
            step = self.first[rows.map, None, span] - sites[:, :, None]  # (R, n, n, 3)
            step -= np.round(step)
            step = step @ lattice[:, None]
            chosen = (step**2).sum(3).argmin(2)  # (R, n)
            paired &= (np.sort(chosen, axis=1) == np.arange(chosen.shape[1])).all(1)
            taken[:, span] = np.take_along_axis(step, chosen[:, :, None, None], axis=2)[:, :, 0]
        longest = np.linalg.norm(taken, axis=2).max(1)
        farthest = np.linalg.norm(taken - taken.mean(1, keepdims=True), axis=2).max(1)
        short = longest * self.reciprocal[rows.map].max(1) <= _SHORT
        unit = self.unit[rows.map]
        return farthest / unit, np.where(paired & short, longest / unit, np.inf)

    def _assigned(self, rows: _Rows, stol: float) -> np.ndarray:
        """The largest distance, mean step taken off, of sites paired as StructureMatcher pairs them. (R,) (V/N)^(1/3).

        inf where there is no pairing.
        """
        cells, turn = lll_reduced(self.lattice[rows.map])
        unit = self.unit[rows.map]
        reciprocal = np.linalg.norm(np.linalg.inv(cells), axis=1)
        near, short = 2 * stol * unit[:, None] * reciprocal, 0.5 / reciprocal.max(1)
        taken = np.zeros((len(cells), self.count, 3))
        good = np.ones(len(cells), dtype=bool)
        for span in self.spans:
            alive = np.flatnonzero(good)
            sites = self.second[rows.map[alive], span] + rows.shift[alive, None]
            step = (self.first[rows.map[alive], None, span] - sites[:, :, None]) @ turn[alive, None]  # (R, n, n, 3)
            step -= np.round(step)
            barred = (np.abs(step) > near[alive, None, None]).any(3)
            step = step @ cells[alive, None]
            shorten(step, ~barred, cells[alive], short[alive])
            chosen = paired(np.where(barred, np.inf, (step**2).sum(3)))  # (R, n)
            good[alive] = chosen[:, 0] >= 0
            taken[alive, span] = np.take_along_axis(step, np.maximum(chosen, 0)[:, :, None, None], axis=2)[:, :, 0]
        farthest = np.linalg.norm(taken - taken.mean(1, keepdims=True), axis=2).max(1)
        return np.where(good, farthest / unit, np.inf)


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Of integer matrices of determinant ±1. (Q, 3, 3) -> (Q, 3, 3)."""
    a, b, c = matrix.transpose(1, 0, 2)
    columns = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=2)
    return columns * (a * columns[:, :, 0]).sum(1)[:, None, None]


def _mean_cells(lengths: np.ndarray, angles: np.ndarray, sites: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(V/N)^(1/3) (Q,), lengths of the reciprocal vectors without 2π (Q, 3), and cells (Q, 3, 3). Angles in degrees.

    The angles that make a cell are a convex set, no one above the sum of the others and all below 360° together, so the
    means of two cells make one.
    """
    cosine, sine = np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))
    share = np.sqrt(1 - (cosine**2).sum(1) + 2 * cosine.prod(1))  # volume over a b c
    unit = np.cbrt(lengths.prod(1) * share / sites)
    cells = np.zeros((len(lengths), 3, 3))
    cells[:, 0, 0] = 1
    cells[:, 1, 0], cells[:, 1, 1] = cosine[:, 2], sine[:, 2]
    cells[:, 2, 0] = cosine[:, 1]
    cells[:, 2, 1] = (cosine[:, 0] - cosine[:, 1] * cosine[:, 2]) / sine[:, 2]
    cells[:, 2, 2] = share / sine[:, 2]
    return unit, sine / lengths / share[:, None], cells * lengths[:, :, None]  # |a*| = b c sin(alpha) / V
