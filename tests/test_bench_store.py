"""How fast and how large stores are: HPCGEN_BENCH_CRYSTALS=1000000 pytest -m bench -s <this file>."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import Edges, radius_edges
from hpcgen.store.batches import Limits, Plan, StoreBatches, loader
from hpcgen.store.layout import EdgeSettings, Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Column, ColumnSpec, Rows
from hpcgen.store.write import SHARD_ROWS, write_store

pytestmark = [pytest.mark.bench, pytest.mark.slow]

N = int(os.environ.get("HPCGEN_BENCH_CRYSTALS", 20000))
COLUMNS = {"band_gap": ColumnSpec("float", "eV"), "spacegroup": ColumnSpec("int")}
RADIUS = EdgeSettings("radius", cutoff=6.0)
PART = 2000


def crystals(n: int, seed: int) -> Crystals:
    """1 to 20 atoms, mean 10.5, as in MP-20; so dense that there are about 1,080 edges of 6 Å each."""
    make = torch.Generator().manual_seed(seed)
    num_atoms = torch.randint(1, 21, (n,), generator=make)
    frac = torch.rand(int(num_atoms.sum()), 3, generator=make, dtype=torch.float64)
    shape = torch.eye(3).double() + 0.2 * torch.rand(n, 3, 3, generator=make, dtype=torch.float64)
    lattice = shape * (8.4 * num_atoms / torch.linalg.det(shape)).pow(1 / 3)[:, None, None]
    return Crystals(frac, lattice, torch.randint(1, 90, (len(frac),), generator=make), num_atoms)


def parts(n: int, edges: bool = False) -> Iterator[tuple[str, Rows]]:
    """Random crystals in parts; with edges, those of one part over and over, since finding them costs more."""
    kept, chance = crystals(PART, 0), np.random.default_rng(0)
    found = radius_edges(kept, 6.0) if edges else None
    for start in range(0, n, PART):
        size = min(PART, n - start)
        some = kept if edges else crystals(PART, start)
        gaps, none = np.arange(PART) % 3 == 0, np.zeros(PART, bool)
        columns = {
            "band_gap": Column(COLUMNS["band_gap"], chance.random(PART), gaps),
            "spacegroup": Column(COLUMNS["spacegroup"], chance.integers(1, 231, PART), none),
        }
        rows = Rows(some, [f"bench-{start + k}" for k in range(PART)], columns, found)
        yield "all", rows if size == PART else first(rows, size)


def first(rows: Rows, n: int) -> Rows:
    edges = rows.edges
    if edges is not None:
        inside = edges.index[0] < rows.crystals.ptr[n]
        edges = Edges(edges.index[:, inside], edges.image[inside])
    columns = {k: Column(c.spec, c.values[:n], c.missing[:n]) for k, c in rows.columns.items()}
    return Rows(rows.crystals[:n], rows.ids[:n], columns, edges)


def timed(call: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of one core (the machine may be shared), or by another clock."""
    start = clock()
    call()
    return clock() - start


def through(things: Iterable[object]) -> None:
    for _ in things:
        pass


