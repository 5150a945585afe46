"""The crystals of a store as distributions: all of them in one pass at flat memory, and a sample looked at closely."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpcgen.crystal.composition import SYMBOLS
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import lattice_parameters, niggli_reduce
from hpcgen.crystal.neighbours import edge_distances, radius_edges
from hpcgen.crystal.symmetry import space_group_number
from hpcgen.metrics.validity import covalent_radii, validity
from hpcgen.report.spread import Spread
from hpcgen.report.summary import SPACE_GROUP, Summary
from hpcgen.store.layout import read_manifest
from hpcgen.store.read import Store

log = logging.getLogger(__name__)
SYMPREC = 0.1  # Å, of the space groups on the page
BOND = 1.15  # atoms closer than this times the sum of their covalent radii are bonded
CELL = ("a", "b", "c", "alpha", "beta", "gamma")
_NOT_DRAWN = {"index", SPACE_GROUP}  # the place in a campaign; space groups are found anew, by one measure for all
_TOGETHER = 256  # crystals of the sample measured at a time
_CACHE = 64 << 20  # bytes


@dataclass
class Close:
    """What a sample of crystals shows only when each is looked at."""

    count: int = 0
    of: int = 0  # crystals it was drawn from
    seed: int = 0
    cell: dict[str, Spread] = field(default_factory=lambda: {name: Spread() for name in CELL})  # Niggli: Å, degrees
    in_space_group: np.ndarray = field(default_factory=lambda: np.zeros(231, dtype=np.int64))  # 0: none found
    bonds: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (E,) Å
    reach: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (E,) lengths over the sum of covalent radii
    pair: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # (E,) 119 z + z', z <= z'

    def in_words(self) -> str:
        """How the sample was taken."""
        if self.count == self.of:
            return f"all {self.of:,} crystals"
        return f"{self.count:,} of {self.of:,} crystals, drawn at random with seed {self.seed}"


@dataclass(frozen=True)
class Gathered:
    """One store of the page: a run or the reference."""

    name: str
    all: Summary
    close: Close


def gather(path: Path, name: str, split: str | None, count: int, seed: int) -> Gathered:
    """Everything that is drawn of a store. Raises InputError for a broken one, or one without crystals."""
    columns = [
        column
        for column, spec in read_manifest(path).head.columns.items()
        if spec.kind in ("float", "int") and column not in _NOT_DRAWN
    ]
    store = Store(path, split, dtype=None, columns=columns, cache_bytes=_CACHE)
    log.info("%s: counting %s crystals", name, f"{len(store):,}")
    everything = Summary.of(store.iter_rows())
    log.info("%s: looking at %s of them closely", name, f"{min(count, len(store)):,}")
    return Gathered(name, everything, look_closely(store, count, seed))


def drawn(size: int, count: int, seed: int) -> np.ndarray:
    """Places of a sample in a store of `size` crystals, ascending. A function of `seed`. (min(count, size),)."""
    if count >= size:
        return np.arange(size)
    return np.sort(np.random.Generator(np.random.Philox(seed)).choice(size, count, replace=False))


def look_closely(store: Store, count: int, seed: int) -> Close:
    """Cells, space groups and bonds of a sample; what cannot be measured is left out of the one concerned."""
    found = Close(min(count, len(store)), len(store), seed)
    bonds: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for crystals in _parts(store, drawn(len(store), count, seed)):
        _add_cells(found, crystals)
        for k in range(len(crystals)):
            found.in_space_group[space_group_number(crystals[k], SYMPREC)] += 1
        apart = torch.from_numpy(np.flatnonzero(validity(crystals).distances))
        if len(apart):
            bonds.append(bonds_of(crystals[apart]))
    if bonds:
        found.bonds, found.reach, found.pair = (np.concatenate(part) for part in zip(*bonds, strict=True))
    return found


def _parts(store: Store, places: np.ndarray) -> Iterator[Crystals]:
    for start in range(0, len(places), _TOGETHER):
        yield store.rows(places[start : start + _TOGETHER]).crystals.to(dtype=torch.float64)


def _add_cells(found: Close, crystals: Crystals) -> None:
    lengths, angles = lattice_parameters(_niggli(crystals.lattice))
    for name, values in zip(CELL, torch.cat([lengths, angles], 1).T.numpy(), strict=True):
        found.cell[name].add(values)


def _niggli(lattice: Tensor) -> Tensor:
    """Niggli cells of those that have one. (B, 3, 3) -> (b, 3, 3), b <= B."""
    try:
        return niggli_reduce(lattice)[0]
    except ValueError:
        if len(lattice) == 1:
            return lattice[:0]
        half = len(lattice) // 2
        return torch.cat([_niggli(lattice[:half]), _niggli(lattice[half:])])


def bonds_of(crystals: Crystals) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every bond once: length in Å, over the sum of radii, and pair of elements. Three times (E,)."""
    radius = covalent_radii()[crystals.atomic_numbers]
    edges = radius_edges(crystals, BOND * 2 * float(radius.max()))
    i, j = edges.index
    lengths, both = edge_distances(crystals, edges), radius[i] + radius[j]
    once = (i < j) | ((i == j) & _first_of_two(edges.image))
    bonded = (lengths < BOND * both) & once
    numbers = crystals.atomic_numbers
    low, high = torch.minimum(numbers[i], numbers[j]), torch.maximum(numbers[i], numbers[j])
    pair = low * len(SYMBOLS) + high
    return lengths[bonded].numpy(), (lengths / both)[bonded].numpy(), pair[bonded].numpy()


def _first_of_two(image: Tensor) -> Tensor:
    """Whether of an image and its opposite this is the one that counts. (E, 3) -> (E,) bool."""
    x, y, z = image.unbind(-1)
    return (x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))


def pair_name(pair: int) -> str:
    """O–Fe of 119 · 8 + 26."""
    low, high = divmod(pair, len(SYMBOLS))
    return f"{SYMBOLS[low]}–{SYMBOLS[high]}"
