"""What the ranks of a run tell each other, and how they meet and leave.

torch.distributed carries gradients and a few numbers a step. All else (who goes on from which checkpoint, who failed
and why, that all is saved) goes through the key-value store of the rendezvous, which a dead rank cannot block.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpcgen.errors import HpcgenError, SiteError, StoppedEarly
from hpcgen.files import reason
from hpcgen.launch.meet import meet
from hpcgen.launch.place import Place
from hpcgen.models.load import usable_gpus
from hpcgen.runner.stop import SIGNALS
from hpcgen.runner.team import exit_code, tell_script
from hpcgen.train.watch import Watch

log = logging.getLogger(__name__)
_GRACE_S = 5.0  # the rank that keeps the store waits so long for the others to have read it
_SELF_S = 10.0  # rank 0, which owns the run folder, gets so long to leave in order
_BROKEN = ("closed", "reset by peer", "broken pipe", "got 0 bytes")  # words of a connection to one that was there
_LATER_S = 60.0  # what collectives wait longer than it takes to name the rank that is late


class RankGone(SiteError):
    """Another rank is gone and has not said why. What it ended with, srun knows; and of a preemption Slurm."""


class ToldByAnother(HpcgenError):
    """Another rank failed: its sentence, and its exit code."""

    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__(told["said"])
        self.exit_code = told["code"]
        self.origin = {"rank": told["rank"], "kind": told["kind"]}


class Ranks:
    """All ranks of a run. As a context manager it makes sure that none is left behind when another fails.

    With more than one rank the process ends at the end of the block, by os._exit with the run's exit code: an
    interpreter that shuts down in order takes seconds, and may wait for ranks that are gone.
    """

    def __init__(
        self, place: Place, device: torch.device, store: dist.Store | None = None, timeout_s: float = 0.0
    ) -> None:
        self.place, self.device, self.store = place, device, store
        self.rank, self.world, self.timeout_s = place.rank, place.world, timeout_s
        self.note: Callable[[str, dict[str, Any]], None] = lambda said, origin: None  # of the owner of the run folder
        self._asked = 0
        self._watch = Watch(store, place, timeout_s, self._leave_with, self._tell_late) if store is not None else None

    def at(self, doing: str, step: int) -> None:
        """What this rank does from now on, one of watch.DOING: for the sentence about the one that does not come."""
        if self._watch is not None:
            self._watch.doing = (step, doing)

    def sum(self, values: Tensor) -> list[float]:
        """Sums over the ranks of numbers (K,), float64, the same on all of them."""
        if self._watch is not None:
            self.at("summing", self._watch.doing[0])
            dist.all_reduce(values)
        return values.tolist()

    def from_first(self, call: Callable[[], Any]) -> Any:
        """What `call` gives on rank 0, a JSON value, on every rank; or its error, raised on every rank."""
        if self.store is None:
            return call()
        self._asked += 1
        key = f"first/{self._asked}"
        if self.rank:
            told = json.loads(self._wait_for(key))
            if "said" in told:
                raise ToldByAnother(told)
            return told["value"]
        try:
            value = call()
        except Exception as fault:
            self.store.set(key, json.dumps(self._told(fault)))
            raise
        self.store.set(key, json.dumps({"value": value}))
        return value

    def cause(self, fault: BaseException) -> BaseException:
        """An error; for one that is but the echo of another rank's what that one said, or that it said nothing."""
        if self.store is None or not _is_echo(fault):
            return fault
        try:
            if self._heard():
                return ToldByAnother(json.loads(self.store.get("fault")))
            return RankGone(f"another rank ended without a word ({reason(fault)})")
        except RuntimeError:
            return RankGone(f"rank 0 is gone ({reason(fault)})")

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.store is None:
            return
        for number in SIGNALS:  # torchrun sends TERM to those still here when the first one leaves
            signal.signal(number, signal.SIG_IGN)
        if fault is None or isinstance(fault, StoppedEarly):
            code, failure = self._agree(0 if fault is None else exit_code(fault)), ""
            said = str(fault or "") if not self.rank else ""
        else:
            fault = self.cause(fault)
            code, said = self._account(fault)
            failure = _kind(fault)
        if said:
            log.critical("%s", said)
        _leave(code, failure)

    def _agree(self, code: int) -> int:
        """All is done or stopped: the others wait until rank 0, which saves, says so; rank 0 until they heard it."""
        assert self.store is not None
        try:
            if self.rank == 0:
                self.store.set("saved", str(code))
                self._wait_for_the_others()
                return code
            told = int(self._wait_for("saved"))
            self.store.add("left", 1)
            return told
        except RuntimeError as fault:
            log.warning("rank %d: rank 0 left without a word (%s)", self.rank, reason(fault))
            return code

    def _account(self, fault: BaseException) -> tuple[int, str]:
        """Exit code and last words after an error, here or on another rank."""
        assert self.store is not None
        code, said = exit_code(fault), ""
        if isinstance(fault, KeyboardInterrupt):
            code = StoppedEarly.exit_code
        where = f"rank {self.rank} of {self.world} on {os.uname().nodename}"
        try:
            if not isinstance(fault, ToldByAnother):
                said = f"{where}: {fault}" if isinstance(fault, HpcgenError) else f"{where}\n{_trace(fault)}"
                number = self.store.add("faults", 1)
                known = self.store.compare_set("sentence", "", str(fault)).decode() == str(fault)
                if isinstance(fault, HpcgenError) and known and number > 1:  # agreed by all: once is enough
                    said = ""
                self.store.set("fault", json.dumps({**self._told(fault), "code": code}))
            if self.rank == 0:
                self.store.set("saved", str(code))
                self._wait_for_the_others()
            else:
                self.store.add("left", 1)
        except RuntimeError as lost:  # the store went down with rank 0
            said = said or f"{where}: {reason(fault)} ({reason(lost)})"
        return code, said

    def _told(self, fault: BaseException) -> dict[str, Any]:
        """What the others get to know of an error."""
        return {"code": exit_code(fault), "said": str(fault), "rank": self.rank, "kind": type(fault).__name__}

    def _leave_with(self, told: dict[str, Any]) -> None:
        """End this process since another rank failed: its main thread may wait for that one in a collective."""
        assert self.store is not None
        self._show_stack(told)
        time.sleep(_SELF_S if self.rank == 0 else 1.0)
        self._note(told)
        with suppress(RuntimeError):
            self.store.add("left", 1)
        log.warning("rank %d of %d: leaving, since rank %d failed", self.rank, self.world, told["rank"])
        _leave(told["code"], told["kind"])

    def _tell_late(self, said: str, rank: int) -> None:
        """End the run since a rank does not come; if that is the first one, every rank does so for itself."""
        assert self.store is not None
        told = {"code": SiteError.exit_code, "said": said, "rank": rank, "kind": SiteError.__name__, "late": True}
        if rank or not self.rank:
            self.store.set("fault", json.dumps(told))
        log.critical("%s", said)
        self._show_stack(told)
        self._note(told)
        if not self.rank:
            self._wait_for_the_others()
        _leave(SiteError.exit_code, SiteError.__name__)

    def _show_stack(self, told: dict[str, Any]) -> None:
        """Where the main thread is, if it is this rank that does not come."""
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        if told.get("late") and told["rank"] == self.rank:
            where = f"rank {self.rank} of {self.world} on {os.uname().nodename}"
            log.critical("%s is here:\n%s", where, "".join(traceback.format_stack(main)).rstrip())

    def _note(self, told: dict[str, Any]) -> None:
        """Into the events of the run, unless the file system, which may be what hangs, does not answer."""
        origin = {"rank": told["rank"], "kind": told["kind"]}
        writer = threading.Thread(target=self.note, args=(told["said"], origin), daemon=True)
        writer.start()
        writer.join(_GRACE_S)

    def _wait_for(self, key: str) -> str:
        """The value of a key, when it is there. Raises RuntimeError. (A wait of the store's own would keep the
        watching thread from it.)"""
        assert self.store is not None
        end = time.monotonic() + self.timeout_s + _LATER_S
        while not self.store.check([key]):
            if time.monotonic() > end:
                raise RuntimeError(f"the store of rank 0 has no {key!r} yet")
            time.sleep(0.03)
        return str(self.store.get(key).decode())

    def _heard(self) -> bool:
        """Whether another rank said why it failed; a moment is left for it to do so."""
        assert self.store is not None
        end = time.monotonic() + 3.0
        while not self.store.check(["fault"]):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def _wait_for_the_others(self) -> None:
        assert self.store is not None
        end = time.monotonic() + _GRACE_S
        while self.store.add("left", 0) < self.world - 1 and time.monotonic() < end:
            time.sleep(0.02)


