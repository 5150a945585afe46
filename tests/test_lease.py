"""One run folder, one owner: who may take a lease, when it is lost, and that nobody writes after that."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runner_jobs import Launch, Work, blocks_in, expected, found, litter, wait_for

from hpcgen.errors import StoppedEarly, StorageError
from hpcgen.runner.blocks import How, run_blocks
from hpcgen.runner.lease import Lease
from hpcgen.runner.owners import Life, create_whole
from hpcgen.runner.team import Team

BEAT_S = 0.3


def alone(token: str = "aaa") -> Team:
    return Team("alone", 0, 1, token)


def a_dead_process() -> Life:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    life = Life.own()
    process.wait()
    return Life(life.host, life.machine, process.pid, 5)


def forge(folder: Path, life: Life, token: str = "old", generation: int = 1, **more: object) -> Path:
    path = folder / "lease" / f"owner-{generation}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"token": token, "beat_s": BEAT_S, "job": "4711", **life.record(), **more}))
    return path


ELSEWHERE = Life("node7", "node7 another boot", 1234, 99)


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with Lease.take(tmp_path, alone()) as lease, pytest.raises(StorageError) as caught:
        Lease.take(tmp_path, alone("bbb"))
    for word in (str(os.getpid()), lease._life.host, str(tmp_path), "last sign of life"):
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir()), "a released lease leaves nothing"
    Lease.take(tmp_path, alone("bbb")).release()


@pytest.mark.parametrize("reused", [False, True], ids=["pid gone", "pid of another process now"])
def test_a_dead_holder_on_this_host_is_followed_at_once(tmp_path: Path, reused: bool) -> None:
    own = Life.own()
    forge(tmp_path, Life(own.host, own.machine, own.pid, own.started - 7) if reused else a_dead_process())
    start = time.monotonic()
    with Lease.take(tmp_path, alone(), beat_s=5) as lease:
        assert time.monotonic() - start < 1
        assert lease.is_taker
        assert [path.name for path in (tmp_path / "lease").iterdir()] == ["owner-2.json"]


def test_a_silent_holder_on_another_host_is_given_three_beats(tmp_path: Path) -> None:
    forge(tmp_path, ELSEWHERE)
    start = time.monotonic()
    Lease.take(tmp_path, alone(), beat_s=BEAT_S).release()
    assert 3 * BEAT_S <= time.monotonic() - start < 3 * BEAT_S + 1


def test_a_holder_on_another_host_that_beats_keeps_the_folder(tmp_path: Path) -> None:
    path, end = forge(tmp_path, ELSEWHERE), threading.Event()

    def beat() -> None:
        while not end.wait(BEAT_S):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StorageError, match="pid 1234 on node7, job 4711"):
            Lease.take(tmp_path, alone(), beat_s=BEAT_S)
    finally:
        end.set()
        thread.join()


def test_a_job_that_was_started_again_follows_what_lives_of_it(tmp_path: Path) -> None:
    first = Lease.take(tmp_path, Team("mpi", 0, 1, "aaa", "4711"), beat_s=0.1)
    with pytest.raises(StorageError, match="belongs to another run"):
        Lease.take(tmp_path, Team("mpi", 0, 1, "bbb", "4712", restart=1))  # another job
    with pytest.raises(StorageError, match="belongs to another run"):
        Lease.take(tmp_path, Team("mpi", 0, 1, "ccc", "4711"))  # another step of this start
    with Lease.take(tmp_path, Team("mpi", 0, 1, "ddd", "4711", restart=1)) as second:
        with pytest.raises(StorageError, match="lost the lease, now held by"):
            first.check()
        first.note_error("of no interest any more", {"rank": 0})
        first.release()
        second.check()
    assert not list(tmp_path.iterdir())


def test_a_dead_creator_is_not_a_dead_launch_while_a_member_beats(tmp_path: Path) -> None:
    forge(tmp_path, a_dead_process(), "array-1", size=2)
    with Lease.take(tmp_path, Team("array", 1, 2, "array-1"), beat_s=BEAT_S) as joined:
        assert not joined.is_taker
        with pytest.raises(StorageError, match="belongs to another run"):
            Lease.take(tmp_path, alone())
        seen = (tmp_path / "lease" / "owner-1.json").stat().st_mtime_ns
        wait_for(lambda: (tmp_path / "lease" / "owner-1.json").stat().st_mtime_ns > seen, 3 * BEAT_S)
        joined.check()


def test_the_members_of_a_launch_share_the_lease_and_the_last_one_out_removes_it(tmp_path: Path) -> None:
    first, second = (Lease.take(tmp_path, Team("array", rank, 2, "array-1")) for rank in range(2))
    assert (first.is_taker, second.is_taker) == (True, False)
    first.release()
    second.check()
    second.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stops_early_is_not_waited_for_by_one_that_is_done(tmp_path: Path, stopped: int) -> None:
    """Else the one that is done would wait until the job is killed, and that would count as a failure."""
    early, done = (Lease.take(tmp_path, Team("mpi", rank, 2, "mpi-1"), beat_s=0.2) for rank in (stopped, 1 - stopped))

    def leave() -> None:
        with done:
            pass

    waiting = threading.Thread(target=leave, daemon=True)
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive(), "one that works is waited for"
    with pytest.raises(StoppedEarly), early:
        raise StoppedEarly("told to")
    waiting.join(3)
    assert not waiting.is_alive()
    assert not list(tmp_path.iterdir())


def test_a_restarted_member_replaces_its_former_self(tmp_path: Path) -> None:
    """A task requeued after a node failure meets the old one, which still runs: the old one stops."""
    old = Lease.take(tmp_path, Team("array", 0, 1, "array-1"), beat_s=0.1)
    new = Lease.take(tmp_path, Team("array", 0, 1, "array-1", restart=1), beat_s=0.1)
    wait_for(lambda: old.is_lost, 2)
    with pytest.raises(StorageError, match="was restarted"):
        old.check()
    old.release()
    new.check()
    new.release()


def test_nothing_is_renamed_after_the_lease_is_lost(tmp_path: Path) -> None:
    with Lease.take(tmp_path, alone(), beat_s=60) as lease:
        forge(tmp_path, ELSEWHERE, generation=2)
        with pytest.raises(StorageError, match="lost the lease, now held by pid 1234 on node7"):
            run_blocks(blocks_in(tmp_path, 2), Work(), lease=lease, how=How(processes=0))
    assert found(tmp_path) == {}
    assert (tmp_path / "lease" / "owner-2.json").exists(), "the new owner's lease is not the loser's to remove"


def test_only_drafts_of_other_launches_are_swept(tmp_path: Path) -> None:
    names = [
        "a.h5.old-1.draft",
        "a.h5.old.0.claim",
        "b.h5.aaa-2.draft",
        "b.h5.aaa.0.claim",
        "c.h5",
        "d.h5.part",
    ]
    for name in names:
        (tmp_path / name).touch()
    with Lease.take(tmp_path / "run", alone(), sweep=[tmp_path, tmp_path / "absent"]):
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == names[2:]


def test_of_many_creators_exactly_one_succeeds(tmp_path: Path) -> None:
    for turn in range(20):
        path, barrier = tmp_path / f"{turn}.claim", threading.Barrier(8)
        won: list[int] = []

        def race(me: int, path: Path, barrier: threading.Barrier, won: list[int]) -> None:
            barrier.wait()
            if create_whole(path, {"me": me}, "t"):
                won.append(me)

        threads = [threading.Thread(target=race, args=(me, path, barrier, won)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert json.loads(path.read_text())["me"] == won[0]
    assert len(list(tmp_path.iterdir())) == 20, "no drafts left"


CONTENDER = """
import sys, time
from pathlib import Path
from hpcgen.errors import StoppedEarly, StorageError
from hpcgen.runner.lease import Lease
from hpcgen.runner.team import Team
kept = []
for turn in range(20):
    while time.time() < float(sys.argv[3]) + turn * 0.08:
        pass
    try:
        kept.append(Lease.take(Path(sys.argv[1]) / str(turn), Team("alone", 0, 1, sys.argv[2])))
        print("won", end=" ")
    except StorageError:
        print("lost", end=" ")
