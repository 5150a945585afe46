#!/usr/bin/env python
"""A store from CDVAE-style CSV files: one crystal per row, its CIF text in the column `cif`; gzipped or not.

python preprocess/mp20.py train.csv val.csv test.csv --split source --out stores/mp20
"""

import argparse
import codecs
import csv
import gzip
import io
import itertools
import logging
import math
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import drive

from hpcgen.errors import InputError, UsageError
from hpcgen.store.layout import ColumnSpec, sha256_of
from hpcgen.store.source import Parsed, Raw, Value

_LOG = logging.getLogger("hpcgen.preprocess")
# column of the file -> (house name, kind, unit)
KNOWN = {
    "formation_energy_per_atom": ("formation_energy_per_atom", "float", "eV/atom"),
    "energy_per_atom": ("energy_per_atom", "float", "eV/atom"),
    "e_above_hull": ("e_above_hull", "float", "eV/atom"),
    "energy_above_hull": ("e_above_hull", "float", "eV/atom"),
    "band_gap": ("band_gap", "float", "eV"),
    "dir_gap": ("dir_gap", "float", "eV"),
    "ind_gap": ("ind_gap", "float", "eV"),
    "heat_all": ("heat_all", "float", "eV/atom"),
    "heat_ref": ("heat_ref", "float", "eV/atom"),
    "theoretical": ("theoretical", "bool", ""),
    "year": ("year", "int", ""),
    "source": ("source", "str", ""),
    "spacegroup.number": ("space_group_reported", "int", ""),
}
PIECE = 2**20  # bytes of a file read at a time
ABSENT = {"", "nan", "none", "null", "n/a"}
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class CsvFiles:
    """Rows of one or more CSV files, one after the other."""

    files: tuple[Path, ...]
    cif_column: str = "cif"
    id_column: str = "material_id"
    extra: tuple[str, ...] = ()  # name or name:unit of further float columns
    name: str = "mp20"
    columns: dict[str, ColumnSpec] = field(init=False)
    _taken: dict[str, tuple[str, str]] = field(init=False, repr=False)  # column of the file -> house name, kind

    def __post_init__(self) -> None:
        known = dict(KNOWN)
        for word in self.extra:
            column, _, unit = word.partition(":")
            known[column] = (column, "float", unit)
        present = {column for file in self.files for column in self.header(file)}
        for word in self.extra:
            if word.partition(":")[0] not in present:
                raise InputError(f"{word.partition(':')[0]}: no input has this column; they have {sorted(present)}")
        self._taken = {column: known[column][:2] for column in known if column in present}
        self.columns = {known[column][0]: ColumnSpec(*known[column][1:]) for column in self._taken}
        for file in self.files:
            self._refuse_twins(file)
        self._reader: Iterator[tuple[list[str], list[str], str | None]] | None = None
        self._at = 0

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_reader": None, "_at": 0}

    def identity(self) -> dict:
        """What makes this input this input: names, sizes and contents."""
        columns = {column: [house, *vars(self.columns[house]).values()] for column, (house, _) in self._taken.items()}
        files = [[file.name, file.stat().st_size, sha256_of(file)] for file in self.files]
        return {"files": files, "cif": self.cif_column, "id": self.id_column, "columns": columns}

    def size(self) -> int:
        """Number of rows; reads every file to its end, so a truncated one is met here. Raises InputError."""
        for file in self.files:
            if self.id_column not in self.header(file):
                _LOG.warning("%s: no column %s; ids are row-0, row-1, …", file, self.id_column)
        return sum(sum(1 for _ in self._table(file)) for file in self.files)

    def rows(self, start: int, stop: int) -> Iterator[Raw]:
        """Rows start to stop; goes on from the last call's end where it can."""
        if self._reader is None or self._at > start:
            self._reader, self._at = self._all(), 0
        reader, self._reader = self._reader, None  # a reader that fails half-way is not used again
        ahead = itertools.islice(reader, start - self._at, stop - self._at)
        for row, (header, cells, split) in enumerate(ahead, start):
            yield self._raw(header, cells, row, split)
        self._reader, self._at = reader, stop

    def parse(self, raw: Raw) -> list[Parsed]:
        """The row's CIF as one crystal. Raises Refused."""
        from hpcgen.crystal.cif import read_cif  # imports torch: the workers' business

        return [Parsed(raw.id, crystal) for crystal in read_cif(raw.body)[:1]]

    def _all(self) -> Iterator[tuple[list[str], list[str], str | None]]:
        """Header, cells and split of every row."""
        for file in self.files:
            header = self.header(file)
            split = _split_of(file)
            for cells in self._table(file):
                yield header, cells, split

    def _raw(self, header: list[str], cells: list[str], row: int, split: str | None) -> Raw:
        if len(cells) != len(header):
            fault = ("bad-row", f"{len(cells)} cells, want {len(header)} as the header has")
            return Raw(f"row-{row}", "", {}, split, fault)
        named = dict(zip(header, cells, strict=True))
        name = named.get(self.id_column, "").strip() or f"row-{row}"
        try:
            name.encode()
            columns = {house: _value(column, kind, named[column])
                       for column, (house, kind) in self._taken.items() if column in named}  # fmt: skip
        except UnicodeEncodeError:
            return Raw(f"row-{row}", "", {}, split, ("not-utf-8", "the id is not UTF-8 text"))
        except ValueError as wrong:
            return Raw(name, "", {}, split, ("bad-value", str(wrong)))
        return Raw(name, named[self.cif_column].encode("utf-8", "surrogateescape"), columns, split)

    def header(self, file: Path) -> list[str]:
        """Names of the columns. Raises InputError."""
        header = next(self._lines(file), None)
        if header is None:
            raise InputError(f"{file}: is empty, want a CSV with a column {self.cif_column}")
        if self.cif_column not in header:
            raise InputError(f"{file}: no column {self.cif_column} among {', '.join(header)}")
        return header

    def _refuse_twins(self, file: Path) -> None:
        met: dict[str, str] = {}
        for column in self.header(file):
            house = self._taken.get(column, (column, ""))[0]
            if column in self._taken and met.setdefault(house, column) != column:
                raise InputError(f"{file}: columns {met[house]} and {column} both mean {house}; leave one out")

    def _table(self, file: Path) -> Iterator[list[str]]:
        lines = self._lines(file)
        next(lines, None)
        return (cells for cells in lines if cells)

    @staticmethod
    def _lines(file: Path) -> Iterator[list[str]]:
        csv.field_size_limit(2**27)
        table = None
        try:
            with file.open("rb") as start:
                zipped = start.read(2) == b"\x1f\x8b"
            with cast(IO[bytes], gzip.open(file)) if zipped else file.open("rb") as data:
                lines = itertools.chain.from_iterable(_pieces(data))
                table = csv.reader(lines, strict=True)  # a stray quote would swallow the rows behind it
                yield from table
        except (OSError, EOFError, zlib.error, csv.Error) as fault:
            where = f", line {table.line_num}" if table else ""
            raise InputError(f"{file}{where}: cannot be read as CSV ({str(fault) or type(fault).__name__})") from fault


