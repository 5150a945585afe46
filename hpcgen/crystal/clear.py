"""The symmetry of crystals where it is clear, many crystals at a time.

Clear means: every operation that could be a symmetry fits well within the tolerance or fails far beyond it, so that
any way to apply the tolerance finds the same group. For these the group's translations are made exact, sites and metric
are averaged over it, and the space group is looked up by the operations. All others are left to moyo, which takes
four to six times as long for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

import moyopy
import numpy as np

from hpcgen.crystal.cells import Cells, ranges, times, upright

WELL = 0.3  # share of symprec within which an operation fits well,
FAR = 10.0  # and beyond which it fails; by the sum of the steps along the cell's vectors, never less than the distance
MOST_ATOMS = 100  # of a crystal: all pairs of its atoms are compared
ROUNDING = 1e-5  # of a sum of products of cosines in float32, several times over
EXACT = 0.15  # a translation times the group's order is a whole number within this, or not clear

# The rotations of a Niggli cell take its vectors to ones of entries -1, 0 and 1: 13 up to sign. The threes of these
# that are as large as the cell, and the four ways to give such three signs that turn without a mirror.
_VECTORS = np.array([v for v in product((-1, 0, 1), repeat=3) if v > (0, 0, 0)])
_TRIPLES = np.array(list(product(range(13), repeat=3)))
_TRIPLES = _TRIPLES[np.abs(np.rint(np.linalg.det(_VECTORS[_TRIPLES]))) == 1]
_FRAMES = _VECTORS[_TRIPLES]  # (T, 3, 3), rows are vectors
_SIGNS = np.tile(list(product((1, -1), repeat=3)), (len(_FRAMES), 1, 1))
_SIGNS = _SIGNS[_SIGNS.prod(-1) == np.rint(np.linalg.det(_FRAMES))[:, None]].reshape(-1, 4, 3)
_ROTATIONS = (_SIGNS[..., None] * _FRAMES[:, None]).mT.reshape(-1, 3, 3).astype(float)  # 4 t to 4 t + 3 of _FRAMES[t]
_PAIRS = np.triu_indices(3, 1)
_PAIR_SIGNS = _SIGNS[..., _PAIRS[0]] * _SIGNS[..., _PAIRS[1]]  # (T, 4, 3)


@dataclass(frozen=True)
class Symmetric:
    """Some crystals of a batch with their symmetry made exact."""

    places: np.ndarray  # (K,) among the given
    cells: Cells  # K, with the standard origin
    space_group: np.ndarray  # (K,) international numbers
    shift: np.ndarray  # (K,) Å, farthest that a site moved
    strain: np.ndarray  # (K,) largest strain of the lattice

    def then(self, others: "Symmetric") -> "Symmetric":
        """These and the others, in the order of their places."""
        order = np.argsort(np.concatenate([self.places, others.places]))
        pairs = [(getattr(self, name), getattr(others, name)) for name in ("places", "space_group", "shift", "strain")]
        places, space_group, shift, strain = (np.concatenate(pair)[order] for pair in pairs)
        return Symmetric(places, self.cells.then(others.cells)[order], space_group, shift, strain)


@dataclass(frozen=True)
class _Operations:
    """Operations on crystals, M in all, sorted by crystal: frac' = sign · rotation @ frac + shift."""

    crystal: np.ndarray  # (M,)
    which: np.ndarray  # (M,) of _ROTATIONS
    sign: np.ndarray  # (M,) 1.0 or -1.0
    shift: np.ndarray  # (M, 3)

    def __getitem__(self, some: np.ndarray) -> "_Operations":
        return _Operations(self.crystal[some], self.which[some], self.sign[some], self.shift[some])

    @property
    def rotation(self) -> np.ndarray:
        """(M, 3, 3) with its sign."""
        return _ROTATIONS[self.which] * self.sign[:, None, None]


def clear_symmetry(given: Cells, symprec: float) -> Symmetric:
    """Those of B crystals whose symmetry within symprec Å is clear, symmetrised, in primitive cells.

    a along x, b in the xy plane; atoms sorted by element.
    """
    with np.errstate(all="ignore"):  # what is not finite is not clear
        return _clear_symmetry(given, symprec)


def _clear_symmetry(given: Cells, symprec: float) -> Symmetric:
    cells, unclear = _right_handed(given)
    clear = (cells.counts <= MOST_ATOMS) & np.isfinite(cells.lattice).all((1, 2))
    clear[list(unclear)] = False
    tried = _candidates(cells, _of_the_lattices(cells, symprec, clear), symprec)
    fits = _fitted(cells, tried, symprec, clear)
    return _made_exact(cells, fits, clear)