time.sleep(max(0, float(sys.argv[3]) + 3 - time.time()))
for lease in kept:
    lease.check()
"""


def test_of_two_contenders_for_a_stale_lease_exactly_one_wins(tmp_path: Path) -> None:
    dead = a_dead_process()
    for turn in range(20):
        forge(tmp_path / str(turn), dead)
    start = str(time.time() + 1.0)
    commands = [[sys.executable, "-c", CONTENDER, str(tmp_path), token, start] for token in ("ccc", "ddd")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate(timeout=30)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(said[0]) == 20
    assert all({mine, theirs} == {"won", "lost"} for mine, theirs in zip(*said, strict=True)), said


def test_the_same_run_started_twice_at_once(tmp_path: Path) -> None:
    both = [Launch(tmp_path, "item_s=0.03", "processes=1") for _ in range(2)]
    ends = [launch.end() for launch in both]
    assert sorted(code for code, _ in ends) == [0, 7], ends
    loser = next(text for code, text in ends if code == 7)
    assert "belongs to another run, pid" in loser
    assert found(tmp_path) == expected(8)
    assert litter(tmp_path) == []


def test_a_frozen_run_that_lost_its_folder_does_no_harm(tmp_path: Path) -> None:
    """Its node looked dead; another run took over from another host; then it wakes up."""
    frozen = Launch(tmp_path, "item_s=0.02", "processes=1", "n=50", "beat_s=0.2")
    wait_for(lambda: len(list((tmp_path / "blocks").glob("*.txt"))) > 2 if tmp_path.exists() else False)
    for pid in frozen.family():
        os.kill(pid, signal.SIGSTOP)
    forge(tmp_path, ELSEWHERE, generation=2)
    before = sorted(found(tmp_path))
    for pid in frozen.family():
        os.kill(pid, signal.SIGCONT)
    code, text = frozen.end()
    assert code == 7, text
    assert "lost the lease" in text
    assert len([name for name in found(tmp_path) if name.endswith(".txt")]) <= len(before) + 1
