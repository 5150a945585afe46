"""Space groups: the symmetry of a crystal, the projection onto it, and the purified primitive cell.

Codes of refusal: no-symmetry (find_symmetry), not-symmetric (site_permutations), purify-failed and
purify-changed (purify).
"""

import logging
import math
from dataclasses import dataclass

import moyopy
import numpy as np
import torch
from torch import Tensor

from hpcgen.crystal.check import MAX_ATOMS, MIN_DISTANCE, check_arrays, inverse, one_crystal, refuse_batch
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.torus import shortest_step, wrap

MOST_SHIFT = 5.0  # a purified site may lie this many symprec from the given one,
MOST_STRAIN = 5.0  # the lattice be strained by this many symprec per Å of edge,
MOST_VOLUME_CHANGE = 0.02  # and the volume per atom change by this share
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


def _dataset(frac: list, lattice: list, numbers: list, symprec: float, code: str) -> moyopy.MoyoDataset:
    """moyo warns of operations that do not fit a supercell ("Omitted …"): expected here, silent here alone."""
    _LOGGER.addFilter(_not_an_omission)
    try:
        return moyopy.MoyoDataset(moyopy.Cell(lattice, frac, numbers), symprec=symprec)
    except (ValueError, RuntimeError) as fault:
        raise Refused(code, f"no symmetry found at symprec {symprec:g} Å: {fault}") from fault
    finally:
        _LOGGER.removeFilter(_not_an_omission)


def find_symmetry(crystal: Crystals, symprec: float = 0.01) -> Symmetry:
    """The symmetry of the one crystal of a batch of 1, within symprec Å, on the CPU. Raises Refused (no-symmetry)."""
    refuse_batch(crystal)
    cell = crystal.frac_coords.tolist(), crystal.lattice[0].tolist(), crystal.atomic_numbers.tolist()
    found = _dataset(*cell, symprec, "no-symmetry")
    operations = found.operations
    return Symmetry(
        found.number,
        found.hall_number,
        torch.tensor(operations.rotations, dtype=torch.int64),
        torch.tensor(operations.translations, dtype=torch.float64),
    )


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


@dataclass(frozen=True)
class Purified:
    """A crystal in a standard cell with its symmetry made exact. Atoms are sorted by element."""

    crystal: Crystals
    space_group: int
    max_shift: float  # Å, farthest that a site moved
    max_strain: float  # largest strain of the lattice


def search(crystal: Crystals, symprec: float = 0.01) -> moyopy.MoyoDataset:
    """The costly half of `purify`, to be handed to it as `found`. Raises Refused (purify-failed).

    Many searches in a row, then many purifications, keep the processor's caches warm: 5 % faster than in turns.
    """
    refuse_batch(crystal)
    cell = crystal.frac_coords.tolist(), crystal.lattice[0].tolist(), crystal.atomic_numbers.tolist()
    return _dataset(*cell, symprec, "purify-failed")


def purify(
    crystal: Crystals,
    *,
    symprec: float = 0.01,
    found: moyopy.MoyoDataset | None = None,
    primitive: bool = True,
    niggli: bool = True,
    min_distance: float = MIN_DISTANCE,
    max_atoms: int = MAX_ATOMS,
) -> Purified:
    """Symmetrise the one crystal of a batch of 1 within symprec Å; take its primitive, Niggli-reduced cell.

    primitive=False takes the conventional cell, which `niggli` leaves alone. The orientation is the standard
    one; mirror images stay apart. Raises Refused: purify-failed without a symmetry, purify-changed if the
    composition changes, a site moves by more than MOST_SHIFT symprec, the lattice is strained by more than
    MOST_STRAIN symprec (per Å), the volume per atom changes by more than MOST_VOLUME_CHANGE or the result
    fails `check`. The result is on the CPU, float64, without gradient.
    """
    refuse_batch(crystal)
    frac, lattice = crystal.frac_coords.numpy(force=True), crystal.lattice[0].numpy(force=True)
    numbers = crystal.atomic_numbers.numpy(force=True)
    if found is None:
        found = search(crystal, symprec)
    pure = found.prim_std_cell
    basis, sites, kinds = np.array(pure.basis), np.array(pure.positions), np.array(pure.numbers)
    max_shift, max_strain = _change(frac, lattice, numbers, found, basis, sites, kinds)
    for name, value, most in (
        ("a site moves by {:.3g} Å", max_shift, MOST_SHIFT * symprec),
        ("the lattice is strained by {:.3g}", max_strain, MOST_STRAIN * symprec),
    ):
        if not value <= most:
            raise Refused("purify-changed", f"{name.format(value)}, want at most {most:g}")
    if not primitive:
        whole = found.std_cell
        basis, sites, kinds = np.array(whole.basis), np.array(whole.positions), np.array(whole.numbers)
    elif niggli:
        basis, sites = _in_niggli_cell(basis, sites)
    order = np.argsort(kinds, kind="stable")
    sites, kinds = sites[order], kinds[order].astype(np.int64)
    try:
        check_arrays(sites, basis, kinds, min_distance, max_atoms)
    except Refused as refused:
        raise Refused("purify-changed", f"the purified crystal is refused: {refused}") from refused
    return Purified(one_crystal(sites, basis, kinds), found.number, max_shift, max_strain)


def _change(
    frac: np.ndarray,
    lattice: np.ndarray,
    numbers: np.ndarray,
    found: moyopy.MoyoDataset,
    basis: np.ndarray,
    sites: np.ndarray,
    kinds: np.ndarray,
) -> tuple[float, float]:
    """Farthest move of a site in Å and largest strain, the given crystal being laid over the purified one."""
    linear, mapping = np.array(found.prim_std_linear), np.array(found.mapping_std_prim)
    copies = np.bincount(mapping, minlength=len(kinds)).tolist()
    if not (min(copies) == max(copies) and (kinds[mapping] == numbers).all()):
        raise Refused("purify-changed", "the purified cell has another composition than the given crystal")
    step = (frac - np.array(found.prim_std_origin_shift)) @ inverse(linear)[0].T - sites[mapping]
    step -= np.rint(step)
    cart = step @ basis
    given = linear.T @ lattice  # the given lattice in the purified cell's basis, in another orientation
    deformation = inverse(basis)[0] @ given
    volume_change = abs(abs(inverse(deformation)[1]) - 1.0)
    if not volume_change <= MOST_VOLUME_CHANGE:
        raise Refused("purify-changed", f"the volume per atom changes by {volume_change:.3g} of it")
    squared = deformation @ deformation.T - _ONE  # 2 × strain, whatever the orientation
    return math.sqrt((cart * cart).sum(1).max()), float(np.abs(squared).max()) / 2


_ONE = np.eye(3)


def _in_niggli_cell(basis: np.ndarray, sites: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        reduced, transform = moyopy.niggli_reduce(basis.tolist())
    except ValueError as fault:
        raise Refused("purify-failed", f"no Niggli cell: {fault}") from fault
    return np.array(reduced), sites @ inverse(np.array(transform))[0].T
