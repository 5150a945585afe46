"""Crystals of another generator as a run folder: read once into a store, with a summary of what could not be read.

NAME.store/  all-00000.h5 …  manifest.json   the crystals as they are: not symmetrised, no cell reduced, no copy dropped
             summary.json    rejects.csv     asked = written + rejected, and why, structure by structure
             read-<state>.json               of what state of the input; another one is read anew
"""

import gzip
import logging
import math
import os
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcgen.campaign.config import SUMMARY
from hpcgen.campaign.evaluate import PRELOAD, rows_per_block
from hpcgen.crystal.check import check
from hpcgen.crystal.crystals import Crystals, no_crystals
from hpcgen.crystal.refused import Refused
from hpcgen.errors import InputError, StorageError, UsageError
from hpcgen.files import make_folder, write_json
from hpcgen.runner.blocks import Block, How, once, run_blocks
from hpcgen.runner.lease import HOUSEKEEPING, Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import Team
from hpcgen.runner.worker import Cursor
from hpcgen.store.foreign import kind_of, place_of, refuse_bare, state_of
from hpcgen.store.foreign_files import CifFolder, CifZip
from hpcgen.store.foreign_index import Index, Reader
from hpcgen.store.foreign_tables import CifTable, Extxyz
from hpcgen.store.layout import MANIFEST, REJECTS, Head, open_shard, reading, shard_info, shard_name, write_manifest
from hpcgen.store.parse import CULPRITS
from hpcgen.store.rows import Rows
from hpcgen.store.source import Raw
from hpcgen.store.staging import Refusal, decode_refusals, encode_refusals, make_column, write_rejects
from hpcgen.store.write import encode, write_arrays

log = logging.getLogger(__name__)
READERS: dict[str, Callable[[Path], Reader]] = {"folder": CifFolder, "zip": CifZip, "extxyz": Extxyz, "csv": CifTable}
WORK = "reading"  # folder inside, gone when all is read
LEAST_VOLUME = 0.01  # Å³ of a cell: below it no store holds a crystal
_OWN = (*HOUSEKEEPING, MANIFEST, SUMMARY, REJECTS, WORK, "evaluate")


def adopted(given: Path, json: Path | None, team: Team, processes: int | None, item_timeout_s: float = 60.0) -> Path:
    """The run folder to be evaluated: `given` itself, or what somebody else's files are read into, once.

    Any number of members of a launch read together, and the same call goes on where an earlier one stopped.
    Raises InputError for an input that nobody understands or of which nothing can be read, UsageError, StorageError,
    StoppedEarly, TooManyFailed if blocks failed.
    """
    kind = kind_of(given)
    if kind is None:
        refuse_bare(given)
        return given
    if not os.access(given, os.R_OK):
        raise InputError(f"{given}: cannot be read (permission denied)")
    place, state = place_of(given, json), state_of(given)
    _refuse_other(place)
    try:
        make_folder(place)
    except StorageError as fault:
        raise StorageError(f"{fault}; with --json FILE the crystals are read into a folder beside FILE") from fault
    with StopFlag() as stop, Lease.take(place, team) as lease:
        run = _Reading(given, kind, place, state, lease, stop)
        run.all(How(processes, (__name__, *PRELOAD), item_timeout_s, label="reading structures"))
        while (leader := lease.leads()) and lease.others_alive():  # they may still look for what is cleared up below
            stop.check()
            time.sleep(0.05)
        if leader:
            shutil.rmtree(run.work, ignore_errors=True)
    return place


def _refuse_other(place: Path) -> None:
    """Raise UsageError if the place holds something else."""
    if place.exists() and not place.is_dir():
        raise UsageError(f"{place}: is a file, want a folder for the crystals to be read into")
    names = sorted(entry.name for entry in place.iterdir()) if place.exists() else []
    foreign = [name for name in names if name not in _OWN and not name.startswith("read-")]
    if foreign and not any(name.startswith("read-") for name in names):
        raise UsageError(f"{place}: holds {foreign[0]!r}, want a new folder for the crystals to be read into")


