"""A small model and store for the tests of training, and their command: `python train_jobs.py key=value …`."""

import ctypes
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from store_rows import HEAD, rows
from torch import Tensor, nn

from hpcgen.cli import guarded
from hpcgen.diffusion.draw import Draw, Purpose
from hpcgen.errors import InputError
from hpcgen.files import read_json_lines
from hpcgen.models.batch import Batch
from hpcgen.models.saved import MODEL, read_saved
from hpcgen.store.read import Store
from hpcgen.store.write import write_store
from hpcgen.train import loop
from hpcgen.train.config import BatchConfig, TrainConfig, load
from hpcgen.train.state import Progress, read_checkpoint

HERE = Path(__file__).resolve().parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


@dataclass
class ToyConfig:
    """A network of a few layers that learns the cells of crystals."""

    width: int = 24
    conditions: list[str] = field(default_factory=list)


@dataclass
class Mischief:
    """What the toy does beside learning; from the variable TOY, so that it is no setting of the run."""

    bad_from: int = -1  # the loss is NaN in these steps,
    bad_to: int = -1
    bad_sample: int = -1  # where this crystal is in the batch; -1: always
    signal_at: int = -1  # a signal to this process in this step
    signal: int = int(signal.SIGTERM)
    rank: int = -1  # to this rank; -1: all ranks
    broken_at: int = -1  # an InputError in this step on that rank
    hang_at: int = -1  # in this step that rank hangs,
    hang: str = "sleep"  # or "lock": with the interpreter's lock, as in HDF5
    step_s: float = 0.0
    trace: str = ""  # folder: one line for each share


@dataclass
class ToyTrainConfig(TrainConfig):
    """As TrainConfig, with a toy."""

    model: str = "toy"
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(crystals=8))
    steps: int = 12
    lr: float = 1e-2
    warmup: int = 2
    ema: float = 0.9
    log_every: int = 5
    validate_every: int = 4
    save_every_s: float = 0
    bucket_cap_mb: float = 0.002
    tensorboard: bool = False
    threads: int = 1
    timeout_s: float = 60.0
    toy: ToyConfig = field(default_factory=ToyConfig)


class Toy(nn.Module):
    """Says noise on the cell from the noised cell."""

    Config = ToyConfig
    mean: Tensor

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.mischief = Mischief(**json.loads(os.environ.get("TOY", "{}")))
        inner = [nn.Linear(10 + 2 * len(config.conditions), width), nn.SiLU()]
        inner += [nn.Linear(width, width), nn.SiLU(), nn.LayerNorm(width), nn.Linear(width, 9)]
        self.net = nn.Sequential(*inner)
        self.register_buffer("mean", torch.zeros(3, 3))

    @classmethod
    def fitted(cls, config: ToyConfig, store: Store) -> "Toy":
        model = cls(config)
        lattices = torch.cat([part.crystals.lattice for part in store.iter_rows()])
        model.mean.copy_(lattices.mean(0))
        return model

    def forward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        self._misbehave(batch)
        noise = draw.normal(Purpose.LATTICE, batch.index, batch.step, channels=9)
        t = draw.uniform(Purpose.TIME, batch.index, batch.step)
        told = [values for name in self.config.conditions for values in (
            batch.conditions[name].nan_to_num()[:, None], batch.conditions[name].isnan().float()[:, None])]  # fmt: skip
        clean = (batch.crystals.lattice - self.mean).flatten(1)
        said = self.net(torch.cat([clean + t * noise, t, *told], 1))
        error = (said - noise).square().mean(1)
        if self.training and self.mischief.bad_from <= batch.step < self.mischief.bad_to:
            sample = self.mischief.bad_sample
            error = error + torch.where((batch.index == sample) | (sample < 0), torch.nan, 0.0)
        return {"loss": error.mean(), "first": error.detach().mean()}

    def _misbehave(self, batch: Batch) -> None:
        plan, rank = self.mischief, int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
        if not self.training:
            return
        if plan.trace:
            line = json.dumps({"step": batch.step, "index": batch.index.tolist(), "pid": os.getpid()})
            with (Path(plan.trace) / f"{rank}.jsonl").open("a") as file:
                file.write(line + "\n")
        if batch.step == plan.signal_at and plan.rank in (-1, rank):
            os.kill(os.getpid(), plan.signal)
        if batch.step == plan.broken_at and plan.rank in (-1, rank):
            raise InputError("a broken shard")
        if batch.step == plan.hang_at and plan.rank in (-1, rank):
            {"sleep": time.sleep, "lock": ctypes.PyDLL(None).sleep}[plan.hang](600)
        time.sleep(plan.step_s)


