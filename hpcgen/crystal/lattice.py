"""Lattices: lengths and angles, the Niggli cell, and the metric as an unconstrained vector."""

import math
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.torus import wrap

MOST_STEPS = 1000  # of the Niggli reduction; of 3,000 cells sheared by up to 50 the slowest took 146
FLAT = 1e-9  # share of a·b·c up to which a cell counts as flat: nothing can be searched in it
LEAST_SHARE = 1e-6  # of a·b·c that a cell must enclose; angles that make no cell come to 1e-8 by rounding


def lattice_from_parameters(lengths: Tensor, angles_deg: Tensor) -> Tensor:
    """Cells with a along x and b in the xy plane. (B, 3) Å, (B, 3) degrees alpha, beta, gamma -> (B, 3, 3) Å.

    Right angles give exact zeros. Computed in float64, given in the dtype of `lengths`. Raises ValueError,
    naming the cell, where no such cell exists: angles outside 0 to 180°, or less than LEAST_SHARE of a·b·c.
    """
    sides, angles = lengths.double(), angles_deg.double()
    cosine = torch.sin(torch.deg2rad(90.0 - angles))  # (B, 3), exactly 0 at 90°
    alpha, beta, gamma = cosine.unbind(-1)
    sine = torch.sin(torch.deg2rad(angles[:, 2]))
    c_y = (alpha - beta * gamma) / sine
    c_z_squared = 1.0 - beta**2 - c_y**2
    good = (sides > 0).all(-1) & sides.isfinite().all(-1) & ((angles > 0) & (angles < 180)).all(-1)
    good &= c_z_squared * sine**2 > LEAST_SHARE**2
    for i in (~good).nonzero().flatten().tolist():
        raise ValueError(
            f"cell {i}: lengths {_short(lengths[i])} Å, angles {_short(angles_deg[i])}° enclose no volume, "
            "want positive lengths and angles of a real cell, between 0 and 180°"
        )
    nought, one = torch.zeros_like(sine), torch.ones_like(sine)
    a = torch.stack([one, nought, nought], -1)
    b = torch.stack([gamma, sine, nought], -1)
    c = torch.stack([beta, c_y, c_z_squared.sqrt()], -1)
    return (torch.stack([a, b, c], -2) * sides.unsqueeze(-1)).to(lengths.dtype)  # (B, 3, 3)


def lattice_of(parameters: list[float]) -> np.ndarray:
    """`lattice_from_parameters` for one cell's six parameters, in a twentieth of its time. Raises Refused: bad-cell."""
    a, b, c, *angles = parameters
    if min(a, b, c) > 0 and all(0 < angle < 180 for angle in angles):
        alpha, beta, gamma = (math.sin(math.radians(90.0 - angle)) for angle in angles)  # cosines, exact at 90°
        sine = math.sin(math.radians(angles[2]))
        y = (alpha - beta * gamma) / sine
        z_squared = 1.0 - beta * beta - y * y
        if z_squared * sine * sine > LEAST_SHARE**2:
            z = math.sqrt(z_squared)
            return np.array([[a, 0.0, 0.0], [b * gamma, b * sine, 0.0], [c * beta, c * y, c * z]])
    lengths = f"lengths {a:g}, {b:g}, {c:g} Å and angles {', '.join(f'{angle:g}' for angle in angles)}°"
    raise Refused("bad-cell", f"{lengths} enclose no volume")


