"""When and what a run saves: checkpoints to go on from, and the averaged weights for those who use the model."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcgen.models.saved import write_model
from hpcgen.train.config import TrainConfig
from hpcgen.train.state import Checkpoints, State


class Saver:
    """Saves for rank 0. All ranks hold the same state, so that the others need not wait.

    best.pt, last.pt: averaged weights of the lowest validation loss and of the newest checkpoint, as
    hpcgen.models.saved.write_model puts them. guard: see Checkpoints.
    """

    def __init__(self, run: Path, config: TrainConfig, facts: dict[str, Any], guard: Callable[[], None]) -> None:
        self.run, self.config, self.facts, self.guard = run, config, facts, guard
        self.checkpoints = Checkpoints(run / "checkpoints", config.keep, guard)
        self.saved_step, self._saved_at = -1, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step` steps."""
        config = self.config
        if step == self.saved_step:
            return False
        if step >= config.steps or (config.save_every_steps and step % config.save_every_steps == 0 and step):
            return True
        return time.monotonic() - self._saved_at >= config.save_every_s > 0

    def save(self, state: State) -> None:
        """Write a checkpoint, unless there is one of this step. Raises StorageError."""
        step = state.progress.step
        if step == self.saved_step:
            return
        told = {"config": dataclasses.asdict(self.config), "data": self.facts["data"], "versions": self.facts}
        self.checkpoints.save({**state.content(), **told}, step)
        self._export("last.pt", state)
        self.saved_step, self._saved_at = step, time.monotonic()

    def save_best(self, state: State) -> None:
        """Write best.pt. Raises StorageError."""
        self._export("best.pt", state)

    def _export(self, name: str, state: State) -> None:
        progress = state.progress
        facts = {**self.facts, "step": progress.step, "crystals": progress.crystals, "epoch": progress.epoch,
                 "validation_loss": progress.best if progress.best_step == progress.step else None,
                 "training": dataclasses.asdict(self.config)}  # fmt: skip
        settings = dataclasses.asdict(self.config.settings)
        weights = state.ema.state_dict()
        write_model(self.run / name, self.config.model, settings, weights, facts, before_rename=self.guard)
