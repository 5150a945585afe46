"""The one crystal type of hpcgen. Its conventions are written here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hpcgen.crystal.torus import wrap


@dataclass(frozen=True, eq=False)
class Crystals:
    """B periodic crystals, A atoms in all. lattice rows are a, b, c in Å: cart = frac_coords @ lattice."""

    frac_coords: Tensor  # (A, 3) in [0, 1)
    lattice: Tensor  # (B, 3, 3) Å
    atomic_numbers: Tensor  # (A,) int64, 1 to 118
    num_atoms: Tensor  # (B,) int64, at least 1

    def __len__(self) -> int:
        return self.num_atoms.shape[0]

    @cached_property
    def ptr(self) -> Tensor:
        """First atom of each crystal, and the end. (B + 1,) int64."""
        return torch.cat([self.num_atoms.new_zeros(1), self.num_atoms.cumsum(0)])

    @cached_property
    def batch(self) -> Tensor:
        """Crystal of each atom. (A,) int64."""
        crystal = torch.arange(len(self), device=self.num_atoms.device)
        return crystal.repeat_interleave(self.num_atoms, output_size=self.frac_coords.shape[0])

    @property
    def cart_coords(self) -> Tensor:
        """Cartesian coordinates. (A, 3) Å."""
        return torch.einsum("ai,aij->aj", self.frac_coords, self.lattice[self.batch])

    @property
    def volume(self) -> Tensor:
        """Cell volumes. (B,) Å³."""
        return torch.linalg.det(self.lattice).abs()

    def __getitem__(self, which: int | slice | Sequence[int] | Tensor) -> "Crystals":
        """The crystals at `which` (an index of any integer type, a slice, indices or a mask), in that order."""
        if isinstance(which, int):
            if not -len(self) <= which < len(self):
                raise IndexError(f"crystal {which} of {len(self)}")
            which = [which]
        index = torch.arange(len(self), device=self.num_atoms.device)[which].reshape(-1)
        counts = self.num_atoms[index]
        ends = counts.cumsum(0)
        shift = (self.ptr[index] - ends + counts).repeat_interleave(counts)
        atoms = torch.arange(len(shift), device=counts.device) + shift
        return Crystals(self.frac_coords[atoms], self.lattice[index], self.atomic_numbers[atoms], counts)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Crystals":
        """The same crystals on `device`, coordinates and lattice as `dtype`.

        A coordinate that rounds to 1.0 becomes 0, one cell lower: edges found before no longer fit that atom,
        their images being one off along that axis.
        """
        return Crystals(
            wrap(self.frac_coords.to(device=device, dtype=dtype)),
            self.lattice.to(device=device, dtype=dtype),
            self.atomic_numbers.to(device=device),
            self.num_atoms.to(device=device),
        )

    @staticmethod
    def cat(parts: "Sequence[Crystals]") -> "Crystals":
        """Several batches as one, in order. `parts` is not empty."""
        return Crystals(
            torch.cat([part.frac_coords for part in parts]),
            torch.cat([part.lattice for part in parts]),
            torch.cat([part.atomic_numbers for part in parts]),
            torch.cat([part.num_atoms for part in parts]),
        )


def no_crystals() -> Crystals:
    """A batch of none."""
    none = torch.zeros(0, dtype=torch.int64)
    return Crystals(torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 3, 3, dtype=torch.float64), none, none)
