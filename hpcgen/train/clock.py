"""Stops a run while there is time left to save."""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hpcgen.runner.stop import OUT_OF_TIME, time_left

_RECENT = 200  # steps
_LEAVE_S = 5.0  # for all ranks to leave


class Clock:
    """Of the first rank: when a limit of its own is up (limit_s after `started`, 0: none) and when the job's time is.

    The job's end is left a lead of twice the slowest of the last steps, save and validation, as measured.
    """

    def __init__(self, limit_s: float, started: float, env: Mapping[str, str]) -> None:
        self._limit_s, self._started, self._env = limit_s or math.inf, started, env
        self._steps: deque[float] = deque(maxlen=_RECENT)
        self._slowest: dict[str, float] = {}
        self._asked_at, self._apart = math.nan, 0.0

    @property
    def lead_s(self) -> float:
        """Before the end of the job."""
        return 2 * (max(self._steps, default=0.0) + sum(self._slowest.values())) + _LEAVE_S

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Of a save or a validation, apart from the step it follows."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._slowest[what] = max(self._slowest.get(what, 0.0), seconds)
        self._apart += seconds

    def reason(self) -> str | None:
        """Why the run is to stop now, if it is. To be asked once in each step."""
        now = time.monotonic()
        if not math.isnan(self._asked_at):  # the first step compiles
            self._steps.append(now - self._asked_at - self._apart)
        self._asked_at, self._apart = now, 0.0
        if now - self._started >= self._limit_s:
            return "time limit"
        return OUT_OF_TIME if time_left(self._env) < self.lead_s else None
