"""The training loop, for every model: to be read from top to bottom."""

import copy
import inspect
import logging
import math
import os
import time
import uuid
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcgen.config import to_yaml
from hpcgen.diffusion.draw import Draw
from hpcgen.errors import Diverged, SiteError, StoppedEarly, StorageError, UsageError
from hpcgen.files import append_json_line, reason, write_whole
from hpcgen.launch.place import find_place
from hpcgen.models.batch import Batch
from hpcgen.models.load import is_out_of_memory
from hpcgen.runner.events import EVENTS, launch_facts, note_start
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import Team, env_number
from hpcgen.store.batches import Share, StoreBatches
from hpcgen.store.layout import sha256_of
from hpcgen.train.clock import Clock
from hpcgen.train.config import TrainConfig
from hpcgen.train.data import Data, Group, groups, open_data
from hpcgen.train.dist import Ranks, find_device, join
from hpcgen.train.journal import Journal
from hpcgen.train.muon import optimiser_for
from hpcgen.train.saving import Saver
from hpcgen.train.state import (
    Progress,
    State,
    average,
    begin_with,
    read_checkpoint,
    refuse_changes,
    same_shapes,
)

log = logging.getLogger(__name__)
_VALIDATION = 2**63  # added to the seed: noise that no training step meets
_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(config: TrainConfig, model_class: Any = None) -> Progress:
    """Train as `config` says, from the newest checkpoint of its run folder on, or from the beginning.

    model_class: where it is not in the registry. Of several ranks none returns: see Ranks. Raises UsageError,
    SiteError, InputError, StorageError, Diverged; StoppedEarly after a signal or the time limit, all saved.
    """
    started = time.monotonic()
    config.checked()
    if config.threads:
        torch.set_num_threads(config.threads)
    place = find_place(os.environ)
    device = find_device(config.device, place)
    with join(place, device, config.timeout_s) as ranks, StopFlag() as stop, ExitStack() as held:
        if model_class is None:
            from hpcgen.models.registry import model_named

            model_class = model_named(config.model)
        if config.rectify and not getattr(model_class, "RECTIFIES", False):
            raise UsageError(f"rectify = true: the model {config.model!r} is not made for it")
        data = open_data(config, ranks.rank, ranks.world)
        torch.manual_seed(config.seed)
        state = _fresh(config, model_class, data, device)
        shared = _shared(config, state.model, ranks)
        _settle_buckets(config, shared, state, data, ranks)
        saver, lease = _own(config, data, ranks, held)
        _resume(config, state, data, saver, ranks)
        journal = held.enter_context(Journal(saver, config, state.progress))
        if lease is not None:
            lease.report = lambda: {"step": state.progress.step, "steps": config.steps}
        try:
            _run(config, ranks, data, state, shared, stop, saver, journal, started)
        except BaseException as fault:
            _log_end(saver, state.progress, fault)
            if (cause := ranks.cause(fault)) is not fault:
                raise cause from fault
            raise
        _log_end(saver, state.progress, None)
        return state.progress


