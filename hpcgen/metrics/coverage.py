"""How a set of generated crystals lies beside known ones, as CDVAE measures it (Xie et al., ICLR 2022, appendix D).

Two crystals are compared by the Euclidean distances of their structure fingerprints (`fingerprints`) and of their
Magpie features, scaled as CDVAE scales them.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance

from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.bootstrap import mean, mean_interval, share

SCALE = Path(__file__).with_name("magpie_scale.json")
_ROWS = 256  # crystals whose distances from all others are in memory at a time
_GRAMS, _CM3 = 1.66053906660e-24, 1e-24  # of u and Å³ (CODATA 2018)


@dataclass(frozen=True)
class CutOffs:
    """Distances up to which a crystal is covered by another."""

    structure: float
    composition: float


CUT_OFFS = {"mp20": CutOffs(0.4, 10.0), "perov5": CutOffs(0.2, 4.0), "carbon24": CutOffs(0.2, 4.0)}


def scaled(features: np.ndarray) -> np.ndarray:
    """Magpie features less CDVAE's means, over its deviations; what is no number is 0. (N, 132) -> (N, 132)."""
    means, deviations = _scale()
    return np.nan_to_num((features - means) / deviations, nan=0.0, posinf=np.inf, neginf=-np.inf)


@lru_cache(maxsize=1)
def _scale() -> tuple[np.ndarray, np.ndarray]:
    told = json.loads(SCALE.read_text(encoding="utf-8"))
    return np.array(told["means"]), np.array(told["stds"])


class Nearest:
    """Distances to the nearest, from a set that comes in parts to a reference (M, F), and the other way round."""

    def __init__(self, reference: np.ndarray) -> None:
        self._reference = reference.astype(np.float64)
        self._squares = np.square(self._reference).sum(1)
        self.of_reference = np.full(len(reference), np.inf)  # (M,) to the nearest of all that was added

    def add(self, some: np.ndarray) -> np.ndarray:
        """Distance of each to the nearest of the reference. (N, F) -> (N,)."""
        if not len(self._reference):
            return np.full(len(some), np.inf)
        some = some.astype(np.float64)
        square = (
            np.square(some).sum(1)[:, None] + self._squares - 2 * some @ self._reference.T
        )  # (N, M), but for rounding
        nearest, nearest_of_reference = square.argmin(1), square.argmin(0)
        back = np.linalg.norm(some[nearest_of_reference] - self._reference, axis=1)
        self.of_reference = np.minimum(self.of_reference, back)
        return np.linalg.norm(some - self._reference[nearest], axis=1)


def coverage(
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    reference: tuple[np.ndarray, np.ndarray],
    asked: int,
    cut_offs: CutOffs = CUT_OFFS["mp20"],
    seed: int = 0,
) -> dict[str, Any]:
    """COV recall and precision, and the mean distances to the nearest, AMSD of structures, AMCD of compositions.

    parts: fingerprints (N, 61) and scaled Magpie features (N, 132) of generated crystals that have both; reference:
    of M known ones. A known crystal is covered if some generated one is near in structure and some, perhaps another
    one, in composition; a generated one likewise, as a share of all `asked`. seed: of the intervals, for which the
    crystals that are counted or averaged are drawn, the other side being as it is.
    """
    structure, composition = (Nearest(side) for side in reference)
    distances: list[np.ndarray] = []  # (2, N) of each part
    for part in parts:
        if len(part[0]):
            distances.append(np.stack([structure.add(part[0]), composition.add(part[1])]))
    to_reference = np.concatenate(distances, 1) if distances else np.full((2, 0), np.inf)
    of_reference = np.stack([structure.of_reference, composition.of_reference])
    near = np.array([[cut_offs.structure], [cut_offs.composition]])
    recalled, precise = (int((side <= near).all(0).sum()) for side in (of_reference, to_reference))
    return {
        "recall": share(recalled, of_reference.shape[1], seed),
        "precision": share(precise, asked, seed),
        "amsd_recall": mean(of_reference[0], seed),
        "amsd_precision": mean(to_reference[0], seed),
        "amcd_recall": mean(of_reference[1], seed),
        "amcd_precision": mean(to_reference[1], seed),
        "cut_offs": asdict(cut_offs),
        "crystals": to_reference.shape[1],
    }


def chosen(valid: Sequence[int] | np.ndarray, samples: int, seed: int) -> np.ndarray:
    """`samples` of the valid crystals, by chance, in rising order; all of them where there are no more."""
    places = np.asarray(valid)
    if len(places) <= samples:
        return places
    return np.sort(np.random.Generator(np.random.Philox(seed)).permutation(places)[:samples])


def diversity(features: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean distance of all pairs, how many crystals, and the interval. (N, F); None for fewer than two.

    For the interval crystals are drawn, each with its mean distance from all others. The mean over pairs varies twice
    as much as theirs, each pair holding two crystals (Hoeffding, Ann. Math. Statist. 19, 293, 1948, first order).
    """
    many, exact = len(features), features.astype(np.float64)
    if many < 2:
        return {"mean": None, "of": many, "interval": None}
    sums = [cdist(exact[at : at + _ROWS], exact).sum(1) for at in range(0, many, _ROWS)]
    each = np.concatenate(sums) / (many - 1)
    whole, ends = float(each.mean()), mean_interval(each, seed)
    assert ends is not None
    return {"mean": whole, "of": many, "interval": [whole + 2 * (end - whole) for end in ends]}


def earth_movers(some: np.ndarray, others: np.ndarray) -> float | None:
    """Wasserstein distance of two sets of numbers, in their unit; None where one is empty."""
    return float(wasserstein_distance(some, others)) if len(some) and len(others) else None


def density(crystals: Crystals) -> np.ndarray:
    """With pymatgen's atomic masses; inf where a cell has no volume. (B,) float64 g/cm³"""
    mass = np.bincount(
        crystals.batch.numpy(force=True),
        weights=_masses()[crystals.atomic_numbers.numpy(force=True)],
        minlength=len(crystals),
    )
    with np.errstate(divide="ignore"):
        return mass * _GRAMS / (crystals.volume.double().numpy(force=True) * _CM3)


def num_elements(crystals: Crystals) -> np.ndarray:
    """How many elements each crystal has. (B,) int64"""
    pairs = crystals.batch * 119 + crystals.atomic_numbers
    return np.bincount(torch.unique(pairs).numpy(force=True) // 119, minlength=len(crystals))


@lru_cache(maxsize=1)
def _masses() -> np.ndarray:
    """By atomic number; the peers' densities are pymatgen's. (119,) u"""
    from pymatgen.core import Element

    return np.array([0.0, *(float(Element.from_Z(z).atomic_mass) for z in range(1, 119))])
