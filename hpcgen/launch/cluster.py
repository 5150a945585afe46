"""doctor's checks of a cluster: how its Slurm is set up, and whether processes on several nodes find each other."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence

from hpcgen.launch.hello import Told, hear, hello
from hpcgen.launch.slurm import Answer, ask, clean_environment

Row = tuple[str, str, str, str]  # name, verdict, found, advice
_SLURM_S, _MPI_S = 15.0, 45.0
_MEET_S, _QUEUE_S = 60, 60  # until all have met; until Slurm has the nodes
NODES_S = 2 * (_QUEUE_S + 4 * _MEET_S) + 2 * _MPI_S  # longest time of check_nodes
_NOTICE_S = 30  # for a checkpoint, from SIGTERM to SIGKILL
_OPEN_MPI = re.compile(r"open.?mpi|openrte|prrte|prterun", re.IGNORECASE)
_HYDRA = re.compile(r"mpich|hydra|intel|mvapich", re.IGNORECASE)


def warn_if(name: str, fault: object, found: str, advice: str) -> Row:
    """A row that is good, without the advice, unless there is a fault."""
    return (name, "warn", found, advice) if fault else (name, "good", found, "")


def check_slurm() -> list[Row]:
    """How Slurm is set up, and what that means for hpcgen."""
    told = ask("scontrol", "show", "config", timeout_s=_SLURM_S)
    if told is None and shutil.which("scontrol") is None:
        return [("commands", "absent", "none here", "submit from a login node of a cluster; all else works without")]
    if told is not None and told.code and "configuration source" in told.err:
        return [("commands", "absent", "installed, but of no cluster", "set SLURM_CONF if this machine belongs to one")]
    if told is None or told.code:
        said = told.err.splitlines()[-1] if told and told.err else "does not answer"
        return [("controller", "bad", said, "wait, or tell the site: jobs cannot be queued")]
    config = dict(re.findall(r"^(\w+)\s*=[ \t]*(.*?)\s*$", told.out, re.MULTILINE))
    listed = ask("scontrol", "show", "partition", "--oneliner", timeout_s=_SLURM_S)
    parts = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in listed.out.splitlines()] if listed else []
    sinfo = ask("sinfo", "--noheader", "--format=%P|%a|%D|%c|%l|%G", timeout_s=_SLURM_S)
    return [_settings_row(config), _preemption_row(config, parts), *_partition_rows(sinfo)]


def _settings_row(config: Mapping[str, str]) -> Row:
    """What fails others: hpcgen's jobs ask for it themselves, or do without."""
    told = [f"{name}={config.get(name, '?')}" for name in ("KillOnBadExit", "JobRequeue", "MaxArraySize")]
    books = config.get("AccountingStorageType", "").removeprefix("accounting_storage/")
    told.append("no accounting" if books in ("", "none", "(null)") else f"accounting in {books}")
    user = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    told.append(f"{'' if user else 'no '}preempt_send_user_signal")
    text = f"Slurm {config.get('SLURM_VERSION', '?')}, {', '.join(told)}: hpcgen's jobs do with any of these"
    return ("settings", "good", text, "")


def _preemption_row(config: Mapping[str, str], parts: Sequence[Mapping[str, str]]) -> Row:
    """What becomes of a preempted job, and the time between SIGTERM and SIGKILL."""
    kind, mode = config.get("PreemptType", "").removeprefix("preempt/"), config.get("PreemptMode", "OFF")
    wait = int((re.findall(r"\d+", config.get("KillWait", "")) or ["0"])[0])
    short = "work since the last save may be lost: for training lower save_every_s"
    if kind in ("", "none", "(null)") or mode == "OFF":
        text = f"none; a cancelled job has {wait} s after SIGTERM (KillWait)"
        return warn_if("preemption", wait < _NOTICE_S, text, short)
    prey = [part for part in parts if part.get("PreemptMode", mode) != "OFF"]
    modes = {mode, *(part.get("PreemptMode", mode) for part in prey)} - {"OFF"}
    lost = any(word in one for one in modes for word in ("CANCEL", "SUSPEND", "GANG"))
    fate = "not every preempted job starts again" if lost else "a preempted job starts again and goes on by itself"
    grace = min((int(part.get("GraceTime", "0")) for part in prey), default=0)
    text = f"{kind}, {', '.join(sorted(modes))}: {fate}, {grace + wait} s after SIGTERM (GraceTime {grace} s at least, "
    again = "after a cancel submit again, and it goes on; a suspended job may lose its run folder to another"
    return warn_if(
        "preemption", lost or grace + wait < _NOTICE_S, f"{text}KillWait {wait} s)", again if lost else short
    )


def _partition_rows(told: Answer | None) -> list[Row]:
    listed = [line.strip().split("|") for line in told.out.splitlines() if line.count("|") == 5] if told else []
    if not listed:
        return [("partitions", "bad", "sinfo lists none", "ask the site for an account, or whether Slurm is up")]
    up = [row for row in listed if row[1] == "up"]
    text = "; ".join(f"{name} {nodes} x {cores} cores{'' if gpus in ('(null)', '') else f' {gpus}'}, {limit}"
                     for name, _, nodes, cores, limit, gpus in up)  # fmt: skip
    rows = [warn_if("partitions", not up, text or "none is up", "wait, or ask the site")]
    if not any(row[0].endswith("*") for row in listed):
        rows.append(("default", "warn", "no partition is the default", "name one: `partition` in the site profile"))
    return rows