def _run(
    config: TrainConfig, ranks: Ranks, data: Data, state: State, shared: nn.Module, stop: StopFlag,
    saver: Saver | None, journal: Journal, started: float,
) -> None:  # fmt: skip
    """Steps, validations and checkpoints until all steps are done or a stop is asked for."""
    draw, progress = Draw(config.seed), state.progress
    clock = Clock(config.time_limit_s, started, os.environ)
    stopping = ranks.sum(_numbers([bool(stop)], ranks))[0] > 0
    with closing(groups(data, config, ranks.rank, ranks.world, progress.epoch, progress.offset)) as feed:
        while True:
            if stopping:
                ranks.at("saving", progress.step)
                if saver is not None:
                    saver.save(state)
                reason = stop.reason or "another rank was asked to"
                raise StoppedEarly(
                    f"stopped early ({reason}) at step {progress.step}; the same command goes on from here"
                )
            if _validation_due(config, progress):
                ranks.at("validating", progress.step)
                with clock.timing("validation"):
                    _note_validation(validate(config, ranks, data, state.ema), state, saver, journal)
            ranks.at("saving", progress.step)
            if saver is not None and saver.due(progress.step):
                with clock.timing("saving"):
                    saver.save(state)
            if progress.step >= config.steps:
                return

            ranks.at("reading", progress.step)
            group = next(feed)
            ranks.at("computing", progress.step)
            lr = learning_rate(config, progress.step)
            losses = backward(config, ranks, group, progress.step, state, shared, draw)
            state.scaler.unscale_(state.optimiser)
            norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip or math.inf)
            if ranks.rank == 0 and (why := clock.reason()):
                stop.set(why)
            flags = _numbers([bool(stop)], ranks)
            bad = ~(norm.isfinite() & losses["loss"].isfinite())
            told = ranks.sum(torch.stack([bad.double(), flags[0], *(value.double() for value in losses.values())]))
            was_bad, stopping = told[0] > 0, told[1] > 0
            if not was_bad:
                for parameters in state.optimiser.param_groups:
                    parameters["lr"] = lr
                state.scaler.step(state.optimiser)
                average(state.ema, state.model, min(config.ema, (1 + progress.step) / (10 + progress.step)))
            state.scaler.update()
            state.optimiser.zero_grad(set_to_none=True)

            _advance(progress, group, was_bad)
            _note_step(config, progress, journal, dict(zip(losses, told[2:], strict=True)), norm, lr, was_bad)
            if progress.bad_in_row >= config.bad_steps:
                raise Diverged(
                    f"{config.out}: {config.bad_steps} steps in a row, up to step {progress.step}, had a loss or "
                    f"gradient that is not finite; want a lower lr (it is {config.lr:g}), more warmup, or float32 "
                    "or bf16"
                )


def backward(
    config: TrainConfig, ranks: Ranks, group: Group, step: int, state: State, shared: nn.Module, draw: Draw
) -> dict[str, Tensor]:
    """Gradients of the mean over all crystals of a group, on every rank. -> this rank's part of the mean losses."""
    losses: dict[str, Tensor] = {}
    for number, share in enumerate(group.shares):
        part = share.weight * share.crystals / group.crystals
        last = number == len(group.shares) - 1
        alone = nullcontext() if last or not isinstance(shared, DistributedDataParallel) else shared.no_sync()
        with alone:
            batch = _batch(config, share, step, ranks, group.made_with)
            try:
                with _autocast(config, ranks):
                    told = shared(batch, draw)
                if last:
                    ranks.at("summing", step)  # DDP does so as the gradients come
                state.scaler.scale(told["loss"] * (part * ranks.world)).backward()  # DDP divides the sum by world
            except Exception as fault:
                if _no_compiler(fault):
                    raise SiteError(
                        f"compile = true: torch finds no compiler here ({reason(fault)}); want a C++ "
                        "compiler on the PATH, or compile=false"
                    ) from fault
                if not is_out_of_memory(fault):
                    raise
                raise SiteError(
                    f"out of memory with {len(batch)} crystals of up to {int(batch.crystals.num_atoms.max())} "
                    "atoms: lower batch.padded_atoms or batch.crystals, and raise accumulate to make up for it"
                ) from fault
        for name, value in told.items():
            losses[name] = losses.get(name, 0.0) + part * value.detach()
    return losses


def _no_compiler(fault: Exception) -> bool:
    told = ("InvalidCxxCompiler", "Failed to find C compiler", "Cannot find a working triton installation")
    return isinstance(fault, RuntimeError) and any(text in str(fault) for text in told)


