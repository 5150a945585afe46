"""Settings of a training run. Imports no torch, so that a config can be checked on a login node."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hpcgen.config import load_config
from hpcgen.errors import UsageError
from hpcgen.models.autoperi_config import AutoPeriConfig
from hpcgen.store.batches import Limits

PRECISIONS = ("float32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class BatchConfig:
    """Bounds of a global batch, over all ranks; at least one is set, all that are set hold."""

    crystals: int | None = 256
    atoms: int | None = None
    padded_atoms: int | None = None  # crystals times the atoms of the largest
    mix: int = 64  # similar sizes are gathered among about this many batches drawn at random
    run: int = 1  # neighbours in the store drawn together

    def limits(self) -> Limits:
        """As hpcgen.store.batches takes them."""
        return Limits(**dataclasses.asdict(self))


@dataclass
class TrainConfig:
    """One training run. What a model alone needs stands under a key named after it."""

    store: str = ""  # folder of the crystals
    out: str = ""  # run folder; the same command on an existing one goes on from its newest checkpoint
    model: str = "autoperi"
    seed: int = 0  # decides first weights, order and noise
    init: str = ""  # a trained model (best.pt) to begin with: its weights and scales
    rectify: bool = False  # for few sampling steps: the store is a campaign of `init` without churn, and each crystal
    # is learned with the noise it was made of; conditions and tables are those of `init`
    conditions: list[str] = field(default_factory=list)  # columns of the store
    split: str = "train"  # of the store
    validation_split: str = "val"

    batch: BatchConfig = field(default_factory=BatchConfig)
    accumulate: int = 1  # global batches that make one step
    steps: int = 100_000
    lr: float = 1e-4
    weight_decay: float = 0.0  # on matrices, not on biases and scales
    betas: tuple[float, float] = (0.9, 0.999)
    muon: float = 0.0  # steps of the matrices of hidden layers by Muon, in units of lr; 0: by AdamW like all else
    warmup: int = 1000  # steps in which the learning rate rises to lr
    lr_floor: float = 0.01  # share of lr at the last step, after a cosine
    clip: float = 1.0  # largest norm of the gradient; 0: any
    ema: float = 0.999  # share of the averaged weights that is kept in a step
    precision: str = "float32"
    compile: bool = False
    bad_steps: int = 20  # steps in a row with a non-finite loss or gradient that end the run

    validate_every: int = 1000  # steps; 0: never
    validate_batches: int = 0  # global batches of the validation split; 0: all
    log_every: int = 50  # steps averaged in a line of metrics.jsonl
    tensorboard: bool = True  # its files too, where the package is installed
    save_every_s: float = 300.0
    save_every_steps: int = 0  # 0: by time alone
    keep: int = 3  # newest checkpoints
    time_limit_s: float = 0.0  # stops by itself, resumable, after so long; 0: never
    accept: list[str] = field(default_factory=list)  # settings that may differ from those of the checkpoint

    device: str = "auto"
    threads: int = 0  # of torch in each rank; 0: torch's own choice
    workers: int = 0  # processes that read the store for each rank
    bucket_cap_mb: float = 25.0  # gradients sent at once
    timeout_s: float = 600.0  # for the ranks to meet, and for each thing they do together

    autoperi: AutoPeriConfig = field(default_factory=AutoPeriConfig)

    @property
    def settings(self) -> Any:
        """The chosen model's own."""
        return getattr(self, self.model)

    def checked(self) -> "TrainConfig":
        """These settings, if they can be. Raises UsageError naming the one that cannot."""
        for name in ("store", "out"):
            if not getattr(self, name):
                raise UsageError(f"{name} is not set: want {name}=FOLDER in the config or behind it")
        models = [f.name for f in dataclasses.fields(self) if dataclasses.is_dataclass(getattr(self, f.name))]
        models.remove("batch")
        if self.model not in models:
            raise UsageError(f"model = {self.model!r}: want one of {', '.join(models)}")
        if self.rectify and not self.init:
            raise UsageError("rectify = true: want init=MODEL.pt, the model that made the crystals of the store")
        self._check_numbers()
        for name, choices in (("precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} = {getattr(self, name)!r}: want one of {', '.join(choices)}")
        self._check_model()
        return self

    def _check_numbers(self) -> None:
        for name in ("accumulate", "steps", "bad_steps", "log_every", "keep"):
            _want(name, getattr(self, name), at_least=1)
        for name in ("warmup", "validate_every", "validate_batches", "save_every_steps", "threads", "workers"):
            _want(name, getattr(self, name), at_least=0)
        for name in ("weight_decay", "muon", "clip", "save_every_s", "time_limit_s"):
            _want(name, getattr(self, name), at_least=0)
        for name in ("lr", "bucket_cap_mb", "timeout_s"):
            _want(name, getattr(self, name), over=0)
        for name, value in (("ema", self.ema), ("betas[0]", self.betas[0]), ("betas[1]", self.betas[1])):
            _want(name, value, at_least=0, below=1)
        _want("seed", self.seed, at_least=0, below=2**63)
        _want("steps", self.steps, below=2**32)
        _want("lr_floor", self.lr_floor, at_least=0, below=1.0000001)
        sizes = {name: value for name, value in dataclasses.asdict(self.batch).items() if value is not None}
        if not sizes.keys() & {"crystals", "atoms", "padded_atoms"}:
            raise UsageError("no limit of a batch is set: want batch.crystals, batch.atoms or batch.padded_atoms")
        for name, value in sizes.items():
            _want(f"batch.{name}", value, at_least=1)

    def _check_model(self) -> None:
        if len(set(self.conditions)) < len(self.conditions):
            raise UsageError(f"conditions = {self.conditions}: want each column once")
        own = self.settings
        if hasattr(own, "conditions"):
            if own.conditions not in ([], self.conditions):
                raise UsageError(f"{self.model}.conditions: set conditions, not the model's own")
            own.conditions = list(self.conditions)
        if hasattr(own, "checked"):
            own.checked()


Schema = TypeVar("Schema", bound=TrainConfig)
_FREE = {
    "out", "store", "accept", "validation_split", "validate_every", "validate_batches", "log_every", "tensorboard",
    "save_every_s", "save_every_steps", "keep", "time_limit_s", "bad_steps", "device", "threads", "workers",
    "bucket_cap_mb", "timeout_s", "compile",
}  # fmt: skip


def load(schema: type[Schema], file: Path | None, overrides: Iterable[str] = ()) -> Schema:
    """The checked settings of a file and `key=value` words. Raises UsageError."""
    config = load_config(schema, file, overrides)
    config.checked()
    return config


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted names; tuples as lists, as a file gives them back."""
    told: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            told |= flat(value, f"{prefix}{name}.")
        else:
            told[prefix + name] = list(value) if isinstance(value, tuple) else value
    return told


def changed(before: Mapping[str, Any], now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings, by dotted name, that would make a resumed run another than the one it goes on with: old, new.

    before: dataclasses.asdict of the old ones. What an older version had no setting for had the default.
    """
    old, new = flat(before), flat(dataclasses.asdict(now))
    default = flat(dataclasses.asdict(type(now)()))
    models = {f.name for f in dataclasses.fields(now) if dataclasses.is_dataclass(getattr(now, f.name))} - {"batch"}
    others = models - {now.model}
    told = {}
    for name, value in new.items():
        first = name.split(".")[0]
        was = old.get(name, default[name])
        if first not in _FREE and first not in others and was != value:
            told[name] = (was, value)
    return told


def _want(
    name: str, value: float, *, at_least: float = -math.inf, over: float = -math.inf, below: float = math.inf
) -> None:
    if not (value >= at_least and over < value < below):
        wish = [f"at least {at_least:g}"] * (at_least > -math.inf) + [f"more than {over:g}"] * (over > -math.inf)
        wish += [f"less than {below:g}"] * (below < math.inf)
        raise UsageError(f"{name} = {value}: want {' and '.join(wish) or 'a finite number'}")
