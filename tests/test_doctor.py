"""doctor: real checks of this machine, and each fault it is there for."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcgen.errors import UsageError
from hpcgen.launch import cluster, doctor, hello
from hpcgen.launch.cluster import Row
from hpcgen.launch.doctor import Finding

SMALL_DISK = "4m"
OPEN_MPI = "/usr/bin/mpiexec.openmpi"
VERDICTS = {"good", "warn", "bad", "absent"}
CONFIG = """Configuration data as of 2026-11-21T15:00:00
AccountingStorageType   = accounting_storage/none
JobRequeue              = 1
KillOnBadExit           = 0
KillWait                = 5 sec
MaxArraySize            = 1001
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
SLURM_VERSION           = 22.05.8
SlurmctldParameters     = (null)

Slurmctld(primary) at n0 is UP
"""
PARTITIONS = """PartitionName=low AllowGroups=ALL GraceTime=5 PreemptMode=REQUEUE State=UP TotalNodes=4
PartitionName=high AllowGroups=ALL GraceTime=0 PreemptMode=OFF State=UP TotalNodes=4
"""
SINFO = "low*|up|4|64|infinite|gpu:a100:8\nhigh|up|4|64|infinite|(null)\n"


def by_name(rows: list[Row]) -> dict[str, Row]:
    for name, verdict, found, advice in rows:
        assert verdict in VERDICTS and found, name
        assert bool(advice) == (verdict != "good"), f"{name}: advice for anything but good, and only then"
    return {row[0]: row for row in rows}


def stand_in(folder: Path, name: str, script: str, interpreter: str = "/bin/sh") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{interpreter}\n{textwrap.dedent(script)}")
    (folder / name).chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH whose programs answer as Slurm does."""
    folder = tmp_path / "slurm"
    told = {"config": CONFIG, "partition": PARTITIONS, "sinfo": SINFO}
    folder.mkdir()
    for name, text in told.items():
        (folder / f"{name}.txt").write_text(text)
    stand_in(folder, "scontrol", f"exec cat {folder}/$2.txt")
    stand_in(folder, "sinfo", f"exec cat {folder}/sinfo.txt")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def change(slurm: Path, **settings: str) -> dict[str, Row]:
    """Findings where Slurm's configuration differs."""
    lines = [line for line in CONFIG.splitlines() if line.split(" ")[0] not in settings]
    (slurm / "config.txt").write_text("\n".join([*lines, *(f"{name} = {value}" for name, value in settings.items())]))
    return by_name(cluster.check_slurm())


# how it is put together


def test_this_machine_is_examined_and_rendered(tmp_path: Path) -> None:
    start = time.monotonic()
    findings = doctor.examine(tmp_path)
    assert time.monotonic() - start < 90
    groups = list(dict.fromkeys(finding.group for finding in findings))
    assert groups == ["Python", "torch", "MPI", "folder", "Slurm", "environment"]
    wrong = [f for f in findings if f.verdict == "bad" and f.group in ("Python", "torch", "folder")]
    assert not wrong, wrong
    rows = by_name([(f.name, f.verdict, f.found, f.advice) for f in findings])
    assert {rows[name][1] for name in ("writing", "locks")} == {"good"}
    text = doctor.render(findings)
    assert all(finding.found.split()[0] in text for finding in findings)
    assert max(len(line) for line in text.splitlines()) < 140
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_lines_are_aligned_and_the_exit_code_is_that_of_the_environment() -> None:
    good, absent = Finding("A", "x", "good", "fine"), Finding("A", "longer", "absent", "none", "get one")
    assert doctor.render([good, absent]).splitlines() == [
        "A",
        "  good    x       fine",
        "  absent  longer  none",
        "                  -> get one",
        "1 good, 0 warn, 0 bad, 1 absent",
    ]
    assert doctor.exit_code([good, absent]) == 0
    assert doctor.exit_code([good, Finding("B", "y", "bad", "broken", "mend it")]) == 3
    with pytest.raises(UsageError, match="nodes -1"):
        doctor.examine(Path(), -1)


