"""`hpcgen export`: chosen crystals of a store as files of other programs, ids and columns carried through."""

import csv
import itertools
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from hpcgen.crystal.composition import reduced_formula
from hpcgen.errors import InputError, UsageError
from hpcgen.files import DRAFT, make_folder, storage_faults
from hpcgen.store import formats
from hpcgen.store.layout import MANIFEST
from hpcgen.store.read import Store
from hpcgen.store.rows import Rows
from hpcgen.store.where import Condition, named
from hpcgen.store.write import StoreWriter

_LOG = logging.getLogger(__name__)
FORMATS = ("cif", "extxyz", "poscar", "json", "csv", "store")
MOST_FILES = 10_000  # of one folder: more is slow to list and unwelcome on shared file systems
CHUNK = 1024  # crystals in memory at a time
_WITHIN = ".export-"  # a draft within the folder it is to fill
_LAST = ("index.csv", MANIFEST)  # they say that all else is there
LONGEST_NAME = 120  # characters of a file name
Write = Callable[[Rows], None]


@dataclass(frozen=True)
class Request:
    """What is to be exported, and how. Raises UsageError for what cannot be."""

    run: Path
    format: str
    out: Path  # a folder, new or empty
    where: str | None = None
    top: int | None = None
    by: str | None = None  # column to order by, '-' before it for descending; None: the order of the store
    split: str | None = None
    symprec: float | None = None  # of CIFs: symmetrised within so many Å

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"--format {self.format}: want one of {', '.join(FORMATS)}")
        if self.top is not None and self.top < 1:
            raise UsageError(f"--top {self.top}: want at least 1")
        if self.symprec is not None and self.format not in ("cif", "csv"):
            raise UsageError(f"--symprec {self.symprec}: only a CIF holds symmetry, not {self.format}")
        if self.format == "store" and (self.top is not None or self.by is not None) and self.split is None:
            raise UsageError("--format store keeps train, val and test apart: --top and --by want --split too")
        if self.symprec is not None and not 0 < self.symprec <= 1:
            raise UsageError(f"--symprec {self.symprec}: want Å above 0, up to 1")


def export(request: Request) -> int:
    """Write the chosen crystals into the folder `out`, which appears whole or stays as it was; how many they are.

    cif, poscar: a file each, and index.csv; extxyz, json, csv: one file; store: another store, splits and edges kept.
    Memory stays flat but for a file each. Raises UsageError, InputError if there is no crystal to write, StorageError.
    """
    request = replace(request, out=_resolved(request.out))
    _refuse_taken(request.out)
    if request.format == "store":
        return _export_store(request)
    store = Store(request.run, request.split, dtype=None, cache_bytes=64 << 20)
    places = choose(store, request)
    if len(places) > MOST_FILES and request.format in ("cif", "poscar"):
        raise UsageError(
            f"--format {request.format}: {len(places):,} crystals would be as many files, want at most {MOST_FILES:,}; "
            "choose fewer by --top or --where, or --format extxyz, json or csv, which are one file"
        )
    with _whole_folder(request.out) as draft, _writer(request, draft) as write:
        for start in range(0, len(places), CHUNK):
            write(store.rows(places[start : start + CHUNK]))
    return len(places)


def _export_store(request: Request) -> int:
    whole, chosen = Store(request.run, request.split), 0
    told = {"where": request.where or "", "top": request.top or 0, "by": request.by or ""}
    settings = {**whole.head.settings, "chosen": {"from": whole.head.settings_hash, **told}}
    with _whole_folder(request.out) as draft, StoreWriter(draft, replace(whole.head, settings=settings)) as writer:
        for split in dict.fromkeys(shard.split for shard in whole.shards):
            store = Store(request.run, split, dtype=None, edges=whole.head.edges or False, cache_bytes=64 << 20)
            places = choose(store, request, request.split is not None)
            chosen += len(places)
            for start in range(0, len(places), CHUNK):
                writer.add(split, store.rows(places[start : start + CHUNK]))
        if not chosen:
            raise InputError(f"{request.run}: none of {len(whole)} crystals fulfils {request.where!r}")
    return chosen


