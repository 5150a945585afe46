"""A model from its checkpoint, ready to be used, and the device to use it on."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpcgen.errors import InputError, SiteError, UsageError
from hpcgen.models.registry import model_named
from hpcgen.models.saved import MODEL, read_saved

# Slurm's comes last: ranks that mpiexec starts in a batch script inherit that of the script, which is 0
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "PALS_LOCAL_RANKID",
                "LOCAL_RANK", "SLURM_LOCALID")  # fmt: skip


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint, for sampling alone, and what the checkpoint says beside its weights.

    Raises InputError where the file is missing, damaged, or no model of this version; StorageError.
    """
    content = read_saved(path, MODEL, device)
    weights = content.pop("weights", None)
    try:
        made: Any = model_named(content["model"])
        model = made(made.Config(**content["config"]))
        model.load_state_dict(weights)
    except UsageError as fault:
        raise InputError(f"{path}: {fault}") from fault
    except (KeyError, TypeError, AttributeError, RuntimeError) as fault:
        told = str(fault).strip().splitlines()
        raise InputError(f"{path}: not a model of this version of hpcgen ({' '.join(told[:2])})") from fault
    return model.to(device).eval().requires_grad_(False), content


def usable_gpus(wanted: str) -> int:
    """How many GPUs this process may take its own from; 0 for the CPU. wanted: auto, cpu or cuda. Raises SiteError."""
    count = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and not count:
        raise SiteError("device = cuda, but no GPU is visible: check the job's --gres and CUDA_VISIBLE_DEVICES")
    return count


def sampling_device(wanted: str, env: Mapping[str, str] | None = None) -> torch.device:
    """The GPU of this process, by its number on its node, or the CPU. wanted: auto, cpu or cuda. Raises SiteError."""
    count = usable_gpus(wanted)
    if not count:
        return torch.device("cpu")
    env = os.environ if env is None else env
    told = [env[name] for name in _LOCAL_RANKS if env.get(name, "").isdecimal()]
    return torch.device("cuda", int(told[0]) % count if told else 0)  # several ranks may share a GPU


def is_out_of_memory(fault: BaseException) -> bool:
    """Whether torch, or a library of the device, had no memory left."""
    told = ("DefaultCPUAllocator", "ALLOC_FAILED", "CUDA error: out of memory", "cudaErrorMemoryAllocation")
    return isinstance(fault, torch.OutOfMemoryError | MemoryError) or (
        isinstance(fault, RuntimeError) and any(text in str(fault) for text in told)
    )
