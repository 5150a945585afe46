"""How many crystals are best sampled together on this machine: measured before a campaign begins, kept as its settings.

Tile and pairs, no more: a worker on a CPU has one thread, as last bits depend on their number, and each core a worker.
"""

import dataclasses
import logging
import time
from collections.abc import Callable

import numpy as np

from hpcgen.campaign.config import PAIRS, TILE, CampaignConfig
from hpcgen.campaign.pieces import Sampled, pieces
from hpcgen.campaign.sampling import Sampler
from hpcgen.campaign.targets import Targets

log = logging.getLogger(__name__)
SCALES = (0.25, 0.5, 1, 2, 4)  # of what the device has by default
STEPS = 2  # of a trial


@dataclasses.dataclass(frozen=True)
class Trial:
    """One tile sampled for a few steps."""

    tile: int
    pairs: int
    crystals_per_s: float  # of one worker, at the steps of the campaign; 0 where the memory does not hold a piece


def tried(config: CampaignConfig, targets: Targets | None, workers: int, go_on: Callable[[], None]) -> list[Trial]:
    """Settings that may be, each measured in some seconds. config: resolved, but for a tile and pairs of 0.

    workers: of the campaign; a tile is no larger than leaves one for each, and divides the block if that is given.
    go_on is called before each step: it may raise to stop.
    """
    kind = config.device
    sizes = {(config.tile or int(TILE[kind] * scale), config.pairs or int(PAIRS[kind] * scale)) for scale in SCALES}
    least = min(tile for tile, _ in sizes)
    few = dataclasses.replace(config, tile=0, block=0, steps=STEPS)
    sampler = Sampler(few, targets)
    made = []
    for tile, pairs in sorted(sizes):
        if (tile * workers > config.asked and tile > least) or config.block % tile:
            continue
        _seconds(sampler, least, pairs, go_on)  # else the first pays for what is done once
        seconds = _seconds(sampler, tile, pairs, go_on)
        made.append(Trial(tile, pairs, round(tile * STEPS / (seconds * config.steps), 2) if seconds else 0.0))
        log.info("tile %d, %d pairs: %.1f crystals/s of one worker", tile, pairs, made[-1].crystals_per_s)
    return made


def _seconds(sampler: Sampler, tile: int, pairs: int, go_on: Callable[[], None]) -> float:
    """Of the first tile; 0 where the memory does not hold it."""
    index = np.arange(tile)
    began = time.perf_counter()
    parts = [sampler.sample(piece, go_on) for piece in pieces(index, sampler.num_atoms(index), pairs)]
    seconds = time.perf_counter() - began
    whole = Sampled.join(parts)
    return 0.0 if whole.halved.any() or (whole.reason != b"").any() else seconds
