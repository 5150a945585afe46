"""What cannot be a crystal is refused, exactly: all images, any cell, any number of atoms."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcgen.crystal.check import MIN_DISTANCE, check, faults, inverse, one_crystal
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused

sys.path.insert(0, str(Path(__file__).parent))
from known_crystals import cell, crystal, random_cells, special  # noqa: E402


def code(of: Crystals, **bounds) -> str | None:
    try:
        check(of, **bounds)
    except Refused as refused:
        return refused.code
    return None


def said(found: Refused | None) -> tuple[str, str] | None:
    return None if found is None else (found.code, found.message)


def alone(of: Crystals, **bounds) -> tuple[str, str] | None:
    try:
        check(of, **bounds)
    except Refused as refused:
        return said(refused)
    return None


def shortest(frac: np.ndarray, lattice: np.ndarray) -> float:
    """Brute force: the least distance of two atoms over 11³ images of a reduced cell."""
    import moyopy

    short = np.array(moyopy.minkowski_reduce(lattice.tolist())[0])
    frac = (frac @ lattice @ np.linalg.inv(short)) % 1.0
    images = np.array(list(itertools.product(range(-5, 6), repeat=3)))
    apart = np.linalg.norm((frac[:, None, None] - frac[None, :, None] + images) @ short, axis=-1)
    return float(apart[apart > 1e-12].min()) if len(frac) == 1 else _least(apart)


def _least(apart: np.ndarray) -> float:
    middle = apart.shape[2] // 2
    apart[np.arange(len(apart)), np.arange(len(apart)), middle] = np.inf
    return float(apart.min())


@pytest.mark.parametrize("name", list(special()))
def test_known_crystals_pass(name: str) -> None:
    assert code(special()[name]) is None or name == "sixty"  # sixty atoms at random may touch


NACL = special()["NaCl"]


@pytest.mark.parametrize(
    ("broken", "expected"),
    [
        (replace(NACL, frac_coords=NACL.frac_coords * math.nan), "not-finite"),
        (replace(NACL, lattice=NACL.lattice * math.inf), "not-finite"),
        (replace(NACL, lattice=NACL.lattice * 0), "bad-volume"),
        (replace(NACL, lattice=NACL.lattice * 0.3), "bad-volume"),
        (replace(NACL, lattice=NACL.lattice * 5), "bad-volume"),
        (replace(NACL, atomic_numbers=NACL.atomic_numbers * 0), "unknown-element"),
        (replace(NACL, atomic_numbers=NACL.atomic_numbers + 110), "unknown-element"),
        (replace(NACL, frac_coords=NACL.frac_coords * 0), "atoms-too-close"),
        (one_crystal(np.zeros((0, 3)), np.eye(3), np.zeros(0, dtype=np.int64)), "no-atoms"),
    ],
)
def test_each_fault_has_its_code(broken: Crystals, expected: str) -> None:
    assert code(broken) == expected


def test_a_batch_is_a_wrong_usage() -> None:
    with pytest.raises(ValueError, match="2 crystals, want one"):
        check(Crystals.cat([NACL, NACL]))


def test_atoms_are_counted() -> None:
    assert code(NACL, max_atoms=7) == "too-many-atoms"
    assert code(NACL, max_atoms=8) is None


def test_a_flat_cell_is_refused_and_a_left_handed_one_is_not() -> None:
    flat = torch.tensor([[[4.0, 0, 0], [0, 4, 0], [4, 4, 1e-9]]], dtype=torch.float64)
    assert code(replace(special()["one atom"], lattice=flat)) == "bad-volume"
    assert code(replace(NACL, lattice=NACL.lattice.flip(1))) is None


@pytest.mark.parametrize("distance", [0.499, 0.501])
def test_the_bound_is_sharp_across_every_face(distance: float) -> None:
    for direction in itertools.product((-1, 0, 1), repeat=3):
        if direction == (0, 0, 0):
            continue
        step = np.array(direction) / np.linalg.norm(direction) * distance
        near = crystal(cell(6, 7, 8, 80, 95, 103), [[0, 0, 0], [0, 0, 0]], [1, 1])
        near.frac_coords[1] = torch.from_numpy(step @ np.linalg.inv(near.lattice[0].numpy())) % 1.0
        assert code(near) == ("atoms-too-close" if distance < MIN_DISTANCE else None)


def test_own_images_count() -> None:
    thin = crystal(cell(0.45, 9, 9), [[0.2, 0.2, 0.2]], [1])
    assert code(thin) == "atoms-too-close"
    assert code(thin, min_distance=0.4) is None
    skewed = thin.lattice[0].clone()
    skewed[1] += 7 * skewed[0]
    assert code(replace(thin, lattice=skewed[None])) == "atoms-too-close"


def test_as_brute_force_in_cells_of_all_shapes() -> None:
    chance = np.random.default_rng(1)
    seen = set()
    for lattice in random_cells(150, seed=2).numpy():
        count = int(chance.integers(1, 6))
        frac = chance.random((count, 3)) * 3 - 1
        least = shortest(frac, lattice)
        radius = float(chance.choice([0.5, 1.5, 2.5]))
        found = code(one_crystal(frac, lattice, np.ones(count, dtype=np.int64)), min_distance=radius,
                     volume_per_atom=(0.0, 1e9))  # fmt: skip
        if abs(least - radius) > 1e-9:
            assert (found == "atoms-too-close") == (least < radius), (lattice, frac)
        seen.add(found)
    assert seen == {None, "atoms-too-close"}


@pytest.mark.parametrize("count", [7, 20])
def test_thousands_of_atoms_in_layers(count: int) -> None:
    grid = np.stack(np.meshgrid(*[np.arange(count) / count] * 3), -1).reshape(-1, 3)
    lattice, numbers = np.eye(3) * 2.5 * count, np.full(len(grid), 84)
    assert code(one_crystal(grid, lattice, numbers)) is None
    for other in (1, len(grid) // 2, len(grid) - 1):
        touching = grid.copy()
        touching[other] = touching[0] - [0, 0.4 / lattice[0, 0], 0]
        assert code(one_crystal(touching, lattice, numbers)) == "atoms-too-close"


def grid(count: int, apart: float = 2.5) -> Crystals:
    """count³ atoms on a simple cubic grid."""
    sites = np.stack(np.meshgrid(*[np.arange(count) / count] * 3), -1).reshape(-1, 3)
    return one_crystal(sites, np.eye(3) * apart * count, np.full(len(sites), 84))


def moved(of: Crystals, atom: int, to: list[float]) -> Crystals:
    frac = of.frac_coords.clone()
    frac[atom] = torch.tensor(to, dtype=frac.dtype)
    return replace(of, frac_coords=frac)


def good_and_bad() -> list[Crystals]:
    """Crystals for `faults`: each way to be bad, and cells of all shapes with atoms at random."""
    elements = NACL.atomic_numbers
    broken = [
        moved(NACL, 3, [0.1, math.nan, 0]),
        moved(NACL, 7, [math.inf, 0, 0]),
        moved(NACL, 7, [1e300, 0, 0]),
        replace(NACL, frac_coords=NACL.frac_coords * 1e308 * 2),
        replace(NACL, lattice=NACL.lattice * math.nan),
        replace(NACL, lattice=NACL.lattice * 1e200),
        replace(NACL, lattice=NACL.lattice * 0),
        replace(NACL, lattice=NACL.lattice[:, [0, 0, 2]]),
        replace(NACL, lattice=NACL.lattice * 0.3),
        replace(NACL, lattice=NACL.lattice * 5),
        *(replace(NACL, atomic_numbers=elements.where(torch.arange(8) != 5, number)) for number in (0, -1, 118, 119)),
        one_crystal(np.zeros((0, 3)), np.eye(3), np.zeros(0, dtype=np.int64)),
        moved(NACL, 7, [1e-3, 0, 0]),
        moved(NACL, 7, [0.999, 0.999, 0.999]),
        crystal(cell(0.45, 9, 9), [[0.2, 0.2, 0.2]], [1]),
        crystal(cell(0.9, 9, 9), [[0.2, 0.2, 0.2]], [1]),
        crystal(cell(0.9, 9, 9), [[0.2, 0.2, 0.2], [0.5, 0.2, 0.2]], [1, 1]),
        crystal(cell(1.1, 9, 9), [[0, 0.2, 0.2], [0.6, 0.2, 0.2]], [1, 1]),
        *(grid(count) for count in (6, 7, 8)),
        moved(grid(6), 100, [0, 1e-9, 1]),
        moved(grid(8), 400, [0, 0.01, 0]),
    ]
    chance = np.random.default_rng(11)
    cells = random_cells(120, seed=12).numpy()
    cells[60:] = random_cells(60, seed=13, rounds=0).numpy() + 4 * np.eye(3)
    at_random = [
        one_crystal(chance.random((count, 3)), cell, np.ones(count, dtype=np.int64))
        for count, cell in zip(chance.integers(1, 9, 120).tolist(), cells, strict=True)
    ]
    return [*special().values(), *broken, *at_random]


@pytest.mark.parametrize("most_pairs", [50_000, 100, 1])
@pytest.mark.parametrize(
    "bounds",
    [{}, {"min_distance": 1.5, "max_atoms": 300}, {"min_distance": 0.0, "min_volume": 30, "volume_per_atom": (3, 40)}],
)
def test_a_batch_is_told_what_each_crystal_alone_is_told(most_pairs: int, bounds: dict, monkeypatch) -> None:
    monkeypatch.setattr("hpcgen.crystal.check.MOST_PAIRS", most_pairs)
    crystals = good_and_bad()
    expected = [alone(each, **bounds) for each in crystals]
    assert None in expected
    assert len(set(expected)) > 15
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(crystals)).tolist()
        found = faults(Crystals.cat([crystals[k] for k in order]), **bounds)
        assert [said(each) for each in found] == [expected[k] for k in order]
    assert [said(faults(each, **bounds)[0]) for each in crystals] == expected


def test_good_crystals_of_a_batch_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    monkeypatch.setattr("hpcgen.crystal.check.check_arrays", lambda frac, *rest: looked_at.append(len(frac)))
    good = [NACL, special()["fcc"], special()["diamond"], special()["hcp"], special()["one atom"], grid(6)]
    assert faults(Crystals.cat([*good, moved(NACL, 7, [1e-3, 0, 0]), grid(7)])) == [None] * 8
    assert looked_at == [8, 343]


@pytest.mark.parametrize("distance", [0.499, 0.501])
def test_the_bound_of_a_batch_is_sharp_across_every_face(distance: float) -> None:
    near = []
    for direction in itertools.product((-1, 0, 1), repeat=3):
        if direction != (0, 0, 0):
            step = np.array(direction) / np.linalg.norm(direction) * distance
            pair = crystal(cell(6, 7, 8, 80, 95, 103), [[0, 0, 0], [0, 0, 0]], [1, 1])
            pair.frac_coords[1] = torch.from_numpy(step @ np.linalg.inv(pair.lattice[0].numpy())) % 1.0
            near.append(pair)
    found = faults(Crystals.cat(near))
    assert [said(each) for each in found] == [alone(each) for each in near]
    assert all((each is not None) == (distance < MIN_DISTANCE) for each in found)


def test_a_batch_in_single_precision_and_one_of_none() -> None:
    crystals = [each.to(dtype=torch.float32) for each in good_and_bad()]
    assert [said(each) for each in faults(Crystals.cat(crystals))] == [alone(each) for each in crystals]
    empty = NACL[[]]
    assert faults(empty) == []


def test_inverse_and_determinant() -> None:
    for lattice in random_cells(20, seed=3).numpy():
        inverted, volume = inverse(lattice)
        assert np.allclose(inverted, np.linalg.inv(lattice), rtol=1e-8)
        assert volume == pytest.approx(np.linalg.det(lattice))


def test_a_crystal_that_requires_gradient_is_checked() -> None:
    live = replace(NACL, frac_coords=NACL.frac_coords.clone().requires_grad_(), lattice=NACL.lattice * 1)
    live.lattice.requires_grad_()
    assert code(live) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_crystal_on_a_gpu_is_checked() -> None:
    assert code(NACL.to("cuda")) is None
    assert code(replace(NACL, frac_coords=NACL.frac_coords * 0).to("cuda")) == "atoms-too-close"
