"""Symmetry found many crystals at a time against moyo's, one by one."""

import csv
import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcgen.crystal.cells import Cells
from hpcgen.crystal.cif import read_cif
from hpcgen.crystal.clear import Symmetric, clear_symmetry
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import in_niggli_cell
from hpcgen.crystal.purify import purify, search
from hpcgen.crystal.symmetry import find_symmetry

sys.path.insert(0, str(Path(__file__).parent))
from known_crystals import (  # noqa: E402
    cell,
    crystal,
    in_other_cell,
    many_shaken,
    quartz,
    random_transforms,
    rotated,
    shaken,
    special,
    supercell,
    translated,
)

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
csv.field_size_limit(sys.maxsize)


def seen(crystals: Crystals, symprec: float = 0.01) -> Symmetric:
    return clear_symmetry(Cells.of(crystals), symprec)


def same(ones: Crystals, others: Crystals) -> bool:
    """Whether all of them match, one by one, by pymatgen's StructureMatcher at narrow tolerances."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    matcher = StructureMatcher(ltol=0.01, stol=0.01, angle_tol=0.5, scale=False, primitive_cell=False)
    return all(matcher.fit(*pair) for pair in zip(to_pymatgen(ones), to_pymatgen(others), strict=True))


def known() -> list[Crystals]:
    """Primitive crystals of many space groups."""
    fcc = cell(3.0, 3.0, 3.0, 60, 60, 60)
    return [
        crystal(fcc, [[0, 0, 0], [0.5, 0.5, 0.5]], [11, 17]),  # 225
        crystal(fcc, [[0, 0, 0], [0.25, 0.25, 0.25]], [14, 14]),  # 227
        crystal(fcc, [[0, 0, 0], [0.25, 0.25, 0.25]], [30, 16]),  # 216
        special()["fcc"],
        special()["hcp"],  # 194
        special()["one atom"],  # 221
        special()["skewed"],  # 1
        crystal(cell(3.0, 9.0, 14.0, 80, 65, 75), [[0.1, 0.2, 0.3], [0.9, 0.8, 0.7]], [3, 3]),  # 2
        quartz(1),  # 154
        quartz(-1),  # 152
        crystal(cell(4.59, 4.59, 2.96), [[0, 0, 0], [0.5, 0.5, 0.5], [0.305, 0.305, 0], [0.695, 0.695, 0],
                                         [0.195, 0.805, 0.5], [0.805, 0.195, 0.5]], [22] * 2 + [8] * 4),  # 136
        crystal(cell(4.0, 4.0, 4.0), [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.02]], [56, 22, 8]),  # 99
    ]  # fmt: skip


def test_the_space_group_is_moyos_in_every_description() -> None:
    for number, one in enumerate(known()):
        transform = random_transforms(1, torch.Generator().manual_seed(number), skew=2)
        others = [one, translated(one, [0.31, 0.17, 0.73]), rotated(one, number), shaken(one, 1e-4, number)]
        others.append(in_other_cell(one, transform))
        found = seen(Crystals.cat(others))
        assert found.places.tolist() == list(range(len(others))), number
        assert found.space_group.tolist() == [search(other).number for other in others], number
    assert seen(Crystals.cat([quartz(1), quartz(-1)])).space_group.tolist() == [154, 152]


def test_the_symmetry_is_exact_and_the_crystal_the_same() -> None:
    rough = Crystals.cat([shaken(one, 5e-4, seed, strain=2e-5) for seed, one in enumerate(known())])
    found = seen(rough, 0.02)
    assert len(found.places) > 0.7 * len(rough)
    made = in_niggli_cell(found.cells.crystals())
    assert [find_symmetry(made[at], 1e-6).number for at in range(len(made))] == found.space_group.tolist()
    assert same(made, rough[found.places.tolist()])
    assert 1e-4 < found.shift.max() < 0.01
    assert 1e-6 < found.strain.max() < 1e-3
    nothing = seen(found.cells.crystals())
    assert len(nothing.places) == len(made)
    assert nothing.shift.max() < 1e-9
    assert nothing.strain.max() < 1e-9


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_what_the_tolerance_could_decide_is_left_to_moyo(size: float) -> None:
    """Sites moved by about symprec: what is called clear must be what moyo finds, and most is not."""
    symprec = 0.03
    rough = Crystals.cat([quartz(1), *known()[:3], *known()[-2:]] * 20)
    rough = many_shaken(rough, torch.full((len(rough),), size * symprec / 3, dtype=torch.float64))
    found = seen(rough, symprec)
    assert len(found.places) < 0.6 * len(rough)
    for place, number in zip(found.places.tolist(), found.space_group.tolist(), strict=True):
        assert search(rough[place], symprec).number == number


def test_cells_that_are_not_primitive_and_atoms_in_one_place_are_not_clear() -> None:
    salt = special()["NaCl"]
    collapsed = crystal(cell(4, 4, 4), [[0.5, 0.5, 0.5]] * 3, [3] * 3)
    twice = supercell(quartz(1), (1, 1, 2))
    assert seen(Crystals.cat([salt, special()["diamond"], collapsed, twice, quartz(1)])).places.tolist() == [4]


def test_extreme_and_broken_cells_are_not_clear_and_harm_no_other() -> None:
    flat = crystal(torch.diag(torch.tensor([1e20, 1e-20, 4.0], dtype=torch.float64)), [[0.1, 0.2, 0.3]], [29])
    sheared = crystal(torch.tensor([[4.0, 0, 0], [4e5, 4, 0], [4e5, 4e5, 4]]).double(), [[0.1, 0.2, 0.3]], [29])
    void = crystal(torch.full((3, 3), torch.nan, dtype=torch.float64), [[0.1, 0.2, 0.3]], [29])
    many = crystal(cell(20, 20, 20), torch.rand(150, 3, generator=torch.Generator().manual_seed(1)), [29] * 150)
    found = seen(Crystals.cat([flat, quartz(1), void, many, sheared, quartz(-1)]))
    assert {1, 5} <= set(found.places.tolist()) <= {0, 1, 4, 5}
    assert found.space_group[found.places == 1] == 154 and found.space_group[found.places == 5] == 152
    assert len(seen(quartz(1)[[]]).places) == 0


def test_a_crystal_does_not_depend_on_its_batch() -> None:
    crystals = Crystals.cat([shaken(one, 1e-4, seed) for seed, one in enumerate(known())])
    together = seen(crystals)
    for at, place in enumerate(together.places.tolist()):
        alone = seen(crystals[place])
        one = together.cells[np.array([at])]
        assert np.array_equal(one.frac, alone.cells.frac)
        assert np.array_equal(one.lattice, alone.cells.lattice)
        assert together.shift[at] == alone.shift[0] and together.strain[at] == alone.strain[0]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("mp20_bt", 0.85), ("mpts52", 0.85), ("perov_5", 0.3), ("carbon_24", 0.1)])
def test_real_crystals_have_moyos_space_group_and_structure(name: str, least: float) -> None:
    file = DATA / f"{name}.csv.gz"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    with gzip.open(file, "rt") as opened:
        rows = list(csv.DictReader(opened))
    crystals = Crystals.cat([read_cif(row["cif"])[0] for row in rows[:: len(rows) // 250]])
    found = seen(crystals)
    assert len(found.places) > least * len(crystals)
    places = found.places.tolist()
    sets = [search(crystals[place]) for place in places]
    assert found.space_group.tolist() == [one.number for one in sets]
    ours, theirs = purify(crystals), purify(crystals, found=_all_by_moyo(crystals), clear=seen(crystals[[]]))
    assert ours.kept.tolist() == theirs.kept.tolist()
    assert torch.allclose(_metric(ours.crystals), _metric(theirs.crystals), atol=2e-3)
    assert same(ours.crystals, theirs.crystals)


def _all_by_moyo(crystals: Crystals) -> list:
    return [search(crystals[at]) for at in range(len(crystals))]


def _metric(crystals: Crystals) -> torch.Tensor:
    """Lengths of the cells' vectors, Å."""
    return crystals.lattice.norm(dim=-1)
