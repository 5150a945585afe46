"""The Slurm that other tests run on: four nodes of eight GPU slots, steps on all of them, preemption."""

from pathlib import Path

import pytest
from slurm_cluster import GPUS, NODES, Cluster
from slurm_jobs import until

pytestmark = [pytest.mark.slurm]


def test_four_idle_nodes_with_eight_gpus_each(cluster: Cluster) -> None:
    assert cluster.nodes() == dict.fromkeys(NODES, "IDLE") and cluster.drained() == []
    told = cluster.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %G").split("\n")
    assert sorted(filter(None, told)) == [f"{name} gpu:a100:{GPUS}" for name in NODES]


def test_a_step_has_one_task_per_gpu(cluster: Cluster) -> None:
    size = ("-N4", "--ntasks-per-node=8", "--gres=gpu:8")
    said = cluster.run("srun", *size, "sh", "-c", 'echo "$SLURMD_NODENAME $SLURM_LOCALID"')
    assert sorted(said.split("\n")[:-1]) == [f"{name} {slot}" for name in NODES for slot in range(GPUS)]


def test_a_preempted_job_is_requeued_and_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = cluster.sbatch("--requeue", "--open-mode=append", f"--output={log}", "--gres=gpu:1",
                         "--wrap=echo start ${SLURM_RESTART_COUNT:-0}; sleep 300")  # fmt: skip
    cluster.wait(job, "RUNNING")
    high = cluster.preempt(1)
    assert cluster.wait(job, ("PENDING", "REQUEUED")) and cluster.wait(high) == "COMPLETED"
    cluster.wait(job, "RUNNING")
    assert cluster.show(job)["Restarts"] == "1"
    until(lambda: "start 1" in log.read_text(), 60, tmp_path)  # RUNNING is said before the script has begun
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    said = log.read_text()
    assert "start 0" in said and "start 1" in said
