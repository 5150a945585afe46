"""Which processes of one launch work together: alone, ranks of MPI, or tasks of Slurm without MPI.

MPI is used for three things only: to check that the launcher and the library belong together, to agree on the
token of the launch, and to end all ranks when one fails. The work itself is shared through files.
"""

import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from hpcgen.errors import HpcgenError, SiteError, StoppedEarly

log = logging.getLogger(__name__)
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE")  # set by MPI launchers
_RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID")
_ADVICE = (
    "start it with the mpiexec of the MPI that mpi4py uses (python -m mpi4py --mpi-library), or under Slurm "
    "with srun --mpi=pmix or srun --mpi=pmi2 (srun --mpi=list shows what there is)"
)
_HEARD_S = 0.5  # on Abort, Hydra drops what its ranks wrote and it has not read yet
_LEAVE_S = 25.0  # a rank that stops waits this long for the others to leave MPI as well
_LEAVE_SRUN_S = 2.0  # a preempted job may have five seconds in all


@dataclass(frozen=True)
class Team:
    """The processes of one launch. As a context manager it ends all ranks of MPI when one of them fails."""

    kind: str  # alone, mpi, array
    rank: int
    size: int
    token: str  # the same on all ranks of one launch, another in every other launch
    job: str = ""
    restart: int = 0
    comm: Any = field(default=None, repr=False, compare=False)

    def __enter__(self) -> "Team":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.comm is None or fault is None:
            return
        if exit_code(fault) in (0, StoppedEarly.exit_code):
            self._leave(fault)
        else:
            self.abort(fault)

    def abort(self, fault: BaseException) -> None:
        """Say which rank failed and why, then end every rank of MPI with the fault's exit code."""
        where = f"rank {self.rank} of {self.size} on {os.uname().nodename}"
        if isinstance(fault, HpcgenError):
            log.critical("%s: %s", where, fault)
        else:
            text = "".join(traceback.format_exception(fault)).rstrip()
            log.critical("%s failed, all ranks end now\n%s", where, text)
        _flush()
        tell_script(exit_code(fault))
        if self.comm is not None:
            time.sleep(_HEARD_S)
            self.comm.Abort(exit_code(fault))
            os._exit(exit_code(fault))  # some launchers return from Abort and kill a moment later

    def _leave(self, fault: BaseException) -> None:
        """Leave MPI in good order, which waits for the others, but no longer than _LEAVE_S, or _LEAVE_SRUN_S.

        Under Slurm's pmi2 at once: where a node was lost it tries to reach it for ten seconds and then kills the step,
        by then perhaps that of the job's next start, which has the same number.
        """
        from mpi4py import MPI

        def give_up(why: str) -> None:
            log.warning("%s%s", fault, why)
            _flush()
            folder = multiprocessing.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
            if folder:  # of this process's workers; no exit hook will remove it
                shutil.rmtree(folder, ignore_errors=True)
            os._exit(exit_code(fault))

        plugin = _slurms_plugin(os.environ)
        if plugin != "pmi2":
            limit_s = _LEAVE_SRUN_S if plugin else _LEAVE_S
            slow = f" (rank {self.rank}: the others did not leave within {limit_s:.0f} s)"
            timer = threading.Timer(limit_s, give_up, (slow,))
            timer.daemon = True
            timer.start()
            if not MPI.Is_finalized():
                MPI.Finalize()
            timer.cancel()
        if plugin:
            give_up("")  # the end of an interpreter with torch takes a third of a second of a core, of each rank


def exit_code(fault: BaseException) -> int:
    """The status a process ends with after `fault`."""
    if isinstance(fault, HpcgenError):
        return fault.exit_code
    if isinstance(fault, SystemExit):
        return fault.code if isinstance(fault.code, int) else int(fault.code is not None)
    return 130 if isinstance(fault, KeyboardInterrupt) else HpcgenError.exit_code


def tell_script(code: int) -> bool:
    """Leave the code of a failure where the batch script looks for it: srun tells that of another task, if larger.

    The first one knows best: whether it was this one.
    """
    file = os.environ.get("HPCGEN_FAILED", "")
    if file and code not in (0, StoppedEarly.exit_code):
        with suppress(OSError), Path(file).open("x") as told:
            told.write(f"{code}\n")
            return True
    return False


