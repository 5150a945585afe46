"""A small model and short campaigns for the tests, in this process or as the command."""

import os
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import torch

from hpcgen.campaign.config import CampaignConfig
from hpcgen.campaign.generate import campaign
from hpcgen.campaign.summary import Summary
from hpcgen.models.autoperi import AutoPeri
from hpcgen.models.autoperi_config import AutoPeriConfig
from hpcgen.models.saved import write_model
from hpcgen.store.read import Store

ROOT = Path(__file__).resolve().parent.parent
SHORT: dict[str, Any] = {"steps": 3, "tile": 16, "block": 32, "device": "cpu", "processes": 0}
MOST = 20  # atoms of a training crystal


def make_checkpoint(path: Path, *, seed: int = 0, poison: int = 0, **settings: Any) -> Path:
    """A random model whose training crystals had 1 to 20 atoms; all of the element `poison` gives NaN."""
    torch.manual_seed(seed)
    small = {"width": 16, "layers": 1, "heads": 2, "pair_width": 4, "conditions": ["band_gap"]}
    config = AutoPeriConfig(**{**small, **settings})
    model = AutoPeri(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.lattice_mean.copy_(torch.tensor([0.9, 0.9, 0.9, 0, 0, 0]))
        model.lattice_std.fill_(0.2)
        model.size_counts[1 : MOST + 1] = torch.arange(MOST, 0, -1).float()
        if config.conditions:
            model.condition_range[0] = torch.tensor([1.0, 1.0, 0.0, 6.0])
        if poison:
            model.network.properties[poison] = torch.nan
    write_model(path, "autoperi", asdict(config), model.state_dict(), {})
    return path


def run(checkpoint: Path, out: Path, **settings: Any) -> Summary:
    """A campaign in this process."""
    made = campaign(CampaignConfig(**{"checkpoint": str(checkpoint), "out": str(out), **SHORT, **settings}))
    assert made is not None
    return made


def content(out: Path) -> dict[str, bytes]:
    """Every crystal of a finished run, all that is known of it, by id."""
    store, found = Store(out, dtype=None), {}
    for at in range(len(store)):
        rows = store[at]
        crystal = rows.crystals
        parts = [crystal.frac_coords, crystal.lattice, crystal.atomic_numbers]
        told = [str(column.values.tolist()).encode() for column in rows.columns.values()]
        found[rows.ids[0]] = b"|".join([part.numpy().tobytes() for part in parts] + told)
    assert len(found) == len(store)
    return found


def rejected(out: Path) -> dict[int, str]:
    """Index and reason of every rejected crystal."""
    found = {}
    for path in sorted(out.glob("all-*.h5")):
        with h5py.File(path) as file:
            found |= dict(zip(file["rejected/index"][...].tolist(),
                              [r.decode() for r in file["rejected/reason"][...].tolist()], strict=True))  # fmt: skip
    return found


def litter(out: Path) -> list[str]:
    """What a finished or stopped run must not leave behind."""
    return [p.name for p in out.rglob("*") if p.suffix in (".draft", ".claim", ".failed", ".part", ".stop")]


class Launch:
    """The command, alone or under mpiexec; its family is marked, so that all of it can be killed."""

    def __init__(self, checkpoint: Path, out: Path, *words: str, ranks: int = 0, **settings: Any) -> None:
        self.mark = f"HPCGEN_TEST_FAMILY={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        told = {"checkpoint": checkpoint, "out": out, **SHORT, **settings}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in told.items() if value is not None]
        mpi = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks)] if ranks else []
        self.process = subprocess.Popen(
            [*mpi, sys.executable, "-m", "hpcgen.cli", "campaign", *flags, *words],
            env={**os.environ, name: value, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def end(self, timeout_s: float = 120) -> tuple[int, str]:
        """Exit status and all that was said."""
        text, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, text

    def kill(self) -> None:
        """SIGKILL to every process of the launch."""
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
        self.process.communicate()
