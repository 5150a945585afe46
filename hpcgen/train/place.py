"""Which processes train together, from their environment: alone, under torchrun, under srun; and on which device."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hpcgen.errors import SiteError
from hpcgen.models.load import usable_gpus
from hpcgen.runner.team import env_number

_LOCAL = ("localhost", "127.0.0.1", "::1")
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE")
_FIRST_PORT, _PORTS, _TRIES = 20000, 12768, 8  # below the system's own, which are given out from 32768 on


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
    if "SLURM_PROCID" in env and env_number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _srun_place(env)
    for name in _MPI_SIZES:
        if env_number(env, name, 1) > 1:
            raise SiteError(f"started by an MPI launcher ({name}={env[name]}): training wants torchrun or srun")
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env:
        nodes, tasks = env_number(env, "SLURM_JOB_NUM_NODES", 1), env_number(env, "SLURM_NTASKS", 1)
        if nodes > 1 or tasks > 1:
            raise SiteError(
                f"the job has {nodes} nodes and {tasks} tasks, but this is one process outside of srun: start it with "
                "`srun hpcgen train …`, or on one alone with `srun -N1 -n1 hpcgen train …`"
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
    if nodes > 1 and address in _LOCAL:
        raise SiteError(f"rank 0 is to be met at {address}, but there are {nodes} nodes: want its name on the network")


def first_host(listed: str) -> str:
    """The first name of a Slurm node list: `gpu[003-007,9]-ib,login` -> `gpu003-ib`."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", listed)
    if head is None:
        raise SiteError(f"node list {listed!r}: cannot be read")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", head.group())


def find_device(wanted: str, place: Place) -> torch.device:
    """The GPU of this process, or the CPU. Raises SiteError where there are more processes on a node than GPUs."""
    count = usable_gpus(wanted)
    if not count:
        return torch.device("cpu")
    at = 0 if count == 1 else place.local_rank
    if at >= count:
        raise SiteError(
            f"rank {place.rank} is number {at} on its node, which shows {count} GPUs: want one task for each GPU "
            f"(--ntasks-per-node={count})"
        )
    return torch.device("cuda", at)
