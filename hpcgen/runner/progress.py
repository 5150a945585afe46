"""How far the work is: a bar on a terminal, else a line now and then."""

import logging
import sys
import time
from types import TracebackType
from typing import Any

from hpcgen.runner.team import Team

log = logging.getLogger(__name__)
LINE_S = 30.0


class Progress:
    """Shows items done of all ranks; silent without a label and on ranks that share their log with rank 0."""

    def __init__(self, label: str, total: int, done: int, team: Team) -> None:
        self.label, self.total = label, total
        self._first, self._start = done, time.monotonic()
        self._done, self._said = done, self._start
        self._loud = bool(label) and (team.rank == 0 or team.kind == "array")
        self._bar: Any = None
        if self._loud and team.rank == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=label, unit="", dynamic_ncols=True)

    @property
    def rate(self) -> float:
        """Items per second since the start of this launch."""
        return (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def show(self, done: int) -> None:
        """Items done so far, by anybody; cheap enough to be called often."""
        self._done = min(max(done, self._done), self.total)
        if self._bar is not None:
            self._bar.update(self._done - self._bar.n)
        elif self._loud and time.monotonic() - self._said > LINE_S:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        left = (self.total - self._done) / self.rate if self.rate > 0 else float("nan")
        log.info(
            "%s: %d of %d (%.1f %%), %.3g per s, %s left",
            self.label, self._done, self.total, 100 * self._done / max(self.total, 1), self.rate, _span(left),
        )  # fmt: skip

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._loud and time.monotonic() - self._start > 1.0:
            self._say()


def _span(seconds: float) -> str:
    """12 s, 3 min, 4.2 h, 1.5 d, or ? for what is not known."""
    if seconds != seconds:
        return "?"
    for size, unit in ((86400.0, "d"), (3600.0, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
