"""Settings of building a store. Together with the source they determine every byte of it."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from hpcgen.errors import UsageError


def _setting(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass(frozen=True)
class BuildSettings:
    """How rows of a source become shards. The defaults are for bulk crystals of up to some hundred atoms."""

    max_atoms: int = _setting(1000, "refuse cells with more atoms than this, as given and after reduction")
    min_distance: float = _setting(0.5, "refuse crystals with two atoms (or an atom and its image) closer, in Å")
    symprec: float = _setting(0.01, "tolerance of the symmetry search and of symmetrising, in Å")
    purify: bool = _setting(True, "symmetrise within symprec and take the primitive cell")
    niggli: bool = _setting(True, "take the Niggli-reduced cell")
    edges: str = _setting("radius", "edges kept in the store", ("radius", "nearest", "none"))
    cutoff: float = _setting(6.0, "cut-off of radius edges, in Å")
    neighbours: int = _setting(12, "number of nearest neighbours of nearest edges")
    magpie: bool = _setting(False, "add the 132 Magpie composition features as columns")
    duplicates: str = _setting(
        "drop",
        "drop duplicates, keep them on one side of the split, or do not look for them",
        ("drop", "keep", "ignore"),
    )
    ltol: float = _setting(0.2, "duplicates: StructureMatcher's relative length tolerance")
    stol: float = _setting(0.3, "duplicates: StructureMatcher's site tolerance, in units of (volume/atom)^(1/3)")
    angle_tol: float = _setting(5.0, "duplicates: StructureMatcher's angle tolerance, in degrees")
    split: str = _setting("0.8,0.1,0.1", "shares of train, val and test; `source` for the source's own; `none`")
    seed: int = _setting(0, "seed of the split and of random orderings")
    block_rows: int = _setting(512, "rows of the source parsed as one unit of work and of retry")
    shard_crystals: int = _setting(4096, "crystals in a shard file")

    def preload(self) -> tuple[str, ...]:
        """Modules that the workers of a build import once, before they are forked."""
        always = ("hpcgen.store.parse", "hpcgen.store.gather", "hpcgen.crystal.cif")
        compared = ("hpcgen.store.duplicates", "pymatgen.analysis.structure_matcher")
        return always + (compared if self.duplicates != "ignore" else ())

    def checked(self) -> "BuildSettings":
        """These settings, if each is in its range. Raises UsageError naming the one that is not."""
        for name in (
            "max_atoms",
            "min_distance",
            "symprec",
            "cutoff",
            "neighbours",
            "ltol",
            "stol",
            "angle_tol",
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} = {value}: want a number above 0")
        for name in ("block_rows", "shard_crystals"):
            if not getattr(self, name) >= 1:
                raise UsageError(f"{name} = {getattr(self, name)}: want at least 1")
        if self.seed < 0:
            raise UsageError(f"seed = {self.seed}: want 0 or more")
        for setting in dataclasses.fields(self):
            choices = setting.metadata["choices"]
            if choices and getattr(self, setting.name) not in choices:
                raise UsageError(f"{setting.name} = {getattr(self, setting.name)}: want one of {', '.join(choices)}")
        self.shares()
        return self

    def shares(self) -> dict[str, float] | None:
        """Share of each split, summing to 1; None where the source brings its own split or there is none."""
        if self.split in ("source", "none"):
            return None
        try:
            parts = [float(word) for word in self.split.split(",")]
        except ValueError:
            parts = []
        if len(parts) != 3 or not all(0 <= part <= 1 for part in parts) or not abs(sum(parts) - 1) < 1e-9:
            raise UsageError(
                f"split = {self.split}: want three shares that sum to 1, as 0.8,0.1,0.1, or source, or none"
            )
        return dict(zip(("train", "val", "test"), parts, strict=True))
