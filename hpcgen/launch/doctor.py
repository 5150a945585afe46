"""Is this place fit for hpcgen? Checks of the interpreter, torch, MPI, a folder, Slurm, and the way between nodes."""

import importlib.metadata
import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpcgen.errors import DONE, SiteError, UsageError
from hpcgen.launch.cluster import (
    NODES_S,
    Row,
    best_mpi,
    check_nodes,
    check_slurm,
    mpi_family,
    mpi_types,
    warn_if,
)
from hpcgen.launch.hello import Told, file_system, hear, hello
from hpcgen.launch.place import LOCAL
from hpcgen.launch.slurm import ask, clean_environment
from hpcgen.runner.team import MPI_SIZES

Check = Callable[[], list[Row]]
_TORCH_S, _CHILD_S, _MPIEXEC_S, _WHOLE_S = 90.0, 45.0, 15.0, 120.0  # torch: a minute on a cold parallel file system
_GB_FREE, _INODES_FREE = 10.0, 10_000
_SHARED = {"lustre", "nfs", "nfs4", "gpfs", "beegfs", "beegfs_nodev", "panfs", "ceph", "cifs", "smb3", "glusterfs",
           "afs", "wekafs", "pvfs2", "orangefs", "dvs", "quobyte", "daos", "juicefs", "ocfs2", "gfs2"}  # fmt: skip
_PASSING = {"tmpfs", "ramfs", "overlay", "aufs", "squashfs"}  # memory, or gone with its container


@dataclass(frozen=True)
class Finding:
    """One check. verdict: good, warn, bad, absent; advice: what to do, for anything but good."""

    group: str
    name: str
    verdict: str
    found: str
    advice: str = ""


def examine(folder: Path, nodes: int = 0, srun: Sequence[str] = ()) -> list[Finding]:
    """Look at everything; with `nodes`, also start that many through srun with these flags. Raises UsageError."""
    if nodes < 0:
        raise UsageError(f"--nodes {nodes}: want at least 1")
    checks: dict[str, Check] = {
        "Python": check_python,
        "torch": check_torch,
        "MPI": check_mpi,
        "folder": lambda: check_folder(folder),
        "Slurm": check_slurm,
        "environment": lambda: check_environment(os.environ),
    }
    found = together(checks, _WHOLE_S)
    return found + together({"nodes": lambda: check_nodes(nodes, srun)}, NODES_S) if nodes else found


def together(checks: Mapping[str, Check], limit_s: float) -> list[Finding]:
    """All checks at once, each on its own: one that raises or hangs becomes a finding."""
    results: dict[str, list[Row]] = {}

    def run(group: str, check: Check) -> None:
        try:
            results[group] = check()
        except Exception as fault:
            said = f"the check itself failed: {type(fault).__name__}: {fault}"
            results[group] = [("check", "bad", said, "please report this line")]

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late: Row = ("check", "bad", f"no answer within {limit_s:.0f} s", "look whether a file system or a command hangs")
    return [Finding(group, *row) for group in checks for row in results.get(group, [late])]


