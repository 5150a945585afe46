"""How much noise there is at which time."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """σ(t) = (least^(1/ρ) + t (most^(1/ρ) - least^(1/ρ)))^ρ for t in [0, 1] (Karras et al. 2022, eq. 5)."""

    least: float
    most: float
    rho: float  # 1 is linear in t, large is geometric

    def at(self, t: Tensor) -> Tensor:
        """σ at times t, of any shape."""
        low, high = self.least ** (1 / self.rho), self.most ** (1 / self.rho)
        return (low + (high - low) * t) ** self.rho

    def sigma(self, t: float) -> float:
        """σ at one time."""
        low, high = self.least ** (1 / self.rho), self.most ** (1 / self.rho)
        return (low + (high - low) * t) ** self.rho

    def left(self, start: float, then: float) -> float:
        """Share of the deviation at `start` that is left at the earlier time `then`; none at 0, the end of sampling."""
        return self.sigma(then) / self.sigma(start) if then else 0.0

    def added(self, now: float, start: float) -> float:
        """Deviation of the noise that leads from `now` back to the noisier `start`."""
        return math.sqrt(self.sigma(start) ** 2 - self.sigma(now) ** 2)
