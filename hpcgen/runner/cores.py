"""How many cores this process may use."""

import os
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """Cores this process may use: its affinity, its cgroup's quota, what Slurm gave the task."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for limit in (_cgroup_cores(), slurm_cores()):
        if limit is not None:
            cores = min(cores, limit)
    return max(cores, 1)


def slurm_cores() -> int | None:
    text = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(text) if text.isdigit() and int(text) > 0 else None


def _cgroup_cores() -> int | None:
    """The tightest cpu quota from here up to the root of the cgroup tree, rounded up; None without one."""
    root, limits = Path("/sys/fs/cgroup"), []
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base = root if not controllers else root / "cpu"
            if controllers and "cpu" not in controllers.split(","):
                continue
            here = base / path.lstrip("/")
            for folder in (here, *here.parents):
                limits += _quota(folder)
                if folder == root:
                    break
    return min(limits) if limits else None


def _quota(folder: Path) -> list[int]:
    with suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text().split()
        return [] if quota == "max" else [-(-int(quota) // int(period))]
    with suppress(OSError, ValueError):
        quota = (folder / "cpu.cfs_quota_us").read_text()
        period = (folder / "cpu.cfs_period_us").read_text()
        return [-(-int(quota) // int(period))] if int(quota) > 0 else []
    return []
