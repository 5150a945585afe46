"""Features that a network reads: angular Fourier features, radial functions, minimum images, the time."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hpcgen.crystal.torus import shortest_step

TIE = 1e-3  # Å; atoms so nearly as near as the last of the nearest are seen too
SOFTNESS = 0.5  # Å; images nearly as near as the nearest share in its vector, so that a tie has no winner
NOTHING = -80.0  # its exponential is nothing beside 1; below -87 float32 underflows, which takes CPUs 20 times as long


def fourier(step: Tensor, frequencies: int) -> Tensor:
    """Angular Fourier features exp(-2πi k·step) along each axis, k = 1 to `frequencies`, real and imaginary parts.

    step (..., 3) in cell units -> (..., 6 frequencies). Periodic: a whole cell more changes nothing.
    """
    k = torch.arange(1, frequencies + 1, device=step.device, dtype=step.dtype)
    angle = (-2 * math.pi) * (step.unsqueeze(-1) * k).flatten(-2)  # (..., 3 frequencies)
    return torch.cat([angle.cos(), angle.sin()], -1)


def radial(distance: Tensor, count: int, cutoff: float) -> Tensor:
    """Gaussians at `count` places from 0 to `cutoff` Å, as wide as they are apart. (...,) Å -> (..., count)."""
    places = torch.linspace(0.0, cutoff, count, device=distance.device, dtype=distance.dtype)
    return torch.exp(-((distance.unsqueeze(-1) - places) * ((count - 1) / cutoff)).square().clamp_max(-NOTHING))


def time_features(t: Tensor, count: int) -> Tensor:
    """Cosines and sines of the time in [0, 1] at geometric frequencies. (B,) -> (B, count), count even."""
    rates = torch.exp(torch.linspace(0.0, math.log(200.0), count // 2, device=t.device, dtype=t.dtype))
    angle = t.unsqueeze(-1) * rates
    return torch.cat([angle.cos(), angle.sin()], -1)


class Images(NamedTuple):
    """All pairs of atoms of B crystals, each with the nearest image of the other."""

    step: Tensor  # (B, N, N, 3) in [-1/2, 1/2], cell units
    vector: Tensor  # (B, N, N, 3) Å
    distance: Tensor  # (B, N, N) Å


@dataclass(frozen=True)
class Reach:
    """Which atoms see each other, by the rule of a periodic graph: all within a radius, or the nearest ones."""

    cutoff: float = math.inf  # Å
    nearest: int = 2**31  # atoms, each counted once

    def holds(self, distance: Tensor, mask: Tensor) -> Tensor:
        """distance (B, N, N) Å, mask (B, N) -> (B, N, N) bool; every atom sees itself."""
        joined = distance < self.cutoff
        if self.nearest < distance.shape[-1] - 1:
            beyond = distance.masked_fill(~mask.unsqueeze(1), math.inf)
            joined = joined & (distance < TIE + beyond.kthvalue(self.nearest + 1, dim=-1, keepdim=True).values)
        return joined


def nearest_images(frac: Tensor, lattice: Tensor) -> Images:
    """Steps, minimum-image vectors and distances of all pairs, i to j. frac (B, N, 3), lattice (B, 3, 3) Å.

    The images looked at are the 27 round the step: exact in Niggli cells (see crystal.wigner_seitz), near it in the
    cells met on the way to one. The distance is that of the nearest image; the vector is the mean over images by
    exp(-d² / SOFTNESS²), which is that of the nearest where there is one and changes smoothly where there are two.
    Never in half precision, also under autocast: a distance is a difference of squares.
    """
    with torch.autocast(frac.device.type, enabled=False):
        return _nearest_images(frac, lattice)


def _nearest_images(frac: Tensor, lattice: Tensor) -> Images:
    step = shortest_step(frac.unsqueeze(2), frac.unsqueeze(1))  # (B, N, N, 3)
    beside = torch.arange(-1, 2, device=frac.device, dtype=frac.dtype)
    offsets = torch.cartesian_prod(beside, beside, beside) @ lattice  # (B, 27, 3)
    vector = step.flatten(1, 2) @ lattice  # (B, N², 3)
    # by how much the square of an image's distance is less: |v|² - |v + o|² = -2 v·o - |o|²
    nearer = torch.baddbmm(offsets.square().sum(-1).unsqueeze(1), vector, offsets.mT, beta=-1, alpha=-2)  # (B, N², 27)
    most = nearer.amax(-1, keepdim=True)
    weight = torch.exp(((nearer - most) / SOFTNESS**2).clamp_min(NOTHING))
    mean = vector + weight @ offsets / weight.sum(-1, keepdim=True)
    square = vector.square().sum(-1, keepdim=True) - most
    return Images(step, mean.view_as(step), square.clamp_min(1e-12).sqrt().view(step.shape[:-1]))