def make_store(folder: Path, n: int = 60) -> Path:
    """n crystals to train on, 20 to validate with, with the columns of store_rows."""
    write_store(folder, HEAD, [("train", rows(n)), ("val", rows(20, 2, first=900))], shard_rows=25)
    return folder


# ---- for the tests ---------------------------------------------------------------------------------------------------


def run(store: Path, out: Path, *words: str, toy: dict[str, Any] | None = None) -> Progress:
    """Train in this process."""
    before = os.environ.get("TOY")
    os.environ["TOY"] = json.dumps(toy or {})
    try:
        return loop.train(load(ToyTrainConfig, None, [f"store={store}", f"out={out}", *words]), Toy)
    finally:
        os.environ.pop("TOY") if before is None else os.environ.update(TOY=before)


def start(world: int, store: Path, out: Path, *words: str, toy: dict[str, Any] | None = None, **env: str) -> list:
    """Start `world` ranks as srun does."""
    job = {"SLURM_JOB_ID": str(random.SystemRandom().randrange(10**7)), "SLURM_STEP_ID": "0",
           "SLURM_STEP_NUM_TASKS": str(world), "SLURM_STEP_NUM_NODES": "1"}  # fmt: skip
    command = [sys.executable, str(HERE / "train_jobs.py"), f"store={store}", f"out={out}", *words]
    ranks = []
    for rank in range(world):
        own = {} if world == 1 else {**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        told = {**ENV, "TOY": json.dumps(toy or {}), **own, **env}
        ranks.append(subprocess.Popen(command, env=told, stderr=subprocess.PIPE, text=True))
    return ranks


def ended(ranks: list) -> tuple[list[int], str]:
    """Exit codes, and what all said."""
    said = "".join(rank.communicate(timeout=240)[1] for rank in ranks)
    return [rank.returncode for rank in ranks], said


def job(world: int, *arguments: Any, **more: Any) -> tuple[list[int], str]:
    return ended(start(world, *arguments, **more))


def newest(out: Path) -> dict[str, Any]:
    return read_checkpoint(sorted((out / "checkpoints").glob("step-*.pt"))[-1])


def tensors(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights, averaged weights and the optimiser's moments."""
    found = {f"{part} {name}": value for part in ("model", "ema") for name, value in content[part].items()}
    for number, moments in content["optimiser"]["state"].items():
        found |= {f"{number} {name}": value for name, value in moments.items()}
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: everything in the newest checkpoint, the exported weights, and the numbers told on the way."""
    first, second = newest(one), newest(other)
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys() and len(a) > 20
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert first["progress"] == second["progress"]
    for name in ("best.pt", "last.pt"):
        x, y = read_saved(one / name, MODEL)["weights"], read_saved(other / name, MODEL)["weights"]
        assert all(torch.equal(x[key], y[key]) for key in x | y)
    assert numbers(one) == numbers(other)


def numbers(out: Path) -> list[dict[str, Any]]:
    lines = read_json_lines(out / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("time", "crystals_per_s")} for line in lines]


def main(words: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def run() -> int:
        if os.environ.get("UNSETTLED"):  # what the two passes before the first step are for
            loop._settle_buckets = lambda *some: None
        schema = TrainConfig if "model=autoperi" in words else ToyTrainConfig
        loop.train(load(schema, None, words), None if schema is TrainConfig else Toy)
        return 0

    return guarded(run, resumable=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