def render(findings: Sequence[Finding]) -> str:
    """Lines for people, by group, and the count of each verdict."""
    width = max((len(finding.name) for finding in findings), default=0)
    wrap = partial(textwrap.wrap, width=118, break_long_words=False, break_on_hyphens=False)
    lines, group, indent = [], "", " " * (width + 12)
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines.append(group)
        head = f"  {finding.verdict:6}  {finding.name:{width}}  "
        lines += wrap(finding.found or "-", initial_indent=head, subsequent_indent=indent)
        lines += wrap(finding.advice, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ")
    verdicts = [finding.verdict for finding in findings]
    return "\n".join([*lines, ", ".join(f"{verdicts.count(v)} {v}" for v in ("good", "warn", "bad", "absent"))])


def exit_code(findings: Sequence[Finding]) -> int:
    """3 if anything is bad, else 0."""
    return SiteError.exit_code if any(finding.verdict == "bad" for finding in findings) else DONE


def check_python() -> list[Row]:
    """The interpreter, hpcgen, and every package that it needs."""
    place = Path(sys.prefix).resolve()
    hidden = why_hidden(place, file_system(place)[0])
    told = f"Python {'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}{hidden and ', on '}{hidden}"
    rows = [warn_if("interpreter", hidden, told, "jobs run this interpreter: put it where all nodes see it")]
    try:
        version, wanted = importlib.metadata.version("hpcgen"), importlib.metadata.requires("hpcgen") or []
    except importlib.metadata.PackageNotFoundError:
        return [*rows, ("hpcgen", "bad", "not installed", "pip install hpcgen, with this interpreter")]
    return [*rows, ("hpcgen", "good", f"{version}, {Path(__file__).parents[1]}", ""), *check_packages(wanted)]


def check_packages(wanted: Sequence[str]) -> list[Row]:
    """Requirements as pyproject.toml has them: missing or too old is bad, of an extra only too old counts."""
    rows: list[Row] = []
    good = []
    for line in wanted:
        name, extra = re.split(r"[^\w.-]", line)[0], re.search(r"extra\s*==\s*[\"']([\w-]+)", line)
        bound = re.search(r">=\s*([\d.]+)", line)
        least = bound[1] if bound else "0"
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            have = ""
        if have and _numbers(have) >= _numbers(least):
            good += [] if extra else [f"{name} {have}"]
        elif have or not extra:
            told = f"{have or 'not installed'}, want {least} or newer{f' for {extra[1]}' if extra else ''}"
            rows.append((name, "warn" if extra else "bad", told, f"pip install '{name}>={least}'"))
    return [*rows, ("packages", "good", ", ".join(good) or "none that fit", "")]


def _numbers(version: str) -> list[int]:
    """2.13.0+cpu -> [2, 13]."""
    numbers = [int(part) for part in re.split(r"[^\d.]", version)[0].split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def check_torch() -> list[Row]:
    """torch, its GPUs and NCCL."""
    told = hear(hello("torch", _TORCH_S), _TORCH_S)
    facts = told.facts()
    if "torch" not in facts:
        advice = "install the build that fits this machine's driver, and load its modules"
        return [("torch", "bad", f"cannot be loaded: {told.last_words()}", advice)]
    build = f"CUDA {facts['cuda']}" if facts["cuda"] else f"ROCm {facts['hip']}" if facts["hip"] else "for CPUs"
    text = f"{facts['torch']} {build}, loaded in {facts['seconds']:.1f} s"
    advice = "every rank waits as long: put the environment on a faster file system, or into a container"
    rows = [warn_if("torch", facts["seconds"] > 30, text, advice)]
    if not facts.get("gloo"):
        rows.append(("gloo", "bad", "this torch has none", "install one that has: ranks meet through it"))
    return [*rows, *gpu_rows(told)]


def gpu_rows(told: Told) -> list[Row]:
    """What came of `hello torch` after torch itself."""
    facts = told.facts()
    gpus, cards = facts.get("gpus"), facts.get("cards", 0)
    if gpus is None or (gpus and "computed" not in facts):
        return [("GPUs", "bad", f"asking them failed: {told.last_words()}", "see nvidia-smi, and tell the site")]
    if gpus:
        rows: list[Row] = [("GPUs", "good", ", ".join(f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)), "")]
        if "nccl" in facts:
            return [*rows, ("NCCL", "good", facts["nccl"], "")]
        return [*rows, ("NCCL", "bad", "this torch has none", "install one that has: GPUs train together through it")]
    if not cards:
        return [("GPUs", "absent", "none here", "a login node needs none; look at GPU nodes with --nodes")]
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return [("GPUs", "absent", f"{cards}, hidden by CUDA_VISIBLE_DEVICES=''", "unset it to use them")]
    why = "torch cannot use them" if facts["cuda"] or facts["hip"] else "this torch is for CPUs"
    return [("GPUs", "warn", f"{cards}, but {why}", "install a torch whose CUDA the driver supports (see nvidia-smi)")]


def check_mpi() -> list[Row]:
    """mpi4py, the library it loads, and whether mpiexec and srun fit it."""
    told = hear(hello("mpi", _CHILD_S), _CHILD_S, clean_environment())
    facts = told.facts()
    if facts.get("kind_of_fault") == "ModuleNotFoundError" and "mpi4py" not in facts:
        return [("mpi4py", "absent", "not installed", "under srun files do; for mpiexec: pip install 'mpi4py>=4.0'")]
    if "vendor" not in facts:
        advice = "load the MPI's module, here and in `setup` of the site profile, or set MPI4PY_LIBMPI to its libmpi.so"
        return [("mpi4py", "bad", f"cannot load an MPI: {told.last_words()}", advice)]
    library = f"{facts['vendor']} {facts['version']}"
    rows: list[Row] = [("mpi4py", "good", f"{facts['mpi4py']}, loads {library}, {facts['file']}", "")]
    if facts.get("started") != 1:
        advice = "some sites forbid it on login nodes: try it on compute nodes with --nodes 2"
        rows.append(("MPI_Init", "warn", f"fails in a single process: {told.last_words()}", advice))
    rows.append(mpiexec_row(library))
    types = mpi_types()
    best = best_mpi(library, facts["file"], types)
    text = f"offers {', '.join(types)}; " + (f"{library} wants {best}" if best else f"none is for {library}")
    advice = "load an MPI that this Slurm knows, or set `mpi: none` in the site profile: files do"
    return [*rows, warn_if("srun --mpi", not best, text, advice)] if types else rows


def mpiexec_row(library: str) -> Row:
    """Whether the mpiexec in front starts ranks of this library."""
    path, told = shutil.which("mpiexec"), ask("mpiexec", "--version", timeout_s=_MPIEXEC_S)
    if path is None:
        return ("mpiexec", "absent", "not on PATH", "under srun none is needed; else load the module of mpi4py's MPI")
    family = mpi_family(told.out + told.err) if told else ""
    if not family:
        return ("mpiexec", "warn", f"{path}: of an MPI that is not known", "see that it is the one that mpi4py loads")
    if family != mpi_family(library):
        advice = "every rank would be 0 of 1: put the library's mpiexec first on PATH, or set MPI4PY_LIBMPI"
        return ("mpiexec", "bad", f"{path} is of {family}, but mpi4py loads {library}", advice)
    return ("mpiexec", "good", f"{path}, of {family} like the library", "")


def why_hidden(folder: Path, kind: str) -> str:
    """Why other nodes would not see a folder; '' where they do, as far as can be told from here."""
    kind = kind.removeprefix("fuse.")
    passing = [Path(p) for p in ("/tmp", "/var/tmp", "/dev/shm", os.environ.get("TMPDIR") or "/tmp")]
    if kind in _SHARED:
        return ""
    if kind in _PASSING or any(folder.is_relative_to(path) for path in passing):
        return f"{kind or 'a temporary folder'} of this node alone"
    return f"{kind or 'unknown'}, which other nodes may not see" if shutil.which("sbatch") else ""


def check_folder(folder: Path) -> list[Row]:
    """The file system of a folder, its space, and what HDF5 files meet there."""
    told = hear(hello("folder", _CHILD_S, str(folder)), _CHILD_S)
    facts = told.facts()
    if "kind" not in facts:
        return [("file system", "bad", f"{folder}: {told.last_words()}", "choose a folder that is there and answers")]
    hidden = why_hidden(Path(facts["folder"]), facts["kind"])
    advice = "jobs on other nodes need a folder that all see, of the parallel file system (project, scratch)"
    text = f"{facts['folder']} is on {facts['point']}: {hidden or facts['kind']}"
    rows = [warn_if("file system", hidden, text, advice)]
    if "free_gb" in facts:
        few = facts["inodes"] is not None and facts["inodes"] < _INODES_FREE
        inodes = "unlimited" if facts["inodes"] is None else f"{facts['inodes']:,}"
        text = f"{facts['free_gb']:,.1f} GB and {inodes} inodes free on the file system; quotas are not seen here"
        advice = f"free some: want {_GB_FREE:.0f} GB and {_INODES_FREE:,} inodes"
        rows.append(warn_if("space", few or not facts["free_gb"] >= _GB_FREE, text, advice))
    return rows + _hdf5_rows(told)


def _hdf5_rows(told: Told) -> list[Row]:
    facts = told.facts()
    if "hdf5" not in facts:
        return [("HDF5", "bad", f"h5py cannot be loaded: {told.last_words()}", "pip install 'h5py>=3.11'")]
    if "replaced" not in facts:
        advice = "see permissions, quota and space there, or choose another folder"
        return [("writing", "bad", f"8 MB of HDF5 cannot be written: {told.last_words()}", advice)]
    text = f"8 MB through HDF5 {facts['hdf5']} in {facts['write_s']:.2f} s, until it is safe on disk"
    rows = [warn_if("writing", facts["write_s"] > 10, text, "slow: choose another folder, or larger blocks")]
    if not facts["replaced"]:
        rows.append(("rename", "bad", "an open file changed when another took its name", "choose another file system"))
    if not facts.get("unlocked"):
        text = f"a file that another has locked cannot be read: {told.last_words()}"
        return [*rows, ("locks", "bad", text, "set HDF5_USE_FILE_LOCKING=FALSE")]
    advice = "hpcgen needs none; for other programs set HDF5_USE_FILE_LOCKING=FALSE"
    return [*rows, warn_if("locks", facts["lock"], facts["lock"] or "work, and hpcgen reads without them", advice)]


def check_environment(env: Mapping[str, str]) -> list[Row]:
    """Variables that are known to break things."""
    rows: list[Row] = []
    locking = env.get("HDF5_USE_FILE_LOCKING")
    if locking is not None and locking.upper() not in ("FALSE", "0"):
        told = f"is {locking}, which overrides that hpcgen reads without locks"
        rows.append(("HDF5_USE_FILE_LOCKING", "warn", told, "set it to FALSE: Lustre and NFS may refuse locks"))
    for name in ("PYTHONPATH", "PYTHONHOME"):
        if env.get(name):
            told = f"is {env[name]}: modules there come before those of the environment"
            rows.append((name, "warn", told, "unset it, unless that is wanted; jobs inherit it"))
    conda = env.get("CONDA_PREFIX", "")
    if conda and not Path(sys.prefix).resolve().is_relative_to(Path(conda).resolve()):
        told = f"is {conda}, but the interpreter is that of {sys.prefix}"
        rows.append(("CONDA_PREFIX", "warn", told, "conda deactivate before submitting: jobs inherit its PATH"))
    stray = [name for name in ("RANK", "LOCAL_RANK", *MPI_SIZES) if name in env and "TORCHELASTIC_RUN_ID" not in env]
    told = "is set, as by a launcher: processes would wait for ranks that are not there"
    rows += [(name, "warn", told, "unset it, unless doctor runs as a rank") for name in stray]
    if env.get("MASTER_ADDR") in LOCAL:
        rows.append(("MASTER_ADDR", "warn", f"is {env['MASTER_ADDR']}: no other node finds it", "unset it"))
    return rows or [("variables", "good", "none that is known to break things", "")]
