"""A command as a Slurm job: queued through submitit, which pickles nothing but the run folder and the verb.

In the job every task becomes the command itself (`exec`): what runs is the same as under a plain `srun hpcgen …`, with
its own handling of signals, and no result is pickled for any of the tasks.
"""

import hashlib
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor, SlurmJob

from hpcgen.errors import InputError, SiteError, StorageError, UsageError
from hpcgen.files import append_json_line, make_folder, write_json, write_whole
from hpcgen.launch.doctor import why_hidden
from hpcgen.launch.hello import file_system
from hpcgen.launch.sbatch import FOLDER, Job, render
from hpcgen.launch.slurm import ask, jobs_named, partitions
from hpcgen.runner.events import EVENTS, code_digest
from hpcgen.runner.owners import read_record
from hpcgen.runner.team import tell_script

log = logging.getLogger(__name__)
_UNSURE = re.compile("timed out|timeout|unable to contact|connection refused|communication", re.IGNORECASE)
_LOOK_S = 30.0  # a job that sbatch is not sure of may take a while to be seen in the queue


@dataclass(frozen=True)
class Command:
    """All that is pickled. In a task of the job it becomes the command that the record names."""

    run: str
    verb: str

    def __call__(self) -> None:
        """Never returns. Raises InputError where the record is gone."""
        file = record_of(Path(self.run), self.verb)
        record = read_record(file)
        if not record or not record.get("command"):
            tell_script(InputError.exit_code)
            raise InputError(f"{file}: no record of the job, want what `hpcgen submit` wrote there")
        if os.environ.get("SLURM_PROCID", "0") == "0":  # once is enough
            _note_changes(Path(self.run), record)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(record["command"][0], record["command"])


def record_of(run: Path, verb: str) -> Path:
    """The file that says how a verb was submitted for a run folder."""
    return run / FOLDER / f"{verb}.json"


def submit(job: Job) -> str:
    """Queue a job and write its record into the run folder; its id.

    Raises UsageError where the run has such a job already or Slurm refuses the settings, SiteError without a Slurm
    that answers; its record then stays, so that the next try finds a job that was queued after all.
    """
    executor = _executor(job)
    _refuse_second(job)
    make_folder(job.folder)
    _warn_of_hidden(job.run.resolve())
    file = record_of(job.run, job.verb)
    others = job.site.container or job.site.python  # whose code cannot be seen from here
    record: dict[str, Any] = {
        "verb": job.verb, "name": job.name, "command": job.command, "folder": str(Path.cwd()), "after": job.after,
        "time": round(time.time(), 3), "job": "",
        "code": "" if others else code_digest(), "files": _digests(job.files),
    }  # fmt: skip
    kept = file.read_text() if file.exists() else ""
    pickles = set(job.folder.glob("*.pkl"))
    write_json(file, record)
    try:
        number = executor.submit(Command(str(job.run), job.verb)).job_id
    except UsageError:
        _clear_up(job, set(job.folder.glob("*.pkl")) - pickles, kept)
        raise
    write_json(file, {**record, "job": number})
    append_json_line(job.run / EVENTS, event="submit", verb=job.verb, job=number, name=job.name)
    return number


def test_only(job: Job) -> str:
    """What sbatch says of a job that it does not queue. Raises UsageError where it would refuse."""
    answer = ask("sbatch", "--test-only", text=render(job))
    if answer is None:
        raise SiteError("sbatch does not answer here: --test-only wants a Slurm, --dry-run does not")
    if answer.code:
        raise UsageError(_refusal(answer.err))
    return answer.err or answer.out.strip()


class _Executor(SlurmExecutor):
    """submitit's, with the batch script of this package, and sbatch called so that no job is queued twice."""

    job: Job

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return render(self.job, f"env SUBMITIT_EXECUTOR=slurm {command}")  # without it a task does not know where it is

    def _submit_command(self, command: str) -> SlurmJob:
        draft = Path(self.folder) / f"{self.job.name}.sh"
        write_whole(draft, self._make_submission_file_text(command, ""))
        queued: SlurmJob = SlurmJob(folder=self.folder, job_id=_sbatch(draft, self.job), tasks=[0])
        queued.paths.move_temporary_file(draft, "submission_file")
        return queued


