"""Training structures/s: one process against atoms per crystal, whole trainings on several ranks, the loader alone.

`pytest -m bench -s` this file, on a GPU if there is one. The network is that of the packaged checkpoint on a CPU, that
of configs/autoperi_mp20.yaml on a GPU; the crystals are random ones, as no speed depends on what they are.
"""

import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_jobs import ENV

from hpcgen.crystal.crystals import Crystals
from hpcgen.diffusion.draw import Draw
from hpcgen.models.batch import Batch
from hpcgen.models.registry import model_named
from hpcgen.store.layout import Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Rows
from hpcgen.store.write import write_store
from hpcgen.train.config import TrainConfig, load
from hpcgen.train.data import groups, open_data

ROOT = Path(__file__).resolve().parent.parent
KIND = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = ROOT / "configs" / {"cpu": "autoperi_packaged.yaml", "cuda": "autoperi_mp20.yaml"}[KIND]
PRECISION = {"cpu": torch.float32, "cuda": torch.bfloat16}[KIND]
PAIRS = {"cpu": 2**14, "cuda": 2**20}[KIND]  # of atoms in a batch of one size
SPLIT = ("accumulate=4", "batch.crystals=32")  # as many crystals a step, summed over the ranks once
WHOLE = {
    "cpu": [(1, ()), (2, ()), (4, ()), (2, SPLIT), (2, ("muon=3",)), (1, ("compile=true",)), (2, ("compile=true",))],
    "cuda": [(world, (word,)) for world in dict.fromkeys((1, torch.cuda.device_count())) for word in (
        "compile=false", "compile=true", "muon=3")],
}  # fmt: skip
SIZES = (5, 10, 20, 52, 100)
STEPS = 60  # of a whole training, behind as many to warm up
VOLUME = 20.0  # Å³ for each atom

pytestmark = [pytest.mark.bench, pytest.mark.usefixtures("threads_restored")]


def random_crystals(num_atoms: torch.Tensor) -> Crystals:
    make = torch.Generator().manual_seed(0)
    atoms, edge = int(num_atoms.sum()), (VOLUME * num_atoms.double()) ** (1 / 3)
    frac = torch.rand(atoms, 3, generator=make, dtype=torch.float64)
    lattice = edge[:, None, None] * torch.eye(3, dtype=torch.float64)
    return Crystals(frac, lattice, torch.randint(1, 95, (atoms,), generator=make), num_atoms)


def store(path: Path, num_atoms: torch.Tensor) -> Path:
    rows = Rows(random_crystals(num_atoms), [f"r{k}" for k in range(len(num_atoms))], {})
    write_store(path, Head("bench", {}, {}), [("train", rows)])
    return path


def settings(store: Path, out: Path, *words: str) -> TrainConfig:
    own = [f"store={store}", f"out={out}", "conditions=[]", "validate_every=0", "autoperi.max_atoms=100", *words]
    return load(TrainConfig, CONFIG, own)


def seconds(call, least: float = 2.0) -> float:
    """Of one call, after one to warm up."""

    def done() -> float:
        if KIND == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    call()
    began, count = done(), 0
    while (now := done()) - began < least or count < 3:
        call()
        count += 1
    return (now - began) / count


