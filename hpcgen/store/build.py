"""Building a store from a source: the path that every source shares, in three passes of blocks.

Pass 1 parses, checks and reduces blocks of rows into staging files. Pass 2 finds duplicates and deals out the split.
Pass 3 writes the shards, with edges and features. A pass goes on where it was stopped, and the result depends on the
source and the settings alone. The manifest is written last: a store is complete when it is there.
"""

import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from hpcgen.crystal.magpie import MAGPIE_COLUMNS
from hpcgen.errors import DONE, TOO_MANY_FAILED, HpcgenError, InputError, SiteError, UsageError
from hpcgen.files import make_folder, write_json
from hpcgen.runner.blocks import Block, How, once, run_blocks
from hpcgen.runner.lease import HOUSEKEEPING, Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import Team
from hpcgen.runner.worker import Cursor, Work
from hpcgen.store.keys import pairs_per_block
from hpcgen.store.layout import MANIFEST, REJECTS, ColumnSpec, EdgeSettings, Head, shard_info, write_manifest
from hpcgen.store.plan import Compared, save_pairs, save_plan, save_siblings, shards_of
from hpcgen.store.settings import BuildSettings
from hpcgen.store.source import Source
from hpcgen.store.staging import KEYS, Refusal, read_keys_of, read_refusals, staged_columns, write_rejects

_LOG = logging.getLogger(__name__)
PASSES = 3  # grows when staging files change: work begun by another version is not continued
WORK = "work"  # folder inside the store, gone when it is complete


@dataclass(frozen=True)
class Built:
    """How a build ended on this rank."""

    leader: bool  # the rank that speaks for the launch
    exit_code: int


def build(
    source: Source,
    settings: BuildSettings,
    store: Path,
    team: Team,
    *,
    processes: int | None = None,
    item_timeout_s: float = 60.0,
    max_refused: float = 0.5,
) -> Built:
    """Build the store of a source in the folder `store`, or finish what an earlier call began there.

    processes: worker processes of this rank, None for all usable cores. A structure that takes longer than
    item_timeout_s is refused. The exit code is 5 if more than the share max_refused of the rows was refused.
    Raises UsageError for a folder made with other settings or holding something else, InputError, StorageError,
    StoppedEarly, TooManyFailed if a block failed twice.
    """
    store = Path(store)
    _refuse_columns(source, settings)
    making = _making(source, settings)
    _refuse_other(store, making)
    make_folder(store)
    with StopFlag() as stop, Lease.take(store, team) as lease:
        run = _Run(store, settings, lease, stop, How(processes, settings.preload(), item_timeout_s))
        try:
            if not run.is_complete:
                _passes(run, source, making)
        except (HpcgenError, OSError):
            if not run.is_complete:  # else other ranks finished it and cleared up while this one was away
                raise
        return _ended(run, max_refused)


@dataclass(frozen=True)
class Later:
    """Work of a class of this room, imported where it is done: who only hands out blocks needs no torch."""

    module: str
    name: str
    told: tuple[Any, ...]  # to the class

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float] | None:
        try:
            module = import_module(f"hpcgen.store.{self.module}")
        except (ImportError, OSError) as fault:
            raise SiteError(f"hpcgen.store.{self.module} cannot be imported here ({fault})") from fault
        work: Work = getattr(module, self.name)(*self.told)
        return work(block, draft, cursor)


@dataclass(frozen=True)
class _Run:
    store: Path
    settings: BuildSettings
    lease: Lease
    stop: StopFlag
    how: How

    @property
    def work(self) -> Path:
        return self.store / WORK

    @property
    def is_complete(self) -> bool:
        return (self.store / MANIFEST).exists()

    def blocks(self, what: str, blocks: list[Block], work: Any, *, timed: bool = True) -> None:
        """Do all blocks. Raises TooManyFailed naming the first that failed for good, FileNotFoundError if too late."""
        self._refuse_late()
        how = replace(self.how, label=what, item_timeout_s=self.how.item_timeout_s if timed else None)
        outcome = run_blocks(blocks, work, lease=self.lease, stop=self.stop, how=how)
        outcome.refuse_failed(self.store, len(blocks), what)

    def _refuse_late(self) -> None:
        """Other ranks may have finished the store and cleared up while this one was away."""
        if self.is_complete:
            raise FileNotFoundError(f"{self.work}: cleared up, the store is complete")

    def once(self, path: Path, step: Callable[[Path], Any]) -> None:
        """Do a step on one rank, the others wait for its file. Raises FileNotFoundError if too late."""
        self._refuse_late()
        once(path, step, lease=self.lease, stop=self.stop)


