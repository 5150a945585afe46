"""Space groups and crystal systems of a set beside those of another."""

from typing import Any

import numpy as np
from scipy.spatial.distance import jensenshannon

from hpcgen.metrics.bootstrap import share

LAST_OF_SYSTEM = {  # highest number of a space group of each crystal system
    "triclinic": 2, "monoclinic": 15, "orthorhombic": 74, "tetragonal": 142, "trigonal": 167, "hexagonal": 194,
    "cubic": 230,
}  # fmt: skip


def symmetry_figures(own: np.ndarray, known: np.ndarray, seed: int) -> dict[str, Any]:
    """Shares beyond P1, and Jensen–Shannon divergences in bits: 0 where equal, 1 where nothing is shared.

    own (N,), known (M,): numbers of space groups, 0 where none was found, which is left out. seed: of the intervals.
    """
    groups = [np.bincount(side[side > 0], minlength=231)[1:] for side in (own, known)]
    systems = [np.add.reduceat(counts, [0, *list(LAST_OF_SYSTEM.values())[:-1]]) for counts in groups]
    return {
        "symmetric": _symmetric(groups[0], seed),
        "symmetric_reference": _symmetric(groups[1], seed),
        "space_groups": _divergence(*groups),
        "crystal_systems": _divergence(*systems),
        "systems": {
            name: {"count": int(systems[0][at]), "reference": int(systems[1][at])}
            for at, name in enumerate(LAST_OF_SYSTEM)
        },
        "not_found": int((own == 0).sum()),
    }


def _symmetric(groups: np.ndarray, seed: int) -> dict[str, Any]:
    """Of crystals with a space group. groups: (230,) counts"""
    return share(int(groups[1:].sum()), int(groups.sum()), seed)


def _divergence(own: np.ndarray, known: np.ndarray) -> float | None:
    """Of two counts (K,); None where one is empty."""
    return float(jensenshannon(own, known, base=2) ** 2) if own.any() and known.any() else None
