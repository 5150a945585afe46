"""The crystals a run learns from, and the order in which it sees them."""

import hashlib
from collections.abc import Generator
from dataclasses import dataclass

from hpcgen.diffusion.draw import Draw
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
    made_with: Draw | None = None  # the chance of the campaign that the store is of, for rectify


@dataclass(frozen=True)
class Group:
    """What one rank does in one step: shares of `accumulate` global batches, fewer at the end of an epoch."""

    shares: list[Share]
    crystals: int  # of all ranks
    epoch: int  # where the data stand after it
    offset: int
    made_with: Draw | None = None  # as of the Data


def open_data(config: TrainConfig, rank: int, world: int) -> Data:
    """Open the store of a config. Raises InputError for what is not there, UsageError for limits too small."""
    made_with = _made_with(Store(config.store)) if config.rectify else None
    store, plan = _split(config, config.split)
    told = "".join(shard.sha256 for shard in store.shards)
    validation = None
    if config.validate_every:
        try:
            other, other_plan = _split(config, config.validation_split)
        except InputError as fault:
            raise InputError(f"{fault}; another one is validation_split=…, none is validate_every=0") from fault
        validation = StoreBatches(other, other_plan, rank=rank, world=world)
    return Data(store, plan, validation, hashlib.sha256(told.encode()).hexdigest(), made_with)


def _split(config: TrainConfig, split: str) -> tuple[Store, Plan]:
    store = Store(config.store, split, columns=["index"] if config.rectify else config.conditions)
    for name, spec in store.columns.items():
        if spec.kind == "str":
            raise InputError(f"{config.store}: column {name!r} holds text; a condition is a number")
    return store, Plan(store.sizes().atoms, config.batch.limits(), seed=config.seed)


def _made_with(store: Store) -> Draw:
    """Raises InputError where noise alone did not decide the crystals of a store."""
    made = store.head.settings
    if store.head.source != "campaign" or "seed" not in made:
        raise InputError(f"{store.path}: rectify = true: a store of {store.head.source!r}, want a campaign's")
    if made.get("churn", 0.0) != 0.0:
        raise InputError(f"{store.path}: rectify = true: made with churn = {made['churn']}, want --churn 0")
    for name, plain in (("conditions", {}), ("elements", ""), ("guidance", 1.0)):
        if made.get(name, plain) != plain:
            raise InputError(f"{store.path}: rectify = true: made with {name} = {made[name]}, want it left out")
    return Draw(int(made["seed"]))


def groups(data: Data, config: TrainConfig, rank: int, world: int, epoch: int, offset: int) -> Generator[Group]:
    """What this rank does step by step, from a place in the data on, without end."""
    while True:
        batches = StoreBatches(data.store, data.plan, epoch=epoch, rank=rank, world=world, start_step=offset)
        shares = iter(loader(batches, workers=config.workers))
        while offset < len(batches):
            mine = [next(shares) for _ in range(min(config.accumulate, len(batches) - offset))]
            offset += len(mine)
            after = (epoch, offset) if offset < len(batches) else (epoch + 1, 0)
            yield Group(mine, sum(share.crystals for share in mine), *after, data.made_with)
        epoch, offset = epoch + 1, 0
