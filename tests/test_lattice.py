"""Cells: parameters, the Niggli cell against spglib and pymatgen, the metric as a vector."""

import numpy as np
import pytest
import spglib
import torch
from ase.geometry import cellpar_to_cell
from known_crystals import (
    cell,
    crystal,
    in_other_cell,
    random_cells,
    random_crystals,
    random_transforms,
    special,
)
from pymatgen.core import Lattice

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import (
    exponential,
    heights,
    in_niggli_cell,
    inverse_transform,
    lattice_from_log_metric,
    lattice_from_parameters,
    lattice_of,
    lattice_parameters,
    log_metric,
    niggli_reduce,
    volume,
)
from hpcgen.crystal.refused import Refused

pytestmark = pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING:DeprecationWarning")

SPECIAL_CELLS = {
    "fcc": cell(2.56, 2.56, 2.56, 60, 60, 60),
    "bcc": cell(2.5, 2.5, 2.5, 109.47122063449069, 109.47122063449069, 109.47122063449069),
    "hcp": cell(3.2, 3.2, 5.2, 90, 90, 120),
    "hcp, 60°": cell(3.2, 3.2, 5.2, 90, 90, 60),
    "rhombohedral, acute": cell(9.5, 9.5, 9.5, 24, 24, 24),
    "rhombohedral, 59.9°": cell(4, 4, 4, 59.9, 59.9, 59.9),
    "rhombohedral, 90.1°": cell(4, 4, 4, 90.1, 90.1, 90.1),
    "rhombohedral, obtuse": cell(4, 4, 4, 115, 115, 115),
    "cubic": cell(3, 3, 3),
    "body-centred tetragonal": torch.tensor([[-2.0, 2, 3], [2, -2, 3], [2, 2, -3]], dtype=torch.float64),
    "one-face centred": torch.tensor([[2.0, 3, 0], [-2, 3, 0], [0, 0, 5]], dtype=torch.float64),
    "monoclinic, b = c": cell(3, 4, 4, 90, 110, 90),
}


IMPOSSIBLE = [
    (120, 120, 120.1),
    (60, 60, 121),
    (60, 60, 120),
    (90, 90, 180),
    (270, 90, 90),
    (-90, 90, 90),
    (90, 90, 360.1),
    (90, 90, 0),
    (90, 90, float("nan")),
]


def parameters(lattice):
    return torch.cat(lattice_parameters(lattice), -1)


def described_anew(lattice, count=20, seed=0):
    """The same lattice in `count` other, mostly skewed, cells. (3, 3) -> (count, 3, 3)."""
    transform = random_transforms(count, torch.Generator().manual_seed(seed))
    return transform.double() @ lattice


def test_parameters_round_trip_and_agree_with_ase():
    reduced, _ = niggli_reduce(random_cells(200, seed=1))
    lengths, angles = lattice_parameters(reduced)
    made = lattice_from_parameters(lengths, angles)
    for matrix, size, angle in zip(made, lengths, angles, strict=True):
        assert np.allclose(matrix, cellpar_to_cell([*size.tolist(), *angle.tolist()]), atol=1e-8)
    assert torch.allclose(parameters(made), parameters(reduced), atol=1e-8)
    assert torch.allclose(volume(made), volume(reduced))


def test_right_angles_give_exact_zeros():
    assert torch.equal(cell(2, 3, 4), torch.diag(torch.tensor([2.0, 3, 4], dtype=torch.float64)))