def choose(store: Store, request: Request, some: bool = True) -> np.ndarray:
    """Places in the store of the crystals that fulfil `where`, in the order of `by`, the first `top`. (n,) int64.

    Raises InputError where there are none and `some` are wanted.
    """
    columns = store.head.columns
    empty = store.rows([])
    condition = Condition(request.where, columns, empty) if request.where is not None else None
    name = request.by.removeprefix("-") if request.by is not None else None
    if name is not None and (kind := named(empty, name, columns).kind) == "elements":
        raise UsageError(f"--by {name}: {kind} have no order")
    found, keys, start, without = [], [], 0, 0
    for rows in store.iter_rows():
        chosen = condition(rows) if condition else np.ones(len(rows), dtype=bool)
        if name is not None:
            key = named(rows, name, columns)
            known = ~np.broadcast_to(np.asarray(key.missing), len(rows))
            without += int((chosen & ~known).sum())
            chosen &= known
            keys.append(key.values[chosen])
        found.append(start + np.flatnonzero(chosen))
        start += len(rows)
    places = np.concatenate(found)
    if name is not None:
        places = places[_order(np.concatenate(keys), request.by != name)]
    if without:
        _LOG.warning("%d crystals without a value of %s are left out", without, name)
    if some and not len(places):
        wish = f"fulfils {request.where!r}" if request.where else f"has a value of {name}"
        raise InputError(f"{store.path}: none of {len(store)} crystals {wish}")
    return places[: request.top]


def _order(keys: np.ndarray, descending: bool) -> np.ndarray:
    """Stable order of numbers or texts; equal ones stay in the order of the store. (n,) -> (n,)."""
    _, rank = np.unique(keys.astype(str) if keys.dtype == object else keys, return_inverse=True)
    return np.argsort(-rank if descending else rank, kind="stable")


def _resolved(out: Path) -> Path:
    """With a name of its own, which '.' lacks, and where a link points to."""
    try:
        return out.resolve()
    except (OSError, RuntimeError) as fault:  # a link to itself; the folder we are in is gone
        raise UsageError(f"--out {out}: {getattr(fault, 'strerror', None) or fault}") from None


def _refuse_taken(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file, want a new or empty folder")
    with storage_faults(out):
        if out.is_dir() and any(not _is_draft(entry.name) for entry in out.iterdir()):
            raise UsageError(f"--out {out}: is not empty; want a new or empty folder")


def _is_draft(name: str) -> bool:
    """Of an export that was killed."""
    return name.startswith(_WITHIN) and name.endswith(DRAFT)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a draft folder; put it in place only if all went well.

    An empty folder that is there stays: it may be the one we are in, or where a disk is mounted. It is filled from a
    draft within, which takes a moment, the table of a folder of files and the manifest of a store last.
    """
    name, there = f"{out.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{DRAFT}", out.is_dir()
    draft = out / f"{_WITHIN}{name}" if there else out.with_name(name)
    make_folder(draft)
    try:
        with storage_faults(out):
            yield draft
            if there:
                for entry in sorted(draft.iterdir(), key=lambda entry: (entry.name in _LAST, entry.name)):
                    entry.replace(out / entry.name)
            else:
                draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _writer(request: Request, folder: Path) -> Iterator[Write]:
    name = {"extxyz": "crystals.extxyz", "json": "crystals.json", "csv": "crystals.csv"}.get(
        request.format, "index.csv"
    )
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        if request.format == "extxyz":
            yield lambda rows: _write_extxyz(file, rows)
        elif request.format == "json":
            yield from _json_array(file)
        elif request.format == "csv":
            yield _table(file, "cif_string", lambda row: _cif(row, request.symprec, _safe(row.ids[0])))
        else:
            names = Names(request.format)
            yield _table(file, "file", lambda row: _write_file(folder, row, request, names))


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


def _write_file(folder: Path, row: Rows, request: Request, names: "Names") -> str:
    """One crystal as a file of its own; the file's name."""
    name = names.of(row.ids[0])
    text = _cif(row, request.symprec, name.removesuffix(".cif")) if request.format == "cif" else formats.poscar(
        row.crystals, row.ids[0])  # fmt: skip
    (folder / name).write_text(text, encoding="utf-8")
    return name


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
