"""The crystals a run learns from, and the order in which it sees them."""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass

from hpcgen.errors import InputError
from hpcgen.store.batches import Plan, Share, StoreBatches, loader
from hpcgen.store.read import Store
from hpcgen.train.config import TrainConfig


@dataclass(frozen=True)
class Data:
    """Training and validation crystals of a store."""

    store: Store
    plan: Plan
    validation: StoreBatches | None  # this rank's shares of the batches of every validation
    sha256: str  # of the training crystals


@dataclass(frozen=True)
class Group:
    """What one rank does in one step: shares of `accumulate` global batches, fewer at the end of an epoch."""

    shares: list[Share]
    crystals: int  # of all ranks
    epoch: int  # where the data stand after it
    offset: int


def open_data(config: TrainConfig, rank: int, world: int) -> Data:
    """Open the store of a config. Raises InputError for what is not there, UsageError for limits too small."""
    store, plan = _split(config, config.split)
    told = "".join(shard.sha256 for shard in store.shards)
    validation = None
    if config.validate_every:
        try:
            other, other_plan = _split(config, config.validation_split)
        except InputError as fault:
            raise InputError(f"{fault}; another one is validation_split=…, none is validate_every=0") from fault
        validation = StoreBatches(other, other_plan, rank=rank, world=world)
    return Data(store, plan, validation, hashlib.sha256(told.encode()).hexdigest())


def _split(config: TrainConfig, split: str) -> tuple[Store, Plan]:
    store = Store(config.store, split, columns=config.conditions)
    for name, spec in store.columns.items():
        if spec.kind == "str":
            raise InputError(f"{config.store}: column {name!r} holds text; a condition is a number")
    return store, Plan(store.sizes().atoms, config.batch.limits(), seed=config.seed)


def groups(data: Data, config: TrainConfig, rank: int, world: int, epoch: int, offset: int) -> Generator[Group]:
    """What this rank does step by step, from a place in the data on, without end."""
    while True:
        batches = StoreBatches(data.store, data.plan, epoch=epoch, rank=rank, world=world, start_step=offset)
        shares = iter(loader(batches, workers=config.workers))
        while offset < len(batches):
            mine = [next(shares) for _ in range(min(config.accumulate, len(batches) - offset))]
            offset += len(mine)
            after = (epoch, offset) if offset < len(batches) else (epoch + 1, 0)
            yield Group(mine, sum(share.crystals for share in mine), *after)
        epoch, offset = epoch + 1, 0
