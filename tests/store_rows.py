"""Rows with every kind of column, gaps, and ids beyond ASCII, and a store of them, for the tests of stores."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import radius_edges
from hpcgen.store.layout import EdgeSettings, Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Column, ColumnSpec, Rows
from hpcgen.store.write import write_store

SPECS = {
    "band_gap": ColumnSpec("float", "eV"),
    "spacegroup": ColumnSpec("int"),
    "stable": ColumnSpec("bool"),
    "formula": ColumnSpec("str"),
}
RADIUS = EdgeSettings("radius", cutoff=4.0)
HEAD = Head("test", {"symprec": 0.1}, SPECS)


def crystals(n: int, seed: int = 0, largest: int = 12) -> Crystals:
    make = torch.Generator().manual_seed(seed)
    num_atoms = torch.randint(1, largest + 1, (n,), generator=make)
    atoms = int(num_atoms.sum())
    frac = torch.rand(atoms, 3, generator=make, dtype=torch.float64)
    lattice = 4 * torch.eye(3, dtype=torch.float64) + torch.rand(n, 3, 3, generator=make, dtype=torch.float64)
    return Crystals(frac, lattice, torch.randint(1, 119, (atoms,), generator=make), num_atoms)


def rows(n: int, seed: int = 0, *, first: int = 0, edges: bool = False) -> Rows:
    chance = np.random.default_rng(seed)
    some = crystals(n, seed)
    missing = {name: chance.random(n) < 0.3 for name in SPECS}
    words = ["NaCl", "Łódź", "α-石英", ""]
    values = {
        "band_gap": chance.normal(size=n),
        "spacegroup": chance.integers(-(2**62), 2**62, n),
        "stable": chance.random(n) < 0.5,
        "formula": np.array([words[k] for k in chance.integers(0, 4, n)], dtype=object),
    }
    columns = {name: Column(spec, values[name], missing[name]) for name, spec in SPECS.items()}
    ids = [f"mp-{k}-é" for k in range(first, first + n)]
    return Rows(some, ids, columns, radius_edges(some, 4.0) if edges and n else None)


def same(found: Rows, wanted: Rows) -> bool:
    pairs = [
        (found.crystals.frac_coords, wanted.crystals.frac_coords),
        (found.crystals.lattice, wanted.crystals.lattice),
        (found.crystals.atomic_numbers, wanted.crystals.atomic_numbers),
        (found.crystals.num_atoms, wanted.crystals.num_atoms),
    ]
    if wanted.edges is not None:
        assert found.edges is not None
        pairs += [(found.edges.index, wanted.edges.index), (found.edges.image, wanted.edges.image)]
    alike = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    return (
        alike
        and list(found.ids) == list(wanted.ids)
        and found.columns.keys() == wanted.columns.keys()
        and all(
            np.array_equal(found.columns[name].missing, column.missing)
            and found.columns[name].spec == column.spec
            and all(
                a == b and type(a) is type(b)
                for a, b, gone in zip(
                    found.columns[name].values.tolist(), column.values.tolist(), column.missing, strict=True
                )
                if not gone
            )
            for name, column in wanted.columns.items()
        )
    )


@pytest.fixture
def a_store(tmp_path: Path) -> Path:
    """50 train crystals in shards of 20, 5 val."""
    parts = [("train", rows(33)), ("val", rows(5, 2, first=90)), ("train", rows(17, 1, first=33))]
    write_store(tmp_path / "store", HEAD, parts, shard_rows=20)
    return tmp_path / "store"


def read(path: Path, **settings: object) -> Store:
    return Store(path, **{"dtype": None, **settings})  # type: ignore[arg-type]


def everything(path: Path) -> Rows:
    some = read(path)
    return some.rows(range(len(some)))


def flip(file: Path) -> None:
    """Flip one bit of the coordinates."""
    data = bytearray(file.read_bytes())
    with h5py.File(file) as shard:
        start = shard["frac_coords"].id.get_chunk_info(0).byte_offset
    data[start + 40] ^= 4
    file.write_bytes(data)
