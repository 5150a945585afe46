"""Crystals side by side in one rectangle: padded to the same number of atoms."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.torus import wrap


@dataclass(frozen=True)
class Dense:
    """B crystals padded to N atoms; padding has element 0, coordinates 0, and mask False."""

    species: Tensor  # (B, N) int64
    frac: Tensor  # (B, N, 3)
    lattice: Tensor  # (B, 3, 3) Å
    mask: Tensor  # (B, N) bool

    @staticmethod
    def of(crystals: Crystals, length: int | None = None) -> "Dense":
        """Padded to `length` atoms, or to those of the largest crystal."""
        length = int(crystals.num_atoms.max()) if length is None else length
        mask = occupied(crystals.num_atoms, length)
        place = torch.arange(length, device=mask.device) + crystals.ptr[:-1, None]
        place = torch.where(mask, place, 0)
        species = torch.where(mask, crystals.atomic_numbers[place], 0)
        frac = crystals.frac_coords[place] * mask.unsqueeze(-1)
        return Dense(species, frac, crystals.lattice, mask)

    @property
    def num_atoms(self) -> Tensor:
        """(B,) int64"""
        return self.mask.sum(1)

    def crystals(self) -> Crystals:
        """The same without padding."""
        return Crystals(wrap(self.frac[self.mask]), self.lattice, self.species[self.mask], self.num_atoms)


def occupied(num_atoms: Tensor, length: int) -> Tensor:
    """Which places hold an atom. (B,) -> (B, length) bool."""
    return torch.arange(length, device=num_atoms.device) < num_atoms.unsqueeze(1)
