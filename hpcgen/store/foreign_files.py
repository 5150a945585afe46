"""Somebody else's CIFs, one structure each, in a folder or in a zip archive.

Codes of refusal beside those of `crystal.cif`: unreadable, too-long, several-structures.
"""

import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcgen.crystal.cif import read_cif
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused
from hpcgen.errors import InputError
from hpcgen.store.foreign import CIF, cif_names
from hpcgen.store.foreign_index import Index
from hpcgen.store.source import Raw

LARGEST = 64 * 2**20  # bytes of one CIF
_ODD = (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)  # RuntimeError: of an encrypted archive
_DATA_BLOCK = re.compile(rb"(?mi)^data_")


@dataclass(frozen=True)
class CifFolder:
    """The CIFs in a folder and below it; ids are their paths without the ending."""

    path: Path

    def index(self) -> Index:
        """All files, by name."""
        names = sorted(cif_names(self.path))
        return Index.of(map(_without_ending, names), "file", names)

    def rows(self, index: Index, start: int, stop: int) -> Iterator[Raw]:
        """Files that cannot be read are told as faults."""
        for id, name in index.pairs(start, stop):
            yield _raw(id, (self.path / name).read_bytes)

    def parse(self, raw: Raw) -> Crystals:
        """The only structure of the CIF."""
        return cif_crystal(raw.body)


@dataclass(frozen=True)
class CifZip:
    """The CIFs in a zip archive, ids as in a folder."""

    path: Path

    def index(self) -> Index:
        """All entries that are CIFs, in the order of the archive."""
        with self._opened() as archive:
            entries = {at: entry.filename for at, entry in enumerate(archive.infolist())}
        found = {at: name for at, name in entries.items()
                 if name.lower().endswith(CIF) and not name.startswith("__MACOSX/")}  # fmt: skip
        if not found:
            raise InputError(f"{self.path}: holds no file that ends in .cif")
        return Index.of(map(_without_ending, found.values()), "file", list(found))

    def rows(self, index: Index, start: int, stop: int) -> Iterator[Raw]:
        """Entries that cannot be unpacked are told as faults."""
        with self._opened() as archive:
            entries = archive.infolist()
            for id, at in index.pairs(start, stop):
                yield _raw(id, lambda at=at: _unpacked(archive, entries[at]))  # type: ignore[misc]

    def parse(self, raw: Raw) -> Crystals:
        """The only structure of the CIF."""
        return cif_crystal(raw.body)

    def _opened(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except _ODD as fault:
            raise InputError(f"{self.path}: cannot be read as a zip archive ({fault})") from fault


def cif_crystal(body: bytes) -> Crystals:
    """The crystal of a CIF with one structure, as it is. Raises Refused."""
    if len(_DATA_BLOCK.findall(body)) > 1:
        blocks = sum(b"_atom_site_" in part.lower() for part in _DATA_BLOCK.split(body)[1:])
        if blocks > 1:
            raise Refused("several-structures", f"{blocks} data blocks with atoms, want one structure in a CIF")
    return read_cif(body)[0]


def _raw(id: str, read: Callable[[], bytes]) -> Raw:
    """The bytes of a CIF, unpacked if they are gzipped, or why they cannot be had."""
    try:
        body = read()
        if body[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(body)) as packed:
                body = packed.read(LARGEST + 1)
    except _ODD as fault:
        return Raw(id, b"", fault=("unreadable", f"{type(fault).__name__}: {fault}"))
    if len(body) > LARGEST:
        return Raw(id, b"", fault=("too-long", f"more than {LARGEST} bytes"))
    return Raw(id, body)


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as packed:
        return packed.read(LARGEST + 1)


def _without_ending(name: str) -> str:
    return next(name[: -len(ending)] for ending in reversed(CIF) if name.lower().endswith(ending))