def _without(crystal: np.ndarray, bad: np.ndarray, count: int) -> np.ndarray:
    """(count,) False where one of a crystal's is bad."""
    return np.bincount(crystal[bad], minlength=count) == 0


def _right_handed(given: Cells) -> tuple[Cells, dict[int, str]]:
    """Sorted by element, in right-handed Niggli cells."""
    cells, faulty = given.sorted_by_element().in_niggli_cells()
    hand = np.where(np.linalg.det(cells.lattice) < 0, -1.0, 1.0)
    lattice, frac = cells.lattice * hand[:, None, None], cells.frac * hand[cells.owner, None]
    return Cells(lattice, frac, cells.numbers, cells.counts), faulty


def _of_the_lattices(cells: Cells, symprec: float, clear: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crystal and number of each rotation of the lattices; `clear` loses crystals with one that is not clear."""
    metric = cells.lattice @ cells.lattice.mT
    length = np.sqrt(np.diagonal(metric, axis1=1, axis2=2))  # (B, 3)
    reach = np.sqrt(np.square(_VECTORS @ cells.lattice).sum(-1))  # (B, 13)
    near = (np.abs(reach[:, None] - length[:, :, None]) <= FAR * symprec).transpose(1, 2, 0)
    fits = near[0].take(_TRIPLES[:, 0], 0)
    fits &= near[1].take(_TRIPLES[:, 1], 0)
    fits &= near[2].take(_TRIPLES[:, 2], 0)
    fits &= clear
    crystal, frame = np.divmod(np.flatnonzero(fits.T), len(_FRAMES))
    inner = _FRAMES[frame] @ metric[crystal] @ _FRAMES[frame].mT
    i, j = _PAIRS
    across = inner[:, None, i, j] * _PAIR_SIGNS[frame] - metric[crystal][:, None, i, j]
    across /= np.sqrt(length[:, i] * length[:, j])[crystal, None]  # Å: by which an angle moves its vectors' ends
    along = np.diagonal(inner - metric[crystal], axis1=1, axis2=2) / length[crystal]  # Å: of a length twice over
    misfit = np.maximum(np.abs(across).max(-1), np.abs(along).max(-1)[:, None]).ravel()
    crystal, which = np.repeat(crystal, 4), (4 * frame[:, None] + np.arange(4)).ravel()
    clear &= _without(crystal, (misfit > WELL * symprec) & ~(misfit > FAR * symprec), len(clear))
    good = (misfit <= WELL * symprec) & clear[crystal]
    return crystal[good], which[good]


def _candidates(cells: Cells, rotations: tuple[np.ndarray, np.ndarray], symprec: float) -> _Operations:
    """Rotations of the lattice, and those turned inside out, with each shift that takes the first atom of the rarest
    element to one of its kind, and an atom of the next element to near one of its own."""
    crystal, which = rotations
    new = np.flatnonzero(np.diff(cells.owner * 256 + cells.numbers, prepend=-1))  # first atom of each kind
    size = np.diff(new, append=len(cells.numbers))
    owner = cells.owner[new]
    rank = np.lexsort((size, owner))  # kinds by crystal and size
    first = np.searchsorted(owner, np.arange(len(cells.counts)))  # of each crystal, among the kinds
    last = np.append(first[1:], len(new)) - 1
    rare, next_rare = rank[first], rank[np.minimum(first + 1, last)]
    choices = 2 * size[rare[crystal]]
    at = np.repeat(np.arange(len(crystal)), choices)
    turn = ranges(np.zeros(len(crystal), dtype=np.int64), choices)
    sign = 1.0 - 2.0 * (turn % 2)
    crystal, which = crystal[at], which[at]
    start = new[rare[crystal]]
    rotation = _ROTATIONS[which] * sign[:, None, None]
    shift = cells.frac[start + turn // 2] - _turned(rotation, cells.frac[start])
    tried = _Operations(crystal, which, sign, shift)
    kind = next_rare[crystal]
    probe = np.where(size[kind] > 1, new[kind] + 1, new[kind])
    moved = _turned(rotation, cells.frac[probe]) + shift
    pairs = size[kind]
    step = np.repeat(moved.T, pairs, axis=1) - cells.frac.T.take(ranges(new[kind], pairs), 1)
    apart = _steps(step, np.repeat(_lengths(cells)[:, crystal], pairs, axis=1))
    least = np.minimum.reduceat(apart, np.cumsum(pairs) - pairs) if len(apart) else apart
    return tried[~(least > FAR * symprec)]


def _turned(rotation: np.ndarray, frac: np.ndarray) -> np.ndarray:
    return (rotation[:, :, 0] * frac[:, :1] + rotation[:, :, 1] * frac[:, 1:2]) + rotation[:, :, 2] * frac[:, 2:]


def _lengths(cells: Cells) -> np.ndarray:
    """Of the cells' vectors. (3, B) Å"""
    return np.sqrt(np.square(cells.lattice).sum(-1)).T


def _steps(step: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Sum of the steps along the cell's vectors, each to the nearest image, at least the distance.

    (3, M) and lengths of the vectors (3, M) Å -> (M,) Å.
    """
    x, y, z = np.abs(step - np.rint(step)) * length
    return (x + y) + z


@dataclass(frozen=True)
class _Fits:
    """The operations that fit, and how each atom fits under each, one operation after the other."""

    group: _Operations  # each crystal's own, all of them
    image: np.ndarray  # (R,) the atom it comes to, numbered in the batch
    step: np.ndarray  # (3, R) from where it comes to that atom


def _fitted(cells: Cells, tried: _Operations, symprec: float, clear: np.ndarray) -> _Fits:
    """The operations that fit well, their shifts the mean over the atoms; `clear` loses crystals with others that do
    not fail by far, and those in which two of them turn alike: such a cell is not primitive."""
    moved = _moved(cells, tried)
    image = _near(cells, tried.crystal, moved, symprec)
    counts = cells.counts[tried.crystal]
    at = np.repeat(np.arange(len(counts)), counts)
    failed, several = np.zeros((2, len(counts)), dtype=bool)
    failed[at[image == _NONE]] = True
    several[at[image == _SEVERAL]] = True
    clear &= _without(tried.crystal, several & ~failed, len(clear))
    kept = ~failed & clear[tried.crystal]
    rows = np.flatnonzero(kept[at])
    tried, counts, image = tried[kept], counts[kept], image[rows]
    starts = np.cumsum(counts) - counts
    step = cells.frac.T.take(image, 1) - moved.take(rows, 1)
    step -= np.rint(step)
    mean = np.add.reduceat(step, starts, axis=1) / counts if len(starts) else tried.shift.T
    step -= np.repeat(mean, counts, axis=1)
    apart = _steps(step, np.repeat(_lengths(cells)[:, tried.crystal], counts, axis=1))
    misfit = np.maximum.reduceat(apart, starts) if len(starts) else apart
    clear &= _without(tried.crystal, (misfit > WELL * symprec) & ~(misfit > FAR * symprec), len(clear))
    turn = tried.crystal * (2 * len(_ROTATIONS)) + 2 * tried.which + (tried.sign > 0)
    clear &= _without(tried.crystal[1:], (turn[1:] == turn[:-1]) & (misfit[1:] <= WELL * symprec), len(clear))
    kept = (misfit <= WELL * symprec) & clear[tried.crystal]
    rows = np.flatnonzero(np.repeat(kept, counts))
    fitting = _Operations(tried.crystal, tried.which, tried.sign, tried.shift + mean.T)
    return _Fits(fitting[kept], image[rows], step.take(rows, 1))


_NONE, _SEVERAL = -1, -2


def _runs(cells: Cells, crystal: np.ndarray) -> Iterator[tuple[int, slice, slice]]:
    """Crystals that have operations: number, operations and atoms."""
    ends = np.cumsum(np.bincount(crystal, minlength=len(cells.counts))).tolist()
    starts, counts = cells.starts.tolist(), cells.counts.tolist()
    for number, (first, end) in enumerate(pairwise([0, *ends])):
        if end > first:
            yield number, slice(first, end), slice(starts[number], starts[number] + counts[number])


def _moved(cells: Cells, tried: _Operations) -> np.ndarray:
    """Where each operation takes each atom of its crystal, one operation after the other. -> (3, N)"""
    parts = [np.empty((3, 0))]
    shifted = np.concatenate([tried.rotation, tried.shift[:, :, None]], 2).transpose(1, 0, 2)
    sites = np.concatenate([cells.frac.T, np.ones((1, len(cells.frac)))])
    for _, operations, atoms in _runs(cells, tried.crystal):
        parts.append((shifted[:, operations] @ sites[:, atoms]).reshape(3, -1))
    return np.concatenate(parts, 1)


def _near(cells: Cells, crystal: np.ndarray, moved: np.ndarray, symprec: float) -> np.ndarray:
    """The atom of its element near each moved atom (3, N), numbered in the batch; _NONE where all are FAR, _SEVERAL
    where it may be one of several. -> (N,)

    By the sum of the cosines of the angles between them, one for each axis, as a product of matrices: with u the sum
    of the steps along vectors of at least the length a, it is at least 3 - 2 π² (u / a)².
    """
    own, there = _angles(cells.frac.T), _angles(moved)
    least = 3 - 2.1 * (np.pi * FAR * symprec / _lengths(cells).min(0)) ** 2 - ROUNDING
    image = np.full(moved.shape[1], _NONE, dtype=np.int64)
    enough = least.tolist()
    hits, rows, end = [], [], 0
    for number, operations, atoms in _runs(cells, crystal):
        count = atoms.stop - atoms.start
        first, end = end, end + (operations.stop - operations.start) * count
        alike = (there[:, first:end].T @ own[:, atoms]).reshape(-1, count * count) > enough[number]
        numbers = cells.numbers[atoms]
        alike &= (numbers[:, None] == numbers).ravel()
        row, one = np.divmod(np.flatnonzero(alike), count)
        hits.append(one + atoms.start)
        rows.append(row + first)
    if hits:
        row = np.concatenate(rows)
        image[row] = np.concatenate(hits)
        image[row[1:][row[1:] == row[:-1]]] = _SEVERAL
    return image


def _angles(frac: np.ndarray) -> np.ndarray:
    """Cosines and sines, in the precision that processors compute several at a time in. (3, A) -> (6, A)"""
    angle = (2 * np.pi * (frac - np.rint(frac))).astype(np.float32)
    return np.concatenate([np.cos(angle), np.sin(angle)])


def _made_exact(cells: Cells, fits: _Fits, clear: np.ndarray) -> Symmetric:
    """Sites and metrics averaged over groups whose shifts are made exact.

    With S the sum of the shifts t of all n operations, S = W S + n t up to whole numbers for each rotation W, so that
    from the origin S/n all shifts are whole numbers over n.
    """
    group, count = fits.group, len(clear)
    owner, rotation = group.crystal, group.rotation
    order = np.bincount(owner, minlength=count)
    total = np.stack([np.bincount(owner, group.shift[:, axis], minlength=count) for axis in range(3)], -1)
    origin = total / np.maximum(order, 1)[:, None]
    shift = (group.shift - origin[owner] + _turned(rotation, origin[owner])) * order[owner, None]
    whole = np.rint(shift)
    clear &= (order > 0) & _without(owner, ~(np.abs(shift - whole) < EXACT).all(-1), count)
    number, own_origin = _identified(group, whole.astype(np.int64), rotation, order, clear)
    clear &= number > 0

    at = np.repeat(np.arange(len(owner)), cells.counts[owner])
    step = ((whole - shift) / order[owner, None]).T.take(at, 1) - fits.step
    sums = np.stack([np.bincount(fits.image, along, minlength=len(cells.frac)) for along in step], -1)
    step = sums / np.maximum(order, 1)[cells.owner, None]
    metric = cells.lattice @ cells.lattice.mT
    turned = (rotation.mT @ metric[owner] @ rotation).reshape(-1, 9)
    sums = np.stack([np.bincount(owner, turned[:, entry], minlength=count) for entry in range(9)], -1)
    lattice = upright((sums / np.maximum(order, 1)[:, None]).reshape(-1, 3, 3))
    clear &= (np.diagonal(lattice, axis1=1, axis2=2) > 0).all(-1)
    places = np.flatnonzero(clear)
    moved = times(step, cells.lattice, cells.owner)
    farthest = np.sqrt(np.maximum.reduceat((moved * moved).sum(1), cells.starts)) if len(moved) else order
    deformation = np.linalg.inv(lattice[places]) @ cells.lattice[places]
    strain = np.abs(deformation @ deformation.mT - np.eye(3)).max((1, 2)) / 2
    made = Cells(lattice, cells.frac + step - (origin + own_origin)[cells.owner], cells.numbers, cells.counts)
    return Symmetric(places, made[places], number[places], farthest[places].astype(float), strain)


_KNOWN: dict[bytes, tuple[int, np.ndarray]] = {}  # operations -> space group, its origin
_MOST_KNOWN = 20000


def _identified(
    group: _Operations, whole: np.ndarray, rotation: np.ndarray, order: np.ndarray, clear: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Space groups (B,), 0 where there is none, and their standard origins (B, 3). whole: shifts, in units of 1/n."""
    number, origin = np.zeros(len(order), dtype=np.int64), np.zeros((len(order), 3))
    whole = whole % order[group.crystal, None]
    told = np.concatenate([(2 * group.which + (group.sign > 0))[:, None], whole], 1)
    ends = np.cumsum(order).tolist()
    for at in np.flatnonzero(clear).tolist():
        some = slice(ends[at] - int(order[at]), ends[at])
        key = told[some].tobytes()
        if key not in _KNOWN:
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[key] = _space_group(rotation[some], whole[some] / order[at])
        number[at], origin[at] = _KNOWN[key]
    return number, origin


def _space_group(rotation: np.ndarray, shift: np.ndarray) -> tuple[int, np.ndarray]:
    try:
        found = moyopy.SpaceGroup(rotation.astype(int).tolist(), shift.tolist())
    except ValueError:
        return 0, np.zeros(3)
    return found.number, np.array(found.origin_shift)
