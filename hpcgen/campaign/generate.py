"""A campaign from its settings to its summary: resolve, refuse, do the blocks that are missing, count what is there."""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcgen.campaign.blocks import MakeBlock, blocks_of
from hpcgen.campaign.config import (
    BLOCK,
    CONFIG,
    MANY,
    PACKAGED,
    PAIRS,
    PRELOAD,
    TILE,
    CampaignConfig,
    read_config,
    refuse_changes,
)
from hpcgen.campaign.sampling import load_once
from hpcgen.campaign.summary import Summary, finish, is_finished
from hpcgen.campaign.targets import Targets, targets_of
from hpcgen.campaign.tuning import tried
from hpcgen.config import to_yaml
from hpcgen.crystal.composition import SYMBOLS
from hpcgen.errors import InputError, UsageError
from hpcgen.files import append_json_line, write_whole
from hpcgen.models.load import sampling_device
from hpcgen.runner.blocks import How, once, run_blocks
from hpcgen.runner.cores import slurm_cores, usable_cores
from hpcgen.runner.events import EVENTS
from hpcgen.runner.lease import HOUSEKEEPING, Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import Team, find_team

log = logging.getLogger(__name__)


def campaign(config: CampaignConfig) -> Summary | None:
    """Make the crystals of a campaign that are missing from its run folder, together with the others of the launch.

    The summary, on the member that speaks for the launch. Raises UsageError, InputError, SiteError, StorageError;
    StoppedEarly after a signal, TooManyFailed if blocks could not be made: the same command goes on.
    """
    started = time.monotonic()
    config.checked()
    with find_team() as team, StopFlag() as stop:
        targets = targets_of(config)
        config, facts = _resolved(config, targets, log.warning if team.rank == 0 else log.debug)
        run = Path(config.out)
        _refuse_other(run, config)
        with Lease.take(run, team) as lease:
            config = _settle(run, config, targets, lease, stop)
            blocks = blocks_of(run, config.asked, config.block)
            if team.rank == 0:
                _tell_plan(config, facts, targets, team, len(blocks))
            work = MakeBlock(config, targets, team.rank, team.token, overlapped=config.device == "cuda")
            how = How(_workers(config, team), PRELOAD, item_timeout_s=None, label="crystals")
            run_blocks(blocks, work, lease=lease, stop=stop, how=how).refuse_failed(run, len(blocks))
            if team.rank and (not lease.leads() or is_finished(run, config, blocks)):
                return None  # rank 0 does it, or has done it, unless it was lost
            return finish(run, config, blocks, lease, started, _all_workers(config, team))


def _resolved(
    config: CampaignConfig, targets: Targets | None, warn: Callable[..., None]
) -> tuple[CampaignConfig, dict[str, Any]]:
    """The config with everything filled in but the size of a block, and what the checkpoint says of itself."""
    checkpoint, device = Path(config.checkpoint).resolve(), sampling_device(config.device)
    if checkpoint == PACKAGED and not checkpoint.exists():
        raise InputError(f"{checkpoint}: this hpcgen comes without a trained model; want --checkpoint FILE")
    model, facts, sha256 = load_once(checkpoint, device)
    _check_model(config, targets, model, warn)
    n = config.n
    if targets is not None and config.formulas:
        n = len(targets) * config.per_formula
        if config.n not in (None, n):
            raise UsageError(
                f"--n {config.n}: {len(targets)} formulas, {config.per_formula} of each, are {n} crystals; leave it out"
            )
    kind = device.type
    later = config.tune or (Path(config.out) / CONFIG).exists()  # measured, or those of the folder
    resolved = dataclasses.replace(
        config,
        n=n,
        elements="-".join(SYMBOLS[number] for number in config.system()),
        checkpoint=str(checkpoint),
        formulas=str(Path(config.formulas).resolve()) if config.formulas else "",
        checkpoint_sha256=sha256,
        targets_sha256=targets.sha256 if targets is not None else "",
        device=kind,
        tile=config.tile or (0 if later else TILE[kind]),
        pairs=config.pairs or (0 if later else PAIRS[kind]),
        torch=torch.__version__,
    ).checked()
    return resolved, facts


def _check_model(config: CampaignConfig, targets: Targets | None, model: Any, warn: Callable[..., None]) -> None:
    """Warn of what the model was not trained for. Raises UsageError for what it was not made for."""
    known = list(getattr(model.config, "conditions", []))
    for name, value in config.conditions.items():
        if name not in known:
            raise UsageError(
                f"condition {name!r}: the model of {config.checkpoint} knows {', '.join(known) or 'no conditions'}"
            )
        _, _, least, most = model.condition_range[known.index(name)].tolist()
        if not least <= value <= most:
            warn("condition %s = %g: training crystals had %g to %g; expect little", name, value, least, most)
    trained = np.flatnonzero(model.size_counts.numpy(force=True))
    largest = int(trained[-1]) if len(trained) else 0
    sizes = config.sizes() or (0, 0)
    if targets is None and not largest and not config.num_atoms:
        raise InputError(f"{config.checkpoint}: knows no number of atoms of training crystals: want --num-atoms")
    if sizes[1] > largest or (targets is not None and np.diff(targets.ptr).max() > largest):
        asked = sizes[1] if targets is None else int(np.diff(targets.ptr).max())
        warn("up to %d atoms asked for, the largest training crystal had %d; expect little", asked, largest)


