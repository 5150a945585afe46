"""Uniqueness, novelty and stability of the crystals of a run, as columns beside their table."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from hpcgen.metrics.cells import Sets
from hpcgen.metrics.nearest import Nearest, find_nearest
from hpcgen.metrics.novelty import RESTS_ON, SCREENED
from hpcgen.metrics.same import MATCHERS, NONE, Same, find_same
from hpcgen.runner.blocks import How, once
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.store.layout import read_manifest
from hpcgen.store.read import Store


def measure_novelty(sets: Sets, work: Path, *, lease: Lease, stop: StopFlag, how: How) -> Path:
    """The columns of metrics.novelty.COLUMNS for each crystal, as CSV without a header, in the folder `work`."""
    table = work / "novelty.csv"
    same = find_same(sets, work, lease=lease, stop=stop, how=how)
    near = find_nearest(sets, work, lease=lease, stop=stop, how=how) if sets.reference is not None else []
    once(table, lambda draft: _write(draft, sets, same, near), lease=lease, stop=stop)
    return table


def screened(run: Path) -> dict[str, dict[str, str]]:
    """Of each column that a screen wrote, of those that this store has: its unit, and what its values rest on.

    A screen records the latter in the settings of the store, by column:
    `screened: {e_above_hull: {potential: CHGNet 0.3.0, hull: …}, energy: {potential: …}}`.
    """
    head = read_manifest(run).head
    recorded = head.settings.get("screened")
    found = {}
    for name, spec in head.columns.items():
        if name in SCREENED and spec.kind == "float":
            own = recorded.get(name) if isinstance(recorded, Mapping) else None
            told = {what: str(own[what]) for what in RESTS_ON if own.get(what)} if isinstance(own, Mapping) else {}
            found[name] = {"unit": spec.unit, **told}
    return found


def _write(draft: Path, sets: Sets, same: Path, near: list[Path]) -> None:
    with draft.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(_rows(sets, Same.load(same), near))


def _rows(sets: Sets, same: Same, near: list[Path]) -> Iterator[list[str]]:
    """The columns of each crystal, '' where there is no value."""
    store = Store(sets.run, dtype=None)
    ids = store.ids
    known = Store(sets.reference, sets.split, dtype=None).ids if sets.reference is not None else []
    nearest = Nearest.load(near) if near else None
    numbers = {name: store.column(name).values for name in screened(sets.run)}
    for k in range(sets.count):
        row = []
        for t in range(len(MATCHERS)):
            earlier = int(same.earlier[k, t])
            row.append("0" if earlier != NONE else "1" if same.compared[k, 0, t] else "")
            row.append(ids[earlier] if earlier != NONE else "")
            row += _novelty(same, k, t, known) if known else ["", ""]
        likeness = nearest.similarity[k] if nearest is not None else np.nan
        row += [known[nearest.place[k]] if nearest is not None and likeness > 0 else "", _number(likeness)]
        yield [*row, *(_number(numbers[name][k]) if name in numbers else "" for name in SCREENED)]


def _novelty(same: Same, k: int, t: int, known: list[str]) -> list[str]:
    """Its class, and the one of the reference that it is the same as."""
    if same.unknown[k]:
        return ["unknown", ""]
    if same.known[k, t] != NONE:
        return ["known", known[same.known[k, t]]]
    return ["novel" if same.compared[k, 1, t] else "not-compared", ""]


def _number(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else ""
