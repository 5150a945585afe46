"""Whether two crystals are the same, with the meaning of pymatgen's StructureMatcher."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpcgen.crystal.convert import from_pymatgen, to_pymatgen
from hpcgen.crystal.crystals import Crystals


@dataclass(frozen=True)
class Matcher:
    """StructureMatcher (Ong et al., Comput. Mater. Sci. 68, 314, 2013) at stated tolerances, volumes scaled.

    Reducing a crystal costs as much as comparing two, so it is done once per crystal, by `reduced_cell`.
    """

    ltol: float = 0.2  # relative, cell lengths
    stol: float = 0.3  # in units of (volume per atom)^(1/3)
    angle_tol: float = 5.0  # degrees

    @cached_property
    def _matcher(self) -> Any:
        from pymatgen.analysis.structure_matcher import StructureMatcher

        return StructureMatcher(ltol=self.ltol, stol=self.stol, angle_tol=self.angle_tol)

    def same(self, one: Any, other: Any) -> bool:
        """Whether two pymatgen structures in reduced cells match; never with different numbers of sites."""
        if len(one) != len(other):
            return False
        return bool(self._matcher.fit(one, other, skip_structure_reduction=True))


def reduced_cell(crystal: Crystals) -> Crystals:
    """The one crystal of a batch of 1 as StructureMatcher compares it: primitive within 0.25 Å, Niggli-reduced."""
    structure = to_pymatgen(crystal)[0].get_reduced_structure("niggli").get_primitive_structure()
    return from_pymatgen([structure])
