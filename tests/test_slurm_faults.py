"""Faults on a real Slurm: lost nodes, stopped ranks, taken ports, torn checkpoints, full disks, misfits."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from campaign_jobs import content, litter, make_checkpoint
from campaign_jobs import run as run_campaign
from slurm_cluster import Cluster
from slurm_jobs import (
    HPCGEN,
    ROOT,
    TINY,
    disturb,
    environment,
    events,
    log_of,
    open_mpi,
    pid_of,
    ranks,
    saved_step,
    sbatch,
    step_of,
    submit,
    until,
)
from train_jobs import assert_same_run, make_store

from hpcgen.launch.place import find_place

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
SMALL_DISK = "8m"
CONFIG = str(ROOT / "configs" / "autoperi_mp20.yaml")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("slurm") / "store", 320)


@pytest.fixture(scope="module")
def calm(cluster: Cluster, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 steps of two ranks that nobody disturbs."""
    run = tmp_path_factory.mktemp("calm") / "run"
    job = sbatch(cluster, 2, "train_mp20.sh", *TINY, "steps=60", flags=("--nodes=1",), HPCGEN_STORE=str(store),
                 HPCGEN_RUN=str(run))  # fmt: skip
    assert cluster.wait(job, timeout_s=120) == "COMPLETED", log_of(run, job)
    return run


def train(cluster: Cluster, store: Path, run: Path, *words: str, nodes: int = 1, **env: str) -> str:
    where = {"HPCGEN_STORE": str(store), "HPCGEN_RUN": str(run), **env}
    return sbatch(cluster, 2, "train_mp20.sh", *TINY, *words, flags=(f"--nodes={nodes}",), **where)


def failed(cluster: Cluster, job: str, code: int, timeout_s: float = 120) -> None:
    """The job ends as failed with this exit code, is not queued again, and leaves nobody and no drained node behind."""
    assert cluster.wait(job, timeout_s=timeout_s) == "FAILED"
    assert cluster.show(job)["ExitCode"] == f"{code}:0" and cluster.show(job)["Restarts"] == "0"
    until(lambda: not ranks(job), 20, Path())
    assert cluster.drained() == []


# ---- lost nodes ------------------------------------------------------------------------------------------------------


def lose_the_first_node(
    cluster: Cluster, job: str, run: Path, freeze: Iterable[str] = (), *, needed: bool = False
) -> None:
    """Cut off the node of rank 0 and the batch script, while its ranks live on; wait for the next start.

    needed: there is no start without that node; it comes back as after a reboot.
    """
    assert cluster.show(job)["BatchHost"] == "n1"
    restarts = int(cluster.show(job)["Restarts"])
    cluster.lose_node("n1")
    for pid in freeze:
        os.kill(int(pid), signal.SIGSTOP)
    until(lambda: int(cluster.show(job)["Restarts"]) > restarts, 120, run)
    if needed:
        cluster.bring_back("n1")
    until(lambda: cluster.state(job) == "RUNNING", 120, run)


