"""Jobs on a real Slurm: preempted, cancelled, out of time, with dead ranks and dead nodes, and still the same bytes."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from campaign_jobs import content, litter, make_checkpoint
from campaign_jobs import run as run_campaign
from slurm_cluster import Cluster
from train_jobs import assert_same_run, make_store

from hpcgen.files import read_json_lines

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
ROOT = Path(__file__).resolve().parent.parent
TINY = ("device=cpu", "precision=float32", "compile=false", "batch.crystals=64", "lr=1e-3", "warmup=2", "log_every=1",
        "validate_every=10", "tensorboard=false", "conditions=[]", "autoperi.width=16", "autoperi.heads=2",
        "autoperi.layers=1", "autoperi.pair_width=4", "autoperi.radial=4", "timeout_s=300")  # fmt: skip
SIZES = [pytest.param(2, id="8 ranks"), pytest.param(8, id="32 ranks", marks=pytest.mark.bench)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("slurm") / "store", 320)


def until(what: Callable[[], Any], timeout_s: float, where: Path) -> Any:
    end = time.monotonic() + timeout_s
    while not (found := what()):
        logs = "\n".join(log.read_text()[-3000:] for log in (where / "submit").glob("*.log"))
        assert time.monotonic() < end, f"waited {timeout_s} s in vain\n{logs}"
        time.sleep(0.1)
    return found


def environment(cluster: Cluster, **more: str) -> dict[str, str]:
    """As after `. venv/bin/activate`."""
    path = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
    return {**cluster.env, "PATH": path, "PYTHONPATH": str(ROOT), "HPCGEN_MPI": "pmi2", **more}


def sbatch(cluster: Cluster, per_node: int, script: str, *words: str, flags: tuple[str, ...] = (), **env: str) -> str:
    before, cluster.env = cluster.env, environment(cluster, **env)
    try:
        size = (f"--ntasks-per-node={per_node}", f"--gres=gpu:a100:{per_node}", "--cpus-per-task=1", *flags)
        return cluster.sbatch(*size, f"--chdir={ROOT}", str(ROOT / "slurm" / script), *words)
    finally:
        cluster.env = before


def step_of(run: Path) -> int:
    return max((line["step"] for line in read_json_lines(run / "metrics.jsonl")), default=0)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_json_lines(run / "events.jsonl") if event["event"] == kind]


def disturb(cluster: Cluster, job: str, run: Path, times: int, progress: Callable[[Path], int]) -> list[float]:
    """Preempt a running job again and again, each time after some progress; seconds until all its ranks were gone."""
    gone = []
    for _ in range(times):
        cluster.wait(job, "RUNNING", 120)
        start = progress(run)
        until(lambda start=start: progress(run) > start and cluster.state(job) == "RUNNING", 240, run)
        began = time.monotonic()
        high = cluster.preempt(1)
        until(lambda: not ranks(job), 30, run)
        gone.append(time.monotonic() - began)
        cluster.wait(high, "COMPLETED", 60)
    return gone


def ranks(job: str) -> list[str]:
    """Processes of the job's steps that are hpcgen's."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
            env = (process / "environ").read_bytes().split(b"\0") if any(b"hpcgen" in word for word in words) else []
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}".encode() in env and any(word.startswith(b"SLURM_PROCID=") for word in env):
            found.append(process.name)
    return found


@pytest.mark.parametrize("per_node", SIZES)
def test_training_preempted_three_times_is_training_not_preempted(
    cluster: Cluster, store: Path, tmp_path: Path, per_node: int, record_property: Callable[[str, object], None]
) -> None:
    words, where = (*TINY, "steps=400"), {"HPCGEN_STORE": str(store)}
    run, calm = tmp_path / "run", tmp_path / "calm"
    job = sbatch(cluster, per_node, "train_mp20.sh", *words, HPCGEN_RUN=str(run), **where)
    gone = disturb(cluster, job, run, 3, step_of)
    assert cluster.wait(job, timeout_s=400) == "COMPLETED", (run / "submit" / f"train-{job}.log").read_text()
    record_property("seconds until all ranks were gone", gone)
    print("seconds until all ranks were gone:", [round(seconds, 1) for seconds in gone])
    assert max(gone) < 15  # on two cores, with what Slurm itself takes; see the note for an idle machine
    starts, stops = events(run, "start"), events(run, "stop")
    assert len(starts) == 4 and all(start["size"] == 4 * per_node for start in starts)
    assert [int(start["resumed"].rpartition("-")[2].split(".")[0]) for start in starts[1:]] == [
        stop["step"] for stop in stops
    ], "no step was lost"
    assert cluster.drained() == [] and ranks(job) == []

    other = sbatch(cluster, per_node, "train_mp20.sh", *words, HPCGEN_RUN=str(calm), **where)
    assert cluster.wait(other, timeout_s=400) == "COMPLETED"
    assert_same_run(run, calm)


def test_a_campaign_preempted_three_times_is_one_in_one_process(cluster: Cluster, tmp_path: Path) -> None:
    checkpoint, run, calm = make_checkpoint(tmp_path / "model.pt"), tmp_path / "run", tmp_path / "calm"
    sizes = {"n": 6000, "steps": 2, "tile": 100, "block": 200, "device": "cpu", "processes": 0}
    words = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    job = sbatch(cluster, 2, "campaign.sh", *words, "--checkpoint", str(checkpoint), HPCGEN_RUN=str(run))
    disturb(cluster, job, run, 3, lambda run: len(list(run.glob("all-*.h5"))))
    assert cluster.wait(job, timeout_s=400) == "COMPLETED", (run / "submit" / f"campaign-{job}.log").read_text()
    run_campaign(checkpoint, calm, **sizes)
    assert content(run) == content(calm)
    assert [name for name in litter(run) if name != "submit"] == []