def test_one_check_takes_no_other_down() -> None:
    def raises() -> list[Row]:
        raise ValueError("boom")

    def hangs() -> list[Row]:
        time.sleep(30)
        return []

    start = time.monotonic()
    found = doctor.together({"a": raises, "b": hangs, "c": lambda: [("x", "good", "fine", "")]}, 0.5)
    assert time.monotonic() - start < 5
    assert [(f.group, f.verdict) for f in found] == [("a", "bad"), ("b", "bad"), ("c", "good")]
    assert "ValueError: boom" in found[0].found and "no answer" in found[1].found


def test_a_process_that_does_not_end_is_ended_and_what_it_said_is_kept() -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('HELLO {\"a\": 1}', flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    told = hello.hear([sys.executable, "-c", code], 2)
    assert time.monotonic() - start < 15
    assert (told.code, told.facts(), told.last_words()) == (None, {"a": 1}, "it did not end in time")
    assert hello.hear(["/nowhere/program"], 3).code is None


# the interpreter and torch


def test_packages_are_compared_with_their_bounds() -> None:
    wanted = ["h5py>=3.11", "numpy>=99.1", "no-such-thing>=2", 'mpi4py>=99; extra == "mpi"', 'no-other; extra == "x"']
    rows = by_name(doctor.check_packages(wanted))
    assert {name: row[1] for name, row in rows.items()} == {
        "numpy": "bad",
        "no-such-thing": "bad",
        "mpi4py": "warn",
        "packages": "good",
    }
    assert "want 99.1 or newer" in rows["numpy"][2] and rows["numpy"][3] == "pip install 'numpy>=99.1'"
    assert "not installed" in rows["no-such-thing"][2]
    assert "h5py 3" in rows["packages"][2]
    for older, newer in (("2.6", "2.10"), ("2.6.1", "2.6.2+cpu"), ("2025.1.9", "2026.10.24")):
        assert doctor._numbers(older) < doctor._numbers(newer)
    assert doctor._numbers("2.6.0+cu124") == doctor._numbers("2.6") == [2, 6]


@pytest.mark.parametrize(
    "fault", ["raise OSError('libcudart.so.12: cannot open shared object')", "import os; os.abort()"]
)
def test_a_torch_that_cannot_be_loaded_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    (tmp_path / "torch.py").write_text(fault)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(doctor.__file__).parents[2]}")
    (row,) = doctor.check_torch()
    assert row[:2] == ("torch", "bad")
    assert "libcudart.so.12" in row[2] or "Abort" in row[2] or "exit code -6" in row[2]
    assert by_name(doctor.check_environment(os.environ))["PYTHONPATH"][1] == "warn"


def test_gpus_that_torch_cannot_use() -> None:
    facts = {"torch": "2.6", "cuda": "12.4", "hip": None, "cards": 4, "gpus": []}
    rows = doctor.gpu_rows(hello.Told(0, lines=[facts]))
    assert rows[0][:3] == ("GPUs", "warn", "4, but torch cannot use them")
    rows = doctor.gpu_rows(hello.Told(1, lines=[facts | {"gpus": ["A100, 80 GiB"]}], err="CUDA error: no kernel image"))
    assert rows[0][1] == "bad" and "no kernel image" in rows[0][2]


# MPI


@pytest.mark.mpi
def test_mpi_and_its_launcher_are_found() -> None:
    rows = by_name(doctor.check_mpi())
    assert rows["mpi4py"][1] == "good" and "libmpi" in rows["mpi4py"][2]
    assert rows["mpiexec"][1] == "good", rows
    assert "MPI_Init" not in rows


@pytest.mark.mpi
@pytest.mark.skipif(not Path(OPEN_MPI).exists(), reason="Open MPI is not installed beside MPICH")
def test_an_mpiexec_of_another_family_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mpiexec").symlink_to(OPEN_MPI)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert doctor.mpiexec_row("MPICH 5.0.2")[1] == "bad"
    assert doctor.mpiexec_row("Open MPI 4.1.4")[1] == "good"