def find_team() -> Team:
    """How this process was started and who works with it, from the environment.

    Raises SiteError if ranks were started that MPI does not join into one world, or mpi4py is missing.
    """
    env = os.environ
    if any(name in env for name in (*MPI_SIZES, *_RANKS)):
        started = _started_ranks(env)
        if started != 1:
            return _mpi_team(env, started)
    elif env_number(env, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in env:
        return _step_team(env)
    return _array_team(env, 0, 1)


def _started_ranks(env: Mapping[str, str]) -> int | None:
    for name in (*MPI_SIZES, "SLURM_STEP_NUM_TASKS"):
        if name in env:
            return env_number(env, name, 1)
    return None


def _mpi_team(env: Mapping[str, str], started: int | None) -> Team:
    try:
        MPI = _begin_mpi(env)
    except (ImportError, RuntimeError) as fault:
        if "SLURM_PROCID" in env and env_number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
            log.info("no usable mpi4py (%s): the tasks of this step share the work through files", fault)
            return _step_team(env)
        raise SiteError(
            f"{started or 'several'} MPI ranks were started, but mpi4py cannot be used ({fault}): "
            "load the site's MPI and `pip install mpi4py`, or start one process without mpiexec"
        ) from fault
    comm = MPI.COMM_WORLD
    size = comm.Get_size()
    if started is not None and size != started:
        library = MPI.Get_library_version().split("\n")[0].strip("\x00 ")
        raise SiteError(
            f"the launcher started {started} ranks, but MPI ({library}) sees {size}: "
            f"each would do all the work; {_ADVICE}"
        )
    if size == 1:
        return _array_team(env, 0, 1)
    token = comm.bcast(uuid.uuid4().hex[:12], root=0)
    _remove_names_of_shared_memory()
    team = _array_team(env, comm.Get_rank(), size, token=token, comm=comm)
    _abort_on_uncaught(team)
    return team


def _begin_mpi(env: Mapping[str, str]) -> Any:
    """mpi4py.MPI, begun. A library that does not understand srun ends the process within, so that is told before.

    Raises ImportError, RuntimeError.
    """
    import mpi4py

    mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
    from mpi4py import MPI

    rank = env.get("PMIX_RANK") or env.get("PMI_RANK")
    if misfit := _misfit(env, MPI.get_vendor()[0]):
        if tell_script(SiteError.exit_code) or ("HPCGEN_FAILED" not in env and rank == "0"):
            log.info("%s", misfit)
            _flush()
        time.sleep(_HEARD_S)  # the first rank that ends takes the others with it
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if misfit and rank == "0" and "HPCGEN_FAILED" in env:  # it was built for that: no failure
        with suppress(OSError):
            Path(env["HPCGEN_FAILED"]).unlink()
    return MPI


def _misfit(env: Mapping[str, str], library: str) -> str:
    """Why a library may not understand the plug-in with which srun started this rank; '' if it should."""
    plugin = _slurms_plugin(env)
    wants = "pmix" if library == "Open MPI" else "pmi2"
    if plugin in ("", wants):
        return ""
    return f"{library} under srun --mpi={plugin}: unless it was built for that it ends here, and wants --mpi={wants}"


def _remove_names_of_shared_memory() -> None:
    """Let MPICH's shared memory, which all ranks of this node have opened by now, go with the last of them.

    Ranks that are killed, or leave without MPI_Finalize, would leave it behind; and as under srun its name comes from
    the job and the step, the job, when started again, would take what lies there for its own.
    """
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            file = line.split(maxsplit=5)[-1]
            if file.startswith("/dev/shm/mpich_"):
                Path(file).unlink(missing_ok=True)


def _step_team(env: Mapping[str, str]) -> Team:
    """Tasks of one srun step that are not joined by MPI: files are enough."""
    token = f"step-{env.get('SLURM_JOB_ID', '0')}-{env.get('SLURM_STEP_ID', '0')}-{_restart(env)}"
    rank, size = env_number(env, "SLURM_PROCID", 0), env_number(env, "SLURM_STEP_NUM_TASKS", 1)
    return _array_team(env, rank, size, token=token, kind="array")


def _array_team(
    env: Mapping[str, str], rank: int, size: int, token: str = "", comm: Any = None, kind: str = ""
) -> Team:
    """Place `rank` of `size` within a Slurm array, if there is one.

    The token of an array holds no restart count: tasks are requeued one by one and join those that still run.
    """
    job, tasks = _job(env), env_number(env, "SLURM_ARRAY_TASK_COUNT", 1)
    if "SLURM_ARRAY_TASK_ID" in env and tasks > 1:
        low, step = env_number(env, "SLURM_ARRAY_TASK_MIN", 0), env_number(env, "SLURM_ARRAY_TASK_STEP", 1)
        task = (env_number(env, "SLURM_ARRAY_TASK_ID", 0) - low) // max(step, 1)
        rank, size = task * size + rank, tasks * size
        token = f"array-{env.get('SLURM_ARRAY_JOB_ID', env.get('SLURM_JOB_ID', '0'))}"
        kind = "array"
    kind = kind or ("mpi" if comm is not None else "alone")
    return Team(kind, rank, size, token or uuid.uuid4().hex[:12], job, _restart(env), comm)


def _job(env: Mapping[str, str]) -> str:
    return env.get("SLURM_JOB_ID") or env.get("PBS_JOBID") or env.get("LSB_JOBID") or ""


def _restart(env: Mapping[str, str]) -> int:
    return env_number(env, "SLURM_RESTART_COUNT", 0)


def env_number(env: Mapping[str, str], name: str, otherwise: int) -> int:
    """A whole number from the environment, `otherwise` where it is not set. Raises SiteError for anything else."""
    text = env.get(name, "")
    if not text:
        return otherwise
    try:
        return int(text)
    except ValueError:
        raise SiteError(f"environment variable {name}={text!r}: want a whole number") from None


def _slurms_plugin(env: Mapping[str, str]) -> str:
    """The `--mpi=` with which srun started this rank, pmi2 or pmix; '' for others, as an mpiexec within a step."""
    if "MPI_LOCALNRANKS" in env:  # Hydra
        return ""
    if env.get("PMI_JOBID") == f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}":
        return "pmi2"
    return "pmix" if env.get("PMIX_NAMESPACE", "").startswith("slurm.") else ""


def _abort_on_uncaught(team: Team) -> None:
    """A net below the context manager: an exception nobody caught ends all ranks too."""
    before = sys.excepthook

    def end_all(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
        if exit_code(fault) == StoppedEarly.exit_code:
            before(kind, fault, trace)
        else:
            team.abort(fault)

    sys.excepthook = end_all


def _flush() -> None:
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
