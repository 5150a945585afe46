"""Jobs on a real Slurm: preempted, cancelled, out of time, with dead ranks and dead nodes, and still the same bytes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from campaign_jobs import content, litter, make_checkpoint
from campaign_jobs import run as run_campaign
from cif_texts import rows, write_csv
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
    ranks,
    saved_step,
    sbatch,
    step_of,
    submit,
    until,
)
from test_inodes import MOST, RESTARTS, inodes
from train_jobs import assert_same_run, make_store

from hpcgen.launch.site import GPU_FLAGS

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LEAVE_S = 5  # from the signal of a preemption until all ranks are gone
SIZES = [pytest.param(1, id="4 ranks"), pytest.param(8, id="32 ranks", marks=pytest.mark.bench)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("slurm") / "store", 320)


def train(cluster: Cluster, store: Path, run: Path, *words: str) -> str:
    """The batch script with a rank on each of two nodes; the job's id."""
    where = {"HPCGEN_STORE": str(store), "HPCGEN_RUN": str(run)}
    return sbatch(cluster, 1, "train_mp20.sh", *TINY, *words, flags=("--nodes=2",), **where)


@pytest.mark.parametrize("per_node", SIZES)
def test_training_preempted_three_times_is_training_not_preempted(
    cluster: Cluster, store: Path, tmp_path: Path, per_node: int
) -> None:
    words, where = (*TINY, "steps=240"), {"HPCGEN_STORE": str(store)}
    run, calm = tmp_path / "run", tmp_path / "calm"
    job = sbatch(cluster, per_node, "train_mp20.sh", *words, HPCGEN_RUN=str(run), **where)
    gone = disturb(cluster, job, run, 3, step_of)
    assert cluster.wait(job, timeout_s=400) == "COMPLETED", log_of(run, job)
    assert max(gone) < LEAVE_S
    starts, stops = events(run, "start"), events(run, "stop")
    assert len(starts) == 4 and all(start["size"] == 4 * per_node for start in starts)
    assert [saved_step(start["resumed"]) for start in starts[1:]] == [stop["step"] for stop in stops], "a step lost"
    assert cluster.drained() == [] and ranks(job) == []

    other = sbatch(cluster, per_node, "train_mp20.sh", *words, HPCGEN_RUN=str(calm), **where)
    assert cluster.wait(other, timeout_s=400) == "COMPLETED"
    assert_same_run(run, calm)
    print(f"{4 * per_node} ranks, 3 restarts: {inodes(run)} inodes")
    assert inodes(run) < MOST


