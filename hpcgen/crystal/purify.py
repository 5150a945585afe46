"""Purified crystals: symmetrised within a tolerance, in primitive Niggli-reduced cells.

Codes of refusal: purify-failed (no symmetry, no Niggli cell) and purify-changed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import moyopy
import numpy as np
import torch

from hpcgen.crystal.check import MAX_ATOMS, MIN_DISTANCE, faults
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.symmetry import dataset

MOST_SHIFT = 5.0  # a purified site may lie this many symprec from the given one,
MOST_STRAIN = 5.0  # the lattice be strained by this many symprec per Å of edge,
MOST_VOLUME_CHANGE = 0.02  # and the volume per atom change by this share


@dataclass(frozen=True)
class Purified:
    """Crystals in standard cells with their symmetry made exact, atoms sorted by element; the refused are left out."""

    crystals: Crystals  # K of the B given ones, in their order
    kept: np.ndarray  # (K,) their places among the given
    space_group: np.ndarray  # (K,)
    max_shift: np.ndarray  # (K,) Å, farthest that a site moved
    max_strain: np.ndarray  # (K,) largest strain of the lattice
    refused: dict[int, Refused]  # by place among the given


def search(crystal: Crystals, symprec: float = 0.01) -> moyopy.MoyoDataset:
    """The costly half of `purify`, for one crystal at a time. Raises Refused (purify-failed)."""
    return dataset(crystal, symprec, "purify-failed")


def purify(
    crystals: Crystals,
    found: Sequence[moyopy.MoyoDataset | None] | None = None,
    *,
    symprec: float = 0.01,
    primitive: bool = True,
    niggli: bool = True,
    min_distance: float = MIN_DISTANCE,
    max_atoms: int = MAX_ATOMS,
) -> Purified:
    """Symmetrise crystals within symprec Å; take their primitive, Niggli-reduced cells.

    found: what `search` gave for each at symprec. primitive=False takes the conventional cell, which `niggli`
    leaves alone. The orientation is the standard one; mirror images stay apart. Refused are crystals without a
    symmetry (purify-failed), and those whose composition changes, a site of which moves by more than MOST_SHIFT
    symprec, whose lattice is strained by more than MOST_STRAIN symprec (per Å), whose volume per atom changes by
    more than MOST_VOLUME_CHANGE, or which fail `check` afterwards (purify-changed). The result is on the CPU,
    float64, without gradient, and that of a crystal does not depend on the others.
    """
    refused: dict[int, Refused] = {}
    if found is None:
        found, refused = _search_all(crystals, symprec)
    kept = np.array([at for at in range(len(crystals)) if at not in refused], dtype=np.int64)
    sets = [one for one in found if one is not None]
    given = _Cells.of(crystals[torch.from_numpy(kept)] if refused else crystals)
    pure = _Cells.joined([one.prim_std_cell for one in sets])
    shift, strain, faulty = _change(given, pure, sets, symprec)
    if not primitive:
        pure = _Cells.joined([one.std_cell for one in sets])
    elif niggli:
        pure = _in_niggli_cells(pure, faulty)
    made = pure.sorted_by_element().crystals()
    for at, fault in enumerate(faults(made, min_distance=min_distance, max_atoms=max_atoms)):
        if fault is not None:
            faulty.setdefault(at, Refused("purify-changed", f"the purified crystal is refused: {fault}"))
    good = np.array([at not in faulty for at in range(len(sets))], dtype=bool)
    refused |= {int(kept[at]): fault for at, fault in faulty.items()}
    numbers = np.array([one.number for one in sets], dtype=np.int64)
    return Purified(
        made[torch.from_numpy(good)] if faulty else made,
        kept[good], numbers[good], shift[good], strain[good], refused,
    )  # fmt: skip


def _search_all(crystals: Crystals, symprec: float) -> tuple[list[moyopy.MoyoDataset | None], dict[int, Refused]]:
    found: list[moyopy.MoyoDataset | None] = []
    refused: dict[int, Refused] = {}
    for at in range(len(crystals)):
        try:
            found.append(search(crystals[at], symprec))
        except Refused as fault:
            refused[at] = fault
    return found, refused


@dataclass(frozen=True)
class _Cells:
    """B crystals as arrays, each of 1 atom or more."""

    lattice: np.ndarray  # (B, 3, 3) Å
    frac: np.ndarray  # (A, 3)
    numbers: np.ndarray  # (A,)
    counts: np.ndarray  # (B,) atoms

    @staticmethod
    def of(crystals: Crystals) -> "_Cells":
        arrays = (crystals.lattice, crystals.frac_coords, crystals.atomic_numbers, crystals.num_atoms)
        return _Cells(*(array.numpy(force=True) for array in arrays))

    @staticmethod
    def joined(cells: Sequence[moyopy.Cell]) -> "_Cells":
        numbers = [cell.numbers for cell in cells]
        return _Cells(
            np.array([cell.basis for cell in cells]).reshape(-1, 3, 3),
            np.array(list(itertools.chain.from_iterable(cell.positions for cell in cells))).reshape(-1, 3),
            np.array(list(itertools.chain.from_iterable(numbers)), dtype=np.int64),
            np.array([len(some) for some in numbers], dtype=np.int64),
        )

    @property
    def starts(self) -> np.ndarray:
        """First atom of each crystal. (B,)"""
        return np.cumsum(self.counts) - self.counts

    @property
    def owner(self) -> np.ndarray:
        """Crystal of each atom. (A,)"""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def sorted_by_element(self) -> "_Cells":
        order = np.lexsort((self.numbers, self.owner))
        return _Cells(self.lattice, self.frac[order], self.numbers[order], self.counts)

    def crystals(self) -> Crystals:
        inside = self.frac - np.floor(self.frac)
        inside[inside >= 1.0] = 0.0
        arrays = (inside, self.lattice, self.numbers, self.counts)
        return Crystals(*(torch.from_numpy(array) for array in arrays))


def _change(
    given: _Cells, pure: _Cells, sets: Sequence[moyopy.MoyoDataset], symprec: float
) -> tuple[np.ndarray, np.ndarray, dict[int, Refused]]:
    """Farthest move of a site in Å (B,) and largest strain (B,), the given crystals being laid over the purified
    ones, and what is refused for it."""
    linear = np.array([one.prim_std_linear for one in sets]).reshape(-1, 3, 3)
    origin = np.array([one.prim_std_origin_shift for one in sets]).reshape(-1, 3)
    owner, starts = given.owner, given.starts
    mapping = np.array(list(itertools.chain.from_iterable(one.mapping_std_prim for one in sets)), dtype=np.int64)
    mapping += pure.starts[owner]
    copies = np.bincount(mapping, minlength=len(pure.numbers))
    same = np.minimum.reduceat(copies, pure.starts) == np.maximum.reduceat(copies, pure.starts)
    same &= np.logical_and.reduceat(pure.numbers[mapping] == given.numbers, starts)
    step = _times(given.frac - origin[owner], np.linalg.inv(linear).mT, owner) - pure.frac[mapping]
    cart = _times(step - np.rint(step), pure.lattice, owner)
    shift = np.sqrt(np.maximum.reduceat((cart * cart).sum(1), starts))
    laid = linear.mT @ given.lattice  # the given lattices in the purified cells' bases, in another orientation
    deformation = np.linalg.inv(pure.lattice) @ laid
    volume_change = np.abs(np.abs(np.linalg.det(deformation)) - 1.0)
    # 2 × strain, whatever the orientation
    strain = np.abs(deformation @ deformation.mT - np.eye(3)).max((1, 2)) / 2
    told = (
        (~same, 0 * shift, "the purified cell has another composition than the given crystal"),
        (~(volume_change <= MOST_VOLUME_CHANGE), volume_change, "the volume per atom changes by {:.3g} of it"),
        (~(shift <= MOST_SHIFT * symprec), shift, f"a site moves by {{:.3g}} Å, want at most {MOST_SHIFT * symprec:g}"),
        (~(strain <= MOST_STRAIN * symprec), strain,
         f"the lattice is strained by {{:.3g}}, want at most {MOST_STRAIN * symprec:g}"),
    )  # fmt: skip
    refused: dict[int, Refused] = {}
    for bad, value, message in told:
        for at in np.flatnonzero(bad).tolist():
            refused.setdefault(at, Refused("purify-changed", message.format(value[at])))
    return shift, strain, refused


def _times(rows: np.ndarray, cells: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Row vectors times the matrix of their crystal, in an order of sums that no batch changes.

    (A, 3), (B, 3, 3), (A,) -> (A, 3).
    """
    own = cells[owner]
    return (rows[:, :1] * own[:, 0] + rows[:, 1:2] * own[:, 1]) + rows[:, 2:] * own[:, 2]


def _in_niggli_cells(cells: _Cells, refused: dict[int, Refused]) -> _Cells:
    """The same crystals in their Niggli cells; one that has none stays as it is, and is noted as refused."""
    bases, transforms = [], []
    for at, basis in enumerate(cells.lattice.tolist()):
        try:
            reduced, transform = moyopy.niggli_reduce(basis)
        except ValueError as fault:
            refused.setdefault(at, Refused("purify-failed", f"no Niggli cell: {fault}"))
            reduced, transform = basis, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        bases.append(reduced)
        transforms.append(transform)
    back = np.linalg.inv(np.array(transforms).reshape(-1, 3, 3)).mT
    frac = _times(cells.frac, back, cells.owner)
    return _Cells(np.array(bases).reshape(-1, 3, 3), frac, cells.numbers, cells.counts)
