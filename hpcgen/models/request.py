"""What a model is asked for when it samples."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Request:
    """B crystals to be sampled."""

    index: Tensor  # (B,) int64, of the crystal in its campaign: it decides all chance
    num_atoms: Tensor  # (B,) int64
    species: Tensor  # (B, N) int64, 0 where it is to be found, and at padding
    conditions: Mapping[str, float] = field(default_factory=dict)
    elements: tuple[int, ...] = ()  # of the chemical system, if it is asked for: no others are taken
    steps: int = 50
    churn: float = 0.0  # noise added before each step but the first and the last, in steps: 0 is deterministic
    speed: float = 0.0  # coordinates move 1 + speed (1 - t) times as far
    guidance: float = 1.0  # 1: as trained; more: further away from what is made without the conditions
