"""The blocks of a campaign: whole tiles, one file each, which is an ordinary shard with its rejected rows beside.

all-00000.h5          crystals 0 to block - 1
all-00002-to-600.h5   the last block of n = 600; when n grows, all-00002.h5 takes its place
    /rejected/index (R) int64     crystals that are none
    /rejected/reason (R)          not-finite, bad-volume, ..., crash, out-of-memory
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hpcgen.campaign.config import CampaignConfig
from hpcgen.campaign.pieces import Kept, Piece, Sampled, pieces
from hpcgen.campaign.sampling import Sampler
from hpcgen.campaign.targets import Targets
from hpcgen.crystal.check import faults
from hpcgen.errors import InputError
from hpcgen.files import append_json_line
from hpcgen.runner.blocks import Block
from hpcgen.runner.board import KEPT
from hpcgen.runner.worker import Cursor
from hpcgen.store.arrays import Arrays, count, cut, join, load
from hpcgen.store.layout import ColumnSpec, Head, open_shard, reading, shard_name
from hpcgen.store.rows import Column, Rows
from hpcgen.store.write import encode, write_arrays

log = logging.getLogger(__name__)
REJECTED, REASON = "rejected/index", "rejected/reason"
METRICS = "metrics.jsonl"
_ENDINGS = (".h5", f".h5{KEPT}")
_COLUMNS = {"index": ColumnSpec("int"), "halved": ColumnSpec("bool")}


def blocks_of(run: Path, n: int, size: int) -> list[Block]:
    """The blocks of crystals 0 to n - 1."""
    made = []
    for number, start in enumerate(range(0, n, size)):
        stop = min(start + size, n)
        name = shard_name("all", number)
        name = name if stop - start == size else name.replace(".h5", f"-to-{stop}.h5")
        made.append(Block(number, run / name, stop - start))
    return made


def head_of(config: CampaignConfig) -> Head:
    """What all blocks of a run folder share, whatever its n. config: resolved."""
    columns = {**_COLUMNS, **({"target": ColumnSpec("str")} if config.task == "predict" else {})}
    return Head("campaign", config.making(), columns)


def crystal_id(seed: int, index: int) -> str:
    """s0-000000012"""
    return f"s{seed}-{index:09d}"


@dataclass(frozen=True)
class MakeBlock:
    """The work on one block, for run_blocks. rank, token: of this member and its launch, for metrics.jsonl."""

    config: CampaignConfig  # resolved
    targets: Targets | None
    rank: int
    token: str
    overlapped: bool = False  # a tile is encoded in a second thread, while the next is sampled

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> None:
        """Sample what is not there yet, write the draft. Raises StoppedEarly at any sampling step, StorageError."""
        began, used = time.perf_counter(), time.process_time()
        sampler = Sampler(self.config, self.targets)
        tiles = _Tiles(self.config, sampler, block, cursor)
        arrays = join(tiles.all(overlapped=self.overlapped))
        cursor.rest()
        write_arrays(draft, arrays, head_of(self.config), name=block.path.name, split="all")
        append_json_line(
            block.path.parent / METRICS, block=block.index, rank=self.rank, token=self.token, crystals=block.size,
            written=count(arrays), rejected=len(arrays[REJECTED]), sampled=tiles.sampled,
            seconds=round(time.perf_counter() - began, 4), sampling_s=round(sampler.seconds, 4),
            cpu_s=round(time.process_time() - used, 4),
        )  # fmt: skip


class _Tiles:
    """The tiles of one block, one after the other. sampled: crystals of the block that were not there before."""

    def __init__(self, config: CampaignConfig, sampler: Sampler, block: Block, cursor: Cursor) -> None:
        self.config, self.sampler, self.cursor = config, sampler, cursor
        self.start = block.index * config.block
        self.stop = self.start + block.size
        self.sampled = self._done = 0
        others = sorted(set(_files_of(block)) - {block.path, cursor.keep})
        self.kept = Kept(cursor.keep, [path for path in others if path.suffix == KEPT])
        self.shorter = _Shorter([path for path in others if path.suffix == ".h5"], config)

    def all(self, *, overlapped: bool) -> list[Arrays]:
        """Every tile, encoded, of the crystals asked for."""
        size, made = self.config.tile, []
        with ThreadPoolExecutor(1) as second:
            for start in range(self.start, self.stop, size):
                stop = min(start + size, self.stop)
                tile = self.shorter.tile(start, stop)
                if tile is None:
                    sampled = self._sampled(np.arange(start, start + size), stop)
                    encoding = partial(encoded, sampled, stop, self.config, self.sampler)
                    made.append(second.submit(encoding) if overlapped else encoding())
                else:
                    self._done += stop - start
                    made.append(tile)
        return [tile.result() if isinstance(tile, Future) else tile for tile in made]

    def _sampled(self, index: np.ndarray, stop: int) -> Sampled:
        """The pieces of a tile (T,), without those that have no crystal below `stop`."""
        all_pieces = pieces(index, self.sampler.num_atoms(index), self.config.pairs)
        tile = int(index[0]) // self.config.tile
        return Sampled.join([self._piece(tile, piece, stop) for piece in all_pieces if piece.index[0] < stop])

    def _piece(self, tile: int, piece: Piece, stop: int) -> Sampled:
        """One piece: kept, given up since the process died of it, or sampled now."""
        item = self._done  # crystals before it: no two pieces share the number
        self.cursor.at(item)
        wanted = int((piece.index < stop).sum())
        self._done += wanted
        sampled = self.kept.take(tile, piece.number)
        if sampled is None and item in self.cursor.culprits:
            return Sampled.none(piece.index, self.cursor.culprits[item])
        if sampled is None:
            sampled = self.sampler.sample(piece, lambda: self.cursor.at(item))
            self.kept.add(tile, piece.number, sampled)
            self.sampled += wanted
        return sampled


class _Shorter:
    """The longest of the files that a block had when n was less: its whole tiles need not be sampled again."""

    def __init__(self, files: list[Path], config: CampaignConfig) -> None:
        self._stop = 0
        for path in sorted(files, key=_stop_of, reverse=True)[:1]:
            columns = head_of(config).columns
            try:
                with open_shard(path, settings_hash=head_of(config).settings_hash) as shard, reading(path):
                    self._arrays = load(shard, 0, shard["ptr"].shape[0] - 1, columns, edges=False)
                    self._rejected, self._reason = shard[REJECTED][...], shard[REASON][...]
                self._stop = _stop_of(path)
            except InputError as fault:
                log.warning("%s; its crystals are sampled again", fault)

    def tile(self, start: int, stop: int) -> Arrays | None:
        """Crystals `start` to `stop`, None if they are not all there."""
        if stop > self._stop:
            return None
        place = np.searchsorted(self._arrays["columns/index"], [start, stop])
        bad = slice(*np.searchsorted(self._rejected, [start, stop]))
        return {**cut(self._arrays, *place), REJECTED: self._rejected[bad], REASON: self._reason[bad]}


def encoded(sampled: Sampled, stop: int, config: CampaignConfig, sampler: Sampler) -> Arrays:
    """The sampled crystals below `stop`, in order of their index, as arrays of a shard; what is no crystal apart.

    Atoms too close are no reason: whether a crystal is sensible is for those who look at it to say.
    """
    order = np.argsort(sampled.index)
    order = order[sampled.index[order] < stop]
    crystals, reason = sampled.crystals()[torch.from_numpy(order)], sampled.reason[order]
    for at, fault in enumerate(faults(crystals, min_distance=0.0)):
        if fault is not None and not reason[at]:
            reason[at] = fault.code.encode()
    good = np.flatnonzero(reason == b"")
    index = sampled.index[order]
    there = {"index": index[good], "halved": sampled.halved[order][good]}
    if sampler.targets is not None:
        there["target"] = np.array(sampler.targets.names(index[good]), dtype=object)
    head, none = head_of(config), np.zeros(len(good), dtype=bool)
    columns = {name: Column(head.columns[name], values, none) for name, values in there.items()}
    ids = [crystal_id(config.seed, i) for i in index[good].tolist()]
    arrays = encode(Rows(crystals[torch.from_numpy(good)], ids, columns), head)
    bad = reason != b""
    return {**arrays, REJECTED: index[bad], REASON: reason[bad]}


def rejected_of(path: Path) -> Counter[str]:
    """How many crystals of a block were rejected, by reason. Raises InputError for a damaged file."""
    with open_shard(path) as shard, reading(path):
        reasons, times = np.unique(shard[REASON][...], return_counts=True)
    return Counter(dict(zip([reason.decode() for reason in reasons.tolist()], times.tolist(), strict=True)))


def leftovers(run: Path, blocks: Sequence[Block]) -> list[Path]:
    """Files of blocks that became longer when n grew, and pieces kept for them."""
    wanted = {block.path.name for block in blocks}
    return [path for path in run.glob("all-*") if path.name.endswith(_ENDINGS) and path.name not in wanted]


def _files_of(block: Block) -> list[Path]:
    """The block's file and finished pieces, for any n."""
    stem, folder = shard_name("all", block.index).removesuffix(".h5"), block.path.parent
    found = [*folder.glob(f"{stem}-to-*"), *folder.glob(f"{stem}.h5*")]
    return [path for path in found if path.name.endswith(_ENDINGS)]


def _stop_of(path: Path) -> int:
    return int(path.stem.rpartition("-to-")[2])
