"""The block runner in one process family: every block is made, whatever items, signals and disks do."""

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from runner_jobs import SIZE, Launch, Work, blocks_in, expected, found, litter, wait_for

from hpcgen.errors import InputError, SiteError, StoppedEarly, UsageError
from hpcgen.files import read_json_lines
from hpcgen.runner import guard as guard_module
from hpcgen.runner import team as team_module
from hpcgen.runner.blocks import Block, How, once, run_blocks
from hpcgen.runner.cores import usable_cores
from hpcgen.runner.guard import Guard
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import Team, find_team
from hpcgen.runner.worker import Cursor, Died, Finished, Job

LAUNCHERS = ("SLURM_", "PMI_", "PMIX_", "OMPI_", "MV2_", "PALS_")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        monkeypatch.delenv(name)


@pytest.fixture
def lease(tmp_path: Path):
    with Lease.take(tmp_path / "run", Team("alone", 0, 1, "aaa"), beat_s=0.3) as lease:
        yield lease


@pytest.mark.parametrize("processes", [0, 1, 3])
def test_every_block_is_made_once_and_then_skipped(lease: Lease, processes: int) -> None:
    blocks, how = blocks_in(lease.folder, 8), How(processes=processes)
    first = run_blocks(blocks, Work(), lease=lease, how=how)
    assert (first.done, first.skipped, first.elsewhere, first.failed) == (8, 0, 0, [])
    assert first.counts == {"items": 8 * SIZE, "rejected": 0}
    assert found(lease.folder) == expected(8)
    (lease.folder / "blocks" / "00003.txt").unlink()
    again = run_blocks(blocks, Work(), lease=lease, how=how)
    assert (again.done, again.skipped) == (1, 7)
    assert found(lease.folder) == expected(8)


def test_one_bad_item_costs_that_item_alone(lease: Lease) -> None:
    bad = {3: "segv", 4: "exit", 11: "loop", 12: "hang in C", 20: "exit"}
    how = How(processes=2, item_timeout_s=0.7)
    outcome = run_blocks(blocks_in(lease.folder, 6), Work(bad), lease=lease, how=how)
    rejected = {3: "crash", 4: "crash", 11: "timeout", 12: "timeout", 20: "crash"}
    assert outcome.failed == []
    assert outcome.culprits == len(rejected)
    assert outcome.counts == {"items": 6 * SIZE, "rejected": len(rejected)}
    assert found(lease.folder) == expected(6, rejected)


def dies_between_items(block: Block, draft: Path, cursor: Cursor) -> None:
    cursor.at(0)
    cursor.rest()
    os._exit(9)


def test_a_death_that_is_no_items_fault_fails_the_block(lease: Lease) -> None:
    outcome = run_blocks(blocks_in(lease.folder, 1), dies_between_items, lease=lease, how=How(processes=1))
    assert [failure.reason for failure in outcome.failed] == ["worker left with status 9"]


def ignores_culprits(block: Block, draft: Path, cursor: Cursor) -> None:
    cursor.at(7)
    os._exit(9)


def test_work_that_does_not_skip_its_culprits_does_not_run_for_ever(lease: Lease) -> None:
    outcome = run_blocks(blocks_in(lease.folder, 1), ignores_culprits, lease=lease, how=How(processes=1))
    assert "item 7, which it was told to skip" in outcome.failed[0].reason


def test_a_passing_trouble_is_retried(lease: Lease, tmp_path: Path) -> None:
    work = Work({7: "raise once"}, touch=str(tmp_path / "raised"))
    assert run_blocks(blocks_in(lease.folder, 3), work, lease=lease, how=How(processes=2)).failed == []
    assert found(lease.folder) == expected(3)


@pytest.mark.parametrize("processes", [0, 2])
def test_a_block_that_keeps_raising_is_recorded_and_tried_again_by_the_next_launch(
    tmp_path: Path, processes: int
) -> None:
    blocks, how = blocks_in(tmp_path, 4), How(processes=processes)
    with Lease.take(tmp_path, Team("alone", 0, 1, "aaa")) as lease:
        outcome = run_blocks(blocks, Work({7: "raise"}), lease=lease, how=how)
        assert [(f.block.index, f.kind, f.reason) for f in outcome.failed] == [(1, "ValueError", "an odd crystal")]
        same_launch = run_blocks(blocks, Work(), lease=lease, how=how)
        assert (same_launch.done, len(same_launch.failed)) == (0, 1)
    (event,) = [line for line in read_json_lines(tmp_path / "events.jsonl") if line["event"] == "failed"]
    assert (event["block"], event["kind"], event["message"]) == (1, "ValueError", "an odd crystal")
    assert "runner_jobs.py" in event["at"]
    assert litter(tmp_path) == ["00001.txt.failed"]
    with Lease.take(tmp_path, Team("alone", 0, 1, "bbb")) as lease:
        assert run_blocks(blocks, Work(), lease=lease, how=how).done == 1
    assert found(tmp_path) == expected(4)


