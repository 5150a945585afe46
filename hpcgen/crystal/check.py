"""Is this a crystal at all? Finite numbers, known elements, room for the atoms, no two in one place.

Codes of refusal: not-finite, unknown-element, no-atoms, too-many-atoms, bad-volume, atoms-too-close.
"""

import math
from functools import lru_cache
from itertools import product

import moyopy
import numpy as np
import torch

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import FLAT
from hpcgen.crystal.refused import Refused

MIN_DISTANCE = 0.5  # Å; the shortest bond, H2, has 0.74
MAX_ATOMS = 10_000
MIN_VOLUME = 0.1  # Å³ of a cell
VOLUME_PER_ATOM = (
    1.0,
    2000.0,
)  # Å³; solid hydrogen at 100 GPa has 2.5, a sheet in a cell with much vacuum some hundreds
MOST_PAIRS = 50_000  # of atoms that `faults` looks at together: a few MB
PLAIN = 1e6  # largest coordinate or lattice component, Å, of a crystal that `faults` itself decides
DENSE = 300  # atoms up to which all pairs are looked at, beyond it only those near in one coordinate


def one_crystal(frac: np.ndarray, lattice: np.ndarray, numbers: np.ndarray) -> Crystals:
    """A batch of one from arrays: frac (A, 3) anywhere, lattice (3, 3) Å, atomic numbers (A,). float64."""
    inside = frac % 1.0 % 1.0  # as torus.wrap, at a third of torch's time; the second one takes 1.0 itself to 0
    return Crystals(
        torch.from_numpy(inside),
        torch.from_numpy(lattice[None]),
        torch.from_numpy(numbers),
        torch.from_numpy(np.array([len(numbers)])),
    )


def refuse_batch(crystals: Crystals) -> None:
    """Raise ValueError unless these are one crystal."""
    if len(crystals) != 1:
        raise ValueError(f"{len(crystals)} crystals, want one: crystals[i] is a batch of one")


def check(
    crystal: Crystals,
    *,
    min_distance: float = MIN_DISTANCE,
    max_atoms: int = MAX_ATOMS,
    min_volume: float = MIN_VOLUME,
    volume_per_atom: tuple[float, float] = VOLUME_PER_ATOM,
) -> None:
    """Raise Refused if the one crystal of a batch of 1 cannot be a crystal. Distances in Å, volumes in Å³.

    Every pair counts, periodic images and an atom's own images included, exactly, for any cell.
    """
    refuse_batch(crystal)
    check_arrays(
        crystal.frac_coords.numpy(force=True),  # also with gradient or on a GPU
        crystal.lattice[0].numpy(force=True),
        crystal.atomic_numbers.numpy(force=True),
        min_distance,
        max_atoms,
        min_volume,
        volume_per_atom,
    )


def check_arrays(
    frac: np.ndarray,
    lattice: np.ndarray,
    numbers: np.ndarray,
    min_distance: float = MIN_DISTANCE,
    max_atoms: int = MAX_ATOMS,
    min_volume: float = MIN_VOLUME,
    volume_per_atom: tuple[float, float] = VOLUME_PER_ATOM,
) -> None:
    """`check` of frac (A, 3), lattice (3, 3) Å and atomic numbers (A,)."""
    count = len(numbers)
    if count == 0:
        raise Refused("no-atoms", "0 atoms, want at least 1")
    if count > max_atoms:
        raise Refused("too-many-atoms", f"{count} atoms, want at most {max_atoms}")
    if not (math.isfinite(frac.sum()) and math.isfinite(lattice.sum())):  # one non-finite term makes the sum so
        raise Refused("not-finite", "a coordinate or lattice vector is not a finite number")
    species = set(numbers.tolist())
    if not (min(species) >= 1 and max(species) <= 118):
        raise Refused("unknown-element", f"atomic numbers {min(species)} to {max(species)}, want 1 to 118")
    inverted, volume = inverse(lattice)
    volume = abs(volume)
    least, most = volume_per_atom
    if not volume > min_volume:
        raise Refused("bad-volume", f"cell volume {volume:.3g} Å³, want > {min_volume:g}")
    if not least <= volume / count <= most:
        raise Refused("bad-volume", f"{volume / count:.3g} Å³ per atom, want {least:g} to {most:g}")
    share = volume / math.prod(math.hypot(*row) for row in lattice.tolist())
    if not share > 2 * FLAT:  # what is just above it must pass elsewhere, too
        raise Refused("bad-volume", f"the cell is flat: its volume is {share:.3g} of a·b·c, want > {2 * FLAT:g}")
    _refuse_close(frac, lattice, _heights(inverted), min_distance)


