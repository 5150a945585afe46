"""What `hpcgen evaluate` is asked for."""

from dataclasses import dataclass
from pathlib import Path

from hpcgen.errors import UsageError
from hpcgen.metrics.coverage import CUT_OFFS

TASKS = ("generate", "predict", "optimize")
LATER = ("reconstruct",)


@dataclass(frozen=True)
class Request:
    """What is to be evaluated. Raises UsageError for what cannot be."""

    run: Path
    reference: Path | None = None
    split: str | None = None  # of the reference
    task: str = "generate"  # predict, optimize
    pair: str | None = None  # target, composition; None: target where the run has that column
    limit: int | None = None  # the first crystals only
    seed: int = 0  # of the control, the samples and the intervals
    pair_timeout_s: float = 60.0  # of a pair to be matched, and of a fingerprint
    coverage: bool = True  # and what else needs fingerprints, of generate with a reference
    cut_offs: str = "mp20"
    energy: bool = False  # of CHGNet, of every crystal of both
    samples: int = 1000  # valid crystals of which distances of distributions and diversity are taken
    novelty: bool = True  # generate: unique, novel, stable
    property: str | None = None  # optimize, and generate with rank_by: a column of the run, -NAME where more is better
    start: str | None = None  # optimize: the column that groups candidates; None: START where the run has it
    rank_by: str | None = None  # generate: the column that ranks crystals for Recall@K, -NAME: the highest first
    recall_at: int = 100  # K
    recall_of: float = 0.01  # share of the crystals that are the best

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            when = "comes with a later version" if self.task in LATER else "is unknown"
            raise UsageError(f"--task {self.task} {when}; there are now: {', '.join(TASKS)}")
        for task, flag, value, words in (
            ("predict", "reference", self.reference, "STORE, the crystals to be matched"),
            ("optimize", "reference", self.reference, "STORE, whose percentiles of the property are to be reached"),
            ("optimize", "property", self.property, "NAME, the column that was optimised"),
        ):
            if self.task == task and value is None:
                raise UsageError(f"--task {task} needs --{flag} {words}")
        for flag, value, needed, where in (
            ("split", self.split, self.reference is not None, "without --reference"),
            ("pair", self.pair, self.task == "predict", f"with --task {self.task}"),
            ("start", self.start, self.task == "optimize", f"with --task {self.task}"),
            ("rank-by", self.rank_by, self.task == "generate", f"with --task {self.task}"),
            ("rank-by", self.rank_by, self.property is not None, "without --property"),
            ("property", self.property, self.rank_by is not None or self.task == "optimize", "without --rank-by"),
        ):
            if value is not None and not needed:
                raise UsageError(f"--{flag} {value}: means nothing {where}")
        if self.energy and (self.reference is None or not self.coverage):
            raise UsageError("--energy: means nothing without --reference and a coverage")
        if self.cut_offs not in CUT_OFFS:
            raise UsageError(f"--cut-offs {self.cut_offs}: want one of {', '.join(CUT_OFFS)}")
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples}: want at least 1")
        if self.recall_at < 1:
            raise UsageError(f"--recall-at {self.recall_at}: want at least 1")
        if not 0 < self.recall_of <= 1:
            raise UsageError(f"--recall-of {self.recall_of:g}: want a share above 0, at most 1")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit {self.limit}: want at least 1")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed}: want a whole number from 0 to 2**64 - 1")
        if not 0 < self.pair_timeout_s < float("inf"):
            raise UsageError(f"--pair-timeout {self.pair_timeout_s}: want seconds above 0")
