"""Batches: every crystal once per epoch, the same steps on every rank, whatever the number of ranks."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_rows import crystals

from hpcgen.errors import UsageError
from hpcgen.store.batches import Limits, Plan, StoreBatches, loader, share
from hpcgen.store.layout import Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Rows
from hpcgen.store.write import write_store

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=200).map(np.array)
limits = st.builds(
    Limits,
    crystals=st.integers(1, 40),
    atoms=st.none() | st.integers(60, 500),
    padded_atoms=st.none() | st.integers(60, 500),
    edges=st.none() | st.integers(600, 5000),
    mix=st.integers(1, 5),
    run=st.integers(1, 9),
)
worlds = st.integers(1, 9)


def plan(atoms: np.ndarray, bounds: Limits, seed: int = 0) -> Plan:
    return Plan(atoms, bounds, seed=seed, edges=10 * atoms)


@settings(max_examples=150, deadline=None)
@given(sizes, limits, worlds, st.integers(0, 3))
def test_every_crystal_once_within_the_limits_on_any_world(
    atoms: np.ndarray, bounds: Limits, world: int, epoch: int
) -> None:
    batches = plan(atoms, bounds).epoch(epoch)
    assert sorted(batches.order.tolist()) == list(range(len(atoms)))
    for step in range(len(batches)):
        batch = batches[step]
        mine = atoms[batch]
        assert 1 <= len(batch) <= (bounds.crystals or 999)
        assert mine.sum() <= (bounds.atoms or 1e9) and 10 * mine.sum() <= (bounds.edges or 1e9)
        assert len(mine) * mine.max() <= (bounds.padded_atoms or 1e9)
        shares = [share(batch, mine, rank, world) for rank in range(world)]
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
        loads, counts = [atoms[part].sum() for part in shares], [len(part) for part in shares]
        assert max(loads) - min(loads) <= mine.max() and max(counts) - min(counts) <= 1


@settings(max_examples=50, deadline=None)
@given(sizes, limits, worlds)
def test_weighted_means_of_the_ranks_are_the_global_mean(atoms: np.ndarray, bounds: Limits, world: int) -> None:
    batches, loss = plan(atoms, bounds).epoch(0), np.random.default_rng(0).normal(size=len(atoms))
    for step in range(len(batches)):
        parts = [share(batches[step], atoms[batches[step]], rank, world) for rank in range(world)]
        total = sum(len(part) / len(batches[step]) * loss[part].mean() for part in parts if len(part))
        assert np.isclose(total, loss[batches[step]].mean())


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    atoms = np.random.default_rng(0).integers(1, 50, 3000)
    first = plan(atoms, Limits(crystals=32)).epoch(3)
    again = plan(atoms, Limits(crystals=32)).epoch(3)
    assert np.array_equal(first.order, again.order) and np.array_equal(first.ptr, again.ptr)
    for other in (plan(atoms, Limits(crystals=32)).epoch(4), plan(atoms, Limits(crystals=32), 1).epoch(3)):
        assert not np.array_equal(first.order, other.order)


def test_batches_are_filled_and_sizes_alike_but_not_always_the_same_company() -> None:
    atoms = np.random.default_rng(0).integers(1, 53, 20000)
    made = plan(atoms, Limits(padded_atoms=2048))
    batches = made.epoch(0)
    batch = [batches[step] for step in range(len(batches))]
    padded = sum(len(part) * atoms[part].max() for part in batch)
    assert atoms.sum() / padded > 0.9
    assert len(batches) < 1.1 * padded / 2048
    steps = np.repeat(np.arange(len(batches)), np.diff(batches.ptr))
    place = np.empty(len(atoms), dtype=int)
    place[batches.order] = steps
    other = made.epoch(1)
    met = [len(np.unique(place[other[step]])) for step in range(len(other))]
    assert np.mean(met) > 8  # crystals of a batch come from that many batches of the epoch before
    first = atoms[np.concatenate(batch[: len(batch) // 2])].mean()
    assert abs(first / atoms.mean() - 1) < 0.1  # no drift of sizes through the epoch


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (Limits(), "no limit"),
        (Limits(crystals=0), "crystals of a batch is 0"),
        (Limits(atoms=10), r"atoms of a batch is 10, but 1 crystals alone have more \(number 2 has 20\)"),
        (Limits(padded_atoms=10), "padded_atoms of a batch is 10"),
        (Limits(crystals=3, edges=5), "numbers of edges are not given"),
        (Limits(crystals=3, mix=0), "mix of a batch is 0"),
    ],
)
def test_limits_that_cannot_hold_are_refused(bounds: Limits, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan(np.array([5, 10, 20][: 3 if bounds.crystals is None else 2]), bounds, seed=0)


@pytest.mark.parametrize(
    ("atoms", "edges", "message"),
    [
        ([1, 2], [10], "edges of 1 crystals, of atoms of 2"),
        ([1, 2], [1.5, 2.5], "numbers of edges are float64"),
        ([1, 2], [[1, 2]], r"numbers of edges are int64 of shape \(1, 2\)"),
        ([1, 2], [1, -2], "crystal 1 has -2 edges, want at least 0"),
        ([1.5, 2.5], None, "numbers of atoms are float64"),
        ([1, 0], None, "crystal 1 has 0 atoms"),
    ],
)
def test_sizes_are_checked_at_the_door(atoms: list[int], edges: list[int] | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan(np.array(atoms), Limits(crystals=2), seed=0, edges=None if edges is None else np.array(edges))


def test_a_negative_epoch_is_refused() -> None:
    with pytest.raises(UsageError, match="epoch is -1, want 0 or more"):
        Plan(np.array([1, 2]), Limits(crystals=1), seed=0).epoch(-1)


def test_the_order_is_the_same_for_all_time() -> None:
    """A run is resumed with another NumPy, too: the order may not rest on what may change between versions."""
    made = Plan(np.full(10, 4), Limits(crystals=3, mix=2), seed=7).epoch(2)
    assert made.order.tolist() == [6, 0, 7, 2, 5, 4, 9, 1, 8, 3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batches") / "store"
    write_store(folder, Head("test"), [("all", Rows(crystals(60), [str(k) for k in range(60)]))], shard_rows=25)
    return folder


def _batches(store: Path, rank: int = 0, world: int = 1, start: int = 0) -> StoreBatches:
    some = Store(store)
    made = Plan(some.sizes().atoms, Limits(crystals=8, mix=2), seed=5)
    return StoreBatches(some, made, epoch=1, rank=rank, world=world, start_step=start)


def _told(batches: StoreBatches, **how: object) -> list[tuple[int, list[str], float]]:
    return [(s.step, list(s.rows.ids), s.weight) for s in loader(batches, **how)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, "spawn")])
def test_loaders_give_the_same_with_and_without_workers(store: Path, workers: int, start: str | None) -> None:
    batches = _batches(store, rank=1, world=3)
    batches[0]  # the parent's files and cache are in use already
    wanted = [(s.step, list(s.rows.ids), s.weight) for s in batches]
    assert _told(batches, workers=workers, start=start) == wanted


@pytest.mark.parametrize("world", [1, 2, 5])
@pytest.mark.parametrize("resumed", [1, 3])
def test_resume_on_another_number_of_ranks_sees_every_crystal_once(store: Path, world: int, resumed: int) -> None:
    stop, seen = 3, []
    for rank in range(world):
        seen += [id for _, ids, weight in _told(_batches(store, rank, world))[:stop] for id in ids if weight]
    for rank in range(resumed):
        part = _batches(store, rank, resumed, start=stop)
        assert len(part) == len(_batches(store))
        seen += [id for _, ids, weight in _told(part) for id in ids if weight]
    assert sorted(seen, key=int) == [str(k) for k in range(60)]


def test_a_rank_with_nothing_is_lent_a_crystal_of_no_weight(store: Path) -> None:
    steps = [list(iter(_batches(store, rank, 11))) for rank in range(11)]
    assert len({len(part) for part in steps}) == 1
    for shares in zip(*steps, strict=True):
        assert sum(s.weight for s in shares) == pytest.approx(1)
        assert all(len(s.rows) == 1 for s in shares) and [s.weight for s in shares].count(0.0) >= 3


def test_a_share_says_where_its_rows_stand_in_the_store(store: Path) -> None:
    for rank in range(3):
        for part in _batches(store, rank, 3):
            assert [str(k) for k in part.index] == list(part.rows.ids)


def test_loading_leaves_the_global_generator_alone(store: Path) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    _told(_batches(store))
    assert torch.equal(before, torch.random.get_rng_state())


def test_workers_outlive_the_schedulers_signal(store: Path) -> None:
    """A handler of the rank, inherited by fork, or death by the default one would both be wrong."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        turning = iter(loader(_batches(store), workers=1, start="fork"))
        next(turning)
        (worker,) = turning._workers  # type: ignore[attr-defined]
        assert worker.is_alive()
        os.kill(worker.pid, signal.SIGTERM)
        assert len(list(turning)) == len(_batches(store)) - 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_places_outside_the_plan_are_refused(store: Path) -> None:
    steps = len(_batches(store))
    assert _told(_batches(store, start=steps)) == []
    for rank, world, start in ((0, 1, steps + 1), (2, 2, 0), (-1, 2, 0), (0, 1, -1)):
        with pytest.raises(UsageError):
            _batches(store, rank, world, start)
    with pytest.raises(UsageError, match="store has 60 crystals, the plan was made for 2"):
        StoreBatches(Store(store), Plan(np.array([1, 2]), Limits(crystals=1), seed=0))
    with pytest.raises(IndexError):
        _batches(store)[steps]
