#!/usr/bin/env python
"""A store from folders of CIF files, or from single CIF files that may hold many structures.

python preprocess/cif_folder.py my_cifs/ --properties id_prop.csv --out stores/mine
"""

import argparse
import csv
import gzip
import hashlib
import logging
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import drive

from hpcgen.errors import InputError, UsageError
from hpcgen.store.layout import ColumnSpec, Head, sha256_of
from hpcgen.store.source import Parsed, Raw, Value

_LOG = logging.getLogger("hpcgen.preprocess")
SUFFIXES = (".cif", ".cif.gz", ".mcif")
DATA_BLOCK = re.compile(rb"(?mi)^data_(\S*)")
MARKS = {
    "disordered": ColumnSpec("bool"),
    "deuterium": ColumnSpec("bool"),
}  # before the policy, before D became H
LARGEST = 64 * 2**20  # bytes of one CIF file that holds a single structure


class Span(NamedTuple):
    """Where a data block lies in its file. `name` is empty where the block is the whole file."""

    first: int  # byte
    end: int
    name: str = ""


@dataclass
class CifFiles:
    """CIF files in the order of their paths; a file with several data blocks gives a row for each."""

    inputs: tuple[Path, ...]
    disorder: str = "drop"
    properties: Path | None = None  # CSV: id, then number columns
    name: str = "cif_folder"
    seed: int = 0
    columns: dict[str, ColumnSpec] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        files = {file: file.relative_to(given) for given in self.inputs for file in _cif_files(given)}
        stems = Counter(_stem(file) for file in files)
        # a stem that several folders have is told apart by its folder
        self._files = {file: _stem(file) if stems[_stem(file)] == 1 else str(below.parent / _stem(file))
                       for file, below in files.items()}  # fmt: skip
        self._values = _read_properties(self.properties) if self.properties else {}
        names = {column for values in self._values.values() for column in values}
        for name in sorted(names & {*MARKS, "space_group"}):
            raise InputError(f"{self.properties}: the column {name} is made by hpcgen itself; give yours another name")
        self.columns = {**{column: ColumnSpec("float") for column in sorted(names)}, **MARKS}
        self._index: list[tuple[Path, Span]] | None = None

    def identity(self) -> dict:
        """What makes this input this input: names and contents of the files, and the policy."""
        listed = "".join(f"{name} {_sha256(file)}\n" for file, name in self._files.items())
        return {
            "files": len(self._files),
            "listing": hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest(),
            "disorder": self.disorder,
            "properties": sha256_of(self.properties) if self.properties else None,
        }

    def size(self) -> int:
        """Number of data blocks in all files; reads each file once."""
        self._index = [(file, span) for file in self._files for span in _blocks(file)]
        if self._values and not any(name in self._values for name in self._files.values()):
            _LOG.warning("%s: none of its %d ids is a file's name without .cif", self.properties, len(self._values))
        return len(self._index)

    def rows(self, start: int, stop: int) -> Iterator[Raw]:
        """Rows start to stop."""
        if self._index is None:
            self.size()
        assert self._index is not None
        for file, span in self._index[start:stop]:
            yield self._raw(file, span)

    def _raw(self, file: Path, span: Span) -> Raw:
        stem = self._files[file]
        if span.end - span.first > LARGEST:
            return Raw(stem, b"", fault=("too-long", f"{span.end - span.first} bytes, want at most {LARGEST}"))
        try:
            body = _read(file)[span.first : span.end]
        except (OSError, EOFError, zlib.error) as fault:
            return Raw(stem, b"", fault=("unreadable", f"{file}: {fault}"))
        name = f"{stem}-{span.name}" if span.name else stem
        return Raw(name, body, self._values.get(name, {}))

    def parse(self, raw: Raw) -> list[Parsed]:
        """The crystals of one data block: one, or several orderings of a disordered one. Raises Refused."""
        from hpcgen.crystal.cif import read_cif  # imports torch: the workers' business

        notes: Counter[str] = Counter()
        crystals = read_cif(raw.body, disorder=self.disorder, seed=f"{self.seed}/{raw.id}", notes=notes)
        names = [raw.id] if len(crystals) == 1 else [f"{raw.id}-{number}" for number in range(len(crystals))]
        marks = {"disordered": notes["disordered"] > 0, "deuterium": notes["deuterium"] > 0}
        return [Parsed(name, crystal, marks) for name, crystal in zip(names, crystals, strict=True)]


def _sha256(file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError as fault:
        return str(fault.errno)


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").rpartition(".")[0]


def _cif_files(given: Path) -> list[Path]:
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise InputError(f"{given}: no such file or folder")
    found = sorted(file for file in given.rglob("*") if file.name.lower().endswith(SUFFIXES) and file.is_file())
    if not found:
        raise InputError(f"{given}: holds no file that ends in {', '.join(SUFFIXES)}")
    return found


@lru_cache(maxsize=1)  # a file of many structures is read once, not once per structure
def _read(file: Path) -> bytes:
    raw = file.read_bytes()
    return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw


def _blocks(file: Path) -> list[Span]:
    """The data blocks of a file that hold atoms; the whole file where there are not several."""
    try:
        body = _read(file)
    except (OSError, EOFError, zlib.error):
        return [Span(0, file.stat().st_size)]
    found = list(DATA_BLOCK.finditer(body))
    if len(found) < 2:
        return [Span(0, len(body))]
    ends = [match.start() for match in found[1:]] + [len(body)]
    spans = [
        Span(match.start(), end, match.group(1).decode("utf-8", "replace"))
        for match, end in zip(found, ends, strict=True)
        if b"_atom_site_" in body[match.start() : end].lower()
    ]
    return spans if len(spans) > 1 else [Span(0, len(body))]


def _read_properties(file: Path) -> dict[str, dict[str, Value]]:
    """Numbers by id from a CSV whose first column is the id. Raises InputError naming the line."""
    values: dict[str, dict[str, Value]] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            table = csv.reader(text)
            names = next(table, ["id"])[1:]
            try:
                Head("properties", columns=dict.fromkeys(names, ColumnSpec("float")))
            except UsageError as fault:
                raise InputError(f"{file}: {fault}") from fault
            for cells in filter(None, table):
                if len(cells) != len(names) + 1:
                    raise InputError(f"{file}, line {table.line_num}: {len(cells)} cells, want {len(names) + 1}")
                pairs = zip(names, cells[1:], strict=True)
                values[cells[0]] = {name: _number(file, table.line_num, name, cell) for name, cell in pairs}
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise InputError(f"{file}: cannot be read as a CSV of id and numbers ({fault})") from fault
    return values


def _number(file: Path, line: int, name: str, cell: str) -> float | None:
    if not cell.strip():
        return None
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{file}, line {line}: {name} is {cell!r}, want a number")
    return number


def main(kind: type[CifFiles] = CifFiles, told: str | None = __doc__) -> int:
    parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", metavar="FOLDER", type=Path, nargs="+", help="folders or files")
    parser.add_argument("--properties", type=Path, help="CSV: file name without .cif, then number columns")
    parser.add_argument("--disorder", default="drop", help=drive.DISORDER_HELP)

    def make_source(args: argparse.Namespace) -> CifFiles:
        from hpcgen.crystal.disorder import orderings_of

        orderings_of(args.disorder)
        return kind(tuple(args.inputs), args.disorder, args.properties, seed=args.seed)

    return drive.run(parser, make_source)


if __name__ == "__main__":
    sys.exit(main())
