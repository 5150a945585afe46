"""Workers that may crash or hang: a supervisor watches them, and one bad item costs that item alone.

A worker is a process forked from a clean server that has imported the heavy modules once. It publishes the
item it is at in shared memory, so that the supervisor knows the culprit when the worker dies or hangs.
"""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any

from hpcgen.errors import SiteError
from hpcgen.runner.worker import (
    COUNT,
    ITEM,
    NO_ITEM,
    OUTSIDE,
    SINCE,
    STOP,
    Cursor,
    Died,
    Job,
    Result,
    Stopped,
    Work,
    attempt,
    serve,
)

log = logging.getLogger(__name__)

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_FREEZE_S = 5.0  # a supervisor that was away so long (a suspended job) blames nobody for it
_STARTS = 3  # workers that die before they are ready, one after the other, before the run is given up


class Inline:
    """Work in this very process: no guard against crashes, for work that must hold a GPU or that is short."""

    def __init__(self, work: Work, check: Callable[[], None]) -> None:
        self._work, self._check = work, check
        self._slots = [NO_ITEM, 0, 0, 0]
        self._result: tuple[Job, Result] | None = None

    def room(self) -> bool:
        """Whether a job can be started now."""
        return self._result is None

    @property
    def jobs(self) -> list[Job]:
        """Started, and its result not yet fetched."""
        return [self._result[0]] if self._result else []

    def start(self, job: Job) -> None:
        """Do the job."""
        self._slots[:] = [NO_ITEM, time.monotonic_ns(), 0, 0]
        cursor = Cursor(self._slots, self._check, job.keep)
        self._result = (job, Stopped())  # whatever is raised, the job's draft is known and removed
        self._result = (job, attempt(self._work, job, cursor))

    def wait(self, timeout_s: float) -> list[tuple[Job, Result]]:
        """The result of the last job."""
        result, self._result = self._result, None
        if result is None:
            time.sleep(timeout_s)
            return []
        return [result]

    def items(self) -> int:
        """Items finished of the block in progress."""
        return self._slots[COUNT] if self._result else 0

    def ask_stop(self) -> None:
        """Nothing to do: the cursor asks."""

    def close(self) -> None:
        """Nothing to close."""


