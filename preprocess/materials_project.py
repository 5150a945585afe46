#!/usr/bin/env python
"""A store from the Materials Project, by its client mp-api (extra `materials-project`).

MP_API_KEY=... python preprocess/materials_project.py --out stores/mp

The documents are fetched once, as page files, and read from there: into the store's work folder, which
goes when the store is complete, or into --pages, which stays. A stopped download goes on at the first missing
page. Where compute nodes have no network, fetch on a login node first and build afterwards; a complete
download needs neither key nor network:

MP_API_KEY=... python preprocess/materials_project.py --pages mp_pages --fetch-only --out stores/mp
srun ... python preprocess/materials_project.py --pages mp_pages --out stores/mp

Energies are those of the Materials Project's mixed GGA, GGA+U and r2SCAN hull. Materials that it has
deprecated are refused as `deprecated`, so that they are counted. The data are CC BY 4.0, those from GNoME
CC BY-NC 4.0; --no-gnome leaves the latter out.
"""

import argparse
import gzip
import json
import logging
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import drive

from hpcgen.crystal.convert import from_pymatgen
from hpcgen.errors import InputError, SiteError, UsageError
from hpcgen.files import make_folder, whole, write_json
from hpcgen.store.layout import ColumnSpec
from hpcgen.store.source import Parsed, Raw, Value

_LOG = logging.getLogger("hpcgen")
KEY = "MP_API_KEY"
INDEX = "index.json"
LONGEST_WAIT = 120.0  # seconds between two attempts
_STATUS = re.compile(r"error status code (\d{3})")
_REFUSED = {"400", "401", "403", "404", "422"}  # not worth another attempt
# house name -> field of the document, kind, unit
TAKEN = {
    "e_above_hull": ("energy_above_hull", "float", "eV/atom"),
    "formation_energy_per_atom": ("formation_energy_per_atom", "float", "eV/atom"),
    "energy_per_atom": ("energy_per_atom", "float", "eV/atom"),
    "band_gap": ("band_gap", "float", "eV"),
    "theoretical": ("theoretical", "bool", ""),
    "magnetization_per_volume": ("total_magnetization_normalized_vol", "float", "μB/Å³"),
    "bulk_modulus": ("bulk_modulus.vrh", "float", "GPa"),
    "shear_modulus": ("shear_modulus.vrh", "float", "GPa"),
}
FIELDS = ["material_id", "deprecated", "structure"] + sorted({path.split(".")[0] for path, _, _ in TAKEN.values()})
T = TypeVar("T")