@dataclass(frozen=True)
class _Reading:
    """The steps from an input to a store."""

    given: Path
    kind: str
    place: Path
    state: str
    lease: Lease
    stop: StopFlag

    @property
    def work(self) -> Path:
        return self.place / WORK

    def all(self, how: How) -> None:
        """Whatever is missing."""
        once(self.place / f"read-{self.state}.json", self._begin, lease=self.lease, stop=self.stop)
        if (self.place / MANIFEST).exists():
            return
        try:
            self._read(how)
        except FileNotFoundError:  # unless others finished it and cleared up while this one was away
            if not (self.place / MANIFEST).exists():
                raise InputError(f"{self.given}: gone, or changed while it was read") from None

    def _begin(self, draft: Path) -> None:
        """Remove what was read of another state of the input, its manifest first."""
        for path in [self.place / MANIFEST, self.place / SUMMARY, *self.place.glob("all-*.h5"),
                     *self.place.glob("read-*.json")]:  # fmt: skip
            path.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        write_json(draft, {"given": str(self.given.resolve()), "kind": self.kind, "state": self.state})

    def _read(self, how: How) -> None:
        make_folder(self.work)
        path = self.given
        if path.name.lower().endswith(".gz"):
            path = self.work / "plain"
            once(path, self._unpack, lease=self.lease, stop=self.stop)
        reader = READERS[self.kind](path)
        file = self.work / "index.npz"
        once(file, lambda draft: reader.index().save(draft), lease=self.lease, stop=self.stop)
        index = Index.load(file)
        head = Head("foreign", {"given": self.given.name, "kind": self.kind}, index.specs)
        rows = len(index.ids)
        size = rows_per_block(rows, predicts=False)
        blocks = [Block(number, self.place / shard_name("all", number), min(size, rows - start))
                  for number, start in enumerate(range(0, rows, size))]  # fmt: skip
        read = run_blocks(blocks, ReadBlock(reader, file, head, size), lease=self.lease, stop=self.stop, how=how)
        read.refuse_failed(self.place, len(blocks), "reading structures")
        once(self.place / MANIFEST, lambda draft: self._finish(draft, head, blocks), lease=self.lease, stop=self.stop)

    def _unpack(self, draft: Path) -> None:
        try:
            with gzip.open(self.given) as packed, draft.open("wb") as plain:
                shutil.copyfileobj(packed, plain, 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as fault:
            raise InputError(f"{self.given}: cannot be unpacked ({fault})") from fault

    def _finish(self, draft: Path, head: Head, blocks: list[Block]) -> None:
        """Write the reject table and the summary, then the manifest to `draft`."""
        if state_of(self.given) != self.state:
            raise InputError(f"{self.given}: was changed while it was read; the same command reads it anew")
        shards = [shard_info(block.path) for block in blocks]
        refusals = [refusal for block in blocks for refusal in read_refusals(block.path)]
        asked, written = sum(block.size for block in blocks), sum(shard.crystals for shard in shards)
        assert asked == written + len(refusals), "structures got lost"
        rejected = dict(sorted(Counter(refusal.code for refusal in refusals).items()))
        told = ", ".join(f"{count:,} {code}" for code, count in rejected.items()) or "none"
        write_rejects(self.place, refusals, self.lease.token)
        if not written:
            first = min(refusals, key=lambda refusal: refusal.row)
            first_told = f"the first, {first.id}: {first.message}"
            raise InputError(f"{self.given}: none of {asked:,} structures can be read ({told}); {first_told}")
        log.info("%s: %s of %s structures read into %s; rejected: %s", self.given, f"{written:,}", f"{asked:,}",
                 self.place, told)  # fmt: skip
        summary = {"given": str(self.given), "asked": asked, "written": written, "rejected": rejected}
        write_json(self.place / SUMMARY, summary, token=self.lease.token)
        write_manifest(self.work, head, shards, token=self.lease.token)
        shutil.copyfile(self.work / MANIFEST, draft)


@dataclass(frozen=True)
class ReadBlock:
    """Work of the runner: some structures of the input as one shard, those that cannot be read beside them."""

    reader: Reader
    index: Path
    head: Head
    block_rows: int

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
        index, start = Index.load(self.index), block.index * self.block_rows
        raws: list[Raw] = []
        parts: list[Crystals] = []
        refusals: list[Refusal] = []
        for at, raw in enumerate(self.reader.rows(index, start, start + block.size)):
            cursor.at(at)
            try:
                parts.append(self._parsed(raw, cursor.culprits.get(at)))
                raws.append(raw)
            except Refused as refused:
                refusals.append(Refusal(start + at, raw.id, refused.code, _printable(refused.message)))
        cursor.rest()
        crystals = Crystals.cat([no_crystals(), *parts])
        columns = {name: make_column(spec, [raw.columns.get(name) for raw in raws])
                   for name, spec in self.head.columns.items()}  # fmt: skip
        rows = Rows(crystals, [raw.id for raw in raws], columns)
        arrays = {**encode(rows, self.head), "refusals": encode_refusals(refusals)}
        write_arrays(draft, arrays, self.head, name=block.path.name, split="all")
        return {"crystals": len(raws), "refused": len(refusals)}

    def _parsed(self, raw: Raw, culprit: str | None) -> Crystals:
        """The crystal of a structure, whatever its distances. Raises Refused."""
        if culprit is not None:
            raise Refused(culprit, CULPRITS.get(culprit, culprit))
        if raw.fault is not None:
            raise Refused(*raw.fault)
        try:
            crystal = self.reader.parse(raw)
        except (ImportError, MemoryError):  # the machine's fault, not the structure's
            raise
        except Refused:
            raise
        except Exception as fault:  # of somebody else's reader
            raise Refused("parse-error", f"{type(fault).__name__}: {fault}") from fault
        check(crystal, min_distance=0.0, min_volume=LEAST_VOLUME, volume_per_atom=(0.0, math.inf))
        return crystal


def read_refusals(path: Path) -> list[Refusal]:
    """Those that a block keeps beside its crystals. Raises InputError where it is damaged."""
    with open_shard(path) as shard, reading(path):
        return decode_refusals(shard["refusals"][()])


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:4096]
