"""How a run stands: from its heartbeats, events and files first, then from squeue, then from sacct. It is only read."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeAlias

from hpcgen.errors import InputError
from hpcgen.launch.folder import ENDS, Folder, Launch, is_stop, number_of, record_of
from hpcgen.launch.progress import Losses, Progress, losses_of, progress_of
from hpcgen.launch.slurm import Answer, ask_seldom

STATES = ("running", "silent", "queued", "stopped", "failed", "done")
_SLURM_S = 10.0
_MOST_JOBS = 100
_WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT")
_Run: TypeAlias = tuple[float, str, str]  # of a job, as sacct tells: start, id, how it ended


@dataclass(frozen=True)
class Restart:
    """A launch after the first. why: how the one before it ended."""

    time: float  # seconds since the epoch
    job: str
    count: int  # of restarts of that job, by Slurm
    host: str
    why: str


@dataclass(frozen=True)
class LastError:
    """The newest error that any rank has told; None: not told."""

    message: str
    kind: str | None
    rank: int | None
    time: float | None  # seconds since the epoch
    where: str = ""  # the block's file, and the line of code


@dataclass(frozen=True)
class QueuedJob:
    """A job of this run folder that squeue knows."""

    job: str
    verb: str  # '' where it is known from the run's events
    state: str  # Slurm's word
    reason: str  # Slurm's
    start: float | None  # seconds since the epoch; of a waiting job Slurm's guess


@dataclass(frozen=True)
class Status:
    """How a run stands. squeue, sacct: asked, now or within 30 s, unneeded, or unavailable."""

    run: str
    verb: str  # preprocess, train, campaign, evaluate; '': it has only begun
    state: str  # one of STATES
    why: str
    beat_age_s: float | None  # since the newest sign of life; None: nobody holds the folder
    hosts: list[str]  # of those that beat
    beating: int  # processes that beat; of training rank 0 beats for all
    size: int | None  # ranks of the launch
    progress: Progress | None
    losses: Losses | None
    restarts: list[Restart]
    last_error: LastError | None
    jobs: list[QueuedJob]
    squeue: str
    sacct: str


def describe(run: Path) -> Status:
    """How the run in a folder stands. Raises InputError for a folder without a run, or that cannot be read."""
    try:
        return _described(Folder(Path(run)))
    except OSError as fault:
        raise InputError(f"{fault.filename or run}: cannot be read ({fault.strerror or fault})") from fault


def _described(folder: "Folder") -> Status:
    verb, beating = folder.verb, folder.beating
    jobs, squeue = ([], "unneeded") if beating else _queue(folder)
    state, why = _state(folder, jobs, squeue)
    silent = [launch for launch in folder.launches if launch.end is None]
    if silent and silent[-1] is folder.launches[-1] and state not in ("silent", "failed"):
        silent.pop()
    ended, sacct = _accounting([launch.job for launch in silent], folder.newest)
    if silent and silent[-1] is folder.launches[-1] and (told := _fate(ended, silent[-1])):
        why += f"; Slurm: job {silent[-1].job} {told}"
    pairs = zip(folder.launches, folder.launches[1:], strict=False)
    return Status(
        run=str(folder.run), verb=verb, state=state, why=why,
        beat_age_s=min((round(beat["age_s"], 1) for beat in folder.beats), default=None),
        hosts=sorted({str(beat.get("host")) for beat in beating}), beating=len(beating),
        size=(folder.lease or {}).get("size"), progress=progress_of(folder, state), losses=losses_of(folder),
        restarts=[_restart(before, launch, ended) for before, launch in pairs], last_error=_last_error(folder),
        jobs=jobs, squeue=squeue, sacct=sacct,
    )  # fmt: skip


# ---- the state -------------------------------------------------------------------------------------------------------


def _state(folder: Folder, jobs: list[QueuedJob], squeue: str) -> tuple[str, str]:
    """One of STATES, and why."""
    if folder.beating:
        return "running", f"last sign of life {_span(min(beat['age_s'] for beat in folder.beating))} ago"
    own = [job for job in jobs if job.verb in ("", folder.verb)]
    for job in own:
        if job.state in _WAITS:
            return "queued", f"job {job.job} {job.state} ({job.reason})"
    if folder.is_complete:
        return "done", ""
    if folder.beats:
        return "silent", "; ".join([_silence(folder.beats), *(f"squeue: job {job.job} {job.state}" for job in own)])
    newest = max((number_of(event, "time") for event in folder.events if event.get("event") in ENDS), default=0.0)
    for job in own:
        if job.state in ("RUNNING", "CONFIGURING") and (job.start or 0) > newest:
            return "running", f"job {job.job} {job.state}, no sign of life yet"
    return _end(folder, squeue)


def _silence(beats: list[dict[str, Any]]) -> str:
    beat = min(beats, key=lambda beat: float(beat["age_s"]))
    who, age = f"pid {beat.get('pid')} on {beat.get('host')}", _span(beat["age_s"])
    if beat["gone"]:
        return f"killed: {who} is gone, last sign of life {age} ago"
    if beat["gone"] is False:
        return f"no sign of life for {age}, but {who} lives: suspended, or its file system hangs"
    return f"no sign of life for {age} from {who}: killed, its node lost, or its file system hangs"


def _end(folder: Folder, squeue: str) -> tuple[str, str]:
    """Of a run that nobody holds, which is not complete and has no job."""
    if folder.launches:
        if folder.end is None:
            return "failed", "ended without last words"
        return ("stopped" if is_stop(folder.end) else "failed"), _last_words(folder.end)
    told = _last_error(folder)
    if told is not None:
        return "failed", _in_words(told)
    numbers = ", ".join(str(told["job"]) for told in folder.submitted if told.get("job"))
    if numbers and squeue == "unavailable":
        return "queued", f"submitted as job {numbers}; squeue cannot be asked here"
    return "failed", f"job {numbers} ended before the run began" if numbers else "ended before the run began"


# ---- what went wrong -------------------------------------------------------------------------------------------------


def _error_of(event: dict[str, Any]) -> LastError | None:
    """The error that an event tells of, None if it tells of none."""
    name = event.get("event")
    if name not in ("failed", "error", "stop") or is_stop(event):
        return None
    message = str(event.get("message") or event.get("reason") or "no reason given")
    rank, where = event.get("rank"), [event.get("file"), event.get("at")]
    return LastError(message, event.get("kind"), rank, number_of(event, "time"), ", ".join(str(w) for w in where if w))


def _last_error(folder: Folder) -> LastError | None:
    for event in reversed(folder.events):
        if (error := _error_of(event)) is not None:
            return error
    for mark in folder.failed:
        told = record_of(mark) or {}
        message, kind, rank = str(told.get("reason", "no reason given")), told.get("kind"), told.get("rank")
        return LastError(message, kind, rank, None, mark.name.removesuffix(".failed"))
    return None


def _in_words(error: LastError) -> str:
    place = f"on rank {error.rank}" if error.rank is not None else "(which rank is not told)"
    return f"{error.kind}: {error.message} {place}" if error.kind else f"{error.message} {place}"


def _last_words(event: dict[str, Any]) -> str:
    """How a launch ended that said so."""
    error = _error_of(event)
    if error is not None:
        return _in_words(error)
    return str(event.get("reason") or event.get("event")).removesuffix("; the same command goes on from here")


def _restart(before: Launch, launch: Launch, ended: list[_Run]) -> Restart:
    count = int(number_of(launch.start, "restart"))
    if before.end is not None:
        why = _last_words(before.end)
    elif told := _fate(ended, before):
        why = f"Slurm: {told}"
    elif launch.job and launch.job == before.job:
        why = "no last words; Slurm started the job again: preempted, or its node lost"
    else:
        why = "no last words: killed, or its node lost"
    return Restart(launch.time, launch.job, count, str(launch.start.get("host", "")), why)


# ---- Slurm -----------------------------------------------------------------------------------------------------------


def _queue(folder: Folder) -> tuple[list[QueuedJob], str]:
    """The jobs of this folder that are queued or run, and whether squeue said so."""
    verbs = {str(told.get("job")): str(told.get("verb") or "") for told in folder.submitted}
    numbers = _numbers([*verbs, *(launch.job for launch in folder.launches)])
    if not numbers:
        return [], "unneeded"
    command = ("squeue", "--noheader", f"--jobs={','.join(numbers)}", "--format=%i|%T|%S|%r")
    answer = ask_seldom(*command, since=folder.newest, lasts=_only_waits, timeout_s=_SLURM_S)
    if answer is None or (answer.code and "Invalid job id" not in answer.err):  # said of a single job that is over
        return [], "unavailable"
    return [
        QueuedJob(job, verbs.get(job.partition("_")[0], ""), state, reason, _moment(start))
        for job, state, start, reason in _jobs_of(answer)
    ], "asked"


def _jobs_of(answer: Answer) -> list[list[str]]:
    """Id, state, start and reason of the jobs that squeue lists."""
    return [line.strip().split("|", 3) for line in answer.out.splitlines() if line.count("|") >= 3]


def _only_waits(answer: Answer) -> bool:
    """Whether squeue lists no job that begins or ends: what it says may stay so for days."""
    return all(state in _WAITS for _, state, *_ in _jobs_of(answer))


def _accounting(jobs: list[str], since: float) -> tuple[list[_Run], str]:
    """What became of jobs that ended without a word, oldest first, and whether sacct said so. since: of ask_seldom."""
    numbers = _numbers(jobs)
    if not numbers:
        return [], "unneeded"
    command = ("sacct", "-X", "-n", "-P", "--duplicates", f"--jobs={','.join(numbers)}")
    what = "--format=Start,JobIDRaw,State,ExitCode"
    answer = ask_seldom(*command, what, since=since, lasts=lambda told: True, timeout_s=_SLURM_S)
    if answer is None or answer.code:
        return [], "unavailable"
    rows = [line.strip().split("|") for line in answer.out.splitlines() if line.count("|") == 3]
    told = [(_moment(start) or 0.0, job, f"{state}, exit code {code}") for start, job, state, code in rows]
    return sorted(told), "asked"


def _fate(accounts: list[_Run], launch: Launch) -> str:
    """Slurm's word for the end of a launch; '' if there is none."""
    words = [state for start, job, state in accounts if job == launch.job and start <= launch.time + 5]
    return words[-1] if words and not words[-1].startswith(("RUNNING", "PENDING")) else ""