def faults(
    crystals: Crystals,
    *,
    min_distance: float = MIN_DISTANCE,
    max_atoms: int = MAX_ATOMS,
    min_volume: float = MIN_VOLUME,
    volume_per_atom: tuple[float, float] = VOLUME_PER_ATOM,
) -> list[Refused | None]:
    """What `check` says to each crystal of a batch alone, in order; None for a good one.

    Those that are surely good are found together, at a tenth of the time; the others go through `check_arrays`.
    """
    bounds = (min_distance, max_atoms, min_volume, volume_per_atom)
    frac = crystals.frac_coords.numpy(force=True)
    lattice = crystals.lattice.numpy(force=True)
    numbers = crystals.atomic_numbers.numpy(force=True)
    counts = crystals.num_atoms.numpy(force=True)
    ends = counts.cumsum()
    found: list[Refused | None] = [None] * len(counts)
    for k in np.flatnonzero(~_surely_good(frac, lattice, numbers, counts, *bounds)).tolist():
        atoms = slice(ends[k] - counts[k], ends[k])
        try:
            check_arrays(frac[atoms], lattice[k], numbers[atoms], *bounds)
        except Refused as refused:
            found[k] = refused
    return found


def _surely_good(
    frac: np.ndarray,
    lattice: np.ndarray,
    numbers: np.ndarray,
    counts: np.ndarray,
    min_distance: float,
    max_atoms: int,
    min_volume: float,
    volume_per_atom: tuple[float, float],
) -> np.ndarray:
    """Of B crystals with A atoms, frac (A, 3), lattice (B, 3, 3) Å, those that `check_arrays` would pass. -> (B,) bool.

    False also for cells thinner than 2 min_distance and for many atoms, whatever they are.
    """
    lattice = lattice.astype(np.float64, copy=False)
    batch = np.repeat(np.arange(len(counts)), counts)
    good = (counts >= 1) & (counts <= min(max_atoms, DENSE)) & (np.abs(lattice) < PLAIN).all((1, 2))
    plain = (np.abs(frac) < PLAIN).all(1) & (numbers >= 1) & (numbers <= 118)  # (A,), False for NaN
    good[batch[~plain]] = False
    with np.errstate(all="ignore"):  # of cells that are not good
        volume, heights = _volumes_and_heights(lattice)
        per_atom = volume / counts
        radius = min_distance * 1.001 + 1e-4  # beyond what single precision may add
        good &= (volume > min_volume) & (volume_per_atom[0] <= per_atom) & (per_atom <= volume_per_atom[1])
        good &= (heights > 2 * radius).all(1) & (volume > 3 * FLAT * np.linalg.norm(lattice, axis=2).prod(1))
        widths = radius / heights
    pairs = np.where(good, counts * (counts - 1) // 2, 0)
    piece = pairs.cumsum() // MOST_PAIRS
    edges = [0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(counts)]
    ends = np.append(0, counts.cumsum())
    for start, stop in zip(edges, edges[1:], strict=False):
        atoms = slice(ends[start], ends[stop])
        some = batch[atoms]
        later = np.where(good[some], ends[some + 1] - 1 - np.arange(atoms.start, atoms.stop), 0)
        good[some[_close(frac[atoms], lattice, widths, some, later, radius)]] = False
    return good


def _volumes_and_heights(lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of cells (B, 3, 3) Å: volumes (B,) Å³, to the bit those of `inverse`, and distances of faces (B, 3) Å."""
    (a, b, c), (d, e, f), (g, h, i) = lattice.transpose(1, 2, 0)
    x, y, z = e * i - f * h, f * g - d * i, d * h - e * g
    volume = np.abs(a * x + b * y + c * z)
    areas = [
        np.sqrt(x * x + y * y + z * z),
        np.sqrt((h * c - i * b) ** 2 + (i * a - g * c) ** 2 + (g * b - h * a) ** 2),
        np.sqrt((b * f - c * e) ** 2 + (c * d - a * f) ** 2 + (a * e - b * d) ** 2),
    ]
    return volume, volume[:, None] / np.stack(areas, 1)


def _close(
    frac: np.ndarray, lattice: np.ndarray, widths: np.ndarray, batch: np.ndarray, later: np.ndarray, radius: float
) -> np.ndarray:
    """Atoms that lie within `radius` of one of the `later` (A,) atoms that follow them in the same crystal.

    All cells are higher than 2 radius, as in `_refuse_close`. frac (A, 3); lattice (B, 3, 3) Å, widths (B, 3): the
    radius in each coordinate; batch (A,) index into both.
    """
    atom = np.arange(len(frac))
    first = np.repeat(atom, later)
    second = np.arange(len(first)) + np.repeat(atom + 1 - (later.cumsum() - later), later)
    for axis in range(3):
        along = frac[:, axis].copy()
        step = along.take(second)
        step -= along.take(first)
        step -= np.rint(step)
        near = np.flatnonzero(np.abs(step, step) <= widths[batch, axis].take(first))
        first, second = first.take(near), second.take(near)
    step = frac.take(second, 0) - frac.take(first, 0)
    step -= np.rint(step)
    cart = np.einsum("pi,pij->pj", step, lattice[batch.take(first)])
    return first[np.einsum("pj,pj->p", cart, cart) < radius * radius]


def inverse(cell: np.ndarray) -> tuple[np.ndarray, float]:
    """Inverse (zeros if singular) and determinant of a 3 × 3 matrix in a third of numpy.linalg's time."""
    (a, b, c), (d, e, f), (g, h, i) = cell.tolist()
    x, y, z = e * i - f * h, f * g - d * i, d * h - e * g
    volume = a * x + b * y + c * z
    if volume == 0.0:
        return np.zeros((3, 3)), 0.0
    adjugate = [
        [x, h * c - i * b, b * f - c * e],
        [y, i * a - g * c, c * d - a * f],
        [z, g * b - h * a, a * e - b * d],
    ]
    return np.array(adjugate) / volume, volume


def _heights(inverted: np.ndarray) -> list[float]:
    """Distances between opposite faces of the cell whose inverse (3, 3) this is."""
    return [1 / math.hypot(*column) for column in inverted.T.tolist()]


def _refuse_close(frac: np.ndarray, lattice: np.ndarray, heights: list[float], radius: float) -> None:
    """heights: distances between opposite faces of the cell, Å.

    A step shorter than h/2 moves by less than 1/2 in each coordinate. So with all h > 2 radius the image that
    rounding finds is the only one that can be near, and no atom is near an image of its own.
    """
    if not min(heights) > 2 * radius:
        frac, lattice, heights = _reduced(frac, lattice)
        own = math.hypot(*lattice[0])  # the shortest vector of the reduced cell, and of all translations
        if not own >= radius:
            raise Refused("atoms-too-close", f"an atom lies {own:.3g} Å from its own image, want {radius:g}")
    shifts = np.zeros((1, 3))
    if not min(heights) > 2 * radius:
        reach = [range(-n, n + 1) for n in (math.ceil(radius / height + 0.5) for height in heights)]
        shifts = np.array(list(product(*reach)), dtype=float)
    first, second = _candidates(frac, radius / np.array(heights))
    step = frac.take(second, 0) - frac.take(first, 0)
    step -= np.rint(step)
    for shift in shifts:
        cart = (step + shift if len(shifts) > 1 else step) @ lattice
        squared = np.einsum("ij,ij->i", cart, cart)
        if squared.size and not squared.min() >= radius * radius:
            worst = int(squared.argmin())
            pair = f"atoms {first[worst]} and {second[worst]}"
            raise Refused("atoms-too-close", f"{pair} are {squared[worst] ** 0.5:.3g} Å apart, want {radius:g}")


def _reduced(frac: np.ndarray, lattice: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """The same crystal in a cell with short edges, and that cell's heights."""
    try:
        basis, _ = moyopy.minkowski_reduce(lattice.tolist())
    except ValueError as fault:
        raise Refused("bad-volume", f"a cell that cannot be reduced: {fault}") from fault
    short = np.array(sorted(basis, key=lambda row: math.hypot(*row)))
    inverted, _ = inverse(short)
    return frac @ (lattice @ inverted), short, _heights(inverted)


@lru_cache(maxsize=128)
def _pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.triu_indices(count, 1)
    return first, second


def _candidates(frac: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i ≠ j that may lie within `width` (3,) of each other in every coordinate, modulo 1."""
    count = len(frac)
    if count <= DENSE:
        return _pairs(count)
    axis = max(range(3), key=lambda k: len(np.unique((frac[:, k] % 1.0).round(3))))
    order = np.argsort(frac[:, axis] % 1.0)
    along = frac[order] % 1.0
    first, second = [], []
    for offset in range(1, count):
        step = np.roll(along[:, axis], -offset) - along[:, axis]
        step += step < 0
        near = np.flatnonzero(step <= width[axis])
        if not near.size:
            break
        step = along[(near + offset) % count] - along[near]
        near = near[(np.abs(step - np.rint(step)) <= width).all(1)]
        first.append(order[near])
        second.append(order[(near + offset) % count])
    return np.concatenate(first or [order[:0]]), np.concatenate(second or [order[:0]])