@dataclass
class MaterialsProject:
    """Materials of the Materials Project, by id; the deprecated ones last."""

    pages: Path  # folder of the page files
    query: dict[str, Any] = field(default_factory=dict)  # arguments of the client's materials.summary.search
    page_size: int = 500
    attempts: int = 8  # of each request
    first_wait: float = 2.0  # seconds, doubled from attempt to attempt
    endpoint: str | None = None  # None: the client's own, or MP_API_ENDPOINT

    name: ClassVar[str] = "materials_project"
    columns: ClassVar[dict[str, ColumnSpec]] = {house: ColumnSpec(*kept[1:]) for house, kept in TAKEN.items()}

    def __post_init__(self) -> None:
        self._index: dict[str, Any] | None = None
        self._page: tuple[int, dict[str, dict]] = (-1, {})

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_index": None, "_page": (-1, {})}

    def identity(self) -> dict:
        """What was asked for."""
        return {"query": self.query}

    def size(self) -> int:
        """Number of materials; fetches what is missing first. Raises InputError, SiteError, UsageError."""
        self.fetch()
        index = self._read_index()
        return len(index["ids"]) + len(index["deprecated"])

    def fetch(self) -> None:
        """Fetch the list of materials and every page of documents that is not there yet."""
        make_folder(self.pages)
        client = None
        if not (self.pages / INDEX).exists():
            client = self._client()
            self._fetch_index(client)
        index = self._read_index()
        missing = [page for page in range(self._pages(index)) if not self._page_file(page).exists()]
        for done, page in enumerate(missing):
            client = client or self._client()
            self._fetch_page(client, page, self._ids_of(index, page))
            _LOG.info("%s: fetched page %d, %d to go", self.pages, page, len(missing) - done - 1)

    def rows(self, start: int, stop: int) -> Iterator[Raw]:
        """Rows start to stop, from the page files."""
        index = self._read_index()
        ids, deprecated = index["ids"], index["deprecated"]
        for row in range(start, min(stop, len(ids) + len(deprecated))):
            if row < len(ids):
                yield self._raw(ids[row], self._documents(row // index["page_size"]).get(ids[row]))
            else:
                yield _refused(deprecated[row - len(ids)], "deprecated", "the Materials Project has deprecated it")

    def parse(self, raw: Raw) -> list[Parsed]:
        """The document's structure. Raises Refused."""
        from pymatgen.core import Structure

        return [Parsed(raw.id, from_pymatgen([Structure.from_dict(raw.body)]))]

    def _raw(self, name: str, document: dict | None) -> Raw:
        if document is None:
            return _refused(name, "not-delivered", "the Materials Project lists it, but sent no document")
        if document.get("deprecated"):
            return _refused(name, "deprecated", "the Materials Project has deprecated it")
        if not document.get("structure"):
            return _refused(name, "no-structure", "its document holds no structure")
        columns = {house: _value(document, path, kind) for house, (path, kind, _) in TAKEN.items()}
        return Raw(name, document["structure"], columns)

    def check_access(self) -> None:
        """Raise UsageError or SiteError where something is still to be fetched, but no key or client is there."""
        if self._complete():
            return
        if not os.environ.get(KEY, "").strip():
            raise UsageError(f"{KEY} is not set: want your key of https://next-gen.materialsproject.org/api in it")
        try:
            import mp_api.client  # noqa: F401
        except ImportError as fault:
            message = f"mp-api is not installed ({fault}): pip install -e '.[materials-project]'"
            raise SiteError(message) from fault

    def _complete(self) -> bool:
        if not (self.pages / INDEX).exists():
            return False
        return all(self._page_file(page).exists() for page in range(self._pages(self._read_index())))

    def _client(self) -> Any:
        self.check_access()
        from mp_api.client import MPRester

        key = os.environ[KEY].strip()

        def connect() -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return MPRester(key, self.endpoint, use_document_model=False, mute_progress_bars=True)

        return self._patiently("connecting", connect)

    def _fetch_index(self, client: Any) -> None:
        from importlib.metadata import version

        found: dict[bool, list[str]] = {}
        for deprecated in (False, True):
            documents = self._patiently(
                "the list of materials",
                lambda gone=deprecated: client.materials.summary.search(  # type: ignore[misc]
                    deprecated=gone, fields=["material_id"], all_fields=False, **self.query
                ),
            )
            found[deprecated] = sorted({str(document["material_id"]) for document in documents})
        if not found[False] and not found[True]:
            raise InputError(f"the Materials Project has no material for {self.query}")
        gone = sorted(set(found[True]) - set(found[False]))
        index = {
            "query": self.query, "page_size": self.page_size, "ids": found[False], "deprecated": gone,
            "database": str(client.db_version), "mp_api": version("mp-api"),
            "fetched": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(self.pages / INDEX, index)
        _LOG.info("%s: %d materials, %d deprecated", self.pages, len(found[False]), len(gone))

    def _fetch_page(self, client: Any, page: int, ids: list[str]) -> None:
        documents = self._patiently(
            f"page {page}",
            lambda: client.materials.summary.search(
                material_ids=ids, fields=FIELDS, all_fields=False, chunk_size=len(ids), num_chunks=1
            ),
        )
        kept = {str(document["material_id"]): document for document in documents}
        if kept and not kept.keys() & set(ids):
            raise InputError(f"Materials Project, page {page}: asked for {ids[0]}, ..., got {min(kept)}, ...")
        with whole(self._page_file(page)) as draft, gzip.open(draft, "wt", encoding="utf-8") as text:
            json.dump(kept, text, default=str)

    def _patiently(self, what: str, ask: Callable[[], T]) -> T:
        """The answer, after as many attempts as it takes; longer and longer between them.

        Raises UsageError where the key or the question is refused, InputError where there is no answer.
        """
        from mp_api.client.core import MPRestError
        from requests import RequestException

        reason = ""
        for attempt in range(self.attempts):
            try:
                return ask()
            except (
                MPRestError,
                RequestException,
                ValueError,
                KeyError,
            ) as fault:  # the last two: a broken answer
                reason = " ".join(str(fault).split())[:300] or type(fault).__name__
                status = _STATUS.search(reason)
                if "does not support the request" in reason or (status and status.group(1) in _REFUSED):
                    message = f"Materials Project, {what}: refused; is {KEY} right? ({reason})"
                    raise UsageError(message) from fault
                wait = min(self.first_wait * 2**attempt, LONGEST_WAIT)
                if attempt + 1 < self.attempts:
                    _LOG.warning("Materials Project, %s: %s; again in %.3g s", what, reason, wait)
                    time.sleep(wait)
        tried = f"no answer in {self.attempts} attempts ({reason})"
        raise InputError(f"Materials Project, {what}: {tried}; the same command goes on from here")

    def _read_index(self) -> dict[str, Any]:
        if self._index is None:
            file = self.pages / INDEX
            try:
                index = json.loads(file.read_text(encoding="utf-8"))
                there = index["query"]
            except (OSError, ValueError, KeyError, TypeError) as fault:
                raise InputError(f"{file}: cannot be read as a list of materials ({fault})") from fault
            if there != self.query:
                raise UsageError(f"{self.pages}: was fetched for {there}, now it is {self.query}: choose others")
            self._index = index
        return self._index

    @staticmethod
    def _pages(index: dict[str, Any]) -> int:
        return math.ceil(len(index["ids"]) / index["page_size"])

    @staticmethod
    def _ids_of(index: dict[str, Any], page: int) -> list[str]:
        size = index["page_size"]
        return index["ids"][page * size : (page + 1) * size]

    def _page_file(self, page: int) -> Path:
        return self.pages / f"page-{page:05d}.json.gz"

    def _documents(self, page: int) -> dict[str, dict]:
        """Documents of a page by id; the last page is kept."""
        if self._page[0] != page:
            file = self._page_file(page)
            try:
                with gzip.open(file, "rt", encoding="utf-8") as text:
                    self._page = (page, json.load(text))
            except (OSError, EOFError, ValueError) as fault:
                raise InputError(f"{file}: cannot be read ({fault}); remove it to fetch it again") from fault
        return self._page[1]


def _refused(name: str, code: str, message: str) -> Raw:
    return Raw(name, None, fault=(code, message))


def _value(document: dict, path: str, kind: str) -> Value:
    """A field of a document, a dot leading into an inner one; None where it is absent or not finite."""
    found: Any = document
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if found is None:
        return None
    if kind == "bool":
        return bool(found)
    number = float(found)
    return number if math.isfinite(number) else None


def make_source(args: argparse.Namespace) -> MaterialsProject:
    """The source that the command line names. Ends here after --fetch-only."""
    query: dict[str, Any] = {}
    if args.elements:
        query["elements"] = args.elements.split(",")
    if args.max_sites is not None:
        query["num_sites"] = [1, args.max_sites]
    if args.max_e_above_hull is not None:
        query["energy_above_hull"] = [0.0, args.max_e_above_hull]
    if not args.gnome:
        query["include_gnome"] = False
    source = MaterialsProject(args.pages or args.out / "work" / "materials_project", query)
    if args.fetch_only:
        source.fetch()
        raise SystemExit(0)
    source.check_access()
    return source


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--elements", metavar="Li,O", help="materials that hold all of these")
    parser.add_argument("--max-sites", type=int, help="at most so many atoms in the cell")
    parser.add_argument("--max-e-above-hull", type=float, metavar="EV", help="at most so many eV/atom")
    gnome = argparse.BooleanOptionalAction
    parser.add_argument("--gnome", action=gnome, default=True, help="take GNoME's materials too (default)")
    parser.add_argument("--pages", type=Path, metavar="FOLDER", help="keep the downloaded documents here")
    parser.add_argument("--fetch-only", action="store_true", help="fetch the documents and stop: for a login node")
    return drive.run(parser, make_source)


if __name__ == "__main__":
    sys.exit(main())
