"""What purifying may and may not change, one crystal at a time and many at once."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hpcgen.crystal.purify as purify_module
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import in_niggli_cell
from hpcgen.crystal.purify import purify
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.symmetry import find_symmetry

sys.path.insert(0, str(Path(__file__).parent))
from known_crystals import (  # noqa: E402
    cell,
    crystal,
    in_larger_cell,
    quartz,
    random_transforms,
    replace_sites,
    rotated,
    shaken,
    special,
    translated,
)

GROUPS = ("NaCl", "fcc", "diamond", "hcp", "one atom", "skewed", "sixty")


def pure_one(of: Crystals, **how) -> SimpleNamespace:
    """The only crystal of a batch of one, or its refusal raised."""
    pure = purify(of, **how)
    for refused in pure.refused.values():
        raise refused
    return SimpleNamespace(
        crystal=pure.crystals,
        space_group=int(pure.space_group[0]),
        max_shift=float(pure.max_shift[0]),
        max_strain=float(pure.max_strain[0]),
    )


def same_crystal(one: Crystals, other: Crystals) -> bool:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    matcher = StructureMatcher(ltol=1e-3, stol=1e-2, angle_tol=0.1, scale=False)
    return bool(matcher.fit(*to_pymatgen(Crystals.cat([one, other]))))


@pytest.mark.parametrize("name", GROUPS)
def test_purify_keeps_the_crystal(name: str) -> None:
    known = special()[name]
    if name == "sixty":
        known = Crystals(known.frac_coords[:6], known.lattice, known.atomic_numbers[:6], torch.tensor([6]))
    pure = pure_one(known, min_distance=0.2)
    assert pure.space_group == find_symmetry(known).number
    assert same_crystal(known, pure.crystal)
    assert pure.max_shift < 1e-9
    assert pure.max_strain < 1e-9
    assert torch.linalg.det(pure.crystal.lattice) > 0
    assert (pure.crystal.atomic_numbers.diff() >= 0).all()


@pytest.mark.parametrize("name", ["NaCl", "diamond", "hcp", "skewed"])
def test_purify_forgets_the_choice_of_cell(name: str) -> None:
    known = special()[name]
    one = pure_one(known)
    size = len(one.crystal.frac_coords)
    transform = random_transforms(1, torch.Generator().manual_seed(3), skew=1)[0] * torch.tensor([[2], [1], [1]])
    for other in (
        translated(known, [0.31, 0.17, 0.73]),
        rotated(known, seed=1),
        in_larger_cell(known, transform),
        in_larger_cell(known, torch.diag(torch.tensor([1, 2, 2]))),
    ):
        pure = pure_one(other)
        assert (pure.space_group, len(pure.crystal.frac_coords)) == (one.space_group, size)
        metrics = [c.lattice[0] @ c.lattice[0].T for c in (one.crystal, pure.crystal)]
        assert torch.allclose(*metrics, atol=1e-6)
        assert same_crystal(one.crystal, pure.crystal)


def test_purify_makes_a_shaken_crystal_exact_and_says_how_far() -> None:
    rough = shaken(special()["NaCl"], 0.003, strain=0.0003)
    pure = pure_one(rough, symprec=0.05)
    assert pure.space_group == 225
    assert 0.001 < pure.max_shift < 0.02
    assert 1e-5 < pure.max_strain < 2e-3
    assert find_symmetry(pure.crystal, 1e-6).number == 225


def test_the_farthest_shift_is_that_of_the_one_moved_atom() -> None:
    moved = special()["NaCl"].frac_coords.clone()
    moved[5, 0] += 0.008 / 5.64
    pure = pure_one(replace_sites(special()["NaCl"], moved.tolist()), symprec=0.05)
    assert pure.space_group == 225
    assert pure.max_shift == pytest.approx(0.008, rel=0.3)  # the others give way a little


def test_conventional_cells() -> None:
    nacl = pure_one(special()["NaCl"], primitive=False)
    assert nacl.crystal.num_atoms == 8
    assert pure_one(special()["NaCl"]).crystal.num_atoms == 2
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
            pure = pure_one(one, niggli=niggli)
            assert pure.space_group == number
            assert find_symmetry(pure.crystal).number == number
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    mirrored = Crystals(silica.frac_coords, silica.lattice @ mirror, silica.atomic_numbers, silica.num_atoms)
    assert pure_one(mirrored).space_group == {154: 152, 152: 154}[number]


@pytest.mark.parametrize("name", [*GROUPS])
def test_the_niggli_cell_is_the_batched_one(name: str) -> None:
    known = special()[name]
    both = pure_one(known, min_distance=0.01), pure_one(known, min_distance=0.01, niggli=False)
    metrics = [c.lattice[0] @ c.lattice[0].T for c in (both[0].crystal, in_niggli_cell(both[1].crystal))]
    assert torch.allclose(*metrics, atol=1e-8)
    theirs = to_pymatgen(known)[0].get_primitive_structure().lattice.get_niggli_reduced_lattice()
    ours = to_pymatgen(both[0].crystal)[0].lattice
    assert np.allclose(ours.parameters, theirs.parameters, atol=1e-5)


def test_purify_is_deterministic() -> None:
    rough = shaken(quartz(1), 0.002)
    one, other = pure_one(rough), pure_one(rough)
    assert torch.equal(one.crystal.frac_coords, other.crystal.frac_coords)
    assert torch.equal(one.crystal.atomic_numbers, other.crystal.atomic_numbers)


def refusal(monkeypatch: pytest.MonkeyPatch, name: str, value: float, of: Crystals) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(purify_module, name, value)
        with pytest.raises(Refused) as caught:
            pure_one(of, symprec=0.05)
    return caught.value.code


def test_too_large_a_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rough = shaken(special()["NaCl"], 0.003, strain=0.001)
    pure_one(rough, symprec=0.05)
    for name in ("MOST_SHIFT", "MOST_STRAIN", "MOST_VOLUME_CHANGE"):
        assert refusal(monkeypatch, name, 1e-12, rough) == "purify-changed"


def test_a_purified_crystal_that_check_refuses() -> None:
    with pytest.raises(Refused) as caught:
        pure_one(special()["NaCl"], min_distance=3.0)
    assert caught.value.code == "purify-changed"


def test_no_symmetry_found() -> None:
    collapsed = crystal(cell(4, 4, 4), [[0.5, 0.5, 0.5]] * 3, [3] * 3)
    with pytest.raises(Refused) as caught:
        pure_one(collapsed)
    assert caught.value.code == "purify-failed"
    with pytest.raises(Refused) as caught:
        find_symmetry(collapsed)
    assert caught.value.code == "no-symmetry"


def test_volume_per_atom_is_kept() -> None:
    for name in ("NaCl", "fcc", "diamond", "hcp", "one atom"):
        known, pure = special()[name], pure_one(special()[name]).crystal
        ratio = (known.volume / known.num_atoms) / (pure.volume / pure.num_atoms)
        assert math.isclose(ratio.item(), 1.0, rel_tol=1e-9)


CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_gradients_and_gpus_are_left_behind(device: str) -> None:
    salt = special()["NaCl"].to(device)
    frac, lattice = salt.frac_coords.clone().requires_grad_(), salt.lattice.clone().requires_grad_()
    live = replace(salt, frac_coords=frac, lattice=lattice)
    pure = pure_one(live)
    assert find_symmetry(live).number == pure.space_group == 225
    assert pure.crystal.lattice.device.type == "cpu" and not pure.crystal.lattice.requires_grad


def batch_of_all() -> Crystals:
    """Good and bad crystals of every kind."""
    collapsed = crystal(cell(4, 4, 4), [[0.5, 0.5, 0.5]] * 3, [3] * 3)
    crowded = crystal(cell(3, 3, 3), [[0, 0, 0], [0.1, 0, 0]], [3, 9])
    good = [special()[name] for name in GROUPS if name != "sixty"]
    rough = [shaken(quartz(hand), 0.002, seed) for seed, hand in enumerate((1, -1))]
    large = in_larger_cell(special()["NaCl"], torch.diag(torch.tensor([2, 1, 1])))
    return Crystals.cat([collapsed, *good, crowded, *rough, collapsed, large])


@pytest.mark.parametrize("how", [{}, {"niggli": False}, {"primitive": False}])
def test_a_crystal_does_not_depend_on_its_batch(how: dict) -> None:
    """To the last bit, refusals included."""
    crystals = batch_of_all()
    together = purify(crystals, **how)
    assert set(together.refused) == {0, 7, 10}
    assert sorted([*together.kept.tolist(), *together.refused]) == list(range(len(crystals)))
    for at in range(len(crystals)):
        alone = purify(crystals[at], **how)
        if at in together.refused:
            assert vars(alone.refused[0]) == vars(together.refused[at])
            continue
        place = together.kept.tolist().index(at)
        one = together.crystals[place]
        assert torch.equal(one.frac_coords, alone.crystals.frac_coords)
        assert torch.equal(one.lattice, alone.crystals.lattice)
        assert torch.equal(one.atomic_numbers, alone.crystals.atomic_numbers)
        for name in ("space_group", "max_shift", "max_strain"):
            assert getattr(together, name)[place] == getattr(alone, name)[0]


def test_a_panic_inside_moyo_is_a_refusal() -> None:
    sheared = crystal(torch.tensor([[4.0, 0, 0], [4e5, 4, 0], [4e5, 4e5, 4]]).double(), [[0.1, 0.2, 0.3]], [29])
    assert [refused.code for refused in purify(sheared).refused.values()] == ["purify-failed"]


def test_no_crystals() -> None:
    none = purify(special()["NaCl"][[]])
    assert len(none.crystals) == len(none.kept) == 0 and not none.refused
