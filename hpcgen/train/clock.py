"""Stops a run while there is time left to save."""

import math
import time
from collections import deque
from collections.abc import Mapping

from hpcgen.runner.stop import OUT_OF_TIME, time_left

_RECENT = 2000  # passes of the loop, a validation among them if there are any
_LEAVE_S = 5.0  # for all ranks to leave


class Clock:
    """Of the first rank: when a limit of its own is up (limit_s after `started`, 0: none) and when the job's time is.

    The job's end is left a lead of twice the slowest of the last passes of the loop and the slowest save, as measured.
    """

    def __init__(self, limit_s: float, started: float, env: Mapping[str, str]) -> None:
        self._limit_s, self._started, self._env = limit_s or math.inf, started, env
        self._passes: deque[float] = deque(maxlen=_RECENT)
        self._save_s, self._passed_at = 0.0, math.nan

    @property
    def lead_s(self) -> float:
        """Before the end of the job."""
        return 2 * (max(self._passes, default=0.0) + self._save_s) + _LEAVE_S

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self._save_s = max(self._save_s, seconds)

    def reason(self) -> str | None:
        """Why the run is to stop now, if it is. To be asked once in each pass of the loop."""
        now = time.monotonic()
        if not math.isnan(self._passed_at):  # the first pass compiles
            self._passes.append(now - self._passed_at)
        self._passed_at = now
        if now - self._started >= self._limit_s:
            return "time limit"
        return OUT_OF_TIME if time_left(self._env) < self.lead_s else None
