"""What fills the folder of an export, format by format; ids and columns carried through."""

import csv
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hpcgen.crystal.composition import reduced_formula
from hpcgen.crystal.crystals import Crystals
from hpcgen.store import formats
from hpcgen.store.bundle import array_file, zip_file
from hpcgen.store.rows import Rows

LONGEST_NAME = 120  # characters of a file name
Write = Callable[[Rows], None]
_FILES = {"extxyz": "crystals.extxyz", "json": "crystals.json", "csv": "crystals.csv"}


@contextmanager
def writer(format: str, folder: Path, symprec: float | None) -> Iterator[Write]:
    """Yield what adds rows to the files of a format in `folder`. symprec: of CIFs, Å."""
    with (folder / _FILES.get(format, "index.csv")).open("w", encoding="utf-8", newline="") as file:
        if format == "extxyz":
            yield lambda rows: _write_extxyz(file, rows)
        elif format == "json":
            yield from _json_array(file)
        elif format == "csv":
            yield _table(file, "cif_string", lambda row: _cif(row, symprec, _safe(row.ids[0])))
        elif format == "zip":
            with zip_file(folder / "crystals.zip") as add:
                yield _table(file, "file", _each_as_file(format, symprec, add))
        elif format in ("cdvae", "diffcsp"):
            with array_file(folder / "eval_gen.pt", samples=format == "cdvae") as add_crystals:
                yield _with_places(file, add_crystals)
        else:
            yield _table(file, "file", _each_as_file(format, symprec, lambda name, text: _write(folder / name, text)))


def _write_extxyz(file: TextIO, rows: Rows) -> None:
    file.write(formats.extxyz(rows.crystals, list(rows.ids), facts(rows)))


def _json_array(file: TextIO) -> Iterator[Write]:
    """One crystal a line, the whole one JSON array."""
    before = itertools.chain(["[\n"], itertools.repeat(",\n"))

    def write(rows: Rows) -> None:
        for line in formats.pymatgen_json(rows.crystals, list(rows.ids), facts(rows)):
            file.write(next(before) + line)

    yield write
    file.write("\n]\n")


def _table(file: TextIO, last: str, value: Callable[[Rows], str]) -> Write:
    """CSV of ids, formulas and columns; what `value` gives of each crystal stands in the column `last`."""
    writer: csv.DictWriter[str] | None = None

    def write(rows: Rows) -> None:
        nonlocal writer
        if writer is None:
            own = [name for name in rows.columns if name not in ("id", "formula", "num_atoms", last)]
            writer = csv.DictWriter(file, ["id", "formula", "num_atoms", *own, last], extrasaction="ignore",
                                    lineterminator="\n")  # fmt: skip
            writer.writeheader()
        for k, known in enumerate(facts(rows)):
            row = one(rows, k)
            numbers = row.crystals.atomic_numbers
            told = {"id": row.ids[0], "formula": reduced_formula(numbers), "num_atoms": len(numbers)}
            writer.writerow({**known, **told, last: value(row)})

    return write


def _each_as_file(format: str, symprec: float | None, add: Callable[[str, str], None]) -> Callable[[Rows], str]:
    """What hands one crystal to `add` as a file's name and text, and gives the name."""
    names = Names("poscar" if format == "poscar" else "cif")

    def file_of(row: Rows) -> str:
        name = names.of(row.ids[0])
        if format == "poscar":
            add(name, formats.poscar(row.crystals, row.ids[0]))
        else:
            add(name, _cif(row, symprec, name.removesuffix(".cif")))
        return name

    return file_of


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _with_places(file: TextIO, add: Callable[[Crystals], None]) -> Write:
    """What hands crystals to `add`, and writes the table that says where each of them stands in the arrays."""
    places = itertools.count()
    table = _table(file, "place", lambda _: str(next(places)))

    def write(rows: Rows) -> None:
        add(rows.crystals)
        table(rows)

    return write


def _cif(row: Rows, symprec: float | None, name: str) -> str:
    return formats.cif(row.crystals, name, row.ids[0], facts(row)[0], symprec)


def one(rows: Rows, k: int) -> Rows:
    """The k-th row alone."""
    columns = {
        name: type(column)(column.spec, column.values[k : k + 1], column.missing[k : k + 1])
        for name, column in rows.columns.items()
    }
    return Rows(rows.crystals[k], [rows.ids[k]], columns)


def facts(rows: Rows) -> list[dict[str, Any]]:
    """The columns of each crystal as plain values, missing ones left out."""
    known: list[dict[str, Any]] = [{} for _ in range(len(rows))]
    for name, column in rows.columns.items():
        for each, value, gone in zip(known, column.values.tolist(), column.missing.tolist(), strict=True):
            if not gone and value == value and value not in (float("inf"), float("-inf")):  # JSON has no such numbers
                each[name] = value
    return known


class Names:
    """File names from ids: readable, safe on every file system and no two alike, capitals aside."""

    def __init__(self, format: str) -> None:
        self._before, self._ending = ("", ".cif") if format == "cif" else ("POSCAR_", "")
        self._taken: set[str] = {"index.csv"}

    def of(self, id: str) -> str:
        """A name that was not given before."""
        stem, number = _safe(id), 1
        name = f"{self._before}{stem}{self._ending}"
        while name.lower() in self._taken:
            number += 1
            name = f"{self._before}{stem}~{number}{self._ending}"
        self._taken.add(name.lower())
        return name


def _safe(id: str) -> str:
    return re.sub(r"[^A-Za-z0-9_+.\-]", "_", id)[:LONGEST_NAME].lstrip(".-") or "_"