def wrong_setting(block: Block, draft: Path, cursor: Cursor) -> None:
    raise UsageError("seed: want a number")


def writes_nothing(block: Block, draft: Path, cursor: Cursor) -> None:
    pass


@pytest.mark.parametrize("processes", [0, 1])
def test_errors_every_block_would_meet_end_the_run(lease: Lease, processes: int) -> None:
    with pytest.raises(UsageError, match="seed: want a number"):
        run_blocks(blocks_in(lease.folder, 3), wrong_setting, lease=lease, how=How(processes=processes))
    assert litter(lease.folder / "blocks") == []


def test_work_that_writes_nothing_has_failed(lease: Lease) -> None:
    outcome = run_blocks(blocks_in(lease.folder, 1), writes_nothing, lease=lease, how=How(processes=0))
    assert outcome.failed[0].kind == "FileNotFoundError"


class Unloadable:
    """Cannot be unpickled in a worker."""

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> None: ...

    def __reduce__(self):
        return os.path.join, ()


def test_workers_that_cannot_start_end_the_run(lease: Lease) -> None:
    with pytest.raises(SiteError, match="workers in a row"):
        run_blocks(blocks_in(lease.folder, 1), Unloadable(), lease=lease, how=How(processes=1))


def keeps(block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
    before = cursor.keep.read_text() if cursor.keep.exists() else ""
    for item in range(len(before), 4):
        cursor.at(item)
        if item == 2 and item not in cursor.culprits:
            os._exit(1)
        cursor.keep.write_text(cursor.keep.read_text() + "x" if cursor.keep.exists() else "x")
    draft.write_text("whole")
    return {"kept": len(before)}


def test_finished_pieces_outlive_a_crash_and_go_with_the_block(lease: Lease) -> None:
    outcome = run_blocks(blocks_in(lease.folder, 1), keeps, lease=lease, how=How(processes=1))
    assert outcome.counts == {"kept": 2}
    assert [path.name for path in (lease.folder / "blocks").iterdir()] == ["00000.txt"]


def threads_of_worker(block: Block, draft: Path, cursor: Cursor) -> None:
    draft.write_text(os.environ["OMP_NUM_THREADS"])


def test_workers_use_one_thread_each_and_this_process_keeps_its_setting(
    lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    run_blocks(blocks_in(lease.folder, 1), threads_of_worker, lease=lease, how=How(processes=1))
    assert found(lease.folder) == {"00000.txt": "1"}
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_once_makes_one_file_and_passes_its_error_on(lease: Lease) -> None:
    path = lease.folder / "index.json"
    with pytest.raises(InputError, match="two keys"):
        once(path, lambda draft: (_ for _ in ()).throw(InputError("two keys")), lease=lease)
    with pytest.raises(InputError, match="two keys"):  # what a member that only waited sees
        once(path, lambda draft: draft.write_text("{}"), lease=lease)
    other = lease.folder / "other.json"
    assert once(other, lambda draft: draft.write_text("{}"), lease=lease)
    assert not once(other, lambda draft: draft.write_text("again"), lease=lease)
    assert other.read_text() == "{}"


@pytest.mark.parametrize("processes", [0, 2])
def test_a_stop_leaves_no_drafts_and_the_same_command_goes_on(tmp_path: Path, processes: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        launch = Launch(tmp_path, "item_s=0.1", f"processes={processes}", "n=20")
        already = len(list(tmp_path.glob("blocks/*.txt")))
        wait_for(lambda before=already: len(list(tmp_path.glob("blocks/*.txt"))) > before)
        if number == signal.SIGUSR2:
            os.kill(launch.process.pid, number)
        else:
            os.killpg(launch.process.pid, number)  # Ctrl-C and Slurm reach the workers too
        code, text = launch.end(15)
        assert code == 75, text
        assert f"stopped early ({number.name})" in text
        assert litter(tmp_path) == [], text
        assert " crash " not in text
    assert read_json_lines(tmp_path / "events.jsonl")[-1]["event"] == "stop"
    assert Launch(tmp_path, "processes=0", "n=20").end()[0] == 0
    assert found(tmp_path) == expected(20)


def test_a_worker_that_does_not_listen_is_killed_after_the_grace(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "n=1", "processes=1", 'bad={"0":"hang in C"}', "grace=0.5")
    wait_for(lambda: list(tmp_path.glob("blocks/*.claim")))
    time.sleep(0.3)
    os.kill(launch.process.pid, signal.SIGTERM)
    assert launch.end(8)[0] == 75
    wait_for(lambda: not launch.family(), 3)


def test_a_second_interrupt_does_what_it_did_before() -> None:
    before = signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a shell starts what runs in the background deaf to it
    with StopFlag() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        with pytest.raises(StoppedEarly):
            stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


def test_killed_at_random_moments_the_files_are_the_same(tmp_path: Path) -> None:
    rng = random.Random(7)
    for turn in range(10):
        before = len(list(tmp_path.glob("blocks/*.txt")))
        launch = Launch(tmp_path, "item_s=0.01", "processes=2", "n=100")
        if turn % 2:  # else killed at the start
            wait_for(lambda before=before: len(list(tmp_path.glob("blocks/*.txt"))) > before)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(launch.process.pid, signal.SIGKILL)
        launch.process.communicate()
        wait_for(lambda family=launch.family: not family(), 3)
    done = len(list(tmp_path.glob("blocks/*.txt")))
    code, text = Launch(tmp_path, "processes=2", "n=100").end()
    assert code == 0, text
    assert f'"skipped": {done}' in text
    assert 0 < done < 100, "the kills came too late or too early to test anything"
    assert found(tmp_path) == expected(100)
    assert litter(tmp_path) == []


def test_orphans_end_by_themselves_even_in_compiled_code(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "processes=3", 'bad={"0":"loop","5":"hang in C"}', "item_s=0.1", "n=30")
    wait_for(lambda: len(list(tmp_path.glob("blocks/*.txt"))) > 1)
    assert len(launch.family()) >= 5
    os.kill(launch.process.pid, signal.SIGKILL)
    launch.process.wait()
    try:
        wait_for(lambda: not launch.family(), 3)
    finally:
        launch.end(0)


def test_signals_to_the_whole_family_harm_no_block(tmp_path: Path) -> None:
    """Some launchers signal every process, again and again: no item is blamed for it."""
    launch = Launch(tmp_path, "processes=2", "item_s=0.05", "n=12")
    wait_for(lambda: list(tmp_path.glob("blocks/*.txt")))
    for number in (signal.SIGTERM, signal.SIGUSR2):
        for pid in launch.family():
            if pid != launch.process.pid:
                os.kill(pid, number)
        time.sleep(0.3)
    code, text = launch.end()
    assert code == 0, text
    assert "crash" not in text
    assert found(tmp_path) == expected(12)


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root and the right to mount a small disk")
    try:
        words = ("processes=2", "n=8", "ballast=200000")
        code, text = Launch(tmp_path, *words).end()
        assert code == 7, text
        assert "cannot write (" in text and "No space left" in text
        kept = found(tmp_path)
        assert 1 < len(kept) < 8
        assert all(len(block) > 200_000 for block in kept.values())
        assert litter(tmp_path) == []
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
        assert Launch(tmp_path, *words).end()[0] == 0
        assert found(tmp_path).keys() == expected(8).keys()
        assert kept.items() <= found(tmp_path).items()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_mpi_is_needed(tmp_path: Path) -> None:
    hidden = hide_mpi(tmp_path)
    code, text = Launch(tmp_path / "run", "processes=0", env=hidden).end()
    assert code == 0, text
    code, text = Launch(tmp_path / "run", env=hidden | {"PMI_RANK": "0", "PMI_SIZE": "4"}).end()
    assert code == 3
    assert "pip install mpi4py" in text
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0"}
    code, text = Launch(tmp_path / "run", env=hidden | step | {"PMI_RANK": "0", "PMI_SIZE": "4"}).end()
    assert code == 0, text
    assert "READY array 2 4" in text


def hide_mpi(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "hidden" / "mpi4py"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no MPI here')")
    return {"PYTHONPATH": str(package.parent)}


def array_env(task: int, tasks: int = 3) -> dict[str, str]:
    return {
        "SLURM_ARRAY_JOB_ID": "77", "SLURM_JOB_ID": str(80 + task), "SLURM_ARRAY_TASK_ID": str(1 + 2 * task),
        "SLURM_ARRAY_TASK_COUNT": str(tasks), "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2",
    }  # fmt: skip


def test_array_tasks_finish_the_blocks_of_one_that_was_killed(tmp_path: Path) -> None:
    tasks = [Launch(tmp_path, "item_s=0.04", "n=18", env=array_env(task)) for task in range(3)]
    wait_for(lambda: len(list(tmp_path.glob("heartbeat/*.json"))) == 3 and list(tmp_path.glob("blocks/*.txt")))
    creator = json.loads((tmp_path / "lease" / "owner-1.json").read_text())["pid"]
    os.kill(creator, signal.SIGKILL)
    ends = [task.end() for task in tasks]
    assert sorted(code for code, _ in ends) == [-9, 0, 0], ends
    assert found(tmp_path) == expected(18)
    assert litter(tmp_path) == []


def test_a_stopped_array_task_does_not_stop_the_others(tmp_path: Path) -> None:
    tasks = [Launch(tmp_path, "item_s=0.04", "n=12", env=array_env(task, 2)) for task in range(2)]
    wait_for(lambda: len(list(tmp_path.glob("blocks/*.txt"))) > 1)
    os.kill(tasks[0].process.pid, signal.SIGTERM)
    assert [task.end()[0] for task in tasks] == [75, 0]
    assert found(tmp_path) == expected(12)


def test_how_a_process_was_started_is_read_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def team(**env: str) -> Team:
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            return find_team()

    lone = team()
    assert (lone.kind, lone.rank, lone.size) == ("alone", 0, 1)
    assert lone.token != team().token
    batch = team(SLURM_JOB_ID="5", SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_RESTART_COUNT="2")
    assert (batch.kind, batch.size, batch.job, batch.restart) == ("alone", 1, "5", 2)
    tasks = [team(**array_env(task)) for task in range(3)]
    assert [(task.kind, task.rank, task.size, task.token) for task in tasks] == [
        ("array", rank, 3, "array-77") for rank in range(3)
    ]
    step = team(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="3", SLURM_JOB_ID="5", SLURM_STEP_ID="1")
    assert (step.kind, step.rank, step.size, step.token) == ("array", 3, 4, "step-5-1-0")
    requeued = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "1"}
    assert team(**requeued, SLURM_RESTART_COUNT="1").token != step.token
    assert team(PMI_SIZE="1", PMI_RANK="0").kind == "alone"
    with pytest.raises(SiteError, match="want a whole number"):
        team(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="three")


STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
PLUGINS = [
    ({"PMI_JOBID": "7.0"}, "pmi2"),
    ({"PMIX_NAMESPACE": "slurm.pmix.7.0"}, "pmix"),
    ({"PMI_JOBID": "7.0", "MPI_LOCALNRANKS": "2"}, ""),  # mpiexec of MPICH within a step of either kind
    ({"PMIX_NAMESPACE": "slurm.pmix.7.0", "MPI_LOCALNRANKS": "2"}, ""),
    ({"PMIX_NAMESPACE": "2716532737", "OMPI_COMM_WORLD_SIZE": "2"}, ""),  # that of Open MPI
    ({}, ""),
]


@pytest.mark.parametrize(("env", "plugin"), PLUGINS)
def test_the_plugin_of_srun_is_told_from_an_mpiexec_within_its_step(env: dict[str, str], plugin: str) -> None:
    assert team_module._slurms_plugin(STEP | env) == plugin
    assert bool(team_module._misfit(STEP | env, "MPICH")) == (plugin == "pmix")
    assert bool(team_module._misfit(STEP | env, "Open MPI")) == (plugin == "pmi2")


def test_cores_are_what_slurm_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert usable_cores() == 1


@pytest.mark.parametrize("frozen_s", [0.5, 9.0], ids=["suspended", "busy"])
def test_a_suspended_job_blames_no_item_when_it_wakes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen_s: float
) -> None:
    monkeypatch.setattr(guard_module, "_FREEZE_S", frozen_s)
    pool = Guard(Work(item_s=0.2), 1, item_timeout_s=0.8)
    pool.start(Job(Block(0, tmp_path / "a", SIZE), tmp_path / "a.draft", tmp_path / "a.part"))
    while not pool.items():
        assert pool.wait(0.05) == []
    worker = pool._workers[0].process.pid
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1.2)
    results = pool.wait(0.05)
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    while not results:
        results = pool.wait(0.05)
    pool.close()
    assert isinstance(results[0][1], Finished if frozen_s == 0.5 else Died)
