"""Rows of a store in memory: crystals with ids, typed columns and, where asked for, edges. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hpcgen.store.layout import KINDS, ColumnSpec

if TYPE_CHECKING:
    from hpcgen.crystal.crystals import Crystals
    from hpcgen.crystal.neighbours import Edges

__all__ = ["KINDS", "Column", "ColumnSpec", "Rows"]


@dataclass(frozen=True)
class Column:
    """One value per crystal. Where `missing` is True the value means nothing (NaN, 0, False or '')."""

    spec: ColumnSpec
    values: np.ndarray  # (B,) float64, int64, bool or str (dtype object)
    missing: np.ndarray  # (B,) bool


@dataclass(frozen=True)
class Rows:
    """B crystals with what is known of them, in order."""

    crystals: "Crystals"
    ids: Sequence[str]
    columns: Mapping[str, Column] = field(default_factory=dict)
    edges: "Edges | None" = None  # atom indices count through the whole batch, as in Crystals

    def __len__(self) -> int:
        return len(self.crystals)
