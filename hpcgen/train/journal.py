"""What a run tells: metrics.jsonl and TensorBoard files for machines, a bar or a line now and then for people."""

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hpcgen.files import append_json_line, read_json_lines, storage_faults, write_whole
from hpcgen.train.config import TrainConfig
from hpcgen.train.saving import Saver
from hpcgen.train.state import Progress

log = logging.getLogger(__name__)
LINE_S = 30.0


class Journal:
    """Writes for rank 0, which has the saver; on the others it is silent."""

    def __init__(self, saver: Saver | None, config: TrainConfig, progress: Progress) -> None:
        self._file = saver.run / "metrics.jsonl" if saver else None
        self._guard = saver.guard if saver else lambda: None
        self._total, self._start, self._first = config.steps, time.monotonic(), progress.step
        self._crystals, self._said = progress.crystals, self._start
        self._window = (self._start, progress.crystals)
        self._bar: Any = None
        self._board: Any = None
        if self._file is None:
            return
        _cut(self._file, progress.step)
        if config.tensorboard:
            self._board = _board(self._file.parent / "tensorboard", progress.step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=config.steps, initial=progress.step, desc="train", unit="step", dynamic_ncols=True)

    def write(self, kind: str, step: int, told: Mapping[str, float | int]) -> None:
        """One line of numbers; one that is not finite is null. Raises StorageError, also where the lease is lost."""
        if self._file is None:
            return
        self._guard()
        line = {name: value if math.isfinite(value) else None for name, value in told.items()}
        append_json_line(self._file, kind=kind, step=step, **line)
        if self._board is not None:
            with storage_faults(self._file.parent):
                for name, value in told.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)
                self._board.flush()

    def rate(self, progress: Progress) -> float:
        """Structures per second since the last time this was asked."""
        now, (then, before) = time.monotonic(), self._window
        self._window = (now, progress.crystals)
        return (progress.crystals - before) / max(now - then, 1e-9)

    def show(self, progress: Progress, loss: float) -> None:
        """Where the run stands, for people; cheap enough for every step."""
        now = time.monotonic()
        if self._file is None or (self._bar is None and now - self._said < LINE_S):
            return
        span = max(now - self._start, 1e-9)
        speed = (progress.crystals - self._crystals) / span
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}, {speed:.3g} structures/s", refresh=False)
            self._bar.update(progress.step - self._bar.n)
            return
        self._said = now
        left = (self._total - progress.step) * span / max(progress.step - self._first, 1)
        log.info(
            "step %d of %d (%.1f %%), loss %.4g, %.3g structures/s, %.0f min left",
            progress.step, self._total, 100 * progress.step / self._total, loss, speed, left / 60,
        )  # fmt: skip

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        for open_one in (self._bar, self._board):
            if open_one is not None:
                open_one.close()


def _cut(file: Path, step: int) -> None:
    """Leave out what was written after the checkpoint that the run goes on from: it comes again."""
    lines = read_json_lines(file)
    kept = [line for line in lines if line.get("step", 0) <= step]
    if len(kept) < len(lines):
        write_whole(file, "".join(json.dumps(line) + "\n" for line in kept))


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("no TensorBoard files: the package tensorboard is not installed (metrics.jsonl has the same numbers)")
        return None
    with storage_faults(folder):
        return SummaryWriter(str(folder), purge_step=step + 1)
