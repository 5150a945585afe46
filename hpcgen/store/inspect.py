"""Look at a store and check it. Imports no torch."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from hpcgen.errors import InputError
from hpcgen.store.arrays import Arrays, flat_cells, load
from hpcgen.store.layout import (
    SPLITS,
    ColumnSpec,
    Head,
    Manifest,
    ShardInfo,
    attribute,
    flat,
    open_shard,
    read_manifest,
    reading,
    sha256_of,
)

__all__ = ["check", "describe", "in_words", "render"]

STEP = 4096  # crystals looked at together
STEP_WITH_EDGES = 1024
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


def describe(path: Path) -> dict[str, Any]:
    """What a store holds, as JSON values: counts, splits, columns and gaps, sizes. Raises InputError."""
    manifest = read_manifest(path)
    head, shards = manifest.head, manifest.shards
    gaps = dict.fromkeys(head.columns, 0)
    smallest, largest = [], []
    for shard in shards:
        file = path / shard.name
        with opened_shard(path, shard, head) as opened, reading(file):
            sizes = np.diff(opened["ptr"][...])
            for name, spec in head.columns.items():
                gaps[name] += _count_missing(opened, name, spec)
        smallest += [int(sizes.min())] if len(sizes) else []
        largest += [int(sizes.max())] if len(sizes) else []
    crystals, size = sum(shard.crystals for shard in shards), sum(shard.bytes for shard in shards)
    columns = {
        name: {"kind": spec.kind, "unit": spec.unit, "missing": gaps[name]} for name, spec in head.columns.items()
    }
    atoms = sum(shard.atoms for shard in shards)
    return {
        "path": str(path),
        "source": head.source,
        "settings": dict(head.settings),
        "settings_hash": head.settings_hash,
        "writer": manifest.writer,
        "shards": len(shards),
        "crystals": crystals,
        "atoms": atoms,
        "atoms_per_crystal": {
            "min": min(smallest, default=None),
            "mean": round(atoms / crystals, 2) if crystals else None,
            "max": max(largest, default=None),
        },
        "bytes": size,
        "bytes_per_crystal": round(size / crystals, 1) if crystals else None,
        "splits": _splits(manifest),
        "edges": _edges(manifest),
        "columns": columns,
    }


def _splits(manifest: Manifest) -> dict[str, int]:
    return {
        split: sum(shard.crystals for shard in manifest.shards if shard.split == split)
        for split in SPLITS
        if any(shard.split == split for shard in manifest.shards)
    }


def _edges(manifest: Manifest) -> dict[str, Any] | None:
    if manifest.head.edges is None:
        return None
    return {"settings": str(manifest.head.edges), "count": sum(shard.edges for shard in manifest.shards)}


def opened_shard(path: Path, shard: ShardInfo, head: Head) -> h5py.File:
    return open_shard(path / shard.name, listed=shard, settings_hash=head.settings_hash)


def _count_missing(shard: h5py.File, name: str, spec: ColumnSpec) -> int:
    if spec.kind == "float":
        return int(np.isnan(shard[f"columns/{name}"][...]).sum())
    return int(shard[f"missing/{name}"][...].sum())


def render(told: dict[str, Any]) -> str:
    """What `describe` found, for people to read."""
    each = told["atoms_per_crystal"]
    mean = f"{each['mean']} each, {each['min']} to {each['max']}" if told["crystals"] else "none"
    edges, size = told["edges"], told["bytes_per_crystal"]
    rows = [
        ("store", told["path"]),
        ("source", told["source"]),
        ("crystals", f"{told['crystals']:,} in {told['shards']} shards"),
        ("splits", ", ".join(f"{split} {n:,}" for split, n in told["splits"].items()) or "none"),
        ("atoms", f"{told['atoms']:,} ({mean})"),
        ("edges", "none kept" if edges is None else f"{edges['count']:,} ({edges['settings']})"),
        ("size", f"{told['bytes'] / 1e6:,.1f} MB" + (f", {size:,.0f} bytes per crystal" if size else "")),
        ("written by", f"{told['writer']}, settings {told['settings_hash']}"),
    ]
    lines = [f"{name:<11} {value}" for name, value in rows]
    settings = [(name, in_words(value)) for name, value in flat(told["settings"])]
    width = max((len(name) for name, _ in settings), default=0)
    lines += [f"  {name:<{width}}  {value}" for name, value in settings]
    lines.append("columns" if told["columns"] else "columns     none")
    width = max((len(name) for name in told["columns"]), default=0)
    for name, column in told["columns"].items():
        gaps = f"{column['missing']:,} missing" if column["missing"] else "complete"
        lines.append(f"  {name:<{width}}  {column['kind']:<5}  {column['unit'] or '-':<10}  {gaps}")
    return "\n".join(lines)


def in_words(value: Any) -> str:
    """A setting as words, hashes of files at their first digits."""
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _SHA256.sub(lambda hash: f"{hash[0][:12]}…", words) or "–"


def check(path: Path) -> list[str]:
    """Read every byte of a store: one sentence per fault. Raises InputError where there is no store.

    Looks at the bytes (sha256), the pointers, the coordinates, the cells, the elements, the counts, the edges
    and the ids, which are to differ in all shards. What cannot be read now is no fault of the store and raises
    SiteError or StorageError.
    """
    manifest = read_manifest(path)
    faults: list[str] = []
    good: list[ShardInfo] = []
    for shard in tqdm(manifest.shards, desc="checking", unit="shard", disable=None, leave=False):
        try:
            _check_shard(path, shard, manifest.head)
            good.append(shard)
        except InputError as fault:
            faults.append(str(fault))
    repeat = first_repeat([Ids(path, shard, manifest.head) for shard in good])
    if repeat is not None:
        faults.append(f"{path}: {repeat}, want every id once")
    if not any(shard.crystals for shard in manifest.shards):
        faults.append(f"{path}: the store holds no crystals")
    return faults


def _check_shard(path: Path, shard: ShardInfo, head: Head) -> None:
    file = path / shard.name
    with opened_shard(path, shard, head) as opened, reading(file):
        found = sha256_of(file)
        if found != shard.sha256:
            raise InputError(f"{file}: sha256 is {found[:16]}…, the manifest lists {shard.sha256[:16]}…")
        _check_counts(file, opened, shard, head)
        step = STEP if head.edges is None else STEP_WITH_EDGES
        for start in range(0, shard.crystals, step):
            stop = min(start + step, shard.crystals)
            part = load(opened, start, stop, head.columns, edges=head.edges is not None)
            _check_arrays(file, part)
        ids = opened["id"][...]
    if len(np.unique(ids)) != len(ids):
        raise InputError(f"{file}: an id stands twice")


def _check_counts(file: Path, opened: h5py.File, shard: ShardInfo, head: Head) -> None:
    kept = head.edges is not None
    found = {
        "crystals": len(opened["ptr"]) - 1,
        "atoms": len(opened["atomic_numbers"]),
        "edges": len(opened["edges/neighbour"]) if kept else 0,
        "split": attribute(opened, "split"),
    }
    for name, value in found.items():
        if value != getattr(shard, name):
            raise InputError(f"{file}: {name} {value}, the manifest lists {getattr(shard, name)}")
    ends = {"ptr": shard.atoms, **({"edges/ptr": shard.edges} if kept else {})}
    for name, end in ends.items():
        ptr = opened[name][...]
        if len(ptr) != shard.crystals + 1 or ptr[0] != 0 or ptr[-1] != end or (np.diff(ptr) < 0).any():
            raise InputError(f"{file}: {name} does not rise from 0 to {end} over {shard.crystals} crystals")
    shapes: dict[str, tuple[int, ...]] = {
        "frac_coords": (shard.atoms, 3),
        "lattice": (shard.crystals, 3, 3),
        "id": (shard.crystals,),
        **{f"columns/{name}": (shard.crystals,) for name in head.columns},
        **{f"missing/{name}": (shard.crystals,) for name, spec in head.columns.items() if spec.kind != "float"},
    }
    if kept:
        shapes |= {"edges/degree": (shard.atoms,), "edges/neighbour": (shard.edges,), "edges/image": (shard.edges, 3)}
    for name, shape in shapes.items():
        if opened[name].shape != shape:
            raise InputError(f"{file}: {name} has shape {opened[name].shape}, want {shape}")


def _check_arrays(file: Path, part: Arrays) -> None:
    def first(bad: ArrayLike) -> str:
        atom = int(np.flatnonzero(bad)[0])
        return part["id"][np.searchsorted(part["ptr"], atom, side="right") - 1].decode(errors="replace")

    frac, numbers = part["frac_coords"], part["atomic_numbers"]
    outside = ~((frac >= 0) & (frac < 1)).all(axis=1)
    if outside.any():
        raise InputError(f"{file}: {first(outside)}: fractional coordinates outside [0, 1)")
    unknown = (numbers < 1) | (numbers > 118)
    if unknown.any():
        raise InputError(f"{file}: {first(unknown)}: atomic number {numbers[unknown][0]}, want 1 to 118")
    if not np.isfinite(part["lattice"]).all():
        raise InputError(f"{file}: a lattice is not finite")
    flat_ones = flat_cells(part["lattice"])
    if flat_ones.any():
        raise InputError(f"{file}: {part['id'][flat_ones.argmax()].decode(errors='replace')}: a cell without volume")
    if (np.diff(part["ptr"]) < 1).any():
        raise InputError(f"{file}: a crystal without atoms")
    if "edges/ptr" in part:
        degrees = np.add.reduceat(part["edges/degree"], part["ptr"][:-1], dtype=np.int64)
        counts = np.diff(part["edges/ptr"])
        if (degrees != counts).any():
            raise InputError(f"{file}: degrees of atoms and numbers of edges do not agree")
        neighbour = part["edges/neighbour"]
        if ((neighbour < 0) | (neighbour >= np.repeat(np.diff(part["ptr"]), counts))).any():
            raise InputError(f"{file}: an edge points beyond its crystal")


def prefixed(ids: np.ndarray, prefix: str) -> np.ndarray:
    return np.char.add(prefix.encode(), ids) if prefix else ids


class Ids(NamedTuple):
    """The ids of one shard, on disk."""

    store: Path
    shard: ShardInfo
    head: Head
    prefix: str = ""

    def read(self) -> list[bytes]:
        with opened_shard(self.store, self.shard, self.head) as opened, reading(self.store / self.shard.name):
            ids = opened["id"][...]
        return prefixed(ids, self.prefix).tolist()


class Repeat(NamedTuple):
    """An id that stands twice."""

    id: bytes
    first: Ids
    second: Ids
    ids: int  # that stand twice or more often

    def __str__(self) -> str:
        one, two = self.first, self.second
        if one.store == two.store:
            where = one.shard.name if one.shard == two.shard else f"{one.shard.name} and {two.shard.name}"
        else:
            where = f"{one.store} and {two.store}"
        more = f" ({self.ids} ids stand twice or more often)" if self.ids > 1 else ""
        return f"id {self.id.decode(errors='replace')!r} stands in {where}{more}"


def first_repeat(shards: Sequence[Ids], go_on: Callable[[], None] = lambda: None) -> Repeat | None:
    """At 8 bytes of memory per id: the ids themselves are compared only where their hashes agree."""
    hashes = [np.empty(0, np.uint64)]
    for shard in shards:
        go_on()
        hashes.append(np.array([_hash(id) for id in shard.read()], dtype=np.uint64))
    values, times = np.unique(np.concatenate(hashes), return_counts=True)
    twice = set(values[times > 1].tolist())
    found: dict[bytes, Ids] = {}
    for shard in shards if twice else ():
        go_on()
        for id in shard.read():
            if _hash(id) not in twice:
                continue
            if id in found:
                return Repeat(id, found[id], shard, len(twice))
            found[id] = shard
    return None


def _hash(id: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(id, digest_size=8).digest(), "little")