def _numbers(jobs: list[str]) -> list[str]:
    """Ids that can be Slurm's, the newest ones, each once."""
    return list(dict.fromkeys(job for job in reversed(jobs) if job.isdecimal()))[:_MOST_JOBS]


def _moment(text: str) -> float | None:
    """Slurm's local time in seconds since the epoch."""
    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    return None


# ---- for people ------------------------------------------------------------------------------------------------------


def render(status: Status) -> str:
    """What `describe` found, for people to read."""
    why = f": {status.why}" if status.why else ""
    rows = [("run", f"{status.run} ({status.verb or 'just begun'})"), ("state", f"{status.state}{why}")]
    if status.beating:
        ranks = f"{status.beating} of {status.size} ranks beat" if status.verb != "train" else f"{status.size} ranks"
        rows.append(("ranks", f"{ranks}, on {', '.join(status.hosts)}"))
    rows += _told_of_progress(status.progress) if status.progress else []
    if (losses := status.losses) is not None:
        told = [f"{_digits(losses.loss)} at step {losses.step:,}"] if losses.step is not None else []
        if losses.validation_step is not None:
            told.append(f"validation {_digits(losses.validation_loss)} at step {losses.validation_step:,}")
        rows.append(("loss", f"{', '.join(told)} ({_span(losses.age_s)} ago)"))
    if (error := status.last_error) is not None:
        when = f"{_date(error.time)}: " if error.time else ""
        rows.append(("last error", f"{when}{_in_words(error)}{f' ({error.where})' if error.where else ''}"))
    for job in status.jobs:
        rows.append(("job", " ".join(filter(None, (job.job, job.verb, job.state, f"({job.reason})")))))
    if "unavailable" in (status.squeue, status.sacct):
        rows.append(("slurm", f"squeue {status.squeue}, sacct {status.sacct}"))
    rows.append(("restarts", str(len(status.restarts))))
    lines = [f"{name:<11} {value}" for name, value in rows]
    for restart in status.restarts:
        who = f"job {restart.job}, restart {restart.count}, " if restart.job else ""
        lines.append(f"  {_date(restart.time)}  {who}on {restart.host}, after: {restart.why}")
    return "\n".join(lines)


def _told_of_progress(progress: Progress) -> list[tuple[str, str]]:
    share = f" of {progress.total:,}" if progress.total is not None else ""
    percent = f" ({progress.done / progress.total:.1%})" if progress.total else ""
    phase = f", {progress.phase}" if progress.phase else ""
    rows = [("progress", f"{progress.done:,}{share} {progress.unit}{percent}{phase}")]
    if progress.rate:
        left = f", {_span(progress.left_s)} left" if progress.left_s is not None else ""
        rows.append(("rate", f"{progress.rate:.3g} {progress.unit}/s{left}"))
    if progress.saved is not None:
        rows.append(("saved", f"step {progress.saved:,}"))
    if progress.blocks_failed:
        rows.append(("failed", f"{progress.blocks_failed:,} blocks"))
    return rows


def _digits(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4g}"


def _span(seconds: float) -> str:
    """1:06:00, or 2 days, 3:00:00."""
    return str(timedelta(seconds=round(seconds)))


def _date(moment: float) -> str:
    return datetime.fromtimestamp(moment).isoformat(" ", "seconds")
