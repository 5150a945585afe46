"""Neighbours by radius beside those of pymatgen, ASE and vesin, on special, real and skewed crystals."""

import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import ase
import gemmi
import numpy as np
import pytest
import torch
import vesin
from ase.neighborlist import neighbor_list
from known_crystals import cell, crystal, random_cells, random_crystals, special
from pymatgen.core import Lattice, Structure

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import edge_distances, radius_edges

SPECIAL = special()
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
AT_CUTOFF = 1e-7  # Å; so near to the cut-off the last bits decide, and packages differ

Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # i, j, image, distance
Reference = Callable[[Crystals, float], Found]


def by_pymatgen(single: Crystals, cutoff: float) -> Found:
    numbers = single.atomic_numbers.tolist()
    structure = Structure(Lattice(single.lattice[0].numpy()), numbers, single.frac_coords.numpy())
    return structure.get_neighbor_list(cutoff, exclude_self=True)


def by_vesin(single: Crystals, cutoff: float) -> Found:
    search = vesin.NeighborList(cutoff=cutoff, full_list=True, n_threads=1)
    return search.compute(single.cart_coords.numpy(), single.lattice[0].numpy(), True, "ijSd")


def by_ase(single: Crystals, cutoff: float) -> Found:
    atoms = ase.Atoms(
        numbers=single.atomic_numbers.numpy(),
        scaled_positions=single.frac_coords.numpy(),
        cell=single.lattice[0].numpy(),
        pbc=True,
    )
    return neighbor_list("ijSd", atoms, cutoff)


def all_of(crystals: Crystals, cutoff: float, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Edges of a batch by a reference, one crystal after the other. -> (E, 5) i, j, image; (E,) Å."""
    rows, distances = [], []
    for b, first in enumerate(crystals.ptr[:-1].tolist()):
        i, j, image, distance = reference(crystals[b], cutoff)
        rows.append(np.column_stack([i + first, j + first, image]).astype(np.int64))
        distances.append(distance)
    return np.concatenate(rows), np.concatenate(distances)


def disagreement(crystals: Crystals, cutoff: float, reference: Reference) -> list[list[int]]:
    """Edges i, j, image that only we or only the reference have, save within AT_CUTOFF of the cut-off."""
    edges = radius_edges(crystals, cutoff)
    ours = torch.cat([edges.index.T, edges.image], 1)[edge_distances(crystals, edges) < cutoff - AT_CUTOFF]
    theirs, distance = all_of(crystals, cutoff, reference)
    theirs = theirs[distance < cutoff - AT_CUTOFF]
    theirs = theirs[np.lexsort(theirs.T[::-1])]
    if np.array_equal(ours.numpy(), theirs):
        return []
    return sorted(map(list, set(map(tuple, ours.tolist())) ^ set(map(tuple, theirs.tolist()))))


@pytest.mark.parametrize("reference", [by_pymatgen, by_vesin, by_ase])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_crystals(name: str, reference: Reference) -> None:
    for cutoff in (0.9, 3.0, 6.0, 12.0) if name != "sixty" else (3.0, 6.0):
        assert disagreement(SPECIAL[name], cutoff, reference) == []


def test_the_comparison_is_able_to_fail() -> None:
    def one_is_missing(single: Crystals, cutoff: float) -> Found:
        i, j, image, distance = by_vesin(single, cutoff)
        return i[1:], j[1:], image[1:], distance[1:]

    assert len(disagreement(SPECIAL["NaCl"], 6.0, one_is_missing)) == 1


def real_crystals(file: str, count: int, stride: int = 7) -> Crystals:
    """Every `stride`-th of the crystals of a table of CIFs."""
    path = DATA / file
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found: list[Crystals] = []
    with gzip.open(path, "rt") as table:
        for number, row in enumerate(csv.DictReader(table)):
            if number % stride == 0:
                found.append(from_cif(row["cif"]))
            if len(found) == count:
                break
    return Crystals.cat(found)


def from_cif(text: str) -> Crystals:
    small = gemmi.make_small_structure_from_block(gemmi.cif.read_string(text).sole_block())
    sites = [site.fract.tolist() for site in small.sites]
    return crystal(cell(*small.cell.parameters), sites, [site.element.atomic_number for site in small.sites])


@pytest.mark.slow
@pytest.mark.parametrize("cutoff", [3.0, 6.0, 12.0])
@pytest.mark.parametrize("file", ["mp20_bt.csv.gz", "lemat_mix.csv.gz"])
def test_real_crystals(file: str, cutoff: float) -> None:
    crystals = real_crystals(file, 250)
    for reference in (by_pymatgen, by_vesin):
        assert disagreement(crystals, cutoff, reference) == []


@pytest.mark.slow
@pytest.mark.parametrize("cutoff", [3.0, 6.0])
@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.bench)])
def test_skewed_cells(count: int, cutoff: float) -> None:
    crystals = random_crystals(random_cells(count, seed=20, skew=2, rounds=3), seed=21)
    assert disagreement(crystals, cutoff, by_pymatgen) == []
    some = crystals[: count // 20]
    assert disagreement(some, cutoff, by_vesin) == []  # vesin takes 20 ms for each of these
    found, batched = radius_edges(some, cutoff), radius_edges(some, cutoff, "torch")
    assert torch.equal(found.index, batched.index) and torch.equal(found.image, batched.image)