def _refuse_other(run: Path, config: CampaignConfig) -> None:
    """Raise UsageError if the folder holds a campaign that would make other crystals, or something else."""
    if not run.exists():
        return
    if not run.is_dir():
        raise UsageError(f"{run}: is a file, want a folder for the run")
    foreign = sorted(
        e.name for e in run.iterdir() if e.name not in HOUSEKEEPING and not e.name.startswith(f"{CONFIG}.")
    )
    if (run / CONFIG).exists():  # looked for after the others: another rank may begin at this very moment
        old = read_config(run)
        refuse_changes(old, config)
        if old.torch != config.torch:
            log.warning("%s: was begun with torch %s, this is %s: last bits may differ", run, old.torch, config.torch)
        return
    if foreign:
        raise UsageError(f"{run}: holds {foreign[0]!r} and no campaign; want a new or empty folder with --out")


def _settle(run: Path, config: CampaignConfig, targets: Targets | None, lease: Lease, stop: StopFlag) -> CampaignConfig:
    """Agree with the others, and with earlier launches, on what is measured; put the config into the folder."""

    def begin(draft: Path) -> None:
        fresh = _measured(run, config, targets, lease.team, stop) if config.tune else config
        fresh = dataclasses.replace(fresh, block=fresh.block or _block_size(fresh, lease.team))
        draft.write_text(to_yaml(fresh), encoding="utf-8")

    once(run / CONFIG, begin, lease=lease, stop=stop)
    old = read_config(run)
    refuse_changes(old, config)  # two launches may have begun at the same moment
    settled = dataclasses.replace(config, block=old.block, tile=old.tile, pairs=old.pairs)
    if lease.is_taker and settled.n != old.n:
        append_json_line(run / EVENTS, event="grown", before=old.n, n=settled.n)
        write_whole(run / CONFIG, to_yaml(settled), token=lease.token)
    return settled


def _measured(run: Path, config: CampaignConfig, targets: Targets | None, team: Team, stop: StopFlag) -> CampaignConfig:
    """With the fastest tile and pairs. What others gave is in the events of the folder."""
    trials = tried(config, targets, _all_workers(config, team), stop.check)
    if not any(trial.crystals_per_s for trial in trials):
        raise UsageError("--tune: no tile could be measured; want --tile and --pairs")
    append_json_line(run / EVENTS, event="tuned", trials=[dataclasses.asdict(trial) for trial in trials])
    best = max(trials, key=lambda trial: trial.crystals_per_s)
    return dataclasses.replace(config, tile=best.tile, pairs=best.pairs)


def _workers(config: CampaignConfig, team: Team) -> int:
    """Worker processes of this rank; 0 on a GPU, which the rank itself holds."""
    if config.processes is not None:
        return config.processes
    if config.device == "cuda":
        return 0
    return usable_cores() if team.kind == "alone" else min(slurm_cores() or 1, usable_cores())


def _all_workers(config: CampaignConfig, team: Team) -> int:
    """Processes that sample, of all ranks."""
    return team.size * max(_workers(config, team), 1)


def _block_size(config: CampaignConfig, team: Team) -> int:
    """Whole tiles: 16 blocks for each worker, so that all end at about the same time; fewer if that is many files."""
    workers = _all_workers(config, team)
    blocks = workers * max(1, min(16, MANY // workers))
    tiles = -(-config.asked // (blocks * config.tile))
    return config.tile * max(1, min(tiles, BLOCK // config.tile))


def _tell_plan(
    config: CampaignConfig, facts: dict[str, Any], targets: Targets | None, team: Team, blocks: int
) -> None:  # fmt: skip
    log.info(
        "%s: %s %s crystals%s with %s (%s, sha256 %s), seed %d",
        config.out, config.task, f"{config.asked:,}", _told_of(config, targets), config.checkpoint, facts["model"],
        config.checkpoint_sha256[:12], config.seed,
    )  # fmt: skip
    log.info(
        "%d steps, churn %g, speed %g, guidance %g, %s on %s; blocks: %d of up to %d crystals, in tiles of %d that are "
        "always sampled whole; ranks: %d, worker processes of each: %d",
        config.steps, config.churn, config.speed, config.guidance, config.precision, config.device, blocks,
        config.block, config.tile, team.size, _workers(config, team),
    )  # fmt: skip
    gpus = torch.cuda.device_count() if config.device == "cuda" else 0
    if gpus > 1 and team.size == 1:
        log.info("%d GPUs are visible and one is used: start a rank for each, as `mpiexec -n %d hpcgen …`", gpus, gpus)


def _told_of(config: CampaignConfig, targets: Targets | None) -> str:
    told = [f"of {config.formula}"] if config.formula else []
    if targets is not None and config.formulas:
        told = [f"of {len(targets):,} formulas, {config.per_formula} of each"]
    told += [f"in {config.elements}"] if config.elements else []
    told += [f"of {config.num_atoms} atoms"] if config.num_atoms else []
    told += [f"{name} = {value:g}" for name, value in config.conditions.items()]
    return "".join(f", {part}" for part in told)