def report(line: str) -> None:
    print(f"\n  {line}", end="", flush=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "plain"
    write_store(folder, Head("bench", columns=COLUMNS), parts(min(N, 20000)))
    return folder


@pytest.fixture(scope="module")
def with_edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "edges"
    write_store(folder, Head("bench", columns=COLUMNS, edges=RADIUS), parts(min(N, 20000), edges=True))
    return folder


@pytest.mark.parametrize("edges", [False, True])
def test_write_and_read_through_at_flat_memory(tmp_path: Path, edges: bool) -> None:
    """In a process of its own, so that the peak of its memory is the store's."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "store"), str(N), str(int(edges))],
        check=True,
        capture_output=True,
        text=True,
    )
    report(done.stdout.strip())
    quarter, peak = (float(done.stdout.split(word)[1].split()[0]) for word in ("a quarter ", "peak "))
    assert peak < 1.2 * quarter  # four times the crystals take no more memory


def test_random_reads_of_single_crystals(plain: Path, with_edges: Path) -> None:
    for path, edges in ((plain, False), (with_edges, True)):
        store = Store(path, edges=edges, cache_bytes=1 << 30)
        store.rows(range(0, len(store), 50))  # warm the cache
        which = np.random.default_rng(0).integers(0, len(store), 20000).tolist()
        seconds = timed(lambda: through(store[k] for k in which))  # noqa: B023
        report(f"single crystals at random, edges {edges}: {20000 / seconds:,.0f}/s")
        assert 20000 / seconds >= 20000  # of processor time, so that a busy machine does not count


@pytest.mark.parametrize("run", [1, 64])
def test_epoch_of_a_store_larger_than_the_cache(with_edges: Path, run: int) -> None:
    store = Store(with_edges, edges=True)
    sizes = store.sizes()
    assert sizes.edges is not None
    total = int(sizes.edges.sum()) * 5
    store = Store(with_edges, edges=True, cache_bytes=total // 10)
    plan = Plan(sizes.atoms, Limits(crystals=64, mix=8, run=run), seed=0, edges=sizes.edges)
    batches, steps = StoreBatches(store, plan), 40
    seconds = timed(lambda: through(batches[step] for step in range(steps)))
    report(f"cache of a tenth, run {run}: {steps * 64 / seconds:,.0f} crystals/s")


def test_batches_against_single_files(plain: Path, tmp_path: Path) -> None:
    """The same crystals as PyG graphs, one file each, through PyG's DataLoader."""
    n = 4000
    store = Store(plain)
    for k in range(n):
        one = store[k]
        gap = torch.tensor(one.columns["band_gap"].values)
        data = Data(x=one.crystals.atomic_numbers, pos=one.crystals.frac_coords, cell=one.crystals.lattice, y=gap)
        torch.save(data, tmp_path / f"{k}.pt")

    class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return n

        def __getitem__(self, k: int) -> Data:
            return torch.load(tmp_path / f"{k}.pt", weights_only=False)

    files = timed(lambda: through(DataLoader(Files(), batch_size=64, shuffle=True)))
    plan = Plan(store.sizes().atoms, Limits(crystals=64), seed=0)
    ours = timed(lambda: through(loader(StoreBatches(store, plan))))
    rate, theirs = len(store) / ours, n / files
    report(f"batches of 64: store {rate:,.0f} crystals/s, single files {theirs:,.0f}/s ({rate / theirs:.0f} times)")
    assert rate > theirs


def test_planning_an_epoch() -> None:
    atoms = np.random.default_rng(0).integers(1, 53, max(N, 1_000_000))
    plan = Plan(atoms, Limits(crystals=256, padded_atoms=8192), seed=0)
    took = timed(lambda: plan.epoch(0))
    report(f"planning an epoch of {len(atoms):,} crystals: {took:.2f} s")
    assert took < 10, "planning holds up training"


def write_and_read(path: Path, n: int, edges: bool) -> None:
    head = Head("bench", columns=COLUMNS, edges=RADIUS if edges else None)
    shard_rows = min(SHARD_ROWS, n // 8)  # memory is that of some shards: a quarter of the crystals is to fill two

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    quarter = path.with_name("quarter")
    write_store(quarter, head, parts(n // 4, edges), shard_rows=shard_rows)
    through(Store(quarter, edges=edges).iter_rows(2000))
    first_peak = peak()
    making = timed(lambda: [None for _ in parts(n, edges)])
    start = time.perf_counter()
    writing = timed(lambda: write_store(path, head, parts(n, edges), shard_rows=shard_rows)) - making
    elapsed = time.perf_counter() - start
    store = Store(path, edges=edges)
    reading = timed(lambda: [len(rows) for rows in store.iter_rows(2000)])
    size = sum(shard.bytes for shard in store.shards)
    told = store.sizes()
    many = "" if told.edges is None else f", {told.edges.mean():,.0f} edges each"
    print(
        f"{n:,} crystals{many}, {size / n:,.0f} bytes each, "
        f"memory of a quarter {first_peak:.0f} MB, peak {peak():.0f} MB:"
    )
    print(f"    written at {n / writing:,.0f}/s of a core ({elapsed / 60:.1f} minutes in all, with making them)")
    print(f"    read through at {n / reading:,.0f}/s of a core")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_and_read(Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])))
