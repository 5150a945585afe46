"""What a model is given to learn from: some crystals of a store, and the numbers that decide their noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcgen.crystal.crystals import Crystals
from hpcgen.store.rows import Rows


@dataclass(frozen=True)
class Batch:
    """B crystals of one training step, on the device of the model."""

    crystals: Crystals  # float32
    index: Tensor  # (B,) int64: which samples of the training set they are
    step: int  # of the training; noise is a function of (seed, step, index)
    conditions: Mapping[str, Tensor] = field(default_factory=dict)  # (B,) float32, NaN where missing

    @staticmethod
    def of(
        rows: Rows,
        index: Tensor,
        step: int,
        conditions: Sequence[str] = (),
        device: torch.device | str = "cpu",
    ) -> "Batch":
        """Rows of a store with the named columns as conditions; a column that is missing somewhere is NaN there."""
        told = {
            name: torch.from_numpy(rows.columns[name].values.astype("float32")).to(device).masked_fill_(
                torch.from_numpy(rows.columns[name].missing).to(device), float("nan"))
            for name in conditions
        }  # fmt: skip
        return Batch(rows.crystals.to(device, torch.float32), index.to(device), step, told)

    def __len__(self) -> int:
        return len(self.crystals)
