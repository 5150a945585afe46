#!/usr/bin/env python
"""A store from C2DB, the Computational 2D Materials Database, or another ASE database with its keys.

python preprocess/c2db.py c2db.db --no-purify --no-niggli --out stores/c2db

A row is one layer in a cell with vacuum along the direction that is not periodic. The cell is taken as it
is, and as periodic in all three directions; the column `dimension` says in how many it really is (2), and
energies per atom are those of the layer. With --no-purify --no-niggli the cell also stays as it is in the
store: else it may come out as another cell of the same lattice, with the vacuum along another axis.

C2DB: S. Haastrup et al., 2D Materials 5, 042002 (2018); M. N. Gjerding et al., 2D Materials 8, 044002 (2021).
"""

import argparse
import math
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import drive

from hpcgen.crystal.convert import from_ase
from hpcgen.crystal.refused import Refused
from hpcgen.errors import InputError
from hpcgen.store.layout import ColumnSpec, sha256_of
from hpcgen.store.source import Parsed, Raw, Value

if TYPE_CHECKING:
    from ase.db.row import AtomsRow

# house name -> key of the database (as in ASR, which makes C2DB), kind, unit
TAKEN = {
    "formation_energy_per_atom": ("hform", "float", "eV/atom"),
    "e_above_hull": ("ehull", "float", "eV/atom"),
    "band_gap": ("gap", "float", "eV"),
    "band_gap_hse": ("gap_hse", "float", "eV"),
    "band_gap_gw": ("gap_gw", "float", "eV"),
    "work_function": ("workfunction", "float", "eV"),
    "smallest_hessian_eigenvalue": ("minhessianeig", "float", "eV/Å²"),
    "magnetic": ("is_magnetic", "bool", ""),
    "layer_group": ("lgnum", "int", ""),
    "layer_group_symbol": ("layergroup", "str", ""),
}
SUFFIXES = (".db", ".json")
SQLITE = b"SQLite format 3\0"


@dataclass
class AseDatabase:
    """Rows of an ASE database, in the order of their ids there."""

    file: Path

    name: ClassVar[str] = "c2db"
    columns: ClassVar[dict[str, ColumnSpec]] = {
        **{house: ColumnSpec(*kept[1:]) for house, kept in TAKEN.items()},
        "dimension": ColumnSpec("int"),
    }

    def __post_init__(self) -> None:
        self._ids: list[int] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ids": None}

    def identity(self) -> dict:
        """Name and content of the file. Raises InputError."""
        _check(self.file)
        return {"file": self.file.name, "sha256": sha256_of(self.file)}

    def size(self) -> int:
        """Number of rows. Raises InputError."""
        return len(self._row_ids())

    def rows(self, start: int, stop: int) -> Iterator[Raw]:
        """Rows start to stop."""
        database = _connect(self.file)
        for number in self._row_ids()[start:stop]:
            try:
                row = database.get(id=number, include_data=False)
            except (ValueError, KeyError, sqlite3.Error, UnicodeDecodeError) as fault:
                yield Raw(f"row-{number}", None, fault=("unreadable", " ".join(str(fault).split())))
                continue
            yield _raw(row)

    def parse(self, raw: Raw) -> list[Parsed]:
        """The row's atoms, periodic in all directions. Raises Refused."""
        atoms = raw.body.toatoms()
        if atoms.cell.rank < 3:
            raise Refused("no-cell", f"the cell has {atoms.cell.rank} vectors, want 3: vacuum is part of the cell")
        atoms.pbc = True
        return [Parsed(raw.id, from_ase([atoms]))]

    def _row_ids(self) -> list[int]:
        if self._ids is None:
            _check(self.file)
            try:
                self._ids = sorted(row.id for row in _connect(self.file).select(columns=["id"], include_data=False))
            except (sqlite3.Error, ValueError, KeyError, TypeError, AttributeError, OSError) as fault:
                reason = " ".join(str(fault).split())
                raise InputError(f"{self.file}: cannot be read as an ASE database ({reason})") from fault
        return self._ids


def _check(file: Path) -> None:
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    if file.suffix not in SUFFIXES:
        raise InputError(f"{file}: want an ASE database that ends in {' or '.join(SUFFIXES)}")
    with file.open("rb") as opened:
        start = opened.read(len(SQLITE))
    if file.suffix == ".db" and start != SQLITE:  # SQLite itself would make an empty file a new database
        raise InputError(f"{file}: is no SQLite database")


def _connect(file: Path) -> Any:
    from ase.db import connect

    return connect(file, use_lock_file=False)


def _raw(row: "AtomsRow") -> Raw:
    known = row.key_value_pairs
    name = str(known.get("uid") or f"row-{row.id}")
    try:
        columns = {house: _value(known, key, kind) for house, (key, kind, _) in TAKEN.items()}
    except ValueError as fault:
        return Raw(name, None, fault=("bad-value", str(fault)))
    return Raw(name, row, {**columns, "dimension": int(sum(row.pbc))})


def _value(known: dict[str, Any], key: str, kind: str) -> Value:
    """What the row has under `key`, as `kind`; None where it is absent or not finite. Raises ValueError."""
    found = known.get(key)
    if found is None:
        return None
    try:
        if kind == "str":
            return str(found)
        number = float(found)
    except (TypeError, ValueError):
        raise ValueError(f"{key} is {found!r}, want {kind}") from None
    if not math.isfinite(number):
        return None
    return {"float": float, "int": int, "bool": bool}[kind](number)


def make_source(args: argparse.Namespace) -> AseDatabase:
    """The source that the command line names."""
    return AseDatabase(args.database)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("database", metavar="FILE.db", type=Path, help="ASE database: SQLite (.db) or JSON (.json)")
    return drive.run(parser, make_source)


if __name__ == "__main__":
    sys.exit(main())
