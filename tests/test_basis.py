"""Features that a network reads, against their definitions in float64."""

from itertools import product

import torch
from torch import Tensor

from hpcgen.nn.basis import SOFTNESS, nearest_images, radial
from hpcgen.nn.transformer import _softmax


def frac_and_lattice() -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    frac = torch.rand(3, 7, 3, dtype=torch.float64, generator=chance)
    skewed = torch.randn(3, 3, 3, dtype=torch.float64, generator=chance)
    return frac, torch.tensor([3.0, 6.0, 30.0])[:, None, None] * (torch.eye(3).double() + 0.2 * skewed)


def test_nearest_images_are_what_they_are_defined_as() -> None:
    frac, lattice = frac_and_lattice()
    step = frac[:, None] - frac[:, :, None]
    offsets = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=3))).double()
    every = torch.einsum("bijmc,bcd->bijmd", (step - step.round()).unsqueeze(-2) + offsets, lattice)
    square = every.square().sum(-1)
    weight = (-square / SOFTNESS**2).softmax(-1).unsqueeze(-1)
    seen = nearest_images(frac, lattice)
    assert torch.allclose(seen.distance, square.amin(-1).clamp_min(1e-12).sqrt(), atol=1e-9)
    assert torch.allclose(seen.vector, (weight * every).sum(-2), atol=1e-9)
    single = nearest_images(frac.float(), lattice.float())
    assert torch.allclose(single.vector.double(), seen.vector, atol=1e-3)


def test_exponentials_of_far_atoms_stay_above_what_processors_are_slow_with() -> None:
    distance = torch.linspace(0, 500, 5001)
    values = radial(distance, 16, 8.0)
    plain = torch.exp(-((distance.double()[:, None] - torch.linspace(0, 8, 16)) * (15 / 8.0)).square())
    assert values.min() > torch.finfo(torch.float32).tiny and (values - plain).abs().max() < 1e-5


def test_weights_are_those_of_softmax_and_none_where_nothing_is_seen() -> None:
    score = 30 * torch.randn(4, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    score[1, :, 3:] = -torch.inf
    assert torch.allclose(_softmax(score), score.softmax(-1), atol=1e-15)
    assert (_softmax(score)[1, :, 3:] == 0).all()
    assert _softmax(score.float() * 1e4).isfinite().all()
