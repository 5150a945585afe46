"""Space groups against spglib, the projection onto a symmetry, and what purifying may and may not change."""

import csv
import gzip
import logging
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import hpcgen.crystal.symmetry as symmetry_module
from hpcgen.crystal.cif import read_cif
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import in_niggli_cell
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.symmetry import find_symmetry, orbits, purify, site_permutations, symmetrised
from hpcgen.crystal.torus import shortest_step, wrap

sys.path.insert(0, str(Path(__file__).parent))
from known_crystals import cell, crystal, random_transforms, rotated, special, translated  # noqa: E402

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "mp20_bt.csv.gz"
GROUPS = {"NaCl": 225, "fcc": 225, "diamond": 227, "hcp": 194, "one atom": 221, "skewed": 1, "sixty": 1}
IN_CELL = {"NaCl": 192, "fcc": 48, "diamond": 192, "hcp": 24, "one atom": 48, "skewed": 1, "sixty": 1}
KNOWN = [name for name in GROUPS if name not in ("skewed", "sixty")]


def quartz(hand: int) -> Crystals:
    """α-quartz: P3221 (154) for hand 1, its mirror image P3121 (152) for hand -1."""
    x, y, z, u = 0.4133, 0.2672, 0.7855, 0.4697
    sites = [[u, 0, 2 / 3], [0, u, 1 / 3], [-u, -u, 0]]
    sites += [[x, y, z], [-y, x - y, z + 2 / 3], [y - x, -x, z + 1 / 3]]
    sites += [[y, x, -z], [x - y, -y, -z + 1 / 3], [-x, y - x, -z + 2 / 3]]
    sites = [[a, b, hand * c] for a, b, c in sites]
    return crystal(cell(4.9134, 4.9134, 5.4052, 90, 90, 120), sites, [14] * 3 + [8] * 6)


