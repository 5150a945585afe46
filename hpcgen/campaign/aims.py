"""What a run was asked for beside crystals: conditions, a property to be optimised, candidates to be found early."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcgen.campaign.pairs import campaign_of
from hpcgen.campaign.request import Request
from hpcgen.errors import InputError
from hpcgen.metrics.summary import Table
from hpcgen.metrics.targeted import condition_figures, recall_figures, success_figures
from hpcgen.store.layout import read_manifest
from hpcgen.store.read import Store

START = "start"  # column that groups the candidates of a property optimisation
NUMBERS = ("float", "int")


@dataclass(frozen=True)
class Aims:
    """Columns of the N crystals of a run that are evaluated, read before anything is measured."""

    request: Request
    asked: Mapping[str, float] = field(default_factory=dict)  # of each condition
    obtained: Mapping[str, np.ndarray] = field(default_factory=dict)  # (N,), nan where unknown; of those with a column
    values: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (N,) the property
    ranks: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (N,)
    starts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))  # (N,)
    grouped_by: str | None = None
    known: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (M,) the property in the reference

    @staticmethod
    def read(request: Request, count: int, reference: Store | None) -> "Aims":
        """Of the first `count` crystals. Raises InputError for a column that is missing, or without numbers."""
        told: dict[str, Any] = {}
        specs = read_manifest(request.run).head.columns
        if request.task == "generate":
            told["asked"] = _conditions(request.run)
            there = [name for name in told["asked"] if name in specs and specs[name].kind in NUMBERS]
            told["obtained"] = {name: _numbers(request.run, name, count) for name in there}
        if request.property is not None:
            told["values"] = _numbers(request.run, _bare(request.property), count)
        if request.rank_by is not None:
            told["ranks"] = _numbers(request.run, _bare(request.rank_by), count)
        if request.task == "optimize" and reference is not None and request.property is not None:
            told["known"] = _numbers(reference.path, _bare(request.property), len(reference), request.split)
            if not np.isfinite(told["known"]).any():
                name = _bare(request.property)
                raise InputError(f"{reference.path}: column {name!r} has no value, want some to take percentiles of")
            told["grouped_by"] = request.start or (START if START in specs else None)
            told["starts"] = _starts(request.run, told["grouped_by"], count)
        return Aims(request, **told)

    def figures(self, table: Table, asked: int) -> dict[str, Any]:
        """What was reached of what was asked."""
        request, figures = self.request, {}
        if self.asked:
            figures["conditions"] = condition_figures(self.asked, self.obtained, request.seed)
        if request.rank_by is not None and request.property is not None:
            found = recall_figures(
                self.values, self.ranks, k=request.recall_at, top=request.recall_of, seed=request.seed,
                highest=(_more(request.property), _more(request.rank_by)),
            )  # fmt: skip
            figures["recall_at_k"] = found | {"property": request.property, "rank_by": request.rank_by}
        if request.task == "optimize" and request.property is not None:
            found = success_figures(
                self.values, table.flag("valid"), self.starts, self.known, asked=asked, seed=request.seed,
                highest=_more(request.property),
            )  # fmt: skip
            figures["success"] = found | {"property": _bare(request.property), "grouped_by": self.grouped_by}
        return figures


def _conditions(run: Path) -> dict[str, float]:
    """Of the campaign that made a run, if that is known."""
    with suppress(InputError):  # of another version of this package
        campaign = campaign_of(run)
        return dict(campaign.conditions) if campaign is not None else {}
    return {}


def _numbers(store: Path, name: str, count: int, split: str | None = None) -> np.ndarray:
    """The first values of a column, nan where there is none. Raises InputError. (count,) float64"""
    specs = read_manifest(store).head.columns
    if name not in specs:
        raise InputError(f"{store}: no column {name!r}; the store has: {', '.join(specs) or 'none'}")
    if specs[name].kind not in NUMBERS:
        raise InputError(f"{store}: column {name!r} is of kind {specs[name].kind}, want numbers")
    if not count:
        return np.zeros(0)
    column = Store(store, split, columns=[]).column(name)
    return np.where(column.missing, np.nan, column.values.astype(np.float64))[:count]


def _starts(run: Path, name: str | None, count: int) -> np.ndarray:
    """Number of the start of each crystal: each its own without a column, or where that has no value. (count,) int64"""
    if name is None or not count:
        return np.arange(count)
    column = Store(run, columns=[]).column(name)
    names = [str(at) if missing else f"={value}" for at, (value, missing) in
             enumerate(zip(column.values[:count].tolist(), column.missing[:count].tolist(), strict=True))]  # fmt: skip
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _bare(name: str) -> str:
    return name.removeprefix("-")


def _more(name: str) -> bool:
    return name.startswith("-")
