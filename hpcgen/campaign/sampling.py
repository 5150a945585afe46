"""A loaded model that samples pieces, the same bits whatever else goes on: one thread, or deterministic kernels."""

import ctypes
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcgen.campaign.config import CampaignConfig
from hpcgen.campaign.pieces import Piece, Sampled
from hpcgen.campaign.targets import Targets
from hpcgen.diffusion.draw import Draw, Purpose
from hpcgen.errors import InputError, UsageError
from hpcgen.models.load import is_out_of_memory, load_model, sampling_device
from hpcgen.models.request import Request
from hpcgen.store.layout import sha256_of

log = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, see malloc.h
_loaded: dict[Any, Any] = {}  # the last model of this process: one load, however many blocks


class Sampler:
    """The model of a campaign on the device of this process. seconds: spent in the model so far."""

    def __init__(self, config: CampaignConfig, targets: Targets | None) -> None:
        self.config, self.targets, self.draw = config, targets, Draw(config.seed)
        self.device = sampling_device(config.device)
        self.seconds = 0.0
        _settle(self.device)
        self.model, _, sha256 = load_once(Path(config.checkpoint), self.device)
        if sha256 != config.checkpoint_sha256:
            raise UsageError(
                f"{config.checkpoint}: was changed while the campaign ran; it goes on with the old one only"
            )
        self._sizes = None if targets is not None else size_chances(self.model.size_counts.cpu().numpy(), config)

    def num_atoms(self, index: np.ndarray) -> np.ndarray:
        """Of the crystals at `index`: those of their formulas, or drawn. (B,) -> (B,) int64."""
        if self.targets is not None:
            return self.targets.num_atoms(index)
        assert self._sizes is not None
        chance = self.draw.uniform(Purpose.SIZE, torch.from_numpy(index), dtype=torch.float64)[:, 0].numpy()
        return np.searchsorted(self._sizes, chance, side="right")

    def sample(self, piece: Piece, go_on: Callable[[], None]) -> Sampled:
        """The crystals of a piece; go_on is called before each step and may raise. Those without memory have none."""
        began = time.perf_counter()
        try:
            return self._within_memory(piece.index, piece.num_atoms, piece.length, go_on, halved=False)
        finally:
            self.seconds += time.perf_counter() - began

    def _within_memory(
        self, index: np.ndarray, num_atoms: np.ndarray, length: int, go_on: Callable[[], None], *, halved: bool
    ) -> Sampled:
        """A piece at once, or by halves where memory does not hold it."""
        try:
            return Sampled.of(index, self._crystals(index, num_atoms, length, go_on), halved)
        except (RuntimeError, MemoryError) as fault:
            if not is_out_of_memory(fault):
                raise
        if self.device.type == "cuda":  # outside of `except`, which holds on to the tensors
            torch.cuda.empty_cache()
        if len(index) == 1:
            return Sampled.none(index, "out-of-memory")
        log.warning("out of memory with %d crystals of up to %d atoms: halved", len(index), length)
        half = len(index) // 2
        return Sampled.join([
            self._within_memory(index[part], num_atoms[part], length, go_on, halved=True)
            for part in (slice(half), slice(half, None))
        ])  # fmt: skip

    def _crystals(self, index: np.ndarray, num_atoms: np.ndarray, length: int, go_on: Callable[[], None]) -> Any:
        config = self.config
        species = np.zeros((len(index), length), dtype=np.int64)
        if self.targets is not None:
            species = self.targets.species(index, length)
        request = Request(
            self._there(index),
            self._there(num_atoms),
            self._there(species),
            conditions=dict(config.conditions),
            elements=config.system(),
            steps=config.steps,
            churn=config.churn,
            speed=config.speed,
            guidance=config.guidance,
        )
        with _precision(config, self.device):
            return self.model.sample(request, self.draw, go_on).to(dtype=torch.float32)

    def _there(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def size_chances(counts: np.ndarray, config: CampaignConfig) -> np.ndarray:
    """Chance that a crystal has at most 0, 1, ... atoms: as in training, within what is asked for. float64

    Where no training crystal has a size asked for, all of them are equally likely. Raises InputError where the
    checkpoint knows no sizes and none is asked for.
    """
    bounds = config.sizes()
    if bounds is not None:
        least, most = bounds
        wanted = np.zeros(most + 1)
        wanted[least:] = 1
        within = np.zeros(most + 1)
        within[: len(counts)] = counts[: most + 1]
        counts = within * wanted if (within * wanted).any() else wanted
    total = np.cumsum(counts.astype(np.float64))
    if not total[-1] > 0:
        raise InputError(f"{config.checkpoint}: knows no number of atoms of training crystals: want --num-atoms")
    return total / total[-1]


def load_once(path: Path, device: torch.device) -> tuple[Any, dict[str, Any], str]:
    """The model of a checkpoint, what that says of itself, and its sha256: read once by each process.

    Raises InputError, StorageError.
    """
    there = path.stat() if path.is_file() else None
    key = (path, device, there and (there.st_mtime_ns, there.st_size))
    if key not in _loaded:
        _loaded.clear()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # before anything is put there: the other GPUs of a node are other ranks'
        model, facts = load_model(path, device)
        _loaded[key] = model, facts, sha256_of(path)
    return _loaded[key]


def _settle(device: torch.device) -> None:
    """What last bits depend on, beside the shapes."""
    if device.type == "cpu":
        torch.set_num_threads(1)
        _keep_freed_memory()
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
    torch.backends.cudnn.benchmark = False


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: else each call of the network fetches thousands of pages anew."""
    with suppress(OSError, AttributeError, TypeError):  # another library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**30)
        mallopt(_MMAP_THRESHOLD, 2**25)  # the largest that may be


def _precision(config: CampaignConfig, device: torch.device) -> AbstractContextManager[Any]:
    dtype = _DTYPES.get(config.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)
