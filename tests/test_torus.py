"""Coordinates of the unit torus."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpcgen.crystal.torus import shortest_step, wrap

coordinates = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6)


@given(coordinates, st.sampled_from([torch.float32, torch.float64]))
def test_wrapped_is_in_the_cell(values, dtype):
    inside = wrap(torch.tensor(values, dtype=dtype))
    assert ((inside >= 0) & (inside < 1)).all()


def test_a_hair_below_zero_is_zero():
    hair = torch.tensor([-1e-9, -1e-30, -0.0], dtype=torch.float32)
    assert (hair % 1.0).max() == 1.0  # what the plain remainder gives
    assert torch.equal(wrap(hair), torch.zeros(3))


@given(coordinates)
def test_wrapping_twice_is_wrapping_once(values):
    once = wrap(torch.tensor(values, dtype=torch.float64))
    assert torch.equal(wrap(once), once)


def test_wrapping_keeps_the_gradient():
    frac = torch.tensor([-0.3, 1.7, 0.2], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(wrap(frac).sum(), frac)
    assert torch.equal(grad, torch.ones(3, dtype=torch.float64))


def test_nan_is_not_hidden():
    assert wrap(torch.tensor(float("nan"))).isnan()


def step_without_wrapping(start, end):
    return end - start


@pytest.mark.parametrize(("function", "holds"), [(shortest_step, True), (step_without_wrapping, False)])
def test_step_does_not_see_whole_cells(function, holds):
    start, end = torch.rand(2, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cells = torch.randint(-4, 5, (50, 3), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(function(start, end + cells), function(start, end), atol=1e-12) == holds


def test_step_leads_from_start_to_end_and_is_short():
    start, end = torch.rand(2, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = shortest_step(start, end)
    assert step.abs().max() <= 0.5
    assert torch.allclose(shortest_step(wrap(start + step), end), torch.zeros(50, 3).double(), atol=1e-12)
