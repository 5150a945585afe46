"""Pass 3 of building a store: the crystals of one shard, gathered from the staging files, with edges and features."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcgen.crystal.magpie import MAGPIE_COLUMNS, magpie_features
from hpcgen.crystal.neighbours import Edges, nearest_edges, radius_edges
from hpcgen.runner.blocks import Block
from hpcgen.runner.guard import Cursor
from hpcgen.store.arrays import Arrays, count, cut, join, take
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.read import decode
from hpcgen.store.rows import Column, Rows
from hpcgen.store.settings import BuildSettings
from hpcgen.store.staging import KEYS, read_staged
from hpcgen.store.write import encode, write_arrays

PIECE_ATOMS = 8192  # 40 MB of edges of 6 Å; half of it costs 5 µs more for each crystal


@dataclass(frozen=True)
class WriteShard:
    """Work of the runner: gather the crystals of one shard, add edges and features, write it."""

    staged: tuple[Path, ...]
    plan: Path
    columns: dict[str, ColumnSpec]  # of the staging files
    head: Head
    settings: BuildSettings
    shards: tuple[tuple[str, str, int, int], ...]

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int]:
        name, split, start, stop = self.shards[block.index]
        with np.load(self.plan) as plan:
            number, at = plan["block"][start:stop], plan["at"][start:stop]
        parts: list[Arrays] = []
        kept = {column: spec for column, spec in self.columns.items() if column == "key.id" or column not in KEYS}
        for staging in np.unique(number).tolist():
            arrays = read_staged(self.staged[staging], kept)
            chosen = take(arrays, at[number == staging])
            for first, end in _pieces(np.diff(chosen["ptr"])):
                cursor.at(sum(map(count, parts)))
                parts.append(encode(self._complete(decode(cut(chosen, first, end), kept)), self.head))
        cursor.rest()
        info = write_arrays(draft, join(parts), self.head, name=name, split=split)
        return {"crystals": info.crystals, "atoms": info.atoms, "edges": info.edges}

    def _complete(self, rows: Rows) -> Rows:
        columns = dict(rows.columns)
        ids = columns.pop("key.id").values.tolist()
        if self.settings.magpie:
            features = magpie_features(rows.crystals.atomic_numbers, rows.crystals.num_atoms)
            for name, values in zip(MAGPIE_COLUMNS, features.T, strict=True):
                columns[name] = Column(ColumnSpec("float"), values, np.isnan(values))
        return Rows(rows.crystals, ids, columns, self._edges(rows))

    def _edges(self, rows: Rows) -> Edges | None:
        if self.settings.edges == "none":
            return None
        if self.settings.edges == "radius":
            return radius_edges(rows.crystals, self.settings.cutoff)
        return nearest_edges(rows.crystals, self.settings.neighbours)


def _pieces(num_atoms: np.ndarray) -> list[tuple[int, int]]:
    """Runs of crystals of about PIECE_ATOMS atoms, which are in memory with their edges at a time."""
    turn = np.cumsum(num_atoms) // PIECE_ATOMS
    bounds = [0, *(np.flatnonzero(np.diff(turn)) + 1).tolist(), len(num_atoms)]
    return [(first, end) for first, end in itertools.pairwise(bounds) if end > first]
