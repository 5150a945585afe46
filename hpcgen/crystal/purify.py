"""Purified crystals: symmetrised within a tolerance, in primitive Niggli-reduced cells.

Codes of refusal: purify-failed (no symmetry, no Niggli cell) and purify-changed.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import moyopy
import numpy as np
import torch

from hpcgen.crystal.cells import Cells, times, upright
from hpcgen.crystal.check import MAX_ATOMS, MIN_DISTANCE, faults
from hpcgen.crystal.clear import Symmetric, clear_symmetry
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
    """The costly part of `purify`, for one crystal whose symmetry is not clear. Raises Refused (purify-failed)."""
    return dataset(crystal, symprec, "purify-failed")


def purify(
    crystals: Crystals,
    clear: Symmetric | None = None,
    found: Sequence[moyopy.MoyoDataset | None] | None = None,
    *,
    symprec: float = 0.01,
    primitive: bool = True,
    niggli: bool = True,
    min_distance: float = MIN_DISTANCE,
    max_atoms: int = MAX_ATOMS,
) -> Purified:
    """Symmetrise crystals within symprec Å; take their primitive, Niggli-reduced cells, a along x, b in the xy plane.

    clear: what `clear_symmetry` gave for them at symprec; found: what `search` gave for each of the others, None for
    those, and for some that are to be left out. primitive=False takes the conventional cell, which `niggli` leaves
    alone, niggli=False a primitive one, both in moyo's orientation. Mirror images stay apart. Refused are crystals
    without a symmetry (purify-failed), and those whose composition changes, a site of which moves by more than
    MOST_SHIFT symprec, whose lattice is strained by more than MOST_STRAIN symprec (per Å), whose volume per atom
    changes by more than MOST_VOLUME_CHANGE, or which fail `check` afterwards (purify-changed). The result is on the
    CPU, float64, without gradient, and that of a crystal does not depend on the others.
    """
    refused: dict[int, Refused] = {}
    given, reduced = Cells.of(crystals), primitive and niggli
    if clear is None:
        clear = clear_symmetry(given if reduced else given[np.arange(0)], symprec)
    if found is None:
        found, refused = _search_others(crystals, clear, symprec)
    pure, faulty = _by_moyo(given, found, symprec, primitive)
    pure = clear.then(pure)
    places, cells = pure.places.tolist(), pure.cells
    if reduced:
        cells, without = cells.in_niggli_cells()
        cells = replace(cells, lattice=upright(cells.lattice @ cells.lattice.mT))
        for at, fault in without.items():
            faulty.setdefault(places[at], Refused("purify-failed", f"no Niggli cell: {fault}"))
    made = cells.sorted_by_element().crystals()
    for place, wrong in zip(places, faults(made, min_distance=min_distance, max_atoms=max_atoms), strict=True):
        if wrong is not None:
            faulty.setdefault(place, Refused("purify-changed", f"the purified crystal is refused: {wrong}"))
    good = np.array([place not in faulty for place in places], dtype=bool)
    return Purified(
        made[torch.from_numpy(good)] if faulty else made,
        pure.places[good], pure.space_group[good], pure.shift[good], pure.strain[good], refused | faulty,
    )  # fmt: skip


def _search_others(
    crystals: Crystals, clear: Symmetric, symprec: float
) -> tuple[list[moyopy.MoyoDataset | None], dict[int, Refused]]:
    found: list[moyopy.MoyoDataset | None] = [None] * len(crystals)
    refused: dict[int, Refused] = {}
    for at in np.setdiff1d(np.arange(len(crystals)), clear.places).tolist():
        try:
            found[at] = search(crystals[at], symprec)
        except Refused as fault:
            refused[at] = fault
    return found, refused


def _by_moyo(
    given: Cells, found: Sequence[moyopy.MoyoDataset | None], symprec: float, primitive: bool
) -> tuple[Symmetric, dict[int, Refused]]:
    """What moyo made of the crystals it was asked for, and which of these are refused, by place."""
    places = [at for at, one in enumerate(found) if one is not None]
    sets = [one for one in found if one is not None]
    cells = Cells.joined([one.prim_std_cell for one in sets])
    at = np.array(places, dtype=np.int64)
    shift, strain, changed = _change(given[at], cells, sets, symprec)
    if not primitive:
        cells = Cells.joined([one.std_cell for one in sets])
    numbers = np.array([one.number for one in sets], dtype=np.int64)
    return Symmetric(at, cells, numbers, shift, strain), {places[k]: fault for k, fault in changed.items()}


def _change(
    given: Cells, pure: Cells, sets: Sequence[moyopy.MoyoDataset], symprec: float
) -> tuple[np.ndarray, np.ndarray, dict[int, Refused]]:
    """Farthest move of a site in Å (B,) and largest strain (B,), the given crystals being laid over the purified
    ones, and what is refused for it."""
    if not sets:
        return np.empty(0), np.empty(0), {}
    linear = np.array([one.prim_std_linear for one in sets]).reshape(-1, 3, 3)
    origin = np.array([one.prim_std_origin_shift for one in sets]).reshape(-1, 3)
    owner, starts = given.owner, given.starts
    mapping = np.array(list(itertools.chain.from_iterable(one.mapping_std_prim for one in sets)), dtype=np.int64)
    mapping += pure.starts[owner]
    copies = np.bincount(mapping, minlength=len(pure.numbers))
    same = np.minimum.reduceat(copies, pure.starts) == np.maximum.reduceat(copies, pure.starts)
    same &= np.logical_and.reduceat(pure.numbers[mapping] == given.numbers, starts)
    step = times(given.frac - origin[owner], np.linalg.inv(linear).mT, owner) - pure.frac[mapping]
    cart = times(step - np.rint(step), pure.lattice, owner)
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
