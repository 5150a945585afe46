"""Metrics against the peers' own definitions, spelled out here, and against pymatgen."""

import csv
import gzip
import itertools
import random
from pathlib import Path

import numpy as np
import peers
import pytest
import torch
from known_crystals import (
    cell,
    crystal,
    in_other_cell,
    random_cells,
    random_crystals,
    relabelled,
    rotated,
    shaken,
    special,
)

from hpcgen.crystal.cif import read_cif
from hpcgen.crystal.composition import ATOMIC_NUMBERS, SYMBOLS, parse_formula
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics import charge_balance
from hpcgen.metrics.charge_balance import charge_balanced
from hpcgen.metrics.match import Comparison
from hpcgen.metrics.validity import random_coordinates, validity

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "mp20_bt.csv.gz"


def real(count: int) -> Crystals:
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    with gzip.open(DATA, "rt", newline="") as file:
        rows = itertools.islice(csv.DictReader(file), 0, None, 7000 // count)
        return Crystals.cat([read_cif(row["cif"])[0] for row in itertools.islice(rows, count)])


def numbers(formula: str) -> list[int]:
    return [ATOMIC_NUMBERS[symbol] for symbol, count in parse_formula(formula).items() for _ in range(count)]


# ---- composition -------------------------------------------------------------------------------------------


def by_cdvae(atoms: list[int]) -> bool:
    """smact_validity of CDVAE's eval_utils.py with pauling_test of SMACT 2.2.1, every combination tried."""
    found, counts = np.unique(atoms, return_counts=True)
    rows = [charge_balance._table()[z] for z in found.tolist()]
    if len(found) == 1 or all(metal for _, _, metal in rows):
        return True
    strengths = [strength for _, strength, _ in rows]
    for states in itertools.product(*(row[0] for row in rows)):
        if np.dot(states, counts):
            continue
        try:
            passed = eneg_states_test(states, strengths)
        except TypeError:
            passed = True
        if passed:
            return True
    return False


def eneg_states_test(ox_states: tuple[int, ...], enegs: list[float | None]) -> bool:
    for (ox1, eneg1), (ox2, eneg2) in itertools.combinations(list(zip(ox_states, enegs, strict=True)), 2):
        if (ox1 > 0) and (ox2 < 0) and (eneg1 >= eneg2):  # type: ignore[operator]
            return False
        if (ox1 < 0) and (ox2 > 0) and (eneg1 <= eneg2):  # type: ignore[operator]
            return False
        if eneg1 is None or eneg2 is None:
            return False
    return True


@pytest.mark.parametrize(
    ("formula", "valid"),
    [("NaCl", True), ("NaCl2", False), ("C", True), ("O", True), ("CuZn", True), ("Fe3O4", False), ("LiFePO4", True),
     ("Li9P3S12", True), ("ArO", False), ("NaO", True), ("FeRf", False), ("OPm", True)],
)  # fmt: skip
def test_known_compositions(formula: str, valid: bool) -> None:
    assert charge_balanced(numbers(formula)) == valid
    assert charge_balanced(torch.tensor(numbers(formula) * 3)) == valid  # of the reduced composition


def test_composition_is_cdvaes_verdict() -> None:
    chance, verdicts = random.Random(1), []
    for trial in range(1500):
        elements = chance.sample(range(1, 104), chance.choice([2, 2, 3, 3, 4]))
        if trial % 3 == 0:
            elements[0] = chance.choice([61, 86, 103])  # without electronegativity
        atoms = [z for z in set(elements) for _ in range(chance.randint(1, 4))]
        verdicts.append(charge_balanced(atoms))
        assert verdicts[-1] == by_cdvae(atoms), [SYMBOLS[z] for z in atoms]
    assert 0.1 < np.mean(verdicts) < 0.9


def test_real_compositions_have_smacts_verdict() -> None:
    """SMACT 2.2.1 itself, called as CDVAE calls it, composition by composition; `by_cdvae` is no other rule."""
    pytest.importorskip("smact", reason="smact is not installed")
    some = real(250)
    parts = [part.tolist() for part in some.atomic_numbers.split(some.num_atoms.tolist())]
    promethium = ["Na2PmC2O6", "Pm8Te4As3P", "Pm2Co5Si4", "Pm3Ho2ErS6", "Pm2Hg2Au6"]  # no electronegativity
    parts += [numbers(formula) for formula in (*promethium, "Fe3O4", "NaCl2", "ZrO2", "LaAlO3", "CsPbI3")]
    verdicts = [charge_balanced(part) for part in parts]
    assert verdicts == [peers.smact_validity(part) for part in parts] == [by_cdvae(part) for part in parts]
    assert not all(verdicts)


def test_many_elements_end_soon() -> None:
    table = charge_balance._table()
    cations = [z for z in table if any(state > 0 for state in table[z][0]) and z not in (9, 61, 86, 103)]
    assert len(cations) > 90  # some 5^90 combinations
    assert charge_balanced([*cations, *[9] * 199])
    assert not charge_balanced([*cations, *[9] * 19])


def test_nine_of_ten_real_compositions_are_valid() -> None:
    some = real(500)
    parts = some.atomic_numbers.split(some.num_atoms.tolist())
    assert 0.87 < np.mean([charge_balanced(part) for part in parts]) < 0.96


# ---- structure ---------------------------------------------------------------------------------------------


def by_distance_matrix(some: Crystals) -> list[bool]:
    """structure_validity of CDVAE's eval_utils.py."""
    verdicts = []
    for structure in to_pymatgen(some):
        distances = structure.distance_matrix + np.diag(np.full(len(structure), 10.5))
        verdicts.append(not (distances.min() < 0.5 or structure.volume < 0.1))
    return verdicts


def test_distances_are_cdvaes_verdict() -> None:
    """Skewed and crowded cells of few atoms, where half of them fail."""
    some = random_crystals(random_cells(300, seed=3, skew=1, rounds=2) * 0.3, seed=4)
    found = validity(some)
    assert found.distances.tolist() == by_distance_matrix(some)
    assert 0.1 < found.distances.mean() < 0.9
    assert (found.distances >= found.distances_with_images).all()
    assert (found.distances_with_images >= found.radii).all()


def test_each_rule_fails_where_it_should() -> None:
    thin = crystal(cell(0.4, 5, 5), [[0, 0, 0]], [6])
    two = crystal(cell(5, 5, 5), [[0, 0, 0], [0.08, 0, 0]], [6, 6])
    near = crystal(cell(5, 5, 5), [[0, 0, 0], [0.12, 0, 0]], [6, 6])  # 0.6 Å, half of the radii is 0.76
    across = crystal(cell(5, 5, 5), [[0.999, 0, 0], [0.05, 0, 0]], [6, 6])  # 0.26 Å through the face
    tiny = crystal(cell(0.4, 0.4, 0.4), [[0, 0, 0]], [6])
    good = crystal(cell(5, 5, 5), [[0, 0, 0], [0.5, 0.5, 0.5]], [6, 6])
    found = validity(Crystals.cat([thin, two, near, across, tiny, good]))
    assert found.distances.tolist() == [True, False, True, False, False, True]
    assert found.distances_with_images.tolist() == [False, False, True, False, False, True]
    assert found.radii.tolist() == [False, False, False, False, False, True]


def test_what_cannot_be_measured_is_invalid_and_harms_nobody() -> None:
    good = special()["NaCl"]
    lost = crystal(cell(5, 5, 5), [[0, 0, 0], [0.5, 0.5, 0.5]], [6, 6])
    lost.frac_coords[1, 2] = torch.nan
    flat = crystal(torch.tensor([[3.0, 0, 0], [0, 3, 0], [3, 3, 0]], dtype=torch.float64), [[0, 0, 0]], [6])
    endless = crystal(torch.diag(torch.tensor([torch.inf, 3, 3], dtype=torch.float64)), [[0, 0, 0]], [6])
    crowd = crystal(cell(0.5, 0.5, 0.5), torch.rand(9000, 3, dtype=torch.float64), [6] * 9000)
    found = validity(Crystals.cat([lost, flat, good, endless, crowd, good]))
    for rule in (found.distances, found.distances_with_images, found.radii):
        assert rule.tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("name", sorted(special()))
def test_validity_does_not_depend_on_the_description(name: str) -> None:
    one = special()[name]
    order = torch.randperm(int(one.num_atoms), generator=torch.Generator().manual_seed(0))
    shear = torch.tensor([[[1, 2, 0], [0, 1, 0], [1, 2, 1]]])
    alike = validity(Crystals.cat([one, rotated(one), relabelled(one, order), in_other_cell(one, shear)]))
    for rule in (alike.distances_with_images, alike.radii):
        assert len(set(rule.tolist())) == 1


def test_real_crystals_and_the_control() -> None:
    some = real(500)
    found = validity(some)
    assert found.distances.all() and found.distances_with_images.all() and found.radii.all()
    drawn = random_coordinates(some, seed=0)
    assert torch.equal(drawn.frac_coords, random_coordinates(some, seed=0).frac_coords)
    assert not torch.equal(drawn.frac_coords, random_coordinates(some, seed=1).frac_coords)
    assert torch.equal(drawn.lattice, some.lattice)
    control = validity(drawn)
    assert 0.80 < control.distances_with_images.mean() < 0.95  # published: 88 % and 17 %
    assert 0.08 < control.radii.mean() < 0.30


# ---- match -------------------------------------------------------------------------------------------------


def test_match_is_pymatgens() -> None:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    peers, defaults = StructureMatcher(stol=0.5, ltol=0.3, angle_tol=10), StructureMatcher()
    targets = [one for name, one in special().items() if name != "sixty"]
    cases = itertools.product(targets, (0.05, 0.3, 1.0))
    pairs = [(shaken(one, size, seed, strain=0.02), one) for seed, (one, size) in enumerate(cases)]
    verdicts = []
    for predicted, target in pairs:
        (one,), (other,) = to_pymatgen(predicted), to_pymatgen(target)
        wanted, found = peers.get_rms_dist(one, other), Comparison().match(predicted, target)
        verdicts.append(found is not None)
        assert (wanted is None) == (found is None)
        if wanted is not None and found is not None:
            assert found.rms == wanted[0] and found.strict == defaults.fit(one, other)
    assert any(verdicts) and not all(verdicts)


def test_a_match_does_not_depend_on_what_was_compared_before() -> None:
    target = special()["skewed"]
    first = shaken(target, 0.05, seed=1)
    again = Crystals(first.frac_coords + 2e-7, first.lattice * (1 + 3e-7), first.atomic_numbers, first.num_atoms)
    again.frac_coords[0] += 4e-7
    alone = Comparison().match(again, target)
    for _ in range(2):
        assert Comparison().match(first, target) != alone
        assert Comparison().match(again, target) == alone


def test_other_compositions_never_match_in_pymatgen_either() -> None:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    peers = StructureMatcher(stol=0.5, ltol=0.3, angle_tol=10)
    some = list(special().values())[:6]
    for one, other in itertools.combinations(some, 2):
        assert Comparison().match(one, other) is None
        assert peers.get_rms_dist(*to_pymatgen(one), *to_pymatgen(other)) is None


def test_the_same_crystal_matches_at_nought_in_any_description() -> None:
    one = special()["NaCl"]
    for other in (one, rotated(one), in_other_cell(one, torch.tensor([[[1, 1, 0], [0, 1, 0], [0, 0, 1]]]))):
        found = Comparison().match(other, one)
        assert found is not None and found.rms < 1e-6 and found.strict
    single = Comparison().match(one.to(dtype=torch.float32), one)
    assert single is not None and single.rms < 1e-5