def shaken(of: Crystals, size: float, seed: int = 0, strain: float = 0.0) -> Crystals:
    """Sites moved by a normal step of `size` Å, the lattice strained."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(of.frac_coords.shape, generator=generator, dtype=torch.float64) * size
    frac = of.frac_coords + step @ torch.linalg.inv(of.lattice[0])
    warp = torch.eye(3, dtype=torch.float64) + strain * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return Crystals(wrap(frac), of.lattice @ warp, of.atomic_numbers, of.num_atoms)


def supercell(of: Crystals, transform: Tensor) -> Crystals:
    """One crystal in the cell transform @ lattice, transform (3, 3) integer."""
    structure = to_pymatgen(of)[0].make_supercell(transform.tolist(), in_place=False)
    numbers = [site.specie.Z for site in structure]
    return crystal(torch.tensor(structure.lattice.matrix.copy()), torch.tensor(structure.frac_coords), numbers)


def same_crystal(one: Crystals, other: Crystals) -> bool:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    matcher = StructureMatcher(ltol=1e-3, stol=1e-2, angle_tol=0.1, scale=False)
    return bool(matcher.fit(*to_pymatgen(Crystals.cat([one, other]))))


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


def replace_sites(of: Crystals, sites: list[list[float]]) -> Crystals:
    return Crystals(torch.tensor(sites, dtype=torch.float64), of.lattice, of.atomic_numbers, of.num_atoms)


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


@pytest.mark.parametrize("name", GROUPS)
def test_purify_keeps_the_crystal(name: str) -> None:
    known = special()[name]
    if name == "sixty":
        known = Crystals(known.frac_coords[:6], known.lattice, known.atomic_numbers[:6], torch.tensor([6]))
    pure = purify(known, min_distance=0.2)
    assert pure.space_group == find_symmetry(known).number
    assert same_crystal(known, pure.crystal)
    assert pure.max_shift < 1e-9
    assert pure.max_strain < 1e-9
    assert torch.linalg.det(pure.crystal.lattice) > 0
    assert (pure.crystal.atomic_numbers.diff() >= 0).all()


@pytest.mark.parametrize("name", ["NaCl", "diamond", "hcp", "skewed"])
def test_purify_forgets_the_choice_of_cell(name: str) -> None:
    known = special()[name]
    one = purify(known)
    size = len(one.crystal.frac_coords)
    transform = random_transforms(1, torch.Generator().manual_seed(3), skew=1)[0] * torch.tensor([[2], [1], [1]])
    for other in (
        translated(known, [0.31, 0.17, 0.73]),
        rotated(known, seed=1),
        supercell(known, transform),
        supercell(known, torch.diag(torch.tensor([1, 2, 2]))),
    ):
        pure = purify(other)
        assert (pure.space_group, len(pure.crystal.frac_coords)) == (one.space_group, size)
        metrics = [c.lattice[0] @ c.lattice[0].T for c in (one.crystal, pure.crystal)]
        assert torch.allclose(*metrics, atol=1e-6)
        assert same_crystal(one.crystal, pure.crystal)


def test_purify_makes_a_shaken_crystal_exact_and_says_how_far() -> None:
    rough = shaken(special()["NaCl"], 0.003, strain=0.0003)
    pure = purify(rough, symprec=0.05)
    assert pure.space_group == 225
    assert 0.001 < pure.max_shift < 0.02
    assert 1e-5 < pure.max_strain < 2e-3
    assert find_symmetry(pure.crystal, 1e-6).number == 225


def test_the_farthest_shift_is_that_of_the_one_moved_atom() -> None:
    moved = special()["NaCl"].frac_coords.clone()
    moved[5, 0] += 0.008 / 5.64
    pure = purify(replace_sites(special()["NaCl"], moved.tolist()), symprec=0.05)
    assert pure.space_group == 225
    assert pure.max_shift == pytest.approx(0.008, rel=0.3)  # the others give way a little


def test_conventional_cells() -> None:
    nacl = purify(special()["NaCl"], primitive=False)
    assert nacl.crystal.num_atoms == 8
    assert purify(special()["NaCl"]).crystal.num_atoms == 2
    assert torch.allclose(nacl.crystal.lattice[0], torch.eye(3, dtype=torch.float64) * 5.64)


@pytest.mark.parametrize("hand", [1, -1])
def test_left_and_right_quartz_stay_apart(hand: int) -> None:
    number = {1: 154, -1: 152}[hand]
    silica = quartz(hand)
    assert find_symmetry(silica).number == number
    left_handed_basis = Crystals(
        silica.frac_coords[:, [1, 0, 2]],
        silica.lattice[:, [1, 0, 2]],
        silica.atomic_numbers,
        silica.num_atoms,
    )
    assert torch.linalg.det(left_handed_basis.lattice) < 0
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)).Q
    turn = turn * torch.linalg.det(turn)  # a proper rotation
    turned = Crystals(silica.frac_coords, silica.lattice @ turn, silica.atomic_numbers, silica.num_atoms)
    for one in (silica, shaken(silica, 0.001), left_handed_basis, turned):
        for niggli in (True, False):
            pure = purify(one, niggli=niggli)
            assert pure.space_group == number
            assert find_symmetry(pure.crystal).number == number
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    mirrored = Crystals(silica.frac_coords, silica.lattice @ mirror, silica.atomic_numbers, silica.num_atoms)
    assert purify(mirrored).space_group == {154: 152, 152: 154}[number]


@pytest.mark.parametrize("name", [*GROUPS])
def test_the_niggli_cell_is_the_batched_one(name: str) -> None:
    known = special()[name]
    both = purify(known, min_distance=0.01), purify(known, min_distance=0.01, niggli=False)
    metrics = [c.lattice[0] @ c.lattice[0].T for c in (both[0].crystal, in_niggli_cell(both[1].crystal))]
    assert torch.allclose(*metrics, atol=1e-8)
    theirs = to_pymatgen(known)[0].get_primitive_structure().lattice.get_niggli_reduced_lattice()
    ours = to_pymatgen(both[0].crystal)[0].lattice
    assert np.allclose(ours.parameters, theirs.parameters, atol=1e-5)


def test_purify_is_deterministic() -> None:
    rough = shaken(quartz(1), 0.002)
    one, other = purify(rough), purify(rough)
    assert torch.equal(one.crystal.frac_coords, other.crystal.frac_coords)
    assert torch.equal(one.crystal.atomic_numbers, other.crystal.atomic_numbers)


def refusal(monkeypatch: pytest.MonkeyPatch, name: str, value: float, of: Crystals) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(symmetry_module, name, value)
        with pytest.raises(Refused) as caught:
            purify(of, symprec=0.05)
    return caught.value.code


def test_too_large_a_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rough = shaken(special()["NaCl"], 0.003, strain=0.001)
    purify(rough, symprec=0.05)
    for name in ("MOST_SHIFT", "MOST_STRAIN", "MOST_VOLUME_CHANGE"):
        assert refusal(monkeypatch, name, 1e-12, rough) == "purify-changed"


def test_a_purified_crystal_that_check_refuses() -> None:
    with pytest.raises(Refused) as caught:
        purify(special()["NaCl"], min_distance=3.0)
    assert caught.value.code == "purify-changed"


def test_no_symmetry_found() -> None:
    collapsed = crystal(cell(4, 4, 4), [[0.5, 0.5, 0.5]] * 3, [3] * 3)
    with pytest.raises(Refused) as caught:
        purify(collapsed)
    assert caught.value.code == "purify-failed"
    with pytest.raises(Refused) as caught:
        find_symmetry(collapsed)
    assert caught.value.code == "no-symmetry"


def test_only_moyos_warnings_of_omitted_operations_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    long = supercell(special()["NaCl"], torch.diag(torch.tensor([1, 1, 2])))
    with caplog.at_level(logging.WARNING):
        found = find_symmetry(long)
        logging.getLogger("moyo").warning("Omitted, but said outside of a search")
    assert len(found) < 2 * 192
    assert [record.getMessage() for record in caplog.records] == ["Omitted, but said outside of a search"]
    assert not logging.getLogger("moyo").filters


def test_volume_per_atom_is_kept() -> None:
    for name in KNOWN:
        known, pure = special()[name], purify(special()[name]).crystal
        ratio = (known.volume / known.num_atoms) / (pure.volume / pure.num_atoms)
        assert math.isclose(ratio.item(), 1.0, rel_tol=1e-9)


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_gradients_and_gpus_are_left_behind(device: str) -> None:
    salt = special()["NaCl"].to(device)
    frac, lattice = salt.frac_coords.clone().requires_grad_(), salt.lattice.clone().requires_grad_()
    live = replace(salt, frac_coords=frac, lattice=lattice)
    pure = purify(live)
    assert find_symmetry(live).number == pure.space_group == 225
    assert pure.crystal.lattice.device.type == "cpu" and not pure.crystal.lattice.requires_grad
