"""The crystals of a run, and of a reference, that may be the same: their reduced cells, side by side in one file.

Crystals are numbered through: the first `count` of the run, then all of the reference. Those that share their reduced
formula with another one are reduced, each once; those of one formula and number of sites form a bucket, and nothing
outside a bucket matches: StructureMatcher compares compositions first, and without supercells never matches different
numbers of sites. In a bucket the reference comes first, then the run in its order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcgen.crystal.composition import formula_key
from hpcgen.crystal.crystals import Crystals
from hpcgen.files import storage_faults
from hpcgen.runner.blocks import Block
from hpcgen.runner.worker import Cursor
from hpcgen.store.arrays import file_image, join, load, take
from hpcgen.store.duplicates import write_reduced
from hpcgen.store.keys import PLACE
from hpcgen.store.layout import ColumnSpec, Head, open_shard, reading
from hpcgen.store.read import Store, decode
from hpcgen.store.rows import Rows
from hpcgen.store.staging import make_column, read_keys_of, read_staged
from hpcgen.store.write import encode

_COLUMNS = {**PLACE, "bucket": ColumnSpec("int"), "begin": ColumnSpec("int")}
_COST = 0.02  # of looking at one candidate, in units of what a crystal costs by itself
_LEAST = 500.0  # of these units in a block


@dataclass(frozen=True)
class Sets:
    """What is compared: the first `count` crystals of a run, with each other and with `known` ones of a reference."""

    run: Path
    count: int
    reference: Path | None = None
    split: str | None = None  # of the reference
    known: int = 0  # all that it holds

    def crystals(self, places: np.ndarray) -> Crystals:
        """Those of these numbers, all of the run or all of the reference."""
        if len(places) and places[0] >= self.count:
            assert self.reference is not None
            return Store(self.reference, self.split, dtype=None, columns=[]).rows(places - self.count).crystals
        return Store(self.run, dtype=None, columns=[]).rows(places).crystals

    def elements(self) -> Iterator[np.ndarray]:
        """Atomic numbers of every crystal, in order."""
        stores = [(Store(self.run, dtype=None, columns=[]), self.count)]
        if self.reference is not None:
            stores.append((Store(self.reference, self.split, dtype=None, columns=[]), self.known))
        for store, left in stores:
            for rows in store.iter_rows():
                parts = rows.crystals.atomic_numbers.split(rows.crystals.num_atoms.tolist())
                yield from (part.numpy() for part in parts[:left])
                left -= min(left, len(parts))
                if not left:
                    break

    def pieces(self, size: int) -> list[tuple[int, int]]:
        """First number and end of runs of up to `size` crystals of one store."""
        bounds = ((0, self.count), (self.count, self.count + self.known))
        return [(start, min(start + size, end)) for first, end in bounds for start in range(first, end, size)]


def save_formulas(draft: Path, sets: Sets) -> None:
    """What the formulas say, as .npz: number of the formula of each, who must be compared, who has unknown elements."""
    codes: dict[str, int] = {}
    formula = np.empty(sets.count + sets.known, dtype=np.int64)
    holds = np.zeros((sets.count, 119), dtype=bool)
    reference = np.zeros(119, dtype=bool)
    for place, numbers in enumerate(sets.elements()):
        formula[place] = codes.setdefault(formula_key(numbers), len(codes))
        if place < sets.count:
            holds[place, numbers] = True
        else:
            reference[numbers] = True
    in_run = np.bincount(formula[: sets.count], minlength=len(codes))
    in_reference = np.bincount(formula[sets.count :], minlength=len(codes))
    compared = (in_run > 0) & (in_run + in_reference > 1)
    unknown = (holds & ~reference).any(1) if sets.reference is not None else np.zeros(sets.count, dtype=bool)
    with draft.open("wb") as file:
        np.savez(file, formula=formula, compared=compared[formula], unknown=unknown)


@dataclass(frozen=True)
class CellBlock:
    """Work of the runner: reduced cells of those crystals of one piece that must be compared."""

    sets: Sets
    formulas: Path  # as save_formulas writes it
    pieces: tuple[tuple[int, int], ...]

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
        start, end = self.pieces[block.index]
        with np.load(self.formulas) as known:
            places = start + np.flatnonzero(known["compared"][start:end])
        return {"reduced": write_reduced(draft, self.sets.crystals(places), places.tolist(), cursor)}


def save_buckets(draft: Path, sets: Sets, formulas: Path, reduced: Sequence[Path]) -> None:
    """All reduced cells in buckets, those with nothing to compare left out.

    Columns: place, the number of the crystal; bucket, where its bucket begins; begin, where the run begins in it.
    """
    counts = [read_keys_of(path, PLACE) for path in reduced]
    place = np.concatenate([arrays["columns/place"] for arrays in counts])
    sites = np.concatenate([np.diff(arrays["ptr"]) for arrays in counts])
    with np.load(formulas) as known:
        formula = known["formula"][place]
    of_run = place < sets.count
    order = np.lexsort((place, of_run, sites, formula))
    _, bucket, size = np.unique(np.stack([formula, sites])[:, order], axis=1, return_inverse=True, return_counts=True)
    runs = np.bincount(bucket.ravel(), weights=of_run[order]).astype(np.int64)
    kept = ((runs > 0) & (size > 1))[bucket.ravel()]
    order, bucket = order[kept], bucket.ravel()[kept]
    first = np.flatnonzero(np.diff(bucket, prepend=-1))
    start = np.repeat(first, np.diff([*first, len(order)]))
    begin = start + (size - runs)[bucket]
    columns = {"place": place[order], "bucket": start, "begin": begin}
    crystals = decode(take(join([read_staged(path, {}) for path in reduced]), order), {}).crystals
    made = {name: make_column(_COLUMNS[name], values.tolist()) for name, values in columns.items()}
    rows = Rows(crystals, [str(number) for number in columns["place"].tolist()], made)
    head = Head("cells", columns=_COLUMNS)
    with storage_faults(draft):
        draft.write_bytes(file_image(encode(rows, head), head, split="all", small=False))


@dataclass(frozen=True)
class Buckets:
    """A run of the cells that save_buckets wrote, whole at its beginning: item k stands at `first` + k."""

    crystals: Crystals
    place: np.ndarray  # (M,) number of the crystal
    bucket: np.ndarray  # (M,) where its bucket begins
    begin: np.ndarray  # (M,) where the run begins in it
    first: int

    @staticmethod
    def load(path: Path, start: int, end: int) -> "Buckets":
        """Cells start to end, and those before that are of the same bucket."""
        with open_shard(path) as shard, reading(path):
            first = int(shard["columns/bucket"][start])
            arrays = load(shard, first, end, _COLUMNS, edges=False)
        place, bucket, begin = (arrays[f"columns/{name}"] for name in _COLUMNS)
        return Buckets(decode(arrays, {}).crystals, place, bucket, begin, first)


def shares(path: Path, most: int) -> list[int]:
    """Where blocks of comparing begin, and the end: at most `most`, of about equal cost, by the number of candidates.

    A crystal of the reference costs nothing, one of the run grows with what stands before it in its bucket.
    """
    with open_shard(path) as shard, reading(path):
        arrays = load(shard, 0, shard["ptr"].shape[0] - 1, _COLUMNS, edges=False, bare=True)
    at = np.arange(len(arrays["columns/place"]))
    before = at - arrays["columns/bucket"]
    cost = np.cumsum(np.where(at >= arrays["columns/begin"], 1 + _COST * before, 0.0))
    if not len(cost):
        return [0]
    turn = np.ceil(cost / max(cost[-1] / most, _LEAST))
    return [0, *(np.flatnonzero(np.diff(turn)) + 1).tolist(), len(cost)]