@pytest.mark.bench  # some 25 minutes: 32 ranks begin 21 times; the same HPCGEN_BENCH_RUN again goes on with its run
def test_a_training_of_32_ranks_started_again_twenty_times_is_few_files(
    cluster: Cluster, store: Path, tmp_path: Path
) -> None:
    run = Path(os.environ.get("HPCGEN_BENCH_RUN") or tmp_path)
    wanted = int(os.environ.get("HPCGEN_BENCH_RESTARTS", RESTARTS))
    words = (*TINY, "steps=100000", "tensorboard=true")
    job = sbatch(cluster, 8, "train_mp20.sh", *words, HPCGEN_STORE=str(store), HPCGEN_RUN=str(run))
    counts = []
    while (begun := len(events(run, "start"))) < wanted:
        disturb(cluster, job, run, 1, step_of)
        assert len(events(run, "start")) == begun + 1
        counts.append(inodes(run))
    until(lambda: len(events(run, "start")) == wanted + 1, 600, run)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    until(lambda: not ranks(job), 20, run)
    counts.append(inodes(run))
    print(f"32 ranks, {wanted} restarts: {counts[-1]} inodes; after each stop {counts}")
    assert counts[-1] < MOST
    assert max(after - before for before, after in zip(counts[5:], counts[6:], strict=False)) <= 1, "TensorBoard's"


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("mpi", "per_node", "n", "times"),
    [("MPICH", 1, 6000, 3), ("Open MPI", 1, 3000, 1), pytest.param("MPICH", 8, 20_000, 3, marks=pytest.mark.bench),
     pytest.param("Open MPI", 8, 20_000, 3, marks=pytest.mark.bench)],
)  # fmt: skip
def test_a_campaign_preempted_again_and_again_is_one_in_one_process(
    cluster: Cluster, tmp_path: Path, mpi: str, per_node: int, n: int, times: int
) -> None:
    checkpoint, run, calm = make_checkpoint(tmp_path / "model.pt"), tmp_path / "run", tmp_path / "calm"
    sizes = {"n": n, "steps": 2, "tile": 100, "block": 200, "device": "cpu", "processes": 0}
    words = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    where = {"HPCGEN_RUN": str(run), **(open_mpi() if mpi == "Open MPI" else {})}
    job = sbatch(cluster, per_node, "campaign.sh", *words, "--checkpoint", str(checkpoint), **where)
    gone = disturb(cluster, job, run, times, lambda run: len(list(run.glob("all-*.h5"))))
    assert max(gone) < LEAVE_S
    assert cluster.wait(job, timeout_s=400) == "COMPLETED", log_of(run, job, "campaign")
    assert [(start["team"], start["size"]) for start in events(run, "start")] == [("mpi", 4 * per_node)] * (times + 1)
    assert cluster.drained() == [] and ranks(job) == []
    run_campaign(checkpoint, calm, **sizes)
    assert content(run) == content(calm)
    assert [name for name in litter(run) if name != "submit"] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], bytes]:
    """What builds a store, but for --processes and --out; and the manifest, with all hashes, if one process does."""
    folder = tmp_path_factory.mktemp("built")
    words = [str(ROOT / "preprocess" / "mp20.py"), str(write_csv(folder / "t.csv", rows(200))), "--no-page",
             "--block-rows", "4", "--shard-crystals", "16"]  # fmt: skip
    alone = [sys.executable, *words, "--processes", "0", "--out", str(folder / "store")]
    subprocess.run(alone, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return words, (folder / "store" / "manifest.json").read_bytes()


def test_an_array_is_preempted_and_one_of_its_tasks_is_cancelled(
    cluster: Cluster, built: tuple[list[str], bytes], tmp_path: Path
) -> None:
    """In an array one task bears the number of them all: what it asks for must hold for itself alone."""
    words, manifest = built
    flags = ("--nodes=1", "--array=0-2")
    job = sbatch(cluster, 1, "preprocess.sh", *words, "--processes", "1", flags=flags, HPCGEN_STORE=str(tmp_path))
    tasks = [f"{job}_{number}" for number in range(3)]
    until(lambda: list(tmp_path.glob("work/parsed-*.npz")), 120, tmp_path)
    high = cluster.preempt(1)
    cluster.wait(high, "COMPLETED", 60)
    cluster.run("scancel", tasks[2])
    assert [cluster.wait(task, timeout_s=240) for task in tasks] == ["COMPLETED", "COMPLETED", "CANCELLED"]
    assert [cluster.show(task)["Restarts"] for task in tasks[:2]] == ["1", "1"]
    assert (tmp_path / "manifest.json").read_bytes() == manifest


@pytest.mark.mpi
def test_a_store_is_built_by_the_script_by_submit_and_by_what_a_dry_run_prints(
    cluster: Cluster, built: tuple[list[str], bytes], tmp_path: Path
) -> None:
    words, manifest = [*built[0], "--processes", "0"], built[1]
    flags = ("--set", "preprocess.nodes=2", "--set", "mpi=pmi2")
    told = submit(cluster, "preprocess", *words, "--out", str(tmp_path / "none"), *flags, "--test-only")
    assert "to start at" in told and "n[1-2] in partition low" in told
    assert not (tmp_path / "none").exists()
    assert "hpcgen-preprocess-" not in cluster.run("squeue", "--noheader", "--format=%j")

    stores = [tmp_path / name for name in ("script", "submit", "dry run")]
    dry = shlex.join([*HPCGEN, "submit", "preprocess", *words, "--out", str(stores[2]), "--dry-run"])
    jobs = [
        sbatch(cluster, 1, "preprocess.sh", *words, flags=("--nodes=2",), HPCGEN_STORE=str(stores[0])),
        submit(cluster, "preprocess", *words, "--out", str(stores[1]), *flags),
        cluster.run("bash", "-c", f"{dry} | sbatch --parsable", env=environment(cluster)).strip(),
    ]
    for job, store, ranks_of_it in zip(jobs, stores, (2, 2, 1), strict=True):
        assert cluster.wait(job, timeout_s=120) == "COMPLETED", log_of(store, job, "preprocess")
        assert [start["size"] for start in events(store, "start")][:1] == [ranks_of_it]
        assert (store / "manifest.json").read_bytes() == manifest


def test_a_cancelled_job_stays_away(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = train(cluster, store, tmp_path, "steps=100000")
    until(lambda: step_of(tmp_path) > 2, 120, tmp_path)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED" and cluster.show(job)["Restarts"] == "0"
    until(lambda: not ranks(job), 20, tmp_path)
    assert events(tmp_path, "stop")[0]["reason"].startswith("stopped early (SIGTERM)")


def test_status_follows_a_job(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    def state() -> tuple[str, int, bool]:
        told = json.loads(cluster.run(*HPCGEN, "status", str(tmp_path), "--json", env=environment(cluster)))
        return told["state"], len(told["restarts"]), job in [each["job"] for each in told["jobs"]]

    job = train(cluster, store, tmp_path, "steps=100000")
    until(lambda: step_of(tmp_path) > 2, 120, tmp_path)
    assert state() == ("running", 0, False), "signs of life are enough, nobody is asked"
    cluster.preempt(4)
    until(lambda: events(tmp_path, "stop") and not ranks(job), 60, tmp_path)
    until(lambda: state() == ("queued", 0, True), 30, tmp_path)
    until(lambda: len(events(tmp_path, "start")) == 2, 120, tmp_path)
    assert state() == ("running", 1, False)
    cluster.run("scancel", job)
    until(lambda: not ranks(job), 60, tmp_path)
    assert state()[:2] == ("stopped", 1)


@pytest.mark.bench  # some minutes, most of them waiting
def test_a_job_out_of_time_is_queued_again_and_ends(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    flags, steps = ("--time=1", "--signal=USR2@10"), 300
    job = sbatch(cluster, 1, "train_mp20.sh", *TINY, f"steps={steps}", flags=flags, HPCGEN_STORE=str(store),
                 HPCGEN_RUN=str(tmp_path))  # fmt: skip
    assert cluster.wait(job, timeout_s=500) == "COMPLETED"
    assert int(cluster.show(job)["Restarts"]) >= 1 and step_of(tmp_path) == steps


@pytest.mark.mpi
@pytest.mark.bench
def test_a_campaign_out_of_time_leaves_before_it_is_ended_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    checkpoint, run, calm = make_checkpoint(tmp_path / "model.pt"), tmp_path / "run", tmp_path / "calm"
    sizes = {"n": 16_000, "steps": 8, "tile": 50, "block": 100, "device": "cpu", "processes": 0}
    words = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    flags = ("--nodes=2", "--time=1", "--signal=USR2@10")
    job = sbatch(cluster, 1, "campaign.sh", *words, "--checkpoint", str(checkpoint), flags=flags, HPCGEN_RUN=str(run))
    assert cluster.wait(job, timeout_s=400) == "COMPLETED", log_of(run, job, "campaign")
    restarts = int(cluster.show(job)["Restarts"])
    said = log_of(run, job, "campaign")
    assert restarts >= 1 and said.count("left with 75 and asks to be queued again") == restarts
    assert "TIME LIMIT" not in said, "Slurm ended it"
    run_campaign(checkpoint, calm, **{**sizes, "processes": 2})
    assert content(run) == content(calm)
    assert [name for name in litter(run) if name != "submit"] == []


@pytest.mark.parametrize("told", ["every task", "one task"])
def test_a_job_that_is_told_before_it_has_begun_is_queued_again(
    cluster: Cluster, store: Path, tmp_path: Path, told: str
) -> None:
    job = train(cluster, store, tmp_path, "steps=5")
    until(lambda: len(ranks(job)) == 2, 60, tmp_path)
    if told == "every task":
        cluster.run("scancel", "--signal=USR2", job)  # as at the end of a job's time: no handler is there yet
    else:  # as where a step is still being launched: srun ends the others, and tells their 143
        os.kill(int(ranks(job)[0]), signal.SIGUSR2)
    assert cluster.wait(job, timeout_s=120) == "COMPLETED" and cluster.show(job)["Restarts"] == "1"
    assert "left with 140 and asks to be queued again" in log_of(tmp_path, job)


def test_a_job_that_fails_is_not_queued_again(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = train(cluster, Path("/nowhere"), tmp_path, "steps=5")
    assert cluster.wait(job) == "FAILED" and cluster.show(job)["ExitCode"] == "4:0"
    assert "want the folder of a store; sbatch slurm/preprocess.sh" in log_of(tmp_path, job)

    job = train(cluster, store, tmp_path, "stps=5")
    assert cluster.wait(job, timeout_s=120) == "FAILED" and cluster.show(job)["ExitCode"] == "2:0"
    assert "unknown key stps; did you mean steps?" in log_of(tmp_path, job)


def test_a_rank_that_is_killed_ends_the_job(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = train(cluster, store, tmp_path, "steps=100000")
    until(lambda: step_of(tmp_path) > 2, 120, tmp_path)
    os.kill(int(ranks(job)[-1]), 9)
    assert cluster.wait(job) == "FAILED" and cluster.show(job)["Restarts"] == "0"
    until(lambda: not ranks(job), 20, tmp_path)


@pytest.mark.parametrize("kind", GPU_FLAGS)
def test_sbatch_takes_every_way_to_ask_for_gpus(cluster: Cluster, tmp_path: Path, kind: str) -> None:
    size = {"nodes": 4, "tasks_per_node": 8, "gpus_per_node": 8, "cpus_per_task": 8, "mem": "100G"}
    told = {"gpu_flag": kind, "gpu_type": "a100", **{f"campaign.{name}": value for name, value in size.items()}}
    words = [word for name, value in told.items() for word in ("--set", f"{name}={value}")]
    command = ("submit", "campaign", "--n", "8", "--out", str(tmp_path / "run"), *words, "--test-only")
    done = subprocess.run([*HPCGEN, *command], env=environment(cluster), capture_output=True, text=True)
    assert done.returncode == 0 and "256 processors on nodes n[1-4]" in done.stdout + done.stderr, done


def test_a_chain_through_submitit_waits_for_a_link_that_is_preempted(cluster: Cluster, tmp_path: Path) -> None:
    """preprocess, submitted from within another job, train, campaign without MPI and evaluate, all queued at once."""
    store, run, made = tmp_path / "store", tmp_path / "run", tmp_path / "made"
    flags = ("--set", "campaign.nodes=2", "--set", "train.nodes=2", "--set", "mpi=none")
    config, table = str(ROOT / "configs" / "autoperi_mp20.yaml"), write_csv(tmp_path / "t.csv", rows(120))
    sizes = ("--n", "64", "--steps", "2", "--tile", "16", "--block", "16", "--device", "cpu", "--processes", "0")
    told = ("--checkpoint", str(run / "best.pt"), "--out", str(made), *sizes)
    build = (str(ROOT / "preprocess" / "mp20.py"), str(table), "--no-page", "--processes", "0", "--out", str(store))
    seen = ("--set", "setup=[env | grep ^SLURM_STEP || echo of no other step]")
    within = ("srun", "--nodes=1", "--ntasks=1", *HPCGEN, "submit", "preprocess", *build, *seen)
    built = cluster.run(*within, env=environment(cluster)).strip()
    first = submit(cluster, "train", config, f"store={store}", f"out={run}", *TINY, "steps=100", *flags,
                   "--after", built)  # fmt: skip
    second = submit(cluster, "campaign", *told, *flags, "--after", first)
    third = submit(cluster, "evaluate", str(made), "--set", "container=nice -n 1", "--after", second)
    assert cluster.show(second)["Dependency"].startswith(f"afterok:{first}")
    assert cluster.wait(built, timeout_s=120) == "COMPLETED", log_of(store, built, "preprocess")
    assert "of no other step" in log_of(store, built, "preprocess")
    disturb(cluster, first, run, 1, step_of)
    waiting = [cluster.show(link) for link in (second, third)]
    assert [(link["JobState"], link["Reason"]) for link in waiting] == [("PENDING", "Dependency")] * 2
    assert cluster.wait(first, timeout_s=240) == "COMPLETED", log_of(run, first)
    assert cluster.show(first)["Restarts"] == "1"
    assert cluster.wait(second, timeout_s=240) == "COMPLETED", log_of(made, second, "campaign")
    assert cluster.wait(third, timeout_s=240) == "COMPLETED", log_of(made, third, "evaluate")
    assert [(start["team"], start["size"]) for start in events(made, "start")] == [("array", 2)]
    assert json.loads((made / "summary.json").read_text())["asked"] == 64
    assert json.loads((made / "evaluate" / "generate.json").read_text())["asked"] == 64
    assert sorted(file.name for file in (run / "submit").iterdir()) == [
        f"{first}_submission.sh", f"{first}_submitted.pkl", f"train-{first}.log", "train.json"
    ]  # fmt: skip
