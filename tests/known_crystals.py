"""Crystals of ties and special positions, made by hand, and the ways of describing one anew."""

import torch
from torch import Tensor

from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import inverse_transform, lattice_from_parameters
from hpcgen.crystal.torus import wrap

FCC_SITES = [[0.0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]


def crystal(lattice: Tensor, sites: list[list[float]] | Tensor, numbers: list[int]) -> Crystals:
    """One crystal in float64. lattice (3, 3) Å, fractional sites (N, 3)."""
    frac = wrap(torch.as_tensor(sites, dtype=torch.float64))
    return Crystals(frac, lattice[None], torch.tensor(numbers), torch.tensor([len(numbers)]))


def cell(a: float, b: float, c: float, alpha: float = 90, beta: float = 90, gamma: float = 90) -> Tensor:
    """(3, 3) float64 Å."""
    sides, angles = torch.tensor([[[a, b, c]], [[alpha, beta, gamma]]], dtype=torch.float64)
    return lattice_from_parameters(sides, angles)[0]


def special() -> dict[str, Crystals]:
    """NaCl, fcc, diamond, hcp, one atom alone, a skewed triclinic cell and sixty atoms."""
    shifted = [[x + 0.5, y, z] for x, y, z in FCC_SITES]
    quarter = [[x + 0.25, y + 0.25, z + 0.25] for x, y, z in FCC_SITES]
    generator = torch.Generator().manual_seed(60)
    sixty = torch.rand(60, 3, generator=generator, dtype=torch.float64)
    return {
        "NaCl": crystal(cell(5.64, 5.64, 5.64), FCC_SITES + shifted, [11] * 4 + [17] * 4),
        "fcc": crystal(cell(2.56, 2.56, 2.56, 60, 60, 60), [[0, 0, 0]], [29]),
        "diamond": crystal(cell(3.567, 3.567, 3.567), FCC_SITES + quarter, [6] * 8),
        "hcp": crystal(cell(3.2, 3.2, 5.2, 90, 90, 120), [[1 / 3, 2 / 3, 0.25], [2 / 3, 1 / 3, 0.75]], [12] * 2),
        "one atom": crystal(cell(3.0, 3.0, 3.0), [[0.3, 0.7, 0.1]], [84]),
        "skewed": crystal(
            cell(3.0, 9.0, 14.0, 40, 65, 35),
            [[0, 0, 0], [0.9, 0.05, 0.5], [0.999, 0.001, 0.3], [0.5, 0.5, 0.5]],
            [3, 8, 15, 26],
        ),
        "sixty": crystal(cell(9.0, 10.0, 11.0, 80, 95, 103), sixty, [14] * 60),
    }


def random_cells(count: int, seed: int, skew: int = 3, rounds: int = 4) -> Tensor:
    """Cells of all shapes, many far from reduced, of at least 2 Å³. -> (count, 3, 3) float64 Å."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randn(2 * count, 3, 3, generator=generator, dtype=torch.float64) * 4
    cells = cells[torch.linalg.det(cells).abs() > 2][:count]
    assert len(cells) == count
    return random_transforms(count, generator, skew, rounds).double() @ cells


def random_transforms(count: int, generator: torch.Generator, skew: int = 3, rounds: int = 4) -> Tensor:
    """Integer matrices of determinant 1, products of shears. -> (count, 3, 3) int64."""
    every, total = torch.arange(count), torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
    for _ in range(rounds):
        shear = torch.eye(3, dtype=torch.float64).repeat(count, 1, 1)
        i = torch.randint(3, (count,), generator=generator)
        j = (i + torch.randint(1, 3, (count,), generator=generator)) % 3
        shear[every, i, j] = torch.randint(-skew, skew + 1, (count,), generator=generator).double()
        total = shear @ total
    return total.long()


def random_crystals(lattice: Tensor, seed: int, most: int = 4) -> Crystals:
    """1 to `most` atoms at random in each cell (B, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    num_atoms = torch.randint(1, most + 1, (len(lattice),), generator=generator)
    total = int(num_atoms.sum())
    frac = torch.rand(total, 3, generator=generator, dtype=torch.float64)
    return Crystals(frac, lattice, torch.ones(total, dtype=torch.int64), num_atoms)


def translated(crystals: Crystals, by: list[float]) -> Crystals:
    """All atoms moved by a fractional vector."""
    frac = wrap(crystals.frac_coords + torch.tensor(by, dtype=torch.float64))
    return Crystals(frac, crystals.lattice, crystals.atomic_numbers, crystals.num_atoms)


def rotated(crystals: Crystals, seed: int = 0) -> Crystals:
    """The crystals turned in space, by a proper or improper rotation."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    return Crystals(crystals.frac_coords, crystals.lattice @ turn, crystals.atomic_numbers, crystals.num_atoms)


def relabelled(crystals: Crystals, order: Tensor) -> Crystals:
    """One crystal, its atoms in another order."""
    return Crystals(crystals.frac_coords[order], crystals.lattice, crystals.atomic_numbers[order], crystals.num_atoms)


def in_other_cell(crystals: Crystals, transform: Tensor) -> Crystals:
    """The crystals in cells transform @ lattice, (B, 3, 3) of determinant 1."""
    back = inverse_transform(transform).double()[crystals.batch]
    frac = wrap(torch.einsum("ai,aij->aj", crystals.frac_coords, back))
    lattice = transform.double() @ crystals.lattice
    return Crystals(frac, lattice, crystals.atomic_numbers, crystals.num_atoms)


def supercell(crystals: Crystals, times: tuple[int, int, int]) -> Crystals:
    """One crystal repeated along a, b, c; the copies of the first atom come first."""
    steps = torch.cartesian_prod(*[torch.arange(n) for n in times]).double()
    frac = (crystals.frac_coords[:, None] + steps) / torch.tensor(times)
    copies = len(steps)
    return Crystals(
        frac.reshape(-1, 3),
        crystals.lattice * torch.tensor(times).double()[:, None],
        crystals.atomic_numbers.repeat_interleave(copies),
        crystals.num_atoms * copies,
    )


def quartz(hand: int) -> Crystals:
    """α-quartz: P3221 (154) for hand 1, its mirror image P3121 (152) for hand -1."""
    x, y, z, u = 0.4133, 0.2672, 0.7855, 0.4697
    sites = [[u, 0, 2 / 3], [0, u, 1 / 3], [-u, -u, 0]]
    sites += [[x, y, z], [-y, x - y, z + 2 / 3], [y - x, -x, z + 1 / 3]]
    sites += [[y, x, -z], [x - y, -y, -z + 1 / 3], [-x, y - x, -z + 2 / 3]]
    sites = [[a, b, hand * c] for a, b, c in sites]
    return crystal(cell(4.9134, 4.9134, 5.4052, 90, 90, 120), sites, [14] * 3 + [8] * 6)


def shaken(of: Crystals, size: float, seed: int = 0, strain: float = 0.0) -> Crystals:
    """Sites moved by a normal step of `size` Å, the lattice strained."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(of.frac_coords.shape, generator=generator, dtype=torch.float64) * size
    frac = of.frac_coords + step @ torch.linalg.inv(of.lattice[0])
    warp = torch.eye(3, dtype=torch.float64) + strain * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    return Crystals(wrap(frac), of.lattice @ warp, of.atomic_numbers, of.num_atoms)


def many_shaken(of: Crystals, sizes: Tensor, seed: int = 0) -> Crystals:
    """Sites of each crystal moved by normal steps of its size. sizes (B,) Å."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.randn(of.frac_coords.shape, generator=generator, dtype=torch.float64) * sizes[of.batch][:, None]
    frac = of.frac_coords + torch.einsum("ai,aij->aj", step, torch.linalg.inv(of.lattice)[of.batch])
    return Crystals(wrap(frac), of.lattice, of.atomic_numbers, of.num_atoms)


def in_larger_cell(of: Crystals, transform: Tensor) -> Crystals:
    """One crystal in the cell transform @ lattice, transform (3, 3) integer."""
    structure = to_pymatgen(of)[0].make_supercell(transform.tolist(), in_place=False)
    numbers = [site.specie.Z for site in structure]
    return crystal(torch.tensor(structure.lattice.matrix.copy()), torch.tensor(structure.frac_coords), numbers)


def replace_sites(of: Crystals, sites: list[list[float]]) -> Crystals:
    return Crystals(torch.tensor(sites, dtype=torch.float64), of.lattice, of.atomic_numbers, of.num_atoms)
