"""Do these blocks, skip those that exist: the same way alone, under MPI and in a Slurm array.

A block is a file. Every member of a launch starts with its stride of the blocks and then takes what is
missing, so fast members help slow ones and the living finish for the dead. No messages pass between them.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgen.errors import HpcgenError, StoppedEarly
from hpcgen.files import append_json_line, draft_of
from hpcgen.runner.board import Block, Board, Outcome, Task, keep_of
from hpcgen.runner.cores import usable_cores
from hpcgen.runner.events import EVENTS, launch_facts, note_start
from hpcgen.runner.guard import Guard, Inline
from hpcgen.runner.lease import Lease
from hpcgen.runner.progress import Progress
from hpcgen.runner.stop import OUT_OF_TIME, StopFlag, time_left
from hpcgen.runner.worker import Cursor, Died, Finished, Job, Raised, Result, Stopped, Work, error_named

__all__ = ["Block", "How", "Outcome", "once", "run_blocks"]
log = logging.getLogger(__name__)
_OUTSIDE_DEATHS = 3  # a worker ended from outside is no fault of its block, but not for ever


@dataclass(frozen=True)
class How:
    """How blocks are worked on.

    processes: workers of this rank; 0: in the rank's own process, unguarded; None: all cores alone, else what
    Slurm gave the task, else 1. preload: modules imported once for all workers. item_timeout_s: None for no
    limit. retries: of a block that raised. label: what logs call the work; empty: nothing is said. stop_grace_s:
    what workers get to leave before they are killed.
    """

    processes: int | None = None
    preload: tuple[str, ...] = ()
    item_timeout_s: float | None = 60.0
    retries: int = 1
    label: str = "blocks"
    stop_grace_s: float = 10.0


def run_blocks(
    blocks: Sequence[Block],
    work: Work,
    *,
    lease: Lease,
    stop: StopFlag | None = None,
    how: How | None = None,
) -> Outcome:
    """Make every missing block by `work(block, draft, cursor)`, together with the others of the launch.

    Returns, on every member, when all blocks are in place or marked failed. Raises StoppedEarly when a stop
    was asked for, StorageError when the disk fails or the lease is lost, and what `work` raises of SiteError
    and UsageError: other blocks would meet it too.
    """
    how = how or How()
    flag = stop if stop is not None else StopFlag()
    board = Board(blocks, lease)
    if not board.open:
        return board.outcome()
    if lease.is_taker and how.label:
        note_start(lease.folder, launch_facts(lease.team), label=how.label, blocks=len(blocks), missing=len(board.open))
    return _Run(board, work, lease, flag, how).all()


def once(path: Path, make: Callable[[Path], Any], *, lease: Lease, stop: StopFlag | None = None) -> bool:
    """Make one file by `make(draft)` on one member, while the others wait for it. True where it was made.

    On failure the maker raises what `make` raised and the others an error that quotes it.
    """
    faults: list[Exception] = []

    def work(block: Block, draft: Path, cursor: Cursor) -> None:
        try:
            make(draft)
        except Exception as fault:
            faults.append(fault)
            raise

    how = How(processes=0, retries=0, label="")
    try:
        outcome = run_blocks([Block(0, Path(path))], work, lease=lease, stop=stop, how=how)
    except HpcgenError:
        if faults:
            raise faults[0] from None  # in its own words
        raise
    if faults:
        raise faults[0]
    for failure in outcome.failed:
        raise error_named(failure.kind, failure.reason)
    return outcome.done == 1


class _Run:
    """One call of run_blocks on one member."""

    def __init__(self, board: Board, work: Work, lease: Lease, stop: StopFlag, how: How) -> None:
        self.board, self.lease, self.stop, self.how = board, lease, stop, how
        self.pool: Guard | Inline
        processes = how.processes if how.processes is not None else _default_processes(lease)
        if processes == 0:
            self.pool = Inline(work, self.check)
        else:
            self.pool = Guard(work, processes, preload=how.preload, item_timeout_s=how.item_timeout_s)
        total = sum(block.size for block in board.open.values()) + board.items_settled
        self.progress = Progress(how.label, total, board.items_settled, lease.team)
        self._looked = time.monotonic()

    def check(self) -> None:
        """Raise if a stop was asked for here or on another rank, or if the folder is no longer ours."""
        if self.lease.is_lost:
            self.lease.check()
        if self.lease.told_to_stop:
            self.stop.set("another rank was asked to stop")
        if time_left(os.environ) < 2 * self.how.stop_grace_s:
            self.stop.set(OUT_OF_TIME)
        self.stop.check()

    def all(self) -> Outcome:
        """Work until every block is settled."""
        self.lease.report = self.report
        try:
            with self.progress:
                while self.board.open:
                    self.check()
                    self.fill()
                    self.settle(self.pool.wait(0.2 if self.pool.jobs else min(self.board.poll_s, 0.2)))
                    self.look_around()
        except StoppedEarly as fault:
            self.leave(str(fault))
            raise
        finally:
            self.pool.close()
            self.lease.report = dict
            for task in list(self.board.mine.values()):
                self.forget(task)
        return self.board.outcome()

    def fill(self) -> None:
        """Give every idle worker a block, if there is one to be had."""
        while self.pool.room():
            task = self.board.next()
            if task is None:
                return
            self.begin(task)

    def begin(self, task: Task) -> None:
        """Start an attempt."""
        draft = draft_of(task.block.path, self.lease.token)
        draft.unlink(missing_ok=True)
        self.pool.start(Job(task.block, draft, keep_of(task.block.path), dict(task.culprits)))

    def settle(self, results: list[tuple[Job, Result]]) -> None:
        """Place finished blocks, start failed ones again or give them up."""
        for job, result in results:
            task = self.board.mine[job.block.index]
            if isinstance(result, Finished):
                self.board.place(task, result.counts)
            elif isinstance(result, Raised):
                if result.ends_run is not None:
                    raise type(result.ends_run)(f"{task.block.path}: {result.ends_run}")
                self.retry(task, result.kind, result.message, result.trace)
            elif isinstance(result, Died):
                self.bury(task, result)
            elif isinstance(result, Stopped):
                self.stop.set("the work asked for it")
                self.forget(task)

    def bury(self, task: Task, death: Died) -> None:
        """A worker died: its item is the culprit, else the block has had one attempt."""
        name = task.block.path.name
        if death.how == "outside" and task.outside < _OUTSIDE_DEATHS:
            task.outside += 1
            time.sleep(0.2)  # a signal to the whole group reaches this process too
            self.check()
            self.begin(task)
        elif death.how == "killed" and death.item is not None and death.item not in task.doubted:
            log.warning("%s: item %d: %s; the block starts again", name, death.item, death.message)
            task.doubted.add(death.item)  # the same again, and it is the item's fault: its memory, say
            time.sleep(0.2)
            self.check()
            self.begin(task)
        elif death.item is not None and death.item not in task.culprits:
            log.warning("%s: item %d: %s (%s); the block starts again without it",
                        name, death.item, death.how, death.message)  # fmt: skip
            task.culprits[death.item] = "crash" if death.how == "killed" else death.how
            self.begin(task)
        else:
            at = f" at item {death.item}, which it was told to skip" if death.item is not None else ""
            self.retry(task, death.how, f"{death.message}{at}", "")

    def retry(self, task: Task, kind: str, message: str, trace: str) -> None:
        """Try a failed block again, or record why it failed."""
        if self.how.label:  # else the caller speaks
            log.warning("%s: %s: %s%s", task.block.path.name, kind, message, f"\n{trace.rstrip()}" if trace else "")
        task.attempts += 1
        if task.attempts <= self.how.retries:
            self.begin(task)
            return
        where = trace.rstrip().splitlines()
        frames = [line.strip() for line in where if line.lstrip().startswith("File ")]
        self.board.fail(task, kind, message)
        with suppress(OSError):
            draft_of(task.block.path, self.lease.token).unlink(missing_ok=True)
        _log_event(self.lease, event="failed", block=task.block.index, file=task.block.path.name, kind=kind,
                   message=message, at=frames[-1] if frames else "", rank=self.lease.team.rank)  # fmt: skip

    def forget(self, task: Task) -> None:
        """Leave a block as if it had never been claimed."""
        with suppress(OSError):
            draft_of(task.block.path, self.lease.token).unlink(missing_ok=True)
        self.board.give_up(task)

    def leave(self, reason: str) -> None:
        """Tell the others, give the workers a moment to leave, keep what they finish in it."""
        self.lease.tell_stop()
        self.pool.ask_stop()
        end = time.monotonic() + self.how.stop_grace_s
        while self.pool.jobs and time.monotonic() < end:
            for job, result in self.pool.wait(0.1):
                if isinstance(result, Finished):
                    self.settle([(job, result)])
                else:
                    self.forget(self.board.mine[job.block.index])
        _log_event(self.lease, event="stop", reason=reason, rank=self.lease.team.rank, done=self.board.result.done)

    def look_around(self) -> None:
        """Once per beat, see what the others finished; always show how far all are."""
        if time.monotonic() - self._looked > self.lease.beat_s:
            self._looked = time.monotonic()
            self.board.look()
        self.progress.show(self.board.items_settled + self.pool.items())

    def report(self) -> dict[str, Any]:
        """For the heartbeat file."""
        blocks = [task.block.index for task in list(self.board.mine.values())]
        result = self.board.result
        return {
            "label": self.how.label, "blocks_done": result.done, "blocks_failed": len(result.failed),
            "items_done": self.board.items_settled + self.pool.items(), "items_total": self.progress.total,
            "blocks": blocks, "rate": round(self.progress.rate, 3),
        }  # fmt: skip


def _default_processes(lease: Lease) -> int:
    if lease.team.kind == "alone":
        return usable_cores()
    text = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(int(text), usable_cores()) if text.isdigit() else 1


def _log_event(lease: Lease, **record: Any) -> None:
    append_json_line(lease.folder / EVENTS, **{"token": lease.team.token, **record})
