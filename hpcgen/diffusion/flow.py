"""Flow matching on the torus: sites on straight ways between where they belong and anywhere at all.

With steps d uniform in [-1/2, 1/2)³ the site is at x + t d (mod 1) at time t: at 0 where it belongs, at 1 uniform in
the cell; d is the shortest way there (Chen and Lipman 2023; Miller et al. 2024, FlowMM). The network says -d, the way
back, over `SPREAD`, without what moves the crystal as a whole, which nobody can know.
"""

import math

from torch import Tensor

SPREAD = 1 / math.sqrt(12)  # root mean square of each component of d


def centred(steps: Tensor, mask: Tensor) -> Tensor:
    """Steps (B, N, 3) less their mean over the atoms; zero at padding (mask (B, N) False)."""
    kept = mask.unsqueeze(-1)
    mean = (steps * kept).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    return (steps - mean) * kept


def added(now: float, start: float) -> float:
    """Deviation of the normal noise that makes sites of time `now` as uncertain as those of the later `start`."""
    return SPREAD * math.sqrt(start**2 - now**2)
