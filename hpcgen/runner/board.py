"""Which blocks are in place, claimed or failed: read from the names in their folders, and nowhere else.

A block is claimed by creating `<block>.<token>.<k>.claim`, which exactly one member of the launch can do;
a claim whose owner died is outbid by k + 1.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpcgen.errors import TooManyFailed
from hpcgen.files import DRAFT, whole
from hpcgen.runner.lease import CLAIM, MISSED_BEATS, Lease
from hpcgen.runner.owners import create_whole, read_record

log = logging.getLogger(__name__)
_POLL_S = (0.05, 2.0)  # how often a member without work looks whether some has turned up
FAILED = ".failed"  # marks a block that failed in this launch; the next launch tries it again
KEPT = ".part"  # finished pieces of an unfinished block, if the work keeps any


@dataclass(frozen=True)
class Block:
    """One file to make. `size` is its number of items, for the progress shown."""

    index: int
    path: Path
    size: int = 1


@dataclass(frozen=True)
class Failure:
    """A block that nobody could make in this launch, and why."""

    block: Block
    reason: str
    kind: str = "HpcgenError"


@dataclass
class Outcome:
    """What became of the blocks: every one is in place or in `failed`.

    done, culprits and counts (what `work` returned, summed) are this member's share of this launch. Totals
    of a run stand in its blocks: what other members and earlier launches did is there and nowhere else.
    """

    done: int = 0
    skipped: int = 0
    elsewhere: int = 0
    culprits: int = 0
    failed: list[Failure] = field(default_factory=list)
    counts: dict[str, int | float] = field(default_factory=dict)

    def refuse_failed(self, where: Path, total: int, doing: str = "") -> None:
        """Raise TooManyFailed, naming the first of `total` blocks of `where` that failed for good, if one did."""
        if self.failed:
            first = self.failed[0]
            raise TooManyFailed(
                f"{where}: {len(self.failed)} of {total} blocks failed{f' while {doing}' if doing else ''}, the first "
                f"being {first.block.path.name} ({first.reason}); the same command tries them again"
            )


@dataclass
class Task:
    """A block this member has claimed, through all its attempts."""

    block: Block
    claim: Path
    attempts: int = 0
    outside: int = 0
    doubted: set[int] = field(default_factory=set)  # items at which a worker was killed once
    culprits: dict[int, str] = field(default_factory=dict)


class Board:
    """Which blocks are in place, claimed or failed, seen from one member."""

    def __init__(self, blocks: Sequence[Block], lease: Lease) -> None:
        self.lease = lease
        self.result = Outcome()
        self.mine: dict[int, Task] = {}
        self.items_settled = 0
        rank, size = lease.team.rank % lease.team.size, lease.team.size
        others = [block for place, block in enumerate(blocks) if place % size != rank]
        self.open = {block.index: block for block in [*blocks[rank::size], *reversed(others)]}
        if len(self.open) != len(blocks):
            raise ValueError("blocks: want each index once")
        self._paths = {block.path for block in blocks}  # the folders may hold other members' next blocks too
        self._folders = sorted({path.parent for path in self._paths})
        self._queue: list[Block] = []
        self._highest: dict[Path, int] = {}
        self.poll_s, self._next_look = _POLL_S[0], 0.0
        for folder in self._folders:
            lease.sweep(folder)
        self._clear_old_marks()
        self.look()
        self.result.skipped, self.result.elsewhere = self.result.elsewhere, 0

    def look(self) -> None:
        """Read the folders: settle what others finished, note who claims what, queue what may be free."""
        before = len(self.open)
        self._highest = {}
        tag = f".{self.lease.team.token}."
        for folder in self._folders:
            names = _names(folder)
            for name in names:
                if name.endswith(CLAIM) and tag in name:
                    stem, _, number = name.removesuffix(CLAIM).rpartition(tag)
                    path = folder / stem
                    self._highest[path] = max(int(number), self._highest.get(path, -1))
            for block in [b for b in self.open.values() if b.path.parent == folder]:
                if block.index in self.mine:
                    continue
                if block.path.name in names:
                    self._settle(block)
                    self.result.elsewhere += 1
                elif block.path.name + FAILED in names:
                    self._settle_failed(block)
        wanted = {block.path for block in self.open.values()}
        for path in self._highest.keys() & self._paths - wanted:
            self._remove_claims(path, self._highest.pop(path))
        if not wanted:
            self._remove_drafts()
        free = [b for b in self.open.values() if b.index not in self.mine]
        self._queue = [b for b in reversed(free) if b.path not in self._highest]
        self._queue = [b for b in free if b.path in self._highest] + self._queue  # doubtful ones last: it is a stack
        if len(self.open) < before:
            self.poll_s = _POLL_S[0]

    def next(self) -> Task | None:
        """Claim a block that is nobody's or a dead member's. None if there is none at the moment."""
        if not self._queue and time.monotonic() >= self._next_look:
            self.look()
            self._next_look = time.monotonic() + self.poll_s
            self.poll_s = min(self.poll_s * 1.5, _POLL_S[1], self.lease.beat_s)
        while self._queue:
            task = self._claim(self._queue.pop())
            if task is not None:
                self.poll_s = _POLL_S[0]
                return task
        return None

    def place(self, task: Task, counts: dict[str, int | float]) -> None:
        """Put a complete draft in place. Raises StorageError, also for a lost lease: then nothing appears."""
        self.lease.check()
        try:
            with whole(task.block.path, token=self.lease.token, before_rename=self.lease.check):
                pass
        except FileNotFoundError:  # swept by a member that took us for dead and made the block itself
            if not task.block.path.exists():
                raise
        keep_of(task.block.path).unlink(missing_ok=True)
        self._settle(task.block)
        self.result.done += 1
        self.result.culprits += len(task.culprits)
        for name, value in counts.items():
            self.result.counts[name] = self.result.counts.get(name, 0) + value
        self.give_up(task)

    def fail(self, task: Task, kind: str, reason: str) -> None:
        """Mark a block so that no member takes it again in this launch."""
        team = self.lease.team
        record = {"token": team.token, "kind": kind, "reason": reason, "rank": team.rank}
        self.lease.check()
        create_whole(mark_of(task.block.path), record, team.token)
        self._settle_failed(task.block)
        self.give_up(task)

    def give_up(self, task: Task) -> None:
        """Take back a claim, whether the block is settled or not."""
        self.mine.pop(task.block.index, None)
        number = int(task.claim.name.removesuffix(CLAIM).rpartition(".")[2])
        self._remove_claims(task.block.path, number)

    def outcome(self) -> Outcome:
        """What became of the blocks, once all are settled."""
        self.look()
        self.result.failed.sort(key=lambda failure: failure.block.index)
        return self.result

    def _claim(self, block: Block) -> Task | None:
        team = self.lease.team
        if block.index not in self.open or block.index in self.mine:
            return None
        number = 0
        if block.path in self._highest:
            number = self._highest[block.path] + 1
            if self._is_held(self._claim_of(block.path, number - 1)):
                return None
        claim = self._claim_of(block.path, number)
        if not create_whole(claim, {"rank": team.rank, "member": self.lease.member}, team.token):
            return None
        task = self.mine[block.index] = Task(block, claim)
        if block.path.exists() or mark_of(block.path).exists():  # settled since we looked
            self.give_up(task)
            self._next_look = 0.0
            return None
        if number:
            log.info("%s: taken over from a member that is gone", block.path.name)
        return task

    def _is_held(self, claim: Path) -> bool:
        owner = read_record(claim)
        if owner is None:
            return True  # just given back: the next look tells
        if not owner:
            sign = ("torn claim", claim)
            return self.lease.watch.look(sign, sign, MISSED_BEATS * self.lease.beat_s) is not False
        return self.lease.is_alive(int(owner["rank"]), str(owner["member"]))

    def _claim_of(self, path: Path, number: int) -> Path:
        return path.with_name(f"{path.name}.{self.lease.team.token}.{number}{CLAIM}")

    def _remove_claims(self, path: Path, highest: int) -> None:
        for number in range(highest + 1):
            with suppress(OSError):
                self._claim_of(path, number).unlink(missing_ok=True)

    def _remove_drafts(self) -> None:
        """What members that were killed left behind, once every block is settled."""
        tag = f".{self.lease.team.token}-"
        for folder in self._folders:
            for name in _names(folder):
                if name.endswith(DRAFT) and folder / name.rpartition(tag)[0] in self._paths:
                    (folder / name).unlink(missing_ok=True)

    def _settle(self, block: Block) -> None:
        if self.open.pop(block.index, None) is not None:
            self.items_settled += block.size

    def _settle_failed(self, block: Block) -> None:
        record = read_record(mark_of(block.path)) or {}
        reason, kind = str(record.get("reason", "unknown")), str(record.get("kind", "HpcgenError"))
        self.result.failed.append(Failure(block, reason, kind))
        self._settle(block)

    def _clear_old_marks(self) -> None:
        """Blocks that failed in an earlier launch are tried again."""
        for folder in self._folders:
            for name in _names(folder):
                if name.endswith(FAILED):
                    mark = folder / name
                    if (read_record(mark) or {}).get("token") != self.lease.team.token:
                        mark.unlink(missing_ok=True)


def keep_of(path: Path) -> Path:
    return path.with_name(path.name + KEPT)


def mark_of(path: Path) -> Path:
    return path.with_name(path.name + FAILED)


def _names(folder: Path) -> set[str]:
    try:
        return {entry.name for entry in folder.iterdir()}
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        return set()