class Guard:
    """A pool of worker processes and the watch over them."""

    def __init__(
        self, work: Work, processes: int, *, preload: Sequence[str] = (), item_timeout_s: float | None = 60.0
    ) -> None:
        self._work, self._processes, self._timeout_s = work, processes, item_timeout_s
        self._context = multiprocessing.get_context("forkserver")
        self._workers: list[_Worker] = []
        self._bad_starts = 0
        self._looked = time.monotonic()
        prepare(preload)

    def room(self) -> bool:
        """Whether a job can be started now."""
        return len(self.jobs) < self._processes

    @property
    def jobs(self) -> list[Job]:
        """In progress."""
        return [worker.job for worker in self._workers if worker.job is not None]

    def start(self, job: Job) -> None:
        """Give a job to an idle worker, a new one if need be."""
        idle = next((worker for worker in self._workers if worker.job is None), None)
        if idle is None:
            idle = _Worker(self._context, self._work)
            self._workers.append(idle)
        idle.begin(job)

    def wait(self, timeout_s: float) -> list[tuple[Job, Result]]:
        """Jobs that ended, waiting up to `timeout_s` for one. Raises SiteError if workers cannot start."""
        ends = {end: worker for worker in self._workers for end in (worker.pipe, worker.process.sentinel)}
        if ends:
            ready = connection.wait(list(ends), timeout=timeout_s)
        else:
            ready = []
            time.sleep(timeout_s)
        now = time.monotonic()
        if now - self._looked > timeout_s + _FREEZE_S:
            for worker in self._workers:
                worker.not_before_ns = time.monotonic_ns()
        self._looked = now
        results = []
        for worker in {ends[end] for end in ready}:
            results += self._hear(worker)
        for worker in list(self._workers):
            results += self._time(worker)
        return results

    def items(self) -> int:
        """Items finished of the blocks in progress."""
        return sum(worker.slots[COUNT] for worker in self._workers if worker.job is not None)

    def ask_stop(self) -> None:
        """Workers leave at their next item."""
        for worker in self._workers:
            worker.slots[STOP] = 1

    def close(self) -> None:
        """End all workers, at once where one is at work."""
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.end(at_once=worker.job is not None)
        self._workers = []

    def _hear(self, worker: "_Worker") -> list[tuple[Job, Result]]:
        """What a worker sent, or its death."""
        try:
            while worker.pipe.poll():
                message = worker.pipe.recv()
                if message is None:
                    worker.is_ready, self._bad_starts = True, 0
                    continue
                job, worker.job = worker.job, None
                assert job is not None
                return [(job, message)]
            if worker.process.is_alive():
                return []
        except (EOFError, OSError):
            pass
        return self._bury(worker, "crash")

    def _time(self, worker: "_Worker") -> list[tuple[Job, Result]]:
        """Kill a worker that stays too long at one item, or ten times too long between items."""
        if worker.job is None or not worker.is_ready or self._timeout_s is None or worker not in self._workers:
            return []
        if not worker.is_late(self._timeout_s):
            return []
        worker.end(at_once=True)
        return self._bury(worker, "timeout" if worker.is_late(self._timeout_s) else "outside")

    def _bury(self, worker: "_Worker", how: str) -> list[tuple[Job, Result]]:
        worker.end(at_once=True)
        self._workers.remove(worker)
        code = worker.process.exitcode
        if not worker.is_ready:
            self._bad_starts += 1
            if self._bad_starts >= _STARTS:
                raise SiteError(
                    f"{_STARTS} workers in a row ended ({_ending(code)}) before they were ready; "
                    "their own message stands above"
                )
        if worker.job is None:
            return []
        if how == "crash" and (code in {-number for number in OUTSIDE} or not worker.is_ready):
            how = "outside"
        if how == "crash" and code == -signal.SIGKILL:  # not by us: a lack of memory, an administrator
            how = "killed"
        item = None if how == "outside" or worker.slots[ITEM] == NO_ITEM else int(worker.slots[ITEM])
        message = f"worker {_ending(code)}" if how != "timeout" else f"no progress for {self._timeout_s:g} s"
        return [(worker.job, Died(how, message, item))]


class _Worker:
    """The supervisor's side of one worker process."""

    def __init__(self, context: Any, work: Work) -> None:
        self.slots = context.RawArray("q", 4)
        self.slots[ITEM] = NO_ITEM
        self.job: Job | None = None
        self.is_ready = False
        self.not_before_ns = 0
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(work, theirs, self.slots), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, job: Job) -> None:
        self.slots[ITEM], self.slots[COUNT] = NO_ITEM, 0
        self.slots[SINCE] = time.monotonic_ns()
        self.job = job
        with suppress(OSError):  # already dead: wait() will see it
            self.pipe.send(job)

    def is_late(self, timeout_s: float) -> bool:
        allowed = timeout_s if self.slots[ITEM] != NO_ITEM else 10 * timeout_s
        since = max(self.slots[SINCE], self.not_before_ns)
        return time.monotonic_ns() - since > allowed * 1e9

    def dismiss(self) -> None:
        if self.job is None:
            with suppress(OSError):
                self.pipe.send(None)

    def end(self, at_once: bool) -> None:
        if not at_once:
            self.process.join(timeout=1.0)
        if self.process.is_alive():
            self.process.kill()
        self.process.join(timeout=10.0)
        self.pipe.close()


def prepare(preload: Sequence[str]) -> None:
    """Start the process that workers are forked from; it imports the main module and `preload` while we go on.

    It is deaf to signals and ends when its last user does. Called early, its imports overlap with our own.
    """
    forkserver.set_forkserver_preload(["__main__", *preload])
    resource_tracker.ensure_running()  # by itself it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OUTSIDE)
    try:
        with _single_threaded():
            forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _single_threaded() -> Iterator[None]:
    """The server of the workers starts with one thread for linear algebra; this process keeps its own."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ending(code: int | None) -> str:
    if code is None:
        return "killed"
    if code < 0:
        with suppress(ValueError):
            return f"died of {signal.Signals(-code).name}"
    return f"left with status {code}"
