"""Read a store: single crystals and batches at random, or all of it as a stream at flat memory."""

import bisect
import logging
import operator
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from torch import Tensor

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import Edges
from hpcgen.errors import InputError, UsageError
from hpcgen.store.arrays import Arrays, cut, join, load, take
from hpcgen.store.layout import (
    ColumnSpec,
    EdgeSettings,
    ShardInfo,
    open_shard,
    read_manifest,
    reading,
    sha256_of,
)
from hpcgen.store.rows import Column, Rows

__all__ = ["Sizes", "Store", "decode"]

_LOG = logging.getLogger(__name__)
_BLOCK, _BLOCK_WITH_EDGES = 4096, 256  # crystals decoded and cached together
_OPEN_FILES = 64
_NUMPY: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class Sizes(NamedTuple):
    """Of every crystal of a store, in order."""

    atoms: np.ndarray  # (N,) int64
    edges: np.ndarray | None  # (N,) int64, None where no edges were asked for


class Store:
    """The crystals of a store, or of one of its splits, in a fixed order.

    Opening reads the manifest only; files are opened when they are needed, by each process for itself, so
    that a Store may be pickled and used after a fork. Not for several threads at once.

    dtype: float32 or float64 for coordinates and lattices, None as stored (a rounding to 1.0 becomes 0,
    cached edges follow). columns: names to read, None all. edges: True for the cached ones, settings to
    insist on. on_bad: `stop` raises InputError when a bad shard is met; `skip` reads and hashes every shard
    on opening and goes on without the bad ones, so that all processes agree on what is there. What a busy or
    failing system keeps from being read is never skipped: SiteError, StorageError.
    """

    def __init__(
        self,
        path: Path | str,
        split: str | None = None,
        *,
        dtype: torch.dtype | None = torch.float32,
        columns: Sequence[str] | None = None,
        edges: bool | EdgeSettings = False,
        cache_bytes: int = 512 << 20,
        on_bad: str = "stop",
    ) -> None:
        if on_bad not in ("stop", "skip"):
            raise UsageError(f"on_bad is {on_bad!r}, want stop or skip")
        if dtype is not None and dtype not in _NUMPY:
            raise UsageError(f"dtype is {dtype}, want float32, float64 or None")
        self.path, self.split, self.dtype = Path(path), split, dtype
        self.manifest = read_manifest(self.path)
        self.head = self.manifest.head
        self.columns = _chosen(self.path, self.head.columns, columns)
        self.edges = _agreed(self.path, self.head.edges, edges)
        self.shards = [shard for shard in self.manifest.of_split(split) if shard.crystals]
        if on_bad == "skip":
            self.shards = self._good_shards()
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + shard.crystals)
        if not len(self):
            raise InputError(f"{self.path}: the store holds no {'readable ' if on_bad == 'skip' else ''}crystals")
        self.cache_bytes = cache_bytes
        self._forget()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Rows:
        """One crystal, by its place in the store. Raises InputError for a bad shard, IndexError."""
        index = operator.index(index)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"crystal {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        block, at = divmod(index - self._starts[shard], self._block_rows)
        return decode(cut(self._block(shard, block), at, at + 1), self.columns)

    def rows(self, indices: Sequence[int] | np.ndarray | Tensor) -> Rows:
        """The crystals at `indices` (N,), in that order, repeats allowed, or where a mask (len(self),) is True.

        Raises InputError, IndexError, TypeError.
        """
        wanted = _places(indices, len(self))
        if not len(wanted):
            return decode(take(self._block(0, 0), wanted), self.columns)
        order = np.argsort(wanted, kind="stable")
        shard = np.searchsorted(self._starts, wanted[order], side="right") - 1
        block, at = np.divmod(wanted[order] - np.asarray(self._starts)[shard], self._block_rows)
        bounds = np.flatnonzero(np.diff(shard) | np.diff(block)) + 1
        parts = [
            take(self._block(int(shard[start]), int(block[start])), at[start:stop])
            for start, stop in zip([0, *bounds], [*bounds, len(wanted)], strict=True)
        ]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return decode(take(join(parts), back), self.columns)

    def iter_rows(self, block: int = 4096) -> Iterator[Rows]:
        """All crystals in order, up to `block` at a time, without the cache and at flat memory."""
        for shard, listed in enumerate(self.shards):
            for start in range(0, listed.crystals, block):
                yield decode(self._load(shard, start, min(start + block, listed.crystals)), self.columns)

    def sizes(self) -> Sizes:
        """Atoms, and edges where asked for, of every crystal; coordinates are not read."""
        with_edges = self.edges is not None
        atoms = [np.diff(self._whole(shard, "ptr")) for shard in range(len(self.shards))]
        edges = [np.diff(self._whole(shard, "edges/ptr")) for shard in range(len(self.shards) if with_edges else 0)]
        return Sizes(np.concatenate(atoms), np.concatenate(edges) if with_edges else None)

    def column(self, name: str) -> Column:
        """One column of all crystals. Raises InputError for a name the store lacks."""
        spec = _chosen(self.path, self.head.columns, [name])
        parts = []
        for shard, listed in enumerate(self.shards):
            file = self.path / listed.name
            with reading(file):
                parts.append(load(self._file(shard), 0, listed.crystals, spec, edges=False, bare=True))
        return _column(join(parts), name, spec[name])

    @property
    def ids(self) -> list[str]:
        """Id of every crystal."""
        return [id.decode() for shard in range(len(self.shards)) for id in self._whole(shard, "id").tolist()]

    def close(self) -> None:
        """Close the files and forget what is cached; the store can be used on."""
        for file in self._files.values():
            file.close()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_blocks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def _block_rows(self) -> int:
        return _BLOCK if self.edges is None else _BLOCK_WITH_EDGES

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._files: OrderedDict[int, h5py.File] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Arrays] = OrderedDict()
        self._cached = 0

    def _good_shards(self) -> list[ShardInfo]:
        good, bad = [], []
        for listed in self.shards:
            file = self.path / listed.name
            try:
                open_shard(file, listed=listed, settings_hash=self.head.settings_hash).close()
                with reading(file):
                    found = sha256_of(file)
                if found != listed.sha256:
                    raise InputError(f"{file}: sha256 is {found}, the manifest lists {listed.sha256}")
                good.append(listed)
            except InputError as fault:
                bad.append((listed, str(fault)))
        if bad:
            lost, reasons = sum(listed.crystals for listed, _ in bad), "; ".join(reason for _, reason in bad)
            _LOG.warning("%d bad shards with %d crystals are left out: %s", len(bad), lost, reasons)
        return good

    def _file(self, shard: int) -> h5py.File:
        """An open shard of this process. After a fork the parent's handles are let go, not used."""
        if self._pid != os.getpid():
            self._forget()
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            listed = self.shards[shard]
            file = open_shard(self.path / listed.name, listed=listed, settings_hash=self.head.settings_hash)
            self._files[shard] = file
            self._check_counts(file, listed)
        self._files.move_to_end(shard)
        return file

    def _check_counts(self, file: h5py.File, listed: ShardInfo) -> None:
        with reading(self.path / listed.name):
            crystals, atoms = file["ptr"].shape[0] - 1, file["atomic_numbers"].shape[0]
        if (crystals, atoms) != (listed.crystals, listed.atoms):
            told = f"{crystals} crystals of {atoms} atoms, the manifest {listed.crystals} of {listed.atoms}"
            raise InputError(f"{self.path / listed.name}: the shard holds {told}")

    def _whole(self, shard: int, key: str) -> np.ndarray:
        file = self._file(shard)
        with reading(self.path / self.shards[shard].name):
            return file[key][...]

    def _load(self, shard: int, start: int, stop: int) -> Arrays:
        file = self._file(shard)
        with reading(self.path / self.shards[shard].name):
            arrays = load(file, start, stop, self.columns, edges=self.edges is not None)
        return arrays if self.dtype is None else _cast(arrays, _NUMPY[self.dtype])

    def _block(self, shard: int, block: int) -> Arrays:
        key = (shard, block)
        arrays = self._blocks.get(key)
        if arrays is None or self._pid != os.getpid():
            start = block * self._block_rows
            arrays = self._load(shard, start, min(start + self._block_rows, self.shards[shard].crystals))
            self._blocks[key] = arrays
            self._cached += _size(arrays)
            while self._cached > self.cache_bytes and len(self._blocks) > 1:
                self._cached -= _size(self._blocks.popitem(last=False)[1])
        else:
            self._blocks.move_to_end(key)
        return arrays


