"""Energies of CHGNet (Deng et al., Nature Machine Intelligence 5, 1031, 2023), whose weights come with its package."""

import io
import warnings
from contextlib import redirect_stdout
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np
import torch

from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.errors import UsageError

HEAVIEST = 94  # plutonium: the last element that CHGNet was trained on


def potential_named() -> str:
    """The potential and its version, to be told with its energies. Raises UsageError where chgnet is not installed."""
    try:
        return f"CHGNet {_model().version} (chgnet {metadata.version('chgnet')})"
    except ImportError as absent:
        raise UsageError(f"energies need CHGNet ({absent}): pip install 'hpcgen[mlip]'") from absent


def energies(crystals: Crystals) -> np.ndarray:
    """Energy of each crystal as it is, on the CPU. (B,) float64 eV/atom; nan with an element beyond plutonium."""
    found = np.full(len(crystals), np.nan)
    heaviest = [int(part.max()) for part in crystals.atomic_numbers.split(crystals.num_atoms.tolist())]
    known = [at for at, number in enumerate(heaviest) if number <= HEAVIEST]
    if not known:
        return found
    structures = to_pymatgen(crystals)
    with warnings.catch_warnings(), torch.no_grad():  # chgnet keeps what gradients would need: a third of the time
        warnings.simplefilter("ignore")  # of atoms without a neighbour within 6 Å, whose energy is that of the atom
        told = _model().predict_structure([structures[at] for at in known], task="e")
    found[known] = [float(one["e"]) for one in (told if isinstance(told, list) else [told])]
    return found


@lru_cache(maxsize=1)
def _model() -> Any:
    from chgnet.model import CHGNet

    with redirect_stdout(io.StringIO()):  # it prints its version, even if asked not to
        model = CHGNet.load(use_device="cpu", verbose=False)
    model.graph_converter.set_isolated_atom_response("warn")
    return model
