"""Crystals from and to pymatgen, ASE and PyTorch Geometric; nobody else makes or takes apart their objects.

What comes from pymatgen and ASE is float64. Codes of refusal: disordered, unknown-element, not-periodic,
no-atoms.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpcgen.crystal.check import one_crystal
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import Edges
from hpcgen.crystal.refused import Refused

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Element, Structure
    from torch_geometric.data import Batch, Data

ROUNDING = 1e-13  # a fractional coordinate from Cartesian ones this close below 1 is 0


def _arrays(crystals: Crystals) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """frac (A, 3), lattice (3, 3), atomic numbers (A,) of each crystal, float64."""
    plain = crystals.to("cpu", torch.float64)
    frac, lattice = plain.frac_coords.detach().numpy(), plain.lattice.detach().numpy()
    numbers, ptr = plain.atomic_numbers.numpy(), plain.ptr.tolist()
    spans = zip(ptr, ptr[1:], strict=False)
    return [(frac[i:j], lattice[b], numbers[i:j]) for b, (i, j) in enumerate(spans)]


def _batch(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Crystals:
    """Refuses atomic numbers outside 1 to 118 and crystals without atoms."""
    for at, (_, _, numbers) in enumerate(parts):
        if not len(numbers):
            raise Refused("no-atoms", f"crystal {at} has no atoms")
        if not (numbers.min() >= 1 and numbers.max() <= 118):
            raise Refused("unknown-element", f"crystal {at}: atomic numbers {numbers.tolist()}, want 1 to 118")
    if not parts:
        raise ValueError("no crystals, want at least one")
    return Crystals.cat([one_crystal(*part) for part in parts])


def to_pymatgen(crystals: Crystals) -> "list[Structure]":
    """One ordered Structure each, sites in the same order, coordinates untouched."""
    from pymatgen.core import Lattice, Structure

    elements = _elements()
    return [
        Structure(Lattice(lattice), [elements[number - 1] for number in numbers.tolist()], frac)
        for frac, lattice, numbers in _arrays(crystals)
    ]


@lru_cache(maxsize=1)
def _elements() -> "list[Element]":
    """Of atomic numbers 1 to 118: making them anew would cost as much as a small Structure."""
    from pymatgen.core import Element

    return [Element.from_Z(number) for number in range(1, 119)]


def from_pymatgen(structures: "Sequence[Structure]") -> Crystals:
    """A batch of Structures; charges, spins and site properties are dropped. Raises Refused."""
    parts = []
    for at, structure in enumerate(structures):
        if not structure.is_ordered:
            raise Refused("disordered", f"crystal {at}, {structure.formula}, has shared or partly empty sites")
        if not all(structure.lattice.pbc):
            raise Refused("not-periodic", f"crystal {at}: periodic in {structure.lattice.pbc}, want all three")
        for site in structure:
            if getattr(site.specie, "symbol", "X") not in _symbols():
                raise Refused("unknown-element", f"crystal {at} holds {site.specie}")
        numbers = np.array([site.specie.Z for site in structure], dtype=np.int64)
        frac = np.array(structure.frac_coords, dtype=np.float64).reshape(-1, 3)
        parts.append((frac, np.array(structure.lattice.matrix, dtype=np.float64), numbers))
    return _batch(parts)


@lru_cache(maxsize=1)
def _symbols() -> set[str]:
    from pymatgen.core import Element

    return set(Element.__members__)


def to_ase(crystals: Crystals) -> "list[Atoms]":
    """One periodic Atoms each, sites in the same order."""
    from ase import Atoms

    return [
        Atoms(numbers=numbers, scaled_positions=frac, cell=lattice, pbc=True)
        for frac, lattice, numbers in _arrays(crystals)
    ]


def from_ase(atoms: "Sequence[Atoms]") -> Crystals:
    """A batch of Atoms that are periodic in all three directions. Raises Refused.

    ASE holds Cartesian positions: fractional ones come back within some 1e-15, not bit by bit.
    """
    parts = []
    for at, each in enumerate(atoms):
        if not all(each.pbc):
            raise Refused("not-periodic", f"crystal {at}: periodic in {each.pbc.tolist()}, want all three")
        if each.cell.rank < 3:
            raise Refused("not-periodic", f"crystal {at} has a cell of rank {each.cell.rank}, want 3")
        frac = each.cell.scaled_positions(each.positions)
        frac = np.where(np.abs(frac - np.rint(frac)) < ROUNDING, np.rint(frac), frac)
        parts.append((frac, np.array(each.cell[:], dtype=np.float64), each.numbers.astype(np.int64)))
    return _batch(parts)


def to_pyg(crystals: Crystals, edges: Edges | None = None) -> "list[Data]":
    """One Data each: frac_coords, lattice (1, 3, 3), atomic_numbers and, with edges, edge_index and image.

    edge_index is (neighbour, centre), PyG's source and target, so that messages flow to the centre. Dtype and
    device stay. `Batch.from_data_list` joins them.
    """
    from torch_geometric.data import Data

    ptr = crystals.ptr.tolist()
    spans = list(zip(ptr, ptr[1:], strict=False))
    data = [
        Data(
            frac_coords=crystals.frac_coords[i:j],
            lattice=crystals.lattice[b : b + 1],
            atomic_numbers=crystals.atomic_numbers[i:j],
            num_nodes=j - i,
        )
        for b, (i, j) in enumerate(spans)
    ]
    if edges is not None:
        owner = crystals.batch[edges.index[0]]
        order = owner.argsort(stable=True)
        sizes = torch.bincount(owner, minlength=len(crystals)).tolist()
        for each, mine, (first, _) in zip(data, order.split(sizes), spans, strict=True):
            each.edge_index = edges.index[:, mine].flip(0) - first
            each.image = edges.image[mine]
    return data


def from_pyg(data: "Data | Batch | Sequence[Data]") -> tuple[Crystals, Edges | None]:
    """Crystals, and edges where every Data has them, of a Data, a Batch or a list of Data as by `to_pyg`."""
    from torch_geometric.data import Batch, Data

    if isinstance(data, Batch):
        data = data.to_data_list()
    parts: list[Data] = [data] if isinstance(data, Data) else list(data)
    if not parts:
        raise ValueError("no crystals, want at least one")
    num_atoms = torch.tensor([len(each.atomic_numbers) for each in parts], device=parts[0].atomic_numbers.device)
    crystals = Crystals(
        torch.cat([each.frac_coords for each in parts]),
        torch.cat([each.lattice for each in parts]),
        torch.cat([each.atomic_numbers for each in parts]),
        num_atoms,
    )
    if any(each.edge_index is None or "image" not in each for each in parts):
        return crystals, None
    starts = crystals.ptr.tolist()
    index = torch.cat([each.edge_index.flip(0).T + start for each, start in zip(parts, starts, strict=False)]).T
    return crystals, Edges(index.contiguous(), torch.cat([each.image for each in parts]))
