"""The end of a campaign: its manifest, and what became of every crystal asked for, counted over the block files."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcgen.campaign.blocks import METRICS, head_of, leftovers, rejected_of
from hpcgen.campaign.config import SUMMARY, CampaignConfig
from hpcgen.errors import InputError
from hpcgen.files import append_json_line, read_json_lines, write_json
from hpcgen.runner.blocks import Block
from hpcgen.runner.events import EVENTS
from hpcgen.runner.lease import Lease
from hpcgen.runner.owners import read_record
from hpcgen.store.layout import ShardInfo, read_manifest, shard_info, write_manifest


@dataclass(frozen=True)
class Summary:
    """asked = written + the sum of rejected, over all launches; what is of this launch alone stands behind it."""

    out: str
    task: str
    asked: int
    written: int
    rejected: dict[str, int]  # by reason
    atoms: int
    bytes: int
    sampled: int  # in this launch, by all ranks
    seconds: float  # of this launch, from its start
    crystals_per_s: float
    outside: float | None  # share of all workers' time, from start to end, not spent in the model; None: nothing to do

    def render(self) -> str:
        """For people."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.items()) or "none"
        rows = [
            ("asked for", f"{self.asked:,}"),
            ("written", f"{self.written:,}"),
            ("rejected", reasons),
            ("this time", "nothing was missing" if not self.sampled else self._speed()),
            ("where", f"{self.out} (a store: hpcgen store info {self.out})"),
            ("look at them", f"hpcgen export {self.out} --format cif --top 10 --out cifs"),
        ]
        return "\n".join(f"{name:14}{value}" for name, value in rows)

    def _speed(self) -> str:
        outside = f", {self.outside:.1%} of the time outside the model" if self.outside is not None else ""
        return f"{self.sampled:,} in {self.seconds:.1f} s, {self.crystals_per_s:.3g} crystals/s{outside}"


def finish(
    run: Path, config: CampaignConfig, blocks: Sequence[Block], lease: Lease, began: float, workers: int
) -> Summary:
    """Write manifest and summary of a campaign whose blocks are all in place. Raises InputError for a damaged one.

    began: of this launch (time.monotonic); workers: how many sampled in it. Whole files at every moment: the
    manifest of a smaller n holds until that of the larger one takes its place, and only then do the blocks go that it
    alone knew.
    """
    shards = [shard_info(block.path) for block in blocks]
    rejected = sum((rejected_of(block.path) for block in blocks), Counter[str]())
    written = sum(shard.crystals for shard in shards)
    if written + rejected.total() != config.asked:
        raise InputError(
            f"{run}: {written} crystals and {rejected.total()} rejected ones are not {config.asked} in all"
        )
    lease.check()
    if _listed(run) != shards:
        write_manifest(run, head_of(config), shards, token=lease.token)
    for path in leftovers(run, blocks):
        path.unlink(missing_ok=True)
    lines = {line["block"]: line for line in read_json_lines(run / METRICS) if line.get("token") == lease.team.token}
    sampled, inside = (sum(line[key] for line in lines.values()) for key in ("sampled", "sampling_s"))
    seconds = time.monotonic() - began
    summary = Summary(
        out=config.out,
        task=config.task,
        asked=config.asked,
        written=written,
        rejected=dict(sorted(rejected.items())),
        atoms=sum(shard.atoms for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        sampled=sampled,
        seconds=round(seconds, 3),
        crystals_per_s=round(sampled / seconds, 3),
        outside=round(1 - inside / (workers * seconds), 5) if sampled else None,
    )
    if sampled == 0 and is_finished(run, config, blocks):
        return summary  # what is there tells of the launch that made them
    write_json(run / SUMMARY, asdict(summary), token=lease.token)
    append_json_line(run / EVENTS, event="done", **asdict(summary))
    return summary


def is_finished(run: Path, config: CampaignConfig, blocks: Sequence[Block]) -> bool:
    """Whether manifest and summary are there and speak of these blocks."""
    told = read_record(run / SUMMARY) or {}
    return told.get("asked") == config.n and [shard.name for shard in _listed(run)] == [b.path.name for b in blocks]


def _listed(run: Path) -> list[ShardInfo]:
    """The shards of the manifest that is there, if one is."""
    try:
        return list(read_manifest(run).shards)
    except InputError:
        return []
