"""Which crystals make up each training step, whatever the number of ranks, and each rank's share of them.

The global batches of an epoch are a function of (sizes, limits, seed, epoch) alone. Every crystal is in
exactly one, every rank goes through the same number of steps, and (epoch, step) is all it takes to go on, on
the same or another number of ranks. This module imports no torch until a loader is asked for.

A step on `world` ranks, each with its own `share`:

    loss = model(share.rows, ...)["loss"]        # the mean over the rank's crystals
    (loss * share.weight * world).backward()     # DDP divides the sum of the gradients by world

which adds up to the gradient of the mean over the global batch. Where a batch has fewer crystals than there
are ranks, a rank with nothing is lent one crystal of the batch with weight 0: its forward and backward keep
the collectives in step and contribute zero (as long as its loss is finite). Count samples by the weight.
"""

import ctypes
import math
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcgen.errors import UsageError

_PR_SET_PDEATHSIG = 1  # of Linux: a signal at the death of the thread that forked

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from hpcgen.store.read import Store
    from hpcgen.store.rows import Rows

__all__ = ["Epoch", "Limits", "Plan", "Share", "StoreBatches", "loader", "share"]


@dataclass(frozen=True)
class Limits:
    """Bounds of a global batch; at least one is set, all that are set hold."""

    crystals: int | None = None
    atoms: int | None = None
    padded_atoms: int | None = None  # crystals times the atoms of the largest
    edges: int | None = None
    mix: int = 64  # similar sizes are gathered among about this many batches drawn at random
    run: int = 1  # neighbours in the store drawn together: 64 reads a store larger than the cache 50 times faster


@dataclass(frozen=True)
class Epoch:
    """The global batches of one epoch. `epoch[step]` are indices into the store."""

    order: np.ndarray  # (N,) int64, every crystal once
    ptr: np.ndarray  # (steps + 1,) int64, first place of each batch, and the end

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return self.order[self.ptr[step] : self.ptr[step + 1]]


