"""Metrics of every crystal, block by block: one row of a table per crystal with every flag and value."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcgen.campaign.pairs import Pairs
from hpcgen.crystal.composition import reduced_formula
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.bond_valence import neutral
from hpcgen.metrics.bonds import bonds
from hpcgen.metrics.charge_balance import charge_balanced
from hpcgen.metrics.match import Comparison, Match
from hpcgen.metrics.validity import random_coordinates, validity
from hpcgen.runner.blocks import Block
from hpcgen.runner.worker import Cursor
from hpcgen.store.read import Store

OWN = (
    "id", "formula", "num_atoms", "volume_per_atom", "distances", "distances_with_images", "radii", "composition",
    "neutral", "bonds", "sound_bonds", "lonely_atoms",
)  # fmt: skip
PAIRED = (
    "asked_for",
    "line",
    "sample",
    "target",
    "target_valid",
    "candidates",
    "matched",
    "rms",
    "matched_strict",
    "met",
)
NO_TARGET = "no-target"
_ODD = (ValueError, ArithmeticError, LookupError, RuntimeError, TypeError, AttributeError)  # pymatgen's on odd cells


def header(predicts: bool) -> list[str]:
    """Columns of the table."""
    return [*OWN, *(PAIRED if predicts else ()), "reason"]


def own_values(crystals: Crystals, ids: list[str]) -> list[dict[str, Any]]:
    """What is known of each crystal by itself."""
    found = validity(crystals)
    numbers = [part.tolist() for part in crystals.atomic_numbers.split(crystals.num_atoms.tolist())]
    volumes = (crystals.volume / crystals.num_atoms).tolist()
    bonded = _bonded(crystals, found.distances_with_images)
    return [
        {
            "id": ids[k],
            "formula": reduced_formula(numbers[k]),
            "num_atoms": len(numbers[k]),
            "volume_per_atom": f"{volumes[k]:.6g}",
            "distances": int(found.distances[k]),
            "distances_with_images": int(found.distances_with_images[k]),
            "radii": int(found.radii[k]),
            "composition": int(charge_balanced(numbers[k])),
            **bonded.get(k, {"neutral": 0}),
            "reason": "",
        }
        for k in range(len(crystals))
    ]


def _bonded(crystals: Crystals, whole: np.ndarray) -> dict[int, dict[str, int | str]]:
    """Bonds and charges of the crystals that are `whole` (B,), by their place: collapsed ones are beyond counting."""
    places = np.flatnonzero(whole)
    if not len(places):
        return {}
    some = crystals[torch.from_numpy(places)]
    found, charges = bonds(some), neutral(some)
    columns = {"bonds": found.counts()[0], "sound_bonds": found.counts()[1], "lonely_atoms": found.lonely}
    told: dict[int, dict[str, int | str]] = {}
    for at, place in enumerate(places.tolist()):
        told[place] = {name: int(values[at]) for name, values in columns.items()}
        told[place]["neutral"] = "" if np.isnan(charges[at]) else int(charges[at])
    return told


def control_rows(reference: Store, count: int, seed: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Values of up to `count` crystals of the reference, real and with random coordinates. A function of `seed`."""
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(reference))[:count]
    rows = reference.rows(np.sort(chosen))
    yield "real", own_values(rows.crystals, list(rows.ids))
    yield "random", own_values(random_coordinates(rows.crystals, seed), list(rows.ids))


@dataclass(frozen=True)
class MeasureBlock:
    """Work of the runner: the rows of the table for one block of crystals, as CSV without a header."""

    run: Path
    block_rows: int
    reference: tuple[Path, str | None] | None = None  # store and split to compare with
    pairs: Path | None = None
    comparison: Comparison = field(default_factory=Comparison)

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
        start = block.index * self.block_rows
        rows = Store(self.run, dtype=None, columns=[]).rows(range(start, start + block.size))
        values = own_values(rows.crystals, list(rows.ids))
        if self.pairs is not None:
            self._compare(rows.crystals, values, start, cursor)
        with draft.open("w", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, header(self.pairs is not None), lineterminator="\n").writerows(values)
        return {"measured": len(values)}

    def _compare(self, crystals: Crystals, values: list[dict[str, Any]], start: int, cursor: Cursor) -> None:
        """Add to `values` how each crystal matches its candidates."""
        assert self.pairs is not None and self.reference is not None
        pairs = Pairs.load(self.pairs)
        path, split = self.reference
        first = pairs.ptr[start : start + len(values) + 1].tolist()
        candidates = pairs.candidates[first[0] : first[-1]]
        targets = Store(path, split, dtype=None, columns=[]).rows(candidates)
        valid = validity(targets.crystals).distances
        for at, value in enumerate(values):
            places = range(first[at] - first[0], first[at + 1] - first[0])
            value.update({name: getattr(pairs, name)[start + at] for name in ("asked_for", "line", "sample")})
            value["candidates"] = len(places)
            matches = self._matches(crystals[at], targets.crystals, places, value, at, cursor)
            nearest = min(matches, key=lambda place: matches[place].rms, default=next(iter(places), None))
            match = matches.get(nearest) if nearest is not None else None
            value["met"] = " ".join(f"{candidates[place]}:{met.rms!r}" for place, met in matches.items())
            if nearest is not None:
                value["target"] = targets.ids[nearest]
                target_valid = valid[nearest] and charge_balanced(targets.crystals[nearest].atomic_numbers)
                value["target_valid"] = int(target_valid)
                value["matched"] = int(match is not None)
            if match is not None:
                value.update(rms=repr(match.rms), matched_strict=int(match.strict))
        cursor.rest()

    def _matches(
        self, crystal: Crystals, targets: Crystals, places: range, value: dict[str, Any], at: int, cursor: Cursor
    ) -> dict[int, Match]:
        """The candidates that are matched, by their places; a failure is noted in `value`."""
        found: dict[int, Match] = {}
        if not places:
            value["reason"] = NO_TARGET
        for place in places:
            cursor.at(at)
            if at in cursor.culprits:
                value["reason"] = cursor.culprits[at]
                break
            try:
                match = self.comparison.match(crystal, targets[place])
            except _ODD as fault:
                value["reason"] = f"{type(fault).__name__}: {' '.join(str(fault).split())}"[:200]
                continue
            if match is not None:
                found[place] = match
        return found
