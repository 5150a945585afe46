"""A thread of every rank that sees what its main thread cannot: that another rank failed, or that one does not come.

The main thread may wait in a collective for ever. Every rank tells the store what it does and that it lives; the first
one compares.
"""

import faulthandler
import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from hpcgen.launch.place import Place

DOING = ("starting", "validating", "saving", "reading", "computing", "summing")  # in the order of a step
_LOOK_S = 1.0
_FROZEN_S = 5.0  # longer than a look for so much: this process was stopped itself
_SILENT_S = 10.0  # without a beat for so long a rank is dead or stopped, if a limit as short does not end before
Doing = tuple[int, str]  # step, one of DOING


@dataclass
class Seen:
    """The newest sign of life of a rank, and since when there is no newer one."""

    beat: int
    doing: Doing
    host: str
    beat_at: float
    moved_at: float


class Watch:
    """Looks once a second.

    on_fault: called with what a failed rank told of itself. on_late: with a sentence and a rank, where for `limit_s` no
    rank got on though they are not all at the same thing (the first rank sees that), or where the first rank did not
    answer (the others see that).
    """

    def __init__(
        self, store: dist.Store, place: Place, limit_s: float, on_fault: Callable[[dict[str, Any]], None],
        on_late: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        self.doing: Doing = (-1, DOING[0])
        self._store, self._place, self._limit_s = store, place, limit_s
        self._on_fault, self._on_late = on_fault, on_late
        self._beats, self._seen = 0, dict[int, Seen]()
        self._first_beat, self._answered_at = 0, time.monotonic()
        self._tell()
        threading.Thread(target=self._run, name="ranks", daemon=True).start()
        if place.rank:
            threading.Thread(target=self._watch_first, name="first rank", daemon=True).start()

    def _run(self) -> None:
        passed_at = time.monotonic()
        try:
            while not self._store.check(["fault"]):
                time.sleep(_LOOK_S)
                self._tell()
                if self._place.rank:
                    self._look_at_first()
                if _was_frozen(passed_at):
                    self._seen.clear()
                passed_at = time.monotonic()
                if self._place.rank == 0 and (late := self._late()):
                    self._on_late(*late)
            self._on_fault(json.loads(self._store.get("fault")))
        except RuntimeError:  # no store, no first rank: the collectives say so as well
            self._answered_at = math.inf
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _watch_first(self) -> None:
        """A store whose process is stopped does not answer, and who asks it waits for ever."""
        passed_at = time.monotonic()
        while (silent_s := time.monotonic() - self._answered_at) < self._limit_s:
            time.sleep(_LOOK_S)
            if _was_frozen(passed_at):
                self._answered_at = max(self._answered_at, time.monotonic())
            passed_at = time.monotonic()
        why = "killed, stopped, or its node is lost"
        self._on_late(f"rank 0 of {self._place.world} does not answer for {silent_s:.0f} s; {why}", 0)

    def _look_at_first(self) -> None:
        """The store may be kept by torchrun instead: it is the beat of the first rank that counts."""
        if self._store.check(["beat/0"]) and (beat := json.loads(self._store.get("beat/0"))[0]) != self._first_beat:
            self._first_beat, self._answered_at = beat, time.monotonic()

    def _tell(self) -> None:
        self._beats += 1
        # a main thread that hangs with the interpreter's lock (HDF5 in a file system that hangs) ends these beats: then
        # its stack is shown all the same, before the others give up
        faulthandler.dump_traceback_later(self._limit_s / 2)
        self._store.set(f"beat/{self._place.rank}", json.dumps([self._beats, *self.doing, os.uname().nodename]))

    def _late(self) -> tuple[str, int] | None:
        """A sentence and the rank it is about, once nothing has moved for too long."""
        now = time.monotonic()
        for rank in range(self._place.world):
            if not self._store.check([f"beat/{rank}"]):
                return None  # still on its way here
            beat, step, name, host = json.loads(self._store.get(f"beat/{rank}"))
            old, doing = self._seen.get(rank), (step, name)
            if old is None:
                self._seen[rank] = Seen(beat, doing, host, now, now)
            elif beat != old.beat:
                moved_at = old.moved_at if doing == old.doing else now
                self._seen[rank] = Seen(beat, doing, host, now, moved_at)
        still_s = now - max(seen.moved_at for seen in self._seen.values())
        if still_s < self._limit_s:
            return None
        return name_late(self._seen, now, still_s, min(_SILENT_S, self._limit_s / 2))


def name_late(seen: dict[int, Seen], now: float, still_s: float, silent_s: float) -> tuple[str, int] | None:
    """Who keeps the others waiting; None where all live and are at the same thing."""
    late = [rank for rank, of in seen.items() if now - of.beat_at > silent_s]
    if late:
        first = seen[late[0]]
        why = f"no sign of life for {now - first.beat_at:.0f} s; killed, stopped, or its node hangs"
    else:
        place = {rank: (of.doing[0], DOING.index(of.doing[1])) for rank, of in seen.items()}
        late = [rank for rank, at in place.items() if at == min(place.values())]
        first = seen[late[0]]
        if len(late) == len(seen):
            return None
        why = f"{first.doing[1]}{f' in step {first.doing[0]}' if first.doing[0] >= 0 else ''} for {still_s:.0f} s"
    more = f", and {len(late) - 1} more ({', '.join(map(str, late[1:9]))}{', …' * (len(late) > 9)})"
    told = f"rank {late[0]} of {len(seen)} on {first.host} keeps the others waiting: {why}"
    return told + (more if len(late) > 1 else ""), late[0]


def _was_frozen(passed_at: float) -> bool:
    """Whether this process itself was stopped since: the whole job may have been suspended, and nobody is late."""
    return time.monotonic() - passed_at > _LOOK_S + _FROZEN_S
