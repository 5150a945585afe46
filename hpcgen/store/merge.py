"""One store of several."""

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hpcgen.errors import InputError, StoppedEarly, UsageError
from hpcgen.files import DRAFT, draft_of, storage_faults
from hpcgen.runner.events import EVENTS
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import Team
from hpcgen.store.arrays import add_missing_columns, load
from hpcgen.store.inspect import STEP, STEP_WITH_EDGES, Ids, first_repeat, opened_shard, prefixed
from hpcgen.store.layout import ColumnSpec, EdgeSettings, Head, Manifest, read_manifest, reading
from hpcgen.store.write import SHARD_ROWS, StoreWriter

__all__ = ["merge"]


def merge(
    sources: Sequence[Path],
    out: Path,
    *,
    drop_edges: bool = False,
    prefix_ids: bool = False,
    shard_rows: int | None = None,
    stop: StopFlag | None = None,
) -> Manifest:
    """One store of several: columns united (absent values missing), splits kept, order of the sources kept.

    `out` appears whole or not at all; memory stays flat. prefix_ids puts `<folder>/` before every id, else an
    id that stands in two stores is refused. Raises UsageError (`out` exists), InputError (bad stores, columns
    or edges that do not fit together, ids that collide), StorageError (also where another merge makes `out`),
    StoppedEarly once `stop` is set.
    """
    stop = StopFlag() if stop is None else stop  # an unset flag is false
    if not sources:
        raise UsageError("no stores to merge, want one or more")
    _refuse_existing(out)
    manifests = [read_manifest(source) for source in sources]
    head = _united(sources, manifests, drop_edges)
    prefixes = _prefixes(sources) if prefix_ids else [""] * len(sources)
    with _own_draft(out) as (draft, lease):

        def go_on() -> None:
            if stop:
                raise StoppedEarly(f"{out}: stopped early ({stop.reason}), nothing is kept; start it again")
            lease.check()

        _refuse_existing(out)
        _refuse_collisions(sources, manifests, prefixes, go_on)
        with StoreWriter(draft, head, shard_rows=shard_rows or SHARD_ROWS) as writer:
            for source, manifest, prefix in zip(sources, manifests, prefixes, strict=True):
                _copy(source, manifest, prefix, head, writer, go_on)
        go_on()
        with storage_faults(out):
            draft.rename(out)
    assert writer.manifest is not None
    return writer.manifest


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another folder")


@contextmanager
def _own_draft(out: Path) -> Iterator[tuple[Path, Lease]]:
    """A folder to make `out` in and the lease of it; the drafts of merges that were killed are cleared."""
    room = draft_of(out, "merge")
    team = Team("alone", 0, 1, uuid.uuid4().hex[:12])  # of this process: no rank may join the merge of another
    draft = room / f"{team.token}{DRAFT}"
    try:
        with Lease.take(room, team) as lease:
            for left in room.glob(f"*{DRAFT}"):
                shutil.rmtree(left, ignore_errors=True)
            try:
                yield draft, lease
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    finally:
        with suppress(OSError):  # another merge is in it
            (room / EVENTS).unlink(missing_ok=True)
            room.rmdir()


def _copy(
    source: Path, manifest: Manifest, prefix: str, head: Head, writer: StoreWriter, go_on: Callable[[], None]
) -> None:
    edges = head.edges is not None
    step = STEP_WITH_EDGES if edges else STEP
    for shard in tqdm(manifest.shards, desc=str(source), unit="shard", disable=None, leave=False):
        with opened_shard(source, shard, manifest.head) as opened:
            for start in range(0, shard.crystals, step):
                go_on()
                with reading(source / shard.name):
                    stop = min(start + step, shard.crystals)
                    part = load(opened, start, stop, manifest.head.columns, edges=edges)
                part["id"] = prefixed(part["id"], prefix)
                writer.add_arrays(shard.split, add_missing_columns(part, head.columns))


def _prefixes(sources: Sequence[Path]) -> list[str]:
    names = [source.resolve().name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two stores are called {name}: --prefix-ids cannot tell their ids apart; rename one folder"
            )
    return [f"{name}/" for name in names]


def _united(sources: Sequence[Path], manifests: Sequence[Manifest], drop_edges: bool) -> Head:
    columns: dict[str, ColumnSpec] = {}
    seen: dict[str, Path] = {}
    for source, manifest in zip(sources, manifests, strict=True):
        for name, spec in manifest.head.columns.items():
            if columns.setdefault(name, spec) != spec:
                there = columns[name]
                told = f"{there.kind} {there.unit!r}, here {spec.kind} {spec.unit!r}"
                raise InputError(f"{source}: column {name} is in {seen[name]} {told}; want them alike")
            seen.setdefault(name, source)
    settings = {"merged": [_told(manifest) for manifest in manifests]}
    return Head("merge", settings, columns, None if drop_edges else _same_edges(sources, manifests))


def _told(manifest: Manifest) -> dict[str, Any]:
    head = manifest.head
    return {"source": head.source, "settings": dict(head.settings), "settings_hash": head.settings_hash}


def _same_edges(sources: Sequence[Path], manifests: Sequence[Manifest]) -> EdgeSettings | None:
    kinds = {str(manifest.head.edges or "none") for manifest in manifests}
    if len(kinds) > 1:
        told = ", ".join(f"{s}: {m.head.edges or 'none'}" for s, m in zip(sources, manifests, strict=True))
        raise InputError(f"the stores keep different edges ({told}); want the same, or --drop-edges")
    return manifests[0].head.edges


def _refuse_collisions(
    sources: Sequence[Path], manifests: Sequence[Manifest], prefixes: Sequence[str], go_on: Callable[[], None]
) -> None:
    shards = [
        Ids(source, shard, manifest.head, prefix)
        for source, manifest, prefix in zip(sources, manifests, prefixes, strict=True)
        for shard in manifest.shards
    ]
    repeat = first_repeat(shards, go_on)
    if repeat is None:
        return
    if repeat.first.store == repeat.second.store and sources.count(repeat.first.store) == 1:
        raise InputError(f"{repeat.first.store}: {repeat}; the store is faulty, see hpcgen store check")
    raise InputError(f"{repeat}; want every id once: leave a store out, or --prefix-ids")
