"""Structure prediction: does a crystal match its target, and how well? The numbers of CDVAE, DiffCSP and their kin."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from hpcgen.crystal.composition import formula_key
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals


@dataclass(frozen=True)
class Match:
    """How a predicted crystal matches a target."""

    rms: float  # root mean square distance of the sites in units of (V/N)^(1/3)
    strict: bool  # also within the stricter tolerances


@dataclass(frozen=True)
class Tolerances:
    """Of pymatgen's StructureMatcher, which makes cells primitive and scales them to one volume."""

    ltol: float  # relative, cell lengths
    stol: float  # in units of (V/N)^(1/3)
    angle_tol: float  # degrees


PEERS = Tolerances(ltol=0.3, stol=0.5, angle_tol=10.0)  # all published match rates
STRICT = Tolerances(ltol=0.2, stol=0.3, angle_tol=5.0)  # pymatgen's own defaults, reported beside


@dataclass(frozen=True)
class Comparison:
    """Compares predicted crystals with their targets."""

    tolerances: Tolerances = PEERS
    strict: Tolerances = STRICT

    def match(self, predicted: Crystals, target: Crystals) -> Match | None:
        """Of two batches of 1; None where they do not match. The rms is that of `get_rms_dist(predicted, target)`.

        Different reduced compositions never match, and are not looked at. Raises what pymatgen raises on odd cells.
        """
        if formula_key(predicted.atomic_numbers) != formula_key(target.atomic_numbers):
            return None
        _forget_reduced_cells()
        one, other = to_pymatgen(Crystals.cat([part.to("cpu") for part in (predicted, target)]))
        found = self._matcher.get_rms_dist(one, other)
        if found is None:
            return None
        return Match(float(found[0]), bool(self._strict_matcher.fit(one, other)))

    @cached_property
    def _matcher(self) -> Any:
        return _matcher(self.tolerances)

    @cached_property
    def _strict_matcher(self) -> Any:
        return _matcher(self.strict)


def _forget_reduced_cells() -> None:
    """Newer versions of pymatgen keep reduced cells and take one that agrees within 1e-5: an rms would depend on what
    the process compared before, and so on the number of processes."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    forget = getattr(getattr(StructureMatcher, "_get_reduced_istructure", None), "cache_clear", None)
    if forget is not None:
        forget()


def _matcher(tolerances: Tolerances) -> Any:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(**asdict(tolerances))
