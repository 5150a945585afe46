"""What doctor runs in other processes, here and on the nodes: each says what it finds in lines of JSON.

`python -m hpcgen.launch.hello torch|mpi|folder|meet|ranks LIMIT_S [FOLDER]`: a torch that cannot be loaded, an MPI that
aborts and a file system that hangs are findings then, and no crash of doctor.
"""

import faulthandler
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from hpcgen.errors import HpcgenError, SiteError, StorageError
from hpcgen.files import reason, whole
from hpcgen.launch.place import find_place

_MARK = "HELLO "
_PROBE_BYTES = 8 << 20
_REDUCED = 16 << 20  # float32 numbers: 64 MB


@dataclass(frozen=True)
class Told:
    """How a process ended, and what it said. code is None where it had to be ended or could not be started."""

    code: int | None
    out: str = ""
    err: str = ""
    lines: list[dict[str, Any]] = field(default_factory=list)  # those of tell

    def facts(self) -> dict[str, Any]:
        """All lines as one."""
        return {name: value for line in self.lines for name, value in line.items()}

    def last_words(self) -> str:
        """One line on how it failed."""
        said = [line.strip() for line in self.err.splitlines() if line.strip()]
        faults = [line for line in said if re.search(r"error|fatal|abort|cannot|could not|fail", line, re.IGNORECASE)]
        how = "it did not end in time" if self.code is None else f"exit code {self.code}"
        return (self.facts().get("fault") or (faults or said or [how])[-1])[:300]


