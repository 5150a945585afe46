"""Energies are CHGNet's own."""

import sys

import numpy as np
import pytest
import torch
from known_crystals import cell, crystal, special

from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.errors import UsageError
from hpcgen.screen.potential import energies, potential_named


def test_energies_are_chgnets() -> None:
    chgnet = pytest.importorskip("chgnet.model", reason="chgnet is not installed: the extra mlip")
    names = ["NaCl", "diamond", "hcp"]
    crystals = Crystals.cat([special()[name] for name in names])
    model = chgnet.CHGNet.load(use_device="cpu", verbose=False)
    wanted = [float(model.predict_structure(one)["e"]) for one in to_pymatgen(crystals)]
    assert energies(crystals) == pytest.approx(wanted, abs=1e-5)
    assert wanted[1] == pytest.approx(-9.1, abs=0.3), "diamond in PBE, eV/atom"
    lonely = crystal(cell(15, 15, 15), [[0, 0, 0]], [11])
    beyond = crystal(cell(4, 4, 4), [[0, 0, 0]], [99])
    found = energies(Crystals.cat([beyond, crystals, lonely]))
    assert np.isnan(found[0]) and found[1:4] == pytest.approx(wanted, abs=1e-5) and np.isfinite(found[4])
    assert np.isnan(energies(beyond)).all() and energies(crystals[torch.tensor([], dtype=torch.int64)]).shape == (0,)
    assert potential_named().startswith("CHGNet 0.3.0 (chgnet 0.4")


def test_without_chgnet_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpcgen.screen import potential

    potential._model.cache_clear()
    monkeypatch.setitem(sys.modules, "chgnet.model", None)
    with pytest.raises(UsageError, match=r"pip install 'hpcgen\[mlip\]'"):
        potential_named()