def _refuse_columns(source: Source, settings: BuildSettings) -> None:
    """Raise UsageError for a column of the source that a build makes itself, or that no store may have."""
    Head(source.name, columns=source.columns)
    own = {*KEYS, *(["space_group"] if settings.purify else []), *(MAGPIE_COLUMNS if settings.magpie else [])}
    for name in source.columns:
        if name in own:
            raise UsageError(f"{source.name}: the column {name} is made by hpcgen itself; give yours another name")


def _making(source: Source, settings: BuildSettings) -> dict[str, Any]:
    """All that determines the store."""
    return {"source": source.name, "input": source.identity(), "settings": asdict(settings)}


def _refuse_other(store: Path, making: dict[str, Any]) -> None:
    """Raise UsageError if `store` holds something that this making did not begin."""
    if not store.is_dir():
        if store.exists():
            raise UsageError(f"{store}: is a file, want a folder for the store")
        return
    begun, names = store / "build.json", [entry.name for entry in store.iterdir()]
    if begun.name not in names:
        foreign = [name for name in names if not _ours(name)]
        if foreign:
            raise UsageError(f"{store}: holds {foreign[0]!r} and no unfinished store; want a new or empty folder")
        return
    try:
        there = json.loads(begun.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise InputError(f"{begun}: is no JSON ({fault}); begin the store anew in another folder") from fault
    if MANIFEST not in names and there.get("passes") != PASSES:
        raise UsageError(f"{store}: was begun by another version of hpcgen, which must finish it; or remove it")
    for part in ("source", "input", "settings"):
        if there.get(part) != json.loads(json.dumps(making[part])):
            raise UsageError(
                f"{store}: was begun with {_difference(part, there.get(part), making[part])}; choose another folder"
            )


def _ours(name: str) -> bool:
    return name in (*HOUSEKEEPING, WORK) or name.startswith("build.json.")


def _difference(part: str, there: Any, asked: Any) -> str:
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in sorted({*there, *asked}):
            if there.get(key) != json.loads(json.dumps(asked.get(key))):
                return f"{part}.{key} = {there.get(key)}, now it is {asked.get(key)}"
    return f"{part} = {there}, now it is {asked}"


def _passes(run: _Run, source: Source, making: dict[str, Any]) -> None:
    settings, work = run.settings, make_folder(run.work)
    run.once(run.store / "build.json", lambda draft: write_json(draft, {**making, "passes": PASSES}))
    columns = staged_columns(source, settings)
    staged = _parse(run, source)
    compared = _compare(run, staged, columns) if settings.duplicates != "ignore" else Compared()
    run.once(work / "plan.npz", lambda draft: save_plan(draft, staged, columns, settings, compared))
    head = Head(source.name, making, _final_columns(columns, settings), _edge_settings(settings))
    shards = shards_of(work / "plan.npz", settings)
    blocks = [Block(number, run.store / name, stop - start) for number, (name, _, start, stop) in enumerate(shards)]
    told = (tuple(staged), work / "plan.npz", columns, head, settings, tuple(shards))
    writer = Later("gather", "WriteShard", told)
    run.blocks("writing shards", blocks, writer, timed=False)
    run.once(
        run.store / MANIFEST,
        lambda draft: _finish(draft, run, staged, columns, head, [block.path for block in blocks]),
    )


def _parse(run: _Run, source: Source) -> list[Path]:
    run.once(run.work / "rows.json", lambda draft: write_json(draft, source.size()))
    rows, size = json.loads((run.work / "rows.json").read_text()), run.settings.block_rows
    if rows == 0:
        raise InputError(f"{source.name}: the input holds no rows")
    blocks = [
        Block(number, run.work / f"parsed-{number:05d}.npz", min(size, rows - start))
        for number, start in enumerate(range(0, rows, size))
    ]
    run.blocks("reading structures", blocks, Later("parse", "ParseBlock", (source, run.settings)))
    return [block.path for block in blocks]


def _compare(run: _Run, staged: Sequence[Path], columns: dict[str, ColumnSpec]) -> Compared:
    """Compare what may be equal."""
    siblings, pairs = run.work / "siblings.npz", run.work / "pairs.npy"
    run.once(siblings, lambda draft: save_siblings(draft, staged, columns))
    with np.load(siblings) as known:
        sizes = [int(part.sum()) for part in np.split(known["mask"], known["first"][1:-1])]
    blocks = [Block(number, run.work / f"reduced-{number:05d}.npz", size) for number, size in enumerate(sizes)]
    reduced = tuple(block.path for block in blocks)
    run.blocks("reducing cells", blocks, Later("duplicates", "ReduceBlock", (tuple(staged), siblings)))
    run.once(pairs, lambda draft: save_pairs(draft, staged, columns, reduced))
    count = len(np.load(pairs, mmap_mode="r"))
    size = pairs_per_block(count)
    blocks = [
        Block(number, run.work / f"matched-{number:05d}.npz", min(size, count - start))
        for number, start in enumerate(range(0, count, size))
    ]
    if blocks:
        run.blocks("comparing crystals", blocks, Later("duplicates", "MatchBlock", (reduced, pairs, run.settings)))
    return Compared(reduced, pairs, tuple(block.path for block in blocks))


def _final_columns(columns: dict[str, ColumnSpec], settings: BuildSettings) -> dict[str, ColumnSpec]:
    kept = {name: spec for name, spec in columns.items() if name not in KEYS}
    return {**kept, **(dict.fromkeys(MAGPIE_COLUMNS, ColumnSpec("float")) if settings.magpie else {})}


def _edge_settings(settings: BuildSettings) -> EdgeSettings | None:
    if settings.edges == "none":
        return None
    if settings.edges == "radius":
        return EdgeSettings("radius", cutoff=settings.cutoff)
    return EdgeSettings("nearest", k=settings.neighbours)


def _finish(
    draft: Path,
    run: _Run,
    staged: Sequence[Path],
    columns: dict[str, ColumnSpec],
    head: Head,
    shards: Sequence[Path],
) -> None:
    """Write the reject table and the counts, then the manifest to `draft`."""
    rows = json.loads((run.work / "rows.json").read_text())
    refusals = [refusal for path in staged for refusal in read_refusals(path)]
    with np.load(run.work / "plan.npz") as plan:
        assert int(plan["good_rows"]) + len(refusals) == rows, "rows got lost"
        refusals += [Refusal(**told) for told in json.loads(bytes(plan["refusals"]).decode())]
        written, parsed = len(plan["at"]), int(plan["parsed"])
        looked = {name: int(plan[name]) for name in ("duplicates_across_splits", "not_compared")}
    write_rejects(run.store, refusals, run.lease.token)
    counts = {
        "rows": rows,
        "crystals": parsed,  # of the rows that were not refused
        "written": written,
        "refused": dict(sorted(Counter(refusal.code for refusal in refusals).items())),
        "marked": _marked(staged, columns),
        **(looked if run.settings.duplicates != "ignore" else dict.fromkeys(looked)),
    }
    if not written:
        raise InputError(f"{run.store}: none of {rows} rows gave a crystal; {REJECTS} says why, row by row")
    begun = json.loads((run.store / "build.json").read_text())
    write_json(run.store / "build.json", {**begun, "counts": counts}, token=run.lease.token)
    write_manifest(run.work, head, [shard_info(path) for path in shards], token=run.lease.token)
    shutil.copyfile(run.work / MANIFEST, draft)


def _marked(staged: Sequence[Path], columns: dict[str, ColumnSpec]) -> dict[str, int]:
    """How many parsed crystals each yes-or-no column marks."""
    flags = {name: spec for name, spec in columns.items() if spec.kind == "bool"}
    marked = dict.fromkeys(flags, 0)
    for path in staged if flags else ():
        arrays = read_keys_of(path, flags)
        for name in flags:
            marked[name] += int(arrays[f"columns/{name}"].sum())
    return marked


def _clear(run: _Run) -> None:
    """Remove the staging files once no other rank can still look for one."""
    while run.work.exists() and run.lease.others_alive():
        run.stop.check()
        time.sleep(0.05)
    shutil.rmtree(run.work, ignore_errors=True)


def _ended(run: _Run, max_refused: float) -> Built:
    leader = run.lease.team.rank == 0 or not run.lease.others_alive()  # rank 0 stays to the end, if it lives
    counts = json.loads((run.store / "build.json").read_text())["counts"]
    refused = {code: count for code, count in counts["refused"].items() if code not in ("duplicate", "duplicate-id")}
    too_many = sum(refused.values()) > max_refused * counts["rows"]
    if leader:
        _clear(run)
        _tell(run.store, counts)
        if too_many:
            told = f"{sum(refused.values())} of {counts['rows']} rows were refused, more than {max_refused:.0%}"
            _LOG.error("%s: %s; see %s", run.store, told, REJECTS)
    return Built(leader, TOO_MANY_FAILED if too_many else DONE)


def _tell(store: Path, counts: dict[str, Any]) -> None:
    """Say what became of the rows."""
    refused = ", ".join(f"{count} {code}" for code, count in counts["refused"].items()) or "none"
    _LOG.info("%s: %d rows, %d crystals written; refused: %s", store, counts["rows"], counts["written"], refused)
    if counts["duplicates_across_splits"]:
        told = "sets of equal crystals lie in more than one split, as the source has it"
        _LOG.warning("%s: %d %s", store, counts["duplicates_across_splits"], told)
    if counts["not_compared"]:
        told = "comparisons failed; the crystals are kept, on the same side as the others of their formula"
        _LOG.warning("%s: %d %s", store, counts["not_compared"], told)
