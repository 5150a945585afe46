"""The worker's side of the guard: attempt one block after the other, and say which item is in progress."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, MutableSequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from hpcgen import errors
from hpcgen.errors import HpcgenError, SiteError, StoppedEarly, StorageError, UsageError
from hpcgen.files import is_storage_fault

ITEM, SINCE, STOP, COUNT = range(4)  # slots of the shared memory of one worker
NO_ITEM = -(2**62)
OUTSIDE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}  # sent by somebody, no item's fault
Work: TypeAlias = Callable[[Any, Path, "Cursor"], dict[str, int | float] | None]


class Cursor:
    """What a piece of work tells and asks while it runs.

    culprits: items of this block that crashed or hung before ('crash' or 'timeout'): record them, skip them.
    keep: a path for finished pieces that outlive a crash, a stop or a kill; removed with the block done.
    """

    def __init__(self, slots: MutableSequence[int], check: Callable[[], None], keep: Path) -> None:
        self.culprits: dict[int, str] = {}
        self.keep = keep
        self._slots = slots
        self._check = check

    def at(self, item: int) -> None:
        """Say, before each risky step, which item it is for. Raises StoppedEarly if a stop was asked for.

        Items count from 0 upwards; the highest one begun is the progress shown.
        """
        self._check()
        self._move(item)

    def rest(self) -> None:
        """Say that no item is in progress: what happens from now on is no item's fault."""
        self._check()
        self._move(NO_ITEM)

    def _move(self, item: int) -> None:
        self._slots[COUNT] = max(self._slots[COUNT], item)
        self._slots[SINCE] = time.monotonic_ns()
        self._slots[ITEM] = item


@dataclass
class Job:
    """One attempt at one block."""

    block: Any
    draft: Path
    keep: Path
    culprits: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """The draft is complete and on disk."""

    counts: dict[str, int | float]


@dataclass(frozen=True)
class Raised:
    """The work raised. `ends_run` holds the error when every other block would meet it too."""

    kind: str
    message: str
    trace: str
    ends_run: HpcgenError | None = None


@dataclass(frozen=True)
class Died:
    """The worker died or was killed; `item` is the culprit, if there was one in progress."""

    how: str  # crash, timeout, outside, killed (by somebody's SIGKILL)
    message: str
    item: int | None = None


@dataclass(frozen=True)
class Stopped:
    """The work left because a stop was asked for."""


Result: TypeAlias = Finished | Raised | Died | Stopped


def serve(work: Work, pipe: Any, slots: Any) -> None:
    """The worker's side: attempt the jobs that come through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the supervisor decides
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OUTSIDE)
    _die_with_supervisor()
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)

    def check() -> None:
        if slots[STOP]:
            raise StoppedEarly("a stop was asked for")

    gc.freeze()  # what was imported stays: collections need not look at it, which saves a tenth of the time
    with suppress(EOFError, OSError):  # the supervisor is gone
        pipe.send(None)
        while (job := pipe.recv()) is not None:
            pipe.send(attempt(work, job, Cursor(slots, check, job.keep)))


def attempt(work: Work, job: Job, cursor: Cursor) -> Result:
    cursor.culprits = job.culprits
    try:
        counts = work(job.block, job.draft, cursor) or {}
        cursor._move(NO_ITEM)
        handle = os.open(job.draft, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return Finished(dict(counts))
    except StoppedEarly:
        return Stopped()
    except Exception as fault:
        return _raised(fault)


def _raised(fault: Exception) -> Raised:
    kind, message = type(fault).__name__, str(fault) or repr(fault)
    trace = "" if isinstance(fault, HpcgenError) else "".join(traceback.format_exception(fault))  # a sentence is enough
    ends_run: HpcgenError | None = None
    if isinstance(fault, StorageError | SiteError | UsageError):
        ends_run = type(fault)(message)
    elif is_storage_fault(fault):
        ends_run = StorageError(f"cannot write ({message.splitlines()[0]}); what is already there is unharmed")
    return Raised(kind, message, trace, ends_run)


def error_named(kind: str, message: str) -> HpcgenError:
    """The house's error of that name, or the plain one."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, HpcgenError):
        return found(message)
    return HpcgenError(f"{kind}: {message}")


def _die_with_supervisor() -> None:
    """End this worker when its supervisor is gone, however that went.

    The kernel signals the closing of the supervisor's end of a pipe, even to a worker stuck in compiled code;
    where it cannot, a thread waits for it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    watcher = threading.Thread(target=_wait_and_die, args=(parent,), name="supervisor", daemon=True)
    watcher.start()
    if sys.platform.startswith("linux"):
        import fcntl

        with suppress(OSError):
            pipe = int(parent.sentinel)
            fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def _wait_and_die(parent: Any) -> None:
    parent.join()
    os._exit(1)
