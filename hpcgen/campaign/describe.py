"""Fingerprint, space group and energy of all crystals of a store, block by block, in one file beside the evaluation."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.symmetry import space_group_number
from hpcgen.files import whole
from hpcgen.metrics.fingerprints import FEATURES, fingerprints
from hpcgen.runner.blocks import Block, How, once, run_blocks
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.worker import Cursor
from hpcgen.screen.potential import energies
from hpcgen.store.layout import read_manifest
from hpcgen.store.read import Store

ROWS = 256  # crystals of a block, at least
MOST_BLOCKS = 512
TOGETHER = 16  # crystals that are searched at once; one by one where that crashed or took too long
PRELOAD = ("hpcgen.metrics.fingerprints",)
LABELS = {"own": "describing crystals", "known": "describing the reference"}
SYMPREC = 0.1  # Å
WIDTH = len(FEATURES) + 2  # and space group, energy
_RULES = 1  # another number makes all anew


@dataclass(frozen=True)
class Side:
    """The first `count` crystals of a store, or of a split of it."""

    store: Path
    split: str | None
    count: int
    potential: str = ""  # its name and version, if energies are wanted

    def name(self) -> str:
        """Of the file that describes them: another one for other crystals."""
        shards = [shard.sha256 for shard in read_manifest(self.store).shards]
        told = json.dumps([shards, self.split, self.count, self.potential, SYMPREC, _RULES])
        return f"described-{hashlib.sha256(told.encode()).hexdigest()[:12]}.npy"

    def read(self, folder: Path) -> "Described":
        """What `describe` wrote."""
        values = np.load(folder / self.name(), mmap_mode="r")
        return Described(values[:, :-2], values[:, -2].astype(np.int64), values[:, -1].astype(np.float64))


@dataclass(frozen=True)
class Described:
    """N crystals."""

    fingerprints: np.ndarray  # (N, 61) float32, nan where there is none
    space_groups: np.ndarray  # (N,) int64, 0 where none was found
    energies: np.ndarray  # (N,) eV/atom, nan where unknown


@dataclass(frozen=True)
class DescribeBlock:
    """Work of the runner: what is known of the crystals of one block; nan, and 0 of a space group, where it is not."""

    side: Side
    rows: int

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
        start, values = block.index * self.rows, np.full((block.size, WIDTH), np.nan, dtype=np.float32)
        values[:, -2] = 0
        crystals = Store(self.side.store, self.side.split, dtype=None, columns=[]).rows(
            range(start, start + block.size)
        ).crystals  # fmt: skip
        for first in range(0, block.size, TOGETHER):
            last = min(first + TOGETHER, block.size)
            together = -1 - first  # an item of its own: where it fails, its crystals are tried one by one
            cursor.at(together)
            if together not in cursor.culprits:
                values[first:last] = _described(crystals[first:last], self.side)
                continue
            for at in range(first, last):
                cursor.at(at)
                if at not in cursor.culprits:
                    values[at] = _described(crystals[at], self.side)
        cursor.rest()
        with draft.open("wb") as file:
            np.save(file, values)
        return {"fingerprints": int(np.isfinite(values[:, 0]).sum())}


def _described(crystals: Crystals, side: Side) -> np.ndarray:
    """(B, WIDTH) of B crystals. No energy is asked of those too dense for a fingerprint."""
    values = np.full((len(crystals), WIDTH), np.nan)
    values[:, :-2] = fingerprints(crystals).values
    values[:, -2] = [space_group_number(crystals[at], SYMPREC) for at in range(len(crystals))]
    fit = np.flatnonzero(np.isfinite(values[:, 0]))
    if side.potential and len(fit):
        values[fit, -1] = energies(crystals[torch.from_numpy(fit)])
    return values


def describe(
    side: Side, kind: str, folder: Path, lease: Lease, stop: StopFlag, processes: int | None, timeout_s: float
) -> None:
    """Write the file in `folder` that `side.read` reads, unless it is there; together with the others of the launch.

    kind: own, or known of the reference.
    """
    file = folder / side.name()
    if file.exists():
        return
    rows = max(ROWS, -(-side.count // MOST_BLOCKS))
    blocks = [Block(number, lease.folder / f"described-{kind}-{number:06d}.npy", min(rows, side.count - start))
              for number, start in enumerate(range(0, side.count, rows))]  # fmt: skip
    how = How(processes, PRELOAD, timeout_s, label=LABELS[kind])
    made = run_blocks(blocks, DescribeBlock(side, rows), lease=lease, stop=stop, how=how)
    made.refuse_failed(side.store, len(blocks))

    def join(draft: Path) -> None:
        with whole(file, token=lease.token) as joined, joined.open("wb") as target:
            head = {"descr": "<f4", "fortran_order": False, "shape": (side.count, WIDTH)}
            np.lib.format.write_array_header_1_0(target, head)
            for block in blocks:
                target.write(np.load(block.path).tobytes())
        draft.write_text("joined\n")

    once(lease.folder / f"joined-{kind}", join, lease=lease, stop=stop)
