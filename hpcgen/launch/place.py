"""Which processes train together, from their environment: alone, under torchrun, under srun."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hpcgen.errors import SiteError
from hpcgen.runner.team import MPI_SIZES, env_number

LOCAL = ("localhost", "127.0.0.1", "::1")
_FIRST_PORT, _PORTS, _TRIES = 20000, 12768, 8  # below the system's own, which are given out from 32768 on
_ADVICE = "start it with `srun hpcgen train …`, or on one alone with `srun -N1 -n1 hpcgen train …`"


@dataclass(frozen=True)
class Place:
    """This process among those of its launch."""

    kind: str = "alone"  # alone, torchrun, srun
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    nodes: int = 1
    address: str = ""  # where rank 0 listens
    ports: tuple[int, ...] = ()  # one of these
    token: str = ""  # the same on all ranks of one launch


def find_place(env: Mapping[str, str]) -> Place:
    """How this process was started, from its environment. Raises SiteError where that is not clear."""
    if "RANK" in env or "LOCAL_RANK" in env:
        return _torchrun_place(env)
    tasks = env_number(env, "SLURM_STEP_NUM_TASKS", 1) if "SLURM_PROCID" in env else 1
    for name in MPI_SIZES:
        if env_number(env, name, 1) not in (1, tasks):
            raise SiteError(f"started by an MPI launcher ({name}={env[name]}): training wants torchrun or srun")
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        _refuse_missing_tasks(env)
        return _srun_place(env) if tasks > 1 else Place()
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env:
        nodes, tasks = env_number(env, "SLURM_JOB_NUM_NODES", 1), env_number(env, "SLURM_NTASKS", 1)
        if nodes > 1 or tasks > 1:
            raise SiteError(
                f"the job has {nodes} nodes and {tasks} tasks, but this is one process outside of srun: {_ADVICE}"
            )
    return Place()


def _torchrun_place(env: Mapping[str, str]) -> Place:
    lacks = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if lacks:
        raise SiteError(f"started as by torchrun, but {', '.join(lacks)} is not set: use torchrun, srun or one process")
    rank, world = env_number(env, "RANK", 0), env_number(env, "WORLD_SIZE", 1)
    local, local_world = env_number(env, "LOCAL_RANK", rank), env_number(env, "LOCAL_WORLD_SIZE", world)
    nodes = -(-world // max(local_world, 1))
    if not 0 <= rank < world:
        raise SiteError(f"RANK={rank}, WORLD_SIZE={world}: want 0 <= rank < world size")
    _refuse_local(env["MASTER_ADDR"], nodes)
    ports = (env_number(env, "MASTER_PORT", 29500),)
    return Place("torchrun", rank, world, local, nodes, env["MASTER_ADDR"], ports, env.get("TORCHELASTIC_RUN_ID", ""))


def _refuse_missing_tasks(env: Mapping[str, str]) -> None:
    """Raises SiteError where this step has fewer tasks than it was meant to have.

    SLURM_NTASKS is that of the step, `srun -n1` in a large job included, but for --preserve-env, which salloc gives
    its shell: one task of many. SLURM_NTASKS_PER_NODE is that of the job unless srun has its own, so it says nothing
    of one task or of some of the nodes; more tasks than it says are what `srun --ntasks` asked for.
    """
    rank, tasks = env_number(env, "SLURM_PROCID", 0), env_number(env, "SLURM_STEP_NUM_TASKS", 1)
    asked = env_number(env, "SLURM_NTASKS", tasks)
    if max(asked, rank + 1) > tasks:
        told = f"SLURM_NTASKS={asked}, but this step has {tasks} (SLURM_STEP_NUM_TASKS), and this is number {rank}"
        raise SiteError(f"{told}: {_ADVICE}")
    nodes = env_number(env, "SLURM_STEP_NUM_NODES", env_number(env, "SLURM_NNODES", 1))
    meant = nodes * env_number(env, "SLURM_NTASKS_PER_NODE", 0)
    if 1 < tasks < meant and nodes == env_number(env, "SLURM_JOB_NUM_NODES", nodes):
        raise SiteError(
            f"this step has {tasks} tasks, but {nodes} nodes with SLURM_NTASKS_PER_NODE={meant // nodes} make {meant}: "
            f"start it with `srun --ntasks={meant}`, or if {tasks} are meant with "
            f"`srun --ntasks={tasks} --ntasks-per-node={-(-tasks // nodes)}`"
        )


def _srun_place(env: Mapping[str, str]) -> Place:
    rank, world = env_number(env, "SLURM_PROCID", 0), env_number(env, "SLURM_STEP_NUM_TASKS", 1)
    nodes = env_number(env, "SLURM_STEP_NUM_NODES", env_number(env, "SLURM_NNODES", 1))
    job, step = env_number(env, "SLURM_JOB_ID", 0), env_number(env, "SLURM_STEP_ID", 0)
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
    address = env.get("MASTER_ADDR", "")
    if not address and nodes > 1:
        if not listed:
            raise SiteError(f"{nodes} nodes, but SLURM_STEP_NODELIST is not set: where does rank 0 run?")
        address = first_host(listed) + env.get("HPCGEN_MASTER_SUFFIX", "")
    address = address or "localhost"  # one node: nothing to find
    _refuse_local(address, nodes)
    ports = tuple(_FIRST_PORT + (7919 * job + 31 * step + 997 * k) % _PORTS for k in range(_TRIES))
    if "MASTER_PORT" in env:
        ports = (env_number(env, "MASTER_PORT", 0),)
    token = f"{job}.{step}.{env.get('SLURM_RESTART_COUNT', '0')}"
    return Place("srun", rank, world, env_number(env, "SLURM_LOCALID", 0), nodes, address, ports, token)


def _refuse_local(address: str, nodes: int) -> None:
    if nodes > 1 and address in LOCAL:
        raise SiteError(f"rank 0 is to be met at {address}, but there are {nodes} nodes: want its name on the network")


def first_host(listed: str) -> str:
    """The first name of a Slurm node list: `gpu[003-007,9]-ib,login` -> `gpu003-ib`."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", listed)
    if head is None:
        raise SiteError(f"node list {listed!r}: cannot be read")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", head.group())