def test_a_cancelled_job_stays_away(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = sbatch(cluster, 1, "train_mp20.sh", *TINY, "steps=100000", HPCGEN_STORE=str(store), HPCGEN_RUN=str(tmp_path))
    until(lambda: step_of(tmp_path) > 2, 120, tmp_path)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED" and cluster.show(job)["Restarts"] == "0"
    until(lambda: not ranks(job), 20, tmp_path)
    assert events(tmp_path, "stop")[0]["reason"].startswith("stopped early (SIGTERM)")


@pytest.mark.bench  # four minutes, most of them waiting
def test_a_job_out_of_time_is_queued_again_and_ends(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    flags, steps = ("--time=1", "--signal=USR2@10"), 1500
    job = sbatch(cluster, 1, "train_mp20.sh", *TINY, f"steps={steps}", flags=flags, HPCGEN_STORE=str(store),
                 HPCGEN_RUN=str(tmp_path))  # fmt: skip
    assert cluster.wait(job, timeout_s=500) == "COMPLETED"
    assert int(cluster.show(job)["Restarts"]) >= 1 and step_of(tmp_path) == steps


def test_a_job_that_is_told_before_it_has_begun_is_queued_again(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = sbatch(cluster, 1, "train_mp20.sh", *TINY, "steps=5", HPCGEN_STORE=str(store), HPCGEN_RUN=str(tmp_path))
    until(lambda: ranks(job), 60, tmp_path)
    cluster.run("scancel", "--signal=USR2", job)  # as at the end of a job's time: no handler is there yet
    assert cluster.wait(job, timeout_s=120) == "COMPLETED" and cluster.show(job)["Restarts"] == "1"
    assert "left with 140 and asks to be queued again" in _log(tmp_path, job)


def test_a_job_that_fails_is_not_queued_again(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = sbatch(cluster, 2, "train_mp20.sh", *TINY, "steps=5", HPCGEN_STORE="/nowhere", HPCGEN_RUN=str(tmp_path))
    assert cluster.wait(job) == "FAILED" and cluster.show(job)["ExitCode"] == "4:0"
    assert "want the folder of a store; sbatch slurm/preprocess.sh" in _log(tmp_path, job)

    job = sbatch(cluster, 2, "train_mp20.sh", *TINY, "stps=5", HPCGEN_STORE=str(store), HPCGEN_RUN=str(tmp_path))
    assert cluster.wait(job, timeout_s=120) == "FAILED" and cluster.show(job)["ExitCode"] == "2:0"
    assert "unknown key stps; did you mean steps?" in _log(tmp_path, job)


def test_a_rank_that_is_killed_ends_the_job(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    job = sbatch(cluster, 2, "train_mp20.sh", *TINY, "steps=100000", HPCGEN_STORE=str(store), HPCGEN_RUN=str(tmp_path))
    until(lambda: step_of(tmp_path) > 2, 120, tmp_path)
    os.kill(int(ranks(job)[-1]), 9)
    assert cluster.wait(job) == "FAILED" and cluster.show(job)["Restarts"] == "0"
    until(lambda: not ranks(job), 20, tmp_path)


def test_a_chain_through_submitit(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    run, made = tmp_path / "run", tmp_path / "made"
    flags = ("--set", "campaign.nodes=2", "--set", "train.nodes=2", "--set", "mpi=pmi2")
    before, cluster.env = cluster.env, environment(cluster)
    try:
        hpcgen = (sys.executable, "-m", "hpcgen.cli", "submit")
        first = cluster.run(*hpcgen, "train", str(ROOT / "configs" / "autoperi_mp20.yaml"), f"store={store}",
                            f"out={run}", *TINY, "steps=10", *flags).strip()  # fmt: skip
        second = cluster.run(*hpcgen, "campaign", "--checkpoint", str(run / "best.pt"), "--n", "64", "--steps", "2",
                             "--tile", "16", "--block", "16", "--device", "cpu", "--processes", "0", "--out", str(made),
                             *flags, "--after", first).strip()  # fmt: skip
        third = cluster.run(*hpcgen, "evaluate", str(made), "--after", second).strip()
    finally:
        cluster.env = before
    assert cluster.show(second)["Dependency"].startswith(f"afterok:{first}")
    assert cluster.wait(first, timeout_s=120) == "COMPLETED", _log(run, first)
    assert cluster.wait(second, timeout_s=120) == "COMPLETED", _log(made, second, "campaign")
    assert cluster.wait(third, timeout_s=120) == "COMPLETED", _log(made, third, "evaluate")
    assert json.loads((made / "summary.json").read_text())["asked"] == 64
    assert json.loads((made / "evaluate" / "generate.json").read_text())["asked"] == 64
    assert sorted(file.name for file in (run / "submit").iterdir()) == [
        f"{first}_submission.sh", f"{first}_submitted.pkl", f"train-{first}.log", "train.json"
    ]  # fmt: skip


def _log(run: Path, job: str, verb: str = "train") -> str:
    return (run / "submit" / f"{verb}-{job}.log").read_text()
