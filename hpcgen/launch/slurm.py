"""Slurm's own commands: in an environment that no job has left its marks on, with a limit on their time."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from hpcgen.errors import SiteError
from hpcgen.runner.owners import read_record, replace_quickly

_TIMEOUT_S = 60.0
_KEPT_S = 30.0  # sites ask that nobody asks their Slurm more often
_OURS = re.compile(
    r"(SLURM_(?!CONF$)|SLURMD_|SRUN_|SUBMITIT_|PMI_|PMIX_|OMPI_COMM_|HPCGEN_(JOB_END|FAILED)$|TORCHELASTIC_|"
    r"((LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES)$)"
)


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str


def ask(*command: str, text: str = "", timeout_s: float = _TIMEOUT_S) -> Answer | None:
    """Run a command of Slurm; None where there is no such command here, or it does not answer in time."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env=clean_environment(), timeout=timeout_s
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    return Answer(done.returncode, done.stdout, done.stderr.strip())


def ask_seldom(
    *command: str, since: float, lasts: Callable[[Answer], bool], timeout_s: float = _TIMEOUT_S
) -> Answer | None:
    """As `ask`, for what people ask again and again (`watch`): an answer of the last 30 s is given once more.

    Only one that is newer than `since` (seconds since the epoch) and of which `lasts` is true. All are kept in one file
    in the user's cache folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '')}/.cache"
    file = Path(cache, "hpcgen", "slurm.json")
    question = " ".join((os.environ.get("SLURM_CONF", ""), shutil.which(command[0]) or "", *command))
    now, kept = time.time(), {}
    with suppress(OSError):
        kept = {asked: told for asked, told in (read_record(file) or {}).items() if now - _KEPT_S < told[0] <= now}
    if question in kept and kept[question][0] > since:
        return Answer(*kept[question][1:])
    answer = ask(*command, timeout_s=timeout_s)
    if answer is not None and lasts(answer):
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_quickly(file, {**kept, question: (now, *astuple(answer))}, str(os.getpid()))
    return answer


def lines(*command: str) -> list[str] | None:
    """The lines that a command of Slurm says, None where it cannot be asked."""
    answer = ask(*command)
    return answer.out.splitlines() if answer is not None and answer.code == 0 else None


def clean_environment() -> dict[str, str]:
    """This environment without what a job sets: sbatch within a job would inherit its resources."""
    return {name: value for name, value in os.environ.items() if not _OURS.match(name)}


def jobs_named(name: str) -> list[str]:
    """Ids of the jobs of that name that are queued or run. Raises SiteError where the queue cannot be asked."""
    told = lines("squeue", "--noheader", f"--name={name}", "--format=%i")
    if told is None:
        raise SiteError(f"squeue does not answer: whether job {name} was queued is not known")
    return [line.strip() for line in told if line.strip()]


def partitions() -> list[str]:
    """Names of the partitions, the default one marked with *; empty where sinfo cannot be asked."""
    return sorted({line.strip() for line in lines("sinfo", "--noheader", "--format=%P") or [] if line.strip()})
