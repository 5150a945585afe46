"""A real Slurm of four nodes with eight GPU slots each, on this one machine, for the tests (needs root)."""

import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
GPUS = 8  # per node
HOSTS = Path("/etc/hosts")
NAMED = f"127.0.0.1 {' '.join(NODES)} # a Slurm of hpcgen's tests\n"  # ranks meet at the name of the first node
ON = "HPCGEN_TEST_NODE"  # names the node to its slurmd and slurmstepds (their tasks have SLURMD_NODENAME)
TOOLS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "mknod")
SLURMS_OWN = ("slurmd", "slurmstepd", "srun", "slurm_script", "bash")  # the last two: the batch script
SBIN = "/usr/sbin:/sbin"
END_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

# AuthInfo's cred_expire (seconds; 120 by default, 5 at least) is also how long a requeued job waits (Reason=BeginTime)
# before it may start again. With SlurmdTimeout=10 a dead slurmd is given up 15 to 20 s after its death.
CONFIG = """
ClusterName=hpcgen
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
InactiveLimit=0
ReturnToService=2
MaxArraySize=1001
GresTypes=gpu
{extra}
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 Sockets=2 CoresPerSocket=32 "
    "ThreadsPerCore=1 RealMemory=256000 Gres=gpu:a100:8 State=UNKNOWN"
)


def why_not() -> str:
    """Why no cluster can be brought up here; empty if one can."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{SBIN}") is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else ""


