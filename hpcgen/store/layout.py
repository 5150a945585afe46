"""What lies in a store's folder: manifest.json and shard files, names, attributes, checks. Imports no torch.

manifest.json     source, settings, columns, edge settings, the shards with their counts and sha256
train-00000.h5    one shard: B crystals, A atoms, E edges in flat arrays
    /ptr (B + 1) int64                 first atom of each crystal, and the end
    /frac_coords (A, 3)                in [0, 1), float64 or float32
    /lattice (B, 3, 3)                 rows are a, b, c in Å
    /atomic_numbers (A) uint8          1 to 118
    /id (B)                            UTF-8 bytes of fixed width, unique in the shard
    /columns/<name> (B)                attributes kind and unit; a missing float is NaN
    /missing/<name> (B) bool           of every int, bool and str column
    /edges/ptr (B + 1) int64           first edge of each crystal, and the end
    /edges/degree (A)                  edges of each centre atom: the centres in order, run-length coded
    /edges/neighbour (E)               neighbour, counted from the first atom of its crystal
    /edges/image (E, 3) int8           lattice translation of the neighbour
"""

import errno
import hashlib
import json
import math
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py

from hpcgen import __version__
from hpcgen.errors import HpcgenError, InputError, SiteError, StorageError, UsageError
from hpcgen.files import write_json

FORMAT = "hpcgen-store"
FORMAT_VERSION = 1
WRITER = f"hpcgen {__version__}"
MANIFEST = "manifest.json"
REJECTS = "rejects.csv"  # the reject table beside it: row, id, code, message
SPLITS = ("train", "val", "test", "all")
KINDS = ("float", "int", "bool", "str")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]*")
_SITE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # too many open files, no memory
_STORAGE = {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.EHOSTDOWN}


@dataclass(frozen=True)
class ColumnSpec:
    """What a column holds: kind is float, int, bool or str; unit as in 'eV/atom', '' for none."""

    kind: str
    unit: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"column kind {self.kind!r}; want one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class EdgeSettings:
    """How cached edges were made: every neighbour within `cutoff` Å, or the `k` nearest."""

    method: str  # radius or nearest
    cutoff: float | None = None  # Å, of radius
    k: int | None = None  # of nearest

    def __post_init__(self) -> None:
        try:
            cutoff = None if self.cutoff is None else float(self.cutoff)
            k = None if self.k is None else operator.index(self.k)
        except (TypeError, ValueError) as fault:
            raise UsageError(f"{self!r}: {fault}; want a cutoff in Å or a whole k") from fault
        radius = cutoff is not None and k is None and 0 < cutoff < math.inf
        nearest = k is not None and cutoff is None and k >= 1
        if not {"radius": radius, "nearest": nearest}.get(self.method, False):
            raise UsageError(f"{self!r}: want method radius with a cutoff above 0 Å, or nearest with a k of 1 or more")
        object.__setattr__(self, "cutoff", cutoff)  # NumPy's numbers are no JSON, and 6 is 6.0
        object.__setattr__(self, "k", k)

    def __str__(self) -> str:
        return f"nearest {self.k}" if self.cutoff is None else f"radius {self.cutoff:g} Å"