class Plan:
    """Forms the global batches of every epoch from the sizes of the crystals (see Store.sizes).

    Raises UsageError where no limit is set or a crystal alone is over one: the bounds stand for memory, so it
    is for the user to raise them or to leave such crystals out, before anything runs.
    """

    def __init__(self, atoms: np.ndarray, limits: Limits, *, seed: int, edges: np.ndarray | None = None) -> None:
        self.atoms = _whole_numbers("atoms", atoms, least=1)
        self.edges = None if edges is None else _whole_numbers("edges", edges, least=0)
        if self.edges is not None and len(self.edges) != len(self.atoms):
            raise UsageError(f"numbers of edges of {len(self.edges)} crystals, of atoms of {len(self.atoms)}")
        self.limits, self.seed = limits, seed
        _check(self.atoms, self.edges, limits)
        if seed < 0:
            raise UsageError(f"seed is {seed}, want 0 or more")
        self._pool = max(1, limits.mix) * _typical(self.atoms, self.edges, limits)

    def epoch(self, epoch: int) -> Epoch:
        """The batches of epoch 0, 1, ...: random crystals, similar sizes together, in random order."""
        if epoch < 0:
            raise UsageError(f"epoch is {epoch}, want 0 or more")
        random = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
        order = self._shuffled(random)
        batches: list[np.ndarray] = []
        rest = order[:0]
        for start in range(0, len(order), self._pool):
            pool = np.concatenate([rest, order[start : start + self._pool]])
            pool = pool[_permutation(random, len(pool))]
            pool = pool[np.argsort(self.atoms[pool], kind="stable")]
            *full, rest = [pool[first:end] for first, end in self._cuts(pool)]
            batches += full
        if len(rest):
            batches.append(rest)
        shuffled = [batches[k] for k in _permutation(random, len(batches))]
        ptr = np.cumsum([0, *(len(batch) for batch in shuffled)])
        return Epoch(np.concatenate(shuffled) if shuffled else order, ptr)

    def _shuffled(self, random: np.random.Philox) -> np.ndarray:
        run = max(1, self.limits.run)
        runs = _permutation(random, math.ceil(len(self.atoms) / run))
        order = (runs[:, None] * run + np.arange(run)).reshape(-1)
        return order[order < len(self.atoms)]

    def _cuts(self, pool: np.ndarray) -> Iterator[tuple[int, int]]:
        """Where a pool, sorted by size, is cut: each batch as long as the limits allow."""
        limits, sizes = self.limits, self.atoms[pool]
        bounds = [(limits.atoms, np.cumsum(sizes))]
        if self.edges is not None:
            bounds.append((limits.edges, np.cumsum(self.edges[pool])))
        start = 0
        while start < len(pool):
            end = len(pool) if limits.crystals is None else min(len(pool), start + limits.crystals)
            for limit, total in bounds:
                if limit is not None:
                    before = total[start - 1] if start else 0
                    end = min(end, int(np.searchsorted(total, before + limit, side="right")))
            if limits.padded_atoms is not None:
                ahead = sizes[start : min(end, start + limits.padded_atoms // sizes[start])]
                padded = ahead * np.arange(1, len(ahead) + 1)  # rises, since the sizes do
                end = start + int(np.searchsorted(padded, limits.padded_atoms, side="right"))
            yield start, end
            start = end


def _permutation(random: np.random.Philox, n: int) -> np.ndarray:
    """0 to n - 1 in random order. (n,) int64.

    NumPy promises the raw bits of a bit generator for all time, and not what Generator.permutation makes of them.
    """
    return np.argsort(random.random_raw(n), kind="stable")


def _whole_numbers(name: str, sizes: np.ndarray, *, least: int) -> np.ndarray:
    """Sizes of the crystals as (N,) int64."""
    given = np.asarray(sizes)
    if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
        raise UsageError(f"numbers of {name} are {given.dtype} of shape {given.shape}, want integers of shape (N,)")
    if len(given) and given.min() < least:
        raise UsageError(f"crystal {given.argmin()} has {given.min()} {name}, want at least {least}")
    return given.astype(np.int64)


def _check(atoms: np.ndarray, edges: np.ndarray | None, limits: Limits) -> None:
    bounds = {"crystals": np.ones_like(atoms), "atoms": atoms, "padded_atoms": atoms, "edges": edges}
    if all(getattr(limits, name) is None for name in bounds):
        raise UsageError(f"no limit of a batch is set; want one of {', '.join(bounds)}")
    for field in fields(limits):
        limit = getattr(limits, field.name)
        if limit is not None and limit < 1:
            raise UsageError(f"{field.name} of a batch is {limit}, want at least 1")
    for name, sizes in bounds.items():
        limit = getattr(limits, name)
        if limit is None:
            continue
        if sizes is None:
            raise UsageError("edges of a batch are limited, but the crystals' numbers of edges are not given")
        over = np.flatnonzero(sizes > limit)
        if len(over):
            told = f"{len(over)} crystals alone have more (number {sizes.argmax()} has {sizes.max()})"
            raise UsageError(f"{name} of a batch is {limit}, but {told}: raise the limit or leave them out")


def _typical(atoms: np.ndarray, edges: np.ndarray | None, limits: Limits) -> int:
    """About how many crystals a batch holds."""
    if not len(atoms):
        return 1
    each = {"crystals": 1.0, "atoms": atoms.mean(), "padded_atoms": atoms.mean()}
    each["edges"] = 1.0 if edges is None else max(1.0, edges.mean())
    counts = [getattr(limits, name) / size for name, size in each.items() if getattr(limits, name) is not None]
    return max(1, int(min(counts)))


def share(batch: np.ndarray, atoms: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The part of a global batch (N,) of one rank: all ranks' parts make up the batch, each crystal once.

    atoms (N,) of the batch. Dealt out to and fro from the largest down, so that the atoms of two ranks
    differ by no more than the largest crystal, and their counts by no more than one.
    """
    place = np.argsort(-atoms, kind="stable")
    turn, seat = np.divmod(np.arange(len(batch)), world)
    mine = np.where(turn % 2 == 0, seat, world - 1 - seat) == rank
    return batch[np.sort(place[mine])]


@dataclass(frozen=True)
class Share:
    """What one rank has to do in one step."""

    step: int
    rows: "Rows"
    weight: float  # the rank's crystals over those of the global batch: all ranks' weights sum to 1
    crystals: int  # of the global batch
    index: np.ndarray  # (B,) int64: the places of the rows in the store


class StoreBatches:
    """One rank's shares of the steps of an epoch: `batches[step]` reads one. A map-style dataset of steps.

    store: as the plan's sizes were taken from. Picklable, for loaders with workers of either start method.
    """

    def __init__(
        self,
        store: "Store",
        plan: Plan,
        *,
        epoch: int = 0,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
    ) -> None:
        if not 0 <= rank < world:
            raise UsageError(f"rank {rank} of {world} ranks")
        if len(store) != len(plan.atoms):
            raise UsageError(f"the store has {len(store)} crystals, the plan was made for {len(plan.atoms)}")
        self.store, self.plan, self.rank, self.world = store, plan, rank, world
        self.epoch = plan.epoch(epoch)
        if not 0 <= start_step <= len(self.epoch):
            raise UsageError(f"start step is {start_step}, epoch {epoch} has {len(self.epoch)} steps")
        self.start_step = start_step

    def __len__(self) -> int:
        """Steps of the epoch, those before start_step too; the same on every rank."""
        return len(self.epoch)

    def __getitem__(self, step: int) -> Share:
        batch = self.epoch[step]
        atoms = self.plan.atoms[batch]
        mine = share(batch, atoms, self.rank, self.world)
        weight = len(mine) / len(batch)
        if not len(mine):
            mine = batch[[atoms.argmin()]]
        return Share(step, self.store.rows(mine), weight, len(batch), mine)

    def __iter__(self) -> Iterator[Share]:
        return (self[step] for step in self.steps)

    @property
    def steps(self) -> range:
        """The steps still to do, in order: the sampler of this dataset."""
        return range(self.start_step, len(self))


def loader(batches: StoreBatches, *, workers: int = 0, start: str | None = None) -> "DataLoader[Any]":
    """A DataLoader over the steps still to do; start: fork, spawn or forkserver, None the system's.

    Draws nothing from torch's global generator, so that loading does not change what a resumed run computes.
    """
    import torch
    from torch.utils.data import DataLoader

    return DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        sampler=batches.steps,
        num_workers=workers,
        multiprocessing_context=start if workers else None,
        worker_init_fn=_live_and_die_with_the_rank,
        generator=torch.Generator(),
    )


def _live_and_die_with_the_rank(worker: int) -> None:
    """A worker that dies of the scheduler's signal would take its rank down before the rank could save.

    One that outlives its rank keeps the job's step alive: torch looks for that after seconds, the kernel at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
