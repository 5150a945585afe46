"""All that a run goes on from: weights, their average, optimiser, place in the data; and the files it is kept in."""

import dataclasses
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcgen.errors import InputError, UsageError
from hpcgen.files import make_folder
from hpcgen.models.saved import MODEL, read_saved, write_saved
from hpcgen.store.layout import sha256_of
from hpcgen.train.config import TrainConfig, changed, flat

log = logging.getLogger(__name__)
KIND = "hpcgen training"
_NAME = re.compile(r"step-(\d+)\.pt")


@dataclass
class Progress:
    """Where a run stands. Numbers and dicts only: it is part of the checkpoint."""

    step: int = 0  # steps done
    epoch: int = 0
    offset: int = 0  # global batches of the epoch done
    crystals: int = 0  # seen, in all
    validated: int = 0  # step of the last validation
    best: float = float("inf")  # validation loss
    best_step: int = 0
    bad: int = 0  # steps left out for a loss or gradient that was not finite
    bad_in_row: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of what the next line of metrics.jsonl averages


@dataclass
class State:
    """What training changes."""

    model: nn.Module
    ema: nn.Module  # the same with averaged weights
    optimiser: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress

    def content(self) -> dict[str, Any]:
        """Tensors, numbers, strings and dicts."""
        return {
            "model": self.model.state_dict(), "ema": self.ema.state_dict(), "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(), "progress": dataclasses.asdict(self.progress),
        }  # fmt: skip

    def load(self, content: dict[str, Any]) -> None:
        """Take over what `content` gave."""
        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        groups = self.optimiser.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        self.optimiser.load_state_dict(content["optimiser"])
        for group, now in zip(self.optimiser.param_groups, settings, strict=True):
            group.update(now)  # what was accepted may differ from what was saved
        if self.scaler.is_enabled() and content["scaler"]:
            self.scaler.load_state_dict(content["scaler"])
        self.progress = Progress(**content["progress"])


@torch.no_grad()
def average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights towards those of the model: ema ← decay · ema + (1 - decay) · model; buffers are copied."""
    kept: list[Tensor] = list(ema.parameters())
    new = [parameter.detach() for parameter in model.parameters()]
    torch._foreach_lerp_(kept, new, 1.0 - decay)
    for old, buffer in zip(ema.buffers(), model.buffers(), strict=True):
        old.copy_(buffer)


class Checkpoints:
    """The files `step-<n>.pt` of one folder: the newest `keep`, each whole.

    guard: called before a file appears; raises where the folder belongs to another run by now.
    """

    def __init__(self, folder: Path, keep: int, guard: Callable[[], None] = lambda: None) -> None:
        self.folder, self.keep, self.guard = folder, keep, guard

    def listed(self) -> list[tuple[int, Path]]:
        """Steps and files, the newest first, whether or not they can be read."""
        if not self.folder.is_dir():
            return []
        named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return sorted(((int(name.group(1)), path) for name, path in named if name), reverse=True)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its content; those passed over are named in the log."""
        for _, path in self.listed():
            try:
                return path, read_checkpoint(path)
            except InputError as fault:
                log.warning("%s; the next older checkpoint is taken", fault)
        return None

    def save(self, content: dict[str, Any], step: int) -> Path:
        """Write a checkpoint and let the oldest go. Raises StorageError; the earlier ones are then all there."""
        path = make_folder(self.folder) / f"step-{step:08d}.pt"
        write_saved(path, KIND, content, before_rename=self.guard)
        for _, old in [(at, file) for at, file in self.listed() if at <= step][self.keep :]:
            with suppress(OSError):
                old.unlink()
        return path


def read_checkpoint(path: Path, sha256: str | None = None) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Raises InputError, StorageError."""
    if sha256 is not None and path.is_file() and sha256_of(path) != sha256:
        raise InputError(f"{path}: other bytes here than where rank 0 runs; is the folder shared by all nodes?")
    content = read_saved(path, KIND)
    lacks = {"model", "ema", "optimiser", "scaler", "progress", "config", "data"} - content.keys()
    if lacks:
        raise InputError(f"{path}: not a whole checkpoint (lacks {', '.join(sorted(lacks))})")
    return content


def refuse_changes(path: Path, content: dict[str, Any], config: TrainConfig, data: str) -> list[str]:
    """The accepted changes since a checkpoint was written. Raises UsageError for one that is not accepted.

    data: hash of the training crystals.
    """
    told = changed(content["config"], config)
    if content["data"] != data:
        told["store"] = (content["data"][:12] + "…", data[:12] + "… (hash of its training crystals)")
    if "model" in told:
        raise UsageError(f"{path}: made with model = {told['model'][0]}, now {config.model}; want another out")
    if "muon" in told and 0 in told["muon"]:
        old, new = told["muon"]
        raise UsageError(
            f"{path}: made with muon = {old:g}, now {new:g}: its optimiser remembers other things; want another out, "
            "which may begin with these weights (init=)"
        )
    for name, (old, new) in told.items():
        if name not in config.accept:
            raise UsageError(
                f"{path}: made with {name} = {old}, now {new}: take another out for a new run, "
                f"or add accept=[{','.join(told)}] to go on with the change"
            )
    return [f"{name}: {old} -> {new}" for name, (old, new) in told.items()]


def begin_with(path: Path, config: TrainConfig, state: State, maker: str = "") -> None:
    """Take the weights of a trained model, and the scales it took from its own store, into a new run.

    maker: hash of the model that made the crystals of the store, which that of a rectified training has to be.
    Raises InputError for a file that holds no such model; UsageError where the model's settings differ, unaccepted.
    """
    content = read_saved(path, MODEL)
    if config.rectify and sha256_of(path) != maker:
        raise InputError(f"{path}: rectify = true: is not the model that made {config.store}, want that one")
    if content["model"] != config.model:
        raise InputError(f"{path}: holds a model {content['model']!r}, want {config.model!r}")
    old, new = flat(content["config"]), flat(dataclasses.asdict(config.settings))
    differing = [name for name in new if name in old and old[name] != new[name]]
    for name in differing:
        if f"{config.model}.{name}" not in config.accept:
            words = ",".join(f"{config.model}.{each}" for each in differing)
            raise UsageError(
                f"{path}: made with {config.model}.{name} = {old[name]}, now {new[name]}: "
                f"add accept=[{words}] to begin with it all the same"
            )
    tables = () if config.rectify else getattr(state.model, "TABLES", ())
    own = {name: state.model.state_dict()[name] for name in tables}
    weights = {**content["weights"], **own}
    same_shapes(path, weights, state.model)
    state.model.load_state_dict(weights)
    state.ema.load_state_dict(weights)
    log.info("%s: beginning with its weights", path)


def same_shapes(path: Path, kept: dict[str, Tensor], model: nn.Module) -> None:
    """Raises InputError where weights do not fit a model."""
    own = model.state_dict()
    for name in sorted(own.keys() ^ kept.keys()):
        raise InputError(f"{path}: {name} is {'lacking' if name in own else 'unknown to the model'}")
    for name, tensor in own.items():
        if kept[name].shape != tensor.shape:
            raise InputError(f"{path}: {name} is {tuple(kept[name].shape)}, the model's is {tuple(tensor.shape)}")