@torch.no_grad()
def validate(config: TrainConfig, ranks: Ranks, data: Data, ema: nn.Module) -> dict[str, float]:
    """Mean losses of averaged weights over the validation crystals, with the same noise every time."""
    assert data.validation is not None
    draw, batches = Draw(config.seed + _VALIDATION), data.validation
    totals: dict[str, Tensor] = {}
    crystals = 0
    for number in range(min(len(batches), config.validate_batches or len(batches))):
        share = batches[number]
        crystals += share.crystals
        with _autocast(config, ranks):
            told = ema(_batch(config, share, 0, ranks, data.made_with), draw)
        for name, value in told.items():
            totals[name] = totals.get(name, 0.0) + value.double() * (share.weight * share.crystals)
    sums = ranks.sum(torch.stack(list(totals.values())))
    return {name: total / crystals for name, total in zip(totals, sums, strict=True)}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of the step after `step` steps: a rise to lr, then a cosine down to lr_floor · lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


# ---- before the first step -------------------------------------------------------------------------------------------


def _fresh(config: TrainConfig, model_class: Any, data: Data, device: torch.device) -> State:
    # the crystals that a model made have none of its conditions: what it took from its own store comes with config.init
    new = model_class(config.settings) if config.rectify else model_class.fitted(config.settings, data.store)
    model = new.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    if config.compile:
        model.compile()
    optimiser = optimiser_for(
        model, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, muon=config.muon
    )
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    return State(model, ema, optimiser, scaler, Progress())


def _shared(config: TrainConfig, model: nn.Module, ranks: Ranks) -> nn.Module:
    if ranks.world == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel.__init__).parameters  # torch 2.13 gave it another name
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    how: dict[str, Any] = {"device_ids": devices, "bucket_cap_mb": config.bucket_cap_mb, sync: False}
    return DistributedDataParallel(model, **how)


def _settle_buckets(config: TrainConfig, shared: nn.Module, state: State, data: Data, ranks: Ranks) -> None:
    """Two passes whose gradients are dropped, always over the first batch of the first epoch.

    DDP sorts its buckets anew before its second pass, and the sums of a ring depend on the place in a bucket: without
    this the first step after a resume would differ in its last bits from the same step of a run that was not stopped.
    """
    if ranks.world == 1:
        return
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    share = StoreBatches(data.store, data.plan, rank=ranks.rank, world=ranks.world)[0]
    for _ in range(2):
        with _autocast(config, ranks):
            loss = shared(_batch(config, share, 0, ranks, data.made_with), Draw(config.seed))["loss"]
        loss.backward()
    state.optimiser.zero_grad(set_to_none=True)
    state.model.load_state_dict(before)


def _own(config: TrainConfig, data: Data, ranks: Ranks, held: ExitStack) -> tuple[Saver | None, Lease | None]:
    """Take the run folder, on rank 0: the others write nothing."""
    lease: list[Lease] = []

    def take() -> None:
        job, restart = os.environ.get("SLURM_JOB_ID", ""), env_number(os.environ, "SLURM_RESTART_COUNT", 0)
        team = Team(ranks.place.kind, 0, ranks.world, uuid.uuid4().hex[:12], job, restart)
        run = Path(config.out)
        lease.append(held.enter_context(Lease.take(run, team, sweep=(run, run / "checkpoints"))))

    ranks.from_first(take)
    if not lease:
        return None, None
    ranks.note = lease[0].note_error
    facts = {**launch_facts(lease[0].team), "data": data.sha256, "store": config.store}
    return Saver(Path(config.out), config, facts, lease[0].check), lease[0]


def _resume(config: TrainConfig, state: State, data: Data, saver: Saver | None, ranks: Ranks) -> None:
    """Load the newest checkpoint that is whole, the same on all ranks, if there is one."""
    found: dict[str, Any] = {}

    def choose() -> dict[str, Any] | None:
        assert saver is not None
        newest = saver.checkpoints.newest()
        told: dict[str, Any] = {"resumed": None}
        if newest is not None:
            path, content = newest
            accepted = refuse_changes(path, content, config, data.sha256)
            same_shapes(path, content["model"], state.model)
            found.update(content)
            saver.saved_step = content["progress"]["step"]
            told = {"resumed": str(path), "sha256": sha256_of(path), "accepted": accepted}
            log.info("%s: going on from step %d of %d", path, saver.saved_step, config.steps)
        elif saver.checkpoints.listed():
            log.warning("%s: no checkpoint there can be used, starting from the beginning", saver.checkpoints.folder)
        write_whole(saver.run / "config.yaml", to_yaml(config))
        note_start(saver.run, saver.facts, device=str(ranks.device), **told)
        return told if newest is not None else None

    told = ranks.from_first(choose)
    if told is not None:
        state.load(found or read_checkpoint(Path(told["resumed"]), told["sha256"]))
    elif config.init:
        begin_with(Path(config.init), config, state, str(data.store.head.settings.get("checkpoint_sha256", "")))


