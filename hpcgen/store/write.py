"""Write a store: one shard from rows in memory, or a whole store from a stream of them."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import ArrayLike

from hpcgen.errors import InputError, UsageError
from hpcgen.files import make_folder, storage_faults, whole
from hpcgen.store.arrays import Arrays, add_missing_columns, count, cut, file_image, flat_cells, join, pointers
from hpcgen.store.layout import (
    MANIFEST,
    SPLITS,
    ColumnSpec,
    EdgeSettings,
    Head,
    Manifest,
    ShardInfo,
    shard_name,
    write_manifest,
)
from hpcgen.store.rows import Column, Rows

__all__ = [
    "SHARD_ROWS",
    "StoreWriter",
    "encode",
    "write_manifest",
    "write_shard",
    "write_store",
    "write_whole_shard",
]

SHARD_ROWS = 16384  # crystals of a shard: about 5 MB in float64, 15 MB with edges of 6 Å
LONGEST_TEXT = 4096  # bytes of an id or of a value of a str column: they are kept at fixed width


def write_shard(path: Path, rows: Rows, head: Head, *, name: str, split: str) -> ShardInfo:
    """Write rows as one shard file to `path`, which may be a draft of `name`. Same rows, same bytes.

    A column of `head` that the rows lack is written as missing. Not synced to disk: see files.whole and
    write_whole_shard. Raises InputError (with id and value) for rows that may not be stored, StorageError.
    """
    return write_arrays(path, encode(rows, head), head, name=name, split=split)


def write_whole_shard(
    folder: Path,
    rows: Rows,
    head: Head,
    *,
    split: str,
    number: int,
    token: str | None = None,
    before_rename: Callable[[], None] | None = None,
) -> ShardInfo:
    """Write one shard of a store so that it is whole on disk or absent. Raises as write_shard."""
    name = shard_name(split, number)
    with whole(Path(folder) / name, token=token, before_rename=before_rename) as draft:
        return write_shard(draft, rows, head, name=name, split=split)


def write_arrays(path: Path, arrays: Arrays, head: Head, *, name: str, split: str) -> ShardInfo:
    """write_shard for rows that are encoded already. Raises the same."""
    if split not in SPLITS:
        raise UsageError(f"{name}: split {split!r}; want one of {', '.join(SPLITS)}")
    _refuse_duplicates(name, arrays["id"])
    image = file_image(arrays, head, split=split)
    path = Path(path)
    try:
        with storage_faults(path):
            path.write_bytes(image)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    edges = len(arrays["edges/neighbour"]) if head.edges is not None else 0
    sha256 = hashlib.sha256(image).hexdigest()
    return ShardInfo(name, split, count(arrays), len(arrays["atomic_numbers"]), edges, len(image), sha256)


def _refuse_duplicates(name: str, ids: np.ndarray) -> None:
    unique, times = np.unique(ids, return_counts=True)
    for twice in unique[times > 1][:1]:
        raise InputError(f"{name}: id {twice.decode()!r} stands {times.max()} times in one shard, want every id once")


class StoreWriter:
    """Writes a store shard by shard at flat memory; the manifest comes last, on a clean end of `with`.

    Rows of a split keep their order and are cut into shards of `shard_rows` crystals.
    """

    def __init__(self, folder: Path, head: Head, *, shard_rows: int = SHARD_ROWS) -> None:
        if shard_rows < 1:
            raise UsageError(f"shard_rows is {shard_rows}, want at least 1")
        self.folder, self.head, self.shard_rows = make_folder(Path(folder)), head, shard_rows
        if (self.folder / MANIFEST).exists():
            raise UsageError(f"{folder}: there is a store already; choose another folder")
        self.shards: list[ShardInfo] = []
        self.manifest: Manifest | None = None
        self._waiting: defaultdict[str, list[Arrays]] = defaultdict(list)

    def add(self, split: str, rows: Rows) -> None:
        """Rows for one split. Raises InputError as write_shard, StorageError."""
        self.add_arrays(split, encode(rows, self.head))

    def add_arrays(self, split: str, arrays: Arrays) -> None:
        """The same for encoded rows that hold all columns of the head."""
        if split not in SPLITS:
            raise UsageError(f"split {split!r}; want one of {', '.join(SPLITS)}")
        waiting = self._waiting[split]
        waiting.append(arrays)
        if sum(map(count, waiting)) >= self.shard_rows:
            self._waiting[split] = self._flush(split, join(waiting))

    def _flush(self, split: str, arrays: Arrays) -> list[Arrays]:
        """Write the full shards of `arrays`; what is left."""
        start = 0
        while count(arrays) - start >= self.shard_rows:
            self._shard(split, cut(arrays, start, start + self.shard_rows))
            start += self.shard_rows
        rest = cut(arrays, start, count(arrays))
        return [{key: array.copy() for key, array in rest.items()}] if count(rest) else []

    def _shard(self, split: str, arrays: Arrays) -> None:
        name = shard_name(split, sum(shard.split == split for shard in self.shards))
        with whole(self.folder / name) as draft:
            self.shards.append(write_arrays(draft, arrays, self.head, name=name, split=split))

    def close(self) -> Manifest:
        """Write what waits, then the manifest."""
        for split, waiting in self._waiting.items():
            if waiting:
                self._shard(split, join(waiting))
        self._waiting.clear()
        order = sorted(self.shards, key=lambda shard: (SPLITS.index(shard.split), shard.name))
        self.manifest = write_manifest(self.folder, self.head, order)
        return self.manifest

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()


def write_store(
    folder: Path, head: Head, parts: Iterable[tuple[str, Rows]], *, shard_rows: int = SHARD_ROWS
) -> Manifest:
    """A complete store from (split, rows) pairs, at flat memory. Raises InputError, StorageError."""
    with StoreWriter(folder, head, shard_rows=shard_rows) as writer:
        for split, rows in parts:
            writer.add(split, rows)
    assert writer.manifest is not None
    return writer.manifest


def encode(rows: Rows, head: Head) -> Arrays:
    """Rows as the flat arrays of a shard. Raises InputError naming the first id and value that may not be."""
    crystals, ids = rows.crystals, rows.ids
    if len(ids) != len(crystals):
        raise InputError(f"{len(ids)} ids for {len(crystals)} crystals, want one each")
    arrays: Arrays = {
        "ptr": pointers(crystals.num_atoms.cpu().numpy()),
        "frac_coords": crystals.frac_coords.detach().cpu().numpy(),
        "lattice": crystals.lattice.detach().cpu().numpy(),
        "id": _encode_text([str(id) for id in ids], ids, "id"),
    }
    numbers = crystals.atomic_numbers.cpu().numpy()
    _check_crystals(arrays, numbers, ids)
    arrays["atomic_numbers"] = numbers.astype(np.uint8)
    arrays.update(_encode_columns(rows.columns, head.columns, ids))
    arrays.update(_encode_edges(rows, head.edges, arrays["ptr"]))
    return add_missing_columns(arrays, head.columns)


def _check_crystals(arrays: Arrays, numbers: np.ndarray, ids: Sequence[str]) -> None:
    ptr, frac, lattice = arrays["ptr"], arrays["frac_coords"], arrays["lattice"]
    if len(frac) != ptr[-1] or len(numbers) != ptr[-1] or len(lattice) != len(ptr) - 1:
        told = f"{len(frac)} coordinates, {len(numbers)} elements, {len(lattice)} lattices"
        raise InputError(f"{told} for {len(ptr) - 1} crystals of {ptr[-1]} atoms in all")
    _refuse_where(~(np.diff(ptr) > 0), ids, None, np.diff(ptr), "number of atoms", "at least 1")
    _refuse_where(~((frac >= 0) & (frac < 1)).all(axis=1), ids, ptr, frac, "fractional coordinates", "in [0, 1)")
    _refuse_where(~((numbers >= 1) & (numbers <= 118)), ids, ptr, numbers, "atomic number", "1 to 118")
    _refuse_where(~np.isfinite(lattice).all(axis=(1, 2)), ids, None, lattice, "lattice", "finite numbers")
    _refuse_where(flat_cells(lattice), ids, None, lattice, "lattice", "a cell with a volume")


def _refuse_where(
    bad: ArrayLike, ids: Sequence[str], ptr: np.ndarray | None, values: np.ndarray, what: str, wish: str
) -> None:
    """Raise for the first row of `bad` (B,), or of (A,) where ptr is given."""
    for at in np.flatnonzero(bad)[:1]:
        crystal = at if ptr is None else np.searchsorted(ptr, at, side="right") - 1
        atom = "" if ptr is None else f" of atom {at - ptr[crystal]}"
        value = ", ".join(f"{v:.8g}" if isinstance(v, float) else str(v) for v in np.ravel(values[at]).tolist())
        raise InputError(f"{ids[crystal]}: {what}{atom} is {value}, want {wish}")


def _encode_text(texts: list[str], ids: Sequence[str], what: str) -> np.ndarray:
    """Texts as UTF-8 bytes of fixed width. Raises InputError for one too long, with NUL, or an empty id."""
    encoded = []
    for at, text in enumerate(texts):
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as fault:
            raise InputError(f"{ids[at]!r}: {what} cannot be written as UTF-8") from fault
        if len(data) > LONGEST_TEXT or b"\0" in data or (what == "id" and not data):
            told = f"{len(data)} bytes" if len(data) > LONGEST_TEXT else repr(text)
            wish = f"1 to {LONGEST_TEXT} bytes without NUL" if what == "id" else f"at most {LONGEST_TEXT}, no NUL"
            raise InputError(f"{str(ids[at])[:80]}: {what} is {told}, want {wish}")
        encoded.append(data)
    return np.array(encoded, dtype=np.bytes_) if encoded else np.empty(0, dtype="S1")


def _encode_columns(columns: Mapping[str, Column], specs: Mapping[str, ColumnSpec], ids: Sequence[str]) -> Arrays:
    arrays: Arrays = {}
    for name, column in columns.items():
        if name not in specs:
            known = ", ".join(specs) or "none"
            raise InputError(f"column {name!r} is not declared in the store's head; declared: {known}")
        if column.spec != specs[name]:
            raise InputError(f"column {name}: rows say {column.spec}, the store's head says {specs[name]}")
        rows, missing = len(ids), np.asarray(column.missing, dtype=bool)
        if len(column.values) != rows or len(missing) != rows:
            raise InputError(f"column {name} has {len(column.values)} values for {rows} crystals")
        arrays[f"columns/{name}"] = _encode_values(name, column, missing, ids)
        if column.spec.kind != "float":
            arrays[f"missing/{name}"] = missing
    return arrays


def _encode_values(name: str, column: Column, missing: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    kind, given = column.spec.kind, column.values
    if kind == "str":
        texts = ["" if gone else value for value, gone in zip(given, missing, strict=True)]
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"{ids[at]}: column {name} is {text!r}, want text")
        return _encode_text(texts, ids, f"column {name}")
    given = np.asarray(given)
    wanted = {"float": "fiu", "int": "iu", "bool": "b"}[kind]
    if given.dtype.kind not in wanted:
        raise InputError(f"column {name} is of kind {kind}, its values are {given.dtype}")
    if kind == "float":
        values = np.where(missing, np.nan, given.astype(np.float64))
        _refuse_where(np.isnan(values) & ~missing, ids, None, values, f"column {name}", "a number, or marked missing")
        return values
    return np.where(missing, 0, given).astype(np.int64 if kind == "int" else np.bool_)


def _encode_edges(rows: Rows, settings: EdgeSettings | None, ptr: np.ndarray) -> Arrays:
    if (rows.edges is None) != (settings is None):
        told = "rows hold edges" if settings is None else "rows hold no edges"
        raise InputError(f"{told}, the store's head says {settings or 'none'}")
    if rows.edges is None:
        return {}
    index, image = rows.edges.index.cpu().numpy(), rows.edges.image.cpu().numpy()
    if index.ndim != 2 or image.shape != (index.shape[1], 3) or len(index) != 2:
        raise InputError(f"edges: index has shape {index.shape}, image {image.shape}; want (2, E) and (E, 3)")
    if index.dtype.kind not in "iu" or image.dtype.kind not in "iu":
        raise InputError(f"edges: index is {index.dtype}, image {image.dtype}; want integers")
    if index.size and (index.min() < 0 or index.max() >= ptr[-1]):
        raise InputError(f"edges join atoms {index.min()} to {index.max()}, want 0 to {ptr[-1] - 1}")
    centre, neighbour = index
    if (centre[1:] < centre[:-1]).any():
        raise InputError("edges are not sorted by centre")
    degree = np.bincount(centre, minlength=ptr[-1])
    edge_ptr = pointers(degree)[ptr]
    counts = np.diff(edge_ptr)
    local = neighbour - np.repeat(ptr[:-1], counts)
    if ((local < 0) | (local >= np.repeat(np.diff(ptr), counts))).any():
        raise InputError("an edge joins atoms of two crystals")
    return {
        "edges/ptr": edge_ptr,
        "edges/degree": degree.astype(np.uint32),
        "edges/neighbour": local.astype(np.uint16 if np.diff(ptr).max(initial=0) <= 65536 else np.uint32),
        "edges/image": image.astype(_narrowest(image)),
    }


def _narrowest(values: np.ndarray) -> type[np.signedinteger]:
    largest = max(-int(values.min(initial=0)), int(values.max(initial=0)))
    return np.int8 if largest < 128 else np.int16 if largest < 2**15 else np.int32