@pytest.mark.parametrize(
    ("how", "nodes", "per_node", "times"),
    [("submit", 3, 1, 1), pytest.param("submit", 4, 8, 3, marks=pytest.mark.bench),
     pytest.param("sbatch", 4, 8, 3, marks=pytest.mark.bench)],
)  # fmt: skip
def test_a_training_is_preempted_and_loses_a_node(
    cluster: Cluster, store: Path, tmp_path: Path, how: str, nodes: int, per_node: int, times: int
) -> None:
    steps, save = (400, 50) if per_node == 1 else (80, 10)  # 32 ranks take a second a step on two cores
    words = (*TINY, f"steps={steps}", f"save_every_steps={save}", f"validate_every={save}")

    def begin(out: Path) -> str:
        if how == "sbatch":
            where = {"HPCGEN_STORE": str(store), "HPCGEN_RUN": str(out)}
            return sbatch(cluster, per_node, "train_mp20.sh", *words, flags=(f"--nodes={nodes}",), **where)
        size = {"nodes": nodes, "tasks_per_node": per_node, "gpus_per_node": per_node, "cpus_per_task": 1}
        flags = [word for name, number in size.items() for word in ("--set", f"train.{name}={number}")]
        return submit(cluster, "train", CONFIG, *words, f"store={store}", f"out={out}", *flags)

    run, other = tmp_path / "run", tmp_path / "calm"
    job = begin(run)
    disturb(cluster, job, run, times, step_of)
    try:
        until(lambda: len(events(run, "start")) == times + 1 and step_of(run) > save + 10, 300, run)
        lose_the_first_node(cluster, job, run, needed=nodes == 4)
        seen = step_of(run)
        assert cluster.wait(job, timeout_s=600) == "COMPLETED", log_of(run, job)
    finally:
        if "DOWN" in cluster.nodes()["n1"]:
            cluster.bring_back("n1")
    starts = events(run, "start")
    assert len(starts) == times + 2 and saved_step(starts[-1]["resumed"]) >= seen - save
    assert ranks(job) == [] and cluster.drained() == []
    again = begin(other)
    assert cluster.wait(again, timeout_s=600) == "COMPLETED", log_of(other, again)
    assert_same_run(run, other)


def test_a_node_that_dies_with_its_rank_is_done_without(
    cluster: Cluster, store: Path, calm: Path, tmp_path: Path
) -> None:
    """The others find out at once and leave; srun waits for the lost task until Slurm queues the job again."""
    job = sbatch(cluster, 1, "train_mp20.sh", *TINY, "steps=60", "save_every_steps=10", flags=("--nodes=2",),
                 HPCGEN_STORE=str(store), HPCGEN_RUN=str(tmp_path))  # fmt: skip
    until(lambda: step_of(tmp_path) > 12, 120, tmp_path)
    cluster.crash_node("n2")
    try:
        assert cluster.wait(job, timeout_s=240) == "COMPLETED", log_of(tmp_path, job)
    finally:
        cluster.bring_back("n2")
    assert int(cluster.show(job)["Restarts"]) >= 1 and "another rank ended without a word" in log_of(tmp_path, job)
    assert_same_run(tmp_path, calm)


@pytest.mark.mpi
@pytest.mark.parametrize("mpi", ["MPICH", pytest.param("Open MPI", marks=pytest.mark.bench)])
def test_a_campaign_goes_on_without_a_node_whose_ranks_still_write(cluster: Cluster, tmp_path: Path, mpi: str) -> None:
    checkpoint, run, other = make_checkpoint(tmp_path / "model.pt"), tmp_path / "run", tmp_path / "calm"
    sizes = {"n": 5000, "steps": 4, "tile": 50, "block": 100, "device": "cpu", "processes": 0}
    words = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    where = {"HPCGEN_RUN": str(run), **(open_mpi() if mpi == "Open MPI" else {})}
    job = sbatch(cluster, 2, "campaign.sh", *words, "--checkpoint", str(checkpoint), flags=("--nodes=3",), **where)
    try:
        until(lambda: len(list(run.glob("all-*.h5"))) > 5, 120, run)
        old = {pid for pid in ranks(job) if b"SLURMD_NODENAME=n1" in Path(f"/proc/{pid}/environ").read_bytes()}
        assert len(old) == 2
        lose_the_first_node(cluster, job, run, freeze=old)  # else they hear that the others were told to stop
        until(lambda: len(events(run, "start")) == 2, 60, run)
        for pid in old:
            with suppress(ProcessLookupError):  # Hydra may have found that the others are gone, and ended it
                os.kill(int(pid), signal.SIGCONT)
        until(lambda: not old & set(ranks(job)), 60, run)
        assert cluster.wait(job, timeout_s=400) == "COMPLETED", log_of(run, job, "campaign")
    finally:
        cluster.bring_back("n1")
    assert ranks(job) == [] and cluster.drained() == []
    run_campaign(checkpoint, other, **sizes)
    assert content(run) == content(other)
    assert [name for name in litter(run) if name != "submit"] == []


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["rank 0", "the last rank"])
def test_a_rank_that_is_stopped_ends_the_job_and_is_named(
    cluster: Cluster, store: Path, tmp_path: Path, which: int
) -> None:
    job = train(cluster, store, tmp_path, "steps=100000", "timeout_s=12")
    until(lambda: step_of(tmp_path) > 2, 120, tmp_path)
    os.kill(pid_of(job, which), signal.SIGSTOP)
    failed(cluster, job, 3)
    said, host = log_of(tmp_path, job), os.uname().nodename
    late = f"rank 1 of 2 on {host} keeps the others waiting: no sign of life for"
    assert ("rank 0 of 2 does not answer" if which == 0 else late) in said and "Traceback" not in said


