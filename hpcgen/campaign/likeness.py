"""How like the crystals of a reference those of a run are, from their fingerprints: CDVAE's figures."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcgen.campaign.fingerprint import Side
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.magpie import magpie_features
from hpcgen.metrics.coverage import (
    CUT_OFFS,
    chosen,
    coverage,
    density,
    diversity,
    earth_movers,
    num_elements,
    scaled,
)
from hpcgen.store.read import Store

TOGETHER = 4096  # crystals in memory at a time


@dataclass(frozen=True)
class Likeness:
    """What is asked: `samples` of the valid crystals, drawn with `seed`, for all but the coverage."""

    run: Side
    reference: Side
    cut_offs: str = "mp20"
    samples: int = 1000
    seed: int = 0

    def figures(self, folder: Path, valid: np.ndarray, asked: int) -> dict[str, Any]:
        """folder: of the files of fingerprints; valid (N,) bool: of the run's crystals; asked: crystals."""
        own, known = self.run.read(folder), self.reference.read(folder)
        there, there_known = (np.isfinite(values[:, 0]) for values in (own, known))
        sample = chosen(np.flatnonzero(valid & there), self.samples, self.seed)
        sampled, whole = _Collected(), _Collected()

        def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for start, crystals in _crystals(self.run):
                features, rows = _scaled(crystals), slice(start, start + len(crystals))
                sampled.add(crystals, features, sample[(sample >= start) & (sample < rows.stop)] - start)
                has = there[rows]
                yield own[rows][has], features[has]

        for _, crystals in _crystals(self.reference):
            whole.add(crystals, _scaled(crystals), np.arange(len(crystals)))
        beside = (known[there_known], whole.features[there_known])
        told = coverage(parts(), beside, asked, CUT_OFFS[self.cut_offs])
        told["without_fingerprint"] = {"run": int((~there).sum()), "reference": int((~there_known).sum())}
        return {
            "coverage": told | {"reference": int(there_known.sum())},
            "wasserstein": {
                "density": earth_movers(sampled.density, whole.density),
                "num_elements": earth_movers(sampled.num_elements, whole.num_elements),
            },
            "diversity": {"structure": diversity(own[sample]), "composition": diversity(sampled.features)},
            "samples": {"taken": len(sample), "asked": self.samples, "seed": self.seed},
        }


class _Collected:
    """Properties of crystals that come in parts."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, crystals: Crystals, features: np.ndarray, which: np.ndarray) -> None:
        self._parts.append((density(crystals)[which], num_elements(crystals)[which], features[which]))

    @property
    def density(self) -> np.ndarray:
        return np.concatenate([part[0] for part in self._parts])

    @property
    def num_elements(self) -> np.ndarray:
        return np.concatenate([part[1] for part in self._parts])

    @property
    def features(self) -> np.ndarray:
        return np.concatenate([part[2] for part in self._parts])


def _crystals(side: Side) -> Iterator[tuple[int, Crystals]]:
    store = Store(side.store, side.split, dtype=None, columns=[])
    for start in range(0, side.count, TOGETHER):
        yield start, store.rows(range(start, min(start + TOGETHER, side.count))).crystals


def _scaled(crystals: Crystals) -> np.ndarray:
    return scaled(magpie_features(crystals.atomic_numbers.numpy(), crystals.num_atoms.numpy()))
