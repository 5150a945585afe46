"""Crystals per second of the packaged model against steps, batch, precision, atoms and processes.

`pytest -m bench -s` this file, on a GPU if there is one, else on all cores; HPCGEN_BENCH_N: crystals of a row, of ten
atoms each in the table by atoms. Beside other work the time of the processors says more than the clock. Of the time
outside the model the first figure is the summary's, from the start of the campaign on; the second also counts the
imports before it and the way out after it.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign_jobs import run
from test_bench_training import matrix_peak
from torch.utils.flop_counter import FlopCounterMode

from hpcgen.campaign import blocks
from hpcgen.campaign.config import PACKAGED, PAIRS, TILE, CampaignConfig
from hpcgen.campaign.pieces import STEP, Piece, pieces
from hpcgen.campaign.sampling import Sampler
from hpcgen.diffusion.draw import Draw
from hpcgen.files import read_json_lines
from hpcgen.models.autoperi import AutoPeri
from hpcgen.runner.cores import usable_cores
from hpcgen.store.layout import sha256_of

ROOT = Path(__file__).resolve().parent.parent
KIND = "cuda" if torch.cuda.is_available() else "cpu"
N = int(os.environ.get("HPCGEN_BENCH_N", {"cpu": 512, "cuda": 16384}[KIND]))
STEPS = {"cpu": (5, 10, 25, 50, 100), "cuda": (5, 10, 25, 50, 100, 500)}[KIND]
TILES = [TILE[KIND] // 4, TILE[KIND], TILE[KIND] * 4]
MOST_PAIRS = [PAIRS[KIND] // 4, PAIRS[KIND], PAIRS[KIND] * 4]

ROWS: list[tuple[str, dict[str, str | int]]] = [
    *((f"{steps} steps", {"steps": steps}) for steps in STEPS),
    *((f"tile {tile}", {"tile": tile, "block": tile}) for tile in TILES),
    *((f"at most {pairs} pairs", {"pairs": pairs}) for pairs in MOST_PAIRS),
    *((precision, {"precision": precision}) for precision in ("float32", "bf16", "fp16")),
]


@pytest.mark.bench
def test_speed_of_sampling(tmp_path: Path) -> None:
    print(f"\n{N:,} crystals each, {torch.cuda.get_device_name() if KIND == 'cuda' else f'{os.cpu_count()} cores'}")
    print("| what differs from the default setting | crystals/s | of one core's own time | seconds of the command "
          "| outside the model | of the whole command | rejected |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for at, (name, settings) in enumerate(ROWS):
        out = tmp_path / str(at)
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hpcgen.cli", "campaign", "--n", str(N), "--out", out, *words],
                       cwd=ROOT, check=True, capture_output=True)  # fmt: skip
        seconds, told = time.perf_counter() - began, json.loads((out / "summary.json").read_text())
        lines = read_json_lines(out / "metrics.jsonl")
        cpu, inside = (sum(line[key] for line in lines) for key in ("cpu_s", "sampling_s"))
        assert told["written"] + sum(told["rejected"].values()) == N
        workers = {"cpu": usable_cores(), "cuda": 1}[KIND]
        print(f"| {name} | {told['crystals_per_s']:.1f} | {N / cpu:.1f} | {seconds:.1f} | {told['outside']:.2%} "
              f"| {1 - inside / (workers * seconds):.1%} | {sum(told['rejected'].values())} |", flush=True)  # fmt: skip


# ---- atoms per crystal, and workers ----------------------------------------------------------------------------------

SIZES = (5, 10, 20, 52, 100)


def command(out: Path, *words: str) -> tuple[dict[str, Any], float, float]:
    """A campaign by the command line: its summary, its seconds, and MB of its first process."""
    watch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )  # of small parents: a child counts theirs
    began = time.perf_counter()
    run = [sys.executable, "-c", watch, sys.executable, "-m", "hpcgen.cli", "campaign", "--out", out, *words]
    told = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return json.loads((out / "summary.json").read_text()), time.perf_counter() - began, int(told) * 1024 / 1e6


@pytest.mark.bench
@pytest.mark.usefixtures("threads_restored")
def test_speed_against_atoms_per_crystal(tmp_path: Path) -> None:
    """The network alone, then campaigns of one process, as many atoms altogether in each."""
    torch.set_num_threads(1 if KIND == "cpu" else torch.get_num_threads())
    peak, pairs = matrix_peak(torch.float32), PAIRS[KIND]
    print(f"\nfloat32, products of matrices {peak / 1e9:,.0f} GFLOP/s; {CampaignConfig.steps} calls a crystal")
    print("| atoms | crystals at once | network alone, crystals/s | MFLOP a call | share of the peak "
          "| end to end, crystals/s | of the command | MB |\n" + "| --- " * 8 + "|")  # fmt: skip
    for atoms in SIZES:
        config = CampaignConfig(num_atoms=str(atoms), device=KIND, checkpoint_sha256=sha256_of(PACKAGED))
        sampler, count = Sampler(config, None), max(1, pairs // (-(-atoms // STEP) * STEP) ** 2)
        piece = pieces(np.arange(count), np.full(count, atoms), pairs)[0]
        spent = [0.0]
        real = sampler.model.read

        def read(*args: Any, real: Any = real, spent: list[float] = spent) -> Any:
            began = clock()
            said = real(*args)
            spent[0] += clock() - began
            return said

        sampler.model.read = read
        with FlopCounterMode(display=False) as counter:
            sampler.sample(piece, lambda: None)
        work, spent[0] = counter.get_total_flops() / config.steps / count, 0.0
        for _ in range(2):
            sampler.sample(piece, lambda: None)
        alone = 2 * count / spent[0]
        sampler.model.read = real
        n = max(1, N * 10 // atoms)
        told, seconds, memory = command(tmp_path / f"a{atoms}", "--n", str(n), "--num-atoms", str(atoms),
                                        "--processes", "0")  # fmt: skip
        share = alone * config.steps * work / peak
        print(f"| {atoms} | {count} | {alone:,.1f} | {work / 1e6:,.0f} | {share:.0%} | {told['crystals_per_s']:.1f} "
              f"| {n / seconds:.1f} | {memory:,.0f} |", flush=True)  # fmt: skip
        assert 0.02 < share <= 1.1


@pytest.mark.bench
@pytest.mark.skipif(KIND == "cuda", reason="a GPU has one process")
def test_speed_against_processes(tmp_path: Path) -> None:
    print(f"\n{N:,} crystals each\n| processes | crystals/s | of the command |\n| --- | --- | --- |")
    for processes in dict.fromkeys((0, 1, 2, usable_cores(), 2 * usable_cores())):
        told, seconds, _ = command(tmp_path / f"p{processes}", "--n", str(N), "--processes", str(processes))
        assert told["written"] + sum(told["rejected"].values()) == N
        print(f"| {processes or 'itself'} | {told['crystals_per_s']:.1f} | {N / seconds:.1f} |", flush=True)


# ---- where the time goes ---------------------------------------------------------------------------------------------


@pytest.mark.bench
@pytest.mark.usefixtures("threads_restored")
def test_where_the_time_of_a_campaign_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process: noise, network, the rest of sampling, checks and encoding, writing."""
    spent: Counter[str] = Counter()

    def timed(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            try:
                return real(*args, **kwargs)
            finally:
                spent[what] += clock() - began

        monkeypatch.setattr(owner, name, call)

    for owner, name, what in (
        (Draw, "uniform", "noise"),
        (Draw, "normal", "noise"),
        (AutoPeri, "read", "network"),
        (Sampler, "sample", "sampling, all of it"),
        (blocks, "encoded", "checks and encoding"),
        (blocks, "write_arrays", "writing"),
    ):
        timed(owner, name, what)
    began = clock()
    run(PACKAGED, tmp_path / "run", n=N, device=KIND, tile=0, block=0, steps=CampaignConfig.steps)
    whole = clock() - began
    print(f"\n{N:,} crystals in {whole:.1f} s\n| part | share | µs a crystal |\n| --- | --- | --- |")
    for name, seconds in spent.most_common():
        print(f"| {name} | {seconds / whole:.1%} | {1e6 * seconds / N:,.0f} |")
    assert spent["network"] > 0.5 * whole, "the network is what a campaign should spend its time on"


# ---- what it costs that every crystal can be made again, bit for bit -------------------------------------------------


class Torchs(Draw):
    """Numbers of torch's own generator, as many as are asked for: no crystal can be made again from them."""

    def _drawn(self, like: torch.Tensor, sites: int | None, channels: int) -> torch.Tensor:
        shape = (len(like), channels) if sites is None else (len(like), sites, channels)
        return torch.empty(shape, device=like.device)

    def uniform(self, purpose: Any, index: Any, step: Any = 0, sites: Any = None, channels: int = 1,
                dtype: torch.dtype = torch.float32) -> torch.Tensor:  # fmt: skip
        return self._drawn(index, sites, channels).uniform_().to(dtype)

    def normal(self, purpose: Any, index: Any, step: Any = 0, sites: Any = None, channels: int = 1,
               dtype: torch.dtype = torch.float32) -> torch.Tensor:  # fmt: skip
        return self._drawn(index, sites, channels).normal_().to(dtype)


def clock() -> float:
    """Of the processor; on a GPU by the wall, after all that was asked of it."""
    if KIND == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.bench
@pytest.mark.usefixtures("threads_restored")
def test_cost_of_exactness() -> None:
    """One process, each promise left out in turn."""
    config = CampaignConfig(n=N, device=KIND, tile=TILE[KIND], pairs=PAIRS[KIND], checkpoint_sha256=sha256_of(PACKAGED))
    sampler, index = Sampler(config, None), np.arange(N)
    sizes = sampler.num_atoms(index)
    starts = range(0, N, config.tile)
    tiled = [part for at in starts for part in pieces(index[at : at + config.tile], sizes[at : at + config.tile],
                                                      config.pairs)]  # fmt: skip
    most = max(len(part.index) for part in tiled)
    by_size = [np.flatnonzero(sizes == size) for size in np.unique(sizes)]
    unpadded = [Piece(0, some, sizes[some], int(sizes[some[0]])) for same in by_size
                for some in np.array_split(same, -(-len(same) // most))]  # fmt: skip
    philox, torchs = sampler.draw, Torchs(config.seed)
    variants = {
        "all as in a campaign": (tiled, philox, True),
        "no tiles: crystals of one size together, without padding": (unpadded, philox, True),
        "torch's own random numbers": (tiled, torchs, True),
        **({"any kernels": (tiled, philox, False)} if KIND == "cuda" else {}),
        "nothing promised": (unpadded, torchs, False),
    }
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(4):
        for name, (parts, draw, exact) in variants.items():
            sampler.draw = draw
            torch.use_deterministic_algorithms(exact and KIND == "cuda", warn_only=True)
            began = clock()
            made = sum(len(sampler.sample(part, lambda: None).num_atoms) for part in parts)
            assert made >= N
            if turn:  # the first warms up
                spent[name].append(clock() - began)
    torch.use_deterministic_algorithms(False)
    least = min(spent["all as in a campaign"])
    print(f"\n{N:,} crystals, {config.steps} steps\n| | crystals/s | faster by |\n| --- | --- | --- |")
    for name, seconds in spent.items():
        print(f"| {name} | {N / min(seconds):.1f} | {least / min(seconds) - 1:.1%} |")
