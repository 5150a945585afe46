"""Symmetry of a set beside another's."""

import numpy as np
import pytest
from pymatgen.symmetry.groups import SpaceGroup

from hpcgen.metrics.bootstrap import share
from hpcgen.metrics.space_groups import LAST_OF_SYSTEM, symmetry_figures


def test_systems_are_pymatgens() -> None:
    systems = {
        n: SpaceGroup.from_int_number(n).crystal_system for n in (1, 2, 3, 15, 16, 74, 75, 142, 143, 167, 168, 230)
    }
    for number, system in systems.items():
        found = symmetry_figures(np.array([number]), np.array([1]), 0)["systems"]
        assert found[system]["count"] == 1 and sum(part["count"] for part in found.values()) == 1
    assert list(LAST_OF_SYSTEM.values())[-1] == 230


def test_shares_and_divergences() -> None:
    own, known = np.array([1, 1, 225, 0]), np.array([225, 225, 2, 1])
    found = symmetry_figures(own, known, 0)
    assert found["symmetric"] == share(1, 3, seed=0) and found["not_found"] == 1
    assert found["symmetric_reference"]["share"] == 3 / 4
    p, q = np.array([2 / 3, 0, 1 / 3]), np.array([1 / 4, 1 / 4, 1 / 2])
    middle = (p + q) / 2
    wanted = sum((a * np.log2(np.where(a > 0, a / middle, 1))).sum() for a in (p, q)) / 2
    assert found["space_groups"] == pytest.approx(wanted)
    assert 0 < found["crystal_systems"] < found["space_groups"]
    assert symmetry_figures(own, own, 0)["space_groups"] == 0
    assert symmetry_figures(np.array([1]), np.array([2]), 0)["space_groups"] == pytest.approx(1)
    assert symmetry_figures(np.array([0]), known, 0)["space_groups"] is None