def lattice_parameters(lattice: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and angles alpha, beta, gamma. (B, 3, 3) Å -> (B, 3) Å, (B, 3) degrees."""
    first, second = lattice[:, [1, 0, 0]], lattice[:, [2, 2, 1]]  # b c, a c, a b
    sine = torch.linalg.vector_norm(torch.linalg.cross(first, second), dim=-1)
    cosine = (first * second).sum(-1)
    return torch.linalg.vector_norm(lattice, dim=-1), torch.rad2deg(torch.atan2(sine, cosine))


def volume(lattice: Tensor) -> Tensor:
    """Cell volumes. (B, 3, 3) Å -> (B,) Å³."""
    return torch.linalg.det(lattice).abs()


def heights(lattice: Tensor) -> Tensor:
    """Distances between opposite faces: across bc, ca, ab. (B, 3, 3) Å -> (B, 3) Å."""
    return 1.0 / torch.linalg.vector_norm(torch.linalg.inv(lattice), dim=-2)


def refuse_flat(lattice: Tensor) -> None:
    """Raise ValueError naming the first of the cells (B, 3, 3) that is not finite or has no volume."""
    size = torch.linalg.vector_norm(lattice, dim=-1).prod(-1)
    share = volume(lattice) / size
    for i in (~((share > FLAT) & size.isfinite())).nonzero().flatten().tolist():
        raise ValueError(
            f"crystal {i}: lattice {lattice[i].tolist()} is flat or not finite, want three independent finite vectors"
        )


def niggli_reduce(lattice: Tensor, tolerance: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The Niggli cells. (B, 3, 3) Å -> reduced (B, 3, 3) Å, transform (B, 3, 3) int64, determinant +1.

    reduced = transform @ lattice: the same lattice, not rotated, its handedness kept; differentiable, the
    transform being constant. Gram entries of the cell scaled to volume 1 are equal within `tolerance`.
    Křivý and Gruber 1976 with the tolerance of Grosse-Kunstleve, Sauter and Adams 2004; where theirs takes
    one vector off another, this takes the nearest multiple. Raises ValueError, naming the crystal, for a
    flat or non-finite cell and where no end is reached in MOST_STEPS steps.
    """
    cell = lattice.detach().double()
    refuse_flat(cell)
    cell = cell / volume(cell).pow(1 / 3)[:, None, None]
    transform = torch.eye(3, dtype=torch.int64, device=cell.device).repeat(len(cell), 1, 1)
    open_cells = torch.arange(len(cell), device=cell.device)  # those not yet reduced
    for _ in range(MOST_STEPS):
        if not len(open_cells):
            break
        step, done = _niggli_step(transform[open_cells].double() @ cell[open_cells], tolerance)
        open_cells, step = open_cells[~done], step[~done]
        transform[open_cells] = multiply(step, transform[open_cells])
    for i in open_cells.tolist():
        raise ValueError(
            f"crystal {i}: no Niggli cell of {lattice[i].tolist()} found in {MOST_STEPS} steps, "
            f"want a larger tolerance than {tolerance:g}"
        )
    return transform.to(lattice.dtype) @ lattice, transform


def _niggli_step(cell: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The first rule that applies to each cell. (n, 3, 3) -> its matrix (n, 3, 3) int64, done (n,).

    Rules 1 to 8 of Křivý and Gruber, 3 and 4 taken together.
    """
    gram = cell @ cell.mT
    aa, bb, cc = gram.diagonal(dim1=-2, dim2=-1).unbind(-1)
    bc, ac, ab = 2 * gram[:, 1, 2], 2 * gram[:, 0, 2], 2 * gram[:, 0, 1]

    def more(x: Tensor, y: Tensor | float) -> Tensor:
        return x > y + tolerance

    def same(x: Tensor, y: Tensor | float) -> Tensor:
        return (x - y).abs() <= tolerance

    signs = _signs(torch.stack([bc, ac, ab], -1), tolerance)  # (n, 3)
    sum_all = aa + bb + bc + ac + ab
    applies = torch.stack(
        [
            more(aa, bb) | same(aa, bb) & more(bc.abs(), ac.abs()),
            more(bb, cc) | same(bb, cc) & more(ac.abs(), ab.abs()),
            (signs != 1).any(-1),
            more(bc.abs(), bb) | same(bc, bb) & more(ab, 2 * ac) | same(bc, -bb) & more(-ab, 0.0),
            more(ac.abs(), aa) | same(ac, aa) & more(ab, 2 * bc) | same(ac, -aa) & more(-ab, 0.0),
            more(ab.abs(), aa) | same(ab, aa) & more(ac, 2 * bc) | same(ab, -aa) & more(-ac, 0.0),
            more(-sum_all, 0.0) | same(sum_all, 0.0) & more(2 * (aa + ac) + ab, 0.0),
            torch.ones_like(aa, dtype=torch.bool),
        ],
        -1,
    )  # (n, 8)
    rule = applies.int().argmax(-1)  # the first
    step = _RULES.to(cell.device)[rule]
    one = torch.arange(len(cell), device=cell.device)
    step[one, 0, 0] *= torch.where(rule == 2, signs[:, 0], 1)
    step[one, 1, 1] *= torch.where(rule == 2, signs[:, 1], 1)
    step[one, 2, 2] *= torch.where(rule == 2, signs[:, 2], 1)
    step[:, 2, 1] -= torch.where(rule == 3, _multiple(bc, bb), 0)
    step[:, 2, 0] -= torch.where(rule == 4, _multiple(ac, aa), 0)
    step[:, 1, 0] -= torch.where(rule == 5, _multiple(ab, aa), 0)
    return step, rule == 7


_ONE = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
_SWAP_AB = [[0, -1, 0], [-1, 0, 0], [0, 0, -1]]
_SWAP_BC = [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]
_ADD_AB = [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
_RULES = torch.tensor([_SWAP_AB, _SWAP_BC, _ONE, _ONE, _ONE, _ONE, _ADD_AB, _ONE])


def _multiple(double_product: Tensor, square: Tensor) -> Tensor:
    """How often to take a vector of length² `square` off another, at least once. (n,), (n,) -> (n,) int64."""
    times = (double_product / (2 * square)).round()
    return torch.where(times == 0, double_product.sign(), times).long()


def _signs_of(signs: tuple[int, ...]) -> list[int]:
    """Which of a, b, c to turn round, so that bc, ac, ab of these signs become all > 0, or else all <= 0."""
    if math.prod(signs) > 0:
        return list(signs)
    turn = [-1 if sign > 0 else 1 for sign in signs]
    if math.prod(turn) < 0:
        turn[max(i for i in range(3) if signs[i] == 0)] = -1  # a zero is there, and it may be turned freely
    return turn


_TURNS = torch.tensor([_signs_of(signs) for signs in product((-1, 0, 1), repeat=3)])  # (27, 3)


def _signs(products: Tensor, tolerance: float) -> Tensor:
    """Signs for a, b, c that make bc, ac, ab (n, 3) all acute or all not; their product is +1. -> (n, 3)."""
    sign = (products > tolerance).long() - (products < -tolerance).long()
    return _TURNS.to(products.device)[((sign + 1) * sign.new_tensor([9, 3, 1])).sum(-1)]


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Integer matrix product; CUDA has no matmul of integers. (..., n, 3), (..., 3, m) -> (..., n, m)."""
    return (left.unsqueeze(-1) * right.unsqueeze(-3)).sum(-2)


def inverse_transform(transform: Tensor) -> Tensor:
    """Exact inverse of integer matrices of determinant +1 or -1. (B, 3, 3) int64 -> (B, 3, 3) int64."""
    x, y, z = transform.unbind(-2)
    columns = torch.stack([_cross(y, z), _cross(z, x), _cross(x, y)], -1)
    determinant = (x * columns[..., 0]).sum(-1)
    return columns * determinant[..., None, None]


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return u.roll(-1, -1) * v.roll(-2, -1) - u.roll(-2, -1) * v.roll(-1, -1)


def in_niggli_cell(crystals: Crystals) -> Crystals:
    """The same crystals, atoms in the same places and order, described in their Niggli cells."""
    reduced, transform = niggli_reduce(crystals.lattice)
    back = inverse_transform(transform).double()[crystals.batch]  # (A, 3, 3)
    frac = torch.einsum("ai,aij->aj", crystals.frac_coords.double(), back)
    frac = wrap(wrap(frac).to(crystals.frac_coords.dtype))
    return Crystals(frac, reduced, crystals.atomic_numbers, crystals.num_atoms)


class _LogOfSymmetric(torch.autograd.Function):
    """Matrix logarithm of symmetric positive matrices; its gradient is finite also for equal eigenvalues,
    where that of `torch.linalg.eigh` is not (every cubic cell). Daleckii and Krein 1965."""

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        value, vector = torch.linalg.eigh(matrix)
        ctx.save_for_backward(value, vector)
        return (vector * value.log().unsqueeze(-2)) @ vector.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        value, vector = ctx.saved_tensors
        total = value.unsqueeze(-1) + value.unsqueeze(-2)
        z = (value.unsqueeze(-1) - value.unsqueeze(-2)) / total
        small = z.abs() < 1e-3
        series = 1 + z**2 / 3 + z**4 / 5
        slope = torch.where(small, series, z.atanh() / torch.where(small, 1.0, z)) * 2 / total
        symmetric = (grad + grad.mT) / 2
        return vector @ (slope * (vector.mT @ symmetric @ vector)) @ vector.mT


_SQRT2 = math.sqrt(2.0)


def log_metric(lattice: Tensor) -> Tensor:
    """Cells as free vectors that no rotation changes: ½ log(L Lᵀ). (B, 3, 3) Å -> (B, 6).

    The six are xx, yy, zz, √2 yz, √2 xz, √2 xy of the matrix; which hand the cell has is lost. Their norm is
    the Frobenius norm of the matrix, the sum of the first three the logarithm of the volume.
    Computed in float64, given in the dtype of `lattice`. Differentiable once.
    """
    cell = lattice.double()
    log = (_LogOfSymmetric.apply(cell @ cell.mT) / 2).flatten(1)
    flat = torch.stack([log[:, at] for at in (0, 4, 8, 5, 2, 1)], -1)  # (B, 6)
    return torch.cat([flat[:, :3], flat[:, 3:] * _SQRT2], -1).to(lattice.dtype)


def lattice_from_log_metric(log: Tensor) -> Tensor:
    """The right-handed cells, a along x and b in the xy plane, of `log_metric`. (B, 6) -> (B, 3, 3) Å.

    What is not finite, or too large or flat to be a cell, is NaN, and does not touch the others.
    """
    xx, yy, zz, yz, xz, xy = log.double().unbind(-1)
    yz, xz, xy = yz / _SQRT2, xz / _SQRT2, xy / _SQRT2
    matrix = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).unflatten(-1, (3, 3))
    metric = exponential(2 * matrix) if log.is_cuda else torch.linalg.matrix_exp(2 * matrix)
    factor, bad = torch.linalg.cholesky_ex(metric)
    return factor.masked_fill((bad != 0)[:, None, None], math.nan).to(log.dtype)


def exponential(matrix: Tensor) -> Tensor:
    """exp of small symmetric matrices in float64, (B, n, n), to 1e-12 of its largest entry up to a norm of 60.

    Torch's own sorts the matrices by their norm, for which the host waits for a GPU several times; this one does the
    same for all: a Taylor series of exp(matrix / 2^10), squared ten times.
    """
    part, one = matrix * 2.0**-10, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    total = one + part / 9
    for k in range(8, 0, -1):
        total = one + part @ total / k
    for _ in range(10):
        total = total @ total
    return total


def _short(values: Tensor) -> str:
    return ", ".join(f"{value:.6g}" for value in values.tolist())
