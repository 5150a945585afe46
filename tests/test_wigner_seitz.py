"""Minimum images against brute force, pymatgen and ASE, in cells however skewed."""

from itertools import product

import numpy as np
import pytest
import torch
from ase.geometry import find_mic
from known_crystals import random_cells, random_transforms, special
from pymatgen.core import Lattice
from pymatgen.util.coord import pbc_shortest_vectors

from hpcgen.crystal.lattice import inverse_transform, niggli_reduce
from hpcgen.crystal.wigner_seitz import minimum_image, wigner_seitz_offsets

CELLS = {name: crystal.lattice for name, crystal in special().items()}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def steps(count: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Random fractional steps, a third of them of halves and quarters: there images tie."""
    generator = torch.Generator().manual_seed(seed)
    step = (torch.rand(count, 3, generator=generator, dtype=torch.float64) - 0.5) * 2 * spread
    step[::3] = (step[::3] * 4).round() / 4
    return step


def brute_force(step: torch.Tensor, lattice: torch.Tensor, reach: int = 6) -> torch.Tensor:
    """Least length over all images from -reach to reach of the rounded step. (P, 3), (P, 3, 3) -> (P,)."""
    images = torch.tensor(list(product(range(-reach, reach + 1), repeat=3)), dtype=torch.float64)
    candidates = (step - step.round())[:, None] + images
    return torch.einsum("pmi,pij->pmj", candidates, lattice).norm(dim=-1).amin(-1)


def rounding_only(step, lattice, batch):
    """What many packages do; right only in cells that are hardly skewed."""
    image = -step.round().long()
    return torch.einsum("pi,pij->pj", step + image, lattice[batch]), image


@pytest.mark.parametrize("shape", [(0, 3), (0, 5, 3), (0, 2, 4, 3), (2, 0, 3)])
def test_no_steps_have_no_images(shape):
    vector, image = minimum_image(torch.zeros(shape, dtype=torch.float64), random_cells(3, seed=0)[: shape[0]])
    assert vector.shape == image.shape == shape


@pytest.mark.parametrize(("function", "holds"), [(minimum_image, True), (rounding_only, False)])
def test_as_short_as_brute_force(function, holds):
    lattice = random_cells(150, seed=1, skew=2, rounds=3)
    reduced, transform = niggli_reduce(lattice)
    lattice = lattice[inverse_transform(transform).abs().amax((-1, -2)) <= 2]  # ±6 images reach far enough
    assert len(lattice) > 40
    batch = torch.arange(len(lattice)).repeat_interleave(20)
    step = steps(len(batch))
    vector, image = function(step, lattice, batch)
    best = brute_force(step, lattice[batch])
    assert torch.allclose(vector.norm(dim=-1), best, rtol=1e-8, atol=1e-9) == holds
    assert torch.allclose(vector, torch.einsum("pi,pij->pj", step + image, lattice[batch]), atol=1e-9)


def test_as_short_as_brute_force_in_reduced_cells_of_all_shapes():
    flat_to_long = torch.tensor([[1.0, 1, 30], [1, 30, 30], [1, 4, 16], [5, 5, 5]], dtype=torch.float64)
    shapes = random_cells(100, seed=2, rounds=0) * flat_to_long.repeat(25, 1)[:, :, None]
    lattice, _ = niggli_reduce(torch.cat([shapes, *CELLS.values()]))
    batch = torch.arange(len(lattice)).repeat_interleave(30)
    step = steps(len(batch), seed=3)
    vector, _ = minimum_image(step, lattice, batch)
    assert torch.allclose(vector.norm(dim=-1), brute_force(step, lattice[batch], 3), rtol=1e-8, atol=1e-9)


def test_wigner_seitz_cell_lies_within_one_niggli_vector():
    """The bound that makes 27 offsets enough."""
    lattice, transform = niggli_reduce(random_cells(400, seed=4, rounds=1))
    lattice = torch.cat([lattice, *[niggli_reduce(cell)[0] for cell in CELLS.values()]])
    batch = torch.arange(len(lattice)).repeat_interleave(200)
    step = steps(len(batch), seed=5)
    vector, image = minimum_image(step, lattice, batch)
    inside = (step + image).abs().max()
    assert 0.6 < inside <= 1 + 1e-4


@pytest.mark.parametrize("name", CELLS)
def test_agrees_with_pymatgen_and_ase(name):
    skewed = torch.cat([random_transforms(6, torch.Generator().manual_seed(6)).double() @ CELLS[name]])
    for lattice in [CELLS[name], *skewed[:, None]]:
        step = steps(60, seed=7, spread=1.5)
        vector, _ = minimum_image(step, lattice, torch.zeros(60, dtype=torch.int64))
        length = vector.norm(dim=-1).numpy()
        _, ase_length = find_mic((step @ lattice[0]).numpy(), lattice[0].numpy())
        assert np.allclose(length, ase_length, atol=1e-8)
        reduced, transform = niggli_reduce(lattice)  # pymatgen's is exact in reduced cells only
        there = (step @ inverse_transform(transform)[0].double()).numpy()
        _, square = pbc_shortest_vectors(Lattice(reduced[0].numpy()), there, [[0, 0, 0]], return_d2=True)
        assert np.allclose(length, square[:, 0] ** 0.5, atol=1e-7)


def test_whole_cells_added_to_a_step_only_move_its_image():
    lattice = torch.cat(list(CELLS.values()))
    batch = torch.arange(len(lattice)).repeat_interleave(60)
    step, whole = steps(len(batch), seed=8), torch.randint(-5, 6, (len(batch), 3))
    vector, image = minimum_image(step, lattice, batch)
    moved, moved_image = minimum_image(step + whole, lattice, batch)
    assert torch.equal(moved_image, image - whole)  # also where images tie
    assert torch.allclose(moved, vector, atol=1e-9)


def test_choice_of_cell_does_not_matter():
    lattice = torch.cat(list(CELLS.values()))
    transform = random_transforms(len(lattice), torch.Generator().manual_seed(9))
    batch = torch.arange(len(lattice)).repeat_interleave(60)
    step = steps(len(batch), seed=10)
    there = torch.einsum("pi,pij->pj", step, inverse_transform(transform).double()[batch])
    vector, _ = minimum_image(step, lattice, batch)
    other, _ = minimum_image(there, transform.double() @ lattice, batch)
    assert torch.allclose(vector.norm(dim=-1), other.norm(dim=-1), atol=1e-9)


def test_of_tied_images_the_first_is_taken():
    vector, image = minimum_image(torch.tensor([[0.5, -0.5, 1.5]]), torch.eye(3)[None], torch.tensor([0]))
    assert image.tolist() == [[-1, 0, -2]]
    assert vector.tolist() == [[-0.5, -0.5, -0.5]]


@pytest.mark.parametrize("name", CELLS)
def test_ties_do_not_hang_on_rounding(name):
    lattice, step = CELLS[name], steps(90, seed=11)
    zero = torch.zeros(90, dtype=torch.int64)
    noise = torch.randn(90, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-14
    assert torch.equal(minimum_image(step, lattice, zero)[1], minimum_image(step + noise, lattice, zero)[1])


def test_dense_equals_flat():
    lattice = torch.cat(list(CELLS.values()))
    step = steps(len(lattice) * 16, seed=12)
    batch = torch.arange(len(lattice)).repeat_interleave(16)
    flat, flat_image = minimum_image(step, lattice, batch)
    dense, image = minimum_image(step.reshape(-1, 4, 4, 3), lattice)
    assert torch.equal(dense.reshape(-1, 3), flat) and torch.equal(image.reshape(-1, 3), flat_image)
    again, _ = minimum_image(step, lattice, batch, transform=niggli_reduce(lattice)[1])
    assert torch.equal(again, flat)


def test_gradients():
    lattice = CELLS["skewed"].clone().requires_grad_()
    step = (steps(6, seed=13) + 0.01).requires_grad_()
    zero = torch.zeros(6, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda s, c: minimum_image(s, c, zero)[0], (step, lattice))


def test_float32_and_nan():
    lattice, step = CELLS["skewed"].float(), steps(30, seed=14).float()
    step[3] = float("nan")
    vector, image = minimum_image(step[None], lattice)
    assert vector.dtype == torch.float32 and image.dtype == torch.int64
    assert vector[0, 3].isnan().all()
    assert vector[0, torch.arange(30) != 3].isfinite().all()


def test_a_flat_cell_is_named():
    with pytest.raises(ValueError, match="crystal 1"):
        minimum_image(torch.zeros(2, 5, 3), torch.stack([torch.eye(3), torch.ones(3, 3)]))


def test_offsets_are_ordered_in_the_given_cell():
    transform = random_transforms(10, torch.Generator().manual_seed(15))
    given = (wigner_seitz_offsets(transform).double() @ transform.double()).long().tolist()
    assert all(rows == sorted(rows) and len(rows) == 27 for rows in given)


@pytest.mark.gpu
@GPU
def test_cuda_equals_cpu():
    lattice = torch.cat(list(CELLS.values()))
    batch = torch.arange(len(lattice)).repeat_interleave(60)
    step = steps(len(batch), seed=16)
    vector, image = minimum_image(step, lattice, batch)
    there, image_there = minimum_image(step.cuda(), lattice.cuda(), batch.cuda())
    assert torch.equal(image_there.cpu(), image)
    assert torch.allclose(there.cpu(), vector, atol=1e-12)
