"""Crystals that another generator made: the kind of their files, and where they are read to. Imports no torch."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from hpcgen.errors import InputError
from hpcgen.runner.events import EVENTS
from hpcgen.store.layout import MANIFEST

CIF = (".cif", ".cif.gz")
_KINDS = {".zip": "zip", ".extxyz": "extxyz", ".xyz": "extxyz", ".csv": "csv", ".csv.gz": "csv"}
_WISH = "a run folder or a store; or, of another generator, a folder or zip of CIFs, an extxyz, or a CSV with CIFs"


def kind_of(given: Path) -> str | None:
    """folder (of CIFs), zip, extxyz or csv; None for a run folder, a store, or what is not there.

    Raises InputError for any other file.
    """
    if given.is_file():
        for ending, kind in _KINDS.items():
            if given.name.lower().endswith(ending):
                return kind
        raise InputError(f"{given}: a file of unknown kind; want {_WISH} (.zip, .extxyz, .xyz, .csv, .csv.gz)")
    own = any((given / name).exists() for name in (MANIFEST, EVENTS))
    return "folder" if not own and next(cif_names(given), None) is not None else None


def refuse_bare(given: Path) -> None:
    """Raise InputError for a folder that is neither a run nor a store nor holds CIFs."""
    if given.is_dir() and not any((given / name).exists() for name in (MANIFEST, EVENTS)):
        raise InputError(f"{given}: holds neither {MANIFEST} nor a file that ends in .cif; want {_WISH}")


def cif_names(folder: Path) -> Iterator[str]:
    """CIF files in a folder and below it, relative to it, in no order."""
    for file in folder.rglob("*"):
        if file.name.lower().endswith(CIF) and file.is_file():
            yield file.relative_to(folder).as_posix()


def place_of(given: Path, json: Path | None) -> Path:
    """The store that they are read into: beside the file of results if one is named, else beside what was given."""
    given = given.resolve()
    return (json.resolve() if json is not None else given).with_name(f"{given.name}.store")


def state_of(given: Path) -> str:
    """Changes when a file does: a hash of all their names, sizes and times."""
    names = [given / name for name in sorted(cif_names(given))] if given.is_dir() else [given]
    told = hashlib.sha256(str(given.resolve()).encode("utf-8", "surrogateescape"))
    for file in names:
        facts = file.stat()
        told.update(f"{file.name}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return told.hexdigest()[:12]
