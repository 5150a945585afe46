"""Flow matching on the torus."""

import math

import pytest
import torch

from hpcgen.crystal.torus import shortest_step, wrap
from hpcgen.diffusion.flow import SPREAD, added, centred


def test_centred_moves_nothing_as_a_whole_and_leaves_padding_alone() -> None:
    steps = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    out = centred(steps, mask)
    assert out.sum(1).abs().max() < 1e-15 and (out[~mask] == 0).all()
    assert torch.allclose(out[0, 0] - out[0, 1], steps[0, 0] - steps[0, 1])
    assert torch.allclose(centred(out, mask), out, atol=1e-15)


@pytest.mark.parametrize(("now", "start"), [(0.1, 0.15), (0.5, 0.9), (0.0, 0.3)])
def test_added_noise_makes_sites_as_uncertain_as_those_of_the_later_time(now: float, start: float) -> None:
    draw = torch.Generator().manual_seed(1)
    way = torch.rand(200_000, generator=draw, dtype=torch.float64) - 0.5
    noise = torch.randn(len(way), generator=draw, dtype=torch.float64)
    assert (now * way + added(now, start) * noise).std() == pytest.approx(start * SPREAD, rel=0.01)


def test_sites_are_anywhere_at_time_one_and_the_way_is_the_shortest() -> None:
    draw = torch.Generator().manual_seed(2)
    clean = torch.tensor([0.93], dtype=torch.float64)
    way = torch.rand(200_000, generator=draw, dtype=torch.float64) - 0.5
    places = wrap(clean + way)
    counts = torch.histc(places, 20, 0.0, 1.0) / len(way)
    assert (counts - 1 / 20).abs().max() < 5 * math.sqrt(1 / 20 / len(way))
    assert torch.allclose(shortest_step(clean, places), way)
