"""How alike two crystals are, from 0 to 1: a Tanimoto coefficient for periodic systems.

The fingerprint of a crystal counts, per atom and for each pair of elements, the neighbours at each distance, own images
included: it is the same for every choice of cell, origin and order of sites. Distances are in units of (V/N)^(1/3), as
StructureMatcher has them, up to REACH; a neighbour at distance r counts (1 + cos(π r / REACH)) / 2, divided between the
two nearest of the bins, so that the fingerprint moves smoothly with the atoms. Of two fingerprints a and b
    T(a, b) = a·b / (a·a + b·b − a·b)
(Willett, Barnard and Downs, J. Chem. Inf. Comput. Sci. 38, 983, 1998): 1 for equal ones, 0 without a pair of elements
in common at a common distance.
"""

import numpy as np
import torch
from scipy.sparse import csr_array, vstack

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import FLAT
from hpcgen.crystal.neighbours import edge_distances, radius_edges

REACH = 3.0  # (V/N)^(1/3); some 113 neighbours
BINS = 20
_ELEMENTS = 119
_TOGETHER = 1024  # crystals at a time, some 100 MB of edges
_ROWS = 64  # compared at a time with all others


def fingerprints(crystals: Crystals) -> csr_array:
    """One row each (B, F), empty for a crystal whose neighbours cannot be counted: not finite, or flat."""
    parts = [_fingerprints(crystals[start : start + _TOGETHER]) for start in range(0, len(crystals), _TOGETHER)]
    return csr_array(vstack(parts)) if parts else csr_array((0, _ELEMENTS**2 * BINS))


def _fingerprints(crystals: Crystals) -> csr_array:
    plain = crystals.to("cpu", torch.float64)
    good = _measurable(plain).nonzero().flatten()
    some = plain[good]
    unit = (some.volume / some.num_atoms).pow(1 / 3)
    scaled = Crystals(some.frac_coords, some.lattice / unit[:, None, None], some.atomic_numbers, some.num_atoms)
    edges = radius_edges(scaled, REACH)
    far = edge_distances(scaled, edges).numpy()
    first, second = (scaled.atomic_numbers[side].numpy() for side in edges.index)
    crystal = scaled.batch[edges.index[0]].numpy()
    weight = (1 + np.cos(np.pi * far / REACH)) / 2 / some.num_atoms.numpy()[crystal]
    low, share = np.divmod(far / REACH * (BINS - 1), 1.0)
    pair = (np.minimum(first, second) * _ELEMENTS + np.maximum(first, second)) * BINS + low.astype(np.int64)
    values = np.concatenate([weight * (1 - share), weight * share])
    places = np.tile(good.numpy()[crystal], 2), np.concatenate([pair, pair + 1])
    made = csr_array((values, places), shape=(len(crystals), _ELEMENTS**2 * BINS))
    made.sum_duplicates()
    return made


def _measurable(crystals: Crystals) -> torch.Tensor:
    """(B,) bool."""
    size = torch.linalg.vector_norm(crystals.lattice, dim=-1).prod(-1)
    good = (crystals.volume > 2 * FLAT * size) & size.isfinite()
    atoms = crystals.frac_coords.isfinite().all(-1)
    good[crystals.batch[~atoms]] = False
    return good


def tanimoto(one: csr_array, other: csr_array) -> np.ndarray:
    """T of every pair of rows. (B, F), (C, F) -> (B, C); 0 for an empty row."""
    product = (one @ other.T).toarray()
    total = squares(one)[:, None] + squares(other) - product
    return np.divide(product, total, out=np.zeros_like(product), where=total > 0)


def nearest(one: csr_array, other: csr_array) -> tuple[np.ndarray, np.ndarray]:
    """For each row the row of `other` that is most alike, the first of equals, and T. (B, F), (C, F) -> (B,), (B,).

    NaN for an empty row. Only products of fingerprints that share an entry are made.
    """
    place, best = np.zeros(one.shape[0], dtype=np.int64), np.full(one.shape[0], np.nan)
    size, known, turned = squares(one), squares(other), csr_array(other.T)
    best[size > 0] = 0.0
    for start in range(0, one.shape[0], _ROWS):
        product = one[start : start + _ROWS] @ turned
        row = start + np.repeat(np.arange(product.shape[0]), np.diff(product.indptr))
        alike = product.data / (size[row] + known[product.indices] - product.data)
        np.maximum.at(best, row, alike)
        first = np.flatnonzero(alike == best[row])
        place[row[first]] = other.shape[0]
        np.minimum.at(place, row[first], product.indices[first])
    return place, best


def squares(rows: csr_array) -> np.ndarray:
    """(B, F) -> (B,) lengths squared."""
    return np.asarray(rows.multiply(rows).sum(axis=1)).ravel()
