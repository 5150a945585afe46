"""Somebody else's structures in one file: the frames of an extxyz, or the rows of a CSV that holds CIFs.

Codes of refusal beside those of `crystal.cif` and `crystal.convert`: bad-frame, bad-row.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hpcgen.crystal.convert import from_ase, from_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused
from hpcgen.errors import InputError
from hpcgen.store.foreign_files import cif_crystal
from hpcgen.store.foreign_index import ID_NAMES, TAKEN, Index, value_of
from hpcgen.store.source import Raw

CIF_COLUMNS = ("cif_string", "cif", "structure", "LeMatStructs")  # the first there is
_WORD = re.compile(r'([^\s=]+)=("(?:[^"\\]|\\.)*"|\S*)')


@dataclass(frozen=True)
class Extxyz:
    """A crystal in each frame; ids from the comment lines, else frame-0, frame-1, …"""

    path: Path

    def index(self) -> Index:
        """Where each frame begins and ends. The last one may be cut short; any other fault leaves no way on."""
        ids, spans, columns, line = [], [], set[str](), 1
        with self.path.open("rb") as file:
            start = 0
            while head := file.readline():
                count = self._count(head, line) if head.strip() else -1
                if count >= 0:
                    words = words_of(file.readline())
                    for _ in range(count):
                        if not file.readline():
                            break
                    ids.append(next((words[name] for name in ID_NAMES if name in words), ""))
                    columns |= words.keys() & TAKEN.keys()
                    spans.append((start, file.tell()))
                start, line = file.tell(), line + count + 2
        if not ids:
            raise InputError(f"{self.path}: holds no frames, want an extxyz file")
        return Index.of(ids, "frame", spans, columns)

    def _count(self, head: bytes, line: int) -> int:
        if head.strip().isdigit():
            return int(head)
        told = head[:40].decode("utf-8", "replace").strip()
        raise InputError(f"{self.path}, line {line}: {told!r}, want the number of atoms of the next frame")

    def rows(self, index: Index, start: int, stop: int) -> Iterator[Raw]:
        """Frames as text."""
        for id, text in index.spans(self.path, start, stop):
            words = words_of(text.partition(b"\n")[2].partition(b"\n")[0])
            yield Raw(id, text, {name: value_of(spec, words.get(name, "")) for name, spec in index.specs.items()})

    def parse(self, raw: Raw) -> Crystals:
        """As ASE reads it."""
        from ase.io.extxyz import read_xyz

        text = raw.body.decode("utf-8", "replace")
        count, lines = int(text.split(None, 1)[0]), len(text.splitlines())
        if lines < count + 2:
            raise Refused("bad-frame", f"{max(lines - 2, 0)} of {count} atoms, the file ends there")
        return from_ase([next(iter(read_xyz(io.StringIO(text), 0)))])


def words_of(comment: bytes) -> dict[str, str]:
    """key=value pairs of the comment line of an extxyz, values as they were before they were quoted."""
    words = {}
    for key, value in _WORD.findall(comment.decode("utf-8", "replace")):
        quoted = len(value) > 1 and value[0] == value[-1] == '"'
        words[key] = re.sub(r"\\(.)", r"\1", value[1:-1] if quoted else value)
    return words


@dataclass(frozen=True)
class CifTable:
    """A crystal in each row, as CIF or pymatgen's JSON in one of CIF_COLUMNS; ids from ID_NAMES, else row-0, …"""

    path: Path

    def index(self) -> Index:
        """Where each row begins and ends. Raises InputError where it is no CSV, or no column holds structures."""
        ids, spans = [], []
        with self.path.open("rb") as file:
            rows = self._parsed(file)
            header = next(rows, ([], 0, 0))[0]
            if not any(name in header for name in CIF_COLUMNS):
                told = ", ".join(header)[:200] or "none"
                raise InputError(f"{self.path}: columns {told}; want one of {', '.join(CIF_COLUMNS)}")
            at = next((header.index(name) for name in ID_NAMES if name in header), len(header))
            for cells, start, end in rows:
                ids.append(cells[at] if at < len(cells) else "")
                spans.append((start, end))
        if not ids:
            raise InputError(f"{self.path}: holds no rows")
        return Index.of(ids, "row", spans, header)

    def _parsed(self, file: BinaryIO) -> Iterator[tuple[list[str], int, int]]:
        """Cells of each row that is not blank, its first byte and its end."""
        end = 0

        def lines() -> Iterator[str]:
            nonlocal end
            for line in file:
                end += len(line)
                yield _text(line).removeprefix("\ufeff")

        csv.field_size_limit(2**27)
        table, start = csv.reader(lines(), strict=True), 0  # a stray quote would swallow the rows behind it
        try:
            for cells in table:
                if cells:
                    yield cells, start, end
                start = end
        except csv.Error as fault:
            raise InputError(f"{self.path}, line {table.line_num}: cannot be read as CSV ({fault})") from fault

    def rows(self, index: Index, start: int, stop: int) -> Iterator[Raw]:
        """Rows of another number of cells than the header's are told as faults."""
        with self.path.open("rb") as file:
            header = next(self._parsed(file))[0]
        structure = next(name for name in CIF_COLUMNS if name in header)
        for id, body in index.spans(self.path, start, stop):
            cells = next(csv.reader(io.StringIO(_text(body), newline=""), strict=True))
            if len(cells) != len(header):
                yield Raw(id, "", fault=("bad-row", f"{len(cells)} cells, want {len(header)} as the header has"))
                continue
            named = dict(zip(header, cells, strict=True))
            yield Raw(id, named[structure], {name: value_of(spec, named[name]) for name, spec in index.specs.items()})

    def parse(self, raw: Raw) -> Crystals:
        """As its text begins."""
        if not raw.body.lstrip().startswith("{"):
            return cif_crystal(raw.body.encode("utf-8"))
        from pymatgen.core import Structure

        return from_pymatgen([Structure.from_dict(json.loads(raw.body))])


def _text(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace")
