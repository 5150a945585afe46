"""Charge neutrality by bond valence: can every site be given an oxidation state that its bonds bear out?

Two unlike elements, one of them electronegative, at a distance of d Å have the bond valence exp((R − 1.015 d) / 0.31),
R being of the elements (O'Keeffe and Brese, J. Am. Chem. Soc. 113, 3226, 1991) and 1.015 for cells of PBE, which are
too large. The sum over the neighbours within 4 Å, positive at the less electronegative one, says how likely each
oxidation state of the site is, by the sums of the sites of that state in the ICSD. A crystal is neutral if each site
can have a state, at least a hundredth as likely as its likeliest one, such that the charges sum to zero and those of
one element differ by 1 at most.

This is the verdict of pymatgen's BVAnalyzer with symm_tol=0, whose tables these are. BVAnalyzer tries combinations of
states, up to 100,000, for seconds where there is no good one; here the sums of charge are counted up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from hpcgen.crystal.composition import ATOMIC_NUMBERS
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import edge_distances, radius_edges

REACH = 4.0  # Å
SCALE = 1.015  # of distances
SOFTNESS = 0.31  # Å, b of the bond valence
LEAST = 0.01  # of the likeliest state, for one to be thought of
LOWEST, HIGHEST = -5, 9  # oxidation states: one beyond those in the table on both sides


def neutral(crystals: Crystals) -> np.ndarray:
    """Of crystals with finite coordinates and cells of some volume, no atoms being together. (B,) 1, 0 or nan.

    nan where bond valence says nothing: an element without parameters, metals alone, one element alone.
    """
    plain = crystals.to("cpu", torch.float64)
    numbers, crystal, table = plain.atomic_numbers.numpy(), plain.batch.numpy(), _table()
    likely = _likely(numbers, _sums(plain))
    totals: list[set[int]] = [{0} for _ in range(len(plain))]
    for at, own in _charges(crystal * 119 + numbers, likely):
        totals[at // 119] = {total + charge for total in totals[at // 119] for charge in own}
    holds = np.zeros((len(plain), 119), dtype=bool)
    holds[crystal, numbers] = True
    told = (holds.sum(1) > 1) & holds[:, table.electronegative].any(1) & ~holds[:, np.isnan(table.r)].any(1)
    return np.where(told, [float(0 in some) for some in totals], np.nan)


def _sums(crystals: Crystals) -> np.ndarray:
    """Bond valence sum of each site, nan beside an element without parameters. (A,)"""
    table, edges = _table(), radius_edges(crystals, REACH)
    one, other = (crystals.atomic_numbers[side].numpy() for side in edges.index)
    bond = (one != other) & (table.electronegative[one] | table.electronegative[other])
    one, other = one[bond], other[bond]
    r1, r2, c1, c2 = table.r[one], table.r[other], table.c[one], table.c[other]
    length = r1 + r2 - r1 * r2 * np.square(np.sqrt(c1) - np.sqrt(c2)) / (c1 * r1 + c2 * r2)
    valence = np.exp((length - SCALE * edge_distances(crystals, edges).numpy()[bond]) / SOFTNESS)
    sign = np.where(table.electronegativity[one] < table.electronegativity[other], 1.0, -1.0)
    return np.bincount(edges.index[0].numpy()[bond], weights=sign * valence, minlength=len(crystals.batch))


def _likely(numbers: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Which states LOWEST to HIGHEST each site may have. (A,), (A,) -> (A, S) bool"""
    table = _table()
    off = (sums[:, None] - table.mean[numbers]) / table.deviation[numbers]
    chance = np.exp(-np.square(off) / 2) * table.weight[numbers]
    return chance > LEAST * chance.max(1, keepdims=True)


def _charges(kind: np.ndarray, likely: np.ndarray) -> Iterator[tuple[int, set[int]]]:
    """Each kind of site, which is one element of one crystal, and the charges that its sites can add up to.

    kind (A,); likely (A, S) bool. All have one state, or each one of two neighbouring ones.
    """
    order = np.argsort(kind, kind="stable")
    kinds, start, many = np.unique(kind[order], return_index=True, return_counts=True)
    lower, upper = likely[order, :-1], likely[order, 1:]
    able, forced, either = (
        np.add.reduceat(mask.astype(np.int64), start) for mask in (upper, upper & ~lower, upper | lower)
    )  # (K, S - 1) each
    found: dict[int, set[int]] = {at: set() for at in range(len(kinds))}
    for at, state in zip(*np.nonzero(either == many[:, None]), strict=True):
        least = (LOWEST + state) * many[at]
        found[at] |= set(range(least + forced[at, state], least + able[at, state] + 1))
    yield from zip(kinds.tolist(), found.values(), strict=True)


@dataclass(frozen=True)
class _Table:
    """By atomic number; nan and 0 where there is no value."""

    r: np.ndarray  # (119,) Å, and the next: parameters of O'Keeffe and Brese
    c: np.ndarray  # (119,)
    electronegativity: np.ndarray  # (119,) Pauling
    electronegative: np.ndarray  # (119,) bool: those of O'Keeffe and Brese
    mean: np.ndarray  # (119, S) bond valence sums of the sites of a state in the ICSD, and the next
    deviation: np.ndarray  # (119, S)
    weight: np.ndarray  # (119, S) how often the state is found there, over the deviation


@lru_cache(maxsize=1)
def _table() -> _Table:
    from pymatgen.analysis.bond_valence import BV_PARAMS, ELECTRONEG, ICSD_BV_DATA, PRIOR_PROB

    r, c, strength = (np.full(119, np.nan) for _ in range(3))
    for element, known in BV_PARAMS.items():
        r[element.Z], c[element.Z], strength[element.Z] = known["r"], known["c"], element.X
    electronegative = np.zeros(119, dtype=bool)
    electronegative[[element.Z for element in ELECTRONEG]] = True
    mean, weight = (np.zeros((119, HIGHEST - LOWEST + 1)) for _ in range(2))
    deviation = np.ones_like(mean)
    for species, known in ICSD_BV_DATA.items():
        if species.oxi_state and known["std"] > 0:
            at = ATOMIC_NUMBERS[species.symbol], int(species.oxi_state) - LOWEST
            mean[at], deviation[at], weight[at] = known["mean"], known["std"], PRIOR_PROB[species] / known["std"]
    return _Table(r, c, strength, electronegative, mean, deviation, weight)