def test_a_rank_that_raises_ends_the_job_with_its_code_and_sentence(
    cluster: Cluster, store: Path, tmp_path: Path
) -> None:
    command = f"srun --kill-on-bad-exit=1 {HPCGEN[0]} {ROOT}/tests/train_jobs.py store={store} out={tmp_path}/run"
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/log", f"--wrap={command}",
                         env=environment(cluster, TOY='{"broken_at": 3, "rank": 3}'))  # fmt: skip
    failed(cluster, job, 4)
    said = (tmp_path / "log").read_text()
    assert said.count("a broken shard") == 1 and "rank 3 of 4" in said and "Traceback" not in said
    assert [(e["rank"], e["message"]) for e in events(tmp_path / "run", "error")] == [(3, "a broken shard")]


MADE = {"n": 1000, "steps": 4, "tile": 50, "block": 50, "device": "cpu", "processes": 0}
FATES = {  # of rank 1: what happens to it, the job's exit code, what is said of it
    "raises": (
        lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096)),
        7,
        r"rank 1 of 2 on \S+: .*\.h5",
    ),
    "killed": (lambda pid: os.kill(pid, signal.SIGKILL), 137, "task 1: Killed"),
    "stopped": (lambda pid: os.kill(pid, signal.SIGSTOP), 3, r"rank 1 on \S+ gives no sign of life"),
}


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The crystals of a campaign that nobody disturbs."""
    run = tmp_path_factory.mktemp("made") / "run"
    run_campaign(checkpoint, run, **MADE)
    return content(run)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("mpi", "fate"),
    [("MPICH", "raises"), ("MPICH", "stopped"), pytest.param("MPICH", "killed", marks=pytest.mark.bench),
     *(pytest.param("Open MPI", fate, marks=pytest.mark.bench) for fate in FATES)],
)  # fmt: skip
def test_a_rank_of_a_campaign_that_fails_ends_the_job_and_the_same_command_finishes_it(
    cluster: Cluster, checkpoint: Path, made: dict[str, bytes], tmp_path: Path, mpi: str, fate: str
) -> None:
    befall, code, told = FATES[fate]
    words = [part for name, value in MADE.items() for part in (f"--{name}", str(value))]
    where = {"HPCGEN_RUN": str(tmp_path), **(open_mpi() if mpi == "Open MPI" else {})}

    def begin() -> str:
        return sbatch(cluster, 2, "campaign.sh", *words, "--checkpoint", str(checkpoint), flags=("--nodes=1",), **where)

    job = begin()
    until(lambda: len(list(tmp_path.glob("all-*.h5"))) > 1, 120, tmp_path)
    befall(pid_of(job, 1))
    failed(cluster, job, code, timeout_s=60)
    said = log_of(tmp_path, job, "campaign")
    assert re.search(told, said) and "Traceback" not in said, said
    again = begin()
    assert cluster.wait(again, timeout_s=120) == "COMPLETED", log_of(tmp_path, again, "campaign")
    assert content(tmp_path) == made
    assert [name for name in litter(tmp_path) if name != "submit"] == []


def test_a_port_that_is_taken_is_passed_over(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = sbatch(cluster, 1, "train_mp20.sh", *TINY, "steps=5", flags=("--nodes=2", "--hold"),
                 HPCGEN_STORE=str(store), HPCGEN_RUN=str(tmp_path))  # fmt: skip
    told = {"STEP_NUM_TASKS": "2", "STEP_NUM_NODES": "2", "JOB_ID": job, "STEP_ID": "0", "STEP_NODELIST": "n[1-2]"}
    place = find_place({"SLURM_PROCID": "0"} | {f"SLURM_{name}": value for name, value in told.items()})
    with socket.socket() as taken:
        taken.bind(("", place.ports[0]))
        taken.listen()
        cluster.run("scontrol", "release", job)
        assert cluster.wait(job, timeout_s=120) == "COMPLETED", log_of(tmp_path, job)


@pytest.mark.bench
def test_a_preempted_job_without_scontrol_is_queued_again_by_slurm(
    cluster: Cluster, store: Path, calm: Path, tmp_path: Path
) -> None:
    """The script cannot ask for it, and must not leave before Slurm ends it."""
    tools, run = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    for tool in ("sbatch", "squeue", "srun", "bash", "env", "mkdir", "hostname", "date", "cat", "seq", "sleep", "tee"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    job = train(cluster, store, run, "steps=60", PATH=f"{Path(HPCGEN[0]).parent}:{tools}")
    disturb(cluster, job, run, 1, step_of)
    assert cluster.wait(job, timeout_s=120) == "COMPLETED", log_of(run, job)
    assert cluster.show(job)["Restarts"] == "1"
    assert f"scontrol does not answer, so job {job} cannot ask to be queued again" in log_of(run, job)
    assert_same_run(run, calm)


# ---- the run folder --------------------------------------------------------------------------------------------------


def test_a_torn_newest_checkpoint_is_passed_over(cluster: Cluster, store: Path, calm: Path, tmp_path: Path) -> None:
    job = train(cluster, store, tmp_path, "steps=60", "save_every_steps=10")
    until(lambda: step_of(tmp_path) > 25, 120, tmp_path)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    until(lambda: not ranks(job), 20, tmp_path)
    newest = sorted((tmp_path / "checkpoints").glob("step-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    job = train(cluster, store, tmp_path, "steps=60", "save_every_steps=10")
    assert cluster.wait(job, timeout_s=120) == "COMPLETED", log_of(tmp_path, job)
    assert f"{newest}: not a whole checkpoint" in log_of(tmp_path, job)
    assert saved_step(events(tmp_path, "start")[-1]["resumed"]) % 10 == 0
    assert_same_run(tmp_path, calm)


def test_a_full_disk_ends_with_7_and_the_same_command_goes_on(
    cluster: Cluster, store: Path, calm: Path, small_disk: Path
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    job = train(cluster, store, run, "steps=60", "save_every_steps=5")
    until(lambda: step_of(run) > 10, 120, run)
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(2**16))
    failed(cluster, job, 7)
    ballast.unlink()
    job = train(cluster, store, run, "steps=60", "save_every_steps=5")
    assert cluster.wait(job, timeout_s=120) == "COMPLETED", log_of(run, job)
    assert_same_run(run, calm)


def test_of_two_jobs_in_one_run_folder_one_is_refused(
    cluster: Cluster, store: Path, calm: Path, tmp_path: Path
) -> None:
    jobs = [train(cluster, store, tmp_path, "steps=60") for _ in range(2)]
    ends = {cluster.wait(job, timeout_s=180): job for job in jobs}
    assert sorted(ends) == ["COMPLETED", "FAILED"]
    failed(cluster, ends["FAILED"], 7)
    told = log_of(tmp_path, ends["FAILED"])
    assert f"{tmp_path}: belongs to another run, pid" in told and f"job {ends['COMPLETED']}, since" in told
    assert_same_run(tmp_path, calm)


# ---- jobs that do not fit --------------------------------------------------------------------------------------------


def test_jobs_that_do_not_fit_say_why(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = train(cluster, store, tmp_path / "gpu", "device=cuda")
    failed(cluster, job, 3)
    assert "no GPU is visible" in log_of(tmp_path / "gpu", job)

    command = f"srun --nodes=2 --ntasks=2 {' '.join(HPCGEN)} train {CONFIG} store={store} out={tmp_path}/few"
    job = cluster.sbatch("--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/log", f"--wrap={command}",
                         env=environment(cluster))  # fmt: skip
    failed(cluster, job, 3)
    assert "2 nodes with SLURM_NTASKS_PER_NODE=2 make 4" in (tmp_path / "log").read_text()


def test_a_job_of_more_tasks_than_gpus_says_so_once(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    flags = ("--nodes=2", "--ntasks-per-node=3")
    job = sbatch(cluster, 2, "train_mp20.sh", flags=flags, HPCGEN_STORE=str(store), HPCGEN_RUN=str(tmp_path))
    failed(cluster, job, 3)
    said = "hpcgen: 3 tasks on a node with 2 GPUs: want one task for each GPU, as with --ntasks-per-node=2\n"
    assert log_of(tmp_path, job) == said


MISFITS = {  # library, plug-in of srun: exit code, what is said
    "MPICH, pmix": (3, "MPICH under srun --mpi=pmix: unless it was built for that it ends here, and wants --mpi=pmi2"),
    "Open MPI, pmi2": (
        3,
        "Open MPI under srun --mpi=pmi2: unless it was built for that it ends here, and wants --mpi=pmix",
    ),
    "MPICH, nope": (1, "Invalid MPI type 'nope'"),
}


@pytest.mark.mpi
@pytest.mark.parametrize("kind", MISFITS)
def test_mpi_of_another_kind_makes_nothing(cluster: Cluster, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    library, plugin = kind.split(", ")
    where = (open_mpi() if library == "Open MPI" else {}) | {"HPCGEN_MPI": plugin, "HPCGEN_RUN": str(tmp_path)}
    words = ("--n", "64", "--checkpoint", str(checkpoint), "--device", "cpu")
    job = sbatch(cluster, 2, "campaign.sh", *words, flags=("--nodes=1",), **where)
    code, told = MISFITS[kind]
    failed(cluster, job, code)
    said = log_of(tmp_path, job, "campaign")
    assert said.count(told) == 1 and "asks to be queued again" not in said, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["submit"]


def test_a_partition_that_does_not_exist(cluster: Cluster, tmp_path: Path) -> None:
    words = ("submit", "campaign", "--n", "8", "--out", str(tmp_path / "run"), "--set", "partition=gup")
    done = subprocess.run([*HPCGEN, *words], env=environment(cluster), capture_output=True, text=True)
    assert done.returncode == 2 and "invalid partition specified: gup" in done.stderr
    assert "the partitions here are high, low" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.mpi
@pytest.mark.parametrize("library", ["MPICH", "Open MPI"])
def test_doctor_examines_two_nodes(cluster: Cluster, tmp_path: Path, library: str) -> None:
    words, env = ("doctor", "--nodes", "2", "--json", "--", "--partition=low"), environment(cluster)
    env |= open_mpi() if library == "Open MPI" else {}
    done = subprocess.run([*HPCGEN, *words], env=env, capture_output=True, text=True, cwd=tmp_path)
    found = {(row["group"], row["name"]): row for row in json.loads(done.stdout)}
    nodes = {name: row["verdict"] for (group, name), row in found.items() if group == "nodes"}
    assert nodes == {"gloo": "good", "nccl": "absent", "MPI": "good"}, done.stdout
    wanted = f"wants {'pmix' if library == 'Open MPI' else 'pmi2'}"
    assert found["MPI", "srun --mpi"]["found"].endswith(wanted), done.stdout
    assert done.returncode == (3 if found["MPI", "mpiexec"]["verdict"] == "bad" else 0), "that of MPICH is on the PATH"
    assert list(tmp_path.iterdir()) == []
