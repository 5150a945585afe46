"""Structural validity: are the atoms far enough apart? Exact, for any cell, a batch at a time."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import FLAT
from hpcgen.crystal.neighbours import LONGEST, Edges, edge_distances, radius_edges

LEAST_DISTANCE = 0.5  # Å
LEAST_VOLUME = 0.1  # Å³ of a cell
TOGETHER = 4_000_000  # edges expected of crystals measured together: some 100 MB
MOST = 50_000_000  # edges within LEAST_DISTANCE of one crystal; with more it has collapsed


@dataclass(frozen=True)
class Validity:
    """Of B crystals, each (B,) bool. What cannot be measured (not finite, flat, collapsed) is nowhere valid."""

    distances: np.ndarray  # CDVAE's rule: all pairs at least 0.5 Å apart in any image, volume at least 0.1 Å³
    distances_with_images: np.ndarray  # and every atom at least 0.5 Å from its own images, which that rule leaves out
    radii: np.ndarray  # and every distance, own images included, at least half the sum of the covalent radii


def validity(crystals: Crystals) -> Validity:
    """All three rules for every crystal.

    CDVAE (Xie et al., ICLR 2022) asks pymatgen's `Structure.distance_matrix`, whose diagonal it leaves out: the same
    verdict here. Radii: Cordero et al. 2008 as ASE has them, where an element without one (Z > 96) counts 0.2 Å.
    """
    plain = crystals.to("cpu", torch.float64)
    found = [np.zeros(len(plain), dtype=bool) for _ in range(3)]
    measurable = _measurable(plain)
    expected = _sphere(LEAST_DISTANCE) * plain.num_atoms**2 / plain.volume
    for group in _groups(measurable.nonzero().flatten(), expected):
        some = plain[group]
        pairs, images = _touching(some, radius_edges(some, LEAST_DISTANCE))
        found[0][group.numpy()] = ~pairs
        found[1][group.numpy()] = ~(pairs | images)
    radii = covalent_radii()
    good = torch.from_numpy(np.flatnonzero(found[1]))
    widest = float(radii[plain.atomic_numbers].max()) if len(plain) else 0.0
    for group in _groups(good, _sphere(widest) * plain.num_atoms**2 / plain.volume):
        some = plain[group]
        pairs, images = _touching(some, _below_half_sum(some, radii))
        found[2][group.numpy()] = ~(pairs | images)
    return Validity(*found)


def random_coordinates(crystals: Crystals, seed: int) -> Crystals:
    """The same cells and elements, every atom anywhere: what a generator must beat. A function of `seed`."""
    chance = np.random.Generator(np.random.Philox(seed))
    frac = torch.from_numpy(chance.random(tuple(crystals.frac_coords.shape)))
    return Crystals(frac, crystals.lattice, crystals.atomic_numbers, crystals.num_atoms).to(
        dtype=crystals.frac_coords.dtype
    )


@lru_cache(maxsize=1)
def covalent_radii() -> Tensor:
    """By atomic number (Cordero et al. 2008, as ASE has them). (119,) float64 Å."""
    from ase import data

    return torch.from_numpy(np.array(data.covalent_radii, dtype=np.float64))


def _sphere(radius: float) -> float:
    return 4 / 3 * math.pi * radius**3


def _measurable(crystals: Crystals) -> Tensor:
    """Crystals with finite numbers, a cell of some volume and not too many atoms in it. (B,) bool."""
    lattice, volume = crystals.lattice, crystals.volume
    good = (lattice.abs() < LONGEST).flatten(1).all(1) & (volume >= LEAST_VOLUME)
    good &= volume > 2 * FLAT * torch.linalg.vector_norm(lattice, dim=-1).prod(-1)
    good &= _sphere(LEAST_DISTANCE) * crystals.num_atoms**2 / volume < MOST
    atoms = crystals.frac_coords.isfinite().all(-1) & (crystals.atomic_numbers >= 1) & (crystals.atomic_numbers <= 118)
    good[crystals.batch[~atoms]] = False
    return good


def _groups(which: Tensor, expected: Tensor) -> list[Tensor]:
    """`which` (n,) crystals in runs of about TOGETHER edges, expected (B,) being those of each crystal."""
    turn = (expected[which].cumsum(0) / TOGETHER).floor()
    sizes = torch.unique_consecutive(turn, return_counts=True)[1].tolist()
    return list(which.split(sizes)) if len(which) else []


def _touching(crystals: Crystals, edges: Edges) -> tuple[Tensor, Tensor]:
    """Crystals with an edge between two atoms, and with one from an atom to its own image. -> (B,), (B,) bool."""
    (i, j), crystal = edges.index, crystals.batch[edges.index[0]]
    pairs, images = (torch.bincount(crystal[kind], minlength=len(crystals)) > 0 for kind in (i != j, i == j))
    return pairs, images


def _below_half_sum(crystals: Crystals, radii: Tensor) -> Edges:
    """Edges shorter than half the sum of the two covalent radii. radii (119,) Å."""
    each = radii[crystals.atomic_numbers]
    edges = radius_edges(crystals, float(each.max()))
    near = edge_distances(crystals, edges) < each[edges.index].mean(0)
    return Edges(edges.index[:, near], edges.image[near])