def mpi_family(text: str) -> str:
    """Who understands whom: Open MPI, or MPICH and its children, whose launchers speak PMI."""
    return "Open MPI" if _OPEN_MPI.search(text) else "MPICH" if _HYDRA.search(text) else ""


def mpi_types() -> list[str]:
    """What `srun --mpi=` may be; empty where srun cannot be asked."""
    told = ask("srun", "--mpi=list", timeout_s=_SLURM_S)
    words = re.findall(r"\w+", told.out + told.err) if told is not None and told.code == 0 else []
    return [word for word in dict.fromkeys(words) if re.match(r"pmi[x\d]|cray_|openmpi", word)]


def best_mpi(vendor: str, file: str, types: Sequence[str]) -> str:
    """The `srun --mpi=` of a library, '' if none fits: Open MPI wants PMIx, MPICH aborts under it and wants PMI-2.

    Every Slurm offers cray_shasta: only Cray's own MPICH understands it, for others each rank would be 0 of 1.
    """
    wanted = ["cray_shasta"] if "cray" in f"{vendor} {file}".lower() else []
    wanted.append("pmi2" if mpi_family(vendor) == "MPICH" else "pmix")
    return next((name for name in wanted if name in types), "")


def check_nodes(nodes: int, srun: Sequence[str]) -> list[Row]:
    """Start a process on each of `nodes` nodes: a sum as in training, and the ranks of MPI."""
    if shutil.which("srun") is None:
        return [("srun", "bad", "not on PATH", "run doctor where Slurm is, or leave out --nodes")]
    job, env = os.environ.get("SLURM_JOB_ID"), clean_environment()
    start = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    start += [f"--jobid={job}", "--overlap"] if job else [f"--immediate={_QUEUE_S}", "--time=10"]

    def on_all(what: str, mpi: str) -> Told:
        chosen = any(flag.startswith("--mpi") for flag in srun)
        more = [f"--mpi={mpi}"] if mpi and not chosen else []
        return hear([*start, *more, *srun, *hello(what, _MEET_S)], _QUEUE_S + 4.0 * _MEET_S, env)

    told = on_all("meet", "none")
    rows = meeting_rows(told, nodes)
    if not told.lines:
        return rows
    library = hear(hello("mpi", _MPI_S), _MPI_S, env).facts()
    if "vendor" not in library:
        return [*rows, ("MPI", "absent", "mpi4py finds no library here", "under srun none is needed")]
    return [*rows, mpi_row(on_all("ranks", best_mpi(library["vendor"], library["file"], mpi_types())), nodes)]


def meeting_rows(told: Told, nodes: int) -> list[Row]:
    """What came of `hello meet` on that many nodes."""
    worlds = {line["world"] for line in told.lines if "world" in line}
    if worlds and worlds != {nodes}:
        advice = "see that no RANK, WORLD_SIZE or MASTER_ADDR is set, and the flags given to srun"
        return [("gloo", "bad", f"worlds of {', '.join(map(str, sorted(worlds)))} ranks, want {nodes}", advice)]
    gloo, gpus = _backend_row("gloo", told, nodes), [line["gpu"] for line in told.lines if "gpu" in line]
    having = len({gpu for gpu in gpus if gpu})
    if having == nodes or any(line.get("backend") == "nccl" for line in told.lines):
        return [gloo, _backend_row("nccl", told, nodes)]
    if having:
        return [gloo, ("nccl", "warn", f"{having} of {nodes} nodes have a GPU of their own", "ask for a GPU on each")]
    return [gloo, ("nccl", "absent", "the nodes show no GPU", "ask for one: srun's --gres=gpu:1")] if gpus else [gloo]


def _backend_row(backend: str, told: Told, nodes: int) -> Row:
    done = sorted((line for line in told.lines if line.get("backend") == backend), key=lambda line: line["rank"])
    if [line["rank"] for line in done] != list(range(nodes)):
        came = len({line["rank"] for line in told.lines if "rank" in line})
        text = f"{came} of {nodes} ranks started, {len(done)} summed: {told.last_words()}"
        network = (
            "set `interface` (as ib0) and `master_suffix` in the site profile; see what srun and the network allow"
        )
        return (backend, "bad", text, network if came else "ask for the nodes first: salloc, then hpcgen doctor in it")
    seconds = max(line["seconds"] for line in done)
    text = f"{nodes} ranks, one on each of {', '.join(line['host'] for line in done)}: sum of 64 MB in {seconds:.3f} s"
    return (backend, "good", text, "")


def mpi_row(told: Told, nodes: int) -> Row:
    """What came of `hello ranks` on that many nodes."""
    ranks = sorted((line["rank"], line["size"], line["answer"]) for line in told.lines if "size" in line)
    if ranks == [(rank, nodes, nodes) for rank in range(nodes)]:
        hosts = ", ".join(dict.fromkeys(line["host"] for line in told.lines if "size" in line))
        return ("MPI", "good", f"{nodes} ranks on {hosts}", "")
    said = ", ".join(f"{rank} of {size}" for rank, size, _ in ranks)
    text = f"the ranks say {said}: want {nodes} of one world" if ranks else f"no rank started: {told.last_words()}"
    advice = "choose another srun --mpi= (srun --mpi=list), or set `mpi: none` in the site profile: files do"
    return ("MPI", "bad", text, advice)