def _executor(job: Job) -> _Executor:
    try:
        made = _Executor(job.folder, python=shlex.join(job.interpreter))
    except RuntimeError as absent:
        raise SiteError(f"no srun here ({absent}): submit where Slurm is, or see the script with --dry-run") from absent
    made.job = job
    return made


def _sbatch(script: Path, job: Job) -> str:
    """The id of the job. Raises UsageError, SiteError."""
    answer = ask("sbatch", "--parsable", str(script))
    if answer is not None and answer.code == 0 and answer.out.strip():
        return answer.out.strip().split(";")[0]
    said = answer.err if answer is not None else "no answer"
    unsure = answer is None or _UNSURE.search(said) is not None
    end = time.monotonic() + (_LOOK_S if unsure else 0.0)
    while not (found := jobs_named(job.name)) and time.monotonic() < end:  # it may have failed after it was queued
        time.sleep(1.0)
    if found:
        log.warning("sbatch said %r, but job %s was queued", said, found[0])
        return found[0]
    if unsure:
        raise SiteError(
            f"sbatch: {said}; no job is queued so far. One that still comes has the name {job.name}: look with "
            f"`squeue --name={job.name}` and cancel it before the next try"
        )
    raise UsageError(_refusal(said))


def _clear_up(job: Job, pickles: set[Path], kept: str) -> None:
    """Remove what was written for a job that Slurm refused. kept: the record of the job before it."""
    record = record_of(job.run, job.verb)
    for made in (*pickles, job.folder / f"{job.name}.sh", record):
        made.unlink(missing_ok=True)
    if kept:
        write_whole(record, kept)
    for folder in (job.folder, job.run):
        with suppress(OSError):  # in use
            folder.rmdir()


def _warn_of_hidden(run: Path) -> None:
    if hidden := why_hidden(run, file_system(run)[0]):
        log.warning("%s is on %s: want a run folder that the nodes of the job see too", run, hidden)


def _digests(files: Iterable[Path]) -> dict[str, str]:
    """Of each file that is there: 12 hex digits."""
    told = {}
    for path in files:
        if path.is_file():
            with path.open("rb") as file:
                told[str(path.absolute())] = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return told


def _note_changes(run: Path, record: dict[str, Any]) -> None:
    """Warn of code and files that are not as when the job was submitted, and add that to the events of the run.

    A job that waits in a queue takes what is there when it begins.
    """
    before = {"the code of hpcgen": record.get("code"), **record.get("files", {})}
    now = {"the code of hpcgen": code_digest(), **_digests(map(Path, record.get("files", {})))}
    for what, digest in before.items():
        if digest and digest != now.get(what):
            log.warning("%s is not as it was at `hpcgen submit` (%s, now %s)", what, digest, now.get(what, "gone"))
            with suppress(StorageError):  # the command itself will say so
                append_json_line(run / EVENTS, event="changed", what=what, before=digest, now=now.get(what))


def _refusal(said: str) -> str:
    told = " ".join(line.removeprefix("sbatch: error: ") for line in said.splitlines() if line.strip())
    if "partition" in told.lower() and (names := partitions()):
        told += f"; the partitions here are {', '.join(names)}"
    return f"sbatch refuses the job: {told}"


def _refuse_second(job: Job) -> None:
    """Raise UsageError if this verb of this run is queued or runs."""
    record = read_record(record_of(job.run, job.verb)) or {}
    name = record.get("name")
    if name and (found := jobs_named(name)):
        raise UsageError(
            f"{job.run}: {job.verb} is job {found[0]} already, queued or running; see `hpcgen status {job.run}`, or "
            f"end it with `scancel {found[0]}`"
        )
