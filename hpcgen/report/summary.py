"""What a store holds, counted in one pass at flat memory: elements, sizes, space groups, properties."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from hpcgen.crystal.crystals import Crystals
from hpcgen.errors import InputError
from hpcgen.metrics.coverage import density
from hpcgen.report.spread import Spread
from hpcgen.store.rows import Column, ColumnSpec, Rows

NUM_ELEMENTS = 118
SPACE_GROUP = "space_group"  # the column, international number
CRYSTAL_SYSTEMS = {  # first and last space-group number
    "triclinic": (1, 2),
    "monoclinic": (3, 15),
    "orthorhombic": (16, 74),
    "tetragonal": (75, 142),
    "trigonal": (143, 167),
    "hexagonal": (168, 194),
    "cubic": (195, 230),
}
_BLOCK = 65_536  # crystals counted at a time, which bounds the memory of one step


@dataclass
class ColumnCount:
    """What is known of one column. `spread` counts floats and integers, `true` booleans."""

    spec: ColumnSpec
    present: int = 0  # values that are there and finite
    true: int = 0
    spread: Spread = field(default_factory=Spread)

    def add(self, column: Column) -> None:
        """Count one block of the column."""
        there = ~column.missing
        if column.spec.kind == "float":
            there = there & np.isfinite(np.asarray(column.values, dtype=np.float64))
        self.present += int(there.sum())
        if column.spec.kind in ("float", "int"):
            self.spread.add(np.asarray(column.values)[there].astype(np.float64))
        elif column.spec.kind == "bool":
            self.true += int(np.asarray(column.values)[there].astype(bool).sum())

    def __add__(self, other: "ColumnCount") -> "ColumnCount":
        return ColumnCount(self.spec, self.present + other.present, self.true + other.true, self.spread + other.spread)


@dataclass
class Summary:
    """Counts over crystals. Filled block by block or as a sum of summaries: the result is the same."""

    crystals: int = 0
    atoms: int = 0
    with_element: np.ndarray = field(default_factory=lambda: _zeros(NUM_ELEMENTS + 1))  # crystals, by number
    of_size: np.ndarray = field(default_factory=lambda: _zeros(1))  # crystals, by number of atoms
    of_variety: np.ndarray = field(default_factory=lambda: _zeros(1))  # crystals, by number of elements
    in_space_group: np.ndarray = field(default_factory=lambda: _zeros(231))  # crystals; 0: not known
    density: Spread = field(default_factory=Spread)  # g/cm³
    volume_per_atom: Spread = field(default_factory=Spread)  # Å³
    columns: dict[str, ColumnCount] = field(default_factory=dict)
    rejects: Counter[str] = field(default_factory=Counter)  # rows turned away, by code

    @staticmethod
    def of(blocks: Iterable[Rows], rejects: Iterable[tuple[str, int]] = ()) -> "Summary":
        """Count all blocks, and the rows turned away as (code, count). Raises InputError."""
        summary = Summary()
        for rows in blocks:
            summary.add(rows)
        for code, count in rejects:
            summary.rejects[code] += count
        return summary

    def add(self, rows: Rows) -> None:
        """Count one block. Raises InputError where a column changes its kind or unit."""
        for name, column in rows.columns.items():
            self._count_of(name, column.spec).add(column)
        crystals = rows.crystals.to(dtype=torch.float64)
        for start in range(0, len(crystals), _BLOCK):
            self._add_block(crystals[start : start + _BLOCK])
        self.in_space_group += _space_groups(rows.columns.get(SPACE_GROUP), len(rows))

    def _add_block(self, crystals: Crystals) -> None:
        num_atoms = crystals.num_atoms.numpy()
        holds = np.zeros((len(crystals), NUM_ELEMENTS + 1), dtype=bool)  # (B, 119)
        holds[crystals.batch.numpy(), crystals.atomic_numbers.numpy()] = True
        dense = density(crystals)
        self.crystals += len(crystals)
        self.atoms += int(num_atoms.sum())
        self.with_element += holds.sum(0)
        self.of_size = _plus(self.of_size, np.bincount(num_atoms))
        self.of_variety = _plus(self.of_variety, np.bincount(holds.sum(1)))
        self.density.add(dense[np.isfinite(dense)])
        self.volume_per_atom.add(crystals.volume.numpy() / num_atoms)

    def _count_of(self, name: str, spec: ColumnSpec) -> ColumnCount:
        count = self.columns.setdefault(name, ColumnCount(spec))
        if count.spec != spec:
            raise InputError(f"column {name}: {_words(spec)} in one block, {_words(count.spec)} in another")
        return count

    def __add__(self, other: "Summary") -> "Summary":
        """Both together. Raises InputError where a column differs in kind or unit."""
        columns = {name: count + ColumnCount(count.spec) for name, count in self.columns.items()}
        both = Summary(
            crystals=self.crystals + other.crystals,
            atoms=self.atoms + other.atoms,
            with_element=self.with_element + other.with_element,
            of_size=_plus(self.of_size, other.of_size),
            of_variety=_plus(self.of_variety, other.of_variety),
            in_space_group=self.in_space_group + other.in_space_group,
            density=self.density + other.density,
            volume_per_atom=self.volume_per_atom + other.volume_per_atom,
            columns=columns,
            rejects=self.rejects + other.rejects,
        )
        for name, count in other.columns.items():
            both.columns[name] = both._count_of(name, count.spec) + count
        return both

    def missing(self, name: str) -> int:
        """Crystals without a (finite) value in the column."""
        return self.crystals - self.columns[name].present

    @property
    def in_crystal_system(self) -> dict[str, int]:
        """Crystals of each crystal system, by the column `space_group`."""
        return {
            name: int(self.in_space_group[first : last + 1].sum()) for name, (first, last) in CRYSTAL_SYSTEMS.items()
        }

    @property
    def has_space_groups(self) -> bool:
        """Whether the space group of any crystal is known."""
        return bool(self.in_space_group[1:].any())


def _space_groups(column: Column | None, crystals: int) -> np.ndarray:
    """Crystals by space-group number; all that is no number from 1 to 230 is 0. (231,)."""
    if column is None or column.spec.kind not in ("int", "float"):
        return np.bincount(np.zeros(crystals, dtype=np.int64), minlength=231)
    values = np.asarray(column.values, dtype=np.float64)
    good = ~column.missing & (values >= 1) & (values <= 230) & (values == np.round(values))
    return np.bincount(np.where(good, values, 0).astype(np.int64), minlength=231)


def _zeros(length: int) -> np.ndarray:
    return np.zeros(length, dtype=np.int64)


def _plus(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Sum of two counts of different length."""
    total = _zeros(max(len(first), len(second)))
    total[: len(first)] += first
    total[: len(second)] += second
    return total


def _words(spec: ColumnSpec) -> str:
    return f"{spec.kind} in {spec.unit}" if spec.unit else spec.kind