@pytest.mark.parametrize("angles", IMPOSSIBLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_angles_are_named(angles, dtype):
    both = torch.tensor([(90, 90, 90), angles], dtype=dtype)
    with pytest.raises(ValueError, match=rf"cell 1: .*angles {angles[0]:.6g}, .*want .* between 0 and 180°"):
        lattice_from_parameters(torch.ones(2, 3, dtype=dtype), both)
    with pytest.raises(Refused, match="bad-cell: .* enclose no volume"):
        lattice_of([1.0, 1.0, 1.0, *angles])


def test_thin_but_real_cells_are_made():
    angles = torch.tensor([[1, 1, 1], [179, 90, 90], [60, 60, 119.9], [90, 90, 0.01]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        made = lattice_from_parameters(torch.ones(4, 3, dtype=dtype), angles.to(dtype))
        assert made.dtype == dtype and (volume(made) > 0).all()
        assert torch.allclose(lattice_parameters(made.double())[1], angles, atol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_one_cell_from_its_six_parameters_is_that_of_the_batch(seed):
    chance = np.random.default_rng(seed)
    for _ in range(20):
        lengths, angles = chance.uniform(2, 20, 3), chance.uniform(60, 115, 3)
        expected = lattice_from_parameters(torch.tensor(lengths)[None], torch.tensor(angles)[None])[0]
        assert np.allclose(lattice_of([*lengths, *angles]), expected.numpy(), rtol=0, atol=1e-12)


def test_parameters_have_gradients():
    lengths = torch.tensor([[3.0, 4, 5]], dtype=torch.float64, requires_grad=True)
    angles = torch.tensor([[80.0, 95, 103]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lattice_from_parameters, (lengths, angles))
    assert torch.autograd.gradcheck(lattice_parameters, (random_cells(3, 0).requires_grad_(),))


def test_heights_are_volume_over_face():
    lattice = random_cells(20, seed=2)
    faces = torch.linalg.cross(lattice[:, [1, 2, 0]], lattice[:, [2, 0, 1]]).norm(dim=-1)
    assert torch.allclose(heights(lattice), volume(lattice)[:, None] / faces)


def disagreeing(reduced: torch.Tensor, lattice: torch.Tensor, reference) -> list[int]:
    """Cells whose lengths and angles are not those of the reference within 1e-6."""
    theirs = torch.tensor(np.stack([reference(matrix) for matrix in lattice.numpy()]))
    return (parameters(theirs) - parameters(reduced)).abs().amax(-1).gt(1e-6).nonzero().flatten().tolist()


def pymatgen_niggli(matrix):
    return Lattice(matrix).get_niggli_reduced_lattice().matrix


def test_niggli_agrees_with_spglib_and_pymatgen():
    lattice = random_cells(3000, seed=0)
    reduced, transform = niggli_reduce(lattice)
    assert torch.equal(transform.double() @ lattice, reduced)
    assert (torch.linalg.det(transform.double()).round() == 1).all()
    assert disagreeing(reduced, lattice, spglib.niggli_reduce) == []
    assert disagreeing(reduced[:300], lattice[:300], pymatgen_niggli) == []
    assert len(disagreeing(lattice, lattice, spglib.niggli_reduce)) > 2900  # the test can fail


@pytest.mark.parametrize("name", SPECIAL_CELLS)
def test_niggli_of_cells_with_ties(name):
    lattice = torch.cat([SPECIAL_CELLS[name][None], described_anew(SPECIAL_CELLS[name])])
    reduced, _ = niggli_reduce(lattice)
    assert torch.allclose(parameters(reduced), parameters(reduced[:1]), atol=1e-6)  # whatever cell one starts from
    assert disagreeing(reduced, lattice, spglib.niggli_reduce) == []
    if name != "rhombohedral, 90.1°":  # there pymatgen, taking angles within 1° as equal, gives 89.9, 89.9, 90.1
        assert disagreeing(reduced[:5], lattice[:5], pymatgen_niggli) == []


def test_niggli_of_a_niggli_cell_is_itself():
    once, _ = niggli_reduce(random_cells(500, seed=3))
    again, transform = niggli_reduce(once)
    assert torch.equal(transform, torch.eye(3, dtype=torch.int64).expand_as(transform))
    assert torch.equal(again, once)


def test_niggli_far_from_reduced_and_of_any_size():
    lattice = random_cells(300, seed=4, skew=12, rounds=3)
    for scale in (1e-3, 1.0, 1e4):
        reduced, transform = niggli_reduce(lattice * scale)
        assert torch.allclose(volume(reduced), volume(lattice) * scale**3, rtol=1e-4)
        assert (torch.linalg.det(inverse_transform(transform).double()).round() == 1).all()
        lengths = lattice_parameters(reduced)[0]
        assert (lengths[:, :2] <= lengths[:, 1:] * (1 + 1e-4)).all()


def test_niggli_in_float32_and_of_one_cell():
    lattice = random_cells(100, seed=5)
    _, transform = niggli_reduce(lattice)
    reduced, same = niggli_reduce(lattice.float())
    assert reduced.dtype == torch.float32
    assert (same == transform).all(-1).all(-1).float().mean() > 0.95  # near ties may go the other way
    assert torch.equal(niggli_reduce(lattice[7:8])[1][0], transform[7])
    assert niggli_reduce(lattice[:0])[0].shape == (0, 3, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_bad_cell_is_named(bad):
    lattice = random_cells(3, seed=0)
    lattice[1, 2] = bad
    with pytest.raises(ValueError, match=r"crystal 1: lattice .* want three independent"):
        niggli_reduce(lattice)


def test_inverse_transform_is_exact():
    transform = random_transforms(50, torch.Generator().manual_seed(0), skew=30)
    inverse = inverse_transform(transform)
    one = (transform.double() @ inverse.double()).long()
    assert torch.equal(one, torch.eye(3, dtype=torch.int64).expand_as(one))
    assert torch.equal(inverse_transform(-transform), -inverse)


@pytest.mark.parametrize("name", special())
def test_atoms_stay_where_they_are_in_the_niggli_cell(name):
    skewed = in_other_cell(special()[name], random_transforms(1, torch.Generator().manual_seed(6)))
    reduced = in_niggli_cell(skewed)
    step = (reduced.cart_coords - skewed.cart_coords) @ torch.linalg.inv(skewed.lattice[0])
    assert (step - step.round()).abs().max() < 1e-9  # the same up to translations of the lattice
    assert torch.equal(reduced.atomic_numbers, skewed.atomic_numbers)
    assert (reduced.frac_coords >= 0).all() and (reduced.frac_coords < 1).all()
    assert torch.allclose(reduced.volume, skewed.volume)


def test_a_batch_reduces_like_its_crystals():
    crystals = random_crystals(random_cells(20, seed=7), seed=8)
    whole = in_niggli_cell(crystals)
    for i in range(len(crystals)):
        single = in_niggli_cell(crystals[i])
        assert torch.equal(whole[i].frac_coords, single.frac_coords)
        assert torch.equal(whole[i].lattice, single.lattice)


def test_float32_stays_in_the_cell():
    crystals = Crystals.cat([crystal(cell(3, 4, 20, 40, 70, 50), [[1 - 1e-9, 1e-9, 0.5]], [1])] * 2)
    reduced = in_niggli_cell(crystals.to(dtype=torch.float32))
    assert reduced.frac_coords.dtype == torch.float32 and reduced.frac_coords.max() < 1


METRIC_CELLS = torch.cat([torch.stack(list(SPECIAL_CELLS.values())), random_cells(100, seed=9)])


def test_log_metric_round_trip():
    gram = METRIC_CELLS @ METRIC_CELLS.mT
    made = lattice_from_log_metric(log_metric(METRIC_CELLS))
    scale = gram.abs().amax((-1, -2), keepdim=True)
    assert ((made @ made.mT - gram) / scale).abs().max() < 1e-11
    assert torch.allclose(torch.linalg.det(made), volume(METRIC_CELLS), rtol=1e-6)
    any_vector = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    assert torch.allclose(log_metric(lattice_from_log_metric(any_vector)), any_vector, atol=1e-9)


@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 10.0, 60.0])
def test_exponential_is_that_of_torch(norm):
    symmetric = METRIC_CELLS + METRIC_CELLS.mT
    matrix = norm * symmetric / torch.linalg.matrix_norm(symmetric, 2)[:, None, None]
    known = torch.linalg.matrix_exp(matrix)
    assert ((exponential(matrix) - known).abs() / known.abs().amax((-1, -2), keepdim=True)).max() < 1e-12
    wrong = exponential(matrix.mT + 1e-6) - known
    assert (wrong.abs() / known.abs().amax((-1, -2), keepdim=True)).max() > 1e-9, "the comparison can fail"


@pytest.mark.parametrize(("function", "holds"), [(log_metric, True), (lambda x: x.flatten(1), False)])
def test_log_metric_does_not_see_rotations(function, holds):
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()).Q
    assert torch.allclose(function(METRIC_CELLS @ turn), function(METRIC_CELLS), atol=1e-9) == holds


def test_log_metric_norm_is_that_of_the_matrix_and_trace_the_log_volume():
    vector = log_metric(METRIC_CELLS)
    values = torch.linalg.svdvals(METRIC_CELLS).log()
    assert torch.allclose(vector.norm(dim=-1), values.norm(dim=-1))
    assert torch.allclose(vector[:, :3].sum(-1), volume(METRIC_CELLS).log())


def test_log_metric_gradient_also_where_eigenvalues_are_equal():
    lattice = METRIC_CELLS[:20].clone().requires_grad_()
    assert torch.autograd.gradcheck(log_metric, (lattice,))
    vector = log_metric(METRIC_CELLS[:20]).requires_grad_()
    assert torch.autograd.gradcheck(lattice_from_log_metric, (vector,))


def test_log_metric_in_float32():
    lattice = METRIC_CELLS[:12].float()
    made = lattice_from_log_metric(log_metric(lattice))
    assert made.dtype == torch.float32
    assert torch.allclose(made @ made.mT, lattice @ lattice.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_a_metric_of_no_cell_gives_nan_and_touches_no_other(bad):
    vector = log_metric(METRIC_CELLS[:12])
    clean = lattice_from_log_metric(vector)
    vector[5] = bad
    made = lattice_from_log_metric(vector)
    others = torch.arange(12) != 5
    assert made[5].isnan().all() and torch.equal(made[others], clean[others])
