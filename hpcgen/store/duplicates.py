"""Pass 2 of building a store: reduced cells, and which pairs of them are the same crystal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcgen.crystal.crystals import Crystals, no_crystals
from hpcgen.crystal.match import Matcher, reduced_cell
from hpcgen.crystal.outline import outlines
from hpcgen.crystal.superpose import compared
from hpcgen.runner.blocks import Block
from hpcgen.runner.guard import Cursor
from hpcgen.store.arrays import take
from hpcgen.store.keys import PLACE, pairs_per_block
from hpcgen.store.layout import Head
from hpcgen.store.read import decode
from hpcgen.store.rows import Rows
from hpcgen.store.settings import BuildSettings
from hpcgen.store.staging import Refusal, make_column, read_staged, write_staged

NOT_COMPARED = "not-compared"
_TOGETHER = 1024  # pairs compared at a time


@dataclass(frozen=True)
class ReduceBlock:
    """Work of the runner: the crystals of one staging file that have siblings, as StructureMatcher compares them."""

    staged: tuple[Path, ...]
    siblings: Path  # .npz: mask (N,) bool of all crystals, first (blocks + 1,) crystal of each staging file

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int]:
        with np.load(self.siblings) as known:
            first, end = known["first"][block.index : block.index + 2]
            chosen = np.flatnonzero(known["mask"][first:end])
        batch = no_crystals()
        if len(chosen):
            batch = decode(take(read_staged(self.staged[block.index], {}), chosen), {}).crystals
        kept = write_reduced(draft, batch, chosen.tolist(), cursor)
        return {"reduced": kept}


def write_reduced(draft: Path, crystals: Crystals, places: Sequence[int], cursor: Cursor) -> int:
    """Write a staging file of the reduced cells of B crystals, under their places, and how many there are.

    What cannot be reduced stands among the refusals, its place as its row.
    """
    kept, reduced, refusals = [], [], []
    for at, place in enumerate(places):
        cursor.at(at)
        try:
            if at in cursor.culprits:
                raise ValueError(cursor.culprits[at])
            reduced.append(reduced_cell(crystals[at]))
            kept.append(place)
        except (ValueError, ArithmeticError, LookupError, RuntimeError) as fault:  # pymatgen's own
            refusals.append(Refusal(place, str(place), NOT_COMPARED, f"{type(fault).__name__}: {fault}"))
    cursor.rest()
    rows = Rows(
        Crystals.cat(reduced) if reduced else no_crystals(),
        [str(place) for place in kept],
        {"place": make_column(PLACE["place"], kept)},
    )
    write_staged(draft, rows, Head("reduced", columns=PLACE), refusals)
    return len(kept)


@dataclass(frozen=True)
class MatchBlock:
    """Work of the runner: compare a run of candidate pairs, keep those that match."""

    reduced: tuple[Path, ...]
    pairs: Path  # as save_candidate_pairs writes it
    settings: BuildSettings

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int]:
        every = np.load(self.pairs, mmap_mode="r")
        start = block.index * pairs_per_block(len(every))
        pairs = every[start : start + block.size]
        names, members = np.unique(pairs.reshape(-1, 2), axis=0, return_inverse=True)
        matcher = Matcher(self.settings.ltol, self.settings.stol, self.settings.angle_tol)
        cells = outlines(_crystals(self.reduced, names))
        one, other = members.reshape(-1, 2).T
        found, faulty = np.zeros((len(pairs), 1), dtype=bool), np.zeros(len(pairs), dtype=bool)
        for first in range(0, len(pairs), _TOGETHER):
            some = np.arange(first, min(first + _TOGETHER, len(pairs)))
            together = -1 - first  # an item of its own: where it fails, its pairs are tried one by one
            cursor.at(together)
            if together not in cursor.culprits:
                found[some], faulty[some] = compared(cells, one[some], other[some], [matcher])
                continue
            for at in some.tolist():
                cursor.at(at)
                if at in cursor.culprits:
                    faulty[at] = True
                else:
                    found[at], faulty[at] = compared(cells, one[[at]], other[[at]], [matcher])
        matched, failed = start + np.flatnonzero(found), start + np.flatnonzero(faulty)
        with draft.open("wb") as file:
            np.savez(file, matched=matched, failed=failed)
        return {"pairs": len(pairs), "matches": len(matched), "not_compared": len(failed)}


def _crystals(reduced: Sequence[Path], names: np.ndarray) -> Crystals:
    """The reduced crystals named by (block, place), in the order of names (sorted)."""
    parts = []
    for number in np.unique(names[:, 0]).tolist():
        arrays = read_staged(reduced[number], PLACE)
        wanted = names[names[:, 0] == number, 1]
        parts.append(decode(take(arrays, np.searchsorted(arrays["columns/place"], wanted)), {}).crystals)
    return Crystals.cat(parts)
