"""Space groups: the symmetry of a crystal and the projection onto it.

Codes of refusal: no-symmetry (find_symmetry), not-symmetric (site_permutations).
"""

import logging
import math
from dataclasses import dataclass

import moyopy
import torch
from torch import Tensor

from hpcgen.crystal.check import refuse_batch
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.torus import shortest_step, wrap

SQUARE_ROOT_STEPS = 8  # Denman–Beavers doubles the digits each step: from a strain of 0.3 to 1e-16 in 6


@dataclass(frozen=True)
class Symmetry:
    """A space group in the basis of one crystal's own cell: frac' = rotations @ frac + translations."""

    number: int  # international, 1 to 230
    hall_number: int  # 1 to 530
    rotations: Tensor  # (G, 3, 3) int64
    translations: Tensor  # (G, 3) float64, in cell units

    def __len__(self) -> int:
        return self.translations.shape[0]

    def apply(self, frac_coords: Tensor) -> Tensor:
        """Images of sites under every operation, not wrapped. (A, 3) -> (G, A, 3)."""
        rotations = self.rotations.to(frac_coords)
        return torch.einsum("gij,aj->gai", rotations, frac_coords) + self.translations.to(frac_coords)[:, None]


_LOGGER = logging.getLogger("moyo")


def _not_an_omission(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Omitted")


def dataset(crystal: Crystals, symprec: float, code: str) -> moyopy.MoyoDataset:
    """All that moyo finds of the one crystal of a batch of 1, on the CPU. Raises Refused with `code`.

    moyo warns of operations that do not fit a supercell ("Omitted …"): expected here, silent here alone.
    """
    refuse_batch(crystal)
    cell = moyopy.Cell(crystal.lattice[0].tolist(), crystal.frac_coords.tolist(), crystal.atomic_numbers.tolist())
    _LOGGER.addFilter(_not_an_omission)
    try:
        return moyopy.MoyoDataset(cell, symprec=symprec)
    except BaseException as fault:
        if not isinstance(fault, ValueError | RuntimeError) and type(fault).__name__ != "PanicException":
            raise  # a panic of moyo's is no Exception, and no public class
        raise Refused(code, f"no symmetry found at symprec {symprec:g} Å: {fault}") from fault
    finally:
        _LOGGER.removeFilter(_not_an_omission)


def find_symmetry(crystal: Crystals, symprec: float = 0.01) -> Symmetry:
    """The symmetry of the one crystal of a batch of 1, within symprec Å, on the CPU. Raises Refused (no-symmetry)."""
    found = dataset(crystal, symprec, "no-symmetry")
    operations = found.operations
    return Symmetry(
        found.number,
        found.hall_number,
        torch.tensor(operations.rotations, dtype=torch.int64),
        torch.tensor(operations.translations, dtype=torch.float64),
    )


def space_group_number(crystal: Crystals, symprec: float) -> int:
    """International number of the one crystal of a batch of 1, within symprec Å; 0 where none is found."""
    try:
        return find_symmetry(crystal, symprec).number
    except Refused:
        return 0


def site_permutations(crystal: Crystals, symmetry: Symmetry) -> Tensor:
    """Where each operation takes each site of one crystal: the nearest site of its element. -> (G, A) int64.

    Raises Refused (not-symmetric) if an operation takes two sites to one.
    """
    refuse_batch(crystal)
    frac, lattice = crystal.frac_coords.detach(), crystal.lattice[0].detach()
    other = crystal.atomic_numbers[:, None] != crystal.atomic_numbers
    nearest = []
    for image in symmetry.apply(frac):  # (A, 3): one operation at a time keeps memory at A²
        apart = (shortest_step(frac, image[:, None]) @ lattice).square().sum(-1)  # (A, A)
        nearest.append(apart.masked_fill(other, math.inf).argmin(-1))
    permutations = torch.stack(nearest)
    sites = torch.arange(len(frac), device=frac.device)
    for g in (permutations.sort(-1).values != sites).any(-1).nonzero().flatten().tolist():
        raise Refused("not-symmetric", f"operation {g} takes two sites to one")
    return permutations


def orbits(permutations: Tensor) -> Tensor:
    """The first site that symmetry makes equal to each site. (G, A) -> (A,)."""
    return permutations.amin(0)


@dataclass(frozen=True)
class Symmetrised:
    """A crystal with exactly the wanted symmetry, and how far it lies from the given one."""

    crystal: Crystals
    site_shift: Tensor  # (A,) Å
    strain: Tensor  # (3, 3) symmetric: lattice' = lattice @ (1 + strain)


def symmetrised(crystal: Crystals, symmetry: Symmetry, permutations: Tensor) -> Symmetrised:
    """The nearest crystal with the symmetry: sites and metric averaged over the group. Differentiable.

    permutations (G, A) as of site_permutations. The cell is strained but not rotated. Its own fixed point:
    zero shift and strain where the crystal has the symmetry already.
    """
    frac, lattice = crystal.frac_coords, crystal.lattice[0]
    steps = shortest_step(frac[permutations], symmetry.apply(frac))  # (G, A, 3), belonging to site permutations
    target = permutations.reshape(-1, 1).expand(-1, 3)
    moved = torch.zeros_like(frac).scatter_add(0, target, steps.reshape(-1, 3)) / len(symmetry)
    rotations = symmetry.rotations.to(lattice)
    metric = torch.einsum("gji,jk,gkl->gil", rotations, lattice @ lattice.T, rotations).mean(0)  # Rᵀ M R
    inverse = torch.linalg.inv(lattice)
    stretch = _square_root(inverse @ metric @ inverse.T)  # U with (L U)(L U)ᵀ = metric
    strained = lattice @ stretch
    shift = torch.linalg.vector_norm(moved.detach() @ lattice.detach(), dim=-1)
    result = Crystals(wrap(frac + moved), strained[None], crystal.atomic_numbers, crystal.num_atoms)
    strain = stretch.detach() - torch.eye(3, dtype=stretch.dtype, device=stretch.device)
    return Symmetrised(result, shift, strain)


def _square_root(square: Tensor) -> Tensor:
    """Square root of a symmetric matrix near 1 (Denman and Beavers 1976); eigh's gradient is NaN there."""
    root, inverse_root = square, torch.eye(3, dtype=square.dtype, device=square.device)
    for _ in range(SQUARE_ROOT_STEPS):
        root, inverse_root = (
            (root + torch.linalg.inv(inverse_root)) / 2,
            (inverse_root + torch.linalg.inv(root)) / 2,
        )
    return (root + root.T) / 2