@pytest.mark.mpi
def test_a_library_that_cannot_be_loaded_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPI4PY_LIBMPI", "/nowhere/libmpi.so.12")
    (row,) = doctor.check_mpi()
    assert row[1] == "bad" and "cannot load" in row[2] and "MPI4PY_LIBMPI" in row[3]


def test_srun_mpi_follows_the_library(slurm: Path) -> None:
    listed = "echo 'MPI plugin types are...' >&2; printf '\\tnone\\n\\tpmi2\\n\\tpmix_v4\\n\\tpmix\\n' >&2"
    stand_in(slurm, "srun", listed)
    types = cluster.mpi_types()
    assert types == ["pmi2", "pmix_v4", "pmix"]
    best = cluster.best_mpi
    assert (best("Open MPI 4.1.4", "", types), best("MPICH 5.0.2", "", types)) == ("pmix", "pmi2")
    both = ["cray_shasta", "pmi2"]
    assert best("MPICH 5.0.2", "/usr/lib/libmpi.so.12", both) == "pmi2", "every Slurm offers the other"
    assert best("MPICH 3.4", "/opt/cray/pe/lib64/libmpi_gnu_123.so.12", both) == "cray_shasta"
    assert best("MPICH 5.0.2", "", ["pmix"]) == best("Open MPI 4.1.4", "", []) == ""
    stand_in(slurm, "srun", "echo 'MPI plugin types are pmix'; exit 1")
    assert cluster.mpi_types() == []


@pytest.mark.mpi
def test_an_mpi_that_srun_cannot_start_is_told(slurm: Path) -> None:
    stand_in(slurm, "srun", "echo 'MPI plugin types are...' >&2; echo pmi9 >&2")
    row = by_name(doctor.check_mpi())["srun --mpi"]
    assert row[1] == "warn" and row[2].startswith("offers pmi9; none is for ")


# the folder


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (row,) = doctor.check_folder(tmp_path / "no" / "such")
    assert row[1] == "bad" and "No such file" in row[2]


