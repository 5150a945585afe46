"""Pass 2 of building a store: what is compared, what of it is kept, and which split each crystal goes to.

Only which row of a repeated id is kept depends on the order of the source, and nothing depends on ranks: candidates
share exact keys (the formula and the number of sites of the reduced cell), every pair of them is compared, and
stability and id decide what is kept. Imports no torch.
"""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcgen.store.layout import ColumnSpec
from hpcgen.store.staging import KEYS, read_keys_of

PLACE = {"place": ColumnSpec("int")}  # in the staging file, of a reduced crystal


@dataclass(frozen=True)
class Keys:
    """What pass 2 knows of each of N parsed crystals, in source order."""

    block: np.ndarray  # (N,) staging file
    at: np.ndarray  # (N,) place in it
    row: np.ndarray  # (N,) row of the source
    ids: np.ndarray  # (N,) str
    formula: np.ndarray  # (N,) str, equal for equal reduced formulas only
    space_group: np.ndarray  # (N,) 0 where none was determined
    source_split: np.ndarray  # (N,) str, '' where the source brings none
    e_above_hull: np.ndarray  # (N,) eV/atom, inf where unknown

    def __len__(self) -> int:
        return len(self.ids)


def read_keys(staged: Sequence[Path], columns: Mapping[str, ColumnSpec]) -> Keys:
    """Keys of the crystals in all staging files, which hold `columns`."""
    wanted = [*KEYS, *(name for name in ("space_group", "e_above_hull") if name in columns)]
    parts = []
    for number, path in enumerate(staged):
        arrays = read_keys_of(path, {name: columns[name] for name in wanted})
        count = len(arrays["ptr"]) - 1
        text = {name: np.array([word.decode() for word in arrays[f"columns/{name}"].tolist()], dtype=object)
                for name in ("key.id", "key.formula", "key.split")}  # fmt: skip
        group = arrays.get("columns/space_group", np.zeros(count, dtype=np.int64))
        hull = arrays.get("columns/e_above_hull", np.full(count, np.nan))
        parts.append((np.full(count, number), np.arange(count), arrays["columns/key.row"], text["key.id"],
                      text["key.formula"], group, text["key.split"], np.nan_to_num(hull, nan=np.inf)))  # fmt: skip
    return Keys(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def repeated_ids(keys: Keys) -> np.ndarray:
    """Mask of crystals whose id stood in an earlier row: the one thing that depends on their order. (N,) bool."""
    _, first = np.unique(keys.ids.astype(str), return_index=True)
    repeated = np.ones(len(keys), dtype=bool)
    repeated[first] = False
    return repeated


def with_siblings(keys: Keys) -> np.ndarray:
    """Mask of crystals that share their formula with another one and whose id is their own. (N,) bool."""
    usable = ~repeated_ids(keys)
    _, formula = np.unique(keys.formula.astype(str), return_inverse=True)
    return usable & (np.bincount(formula, weights=usable)[formula] > 1)


def save_candidate_pairs(path: Path, keys: Keys, sites: np.ndarray) -> None:
    """Write every pair with equal formulas and numbers of reduced sites (N,), 0 for none, the smaller id first.

    .npy (P, 4) int32: block and place of one crystal, block and place of the other. Memory does not grow with P.
    """
    index = np.flatnonzero(sites > 0)
    ids, formula = keys.ids[index].astype(str), keys.formula[index].astype(str)
    order = np.lexsort((ids, sites[index], formula))
    index, formula = index[order], formula[order]
    differs = (formula[1:] != formula[:-1]) | (sites[index][1:] != sites[index][:-1])
    bounds = [0, *(np.flatnonzero(differs) + 1).tolist(), len(index)]
    sizes = np.diff(bounds)
    shape = (int((sizes * (sizes - 1) // 2).sum()), 4)
    if shape[0] == 0:
        with path.open("wb") as file:
            np.save(file, np.zeros(shape, dtype=np.int32))
        return
    pairs = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=shape)
    name = np.stack([keys.block[index], keys.at[index]], axis=1).astype(np.int32)
    done = 0
    for first, end in itertools.pairwise(bounds):
        for one in range(first, end - 1):
            rest = end - one - 1
            pairs[done : done + rest, :2] = name[one]
            pairs[done : done + rest, 2:] = name[one + 1 : end]
            done += rest
    pairs.flush()


def pairs_per_block(count: int) -> int:
    """How many of `count` pairs are compared as one block: enough blocks for many ranks, few enough files."""
    return min(max(count // 512, 64), 65536)


def reduced_sites(keys: Keys, reduced: Sequence[Path]) -> np.ndarray:
    """Number of sites of each crystal's reduced cell, 0 where it has none. (N,) int64."""
    sites = np.zeros(len(keys), dtype=np.int64)
    for number, path in enumerate(reduced):
        arrays = read_keys_of(path, PLACE)
        sites[np.searchsorted(keys.block, number) + arrays["columns/place"]] = np.diff(arrays["ptr"])
    return sites


def precedence(keys: Keys) -> np.ndarray:
    """Indices of all crystals, the one to be kept of two equal ones first: lower e_above_hull, then id. (N,)."""
    return np.lexsort((keys.ids.astype(str), keys.e_above_hull))


def representatives(keys: Keys, matches: np.ndarray) -> np.ndarray:
    """For each crystal one that stands for it: itself, or one of its split that it matches and that is kept. (N,).

    In order of precedence, a crystal is kept unless it matches one that is. matches: pairs of indices (M, 2).
    """
    rank = np.empty(len(keys), dtype=np.int64)
    rank[precedence(keys)] = np.arange(len(keys))
    earlier = defaultdict(list)  # of each crystal: the matching ones that go before it
    for one, other in matches.tolist():
        if keys.source_split[one] == keys.source_split[other]:
            first, second = (one, other) if rank[one] < rank[other] else (other, one)
            earlier[second].append(first)
    stands = np.arange(len(keys))
    for crystal in sorted(earlier, key=rank.__getitem__):
        kept = [other for other in earlier[crystal] if stands[other] == other]
        if kept:
            stands[crystal] = min(kept, key=rank.__getitem__)
    return stands


def groups(keys: Keys, joins: np.ndarray) -> np.ndarray:
    """Of each crystal the first by precedence among those that must be on its side of the split. (N,) indices.

    joins: (M, 2) pairs of indices. Crystals of one row of the source (orderings of one structure) are joined too.
    """
    parent = list(range(len(keys)))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    same_row = np.flatnonzero(keys.row[1:] == keys.row[:-1])
    for one, other in [*joins.tolist(), *((i, i + 1) for i in same_row.tolist())]:
        parent[root(one)] = root(other)
    head: dict[int, int] = {}
    for crystal in precedence(keys).tolist():
        head.setdefault(root(crystal), crystal)
    return np.array([head[root(crystal)] for crystal in range(len(keys))], dtype=np.int64)


def stratified(keys: Keys, group: np.ndarray, kept: np.ndarray, shares: dict[str, float], seed: int) -> np.ndarray:
    """A split for each kept crystal: groups stay together, each space group is divided as the shares say. (K,) str.

    group: (N,) as `groups` gives it; kept: (K,) indices. Groups, ordered by space group and within it at random (a
    hash of seed and id), are dealt out one by one to the split that is furthest behind its share of the crystals.
    """
    size = Counter(group[kept].tolist())
    order = sorted(
        size, key=lambda head: (int(keys.space_group[head]), _hash(seed, str(keys.ids[head])), str(keys.ids[head]))
    )
    names, wanted = list(shares), np.array(list(shares.values()))
    given, dealt, chosen = np.zeros(len(names)), 0, {}
    for head in order:
        dealt += size[head]
        furthest = int(np.argmax(np.round(wanted * dealt - given, 9)))
        given[furthest] += size[head]
        chosen[head] = names[furthest]
    return np.array([chosen[head] for head in group[kept].tolist()], dtype=object)


def _hash(seed: int, word: str) -> bytes:
    return hashlib.blake2b(f"{seed}\0{word}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