class Cluster:
    """Four nodes n1 to n4; `low` (default) is preempted by `high`. `extra` are lines for slurm.conf."""

    def __init__(self, extra: str = "") -> None:
        _end_stale()
        self.folder = Path(tempfile.mkdtemp(prefix=f"hpcgen_slurm_{os.getpid()}_"))
        self.extra = extra
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        unlike = ("SLURM", "SBATCH", "SQUEUE", "SALLOC", "SCANCEL", "SINFO", "OMPI_", "PMIX_", "PMI_")
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(unlike)} | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            ON: "",
            "PATH": f"{os.environ.get('PATH', '')}:{SBIN}",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bring the daemons up and wait until all nodes are idle."""
        if NAMED not in HOSTS.read_text():
            with HOSTS.open("a") as hosts:
                hosts.write(NAMED)
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
        nodes = "\n".join(
            NODE.format(name=name, host=host, port=port) for name, port in zip(NODES, ports[1:], strict=True)
        )
        told = {"host": host, "port": ports[0], "folder": self.folder, "nodes": nodes, "extra": self.extra}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**told))
        (self.folder / "gres.conf").write_text(f"Name=gpu Type=a100 File={self.folder}/fakegpu[0-{GPUS - 1}]\n")
        for gpu in range(GPUS):
            os.mknod(self.folder / f"fakegpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        for name in ("state", *(f"{kind}-{node}" for kind in ("spool", "tmp") for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{k}={self.folder}/munge.{v}" for k, v in files.items()))
        _wait(lambda: (self.folder / "munge.socket").exists(), 20, lambda: self._log("munge.log"))
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        _wait(self._all_idle, 60, lambda: f"not all nodes idle\n{self._log('slurmctld.log')}\n{self._log('n1.log')}")

    def stop(self) -> None:
        """End every daemon, every process of every job and every command on this cluster; remove the folder."""
        _end(self.folder)
        for daemon in self.daemons.values():
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        HOSTS.write_text(HOSTS.read_text().replace(NAMED, ""))

    def run(self, *command: str, timeout_s: float = 60, env: dict[str, str] | None = None) -> str:
        """Standard output of a command on this cluster; AssertionError with what it said if it fails."""
        done = subprocess.run(command, env=env or self.env, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *args: str, env: dict[str, str] | None = None) -> str:
        """Submit; the job's id."""
        return self.run("sbatch", "--parsable", *args, env=env).strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of a job (it forgets one 300 s after its end)."""
        return _fields(self.run("scontrol", "--oneliner", "show", "job", job))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, states: str | tuple[str, ...] = END_STATES, timeout_s: float = 60) -> str:
        """Wait until the job is in one of these states; that state."""
        wanted = (states,) if isinstance(states, str) else states
        seen: list[str] = []

        def there() -> bool:
            seen.append(self.state(job))
            return seen[-1] in wanted

        _wait(there, timeout_s, lambda: f"wanted {wanted}: {self.show(job)}")
        return seen[-1]

    def preempt(self, seconds: float) -> str:
        """A job in `high` that takes all GPUs of all nodes for so long; its id."""
        size = ("--partition=high", f"--nodes={len(NODES)}", f"--gres=gpu:{GPUS}", "--exclusive")
        return self.sbatch(*size, "--output=/dev/null", f"--wrap=sleep {seconds}")

    def nodes(self) -> dict[str, str]:
        """State of every node, with Slurm's flags: IDLE, MIXED, ALLOCATED, IDLE+DRAIN, DOWN+NOT_RESPONDING, …"""
        lines = self.run("scontrol", "--oneliner", "show", "nodes").splitlines()
        return {fields["NodeName"]: fields["State"] for fields in map(_fields, filter(None, lines))}

    def drained(self) -> list[str]:
        """Nodes that Slurm will not use again until a person says so."""
        return [name for name, state in self.nodes().items() if "DRAIN" in state]

    def lose_node(self, name: str) -> None:
        """A node that is cut off: SIGKILL to all of Slurm there, while the tasks live on.

        srun too: on a node that Slurm does not see it could not end the step that has the same number after a requeue.
        Slurm is told, and need not find out (20 s).
        """
        for pid, folder, on in _family():
            with suppress(OSError):
                if folder == self.folder and name in on and Path(f"/proc/{pid}/comm").read_text().strip() in SLURMS_OWN:
                    os.kill(pid, signal.SIGKILL)
        self.daemons[name].wait()
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def crash_node(self, name: str) -> None:
        """A node that dies with all that runs there; Slurm finds out by itself."""
        _end(self.folder, name)
        self.daemons[name].wait()

    def start_node(self, name: str) -> None:
        """Start a node; nothing that ran there before lives."""
        _end(self.folder, name)
        self._daemon("slurmd", "-D", "-N", name, name=name)

    def bring_back(self, name: str) -> None:
        """Start a node that was lost, and wait until Slurm uses it again."""
        self.start_node(name)
        self.run("scontrol", "update", f"nodename={name}", "state=resume")
        _wait(lambda: self.nodes()[name] in ("IDLE", "MIXED"), 30, lambda: str(self.nodes()))

    def _daemon(self, tool: str, *args: str, name: str = "") -> None:
        with (self.folder / f"{name or tool}.said").open("ab") as said:
            self.daemons[name or tool] = subprocess.Popen(
                [tool, *args], env={**self.env, ON: name}, cwd=self.folder, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip

    def _all_idle(self) -> bool:
        with suppress(AssertionError):  # slurmctld does not answer yet
            return sorted(self.nodes().items()) == [(name, "IDLE") for name in NODES]
        return False

    def _log(self, name: str) -> str:
        with suppress(OSError):
            return (self.folder / name).read_text()[-2000:]
        return ""


def _wait(what: Callable[[], object], timeout_s: float, complaint: Callable[[], str]) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"waited {timeout_s} s in vain: {complaint()}"
        time.sleep(0.2)


def _fields(line: str) -> dict[str, str]:
    """`A=1 B=x y C=p=2` -> {"A": "1", "B": "x y", "C": "p=2"}."""
    return dict(word.split("=", 1) for word in re.split(r"\s+(?=[A-Z][\w:/]*=)", line.strip()) if "=" in word)


def _free_ports(number: int) -> list[int]:
    """Ports outside the range that the kernel gives to clients."""
    found: set[int] = set()
    while len(found) < number:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("0.0.0.0", port))
            found.add(port)
    return list(found)


def _family() -> Iterator[tuple[int, Path, tuple[str, ...]]]:
    """Pid, folder and node of all daemons, jobs and commands of such clusters (not of a shell that looks on)."""
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and int(process.name) != os.getpid():
                words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                env = dict(word.split("=", 1) for word in words if "=" in word)
                conf = Path(env.get("SLURM_CONF", ""))
                if conf.parent.name.startswith("hpcgen_slurm_") and (ON in env or "SLURM_JOB_ID" in env):
                    yield int(process.name), conf.parent, (env.get(ON, ""), env.get("SLURMD_NODENAME", ""))


def _end(folder: Path, node: str = "") -> None:
    """SIGKILL until no process of this cluster (of this node of it) lives."""
    end = time.monotonic() + 30
    while pids := [pid for pid, its, on in _family() if its == folder and (not node or node in on)]:
        assert time.monotonic() < end, f"cannot kill {pids}"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def _end_stale() -> None:
    """Take down the clusters whose owner was killed."""
    of_dead = [folder for _, folder, _ in _family()] + list(Path(tempfile.gettempdir()).glob("hpcgen_slurm_*_*"))
    for folder in set(of_dead):
        if not Path("/proc", folder.name.split("_")[2]).exists():
            _end(folder)
            shutil.rmtree(folder, ignore_errors=True)
