"""Settings of a campaign. Imports no torch, so that they can be checked on a login node."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpcgen.errors import InputError, UsageError

CONFIG, SUMMARY = "config.yaml", "summary.json"  # of a run folder
PRECISIONS = ("float32", "bf16", "fp16")
PRELOAD = ("hpcgen.campaign.blocks",)  # what workers import once, before they are forked
DEVICES = ("auto", "cpu", "cuda")
PACKAGED = Path(__file__).resolve().parent.parent / "models" / "checkpoints" / "autoperi.pt"
MOST_ATOMS = 2**14  # of a crystal: no more have a noise of their own
TILE = {"cpu": 256, "cuda": 4096}  # some 50 and 800 crystals of similar size side by side
PAIRS = {"cpu": 2**14, "cuda": 2**21}  # 40 and 5,000 crystals of 20 atoms
BLOCK = 8192  # most crystals of a block, unless it is asked for: some 30 MB at work, 1 MB on disk
MANY = 400  # blocks of a run, unless there are more processes or more crystals than fit into so many
_FREE = {
    "n", "out", "processes", "checkpoint", "formulas", "split", "limit", "per_formula", "tune", "torch",
}  # fmt: skip
_MEASURED = {"block", "tile", "pairs"}  # where they are left out those of the folder go on
_NO_CRYSTAL = {"block"}  # may not change within a run folder, but no crystal depends on it


@dataclass
class CampaignConfig:
    """One campaign. What is 0, '' or 'auto' here is filled in before it begins, and stands so in config.yaml."""

    n: int | None = None  # crystals asked for; left out with a file of formulas
    checkpoint: str = str(PACKAGED)
    checkpoint_sha256: str = ""
    out: str = "campaign"  # run folder; the same command on an existing one does what is missing
    seed: int = 0

    formula: str = ""  # the whole content of the cell, of every crystal
    formulas: str = ""  # file or store with one for each crystal
    split: str = ""  # of that store; all of it
    limit: int = 0  # of the formulas, the first so many; 0: all
    per_formula: int = 1
    targets_sha256: str = ""

    conditions: dict[str, float] = field(default_factory=dict)
    elements: str = ""  # chemical system, as Li-P-S
    num_atoms: str = ""  # 12, or 4-20; the sizes of the training crystals
    steps: int = 16  # this and the next two: chosen with the packaged model, see models/checkpoints/autoperi.md
    churn: float = 1.0
    speed: float = 10.0
    guidance: float = 1.0

    precision: str = "float32"
    device: str = "auto"
    tile: int = 0  # consecutive crystals that are always sampled together
    pairs: int = 0  # of atoms looked at together: a tile is divided accordingly
    tune: bool = False  # tile and pairs that are 0 are measured when the run begins, else those of the device are taken
    block: int = 0  # crystals of a file, whole tiles
    processes: int | None = None  # workers of each rank; 0: in the rank's own process; all cores, one under MPI
    torch: str = ""  # version

    @property
    def task(self) -> str:
        """generate, or predict where compositions are given."""
        return "predict" if self.formula or self.formulas else "generate"

    @property
    def asked(self) -> int:
        """n, once it is known."""
        assert self.n is not None
        return self.n

    def checked(self) -> "CampaignConfig":
        """These settings, if they can be. Raises UsageError naming the one that cannot."""
        if self.n is None and not self.formulas:
            raise UsageError("--n is not set: how many crystals?")
        for name in ("n", "per_formula", "steps"):
            _want(name, getattr(self, name), least=1)
        for name in ("limit", "tile", "pairs", "block", "processes"):
            _want(name, getattr(self, name), least=0)
        for name in ("churn", "speed", "guidance"):
            _want(name, getattr(self, name), least=0)
        _want("seed", self.seed, least=0, below=2**64)
        _want("steps", self.steps, least=1, below=2**32)
        _want("n", self.n, least=1, below=2**63)
        for name, choices in (("precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} = {getattr(self, name)!r}: want one of {', '.join(choices)}")
        for name, value in self.conditions.items():
            if not math.isfinite(value):
                raise UsageError(f"condition {name} = {value}: want a number")
        if not self.out or not self.checkpoint:
            raise UsageError(f"{'checkpoint' if self.out else 'out'} is empty: want a path")
        self._check_task()
        if self.tile and self.block % self.tile:
            raise UsageError(f"block = {self.block}: want whole tiles, a multiple of {self.tile}")
        return self

    def _check_task(self) -> None:
        if self.formula and self.formulas:
            raise UsageError("--formula and --formulas: want one of them")
        if (self.split or self.limit or self.per_formula != 1) and not self.formulas:
            raise UsageError("--split, --limit and --per-formula belong to --formulas")
        for name in ("elements", "num_atoms"):
            if self.task == "predict" and getattr(self, name):
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {getattr(self, name)}: the formulas say it already; want one or the other")
        self.sizes()
        self.system()

    def sizes(self) -> tuple[int, int] | None:
        """Least and most atoms asked for, None if the model chooses. Raises UsageError."""
        if not self.num_atoms:
            return None
        least, dash, most = self.num_atoms.partition("-")
        if not (least.isdecimal() and (most.isdecimal() or not dash)) or len(self.num_atoms) > 20:
            raise UsageError(f"--num-atoms {self.num_atoms}: want a number or a range, as 12 or 4-20")
        bounds = int(least), int(most or least)
        if not 1 <= bounds[0] <= bounds[1] <= MOST_ATOMS:
            raise UsageError(f"--num-atoms {self.num_atoms}: want 1 to {MOST_ATOMS:,}, the lower number first")
        return bounds

    def system(self) -> tuple[int, ...]:
        """Atomic numbers of the chemical system asked for. Raises UsageError."""
        if not self.elements:
            return ()
        from hpcgen.crystal.composition import ATOMIC_NUMBERS  # it imports numpy

        symbols = self.elements.split("-")
        for symbol in symbols:
            if symbol not in ATOMIC_NUMBERS:
                raise UsageError(f"--elements {self.elements}: {symbol!r} is no element; want for example Li-P-S")
        return tuple(sorted({ATOMIC_NUMBERS[symbol] for symbol in symbols}))

    def making(self) -> dict[str, Any]:
        """All that a crystal depends on beside its index. Of a resolved config."""
        told = {name: value for name, value in asdict(self).items() if name not in _FREE | _NO_CRYSTAL}
        return {"task": self.task, **told}


def read_config(run: Path) -> CampaignConfig:
    """The settings of the campaign in a run folder. Raises InputError."""
    from hpcgen.config import load_config  # OmegaConf: not for the parser of the command line

    try:
        return load_config(CampaignConfig, run / CONFIG).checked()
    except UsageError as fault:
        raise InputError(f"{run}: holds no campaign of this version of hpcgen ({fault})") from fault


def read_conditions(words: Sequence[str]) -> dict[str, float]:
    """band_gap=1.5 ... -> names and values. Raises UsageError."""
    told: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            raise UsageError(f"--condition {word}: want NAME=NUMBER, as band_gap=1.5")
        if name in told:
            raise UsageError(f"--condition {word}: {name} is given twice")
        told[name] = number
    return told


def refuse_changes(old: CampaignConfig, new: CampaignConfig) -> None:
    """Raise UsageError if `new` (resolved, but for what is measured) would make other crystals or files than `old`."""
    paths = {"checkpoint_sha256": "checkpoint", "targets_sha256": "formulas"}
    before, now = asdict(old), asdict(new)
    for name in before:
        if name in _FREE or before[name] == now[name] or (name in _MEASURED and not now[name]):
            continue
        key = paths.get(name, name)
        told = [f"{which[key]} (sha256 {which[name][:12]})" if name in paths else f"{which[name]!r}"
                for which in (before, now)]  # fmt: skip
        raise UsageError(f"{new.out}: was begun with {key} = {told[0]}, now it is {told[1]}; choose another --out")
    if new.asked < old.asked:
        raise UsageError(f"{new.out}: was begun with n = {old.n}, now it is {new.n}: it may only grow")


def _want(name: str, value: float | None, *, least: float, below: float = math.inf) -> None:
    if value is not None and not least <= value < below:
        wish = f"{least:g} or more" if below == math.inf else f"{least:g} or more, below 2^{int(math.log2(below))}"
        raise UsageError(f"{name} = {value}: want {wish}")
