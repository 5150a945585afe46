"""What a model is given to learn from: some crystals of a store, and the numbers that decide their noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcgen.crystal.crystals import Crystals
from hpcgen.diffusion.draw import Draw
from hpcgen.store.rows import Rows


@dataclass(frozen=True)
class Origin:
    """The chance that B crystals of a campaign were made of."""

    draw: Draw
    index: Tensor  # (B,) int64, of the crystals in their campaign


@dataclass(frozen=True)
class Batch:
    """B crystals of one training step, on the device of the model."""

    crystals: Crystals  # float32
    index: Tensor  # (B,) int64: which samples of the training set they are
    step: int  # of the training; noise is a function of (seed, step, index)
    conditions: Mapping[str, Tensor] = field(default_factory=dict)  # (B,) float32, NaN where missing
    origin: Origin | None = None  # learned with the noise they were made of, not with any

    @staticmethod
    def of(
        rows: Rows,
        index: Tensor,
        step: int,
        conditions: Sequence[str] = (),
        device: torch.device | str = "cpu",
        made_with: Draw | None = None,
    ) -> "Batch":
        """Rows of a store with the named columns as conditions; a column that is missing somewhere is NaN there.

        made_with: the chance of the campaign that the rows are of.
        """
        told = {
            name: torch.from_numpy(rows.columns[name].values.astype("float32")).to(device).masked_fill_(
                torch.from_numpy(rows.columns[name].missing).to(device), float("nan"))
            for name in conditions
        }  # fmt: skip
        origin = None
        if made_with is not None:
            origin = Origin(made_with, torch.from_numpy(rows.columns["index"].values.astype("int64")).to(device))
        return Batch(rows.crystals.to(device, torch.float32), index.to(device), step, told, origin)

    def __len__(self) -> int:
        return len(self.crystals)
