"""What lies between the passes of building a store: parsed crystals with the keys of pass 2 beside them.

A staging file is the arrays of a shard as .npz, uncompressed, each with its checksum: it is written and read in a
tenth of HDF5's time, which every one of its small arrays costs. Imports no torch.
"""

import csv
import io
import json
import struct
import tokenize
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcgen.files import storage_faults, write_whole
from hpcgen.store.arrays import Arrays
from hpcgen.store.layout import REJECTS, ColumnSpec, Head, reading
from hpcgen.store.rows import Column, Rows
from hpcgen.store.settings import BuildSettings
from hpcgen.store.source import Source, Value
from hpcgen.store.write import encode

KEYS = {
    "key.id": ColumnSpec("str"),  # ids may stand twice in a source: a staging file counts its rows instead
    "key.row": ColumnSpec("int"),
    "key.formula": ColumnSpec("str"),
    "key.split": ColumnSpec("str"),
}


@dataclass(frozen=True)
class Refusal:
    """A row of the reject table."""

    row: int  # in the source
    id: str
    code: str
    message: str


def staged_columns(source: Source, settings: BuildSettings) -> dict[str, ColumnSpec]:
    """Columns of a staging file: the source's, what pass 1 finds, the keys of pass 2."""
    space_group = {"space_group": ColumnSpec("int")} if settings.purify else {}
    return {**source.columns, **space_group, **KEYS}


def make_column(spec: ColumnSpec, values: Sequence[Value]) -> Column:
    """A column of the given kind from Python values, None or NaN being missing. Raises ValueError for a wrong kind."""
    missing = np.array([value is None or value != value for value in values], dtype=bool)
    empty: Any = {"float": np.nan, "int": 0, "bool": False, "str": ""}[spec.kind]
    dtype: Any = {"float": np.float64, "int": np.int64, "bool": bool, "str": object}[spec.kind]
    filled = [empty if gone else value for gone, value in zip(missing, values, strict=True)]
    return Column(spec, np.array(filled, dtype=dtype), missing)


def write_staged(draft: Path, rows: Rows, head: Head, refusals: Sequence[Refusal]) -> None:
    """Write a staging file. Raises InputError for rows that may not be stored, StorageError."""
    arrays: dict[str, Any] = {**encode(rows, head), "refusals": encode_refusals(refusals)}
    with storage_faults(draft), draft.open("wb") as file:
        np.savez(file, **arrays)


def encode_refusals(refusals: Sequence[Refusal]) -> np.ndarray:
    """As `decode_refusals` takes them from a file."""
    lines = "".join(json.dumps(vars(refusal)) + "\n" for refusal in refusals)
    return np.frombuffer(lines.encode(), dtype=np.uint8)


def read_staged(path: Path, columns: Mapping[str, ColumnSpec]) -> Arrays:
    """The crystals of a staging file with the named columns. Raises InputError where it is damaged."""
    return _read(path, ("ptr", "frac_coords", "atomic_numbers", "lattice", "id", *_of(columns)))


def read_keys_of(path: Path, columns: Mapping[str, ColumnSpec]) -> Arrays:
    """The named columns alone."""
    return _read(path, ("ptr", *_of(columns)))


def _of(columns: Mapping[str, ColumnSpec]) -> list[str]:
    """Names of the arrays that hold them."""
    values = [f"columns/{name}" for name in columns]
    return values + [f"missing/{name}" for name, spec in columns.items() if spec.kind != "float"]


def _read(path: Path, names: Sequence[str]) -> Arrays:
    with reading(path):
        try:
            with np.load(path) as file:
                return {name: file[name] for name in names}
        except (zipfile.BadZipFile, EOFError, struct.error, tokenize.TokenError) as fault:
            raise ValueError(str(fault)) from fault


def read_refusals(path: Path) -> list[Refusal]:
    """The refusals of a staging file."""
    return decode_refusals(_read(path, ("refusals",))["refusals"])


def decode_refusals(told: np.ndarray) -> list[Refusal]:
    """Inverse of `encode_refusals`."""
    return [Refusal(**json.loads(line)) for line in bytes(told).decode().splitlines()]


def write_rejects(store: Path, refusals: Sequence[Refusal], token: str) -> None:
    """Write the reject table of a store, in the order of its source."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["row", "id", "code", "message"])
    ordered = sorted(refusals, key=lambda refusal: (refusal.row, refusal.id))
    writer.writerows((r.row, r.id, r.code, r.message) for r in ordered)
    write_whole(store / REJECTS, table.getvalue(), token=token)