def refuse_damaged(path: Path) -> None:
    """Raise InputError for the first shard of a store that is missing, cut short or of another making.

    To be asked at the door: opens every shard and reads none.
    """
    manifest = read_manifest(path)
    for listed in manifest.shards:
        open_shard(Path(path) / listed.name, listed=listed, settings_hash=manifest.head.settings_hash).close()


def _places(indices: Sequence[int] | np.ndarray | Tensor, length: int) -> np.ndarray:
    """Indices, those from the end too, or a mask (length,) as places 0 to length - 1. (N,) int64."""
    given = np.asarray(indices)
    if given.ndim != 1:
        raise TypeError(f"indices of shape {given.shape}, want one dimension")
    if given.dtype == bool and len(given):
        if len(given) != length:
            raise IndexError(f"a mask of {len(given)} for {length} crystals")
        return np.flatnonzero(given)
    if given.dtype.kind not in "iu" and len(given):  # an empty list is of floats
        raise TypeError(f"indices of type {given.dtype}, want integers, or a mask of {length} booleans")
    places = given.astype(np.int64)
    if len(given) and (given.min() < -length or given.max() >= length):
        raise IndexError(f"crystals {given.min()} to {given.max()} of {length}")
    return np.where(places < 0, places + length, places)


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


def _chosen(path: Path, there: Mapping[str, ColumnSpec], names: Sequence[str] | None) -> Mapping[str, ColumnSpec]:
    if names is None:
        return there
    for name in names:
        if name not in there:
            raise InputError(f"{path}: no column {name!r}; the store has: {', '.join(there) or 'none'}")
    return {name: there[name] for name in names}


