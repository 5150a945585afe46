"""Bonds against a table of lengths, and sets of lengths beside each other."""

import numpy as np
import pytest
import torch
from ase.data import covalent_radii
from known_crystals import cell, crystal, special
from scipy.stats import entropy, wasserstein_distance

from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.bonds import LEAST, SQUEEZED, STRETCHED, Lengths, bonds, element_divergence, lengths_apart


@pytest.fixture(scope="module")
def crystals() -> Crystals:
    return Crystals.cat(list(special().values()))


def test_bonds_are_those_of_a_plain_count(crystals: Crystals) -> None:
    found = bonds(crystals)
    every, sound = found.counts()
    for at, one in enumerate(to_pymatgen(crystals)):
        numbers, lengths, fits, bonded = one.atomic_numbers, [], [], set()
        for i, site in enumerate(one):
            for other in one.get_neighbors(site, 2 * STRETCHED * 2.6):
                table = covalent_radii[numbers[i]] + covalent_radii[numbers[other.index]]
                if other.nn_distance <= STRETCHED * table:
                    lengths.append(other.nn_distance)
                    fits.append(other.nn_distance >= SQUEEZED * table)
                    bonded.add(i)
        assert every[at] * 2 == len(lengths) and sound[at] * 2 == sum(fits)
        mine = np.sort(found.length[found.crystal == at])
        assert mine == pytest.approx(np.sort(lengths)[::2], abs=1e-6), "each bond once"
        assert found.lonely[at] == len(one) - len(bonded)
    assert (found.elements[:, 0] <= found.elements[:, 1]).all()


def test_a_bond_too_short_and_an_atom_alone() -> None:
    far = crystal(cell(9.0, 9.0, 9.0), [[0, 0, 0], [0.5, 0.5, 0.5]], [11, 17])
    near = crystal(cell(9.0, 9.0, 9.0), [[0, 0, 0], [0.2, 0, 0]], [11, 17])
    found = bonds(Crystals.cat([far, near]))
    assert [side.tolist() for side in found.counts()] == [[0, 1], [0, 0]] and found.lonely.tolist() == [2, 0]


def test_lengths_in_parts_are_lengths_at_once(crystals: Crystals) -> None:
    whole, parts, other = Lengths(), Lengths(), Lengths()
    copies = Crystals.cat([crystals] * LEAST)
    whole.add(bonds(copies))
    for half in (copies[: len(copies) // 2], copies[len(copies) // 2 :]):
        parts.add(bonds(half))
    assert whole.of().keys() == parts.of().keys() and (11, 17) in whole.of()
    stretched = Crystals(copies.frac_coords, copies.lattice * 1.02, copies.atomic_numbers, copies.num_atoms)
    other.add(bonds(stretched))
    apart = lengths_apart(parts, other)
    for pair, (distance, ours, theirs) in apart.items():
        assert distance == pytest.approx(wasserstein_distance(whole.of()[pair], other.of()[pair]))
        assert min(ours, theirs) >= LEAST
    assert apart[(11, 17)][0] == pytest.approx(0.02 * 2.82, abs=1e-3)
    assert all(distance < 1e-9 for distance, _, _ in lengths_apart(whole, parts).values())


def test_divergence_of_elements() -> None:
    chance = torch.Generator().manual_seed(1)
    own, known = (torch.randint(0, 50, (118,), generator=chance).tolist() for _ in range(2))
    assert element_divergence(own, known) == pytest.approx(entropy(np.array(own) + 0.5, np.array(known) + 0.5))
    assert element_divergence(own, own) == 0
