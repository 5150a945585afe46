"""Jobs on the Slurm of the tests: how they are submitted, watched and disturbed."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm_cluster import Cluster

from hpcgen.files import read_json_lines

ROOT = Path(__file__).resolve().parent.parent
HPCGEN = (sys.executable, "-m", "hpcgen.cli")
TINY = ("device=cpu", "precision=float32", "compile=false", "batch.crystals=64", "lr=1e-3", "warmup=2", "log_every=1",
        "validate_every=10", "tensorboard=false", "conditions=[]", "autoperi.width=16", "autoperi.heads=2",
        "autoperi.layers=1", "autoperi.pair_width=4", "autoperi.radial=4", "timeout_s=300")  # fmt: skip


def open_mpi() -> dict[str, str]:
    """What a job is told so that it runs under Debian's Open MPI and PMIx instead of MPICH and PMI-2."""
    found = [*Path("/usr/lib").glob("*/libmpi.so.40")]
    if not found or not [*Path("/usr/lib").glob("*/pmix2/lib/libpmix.so")]:
        pytest.skip("not installed: Open MPI and PMIx (apt-get install openmpi-bin libpmix-dev)")
    # nodes that share a machine would take each other's shared memory for their own
    return {"MPI4PY_LIBMPI": str(found[0]), "HPCGEN_MPI": "pmix", "OMPI_MCA_btl": "self,tcp"}


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
    """One of slurm/, with fewer tasks on a node; the job's id."""
    size = (f"--ntasks-per-node={per_node}", f"--gres=gpu:a100:{per_node}", "--cpus-per-task=1", *flags)
    told = (*size, f"--chdir={ROOT}", str(ROOT / "slurm" / script), *words)
    return cluster.sbatch(*told, env=environment(cluster, **env))


def step_of(run: Path) -> int:
    return max((line["step"] for line in read_json_lines(run / "metrics.jsonl")), default=0)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_json_lines(run / "events.jsonl") if event["event"] == kind]


def disturb(cluster: Cluster, job: str, run: Path, times: int, progress: Callable[[Path], int]) -> list[float]:
    """Preempt a running job again and again, each time after some progress; what `seconds_to_leave` was."""
    gone = []
    for _ in range(times):
        cluster.wait(job, "RUNNING", 120)
        start = progress(run)
        until(lambda start=start: progress(run) > start and cluster.state(job) == "RUNNING", 600, run)
        began = time.monotonic()
        high = cluster.preempt(1)
        gone.append(seconds_to_leave(cluster, job, run, began))
        cluster.wait(high, "COMPLETED", 60)
    print("seconds until all ranks were gone:", [round(seconds, 1) for seconds in gone])
    return gone


def seconds_to_leave(cluster: Cluster, job: str, run: Path, began: float) -> float:
    """From Slurm's signal until no rank lives. Counted from when Slurm was last asked before it, or from `began`."""
    asked = [began]

    def told() -> bool:
        asked.append(time.monotonic())
        return cluster.show(job).get("PreemptTime", "") != "None" or not ranks(job)  # a queued job has none

    until(told, 60, run)
    until(lambda: not ranks(job), 30, run)
    return time.monotonic() - asked[-2]


def ranks(job: str) -> list[str]:
    """Processes of hpcgen in the job's steps; srun and the batch script are none."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
            env = (process / "environ").read_bytes().split(b"\0") if any(b"hpcgen" in word for word in words) else []
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}".encode() in env and any(word.startswith(b"SLURM_STEP_ID=") for word in env):
            found.append(process.name)
    return found


def pid_of(job: str, rank: int) -> int:
    """The process of one rank of a job."""
    mark = f"SLURM_PROCID={rank}".encode()
    return next(int(pid) for pid in ranks(job) if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


def log_of(run: Path, job: str, verb: str = "train") -> str:
    """What a job has said."""
    return (run / "submit" / f"{verb}-{job}.log").read_text()


def submit(cluster: Cluster, *words: str, **env: str) -> str:
    """`hpcgen submit WORDS`; the job's id."""
    return cluster.run(*HPCGEN, "submit", *words, env=environment(cluster, **env)).strip()


def saved_step(resumed: str) -> int:
    """The step of a checkpoint, from its name."""
    return int(Path(resumed).stem.rpartition("-")[2])