def find_device(wanted: str, place: Place) -> torch.device:
    """The GPU of this process, or the CPU. Raises SiteError where there are more processes on a node than GPUs."""
    count = usable_gpus(wanted)
    if not count:
        return torch.device("cpu")
    at = 0 if count == 1 else place.local_rank
    if at >= count:
        raise SiteError(
            f"rank {place.rank} is number {at} on its node, which shows {count} GPUs: want one task for each GPU "
            f"(--ntasks-per-node={count})"
        )
    return torch.device("cuda", at)


def join(place: Place, device: torch.device, timeout_s: float) -> Ranks:
    """Meet the other ranks, and prove by a sum that all are there. Raises SiteError.

    Where another one ends meanwhile, by the signal of a preemption say, this process ends, as later does Ranks.
    """
    if place.world == 1:
        return Ranks(place, device)
    timeout = timedelta(seconds=timeout_s)
    try:
        store = meet(place, timeout)
        own = dist.PrefixStore("hpcgen", store)
        own.set_timeout(timeout)
        _refuse_shared_gpus(own, place, device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend, store=dist.PrefixStore("torch", store), rank=place.rank, world_size=place.world,
            timeout=timeout + timedelta(seconds=_LATER_S),
        )  # fmt: skip
        count = torch.ones(1, dtype=torch.float64, device=device)
        dist.all_reduce(count)
    except (RuntimeError, ValueError) as fault:
        mine = f"rank {place.rank} of {place.world}"
        if any(word in str(fault).lower() for word in _BROKEN):
            log.critical("%s: another rank ended while they met (%s)", mine, reason(fault))
            _leave(RankGone.exit_code, RankGone.__name__)
        raise SiteError(f"{mine} could not meet the others within {timeout_s:.0f} s: {reason(fault)}") from fault
    if int(count.item()) != place.world:
        raise SiteError(f"{place.kind} started {place.world} ranks, but {int(count.item())} answer")
    return Ranks(place, device, own, timeout_s)


