"""A flag that signals set. Whoever works looks at it between two steps."""

import logging
import math
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from hpcgen.errors import StoppedEarly

log = logging.getLogger(__name__)
OUT_OF_TIME = "the time of the job is nearly up"  # a reason to stop
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopFlag:
    """`with StopFlag() as stop:` INT, TERM and USR2 set it; a second INT does what it did before.

    It may also be set by hand, and used without `with`, as a flag that no signal sets.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.reason is not None

    def set(self, reason: str) -> None:
        """Ask for a stop; the first reason counts."""
        self.reason = self.reason or reason

    def check(self) -> None:
        """Raise StoppedEarly if a stop was asked for."""
        if self.reason is not None:
            raise StoppedEarly(f"stopped early ({self.reason}); the same command goes on from here")

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.set(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, self._before.get(number) or signal.SIG_DFL)


def time_left(env: Mapping[str, str]) -> float:
    """Seconds until Slurm ends this job; inf where that is not known, or was later put off."""
    for name in ("SLURM_JOB_END_TIME", "HPCGEN_JOB_END"):  # seconds since the epoch
        with suppress(ValueError):
            left = float(env.get(name, "")) - time.time()
            return left if left > 0 else math.inf
    return math.inf
