"""The batch script of a job: text that a person can read, and that a laptop without Slurm can write."""

import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcgen.launch.site import Site

FOLDER = "submit"  # of a run folder: a record for each verb, logs, and what submitit keeps
OPENING = """\
if ! { mkdir -p "${log%/*}" && exec >> "$log" 2>&1; }; then
    echo "hpcgen: $log cannot be written on $(hostname): want a run folder that all nodes see, with space in it" |
        tee -a "$HOME/hpcgen-$SLURM_JOB_ID.log" >&2 # a place where it may be found
    exit 7
fi
begun=$(wc -c < "$log") # where the words of this start begin
"""
# Measured with Slurm 22.05: a preemption, the --signal before the end and `scancel` reach the tasks; srun and the
# script go on. A job that leaves with 75 within its grace time is recorded as failed, one with 0 as completed: neither
# is queued again. One that asks for it after `scancel` would come back: by then it is COMPLETING. Of the codes of its
# tasks srun tells the largest: those that were ended because one failed with 4 leave with 75, or, if they had not yet
# begun, with 143.
ENDING = """\
if [ -e "$HPCGEN_FAILED" ]; then # a task failed and says with which code; srun may tell that of another one
    told=$(cat "$HPCGEN_FAILED")
    exit "${told:-7}" # where nothing can be written there is no space
elif [ "$code" -ne 75 ] && [ "$code" -ne 140 ] && [ "$code" -ne 143 ]; then
    exit "$code"
fi
# 75: stopped early, all is saved. 140, 143: ended by USR2 or TERM before it began. All go on from what is saved.
# Where USR2 ended one task and srun then the others by TERM, srun tells 143.
if grep -q "User defined signal 2" < <(tail -c "+$((begun + 1))" "$log"); then code=140; fi
for _ in $(seq 20); do # the controller may be away for a while
    state=$(scontrol show job "$job") && break
    command -v scontrol > /dev/null || break # there is none
    sleep 15
done
case "$code $state" in
"143 "*JobState=RUNNING*PreemptTime=None*)
    echo "hpcgen: a task was ended by TERM, but job $job is not preempted: another one failed"
    ;;
*JobState=RUNNING* | *JobState=SIGNALING* | *Reason=TimeLimit*)
    echo "hpcgen: job $job left with $code and asks to be queued again"
    for _ in $(seq 20); do
        scontrol requeue "$job" && sleep 60 # until Slurm ends this script
        sleep 15
    done
    echo "hpcgen: job $job could not be queued again; the same command goes on from here"
    ;;
"$code ")
    echo "hpcgen: scontrol does not answer, so job $job cannot ask to be queued again"
    echo "hpcgen: if it is preempted, Slurm itself does so; if not, the same command goes on from here"
    sleep 300 # one that leaves before its preemption ends it would count as failed
    ;;
*) echo "hpcgen: job $job was cancelled; the same command goes on from here" ;;
esac
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """One command of hpcgen as a job."""

    verb: str
    name: str  # no other job has it
    run: Path  # run folder, absolute
    command: list[str]  # of one task, interpreter and all
    site: Site
    after: str = ""  # jobs that must have ended well before, as 17 or 17:18
    files: Sequence[Path] = ()  # that it reads

    @property
    def folder(self) -> Path:
        """For the script, the log and the record."""
        return self.run / FOLDER

    @property
    def interpreter(self) -> list[str]:
        """What starts Python in a task, container and all."""
        return [*shlex.split(self.site.container), self.command[0]]


def new_name(verb: str) -> str:
    """A name that no other job has: the queue can be asked for it when nobody knows whether sbatch worked."""
    return f"hpcgen-{verb}-{uuid.uuid4().hex[:8]}"


def render(job: Job, command: str = "") -> str:
    """The batch script. command: of each task, for a shell; that of the job if left out."""
    site = job.site
    command = command or shlex.join([*shlex.split(site.container), *job.command])
    flags = {"job-name": job.name, **site.flags(job.verb), "requeue": "", "open-mode": "append"}
    if site.signal_s:
        flags["signal"] = f"USR2@{site.signal_s}"
    if job.after:
        flags |= {"dependency": f"afterok:{job.after}", "kill-on-invalid-dep": "yes"}
    flags["output"] = "/dev/null"
    logs = shlex.quote(str(job.folder))
    parts = [
        "#!/bin/bash",
        *(_directive(name, value) for name, value in flags.items()),
        "",
        "# The log goes on after a requeue. The script opens it itself: Slurm does not make folders.",
        f'log={logs}/{job.verb}-"$SLURM_JOB_ID".log',
        OPENING,
        *_block("# The site's own lines.", site.setup),
        *_block("", [f"export {name}={shlex.quote(value)}" for name, value in _environment(job).items()]),
        'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
        "export SLURM_EXPORT_ENV=ALL # what is set here reaches the tasks, whatever sbatch was told",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID} # in an array one task bears the number of them all",
        "# When Slurm ends this job, for those that must leave before (Slurm itself tells it since 23.02).",
        'end=$(SLURM_TIME_FORMAT=standard squeue --noheader --format=%e --jobs="$job")',
        'HPCGEN_JOB_END=$(date --date="$end" +%s 2> /dev/null)',
        "export HPCGEN_JOB_END",
        "# Of this start alone: ranks on a lost node may live on.",
        f'export HPCGEN_FAILED={logs}/failed-"$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"',
        f"srun {_words(_srun_flags(job))} {command}",
        "code=$?",
        "",
        ENDING.rstrip(),
    ]
    return "\n".join(parts) + "\n"


def _directive(name: str, value: str) -> str:
    if not value:
        return f"#SBATCH --{name}"
    return f'#SBATCH --{name}="{value}"' if " " in value else f"#SBATCH --{name}={value}"


def _srun_flags(job: Job) -> list[str]:
    """A rank that fails ends the others; training brings its own rendezvous, all else works under MPI."""
    mpi = "none" if job.verb == "train" or job.site.resources(job.verb).tasks == 1 else job.site.mpi
    cpus = job.site.resources(job.verb).cpus_per_task  # srun does not take it over from sbatch since Slurm 22.05
    told = ["--kill-on-bad-exit=1", f"--mpi={mpi}", *([f"--cpus-per-task={cpus}"] if cpus else [])]
    return [*told, *job.site.srun]


def _environment(job: Job) -> dict[str, str]:
    told = dict(job.site.env)
    if job.site.interface:
        told |= {"NCCL_SOCKET_IFNAME": job.site.interface, "GLOO_SOCKET_IFNAME": job.site.interface}
    if job.site.master_suffix:
        told["HPCGEN_MASTER_SUFFIX"] = job.site.master_suffix
    return told


def _block(comment: str, lines: Sequence[str]) -> list[str]:
    return [*([comment] if comment else []), *lines, ""] if lines else []


def _words(words: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)
