"""CDVAE's figures of a set beside a reference are those of a plain reading with scipy and pymatgen."""

import numpy as np
import pytest
from known_crystals import special
from scipy.spatial.distance import cdist, pdist

from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.bootstrap import mean_interval, share
from hpcgen.metrics.coverage import CUT_OFFS, CutOffs, chosen, coverage, density, diversity, earth_movers, num_elements


def test_coverage_is_what_cdvae_computes() -> None:
    chance = np.random.default_rng(3)
    own = chance.random((50, 61)) * 0.3, chance.normal(size=(50, 132))
    known = chance.random((40, 61)) * 0.3, chance.normal(size=(40, 132))
    known[0][:5], known[1][3:9] = own[0][:5], own[1][3:9]
    near = CutOffs(1.0, 15.0)
    found = coverage(((own[0][k : k + 7], own[1][k : k + 7]) for k in range(0, 50, 7)), known, 60, near)
    structure, composition = cdist(own[0], known[0]), cdist(own[1], known[1])
    recalled = (structure.min(0) <= near.structure) & (composition.min(0) <= near.composition)
    precise = (structure.min(1) <= near.structure) & (composition.min(1) <= near.composition)
    assert 0 < recalled.sum() < 40 and 0 < precise.sum() < 50
    assert found["recall"] == share(recalled.sum(), 40, seed=0)
    assert found["precision"] == share(precise.sum(), 60, seed=0)
    for name, wanted in (
        ("amsd_recall", structure.min(0)), ("amsd_precision", structure.min(1)),
        ("amcd_recall", composition.min(0)), ("amcd_precision", composition.min(1)),
    ):  # fmt: skip
        assert found[name]["mean"] == pytest.approx(wanted.mean(), abs=1e-9) and found[name]["of"] == len(wanted)
        assert found[name]["interval"] == pytest.approx(mean_interval(wanted, seed=0))


def test_nothing_covers_nothing() -> None:
    none = np.zeros((0, 61)), np.zeros((0, 132))
    found = coverage(iter([]), (np.ones((3, 61)), np.ones((3, 132))), 5)
    assert found["recall"]["share"] == found["precision"]["share"] == 0 and found["amsd_recall"]["mean"] is None
    assert coverage(iter([(np.ones((3, 61)), np.ones((3, 132)))]), none, 3)["precision"]["count"] == 0
    assert diversity(none[0], seed=0)["mean"] is None and earth_movers(np.array([]), np.array([1.0])) is None


def test_density_and_elements_are_pymatgens() -> None:
    crystals = Crystals.cat(list(special().values()))
    plain = to_pymatgen(crystals)
    assert density(crystals) == pytest.approx([float(one.density) for one in plain], rel=1e-7)
    assert num_elements(crystals).tolist() == [len(set(one.species)) for one in plain]


def test_samples_are_drawn_by_chance_and_the_same_again() -> None:
    valid = np.arange(0, 300, 3)
    some = chosen(valid, 10, seed=4)
    assert len(set(some.tolist())) == 10 and set(some.tolist()) <= set(valid.tolist())
    assert np.array_equal(some, chosen(valid, 10, seed=4)) and not np.array_equal(some, chosen(valid, 10, seed=5))
    assert chosen(valid, 100, seed=4).tolist() == chosen(valid, 101, seed=4).tolist() == valid.tolist()
    assert diversity(np.eye(4), seed=0)["mean"] == pytest.approx(pdist(np.eye(4)).mean())


def test_cut_offs_are_the_published_ones() -> None:
    assert {"mp20": CutOffs(0.4, 10), "perov5": CutOffs(0.2, 4), "carbon24": CutOffs(0.2, 4)} == CUT_OFFS