@pytest.fixture
def read_only(small_disk: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    yield small_disk
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_a_folder_that_cannot_be_written(read_only: Path) -> None:
    row = by_name(doctor.check_folder(read_only))["writing"]
    assert row[1] == "bad" and "Read-only file system" in row[2]


def test_a_full_folder_of_this_node_alone(small_disk: Path) -> None:
    rows = by_name(doctor.check_folder(small_disk))
    here = small_disk.resolve()
    assert rows["file system"][1:3] == ("warn", f"{here} is on {here}: tmpfs of this node alone")
    assert rows["space"][1] == "warn" and "want 10 GB" in rows["space"][3]
    assert rows["writing"][1] == "bad" and "No space left" in rows["writing"][2]
    assert list(small_disk.iterdir()) == [], "the probe leaves nothing on a full disk"


def test_locks_that_are_forced_keep_readers_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    row = by_name(doctor.check_folder(tmp_path))["locks"]
    assert row[1] == "bad" and "cannot be read: Resource temporarily unavailable" in row[2]
    assert by_name(doctor.check_environment(os.environ))["HDF5_USE_FILE_LOCKING"][1] == "warn"


def test_a_folder_that_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CHILD_S", 0.5)
    monkeypatch.setattr(doctor, "hello", lambda *words: [sys.executable, "-c", "import time; time.sleep(60)"])
    (row,) = doctor.check_folder(tmp_path)
    assert row[1] == "bad" and "did not end in time" in row[2]


def test_which_folders_other_nodes_see(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(slurm, "sbatch", "exit 1")
    for folder, kind in (("/p/scratch", "lustre"), ("/p/scratch", "fuse.glusterfs"), ("/tmp/a", "nfs4")):
        assert doctor.why_hidden(Path(folder), kind) == ""
    for folder, kind in (("/tmp/a", "xfs"), ("/work", "overlay"), ("/home", "ext4")):
        assert doctor.why_hidden(Path(folder), kind)
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.why_hidden(Path("/home"), "ext4") == "", "without a cluster a local disk is good"
    assert doctor.why_hidden(Path("/dev/shm/a"), "tmpfs")


# Slurm


def test_a_cluster_as_in_the_trials(slurm: Path) -> None:
    rows = by_name(cluster.check_slurm())
    assert rows["settings"][1:3] == (
        "good",
        "Slurm 22.05.8, KillOnBadExit=0, JobRequeue=1, MaxArraySize=1001, no accounting, no preempt_send_user_signal: "
        "hpcgen's jobs do with any of these",
    )
    assert rows["preemption"][1:3] == (
        "warn",
        "partition_prio, REQUEUE: a preempted job starts again and goes on by itself, 10 s after SIGTERM "
        "(GraceTime 5 s at least, KillWait 5 s)",
    )
    assert "save_every_s" in rows["preemption"][3]
    assert rows["partitions"][2] == "low* 4 x 64 cores gpu:a100:8, infinite; high 4 x 64 cores, infinite"


def test_other_clusters(slurm: Path) -> None:
    for mode in ("CANCEL", "GANG,SUSPEND"):
        row = change(slurm, PreemptMode=mode, KillWait="60 sec")["preemption"]
        assert row[1] == "warn" and "not every preempted job starts again" in row[2] and "submit again" in row[3]
    assert change(slurm, KillWait="25 sec")["preemption"][1] == "good"
    none = {"PreemptType": "preempt/none", "PreemptMode": "OFF"}
    quiet = change(slurm, **none, KillWait="30 sec")["preemption"]
    assert quiet[1:3] == ("good", "none; a cancelled job has 30 s after SIGTERM (KillWait)")
    assert change(slurm, **none, KillWait="5 sec")["preemption"][1] == "warn"
    more = {"SlurmctldParameters": "enable_configless,preempt_send_user_signal", "KillOnBadExit": "1"}
    told = change(slurm, **more, AccountingStorageType="accounting_storage/slurmdbd")["settings"][2]
    assert "KillOnBadExit=1" in told and "accounting in slurmdbd, preempt_send_user_signal" in told
    (slurm / "sinfo.txt").write_text("gpu|down|2|8|1-00:00:00|gpu:4\n")
    rows = by_name(cluster.check_slurm())
    assert rows["partitions"][1] == "warn" and rows["default"][1] == "warn"
    (slurm / "sinfo.txt").write_text("")
    assert by_name(cluster.check_slurm())["partitions"][1] == "bad"


def test_a_controller_that_is_down_or_silent(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(slurm, "scontrol", "echo 'slurm_load_ctl_conf error: Unable to contact slurm controller' >&2; exit 1")
    assert cluster.check_slurm()[0][:3] == (
        "controller",
        "bad",
        "slurm_load_ctl_conf error: Unable to contact slurm controller",
    )
    monkeypatch.setattr(cluster, "_SLURM_S", 0.3)
    stand_in(slurm, "scontrol", "exec sleep 60")
    assert cluster.check_slurm()[0][:2] == ("controller", "bad")


def test_no_cluster(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(slurm, "scontrol", "echo 'scontrol: fatal: Could not establish a configuration source' >&2; exit 1")
    assert cluster.check_slurm()[0][:2] == ("commands", "absent")
    monkeypatch.setenv("PATH", "/nowhere")
    assert cluster.check_slurm()[0][:3] == ("commands", "absent", "none here")


# the environment


def test_variables_that_break_things() -> None:
    wrong = {"HDF5_USE_FILE_LOCKING": "BEST_EFFORT", "PYTHONPATH": "/opt/python3.9", "CONDA_PREFIX": "/opt/conda",
             "RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}  # fmt: skip
    for name, value in wrong.items():
        (row,) = doctor.check_environment({"SLURM_JOB_ID": "7", name: value})
        assert row[:2] == (name, "warn") and by_name([row])


def test_variables_that_do_not() -> None:
    fine = {"HDF5_USE_FILE_LOCKING": "FALSE", "CONDA_PREFIX": sys.prefix, "MASTER_ADDR": "n1", "SLURM_NTASKS": "8"}
    assert {row[1] for row in doctor.check_environment(fine)} == {"good"}


# between nodes


def meet(world: int, limit_s: float, job: int) -> hello.Told:
    """What rank 0 of a step on one node says."""
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": str(world), "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
    return hello.hear(hello.hello("meet", limit_s), 120, clean | step)


def test_a_world_of_its_own_on_each_node_is_bad() -> None:
    alone = [{"rank": 0, "world": 1}, {"rank": 0, "backend": "gloo", "host": "n0", "seconds": 0.1}]
    (row,) = cluster.meeting_rows(hello.Told(0, lines=2 * alone), 2)
    assert row[1:3] == ("bad", "worlds of 1 ranks, want 2")


def test_one_node_needs_no_other() -> None:
    told = meet(1, 60, 17)
    assert cluster.meeting_rows(told, 1)[0][1] == "good" and told.code == 0, told


def test_a_rank_that_never_comes() -> None:
    told = meet(2, 2, os.getpid() + 2)
    (row,) = cluster.meeting_rows(told, 2)
    assert told.code == 3 and row[1] == "bad" and "1 of 2 ranks started, 0 summed" in row[2], row
    assert "interface" in row[3]


@pytest.mark.mpi
def test_ranks_of_mpi_are_counted() -> None:
    both = hello.hear(["mpiexec", "-n", "2", *hello.hello("ranks", 60)], 60)
    assert cluster.mpi_row(both, 2)[1] == "good", both
    assert cluster.mpi_row(both, 3)[1] == "bad"
    alone = [hello.hear(hello.hello("ranks", 60), 60) for _ in range(2)]
    row = cluster.mpi_row(hello.Told(0, lines=[line for told in alone for line in told.lines]), 2)
    assert row[1] == "bad" and "0 of 1, 0 of 1: want 2 of one world" in row[2]


SRUN = """
import os, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
if "--mpi=list" in words:
    print("MPI plugin types are...\\n\\tnone\\n\\tpmi2")
    sys.exit()
at = words.index(sys.executable)
with open({log!r}, "a") as log:
    log.write(" ".join(words[:at]) + "\\n")
assert not [name for name in os.environ if name.startswith("SLURM_")], "what a job sets is left out"
if "ranks" in words:
    sys.exit(subprocess.call(["mpiexec", "-n", "2", *words[at:]]))
ranks = []
for rank in range(2):
    own = dict(PROCID=rank, STEP_NUM_TASKS=2, JOB_ID={job}, STEP_ID=0)
    own = {{f"SLURM_{{name}}": str(value) for name, value in own.items()}}
    ranks.append(subprocess.Popen(words[at:], env=os.environ | own | {{"SLURMD_NODENAME": f"n{{rank}}"}}))
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.mpi
def test_nodes_are_started_through_srun(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, job = slurm / "log", os.getpid() + 1
    stand_in(slurm, "srun", SRUN.format(log=str(log), job=job), sys.executable)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_NTASKS", "64")
    with socket.socket() as stranger:  # rank 0 goes on to the next port, and so does the other
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("", 20000 + (7919 * job) % 12768))
        rows = by_name(cluster.check_nodes(2, ["--partition=low", "--gres=gpu:1"]))
    assert {name: row[1] for name, row in rows.items() if name != "nccl"} == {"gloo": "good", "MPI": "good"}, rows
    assert "n0, n1: sum of 64 MB in" in rows["gloo"][2]
    meeting, ranks = (line.split() for line in log.read_text().splitlines())
    for words in (meeting, ranks):
        assert words[:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        assert "--jobid=12" in words and words[-2:] == ["--partition=low", "--gres=gpu:1"], (
            "the caller's flags come last"
        )
    assert "--mpi=none" in meeting and "--mpi=pmi2" in ranks


def test_nodes_that_are_busy(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(slurm, "srun", "echo 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2; exit 1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    rows = by_name(cluster.check_nodes(2, []))
    assert rows["gloo"][1] == "bad" and "Requested nodes are busy" in rows["gloo"][2] and "salloc" in rows["gloo"][3]


def test_nodes_without_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("srun") is None
    assert cluster.check_nodes(2, [])[0][:2] == ("srun", "bad")
