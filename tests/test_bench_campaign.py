"""A million crystals at one sampling step: time, memory, files. `pytest -m bench -s` it; fewer: HPCGEN_BENCH_N."""

import os
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from hpcgen.store.read import Store

ROOT = Path(__file__).resolve().parent.parent
N = int(os.environ.get("HPCGEN_BENCH_N", "1000000"))
MB = 2**20


@pytest.mark.bench
def test_a_million_crystals_at_one_step(tmp_path: Path) -> None:
    out = tmp_path / "million"
    command = [sys.executable, "-m", "hpcgen.cli", "campaign", "--n", str(N), "--steps", "1", "--out", str(out)]
    began = time.monotonic()
    process = psutil.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    memory: dict[int, list[float]] = defaultdict(list)  # of each process, second by second
    while process.poll() is None:
        time.sleep(1.0)
        with suppress(psutil.NoSuchProcess):
            for each in (process, *process.children(recursive=True)):
                memory[each.pid].append(each.memory_info().rss / MB)
    seconds = time.monotonic() - began
    assert process.returncode == 0, process.stderr.read()
    store = Store(out)
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"\n{N:,} crystals asked for, {len(store):,} written, in {seconds:.0f} s: {N / seconds:.0f}/s")
    print(f"{len(files)} files, {size / MB:.0f} MB, {size / len(store):.0f} bytes per crystal")
    for pid, seen in memory.items():
        if len(seen) > seconds / 2:
            tenth = len(seen) // 10
            early, late = max(seen[tenth : 2 * tenth]), max(seen[-tenth:])
            print(
                f"process {pid}: {early:.0f} MB in its second tenth, {late:.0f} MB in the last, at most {max(seen):.0f}"
            )
            assert late < early + 60
