"""Crystals as NumPy arrays, for work on many small ones at a time."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import moyopy
import numpy as np
import torch

from hpcgen.crystal.crystals import Crystals


@dataclass(frozen=True)
class Cells:
    """B crystals as arrays, each of 1 atom or more."""

    lattice: np.ndarray  # (B, 3, 3) Å, rows are a, b, c
    frac: np.ndarray  # (A, 3)
    numbers: np.ndarray  # (A,)
    counts: np.ndarray  # (B,) atoms

    @staticmethod
    def of(crystals: Crystals) -> "Cells":
        arrays = (crystals.lattice, crystals.frac_coords, crystals.atomic_numbers, crystals.num_atoms)
        return Cells(*(array.numpy(force=True) for array in arrays))

    @staticmethod
    def joined(cells: Sequence[moyopy.Cell]) -> "Cells":
        numbers = [cell.numbers for cell in cells]
        return Cells(
            np.array([cell.basis for cell in cells]).reshape(-1, 3, 3),
            np.array(list(itertools.chain.from_iterable(cell.positions for cell in cells))).reshape(-1, 3),
            np.array(list(itertools.chain.from_iterable(numbers)), dtype=np.int64),
            np.array([len(some) for some in numbers], dtype=np.int64),
        )

    @cached_property
    def starts(self) -> np.ndarray:
        """First atom of each crystal. (B,)"""
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def owner(self) -> np.ndarray:
        """Crystal of each atom. (A,)"""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def __getitem__(self, places: np.ndarray) -> "Cells":
        """Those at `places`, in that order."""
        atoms = ranges(self.starts[places], self.counts[places])
        return Cells(self.lattice[places], self.frac[atoms], self.numbers[atoms], self.counts[places])

    def then(self, others: "Cells") -> "Cells":
        """These, and the others behind them."""
        pairs = ((self.lattice, others.lattice), (self.frac, others.frac), (self.numbers, others.numbers))
        return Cells(*(np.concatenate(pair) for pair in (*pairs, (self.counts, others.counts))))

    def sorted_by_element(self) -> "Cells":
        order = np.lexsort((self.numbers, self.owner))
        return Cells(self.lattice, self.frac[order], self.numbers[order], self.counts)

    def in_niggli_cells(self) -> tuple["Cells", dict[int, str]]:
        """The same crystals in their Niggli cells, not rotated; and, by place, why one has none: it stays as it is."""
        bases, transforms = [], []
        faulty: dict[int, str] = {}
        for at, basis in enumerate(self.lattice.tolist()):
            try:
                reduced, transform = moyopy.niggli_reduce(basis)
            except ValueError as fault:
                faulty[at] = str(fault)
                reduced, transform = basis, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
            bases.append(reduced)
            transforms.append(transform)
        back = np.linalg.inv(np.array(transforms).reshape(-1, 3, 3)).mT
        frac = times(self.frac, back, self.owner)
        return Cells(np.array(bases).reshape(-1, 3, 3), frac, self.numbers, self.counts), faulty

    def crystals(self) -> Crystals:
        inside = self.frac - np.floor(self.frac)
        inside[inside >= 1.0] = 0.0
        arrays = (inside, self.lattice, self.numbers, self.counts)
        return Crystals(*(torch.from_numpy(array) for array in arrays))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each range, one range after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def times(rows: np.ndarray, cells: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Row vectors times the matrix of their crystal, in an order of sums that no batch changes.

    (A, 3), (B, 3, 3), (A,) -> (A, 3).
    """
    own = cells[owner]
    return (rows[:, :1] * own[:, 0] + rows[:, 1:2] * own[:, 1]) + rows[:, 2:] * own[:, 2]


def upright(metric: np.ndarray) -> np.ndarray:
    """Right-handed lattices of these metrics, a along x, b in the xy plane; not finite where there is none.

    (B, 3, 3) Å² -> (B, 3, 3) Å. Cholesky's decomposition, which NumPy's own refuses for all if one has none.
    """
    lattice = np.zeros_like(metric)
    with np.errstate(all="ignore"):
        for row in range(3):
            for column in range(row + 1):
                rest = metric[:, row, column] - (lattice[:, row, :column] * lattice[:, column, :column]).sum(-1)
                lattice[:, row, column] = np.sqrt(rest) if row == column else rest / lattice[:, column, column]
    return lattice
