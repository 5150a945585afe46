"""Structure fingerprints: the mean over all sites of their order parameters, by which structures are compared.

The numbers of matminer's `CrystalNNFingerprint.from_preset("ops")`, averaged over sites as CDVAE does (Xie et al., ICLR
2022), without matminer.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import FLAT
from hpcgen.crystal.neighbours import LONGEST
from hpcgen.metrics.crystalnn import (
    Neighbours,
    coordination,
    expected_neighbours,
    radii,
    voronoi_faces,
    weighed,
)
from hpcgen.metrics.order_parameters import MOTIFS, is_chance, order_parameters

HIGHEST = 24  # coordination number that has a feature of its own
FEATURES = tuple(
    f"{name} CN_{number}" for number in range(1, HIGHEST + 1) for name in ("wt", *MOTIFS.get(number, {}))
)  # 61, as matminer names and orders them
ALIKE = 1e-9  # difference of weights up to which they are equal but for rounding
TOGETHER = 200_000  # neighbours of crystals handled together: some 100 MB
MOST = 20_000  # neighbours of an atom within 7 Å; diamond has 250
MOST_IN_ALL = 2_000_000  # of all atoms of a crystal: some 2 s and 450 MB


@dataclass(frozen=True)
class Fingerprints:
    """Of B crystals."""

    values: np.ndarray  # (B, 61) float64, columns as in FEATURES; nan where there is a reason
    reasons: dict[int, str]  # why a crystal has no fingerprint


def fingerprints(crystals: Crystals, most: int = MOST) -> Fingerprints:
    """Mean over sites of how likely each coordination number is, and of this likelihood times each order parameter.

    No fingerprint have the crystals that matminer fails on (a Voronoi cell that stays open, an element without a
    covalent radius, Z > 96), those with numbers that are not finite or a flat cell, and, as they would take for ever,
    those of such density that an atom has more than `most` neighbours within 7 Å. Layers and molecules in a vacuum
    of more than 7 Å take as long as in matminer. A crystal's values do not depend on the others of the batch.
    """
    plain = crystals.to("cpu", torch.float64)
    reasons = _unfit(plain, most)
    values = np.full((len(plain), len(FEATURES)), math.nan)
    fit = torch.tensor([b for b in range(len(plain)) if b not in reasons], dtype=torch.int64)
    turn = (plain[fit].num_atoms * expected_neighbours(plain[fit])).cumsum(0).div(TOGETHER).floor()
    for group in fit.split(torch.unique_consecutive(turn, return_counts=True)[1].tolist()):
        found, failed = _values(plain[group])
        values[group.numpy()] = found
        reasons |= {int(group[b]): reason for b, reason in failed.items()}
    return Fingerprints(values, dict(sorted(reasons.items())))


def _values(crystals: Crystals) -> tuple[np.ndarray, dict[int, str]]:
    """Fingerprints (B, 61), nan where they failed, and why."""
    faces, reasons = voronoi_faces(crystals)
    near = weighed(faces, crystals.atomic_numbers.numpy())
    site, number, share, first = coordination(near)
    of_sites, column = np.zeros((len(crystals.batch), len(FEATURES))), 0
    for cn in range(1, HIGHEST + 1):
        which = np.flatnonzero(number == cn)
        of_sites[site[which], column] = share[which]
        column += 1
        if cn in MOTIFS:
            orders = order_parameters(near.direction[first[which, None] + np.arange(cn)])
            if cn == 8:
                _settle(crystals, near, site[which], first[which], orders)
            of_sites[site[which], column : column + orders.shape[1]] = share[which, None] * orders
            column += orders.shape[1]
    values = np.add.reduceat(of_sites, crystals.ptr[:-1].numpy()) / crystals.num_atoms.numpy()[:, None]
    values[list(reasons)] = math.nan
    return values, reasons


def _settle(crystals: Crystals, near: Neighbours, site: np.ndarray, first: np.ndarray, orders: np.ndarray) -> None:
    """Replace "body-centered cubic" in `orders` (N, 2) of eightfold sites by pymatgen's own value where chance decides.

    It depends on the order of the neighbours, which is chance where their weights are equal by symmetry, and jumps
    at right angles. That concerns some 3 % of the sites of known crystals, and none without symmetry.
    """
    eight = first[:, None] + np.arange(8)
    exact = near.exact[eight]
    alike = np.abs(exact[:, :, None] - exact[:, None]) < ALIKE
    for n in np.flatnonzero(is_chance(near.direction[eight], alike)).tolist():
        b = int(crystals.batch[site[n]])
        orders[n, 0] = _by_pymatgen(crystals[b], int(site[n] - crystals.ptr[b]), float(orders[n, 0]))


def _by_pymatgen(crystal: Crystals, atom: int, otherwise: float) -> float:
    """Order parameter of an atom of one crystal, or `otherwise` where pymatgen never counts eight neighbours."""
    from pymatgen.analysis.local_env import CrystalNN, LocalStructOrderParams

    structure = to_pymatgen(crystal)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no oxidation states
        neighbours = [entry["site"] for entry in CrystalNN().get_nn_data(structure, atom).cn_nninfo.get(8, [])]
    if len(neighbours) != 8:  # a weight between two roundings: chance, too
        return otherwise
    sites: Any = [structure[atom], *neighbours]  # what matminer hands over, too
    others = list(range(1, 9))
    return LocalStructOrderParams(["bcc"]).get_order_parameters(sites, 0, indices_neighs=others)[0]


def _unfit(crystals: Crystals, most: int) -> dict[int, str]:
    """Crystals that are not to be searched, and why."""
    lattice, batch, numbers = crystals.lattice, crystals.batch, crystals.atomic_numbers
    bad = ~crystals.frac_coords.isfinite().all(-1)
    finite = (lattice.abs() < LONGEST).flatten(1).all(1) & (torch.bincount(batch[bad], minlength=len(crystals)) == 0)
    volume = torch.where(finite, crystals.volume, 0.0)
    solid = volume > 2 * FLAT * torch.linalg.vector_norm(lattice, dim=-1).prod(-1)
    expected = expected_neighbours(crystals)
    reasons = {}
    for b in range(len(crystals)):
        if not finite[b]:
            reasons[b] = "a lattice or coordinate is not finite"
        elif not solid[b]:
            reasons[b] = "the cell is flat"
        elif not expected[b] <= most:
            reasons[b] = f"some {expected[b]:.3g} neighbours within 7 Å of an atom, want at most {most}"
        elif not expected[b] * crystals.num_atoms[b] <= MOST_IN_ALL:
            reasons[b] = f"some {expected[b]:.3g} neighbours within 7 Å of each of {crystals.num_atoms[b]} atoms"
    known = (numbers >= 1) & (numbers <= 118)
    known &= torch.from_numpy(np.isfinite(radii()))[torch.where(known, numbers, 0)]
    for atom in (~known).nonzero().flatten().tolist():
        reasons.setdefault(int(batch[atom]), f"atomic number {int(numbers[atom])} has no covalent radius")
    return reasons
