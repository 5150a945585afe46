"""Maths of fractional coordinates: points of the unit torus, of period 1 in each direction."""

import torch
from torch import Tensor


def wrap(frac: Tensor) -> Tensor:
    """Any coordinates into [0, 1); float32 `-1e-9 % 1.0` is 1.0, which becomes 0. Any shape."""
    inside = frac - frac.floor()
    return torch.where(inside >= 1.0, torch.zeros_like(inside), inside)


def shortest_step(start: Tensor, end: Tensor) -> Tensor:
    """Step from one site to another on the torus. (..., 3), (..., 3) -> (..., 3) in [-0.5, 0.5].

    Shortest in each fractional coordinate by itself; in Å only for a right-angled cell (else: minimum_image).
    """
    step = end - start
    return step - step.round()