def _agreed(path: Path, cached: EdgeSettings | None, wanted: bool | EdgeSettings) -> EdgeSettings | None:
    if wanted is False:
        return None
    if cached is None or (wanted is not True and wanted != cached):
        wish = "cached edges" if wanted is True else str(wanted)
        raise InputError(f"{path}: the store's edges are {cached or 'none'}, asked for are {wish}")
    return cached


def _cast(arrays: Arrays, dtype: np.dtype) -> Arrays:
    """Coordinates and lattice as `dtype`. A coordinate rounded to 1.0 becomes 0, its edges' images follow."""
    frac = arrays["frac_coords"]
    if frac.dtype == dtype and arrays["lattice"].dtype == dtype:
        return arrays
    cast = {**arrays, "frac_coords": frac.astype(dtype), "lattice": arrays["lattice"].astype(dtype)}
    rounded = cast["frac_coords"] >= 1
    if rounded.any():
        cast["frac_coords"][rounded] = 0
        if "edges/image" in cast:
            index, moved = _index(cast), rounded.astype(np.int32)
            cast["edges/image"] = cast["edges/image"] + moved[index[1]] - moved[index[0]]
    return cast


def _index(arrays: Arrays) -> np.ndarray:
    """Centre and neighbour of each edge, counted through all crystals. (2, E) int64."""
    index = np.empty((2, len(arrays["edges/neighbour"])), dtype=np.int64)
    index[0] = np.arange(len(arrays["edges/degree"])).repeat(arrays["edges/degree"])
    index[1] = arrays["edges/neighbour"]
    if len(arrays["ptr"]) > 2:
        index[1] += arrays["ptr"][:-1].repeat(_steps(arrays["edges/ptr"]))
    return index


def _steps(ptr: np.ndarray) -> np.ndarray:
    """np.diff, whose own overhead shows where single crystals are read. (N + 1,) -> (N,)."""
    return ptr[1:] - ptr[:-1]


def decode(arrays: Arrays, columns: Mapping[str, ColumnSpec]) -> Rows:
    """Flat arrays of a shard as rows that own their memory."""
    edges = None
    if "edges/ptr" in arrays:
        image = arrays["edges/image"].astype(np.int64)
        edges = Edges(torch.from_numpy(_index(arrays)), torch.from_numpy(image))
    crystals = Crystals(
        torch.from_numpy(arrays["frac_coords"].copy()),
        torch.from_numpy(arrays["lattice"].copy()),
        torch.from_numpy(arrays["atomic_numbers"].astype(np.int64)),
        torch.from_numpy(_steps(arrays["ptr"])),
    )
    ids = [id.decode() for id in arrays["id"].tolist()]
    return Rows(crystals, ids, {name: _column(arrays, name, spec) for name, spec in columns.items()}, edges)


def _column(arrays: Arrays, name: str, spec: ColumnSpec) -> Column:
    values = arrays[f"columns/{name}"]
    if spec.kind == "float":
        values = values.copy()
        return Column(spec, values, np.isnan(values))
    missing = arrays[f"missing/{name}"].copy()
    if spec.kind == "str":
        texts = np.empty(len(values), dtype=object)
        texts[:] = [text.decode() for text in values.tolist()]
        return Column(spec, texts, missing)
    return Column(spec, values.copy(), missing)