def matrix_peak(dtype: torch.dtype = PRECISION) -> float:
    """Of the product of two large matrices. Operations/s"""
    n = {"cpu": 768, "cuda": 8192}[KIND]
    a, b = (torch.randn(n, n, device=KIND, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)


def test_speed_against_atoms_per_crystal(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    peak = matrix_peak()
    print(f"\n{torch.cuda.get_device_name() if KIND == 'cuda' else 'one core'}, {PRECISION}, not compiled; matrix peak "
          f"{peak / 1e9:,.0f} GFLOP/s")  # fmt: skip
    print("| atoms | crystals a batch | crystals/s | GFLOP a crystal | share of the peak |\n" + "| --- " * 5 + "|")
    for atoms in SIZES:
        count = max(PAIRS // atoms**2, 2)
        path = store(tmp_path / f"s{atoms}", torch.full((count,), atoms))
        config = settings(path, tmp_path / "unused")
        model = model_named(config.model).fitted(config.settings, Store(path, "train")).to(KIND)
        batch = Batch.of(Store(path, "train").rows(range(count)), torch.arange(count), 0, (), KIND)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

        def step(model=model, batch=batch, optimiser=optimiser) -> None:
            with torch.autocast(KIND, PRECISION, enabled=KIND == "cuda"):
                loss = model(batch, Draw(0))["loss"]
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        with FlopCounterMode(display=False) as counter:
            step()
        spent, work = seconds(step), counter.get_total_flops()
        print(f"| {atoms} | {count} | {count / spent:,.0f} | {work / count / 1e9:.2f} | {work / spent / peak:.0%} |",
              flush=True)  # fmt: skip
        assert 0.02 < work / spent / peak <= 1, "no less than passes over the pairs explain, no more than there is"


def test_work_of_the_full_size_recipe(tmp_path: Path) -> None:
    """Parameters, bytes that a step sums over the ranks, and operations for each crystal."""
    num_atoms = torch.randint(2, 21, (32,), generator=torch.Generator().manual_seed(1))
    path = store(tmp_path / "mixed", num_atoms)
    config = load(TrainConfig, ROOT / "configs/autoperi_mp20.yaml",
                  [f"store={path}", f"out={tmp_path / 'unused'}", "conditions=[]", "validate_every=0"])  # fmt: skip
    model = model_named(config.model).fitted(config.settings, Store(path, "train"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(Batch.of(Store(path, "train").rows(range(32)), torch.arange(32), 0), Draw(0))["loss"].backward()
    work = counter.get_total_flops() / 32 / 1e9
    print(f"\n{parameters / 1e6:.1f} million parameters, {4 * parameters / 1e6:.0f} MB of gradients, "
          f"{work:.2f} GFLOP for a crystal of 2 to 20 atoms")  # fmt: skip
    assert parameters / 1e6 == pytest.approx(45.4, abs=0.1), "what the estimate of BENCHMARKS.md rests on"
    assert work == pytest.approx(5.8, abs=0.3), "the same"


def whole_training(path: Path, out: Path, ranks: int, *words: str) -> float:
    """Crystals/s of the second half of a training."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "hpcgen.cli"]
    own = [f"store={path}", f"out={out}", "conditions=[]", "validate_every=0", f"steps={2 * STEPS}", "threads=1",
           f"log_every={STEPS}", "tensorboard=false", "autoperi.max_atoms=100", "muon=0", "compile=false"]  # fmt: skip
    subprocess.run([*command, "train", CONFIG, *own, *words], env=ENV, cwd=ROOT, check=True, capture_output=True)
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["crystals_per_s"]


def test_speed_of_whole_trainings(tmp_path: Path) -> None:
    """The same batch divided among ranks; and how fast batches come where nothing is computed."""
    path = store(tmp_path / "mixed", torch.randint(2, 21, (4096,), generator=torch.Generator().manual_seed(1)))
    config = settings(path, tmp_path / "unused")
    feed = groups(open_data(config, 0, 1), config, 0, 1, 0, 0)
    next(feed)
    began = time.perf_counter()
    given = sum(group.crystals for group in islice(feed, 200))
    loader, fastest = given / (time.perf_counter() - began), 0.0
    print(f"\n2 to 20 atoms, batches of {config.batch.crystals}, {os.cpu_count()} cores; the loader alone gives "
          f"{loader:,.0f} crystals/s")  # fmt: skip
    print("| ranks of one thread | settings | crystals/s |\n" + "| --- " * 3 + "|")
    for world, words in WHOLE[KIND]:
        rate = whole_training(path, tmp_path / f"run{world}{'-'.join(words)}", world, *words)
        fastest = max(fastest, rate)
        print(f"| {world} | {' '.join(words)} | {rate:,.0f} |", flush=True)
    assert loader > 5 * fastest, "the loader holds training up"