def _pieces(data: IO[bytes]) -> Iterator[Iterable[str]]:
    """The lines of a file, a piece of it at a time: those of a text file of gzip's take twice as long."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    rest = ""
    while piece := data.read(PIECE):
        text = rest + decoder.decode(piece)
        end = max(text.rfind("\n"), text.rfind("\r", 0, -1)) + 1
        rest = text[end:]
        yield io.StringIO(text[:end], newline="")
    yield io.StringIO(rest + decoder.decode(b"", True), newline="")


def _split_of(file: Path) -> str | None:
    """The split that a file's name ends in: mp20_train.csv.gz is train."""
    return SPLITS.get(file.name.split(".")[0].rpartition("_")[2].lower())


def _value(column: str, kind: str, text: str) -> Value:
    """A cell as the kind its column holds; None where it is empty. Raises ValueError."""
    text = text.strip()
    if text.lower() in ABSENT:
        return None
    try:
        if kind == "float":
            number = float(text)
            if math.isinf(number):
                raise ValueError
            return number
        if kind == "int":
            return int(float(text))
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{column} is {text!r}, want {kind}") from None
    return text


def make_source(args: argparse.Namespace) -> CsvFiles:
    """The source that the command line names."""
    if args.split == "source":
        unknown = [file for file in args.inputs if _split_of(file) is None]
        if unknown:
            raise UsageError(f"{unknown[0]}: --split source wants file names that end in train, val or test")
    source = CsvFiles(tuple(args.inputs), args.cif_column, args.id_column or "material_id", tuple(args.column))
    for file in args.inputs:
        if args.id_column and args.id_column not in source.header(file):
            raise InputError(f"{file}: no column {args.id_column} among {', '.join(source.header(file))}")
    return source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", metavar="CSV", type=Path, nargs="+", help="CSV files, gzipped or not")
    parser.add_argument("--cif-column", default="cif", help="column with the CIF text")
    parser.add_argument("--id-column", help="column with the id (default: material_id, else rows are numbered)")
    parser.add_argument("--column", action="append", default=[], metavar="NAME[:UNIT]", help="a further number column")
    return drive.run(parser, make_source)


if __name__ == "__main__":
    sys.exit(main())
