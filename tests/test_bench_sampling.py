"""Crystals per second of the packaged model against steps, batch and precision. `pytest -m bench -s` this file.

On a GPU if there is one, else on all cores; HPCGEN_BENCH_N: crystals of each row.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpcgen.campaign.config import PAIRS, TILE

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
    print("| what differs from the default setting | crystals/s | seconds | outside the model | rejected |")
    print("| --- | --- | --- | --- | --- |")
    for at, (name, settings) in enumerate(ROWS):
        out = tmp_path / str(at)
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        subprocess.run([sys.executable, "-m", "hpcgen.cli", "campaign", "--n", str(N), "--out", out, *words],
                       cwd=ROOT, check=True, capture_output=True)  # fmt: skip
        told = json.loads((out / "summary.json").read_text())
        assert told["written"] + sum(told["rejected"].values()) == N
        print(f"| {name} | {told['crystals_per_s']:.1f} | {told['seconds']:.1f} | {told['outside']:.2%} "
              f"| {sum(told['rejected'].values())} |", flush=True)  # fmt: skip
