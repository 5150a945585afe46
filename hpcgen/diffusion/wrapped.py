"""Noise on the torus: wrapped normal steps, and the pull back towards where they came from.

Coordinates live on circles of circumference 1, so that noise of standard deviation 1/2 and more is uniform to 1 %.
"""

import torch
from torch import Tensor

from hpcgen.crystal.torus import shortest_step

WINDINGS = 4  # images on each side; at a standard deviation of 0.6 the next one weighs 6e-13
_GRID = 2001


def pull(step: Tensor, sigma: Tensor) -> Tensor:
    """Mean way back over all windings of a wrapped normal: σ² times its score at the noised place.

        pull = Σ_k (δ + k) w_k / Σ_k w_k,  w_k = exp(-(δ + k)² / 2σ²)

    step δ: from the noised to the clean coordinate, any winding. (..., 3), sigma (..., 1) in cell units -> (..., 3).
    """
    step = step - step.round()
    windings = torch.arange(-WINDINGS, WINDINGS + 1, device=step.device, dtype=step.dtype)
    ways = step.unsqueeze(-1) + windings  # (..., 3, 2 WINDINGS + 1)
    square = ways.square() - step.square().unsqueeze(-1)  # of the shortest: nothing overflows
    weight = torch.exp(square / (-2 * sigma.unsqueeze(-1).square()))
    return (ways * weight).sum(-1) / weight.sum(-1)


def pull_scale(sigma: Tensor) -> Tensor:
    """Root mean square of `pull` over wrapped normal steps: σ while that is small, falling to 0 as the circle fills.

    By the midpoint rule on the circle, which is exact for smooth periodic functions. (...,) -> (...,), float64 inside.
    """
    exact = sigma.double().reshape(-1, 1)
    least = exact.clamp_min(4.0 / _GRID)  # below it the grid is too coarse, and the circle too wide to be felt
    place = (torch.arange(_GRID, device=sigma.device, dtype=torch.float64) + 0.5) / _GRID - 0.5
    windings = torch.arange(-WINDINGS, WINDINGS + 1, device=sigma.device, dtype=torch.float64)
    chance = torch.exp(-(place[:, None] + windings).square() / (2 * least.unsqueeze(-1).square())).sum(-1)  # (n, grid)
    square = pull(place.expand(len(least), -1), least).square()
    scale = ((chance * square).sum(-1) / chance.sum(-1)).sqrt()
    return (scale * exact[:, 0] / least[:, 0]).reshape(sigma.shape).to(sigma.dtype)


def way_back(clean: Tensor, noised: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
    """`pull` of every site, without what moves the crystal as a whole, which nobody can know. Zero at padding.

    clean, noised (B, N, 3), sigma (B,), mask (B, N) -> (B, N, 3).
    """
    each = pull(shortest_step(noised, clean), sigma[:, None, None]) * mask.unsqueeze(-1)
    return centred(each, mask)


def centred(steps: Tensor, mask: Tensor) -> Tensor:
    """Steps (B, N, 3) less their mean over the atoms; zero at padding (mask False)."""
    kept = mask.unsqueeze(-1)
    mean = (steps * kept).sum(1, keepdim=True) / mask.sum(1)[:, None, None]
    return (steps - mean) * kept
