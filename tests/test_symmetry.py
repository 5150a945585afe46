"""Space groups against spglib, and the projection onto a symmetry."""

import csv
import gzip
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hpcgen.crystal.cif import read_cif
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.symmetry import find_symmetry, orbits, site_permutations, symmetrised
from hpcgen.crystal.torus import shortest_step

sys.path.insert(0, str(Path(__file__).parent))
from known_crystals import in_larger_cell, quartz, replace_sites, shaken, special  # noqa: E402

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "mp20_bt.csv.gz"
GROUPS = {"NaCl": 225, "fcc": 225, "diamond": 227, "hcp": 194, "one atom": 221, "skewed": 1, "sixty": 1}
IN_CELL = {"NaCl": 192, "fcc": 48, "diamond": 192, "hcp": 24, "one atom": 48, "skewed": 1, "sixty": 1}
KNOWN = [name for name in GROUPS if name not in ("skewed", "sixty")]


@pytest.mark.parametrize("name", GROUPS)
def test_known_space_groups(name: str) -> None:
    found = find_symmetry(special()[name])
    assert (found.number, len(found)) == (GROUPS[name], IN_CELL[name])
    assert found.rotations.dtype == torch.int64
    assert 1 <= found.hall_number <= 530


@pytest.mark.parametrize("name", KNOWN)
def test_operations_take_the_crystal_to_itself(name: str) -> None:
    known = special()[name]
    found = find_symmetry(known)
    moved = site_permutations(known, found)
    images = found.apply(known.frac_coords)
    assert shortest_step(images, known.frac_coords[moved]).abs().max() < 1e-9
    assert (known.atomic_numbers[moved] == known.atomic_numbers).all()
    rotated_metric = found.rotations.double().mT @ (known.lattice @ known.lattice.mT) @ found.rotations.double()
    assert torch.allclose(rotated_metric, known.lattice @ known.lattice.mT)


@pytest.mark.parametrize("name", KNOWN)
def test_the_laws_of_operations_are_able_to_fail(name: str) -> None:
    known = special()[name]
    found = find_symmetry(known)
    moved = site_permutations(known, found)
    off = replace(found, translations=found.translations + torch.linspace(0, 0.05, len(found))[:, None])
    assert shortest_step(off.apply(known.frac_coords), known.frac_coords[moved]).abs().max() > 1e-3
    unturned = replace(found, rotations=torch.eye(3, dtype=torch.int64).expand(len(found), 3, 3))
    rough = shaken(known, 0.02, strain=0.004)
    assert find_symmetry(symmetrised(rough, unturned, moved).crystal, 1e-4).number != found.number


def test_orbits() -> None:
    nacl = special()["NaCl"]
    assert orbits(site_permutations(nacl, find_symmetry(nacl))).tolist() == [0] * 4 + [4] * 4
    silica = quartz(1)
    assert orbits(site_permutations(silica, find_symmetry(silica))).tolist() == [0] * 3 + [3] * 6
    sixty = special()["sixty"]
    assert orbits(site_permutations(sixty, find_symmetry(sixty))).tolist() == list(range(60))


def test_permutations_of_a_crystal_without_the_symmetry_are_refused() -> None:
    wrong = replace_sites(special()["NaCl"], [[0.02 * n, 0.0, 0.0] for n in range(8)])
    with pytest.raises(Refused, match="not-symmetric"):
        site_permutations(wrong, find_symmetry(special()["NaCl"]))


def test_agrees_with_spglib_on_real_crystals() -> None:
    import spglib

    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    with gzip.open(DATA, "rt") as opened:
        texts = [row["cif"] for _, row in zip(range(4000), csv.DictReader(opened), strict=False)][::20]
    agreed = 0
    for text in texts:
        (one,) = read_cif(text)
        plain = one.lattice[0].numpy(), one.frac_coords.numpy(), one.atomic_numbers.numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agreed += spglib.get_symmetry_dataset(plain, symprec=0.01).number == find_symmetry(one, 0.01).number
    assert agreed >= 0.99 * len(texts)


@pytest.mark.parametrize("name", KNOWN)
def test_a_symmetric_crystal_is_its_own_projection(name: str) -> None:
    known = special()[name]
    found = find_symmetry(known)
    projected = symmetrised(known, found, site_permutations(known, found))
    assert projected.site_shift.max() < 1e-9
    assert projected.strain.abs().max() < 1e-12
    assert torch.allclose(projected.crystal.lattice, known.lattice)


@pytest.mark.parametrize("name", KNOWN)
def test_the_projection_of_a_shaken_crystal_is_symmetric_and_near(name: str) -> None:
    known = special()[name]
    group = find_symmetry(known)
    rough = shaken(known, 0.02, strain=0.004)
    moved = site_permutations(rough, group)
    projected = symmetrised(rough, group, moved)
    fine = projected.crystal
    assert shortest_step(group.apply(fine.frac_coords), fine.frac_coords[moved]).abs().max() < 1e-12
    metric, rotations = fine.lattice[0] @ fine.lattice[0].T, group.rotations.double()
    assert torch.allclose(rotations.mT @ metric @ rotations, metric, rtol=0, atol=1e-11)
    assert projected.site_shift.max() < 0.15
    assert 1e-5 < projected.strain.abs().max() < 0.03
    again = symmetrised(fine, group, moved)
    assert again.site_shift.max() < 1e-12
    assert find_symmetry(fine, 1e-4).number == group.number


def test_the_projection_is_differentiable_at_the_symmetric_point() -> None:
    known = special()["hcp"]
    group = find_symmetry(known)
    moved = site_permutations(known, group)

    def through(frac: Tensor, lattice: Tensor) -> tuple[Tensor, Tensor]:
        fine = symmetrised(Crystals(frac, lattice, known.atomic_numbers, known.num_atoms), group, moved).crystal
        return fine.frac_coords, fine.lattice

    inputs = known.frac_coords.clone().requires_grad_(), known.lattice.clone().requires_grad_()
    assert torch.autograd.gradcheck(through, inputs, atol=1e-6)


def test_only_moyos_warnings_of_omitted_operations_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    long = in_larger_cell(special()["NaCl"], torch.diag(torch.tensor([1, 1, 2])))
    with caplog.at_level(logging.WARNING):
        found = find_symmetry(long)
        logging.getLogger("moyo").warning("Omitted, but said outside of a search")
    assert len(found) < 2 * 192
    assert [record.getMessage() for record in caplog.records] == ["Omitted, but said outside of a search"]
    assert not logging.getLogger("moyo").filters
