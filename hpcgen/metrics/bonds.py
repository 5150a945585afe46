"""Bonds of crystals against a table of lengths, and how their lengths spread beside those of known crystals.

A bond is a pair of atoms, images included, at most STRETCHED times as far apart as the sum of their covalent radii
(Cordero et al., Dalton Trans. 2832, 2008, as ASE has them), which is the table. It is sound if it is at least SQUEEZED
times that sum long. An atom without any bond is a fault of its own.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import edge_distances, radius_edges
from hpcgen.metrics.coverage import earth_movers
from hpcgen.metrics.validity import covalent_radii

STRETCHED, SQUEEZED = 1.3, 0.75
LEAST = 10  # bonds of a pair of elements, in either set, for their lengths to be compared


@dataclass(frozen=True)
class Bonds:
    """Each bond of B crystals once."""

    crystal: np.ndarray  # (E,)
    elements: np.ndarray  # (E, 2) atomic numbers, the smaller first
    length: np.ndarray  # (E,) Å
    sound: np.ndarray  # (E,) bool
    lonely: np.ndarray  # (B,) atoms without a bond

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Bonds of each crystal, and how many of them are sound. (B,), (B,)"""
        many = len(self.lonely)
        return np.bincount(self.crystal, minlength=many), np.bincount(self.crystal[self.sound], minlength=many)


def bonds(crystals: Crystals) -> Bonds:
    """Of crystals with finite coordinates and cells of some volume."""
    plain = crystals.to("cpu", torch.float64)
    radii = covalent_radii()[plain.atomic_numbers]
    edges = radius_edges(plain, 2 * STRETCHED * float(radii.max()))
    length, (i, j) = edge_distances(plain, edges), edges.index
    table = radii[i] + radii[j]
    near = length <= STRETCHED * table
    bonded = torch.bincount(i[near], minlength=len(plain.batch)) > 0
    lonely = torch.bincount(plain.batch[~bonded], minlength=len(plain))
    first = edges.image != 0
    onward = edges.image.gather(1, first.int().argmax(1, keepdim=True))[:, 0] > 0  # of an edge and its reverse one is
    once = near & ((i < j) | ((i == j) & onward))
    numbers = torch.stack([plain.atomic_numbers[i[once]], plain.atomic_numbers[j[once]]], 1).sort(1).values
    return Bonds(
        plain.batch[i[once]].numpy(),
        numbers.numpy(),
        length[once].numpy(),
        (length >= SQUEEZED * table)[once].numpy(),
        lonely.numpy(),
    )


class Lengths:
    """Bond lengths by pair of elements, of crystals that come in parts."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)

    def add(self, found: Bonds) -> None:
        """All bonds of a part."""
        key = found.elements[:, 0] * 119 + found.elements[:, 1]
        order = np.argsort(key, kind="stable")
        keys, starts = np.unique(key[order], return_index=True)
        for pair, lengths in zip(keys.tolist(), np.split(found.length[order], starts[1:]), strict=True):
            self._parts[divmod(pair, 119)].append(lengths)

    def of(self) -> dict[tuple[int, int], np.ndarray]:
        """Lengths of each pair of elements, in Å."""
        return {pair: np.concatenate(parts) for pair, parts in sorted(self._parts.items())}


def lengths_apart(own: Lengths, known: Lengths) -> dict[tuple[int, int], tuple[float, int, int]]:
    """Wasserstein distance in Å of the lengths, and the bonds on both sides, of pairs with LEAST bonds on each."""
    ours, theirs = own.of(), known.of()
    return {
        pair: (earth_movers(ours[pair], theirs[pair]) or 0.0, len(ours[pair]), len(theirs[pair]))
        for pair in ours.keys() & theirs.keys()
        if min(len(ours[pair]), len(theirs[pair])) >= LEAST
    }


def element_divergence(own: Iterable[int], known: Iterable[int]) -> float:
    """Kullback–Leibler divergence of the elements of one set from those of another: Σ p ln(p / q), in nats.

    own, known: atoms of elements 1, 2, … 118. Half an atom is added to each element on both sides, so that one
    that the other set lacks makes it large, not infinite.
    """
    p, q = (np.fromiter(side, dtype=np.float64) + 0.5 for side in (own, known))
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())
