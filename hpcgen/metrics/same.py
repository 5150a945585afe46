"""Which crystals of a run are the same as an earlier one of the run, or as one of a reference: block by block.

A crystal is a duplicate if StructureMatcher.fit(earlier, it) holds for an earlier crystal of the run, and known if
fit(reference's, it) holds for one of the reference. Where matching is transitive, those that are no duplicates are as
many as the groups that `group_structures` makes; where a chain of crystals drifts, that method compares with the first
of each group alone and finds a few more.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from hpcgen.crystal.mappings import pieces
from hpcgen.crystal.match import Matcher
from hpcgen.crystal.outline import minima, outlines, short_enough
from hpcgen.crystal.superpose import compared
from hpcgen.metrics.cells import Buckets, CellBlock, Sets, save_buckets, save_formulas, shares
from hpcgen.runner.blocks import Block, How, once, run_blocks
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.worker import Cursor, Work
from hpcgen.store.staging import read_refusals

_LOG = logging.getLogger(__name__)
STANDARD = Matcher()  # pymatgen's own: ltol 0.2, stol 0.3, angle_tol 5
STRICT = Matcher(ltol=0.1, stol=0.15, angle_tol=2.5)  # half of each
MATCHERS = {"standard": STANDARD, "strict": STRICT}
NONE = -1
_BLOCKS = 512
_PIECE = (512, 2048)  # crystals reduced as one block
_TOGETHER, _LEAST = 2_000_000, 4_000  # candidates of the crystals compared at a time, and of one to be counted
_ROUND = 4_000  # pairs compared before the cursor is asked again


@dataclass(frozen=True)
class Same:
    """Of N crystals of a run and T tolerances."""

    earlier: np.ndarray  # (N, T) number of the earlier crystal found the same, NONE for a crystal that is unique
    known: np.ndarray  # (N, T) place in the reference of the crystal found the same, NONE
    compared: np.ndarray  # (N, 2, T) bool, with the run and with the reference; False where a comparison failed or took
    # too long, and no other one matched
    unknown: np.ndarray  # (N,) bool, an element that the reference lacks

    @staticmethod
    def load(path: Path) -> "Same":
        """What `find_same` wrote."""
        with np.load(path) as found:
            return Same(*(found[name] for name in Same.__dataclass_fields__))


def find_same(sets: Sets, folder: Path, *, lease: Lease, stop: StopFlag, how: How) -> Path:
    """Find them, or finish what an earlier call began in `folder`; the file that `Same.load` reads."""

    def all_of(what: str, blocks: list[Block], work: Work) -> list[Path]:
        run_blocks(blocks, work, lease=lease, stop=stop, how=replace(how, label=what)).refuse_failed(
            folder, len(blocks), what
        )
        return [block.path for block in blocks]

    formulas, buckets, found = (folder / name for name in ("formulas.npz", "buckets.h5", "same.npz"))
    once(formulas, lambda draft: save_formulas(draft, sets), lease=lease, stop=stop)
    spans = sets.pieces(min(max((sets.count + sets.known) // _BLOCKS, _PIECE[0]), _PIECE[1]))
    cells = [Block(number, folder / f"cells-{number:05d}.npz", end - start)
             for number, (start, end) in enumerate(spans)]  # fmt: skip
    reduced = all_of("reducing cells", cells, CellBlock(sets, formulas, tuple(spans)))
    once(buckets, lambda draft: save_buckets(draft, sets, formulas, reduced), lease=lease, stop=stop)
    bounds = shares(buckets, _BLOCKS)
    blocks = [Block(number, folder / f"same-{number:05d}.npz", end - start)
              for number, (start, end) in enumerate(pairwise(bounds))]  # fmt: skip
    parts = all_of("comparing crystals", blocks, SameBlock(buckets, sets.count, tuple(bounds)))
    once(found, lambda draft: _save_same(draft, sets, formulas, reduced, parts), lease=lease, stop=stop)
    return found


@dataclass(frozen=True)
class SameBlock:
    """Work of the runner: what stands before each crystal of a run of buckets and is the same, at all tolerances."""

    buckets: Path
    count: int  # crystals of the run
    bounds: tuple[int, ...]
    matchers: tuple[Matcher, ...] = tuple(MATCHERS.values())

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
        start, end = self.bounds[block.index : block.index + 2]
        some = Buckets.load(self.buckets, start, end)
        search = Search(some, self.matchers)
        own = np.arange(start, end) - some.first
        items = own[some.place[own] < self.count]
        found = np.full((len(items), 2, len(self.matchers)), NONE, dtype=np.int64)
        failed = np.zeros(found.shape, dtype=bool)
        before = items + some.first - some.bucket[items]
        for piece in pieces(np.maximum(before, _LEAST), _TOGETHER):
            rows = np.arange(piece.start, piece.stop)
            together = -1 - piece.start  # an item of its own: where it fails, its crystals are tried one by one
            cursor.at(together)
            if together not in cursor.culprits:
                found[rows], failed[rows] = search.same_as(items[rows], partial(cursor.at, together))
                continue
            for row in rows.tolist():
                cursor.at(row)
                if row in cursor.culprits:
                    failed[row] = True
                else:
                    found[row], failed[row] = search.same_as(items[[row]], partial(cursor.at, row))
        cursor.rest()
        with draft.open("wb") as file:
            np.savez(file, place=some.place[items], found=found, failed=failed)
        return {"compared": len(items), "pairs": search.pairs}


class Search:
    """Looks in the buckets of crystals for what matches them, those of the nearest volume per atom first.

    For one crystal it ends at the first match, so copies cost little however many there are. A bucket of crystals that
    all differ costs a look at every pair of cells; where the cells are alike too, as in many predictions for one
    formula, a comparison.
    """

    def __init__(self, some: Buckets, matchers: Sequence[Matcher]) -> None:
        self.some, self.matchers = some, matchers
        self.cells = outlines(some.crystals)
        self.minima = minima(self.cells.lattice)
        self.volume = np.log((some.crystals.volume / some.crystals.num_atoms).numpy())
        self.pairs = 0

    def same_as(self, items: np.ndarray, step: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of earlier crystals and of ones of the reference that match those at `items` (K,); which failed.

        -> (K, 2, T), NONE where there is none; (K, 2, T) bool. step: called before each round of comparisons.
        """
        asked = np.repeat(items, 2)  # of each the run, then the reference
        ways = [way for at in items.tolist() for way in self._candidates(at)]
        found = np.full((len(asked), len(self.matchers)), NONE, dtype=np.int64)
        failed = np.zeros(found.shape, dtype=bool)
        begin, size = np.zeros(len(asked), dtype=np.int64), np.array([len(way) for way in ways])
        most = 1
        while len(rows := np.flatnonzero((begin < size) & (found == NONE).any(1))):
            step()
            some = np.minimum(size - begin, min(most, max(1, _ROUND // len(rows))))[rows]
            owner = np.repeat(rows, some)
            others = np.concatenate([ways[k][begin[k] : begin[k] + n] for k, n in zip(rows, some, strict=True)])
            matched, faulty = compared(self.cells, others, asked[owner], self.matchers)
            failed[owner[faulty]] = True
            for t in range(len(self.matchers)):
                hits = np.flatnonzero(matched[:, t])[::-1]  # of several the first remains
                hits = hits[found[owner[hits], t] == NONE]
                found[owner[hits], t] = self.some.place[others[hits]]
            self.pairs += len(owner)
            begin[rows] += some
            most *= 2
        failed &= found == NONE
        return found.reshape(-1, 2, len(self.matchers)), failed.reshape(-1, 2, len(self.matchers))

    def _candidates(self, at: int) -> list[np.ndarray]:
        """Of the run and of the reference, in the order in which they are compared."""
        bucket, begin = (int(bounds[at]) - self.some.first for bounds in (self.some.bucket, self.some.begin))
        ltol, ways = max(matcher.ltol for matcher in self.matchers), []
        for start, end in ((begin, at), (bucket, begin)):
            short = short_enough(self.minima[start:end], self.cells.lengths[at], ltol)
            places = start + np.flatnonzero(short)
            ways.append(places[np.argsort(np.abs(self.volume[places] - self.volume[at]), kind="stable")])
        return ways


def _save_same(draft: Path, sets: Sets, formulas: Path, reduced: Sequence[Path], parts: Sequence[Path]) -> None:
    """The verdicts of all blocks, by the number of the crystal, as .npz."""
    with np.load(formulas) as told:
        unknown = told["unknown"]
    found = np.full((sets.count, 2, len(MATCHERS)), NONE, dtype=np.int64)
    failed = np.zeros(found.shape, dtype=bool)
    for path in parts:
        with np.load(path) as told:
            found[told["place"]], failed[told["place"]] = told["found"], told["failed"]
    refused = np.array([refusal.row for path in reduced for refusal in read_refusals(path)], dtype=np.int64)
    failed[refused[refused < sets.count]] = True
    if lost := int((refused >= sets.count).sum()):
        _LOG.warning("%d crystals of the reference could not be reduced and match nothing", lost)
    known = np.where(found[:, 1] == NONE, NONE, found[:, 1] - sets.count)
    with draft.open("wb") as file:
        np.savez(file, earlier=found[:, 0], known=known, compared=~failed, unknown=unknown)