def hear(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Told:
    """Run a command to its end, or end it: never much longer than `limit_s`, even where it cannot be killed."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env,
            start_new_session=True,
        )  # fmt: skip
    except OSError as fault:
        return Told(None, err=str(fault))
    code, out, err = None, b"", b""
    for wait_s, number in ((limit_s, signal.SIGTERM), (4.0, signal.SIGKILL), (1.0, signal.SIGKILL)):
        try:
            out, err = process.communicate(timeout=wait_s)
            code = process.returncode if number is signal.SIGTERM else None
            break
        except subprocess.TimeoutExpired as late:
            out, err = late.stdout or b"", late.stderr or b""
            with suppress(OSError):
                os.killpg(process.pid, number)
    text = out.decode(errors="replace")
    return Told(code, text, err.decode(errors="replace"), _lines(text))


def _lines(text: str) -> list[dict[str, Any]]:
    found = []
    for told in re.findall(rf"{_MARK}(\{{.*\}})", text):
        with suppress(json.JSONDecodeError):  # torn: it was killed while it spoke
            found.append(json.loads(told))
    return found


def hello(what: str, limit_s: float, *more: str) -> list[str]:
    """The command that runs one of the functions below. It ends itself a moment after `limit_s`."""
    return [sys.executable, "-m", "hpcgen.launch.hello", what, f"{limit_s:g}", *more]


def tell(**facts: Any) -> None:
    """Say facts, at once and in one piece: ranks share the output."""
    os.write(1, f"{_MARK}{json.dumps(facts)}\n".encode())


def tell_torch() -> None:
    """torch, the GPUs that it sees, NCCL."""
    start = time.monotonic()
    import torch
    import torch.distributed as dist

    tell(torch=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip, seconds=time.monotonic() - start)
    tell(gloo=dist.is_available() and dist.is_gloo_available(), cards=len(glob.glob("/dev/nvidia[0-9]*")))  # noqa: PTH207
    if dist.is_available() and dist.is_nccl_available() and torch.version.cuda:
        tell(nccl=".".join(map(str, torch.cuda.nccl.version())))
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    tell(gpus=[f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus])
    if gpus:
        torch.ones(8, device="cuda").sum().item()
        tell(computed=True)


def tell_mpi() -> None:
    """mpi4py and the library that it loads; then whether that starts in a single process."""
    import mpi4py

    tell(mpi4py=mpi4py.__version__)
    mpi4py.rc.initialize = False
    from mpi4py import MPI

    maps = Path("/proc/self/maps")
    files = {line.split()[-1] for line in maps.read_text().splitlines() if "/libmpi" in line} if maps.exists() else ()
    name, version = MPI.get_vendor()
    tell(vendor=name, version=".".join(map(str, version)), file=min(files, default="linked into mpi4py"))
    MPI.Init()
    tell(started=MPI.COMM_WORLD.Get_size())
    MPI.Finalize()


def tell_folder(folder: Path) -> None:
    """The file system of a folder, its space, and whether files can be written, locked, read and renamed there."""
    folder = folder.resolve(strict=True)
    kind, point, options = file_system(folder)
    tell(kind=kind, point=point, options=options, folder=str(folder))
    disk = os.statvfs(folder)
    tell(free_gb=disk.f_bavail * disk.f_frsize / 1e9, inodes=disk.f_favail if disk.f_files else None)
    import h5py

    tell(hdf5=h5py.version.hdf5_version, h5py=h5py.__version__)
    probe = Path(tempfile.mkdtemp(prefix=".hpcgen-doctor-", dir=folder))
    try:
        _tell_writing(probe / "a.h5")
        _tell_locking(probe / "a.h5")
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _tell_writing(file: Path) -> None:
    """Write 8 MB as hpcgen writes every file, and replace it while it is open: the old reader keeps the old one."""
    import h5py
    import numpy as np

    def write(values: np.ndarray) -> float:
        start = time.monotonic()
        with whole(file) as draft, h5py.File(draft, "w") as out:
            out["values"] = values
        return time.monotonic() - start

    old, new = (np.frombuffer(os.urandom(_PROBE_BYTES), dtype=np.uint8) for _ in range(2))
    first = write(old)
    with h5py.File(file, "r", locking=False) as before:
        tell(write_s=max(first, write(new)))
        kept = bool((before["values"][:] == old).all())
    with h5py.File(file, "r", locking=False) as after:
        tell(replaced=kept and bool((after["values"][:] == new).all()))


def _tell_locking(file: Path) -> None:
    """Whether locks work and keep others out, and whether reading without them works while another holds one."""
    import h5py

    with file.open("r+b") as mine, file.open("r+b") as other:
        try:
            fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tell(lock="")
        except OSError as fault:
            tell(lock=f"errno {fault.errno}, {fault.strerror}")
        with suppress(OSError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tell(lock="two processes may hold the same lock")
            fcntl.flock(other, fcntl.LOCK_UN)
        with h5py.File(file, "r", locking=False) as shard:
            tell(unlocked=shard["values"].shape == (_PROBE_BYTES,))


def file_system(path: Path) -> tuple[str, str, str]:
    """Type, mount point and options of the file system of a folder; empty where there is no /proc/mounts."""
    best, table = ("", "", ""), Path("/proc/mounts")
    for line in table.read_text().splitlines() if table.exists() else []:
        _, point, kind, options = line.split()[:4]
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code.group(1), 8)), point)
        if path.is_relative_to(point) and len(point) >= len(best[1]):  # of two at one point the later one is seen
            best = (kind, point, options)
    return best


def meet_and_sum(limit_s: float) -> None:
    """All ranks meet as in training, and sum 64 MB: over gloo, and over NCCL where each has a GPU of its own."""
    import torch
    import torch.distributed as dist

    from hpcgen.launch.meet import meet

    place, host = find_place(os.environ), _host()
    limit = timedelta(seconds=1.25 * limit_s)  # longer: who does not find rank 0 says so before that gives up
    rank, world = place.rank, place.world
    tell(rank=rank, world=world)
    store = meet(place, timedelta(seconds=limit_s))
    dist.init_process_group("gloo", store=dist.PrefixStore("gloo", store), rank=rank, world_size=world, timeout=limit)
    tell(rank=rank, host=host, backend="gloo", seconds=_sum(torch.device("cpu"), rank, world, None))
    count = torch.cuda.device_count()
    device = torch.device("cuda", place.local_rank if count > place.local_rank else 0)
    gpu = f"{host} {torch.cuda.get_device_properties(device).uuid}" if count else ""
    store.set(f"gpu/{rank}", gpu)
    gpus = {store.get(f"gpu/{other}").decode() for other in range(world)}
    if all(gpus) and len(gpus) == world:
        torch.cuda.set_device(device)
        group = dist.new_group(backend="nccl", timeout=limit)
        tell(rank=rank, host=host, backend="nccl", seconds=_sum(device, rank, world, group))
    tell(rank=rank, gpu=gpu)
    store.add("left", 1)
    end = time.monotonic() + 5
    while rank == 0 and store.add("left", 0) < world and time.monotonic() < end:
        time.sleep(0.02)


def _sum(device: Any, rank: int, world: int, group: Any) -> float:
    """The sum of rank + 1 over all ranks, a number for every element of 64 MB; seconds that it takes."""
    import torch
    import torch.distributed as dist

    seconds = []
    for size in (1, _REDUCED, _REDUCED):
        values = torch.full((size,), rank + 1.0, device=device)
        dist.barrier(group)
        start = time.monotonic()
        dist.all_reduce(values, group=group)
        told = {float(values.min()), float(values.max())}  # waits for the GPU as well
        seconds.append(time.monotonic() - start)
    if told != {want := world * (world + 1) / 2}:
        raise SiteError(f"the sum over {world} ranks is {' to '.join(map(str, sorted(told)))}, want {want}")
    return min(seconds[1:])


def say_rank() -> None:
    """This rank of MPI. Ranks that MPI does not join say `0 of 1`, all of them."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    tell(rank=comm.Get_rank(), size=comm.Get_size(), host=_host(), answer=comm.allreduce(1))


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def main(words: Sequence[str]) -> int:
    """Do what doctor asked for; a fault becomes a line like any other."""
    what, limit_s = words[0], float(words[1])
    times = 4 if what == "meet" else 1  # each of its steps may take limit_s
    faulthandler.dump_traceback_later(times * limit_s + 5, exit=True)  # also where a C library hangs; says where
    try:
        {
            "torch": tell_torch,
            "mpi": tell_mpi,
            "folder": lambda: tell_folder(Path(words[2])),
            "meet": lambda: meet_and_sum(limit_s),
            "ranks": say_rank,
        }[what]()
    except Exception as fault:
        tell(fault=_sentence(fault), kind_of_fault=type(fault).__name__)
        return SiteError.exit_code
    return 0


def _sentence(fault: Exception) -> str:
    if isinstance(fault, StorageError) and fault.__cause__ is not None:
        return reason(fault.__cause__)  # without the name of the probe
    return ("" if isinstance(fault, (HpcgenError, ImportError, OSError)) else f"{type(fault).__name__}: ") + reason(
        fault
    )


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    sys.stdout.flush()
    if sys.argv[1] == "meet":
        os._exit(ended)  # an interpreter that shuts down in order waits for ranks that are gone
    sys.exit(ended)