@dataclass(frozen=True)
class Head:
    """What every shard of a store shares: where it came from and what it may hold."""

    source: str  # mp20, icsd, campaign, ...
    settings: Mapping[str, Any] = field(default_factory=dict)  # JSON values; the hash of them marks every shard
    columns: Mapping[str, ColumnSpec] = field(default_factory=dict)
    edges: EdgeSettings | None = None  # None: no edges are kept

    def __post_init__(self) -> None:
        for name in self.columns:
            if not _NAME.fullmatch(name):
                raise UsageError(f"column name {name!r}; want letters, digits, '_', '-' and '.', a letter first")
        for name, value in flat(self.settings):
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as fault:
                raise UsageError(f"setting {name} is {value!r}, want a JSON value ({fault})") from fault

    @property
    def settings_hash(self) -> str:
        """Hash of source, settings, columns and edge settings: equal hashes, shards of the same making."""
        told = json.dumps(_head_json(self), sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def flat(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings one by one, under dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the manifest lists it."""

    name: str  # of the file
    split: str
    crystals: int
    atoms: int
    edges: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a store without opening a shard."""

    head: Head
    shards: Sequence[ShardInfo]
    writer: str = WRITER

    def of_split(self, split: str | None) -> list[ShardInfo]:
        """The shards of one split, or all. Raises InputError for a split the store lacks."""
        chosen = [shard for shard in self.shards if split in (None, shard.split)]
        if not chosen and split is not None:
            there = ", ".join(sorted({shard.split for shard in self.shards})) or "none"
            raise InputError(f"split {split!r} is not in the store; it has: {there}")
        return chosen


def shard_name(split: str, number: int) -> str:
    """File name of a shard: train-00000.h5."""
    if split not in SPLITS:
        raise UsageError(f"split {split!r}; want one of {', '.join(SPLITS)}")
    return f"{split}-{number:05d}.h5"


def write_manifest(folder: Path, head: Head, shards: Sequence[ShardInfo], *, token: str | None = None) -> Manifest:
    """Write manifest.json, whole; a store is complete when it is there. Shards stand in the order given.

    Raises UsageError for a shard listed twice, StorageError.
    """
    for name, times in Counter(shard.name for shard in shards).items():
        if times > 1:
            raise UsageError(f"{folder}: shard {name} is listed {times} times, want once")
    manifest = Manifest(head, list(shards))
    told = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "writer": WRITER,
        **_head_json(head),
        "settings_hash": head.settings_hash,
        "shards": [asdict(shard) for shard in shards],
    }
    write_json(Path(folder) / MANIFEST, told, token=token)
    return manifest


def _head_json(head: Head) -> dict[str, Any]:
    return {
        "source": head.source,
        "settings": dict(head.settings),
        "columns": {name: asdict(spec) for name, spec in head.columns.items()},
        "edges": None if head.edges is None else asdict(head.edges),
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store. Raises InputError where it is missing, broken or of a newer format.

    Raises SiteError or StorageError where it cannot be read at the moment.
    """
    file = Path(folder) / MANIFEST
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as fault:
        why = "is no folder" if not Path(folder).is_dir() else f"has no {MANIFEST}: no store, or an unfinished one"
        raise InputError(f"{folder}: {why}") from fault
    except (OSError, ValueError) as fault:
        raise _passing(file, fault) or InputError(f"{file}: cannot be read ({fault})") from fault
    if not isinstance(told, dict):
        raise InputError(f"{file}: holds no JSON object; want a manifest of {FORMAT}")
    _check_format(file, told.get("format"), told.get("format_version"))
    try:
        head = Head(
            told["source"],
            told["settings"],
            {name: ColumnSpec(**spec) for name, spec in told["columns"].items()},
            None if told["edges"] is None else EdgeSettings(**told["edges"]),
        )
        return Manifest(head, [ShardInfo(**shard) for shard in told["shards"]], told["writer"])
    except (KeyError, TypeError, AttributeError, UsageError) as fault:
        raise InputError(f"{file}: not a manifest of {FORMAT} {FORMAT_VERSION} ({fault!r})") from fault


def _check_format(file: Path, name: Any, version: Any) -> None:
    if name != FORMAT:
        raise InputError(f"{file}: format is {name!r}, want {FORMAT!r}")
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{file}: format version is {version!r}, want {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise InputError(f"{file}: format version {version} is newer than this hpcgen reads ({FORMAT_VERSION}): update")


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what h5py raises on a broken file inside the block into an InputError that names `file`.

    What says nothing of the file (no memory, no more open files, a server that is away) becomes a SiteError or
    a StorageError: a shard is not to be given up for it.
    """
    try:
        yield
    except FileNotFoundError as fault:
        raise InputError(f"{file}: the shard is missing, the manifest lists it") from fault
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError) as fault:
        raise _passing(file, fault) or InputError(f"{file}: the shard is damaged ({_reason(fault)})") from fault


def _passing(file: Path, fault: BaseException) -> HpcgenError | None:
    """The error for a fault of the system, None for one of the file. HDF5 may tell errno in its message only."""
    told = re.search(r"errno = (\d+),", str(fault))
    code = int(told[1]) if told else getattr(fault, "errno", None)
    if code in _SITE or isinstance(fault, MemoryError):
        return SiteError(f"{file}: cannot be read now ({_reason(fault) or 'no memory'})")
    if code in _STORAGE:
        return StorageError(f"{file}: cannot be read now ({_reason(fault)})")
    return None


def _reason(fault: BaseException) -> str:
    return " ".join(str(fault).split())


def open_shard(file: Path, *, listed: ShardInfo | None = None, settings_hash: str | None = None) -> h5py.File:
    """A shard opened for reading, without locking. Size and settings hash are checked where given.

    Raises InputError where the file is missing, cut short, no shard or of another making; else as `reading`.
    """
    with reading(file):
        size = Path(file).stat().st_size
        if listed is not None and size != listed.bytes:
            raise InputError(f"{file}: the shard has {size} bytes, the manifest lists {listed.bytes}")
        shard = h5py.File(file, "r", locking=False)
    try:
        with reading(file):
            _check_format(file, attribute(shard, "format"), attribute(shard, "format_version"))
            made = attribute(shard, "settings_hash")
        if settings_hash is not None and made != settings_hash:
            raise InputError(f"{file}: the shard was made with settings {made}, the manifest's are {settings_hash}")
    except HpcgenError:
        shard.close()
        raise
    return shard


def attribute(node: Any, name: str) -> Any:
    """A root attribute as str or int, None where it is absent. Raises what h5py raises on a damaged file."""
    if name not in node.attrs:
        return None
    value = node.attrs[name]
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if isinstance(value, str) else int(value)


def sha256_of(file: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shard_info(file: Path, *, name: str | None = None) -> ShardInfo:
    """What a manifest says of a shard on disk: counts from its arrays, size and hash of its bytes."""
    with open_shard(file) as shard, reading(file):
        crystals, atoms = shard["ptr"].shape[0] - 1, shard["atomic_numbers"].shape[0]
        edges = shard["edges/neighbour"].shape[0] if "edges" in shard else 0
        split = attribute(shard, "split")
    return ShardInfo(name or file.name, split, crystals, atoms, edges, file.stat().st_size, sha256_of(file))
