"""CDVAE's and DiffCSP's metrics as their code has them: pymatgen, matminer, SMACT and CHGNet called plainly.

Xie et al., ICLR 2022 (appendix D; eval_utils.py, compute_metrics.py); Jiao et al., NeurIPS 2023 (compute_metrics.py).
"""

import itertools
import json
import math
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist, pdist
from scipy.stats import wasserstein_distance

from hpcgen.crystal.composition import SYMBOLS
from hpcgen.metrics.coverage import SCALE

STRUCTURE_CUT_OFF, COMPOSITION_CUT_OFF = 0.4, 10.0  # of MP-20


@dataclass(frozen=True)
class Plain:
    """What the peers know of one crystal."""

    structural: bool
    compositional: bool
    structure: np.ndarray | None  # (61,) fingerprint
    composition: np.ndarray | None  # (132,) Magpie features
    density: float  # g/cm³
    num_elements: int

    @property
    def valid(self) -> bool:
        """A crystal without a fingerprint counts as invalid."""
        return self.structural and self.compositional and self.structure is not None


def smact_validity(numbers: Sequence[int]) -> bool:
    """CDVAE's function of this name, of the atoms of a cell, by SMACT 2.2.1."""
    import smact
    from smact.screening import pauling_test

    found = dict(sorted(Counter(numbers).items()))  # SMACT's test depends on the order where strengths are missing
    factor = math.gcd(*found.values())
    counts = [count // factor for count in found.values()]
    symbols = tuple(SYMBOLS[number] for number in found)
    elements = list(smact.element_dictionary(symbols).values())
    if len(symbols) == 1 or all(symbol in smact.metals for symbol in symbols):
        return True
    for states in itertools.product(*(element.oxidation_states for element in elements)):
        neutral, _ = smact.neutral_ratios(states, stoichs=[(count,) for count in counts], threshold=max(counts))
        if not neutral:
            continue
        try:
            if pauling_test(states, [element.pauling_eneg for element in elements]):
                return True
        except TypeError:  # no electronegativity: taken as passed
            return True
    return False


def structure_validity(structure: Any, cutoff: float = 0.5) -> bool:
    """CDVAE's function of this name."""
    distances = structure.distance_matrix
    distances = distances + np.diag(np.ones(distances.shape[0]) * (cutoff + 10.0))
    return not (distances.min() < cutoff or structure.volume < 0.1)


def is_valid(structure: Any) -> bool:
    """But for its fingerprint."""
    return structure_validity(structure) and smact_validity(list(structure.atomic_numbers))


@lru_cache(maxsize=1)
def _featurizers() -> tuple[Any, Any]:
    from matminer.featurizers.composition import ElementProperty
    from matminer.featurizers.site import CrystalNNFingerprint

    return CrystalNNFingerprint.from_preset("ops"), ElementProperty.from_preset("magpie")


def measured(structure: Any) -> Plain:
    """One crystal, a pymatgen Structure."""
    from pymatgen.core import Composition

    warnings.simplefilter("ignore")
    by_site, by_composition = _featurizers()
    numbers = list(structure.atomic_numbers)
    told = structure_validity(structure), smact_validity(numbers)
    known = float(structure.density), len(set(structure.species))
    magpie = np.array(by_composition.featurize(Composition(Counter(SYMBOLS[number] for number in numbers))))
    try:
        own = np.mean([by_site.featurize(structure, site) for site in range(len(structure))], axis=0)
    except Exception:  # of any kind: the peers count it as invalid
        return Plain(*told, None, None, *known)
    return Plain(*told, own, magpie, *known)


@lru_cache(maxsize=1)
def _potential() -> Any:
    import torch
    from chgnet.model import CHGNet

    torch.set_num_threads(1)  # a process for each core
    potential = CHGNet.load(use_device="cpu", verbose=False)
    potential.graph_converter.set_isolated_atom_response("warn")
    return potential


def energy(structure: Any) -> float:
    """eV/atom of one crystal by CHGNet, unrelaxed."""
    warnings.simplefilter("ignore")
    return float(_potential().predict_structure(structure, task="e")["e"])


def in_processes(what: Any, structures: Sequence[Any], processes: int) -> list[Any]:
    """`what` of each."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(what, structures, chunksize=8)


def suite(generated: Sequence[Plain], known: Sequence[Plain], own: Sequence[float] = (), others: Sequence[float] = (),
          ) -> dict[str, float]:  # fmt: skip
    """GenEval of CDVAE with all valid crystals as its samples. own, others: energies of both sets, if wanted."""
    structures, compositions = _apart(generated, known)
    near = [
        (structures.min(axis) <= STRUCTURE_CUT_OFF) & (compositions.min(axis) <= COMPOSITION_CUT_OFF) for axis in (0, 1)
    ]
    samples = [one for one in generated if one.valid]
    found = {
        "struct_valid": np.mean([one.structural for one in generated]),
        "comp_valid": np.mean([one.compositional for one in generated]),
        "valid": np.mean([one.valid for one in generated]),
        "cov_recall": near[0].mean(),
        "cov_precision": near[1].sum() / len(generated),
        "amsd_recall": structures.min(0).mean(),
        "amsd_precision": structures.min(1).mean(),
        "amcd_recall": compositions.min(0).mean(),
        "amcd_precision": compositions.min(1).mean(),
        "wdist_density": wasserstein_distance([one.density for one in samples], [one.density for one in known]),
        "wdist_num_elems": wasserstein_distance(
            [one.num_elements for one in samples], [one.num_elements for one in known]
        ),
        "struct_div": pdist(np.array([one.structure for one in samples])).mean(),
        "comp_div": pdist(_scaled(samples)).mean(),
    }
    if len(own):
        sampled = [value for one, value in zip(generated, own, strict=True) if one.valid]
        found["wdist_prop"] = wasserstein_distance(sampled, others)
    return {name: float(value) for name, value in found.items()}


def _apart(generated: Sequence[Plain], known: Sequence[Plain]) -> tuple[np.ndarray, np.ndarray]:
    """Distances of all pairs with fingerprints, of structures and of compositions."""
    ours, theirs = ([one for one in side if one.structure is not None] for side in (generated, known))
    structures = cdist(*(np.array([one.structure for one in side]) for side in (ours, theirs)))
    return structures, cdist(_scaled(ours), _scaled(theirs))


def _scaled(some: Sequence[Plain]) -> np.ndarray:
    """StandardScaler of CDVAE: what is no number becomes 0."""
    scale = json.loads(SCALE.read_text(encoding="utf-8"))
    mean, deviation = np.array(scale["means"]), np.array(scale["stds"])
    scaled = (np.array([one.composition for one in some]).astype(float) - mean) / deviation
    return np.where(np.isnan(scaled), 0.0, scaled)


def rms_dist(pair: tuple[Any, Any]) -> float | None:
    """RecEval of CDVAE, of a prediction and its target: the distance where they match."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    forget = getattr(getattr(StructureMatcher, "_get_reduced_istructure", None), "cache_clear", None)
    if forget is not None:  # the peers' pymatgen has no such cache, by which a distance depends on earlier ones
        forget()
    try:
        found = StructureMatcher(stol=0.5, angle_tol=10, ltol=0.3).get_rms_dist(*pair)
    except Exception:  # of any kind: the peers count it as not matched
        return None
    return None if found is None else float(found[0])
