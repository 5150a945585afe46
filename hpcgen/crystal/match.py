"""Whether two crystals are the same, with the meaning of pymatgen's StructureMatcher."""

import math
from collections import Counter
from dataclasses import dataclass

from hpcgen.crystal.convert import from_pymatgen, to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.outline import Outline, same


@dataclass(frozen=True)
class Matcher:
    """StructureMatcher (Ong et al., Comput. Mater. Sci. 68, 314, 2013) at stated tolerances, volumes scaled.

    Reducing a crystal costs as much as comparing two, so it is done once per crystal, by `reduced_cell`.
    """

    ltol: float = 0.2  # relative, cell lengths
    stol: float = 0.3  # in units of (volume per atom)^(1/3)
    angle_tol: float = 5.0  # degrees

    def same(self, one: Outline, other: Outline) -> bool:
        """Whether `fit(one, other)` of two reduced cells holds; never with different numbers of sites."""
        return same(one, other, self.ltol, self.stol, self.angle_tol)


def reduced_cell(crystal: Crystals) -> Crystals:
    """The one crystal of a batch of 1 as StructureMatcher compares it: primitive within 0.25 Å, Niggli-reduced.

    Where the numbers of atoms of its elements have no common factor, no smaller cell exists and none is looked for.
    """
    structure = to_pymatgen(crystal)[0].get_reduced_structure("niggli")
    if math.gcd(*Counter(crystal.atomic_numbers.tolist()).values()) > 1:
        structure = structure.get_primitive_structure()
    return from_pymatgen([structure])
