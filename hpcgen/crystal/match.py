"""What "the same crystal" means: pymatgen's StructureMatcher, and the reduced cells that it compares."""

from dataclasses import dataclass

from hpcgen.crystal.check import one_crystal
from hpcgen.crystal.convert import from_pymatgen, to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.primitive import may_be_smaller


@dataclass(frozen=True)
class Matcher:
    """StructureMatcher (Ong et al., Comput. Mater. Sci. 68, 314, 2013) at stated tolerances, volumes scaled.

    It reduces crystals (`reduced_cell`) and compares the reduced ones (crystal/superpose.py).
    """

    ltol: float = 0.2  # relative, cell lengths
    stol: float = 0.3  # in units of (volume per atom)^(1/3)
    angle_tol: float = 5.0  # degrees


def reduced_cell(crystal: Crystals) -> Crystals:
    """The one crystal of a batch of 1 as StructureMatcher compares it: Niggli-reduced, primitive within 0.25 Å.

    A smaller cell is looked for only where there may be one.
    """
    from pymatgen.core import Lattice

    given, numbers = crystal.lattice[0].double().numpy(), crystal.atomic_numbers.numpy()
    frac = crystal.frac_coords.double().numpy()
    lattice = Lattice(given)
    niggli = lattice.get_niggli_reduced_lattice()
    if niggli != lattice:  # within rounding
        frac = niggli.get_fractional_coords(lattice.get_cartesian_coords(frac)) % 1
        lattice = niggli
    reduced = one_crystal(frac, lattice.matrix.copy(), numbers)
    if may_be_smaller(lattice.matrix, frac, numbers):
        return from_pymatgen([to_pymatgen(reduced)[0].get_primitive_structure()])
    return reduced
