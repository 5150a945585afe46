"""Crystals per second of the packaged model against steps, batch and precision. `pytest -m bench -s` this file.

On a GPU if there is one, else on all cores; HPCGEN_BENCH_N: crystals of each row. Beside other work the time of the
processors says more than the clock. Of the time outside the model the first figure is the summary's, from the start of
the campaign on; the second also counts the imports before it and the way out after it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hpcgen.campaign.config import PAIRS, TILE
from hpcgen.files import read_json_lines
from hpcgen.runner.cores import usable_cores

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
