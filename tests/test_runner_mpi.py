"""The block runner under mpiexec: real ranks, real failures."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from runner_jobs import Launch, expected, found, litter, wait_for

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_ranks_share_the_blocks(tmp_path: Path, ranks: int) -> None:
    code, text = Launch(tmp_path, "item_s=0.01", "n=12", ranks=ranks).end()
    assert code == 0, text
    shares = [json.loads(told) for told in re.findall(r"DONE (\{[^{}]*\})", text)]  # lines of ranks may run together
    assert sorted(share["rank"] for share in shares) == list(range(ranks))
    assert sum(share["done"] for share in shares) == 12, "no block was made twice"
    assert sum(share["made"] for share in shares) == 1, "what is made once is made once"
    assert found(tmp_path) == expected(12)
    assert litter(tmp_path) == []


def test_one_rank_that_raises_ends_all_with_its_message(tmp_path: Path) -> None:
    start = time.monotonic()
    launch = Launch(tmp_path, "item_s=0.2", "n=400", "raise_on=1", ranks=3)
    code, text = launch.end(30)
    assert time.monotonic() - start < 30
    assert code == 70, text
    assert "rank 1 of 3 on" in text and "RuntimeError: rank trouble" in text
    wait_for(lambda: not launch.family(), 5)
    assert Launch(tmp_path, "n=12", "processes=0").end()[0] == 0
    assert found(tmp_path) == expected(12)


def test_a_rank_that_meets_a_foreign_lease_ends_all_with_7(tmp_path: Path) -> None:
    holder = Launch(tmp_path, "item_s=0.2", "processes=0", "n=40")
    wait_for(lambda: list(tmp_path.glob("lease/owner-1.json")))
    code, text = Launch(tmp_path, ranks=2).end(30)
    holder.process.kill()
    holder.process.communicate()
    assert code == 7, text
    assert "belongs to another run" in text


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_single_processes_that_think_they_are_ranks_are_refused(tmp_path: Path, variable: str) -> None:
    code, text = Launch(tmp_path / "run", env={variable: "4"}).end()
    assert code == 3
    assert "the launcher started 4 ranks" in text and "srun --mpi=list" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to_all", [False, True], ids=["one rank", "Ctrl-C"])
def test_all_ranks_leave_when_told_to_stop(tmp_path: Path, to_all: bool) -> None:
    launch = Launch(tmp_path, "item_s=0.05", "n=400", ranks=3)
    wait_for(lambda: len(list(tmp_path.glob("heartbeat/*.json"))) == 3 and list(tmp_path.glob("blocks/*.txt")))
    if to_all:
        launch.process.send_signal(signal.SIGINT)
    else:
        os.kill(json.loads((tmp_path / "heartbeat" / "0.json").read_text())["pid"], signal.SIGTERM)
    code, text = launch.end(20)
    assert code == 75, text
    assert text.count("StoppedEarly") == 3
    assert litter(tmp_path) == []
    done = len(found(tmp_path))
    code, text = Launch(tmp_path, f"n={done + 6}", ranks=2).end()
    assert code == 0, text
    assert found(tmp_path) == expected(done + 6)


@pytest.mark.parametrize("which", [0, 2])
def test_the_others_do_the_work_of_a_rank_that_is_stopped_and_name_it(tmp_path: Path, which: int) -> None:
    launch = Launch(tmp_path, "item_s=0.05", "n=40", "beat_s=0.5", "processes=0", ranks=3)
    wait_for(lambda: len(list(tmp_path.glob("heartbeat/*.json"))) == 3 and list(tmp_path.glob("blocks/*.txt")))
    os.kill(json.loads((tmp_path / "heartbeat" / f"{which}.json").read_text())["pid"], signal.SIGSTOP)
    code, text = launch.end(60)
    assert code == 3, text
    assert re.search(f"rank {which} on .* gives no sign of life; the same command", text)
    there = {name: text for name, text in found(tmp_path).items() if not name.endswith(".draft")}
    assert there == expected(40)  # the stopped one may have been about to write
    wait_for(lambda: not launch.family(), 5)
    code, text = Launch(tmp_path, "n=40", ranks=2).end()
    assert code == 0 and litter(tmp_path) == [], text


def test_a_killed_launch_is_followed_by_the_next_one_at_once(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "item_s=0.05", "n=60", "beat_s=5", ranks=3)
    wait_for(lambda: len(list(tmp_path.glob("blocks/*.txt"))) > 3)
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in launch.family())
    shared = set(re.findall(r"/dev/shm/mpich_\w+", maps))
    for pid in launch.family():
        os.kill(pid, signal.SIGKILL)
    launch.process.communicate()
    assert shared and not any(Path(name).exists() for name in shared)
    start = time.monotonic()
    code, text = Launch(tmp_path, "n=60", "beat_s=5", ranks=3).end()
    assert code == 0, text
    assert "taking over from a dead run" in text
    assert time.monotonic() - start < 10
    assert found(tmp_path) == expected(60)
    assert litter(tmp_path) == []
