"""Which crystals of a run are the same as an earlier one of the run, or as one of a reference: block by block.

A crystal is a duplicate if StructureMatcher.fit(earlier, it) holds for an earlier crystal of the run, and known if
fit(reference's, it) holds for one of the reference. Where matching is transitive, those that are no duplicates are as
many as the groups that `group_structures` makes; where a chain of crystals drifts, that method compares with the first
of each group alone and finds a few more.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from hpcgen.crystal.match import Matcher
from hpcgen.crystal.outline import Outline, minima, outline, short_enough, sides
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
_PIECE = (64, 2048)  # crystals reduced as one block


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
    pieces = sets.pieces(min(max((sets.count + sets.known) // _BLOCKS, _PIECE[0]), _PIECE[1]))
    cells = [Block(number, folder / f"cells-{number:05d}.h5", end - start)
             for number, (start, end) in enumerate(pieces)]  # fmt: skip
    reduced = all_of("reducing cells", cells, CellBlock(sets, formulas, tuple(pieces)))
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
        search = Search(some, cursor)
        items = [at for at in range(start - some.first, end - some.first) if some.place[at] < self.count]
        found = np.full((len(items), 2, len(self.matchers)), NONE, dtype=np.int64)
        failed = np.zeros(found.shape, dtype=bool)
        for row, at in enumerate(items):
            for t, matcher in enumerate(self.matchers):
                found[row, :, t], failed[row, :, t] = search.same_as(at, matcher, item=at + some.first - start)
        cursor.rest()
        with draft.open("wb") as file:
            np.savez(file, place=some.place[items], found=found, failed=failed)
        return {"compared": len(items), "pairs": search.pairs}


class Search:
    """Looks in the bucket of a crystal for what matches it, those of the nearest volume per atom first.

    It ends at the first match, so copies cost little however many there are. A bucket of crystals that all differ costs
    a look at every pair of cells; where the cells are alike too, as in many predictions for one formula, a comparison.
    """

    def __init__(self, some: Buckets, cursor: Cursor) -> None:
        self.some, self.cursor = some, cursor
        lattices = some.crystals.lattice.numpy()
        self.minima, self.sides = minima(lattices), sides(lattices)
        self.volume = np.log((some.crystals.volume / some.crystals.num_atoms).numpy())
        self._cells: dict[int, Outline] = {}
        self.pairs = 0

    def same_as(self, at: int, matcher: Matcher, item: int) -> tuple[list[int], list[bool]]:
        """Numbers of an earlier crystal and of one of the reference that match the one at `at`; which of both failed.

        item: what the cursor knows it by.
        """
        bucket, begin = (int(bounds[at]) - self.some.first for bounds in (self.some.bucket, self.some.begin))
        found = [self._first(at, matcher, span, item) for span in (range(begin, at), range(bucket, begin))]
        return [match for match, _ in found], [failed for _, failed in found]

    def _first(self, at: int, matcher: Matcher, span: range, item: int) -> tuple[int, bool]:
        """Number of the first in `span` that matches; else NONE, and whether a comparison failed."""
        failed = False
        for other in self._candidates(at, matcher.ltol, span):
            self.cursor.at(item)
            if item in self.cursor.culprits:
                return NONE, True
            self.pairs += 1
            try:
                if matcher.same(self._cell(other), self._cell(at)):
                    return int(self.some.place[other]), False
            except (ValueError, ArithmeticError, LookupError, RuntimeError):  # pymatgen's own
                failed = True
        return NONE, failed

    def _cell(self, at: int) -> Outline:
        if at not in self._cells:
            crystals = self.some.crystals
            atoms = slice(*crystals.ptr[at : at + 2].tolist())
            self._cells[at] = outline(
                crystals.lattice[at].numpy(),
                crystals.frac_coords[atoms].numpy(),
                crystals.atomic_numbers[atoms].numpy(),
            )
        return self._cells[at]

    def _candidates(self, at: int, ltol: float, span: range) -> list[int]:
        short = short_enough(self.minima[span.start : span.stop], self.sides[at], ltol)
        places = span.start + np.flatnonzero(short)
        order = np.argsort(np.abs(self.volume[places] - self.volume[at]), kind="stable")
        return places[order].tolist()


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
