"""Charges by bond valence: pymatgen's BVAnalyzer without symmetry gives the same verdict, where it comes to one."""

import itertools

import numpy as np
import pytest
import torch
from known_crystals import cell, crystal, in_other_cell, relabelled, rotated, shaken, special
from test_metrics import real

from hpcgen.crystal.composition import ATOMIC_NUMBERS
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.bond_valence import LOWEST, _charges, neutral
from hpcgen.metrics.validity import random_coordinates, validity

SALT, FLUORITE = [[0, 0, 0], [0.5, 0.5, 0.5]], [[0, 0, 0], [0.25, 0.25, 0.25], [0.75, 0.75, 0.75]]
FCC = [[0, 1, 1], [1, 0, 1], [1, 1, 0]]


def made(symbols: str, edge: float, sites: list[list[float]]) -> Crystals:
    """In the primitive cell of an fcc lattice of this edge in Å."""
    lattice = torch.tensor(FCC, dtype=torch.float64) * edge / 2
    return crystal(lattice, sites, [ATOMIC_NUMBERS[symbol] for symbol in symbols.split()])


KNOWN = {
    "NaCl": (made("Na Cl", 5.64, SALT), 1.0),
    "MgO": (made("Mg O", 4.21, SALT), 1.0),
    "CaF2": (made("Ca F F", 5.46, FLUORITE), 1.0),
    "as NaCl2": (made("Na Cl Cl", 6.0, FLUORITE), 0.0),
    "as CaF": (made("Ca F", 5.0, SALT), 0.0),
    "a metal": (made("Cu", 3.61, [[0, 0, 0]]), np.nan),
    "an alloy": (made("Cu Zn", 4.1, SALT), np.nan),
    "an element": (made("Si Si", 5.43, [[0, 0, 0], [0.25, 0.25, 0.25]]), np.nan),
    "without parameters": (made("Na Og", 6.0, SALT), np.nan),
}


def test_known_crystals() -> None:
    found = neutral(Crystals.cat([one for one, _ in KNOWN.values()]))
    assert dict(zip(KNOWN, found.tolist(), strict=True)) == pytest.approx(
        {name: wanted for name, (_, wanted) in KNOWN.items()}, nan_ok=True
    )


def by_pymatgen(crystals: Crystals) -> list[bool | None]:
    """None where it gave up."""
    from pymatgen.analysis.bond_valence import BVAnalyzer

    analyzer, verdicts = BVAnalyzer(symm_tol=0, max_permutations=30_000), []
    for structure in to_pymatgen(crystals):
        try:
            verdicts.append(bool(analyzer.get_valences(structure)))
        except ValueError:
            gave_up = getattr(analyzer, "_n", 0) > analyzer.max_permutations
            verdicts.append(None if gave_up else False)
    return verdicts


def compared(crystals: Crystals) -> tuple[int, int]:
    """How many of those that both come to a verdict of are neutral, and how many there are."""
    found, wanted = neutral(crystals), by_pymatgen(crystals)
    both = [(bool(ours), theirs) for ours, theirs in zip(found, wanted, strict=True)
            if theirs is not None and not np.isnan(ours)]  # fmt: skip
    assert all(ours == theirs for ours, theirs in both)
    return sum(ours for ours, _ in both), len(both)


def test_verdicts_are_pymatgens() -> None:
    ionic = [one for one, wanted in KNOWN.values() if not np.isnan(wanted)]
    shaking = [shaken(one, size, seed=k) for one, (k, size) in itertools.product(ionic, enumerate((0.3, 0.8, 1.5)))]
    count, of = compared(Crystals.cat([*ionic, *shaking]))
    assert 0 < count < of == 20


def test_verdicts_on_real_crystals_are_pymatgens() -> None:
    some = real(100)
    some = some[torch.nonzero(some.num_atoms <= 8).flatten()][:30]
    count, of = compared(some)
    assert 0.5 < count / of < 1
    chance = random_coordinates(some, seed=2)
    apart = chance[torch.from_numpy(np.flatnonzero(validity(chance).distances_with_images))]
    assert np.nanmean(neutral(apart)) < 0.5 * count / of


@pytest.mark.parametrize("name", ["NaCl", "CaF2"])
def test_the_verdict_does_not_depend_on_the_description(name: str) -> None:
    one = KNOWN[name][0]
    order = torch.randperm(int(one.num_atoms), generator=torch.Generator().manual_seed(0))
    shear = torch.tensor([[[1, 2, 0], [0, 1, 0], [1, 2, 1]]])
    alike = [one, rotated(one), relabelled(one, order), in_other_cell(one, shear), one.to(dtype=torch.float32)]
    for k, other in enumerate(alike):
        assert neutral(other).tolist() == [1.0], k
    assert neutral(Crystals.cat([*alike[:4], special()["hcp"]])).tolist() == pytest.approx(
        [1] * 4 + [np.nan], nan_ok=True
    )


def test_charges_add_up_as_if_all_states_were_tried() -> None:
    """One state for all sites of an element, or one of two neighbouring ones for each."""
    chance = np.random.default_rng(7)
    for _ in range(200):
        likely = chance.random((5, 15)) < 0.25
        likely[:, -LOWEST] = False
        ((kind, found),) = _charges(np.zeros(5, dtype=np.int64), likely)
        states = [(np.flatnonzero(row) + LOWEST).tolist() for row in likely]
        wanted = {sum(some) for some in itertools.product(*states) if max(some) - min(some) <= 1}
        assert kind == 0 and found == wanted


def test_an_atom_without_neighbours_has_no_charge() -> None:
    lonely = crystal(cell(20, 20, 20), [[0, 0, 0], [0.5, 0.5, 0.5]], [11, 17])
    assert neutral(lonely).tolist() == [float(bool(by_pymatgen(lonely)[0]))]
