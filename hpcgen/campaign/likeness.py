"""How like the crystals of a reference those of a run are: CDVAE's figures, bonds, elements and symmetry."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcgen.campaign.describe import SYMPREC, Side
from hpcgen.crystal.composition import SYMBOLS
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.magpie import magpie_features
from hpcgen.metrics.bonds import Lengths, bonds, element_divergence, lengths_apart
from hpcgen.metrics.bootstrap import mean, share
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
from hpcgen.metrics.space_groups import symmetry_figures
from hpcgen.store.read import Store

TOGETHER = 4096  # crystals in memory at a time
KNOWN = 10_000  # crystals of the reference whose bonds are measured, at most
TOLD = 10  # pairs of elements of which the distance of lengths is told, those with most bonds


@dataclass(frozen=True)
class Likeness:
    """What is asked: `samples` of the valid crystals, drawn with `seed`, for all but the coverage."""

    run: Side
    reference: Side
    cut_offs: str = "mp20"
    samples: int = 1000
    seed: int = 0

    def figures(self, folder: Path, valid: np.ndarray, asked: int) -> dict[str, Any]:
        """folder: of the files that describe both; valid (N,) bool: of the run's crystals; asked: crystals."""
        ours, theirs = self.run.read(folder), self.reference.read(folder)
        own, known = ours.fingerprints, theirs.fingerprints
        there, there_known = (np.isfinite(values[:, 0]) for values in (own, known))
        sample = chosen(np.flatnonzero(valid & there), self.samples, self.seed)
        sampled, whole = _Collected(), _Collected()

        def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for start, crystals in _crystals(self.run):
                features, rows = _scaled(crystals), slice(start, start + len(crystals))
                here = sample[(sample >= start) & (sample < rows.stop)] - start
                sampled.add(crystals, features, here, here)
                has = there[rows]
                yield own[rows][has], features[has]

        measured = chosen(np.arange(self.reference.count), KNOWN, self.seed)
        for start, crystals in _crystals(self.reference):
            rows = (measured >= start) & (measured < start + len(crystals))
            whole.add(crystals, _scaled(crystals), np.arange(len(crystals)), measured[rows] - start)
        beside = (known[there_known], whole.features[there_known])
        told = coverage(parts(), beside, asked, CUT_OFFS[self.cut_offs], self.seed)
        told["valid"] = share(int((valid & there).sum()), asked, self.seed)
        told["without_fingerprint"] = {"run": int((~there).sum()), "reference": int((~there_known).sum())}
        lengths = lengths_apart(sampled.lengths, whole.lengths)
        most = sorted(lengths, key=lambda pair: (-lengths[pair][1], pair))[:TOLD]
        return {
            "energy": {"potential": self.run.potential} | mean(ours.energies, self.seed),
            "coverage": told | {"reference": int(there_known.sum())},
            "wasserstein": {
                "density": earth_movers(sampled.density, whole.density),
                "num_elements": earth_movers(sampled.num_elements, whole.num_elements),
                "energy": earth_movers(_finite(ours.energies[sample]), _finite(theirs.energies)),
                "bond_lengths": _weighed([lengths[pair][:2] for pair in lengths]),
                "of_pairs": {_named(pair): lengths[pair][0] for pair in most},
            },
            "element_divergence": element_divergence(sampled.elements, whole.elements),
            "symmetry": {"symprec": SYMPREC} | symmetry_figures(ours.space_groups, theirs.space_groups, self.seed),
            "diversity": {
                "structure": diversity(own[sample], self.seed),
                "composition": diversity(sampled.features, self.seed),
            },
            "samples": {
                "taken": len(sample),
                "asked": self.samples,
                "short": len(sample) < self.samples,
                "seed": self.seed,
            },
        }


class _Collected:
    """Properties of crystals that come in parts."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.lengths = Lengths()
        self.elements = np.zeros(118, dtype=np.int64)  # atoms of each

    def add(self, crystals: Crystals, features: np.ndarray, which: np.ndarray, bonded: np.ndarray) -> None:
        """which: crystals that count; bonded: those whose bonds are measured."""
        self._parts.append((density(crystals)[which], num_elements(crystals)[which], features[which]))
        if len(which):
            self.elements += np.bincount(crystals[torch.from_numpy(which)].atomic_numbers, minlength=119)[1:]
        if len(bonded):
            self.lengths.add(bonds(crystals[torch.from_numpy(bonded)]))

    @property
    def density(self) -> np.ndarray:
        return np.concatenate([part[0] for part in self._parts])

    @property
    def num_elements(self) -> np.ndarray:
        return np.concatenate([part[1] for part in self._parts])

    @property
    def features(self) -> np.ndarray:
        return np.concatenate([part[2] for part in self._parts])


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _weighed(lengths: list[tuple[float, int]]) -> float | None:
    """Mean of distances, each counted as often as the run has such bonds."""
    if not lengths:
        return None
    distances, weights = np.array(lengths).T
    return float(np.average(distances, weights=weights))


def _named(pair: tuple[int, int]) -> str:
    return "-".join(SYMBOLS[number] for number in pair)


def _crystals(side: Side) -> Iterator[tuple[int, Crystals]]:
    store = Store(side.store, side.split, dtype=None, columns=[])
    for start in range(0, side.count, TOGETHER):
        yield start, store.rows(range(start, min(start + TOGETHER, side.count))).crystals


def _scaled(crystals: Crystals) -> np.ndarray:
    return scaled(magpie_features(crystals.atomic_numbers.numpy(), crystals.num_atoms.numpy()))
