"""The plan that pass 2 makes: which parsed crystals are kept, in which split and in which shard."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpcgen.errors import InputError
from hpcgen.store.keys import (
    Keys,
    groups,
    read_keys,
    reduced_sites,
    repeated_ids,
    representatives,
    save_candidate_pairs,
    stratified,
    with_siblings,
)
from hpcgen.store.layout import SPLITS, ColumnSpec, shard_name
from hpcgen.store.settings import BuildSettings
from hpcgen.store.staging import Refusal, read_refusals


@dataclass(frozen=True)
class Compared:
    """Files of the search for duplicates; none where it is not asked for."""

    reduced: tuple[Path, ...] = ()
    pairs: Path | None = None
    matched: tuple[Path, ...] = ()


def save_siblings(draft: Path, staged: Sequence[Path], columns: Mapping[str, ColumnSpec]) -> None:
    """Which crystals must be compared with others at all, and where each staging file begins, as .npz."""
    keys = read_keys(staged, columns)
    first = np.searchsorted(keys.block, np.arange(len(staged) + 1))
    with draft.open("wb") as file:
        np.savez(file, mask=with_siblings(keys), first=first)


def save_pairs(draft: Path, staged: Sequence[Path], columns: Mapping[str, ColumnSpec], reduced: Sequence[Path]) -> None:
    """All pairs to compare."""
    keys = read_keys(staged, columns)
    save_candidate_pairs(draft, keys, reduced_sites(keys, reduced))


def save_plan(
    draft: Path,
    staged: Sequence[Path],
    columns: Mapping[str, ColumnSpec],
    settings: BuildSettings,
    compared: Compared,
) -> None:
    """What is kept, in which split, and what is refused as a duplicate, as .npz."""
    keys = read_keys(staged, columns)
    if settings.split != "source":
        keys = replace(keys, source_split=np.full(len(keys), "", dtype=object))
    repeated = repeated_ids(keys)
    matches, doubtful = _pairs(compared, keys, "matched"), _pairs(compared, keys, "failed")
    unreduced = _unreduced(compared, keys)
    itself = np.arange(len(keys))
    stands = representatives(keys, matches) if settings.duplicates == "drop" else itself
    refusals = [
        Refusal(int(keys.row[i]), str(keys.ids[i]), "duplicate-id", "an earlier row has the same id")
        for i in np.flatnonzero(repeated)
    ] + [
        Refusal(int(keys.row[i]), str(keys.ids[i]), "duplicate", f"the same crystal as {keys.ids[stands[i]]}")
        for i in np.flatnonzero(stands != itself)
    ]
    kept = np.flatnonzero(~repeated & (stands == itself))
    group = groups(keys, np.concatenate([matches, doubtful, _siblings_of(unreduced, keys)]))
    split = np.full(len(keys), "", dtype=object)
    split[kept] = _split(keys, group, kept, settings)
    order = kept[np.argsort([SPLITS.index(name) for name in split[kept]], kind="stable")]
    with draft.open("wb") as file:
        np.savez(
            file,
            block=keys.block[order],
            at=keys.at[order],
            split=np.array([SPLITS.index(name) for name in split[order]], dtype=np.int8),
            refusals=np.frombuffer(json.dumps([vars(refusal) for refusal in refusals]).encode(), dtype=np.uint8),
            parsed=np.int64(len(keys)),
            good_rows=np.int64(len(np.unique(keys.row))),
            duplicates_across_splits=np.int64(_leaks(group[kept], split[kept])),
            not_compared=np.int64(len(unreduced) + len(doubtful)),
        )


def _pairs(compared: Compared, keys: Keys, which: str) -> np.ndarray:
    """The pairs that matched, or whose comparison failed, as indices into keys. (M, 2)."""
    if not compared.matched or compared.pairs is None:
        return np.zeros((0, 2), dtype=np.int64)
    found = []
    for path in compared.matched:
        with np.load(path) as told:
            found.append(told[which])
    named = np.load(compared.pairs, mmap_mode="r")[np.concatenate(found)].reshape(-1, 2).astype(np.int64)
    return (np.searchsorted(keys.block, named[:, 0]) + named[:, 1]).reshape(-1, 2)


def _unreduced(compared: Compared, keys: Keys) -> list[int]:
    """Crystals that have siblings but no reduced cell: they could not be compared."""
    return [
        int(np.searchsorted(keys.block, number)) + refusal.row
        for number, path in enumerate(compared.reduced)
        for refusal in read_refusals(path)
    ]


def _siblings_of(crystals: Sequence[int], keys: Keys) -> np.ndarray:
    """Pairs of each of these crystals with all of its formula. (M, 2)."""
    pairs = [(one, other) for one in crystals for other in np.flatnonzero(keys.formula == keys.formula[one]).tolist()]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _split(keys: Keys, group: np.ndarray, kept: np.ndarray, settings: BuildSettings) -> np.ndarray:
    """Split of each kept crystal. (K,) str."""
    shares = settings.shares()
    if shares is not None:
        return stratified(keys, group, kept, shares, settings.seed)
    if settings.split == "none":
        return np.full(len(kept), "all", dtype=object)
    for i in kept[keys.source_split[kept] == ""][:1]:
        raise InputError(f"{keys.ids[i]}: the source gives it no split; use --split 0.8,0.1,0.1 or none")
    return keys.source_split[kept]


def _leaks(group: np.ndarray, split: np.ndarray) -> int:
    """Sets of duplicates with members in more than one split: possible only with the source's own split."""
    splits = Counter(head for head, _ in set(zip(group.tolist(), split.tolist(), strict=True)))
    return sum(count > 1 for count in splits.values())


def shards_of(plan: Path, settings: BuildSettings) -> list[tuple[str, str, int, int]]:
    """File name, split, first place in the plan and end of every shard."""
    split = np.load(plan)["split"]
    shards = []
    for code in np.unique(split).tolist():
        first, end = (int(place) for place in np.searchsorted(split, (code, code + 1)))
        for number, start in enumerate(range(first, end, settings.shard_crystals)):
            stop = min(start + settings.shard_crystals, end)
            shards.append((shard_name(SPLITS[code], number), SPLITS[code], start, stop))
    return shards
