"""The flat arrays of a shard in memory: load from a file, pick crystals, join, save. Imports no torch.

Keys are the names of the datasets.
"""

from collections.abc import Mapping, Sequence

import h5py
import numpy as np

from hpcgen.store.layout import FORMAT, FORMAT_VERSION, WRITER, ColumnSpec, Head

Arrays = dict[str, np.ndarray]

PER_ATOM = ("frac_coords", "atomic_numbers", "edges/degree")
PER_EDGE = ("edges/neighbour", "edges/image")
_POINTERS = ("ptr", "edges/ptr")
_EMPTY = {"float": np.nan, "int": 0, "bool": False, "str": b""}
_DTYPE = {"float": np.float64, "int": np.int64, "bool": np.bool_, "str": np.bytes_}
_GZIP_LEVEL = 4  # measured with 6 Å edges: 35,000 crystals/s; level 1 writes 53,000/s of 1.35 times the size
_CHUNK_ROWS = 4096
_LEAST_VOLUME = 1e-3  # Å³ of a cell: an atom fills more than 1
_CHUNK_EDGES = 32768  # a few dozen crystals, so that one of them is read alone in under a millisecond


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """counts[0] numbers up from starts[0], then from starts[1], ... (N,), (N,) -> (sum of counts,) int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - ends + counts, counts) + np.arange(total)


def pointers(counts: np.ndarray) -> np.ndarray:
    """Where each run starts, and the end. (N,) -> (N + 1,) int64."""
    ptr = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=ptr[1:])
    return ptr


def flat_cells(lattice: np.ndarray) -> np.ndarray:
    """Where a cell has no volume; rounding gives a flat one 1e-16 Å³ or so. (B, 3, 3) Å -> (B,) bool."""
    return ~(np.abs(np.linalg.det(lattice.astype(np.float64))) > _LEAST_VOLUME)


def count(arrays: Arrays) -> int:
    """Number of crystals."""
    return len(arrays["ptr"]) - 1


def cut(arrays: Arrays, start: int, stop: int) -> Arrays:
    """Crystals start to stop, as views."""
    ptr = arrays["ptr"]
    atoms = slice(int(ptr[start]), int(ptr[stop]))
    edges = slice(0, 0)
    if "edges/ptr" in arrays:
        edge_ptr = arrays["edges/ptr"]
        edges = slice(int(edge_ptr[start]), int(edge_ptr[stop]))
    part = {}
    for key, array in arrays.items():
        if key in _POINTERS:
            part[key] = array[start : stop + 1] - array[start]
        else:
            part[key] = array[atoms if key in PER_ATOM else edges if key in PER_EDGE else slice(start, stop)]
    return part


def take(arrays: Arrays, which: np.ndarray) -> Arrays:
    """The crystals at `which` (N,), in that order, as copies."""
    ptr = arrays["ptr"]
    counts = np.diff(ptr)[which]
    atoms = ranges(ptr[which], counts)
    part = {"ptr": pointers(counts)}
    edges = np.empty(0, dtype=np.int64)
    if "edges/ptr" in arrays:
        edge_ptr = arrays["edges/ptr"]
        edge_counts = np.diff(edge_ptr)[which]
        edges = ranges(edge_ptr[which], edge_counts)
        part["edges/ptr"] = pointers(edge_counts)
    for key, array in arrays.items():
        if key not in _POINTERS:
            part[key] = array[atoms if key in PER_ATOM else edges if key in PER_EDGE else which]
    return part


def join(parts: Sequence[Arrays]) -> Arrays:
    """Several as one, in order; widths and types grow to the largest. At least one, all of the same keys."""
    if len(parts) == 1:
        return parts[0]
    whole = {}
    for key in parts[0]:
        pieces = [part[key] for part in parts]
        if key in _POINTERS:
            whole[key] = pointers(np.concatenate([np.diff(piece) for piece in pieces]))
        else:
            whole[key] = np.concatenate(pieces)
    return whole


def add_missing_columns(arrays: Arrays, columns: Mapping[str, ColumnSpec]) -> Arrays:
    """The same with every column of `columns`, those not there as missing throughout."""
    rows = count(arrays)
    full = dict(arrays)
    for name, spec in columns.items():
        if f"columns/{name}" not in full:
            full[f"columns/{name}"] = np.full(rows, _EMPTY[spec.kind], dtype=_DTYPE[spec.kind])
            if spec.kind != "float":
                full[f"missing/{name}"] = np.ones(rows, dtype=bool)
    return full


def load(
    shard: h5py.File,
    start: int,
    stop: int,
    columns: Mapping[str, ColumnSpec],
    *,
    edges: bool,
    bare: bool = False,
) -> Arrays:
    """Crystals start to stop of an open shard; `bare` leaves out coordinates, elements and ids.

    Raises what h5py raises on a damaged file (see layout.reading), ValueError where pointers make no sense.
    """
    ptr = shard["ptr"][start : stop + 1]
    _check_pointers(ptr, shard["atomic_numbers"].shape[0])
    arrays = {"ptr": ptr - ptr[0]}
    if not bare:
        atoms = slice(int(ptr[0]), int(ptr[-1]))
        arrays["frac_coords"] = shard["frac_coords"][atoms]
        arrays["atomic_numbers"] = shard["atomic_numbers"][atoms]
        arrays["lattice"] = shard["lattice"][start:stop]
        arrays["id"] = shard["id"][start:stop]
        if edges:
            arrays.update(_load_edges(shard["edges"], start, stop, atoms))
    for name, spec in columns.items():
        arrays[f"columns/{name}"] = shard[f"columns/{name}"][start:stop]
        if spec.kind != "float":
            arrays[f"missing/{name}"] = shard[f"missing/{name}"][start:stop]
    return arrays


def _load_edges(group: h5py.Group, start: int, stop: int, atoms: slice) -> Arrays:
    ptr = group["ptr"][start : stop + 1]
    _check_pointers(ptr, group["neighbour"].shape[0])
    span = slice(int(ptr[0]), int(ptr[-1]))
    return {
        "edges/ptr": ptr - ptr[0],
        "edges/degree": group["degree"][atoms],
        "edges/neighbour": group["neighbour"][span],
        "edges/image": group["image"][span],
    }


def _check_pointers(ptr: np.ndarray, end: int) -> None:
    if len(ptr) == 0 or ptr[0] < 0 or ptr[-1] > end or (np.diff(ptr) < 0).any():
        raise ValueError(f"pointers run from {ptr[:1]} to {ptr[-1:]}, want them rising within 0 and {end}")


def file_image(arrays: Arrays, head: Head, *, split: str, small: bool = True) -> bytes:
    """The bytes of the shard file that holds `arrays`: the same arrays give the same bytes.

    small=False leaves them uncompressed, for files that are soon read again and removed.

    Made in memory, then written by plain calls, so that a full disk is met outside the HDF5 library,
    which does not recover from it.
    """
    bounds = ("v110", "v110")  # HDF5 1.10 (2016) and later read it; headers and chunk tables carry checksums
    with h5py.File("shard", "w", driver="core", backing_store=False, block_size=1 << 22, libver=bounds) as shard:
        _set_text(
            shard,
            format=FORMAT,
            source=head.source,
            settings_hash=head.settings_hash,
            writer=WRITER,
            split=split,
        )
        shard.attrs["format_version"] = np.int64(FORMAT_VERSION)
        for key in sorted(arrays):
            _save(shard, key, arrays[key], small)
        for name, spec in head.columns.items():
            _set_text(shard[f"columns/{name}"], kind=spec.kind, unit=spec.unit)
        if head.edges is not None:
            _set_text(shard["edges"], method=head.edges.method)
            for key, value in (("cutoff", head.edges.cutoff), ("k", head.edges.k)):
                if value is not None:
                    shard["edges"].attrs[key] = value
        shard.flush()
        return shard.id.get_file_image()


def _save(shard: h5py.File, key: str, array: np.ndarray, small: bool) -> None:
    if len(array) == 0:
        shard.create_dataset(key, data=array, track_times=False)
        return
    length = min(len(array), _CHUNK_EDGES if key in PER_EDGE else _CHUNK_ROWS)
    shard.create_dataset(
        key,
        data=array,
        chunks=(length, *array.shape[1:]),
        compression="gzip" if small else None,
        compression_opts=_GZIP_LEVEL if small else None,
        shuffle=small,
        fletcher32=True,  # a flipped bit is an error on reading, not another crystal; measured: free
        track_times=False,
    )


def _set_text(node: h5py.HLObject, **attributes: str) -> None:
    for name, text in attributes.items():
        data = text.encode("utf-8")
        node.attrs.create(name, np.bytes_(data), dtype=h5py.string_dtype("utf-8", max(len(data), 1)))
