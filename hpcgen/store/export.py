"""`hpcgen export`: chosen crystals of a store as files of other programs, ids and columns carried through."""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpcgen.errors import InputError, UsageError
from hpcgen.files import DRAFT, make_folder, storage_faults
from hpcgen.store.layout import MANIFEST
from hpcgen.store.read import Store
from hpcgen.store.where import Condition, named
from hpcgen.store.write import StoreWriter
from hpcgen.store.writers import writer

_LOG = logging.getLogger(__name__)
FORMATS = ("cif", "zip", "extxyz", "poscar", "json", "csv", "cdvae", "diffcsp", "store")
MOST_FILES = 10_000  # of one folder: more is slow to list and unwelcome on shared file systems
CHUNK = 1024  # crystals in memory at a time
_WITHIN = ".export-"  # a draft within the folder it is to fill
_LAST = ("index.csv", MANIFEST)  # they say that all else is there


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
        if self.symprec is not None and self.format not in ("cif", "zip", "csv"):
            raise UsageError(f"--symprec {self.symprec}: only a CIF holds symmetry, not {self.format}")
        if self.format == "store" and (self.top is not None or self.by is not None) and self.split is None:
            raise UsageError("--format store keeps train, val and test apart: --top and --by want --split too")
        if self.symprec is not None and not 0 < self.symprec <= 1:
            raise UsageError(f"--symprec {self.symprec}: want Å above 0, up to 1")


def export(request: Request) -> int:
    """Write the chosen crystals into the folder `out`, which appears whole or stays as it was; how many they are.

    cif, poscar: a file each, and index.csv; zip (of CIFs), cdvae, diffcsp (arrays): one file, and index.csv; extxyz,
    json, csv: one file; store: another store, splits and edges kept. Memory stays flat but for the names of files.
    Raises UsageError, InputError if there is no crystal to write, StorageError.
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
            "choose fewer by --top or --where, or --format zip, extxyz, json or csv, which are one file"
        )
    with _whole_folder(request.out) as draft, writer(request.format, draft, request.symprec) as write:
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
