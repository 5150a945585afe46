"""The crystal of a reference that is most like each crystal of a run, by the periodic Tanimoto similarity."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array, load_npz, save_npz, vstack

from hpcgen.metrics.cells import Sets
from hpcgen.metrics.similarity import fingerprints, nearest
from hpcgen.runner.blocks import Block, How, run_blocks
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.worker import Cursor

_PIECE = 1024  # crystals of a block


@dataclass(frozen=True)
class Nearest:
    """Of N crystals of a run."""

    place: np.ndarray  # (N,) in the reference
    similarity: np.ndarray  # (N,) 0 to 1, NaN for a crystal without neighbours that could be counted

    @staticmethod
    def load(paths: Sequence[Path]) -> "Nearest":
        """What `find_nearest` wrote."""
        parts = [np.load(path) for path in paths]
        return Nearest(*(np.concatenate([part[name] for part in parts]) for name in Nearest.__dataclass_fields__))


def find_nearest(sets: Sets, folder: Path, *, lease: Lease, stop: StopFlag, how: How) -> list[Path]:
    """Find them, or finish what an earlier call began in `folder`; the files that `Nearest.load` reads."""
    pieces = sets.pieces(_PIECE)
    own = [piece for piece in pieces if piece[0] < sets.count]
    known = [
        Block(number, folder / f"known-{number:05d}.npz", end - start)
        for number, (start, end) in enumerate(pieces[len(own) :])
    ]
    asked = [
        Block(number, folder / f"nearest-{number:05d}.npz", end - start) for number, (start, end) in enumerate(own)
    ]
    paths = tuple(block.path for block in known)
    for what, blocks, work in (
        ("fingerprints of the reference", known, FingerprintBlock(sets, tuple(pieces[len(own) :]))),
        ("nearest of the reference", asked, NearestBlock(sets, tuple(own), paths)),
    ):
        outcome = run_blocks(blocks, work, lease=lease, stop=stop, how=replace(how, label=what))
        outcome.refuse_failed(folder, len(blocks), what)
    return [block.path for block in asked]


@dataclass(frozen=True)
class FingerprintBlock:
    """Work of the runner: fingerprints of one piece of the reference."""

    sets: Sets
    pieces: tuple[tuple[int, int], ...]

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
        start, end = self.pieces[block.index]
        with draft.open("wb") as file:
            save_npz(file, fingerprints(self.sets.crystals(np.arange(start, end))), compressed=False)
        return {}


@dataclass(frozen=True)
class NearestBlock:
    """Work of the runner: the nearest to each crystal of one piece of the run."""

    sets: Sets
    pieces: tuple[tuple[int, int], ...]
    known: tuple[Path, ...]

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
        start, end = self.pieces[block.index]
        place, similarity = nearest(fingerprints(self.sets.crystals(np.arange(start, end))), _all(self.known))
        with draft.open("wb") as file:
            np.savez(file, place=place, similarity=similarity)
        return {}


@lru_cache(maxsize=1)
def _all(paths: tuple[Path, ...]) -> csr_array:
    """The fingerprints in these files, kept for the next block."""
    return csr_array(vstack([load_npz(path) for path in paths]))