# ---- within a step ---------------------------------------------------------------------------------------------------


def _batch(config: TrainConfig, share: Share, step: int, ranks: Ranks, made_with: Draw | None) -> Batch:
    conditions = () if config.rectify else config.conditions
    return Batch.of(share.rows, torch.from_numpy(share.index), step, conditions, ranks.device, made_with)


def _autocast(config: TrainConfig, ranks: Ranks) -> torch.autocast:
    dtype = _DTYPES[config.precision]
    return torch.autocast(ranks.device.type, dtype if dtype != torch.float32 else None, dtype != torch.float32)


def _numbers(values: list[Any], ranks: Ranks) -> Tensor:
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device=ranks.device)


def _advance(progress: Progress, group: Group, was_bad: bool) -> None:
    progress.step += 1
    progress.epoch, progress.offset = group.epoch, group.offset
    progress.crystals += group.crystals
    progress.bad += was_bad
    progress.bad_in_row = progress.bad_in_row + 1 if was_bad else 0


def _note_step(
    config: TrainConfig, progress: Progress, journal: Journal, losses: dict[str, float], norm: Tensor, lr: float,
    was_bad: bool,
) -> None:  # fmt: skip
    """Add a step to what is averaged, and write the average at the end of a span."""
    if was_bad:
        log.warning("step %d left out: a loss or gradient was not finite (%d so far)", progress.step, progress.bad)
    else:
        for name, value in {**losses, "gradient": float(norm), "good_steps": 1.0}.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
    journal.show(progress, losses["loss"])
    if progress.step % config.log_every == 0 or progress.step == config.steps:
        good = progress.sums.pop("good_steps", 0.0)
        means = {name: total / good for name, total in progress.sums.items()}
        place = {"lr": lr, "epoch": progress.epoch, "crystals": progress.crystals, "bad": progress.bad}
        journal.write("train", progress.step, {**means, **place, "crystals_per_s": journal.rate(progress)})
        progress.sums.clear()


def _validation_due(config: TrainConfig, progress: Progress) -> bool:
    if not config.validate_every or progress.validated >= progress.step:
        return False
    return progress.step % config.validate_every == 0 or progress.step >= config.steps


def _note_validation(losses: dict[str, float], state: State, saver: Saver | None, journal: Journal) -> None:
    progress = state.progress
    progress.validated = progress.step
    journal.write("validation", progress.step, losses)
    if losses["loss"] < progress.best:
        progress.best, progress.best_step = losses["loss"], progress.step
        if saver is not None:
            saver.save_best(state)


def _log_end(saver: Saver | None, progress: Progress, fault: BaseException | None) -> None:
    """The last line of events.jsonl, but for errors, which the lease notes; a full disk has said so already."""
    if saver is None or not (fault is None or isinstance(fault, StoppedEarly | KeyboardInterrupt)):
        return
    if fault is None:
        best = f", best validation loss {progress.best:.5g} at step {progress.best_step}" if progress.best_step else ""
        log.info("%s: %d steps done, %d crystals seen%s", saver.run, progress.step, progress.crystals, best)
    reason = "" if fault is None else str(fault) or "stopped early (SIGINT)"
    told = {"event": "done" if fault is None else "stop", "step": progress.step, "reason": reason}
    try:
        append_json_line(saver.run / EVENTS, **told)
    except StorageError:
        log.debug("events.jsonl could not be written")
