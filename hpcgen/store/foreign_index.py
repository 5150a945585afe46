"""Where the structures of somebody else's files lie, and what they are called.

An index is made once; with it any process can read any of them. Each file, frame or row is one structure asked for.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpcgen.crystal.crystals import Crystals
from hpcgen.store.layout import ColumnSpec
from hpcgen.store.source import Raw, Value

TAKEN = {
    "target": ColumnSpec("str"),  # id of the crystal that a prediction is compared with
    "e_above_hull": ColumnSpec("float", "eV/atom"),
    "formation_energy_per_atom": ColumnSpec("float", "eV/atom"),
    "energy_per_atom": ColumnSpec("float", "eV/atom"),
    "band_gap": ColumnSpec("float", "eV"),
}  # columns of a CSV, words of the comments of an extxyz
ID_NAMES = ("id", "material_id", "immutable_id", "name")  # the first there is
LONGEST_ID, LONGEST_TEXT = 200, 4096  # characters, bytes


@dataclass(frozen=True)
class Index:
    """N structures of an input, in order."""

    ids: np.ndarray  # (N,) str, no two alike
    where: np.ndarray  # (N,) names of files, (N,) numbers of a zip's entries, or (N, 2) first byte and end
    columns: np.ndarray  # names of those of TAKEN that there are, str

    @staticmethod
    def of(names: Iterable[str], kind: str, where: Any, columns: Iterable[str] = ()) -> "Index":
        """names: ids as the input has them, '' for none; kind: file, frame or row."""
        known = [name for name in TAKEN if name in set(columns)]
        return Index(np.array(distinct(names, kind), dtype=np.str_), np.array(where), np.array(known, dtype=np.str_))

    def save(self, draft: Path) -> None:
        """Write the file that blocks read."""
        with draft.open("wb") as file:
            np.savez(file, **vars(self))

    @staticmethod
    def load(path: Path) -> "Index":
        """What `save` wrote."""
        with np.load(path) as known:
            return Index(**{name: known[name] for name in Index.__dataclass_fields__})

    @property
    def specs(self) -> dict[str, ColumnSpec]:
        """The columns with their kinds and units."""
        return {name: TAKEN[name] for name in self.columns.tolist()}

    def pairs(self, start: int, stop: int) -> Iterator[tuple[str, Any]]:
        """Ids and places of structures start to stop."""
        return zip(self.ids[start:stop].tolist(), self.where[start:stop].tolist(), strict=True)

    def spans(self, path: Path, start: int, stop: int) -> Iterator[tuple[str, bytes]]:
        """Ids and bytes of structures start to stop of one file."""
        with path.open("rb") as file:
            for id, (first, end) in self.pairs(start, stop):
                file.seek(first)
                yield id, file.read(end - first)


class Reader(Protocol):
    """One kind of files. Picklable: opens them only inside its methods."""

    def index(self) -> Index:
        """Look through the input once. Raises InputError where it is broken as a whole, or empty."""
        ...

    def rows(self, index: Index, start: int, stop: int) -> Iterator[Raw]:
        """Structures start to stop, unparsed."""
        ...

    def parse(self, raw: Raw) -> Crystals:
        """The crystal, as it is. Raises Refused, or what a reader of somebody else's raises."""
        ...


def distinct(names: Iterable[str], kind: str) -> list[str]:
    """Ids that no two share and any store can hold: the second `a` is `a~2`, one without is `kind`-number."""
    taken: set[str] = set()
    times: Counter[str] = Counter()
    made = []
    for at, name in enumerate(names):
        text = name.strip().replace("\0", "").encode("utf-8", "backslashreplace").decode()[:LONGEST_ID]
        stem = id = text or f"{kind}-{at}"
        while id in taken:
            times[stem] += 1
            id = f"{stem}~{times[stem] + 1}"
        taken.add(id)
        made.append(id)
    return made


def value_of(spec: ColumnSpec, text: str) -> Value:
    """A cell as a value of a column, None (missing) where it is empty or no such value."""
    text = text.strip()
    if spec.kind == "str":
        fits = text and "\0" not in text and len(text.encode("utf-8", "replace")) <= LONGEST_TEXT
        return text if fits else None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
