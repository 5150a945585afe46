"""Round trips through pymatgen, ASE and PyG give the same crystals; what has no place in ours is refused."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ase import Atoms
from pymatgen.core import DummySpecies, Lattice, Structure
from torch_geometric.data import Batch

from hpcgen.crystal.convert import from_ase, from_pyg, from_pymatgen, to_ase, to_pyg, to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import Edges
from hpcgen.crystal.refused import Refused

sys.path.insert(0, str(Path(__file__).parent))
from known_crystals import special  # noqa: E402

ALL = Crystals.cat(list(special().values()))


def equal(ours: Crystals, theirs: Crystals, tolerance: float = 0.0) -> bool:
    return (
        torch.equal(ours.atomic_numbers, theirs.atomic_numbers)
        and torch.equal(ours.num_atoms, theirs.num_atoms)
        and bool(((ours.frac_coords - theirs.frac_coords).abs() <= tolerance).all())
        and bool(((ours.lattice - theirs.lattice).abs() <= tolerance).all())
    )


def test_pymatgen_and_back_is_exact() -> None:
    assert equal(from_pymatgen(to_pymatgen(ALL)), ALL)
    assert [len(structure) for structure in to_pymatgen(ALL)] == ALL.num_atoms.tolist()


def test_ase_and_back() -> None:
    assert equal(from_ase(to_ase(ALL)), ALL, 1e-12)
    assert not equal(from_ase(to_ase(ALL[[1, 0]])), ALL[[0, 1]], 1e-12)


def test_all_three_place_atoms_alike() -> None:
    for ours, structure, atoms in zip(range(len(ALL)), to_pymatgen(ALL), to_ase(ALL), strict=True):
        cart = ALL[ours].cart_coords
        assert torch.allclose(torch.tensor(structure.cart_coords), cart, atol=1e-10)
        assert torch.allclose(torch.tensor(atoms.positions), cart, atol=1e-10)


def test_single_precision_becomes_double_inside() -> None:
    back = from_pymatgen(to_pymatgen(ALL.to(dtype=torch.float32)))
    assert back.frac_coords.dtype == torch.float64
    assert equal(back, ALL, 1e-5)


def ring(crystals: Crystals) -> Edges:
    """Each atom and the next of its crystal, with an image that tells the atom; unsorted between crystals."""
    first, ends = crystals.ptr[:-1][crystals.batch], crystals.ptr[1:][crystals.batch]
    atoms = torch.arange(len(crystals.batch))
    following = torch.where(atoms + 1 < ends, atoms + 1, first)
    return Edges(torch.stack([atoms, following]), torch.stack([atoms, -atoms, atoms * 0 + 1], 1))


@pytest.mark.parametrize("batched", [False, True])
def test_pyg_and_back_is_exact_with_edges(batched: bool) -> None:
    edges = ring(ALL)
    data = to_pyg(ALL, edges)
    back, again = from_pyg(Batch.from_data_list(data) if batched else data)
    assert equal(back, ALL)
    assert again is not None
    assert torch.equal(again.index, edges.index)
    assert torch.equal(again.image, edges.image)


def test_pyg_messages_flow_from_neighbour_to_centre() -> None:
    data = to_pyg(ALL[0], Edges(torch.tensor([[2], [5]]), torch.zeros(1, 3, dtype=torch.int64)))[0]
    assert data.edge_index.tolist() == [[5], [2]]
    assert data.num_nodes == 8
    batch = Batch.from_data_list(to_pyg(ALL, ring(ALL)))
    assert torch.equal(batch.batch, ALL.batch)
    assert torch.equal(batch.edge_index.flip(0), ring(ALL).index)


def test_pyg_without_edges() -> None:
    back, edges = from_pyg(to_pyg(ALL)[0])
    assert equal(back, ALL[0])
    assert edges is None


CUBE = Lattice.cubic(4)


@pytest.mark.parametrize(
    ("structure", "code"),
    [
        (Structure(CUBE, [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]]), "disordered"),
        (Structure(CUBE, [{"Fe": 0.5}], [[0, 0, 0]]), "disordered"),
        (Structure(CUBE, [DummySpecies("X")], [[0, 0, 0]]), "unknown-element"),
        (Structure(Lattice(CUBE.matrix, pbc=(True, True, False)), ["Fe"], [[0, 0, 0]]), "not-periodic"),
        (Structure(CUBE, [], []), "no-atoms"),
    ],
)
def test_structures_that_are_refused(structure: Structure, code: str) -> None:
    with pytest.raises(Refused) as caught:
        from_pymatgen([structure])
    assert caught.value.code == code


def test_charges_and_isotopes_become_elements() -> None:
    structure = Structure(CUBE, ["Fe3+", "O2-", "D"], [[0, 0, 0], [0.5, 0.5, 0.5], [1.25, -0.25, 0]])
    crystal = from_pymatgen([structure])
    assert crystal.atomic_numbers.tolist() == [26, 8, 1]
    assert crystal.frac_coords[2].tolist() == [0.25, 0.75, 0]


@pytest.mark.parametrize(
    ("atoms", "code"),
    [
        (Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), "not-periodic"),
        (Atoms("H", [[0, 0, 0]], cell=[4, 4, 4], pbc=[True, True, False]), "not-periodic"),
        (Atoms("H", [[0, 0, 0]], cell=[4, 4, 0], pbc=True), "not-periodic"),
        (Atoms("X", [[0, 0, 0]], cell=[4, 4, 4], pbc=True), "unknown-element"),
        (Atoms(cell=[4, 4, 4], pbc=True), "no-atoms"),
    ],
)
def test_atoms_that_are_refused(atoms: Atoms, code: str) -> None:
    with pytest.raises(Refused) as caught:
        from_ase([atoms])
    assert caught.value.code == code


@pytest.mark.parametrize("convert", [from_pymatgen, from_ase, from_pyg])
def test_no_crystals_are_an_error(convert: Callable) -> None:
    with pytest.raises(ValueError, match="no crystals, want at least one"):
        convert([])
