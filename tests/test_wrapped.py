"""Noise on the torus: the pull is σ² times the score of a wrapped normal, and its scale is what sampling gives."""

import math

import pytest
import torch

from hpcgen.diffusion.draw import Draw, Purpose
from hpcgen.diffusion.schedules import Schedule
from hpcgen.diffusion.wrapped import centred, pull, pull_scale, way_back

SIGMAS = [0.003, 0.05, 0.2, 0.4, 0.6]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_pull_is_the_score_by_finite_differences(sigma: float) -> None:
    step = torch.linspace(-0.499, 0.499, 301, dtype=torch.float64)

    def log_chance(to_clean: torch.Tensor) -> torch.Tensor:
        windings = torch.arange(-8, 9, dtype=torch.float64)
        return torch.logsumexp(-(to_clean[:, None] + windings).square() / (2 * sigma**2), -1)

    h = 1e-6 * sigma
    score = -(log_chance(step + h) - log_chance(step - h)) / (2 * h)  # the place moves against the step
    found = pull(step[:, None], torch.tensor([[sigma]], dtype=torch.float64))[:, 0]
    assert torch.allclose(found, sigma**2 * score, atol=1e-7 * max(sigma, 0.01), rtol=1e-5)


def test_windings_do_not_matter() -> None:
    step = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64)[:, None]
    sigma = torch.full((9, 1), 0.3, dtype=torch.float64)
    assert torch.allclose(pull(step, sigma), pull(step + 3, sigma), atol=1e-12)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_scale_is_the_root_mean_square_of_samples(sigma: float) -> None:
    noise = Draw(3).normal(Purpose.SITE, torch.arange(200_000), dtype=torch.float64)
    square = pull(sigma * noise, torch.tensor([[sigma]], dtype=torch.float64)).square()
    error = (square.std() / math.sqrt(len(noise)) / square.mean()).item()
    assert (square.mean().sqrt() / pull_scale(torch.tensor(sigma).double())).item() == pytest.approx(1, abs=3 * error)


def test_the_way_back_knows_no_translation_and_no_padding() -> None:
    draw, index = Draw(1), torch.arange(4)
    clean = draw.uniform(Purpose.SITE, index, 0, 5, 3, torch.float64)
    noised = clean + 0.1 * draw.normal(Purpose.CHURN, index, 0, 5, 3, torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    sigma = torch.full((4,), 0.1, dtype=torch.float64)
    way = way_back(clean, noised, sigma, mask)
    assert way.sum(1).abs().max() < 1e-12 and not way[~mask].any() and not way[2].any()
    cut = way_back(clean[1:2, :3], noised[1:2, :3], sigma[1:2], mask[1:2, :3])
    assert torch.allclose(cut, way[1:2, :3], atol=1e-14)
    assert torch.equal(centred(way, mask), centred(way + 0.0, mask))


def test_a_schedule_ends_where_it_should() -> None:
    for rho in (1.0, 3.0, 7.0):
        schedule = Schedule(0.01, 2.0, rho)
        assert schedule.sigma(0.0) == pytest.approx(0.01) and schedule.sigma(1.0) == pytest.approx(2.0)
        assert schedule.at(torch.tensor([0.3])).item() == pytest.approx(schedule.sigma(0.3), rel=1e-6)
        both = schedule.sigma(0.4) ** 2 + schedule.added(0.4, 0.6) ** 2
        assert both == pytest.approx(schedule.sigma(0.6) ** 2)
        assert schedule.left(0.5, 0.0) == 0.0 and 0 < schedule.left(0.5, 0.4) < 1
    assert Schedule(1.0, 3.0, 1.0).sigma(0.5) == pytest.approx(2.0)