def _refuse_shared_gpus(store: dist.Store, place: Place, device: torch.device) -> None:
    """Raises SiteError where two ranks would compute on one GPU: NCCL would hang or say something else."""
    mine = f"cpu {place.rank}"
    if device.type == "cuda":
        mine = f"{os.uname().nodename} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"device/{place.rank}", mine)
    try:
        store.wait([f"device/{rank}" for rank in range(place.world)])
    except RuntimeError as fault:
        absent = [rank for rank in range(place.world) if not store.check([f"device/{rank}"])]
        raise RuntimeError(f"ranks that have not come: {', '.join(map(str, absent))}; {reason(fault)}") from fault
    devices = [store.get(f"device/{rank}").decode() for rank in range(place.world)]
    others = [rank for rank, found in enumerate(devices) if found == mine and rank != place.rank]
    if others:
        raise SiteError(f"ranks {place.rank} and {others[0]} share one GPU ({mine}): want one task for each GPU")
    if len({found.startswith("cpu ") for found in devices}) > 1:
        raise SiteError(f"some ranks have a GPU and some have none: {', '.join(devices)}")


def _is_echo(fault: BaseException) -> bool:
    """Whether an error may only be what a collective says when another rank is gone."""
    words = ("gloo", "nccl", "connection", "tcpstore", "broken pipe", "socket")
    return isinstance(fault, RuntimeError) and any(word in str(fault).lower() for word in words)


def _trace(fault: BaseException) -> str:
    return "".join(traceback.format_exception(fault)).rstrip()


def _kind(fault: BaseException) -> str:
    """Of an error, here or, if it was told by another rank, there."""
    return str(fault.origin["kind"]) if isinstance(fault, ToldByAnother) else type(fault).__name__


def _leave(code: int, failure: str) -> None:
    """End this process. failure: kind of the error, if there was one."""
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    if failure != RankGone.__name__:  # else the rank that is gone knows best: srun tells the code that it left with
        tell_script(code)
    os._exit(code)
