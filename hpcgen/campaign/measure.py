"""Metrics of every crystal, block by block: one row of a table per crystal with every flag and value."""

import csv
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcgen.crystal.composition import formula_key, reduced_formula
from hpcgen.crystal.crystals import Crystals
from hpcgen.errors import InputError
from hpcgen.metrics.charge_balance import charge_balanced
from hpcgen.metrics.match import Comparison, Match
from hpcgen.metrics.validity import random_coordinates, validity
from hpcgen.runner.blocks import Block
from hpcgen.runner.worker import Cursor
from hpcgen.store.arrays import pointers
from hpcgen.store.read import Store

OWN = ("id", "formula", "num_atoms", "volume_per_atom", "distances", "distances_with_images", "radii", "composition")
PAIRED = ("asked_for", "sample", "target", "target_valid", "candidates", "matched", "rms", "matched_strict")
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
            "reason": "",
        }
        for k in range(len(crystals))
    ]


def control_rows(reference: Store, count: int, seed: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Values of up to `count` crystals of the reference, real and with random coordinates. A function of `seed`."""
    chosen = np.random.Generator(np.random.Philox(seed)).permutation(len(reference))[:count]
    rows = reference.rows(np.sort(chosen))
    yield "real", own_values(rows.crystals, list(rows.ids))
    yield "random", own_values(random_coordinates(rows.crystals, seed), list(rows.ids))


@dataclass(frozen=True)
class Pairs:
    """Which crystals of the reference each of N generated ones is compared with."""

    by: str  # in words
    asked_for: np.ndarray  # (N,) str: the id of the target, or formula and number of atoms
    sample: np.ndarray  # (N,) int64: how many before it were asked for the same
    ptr: np.ndarray  # (N + 1,) int64: first candidate of each, and the end
    candidates: np.ndarray  # (C,) int64: places in the reference

    def save(self, draft: Path) -> None:
        """Write the file that workers read."""
        with draft.open("wb") as file:
            np.savez(file, **vars(self))

    @staticmethod
    def load(path: Path) -> "Pairs":
        """What `save` wrote."""
        with np.load(path) as known:
            return Pairs(str(known["by"]), *(known[name] for name in ("asked_for", "sample", "ptr", "candidates")))


def pairs_by_target(run: Store, reference: Store, count: int) -> Pairs:
    """Each of the first `count` crystals with the one of the reference whose id stands in its column `target`.

    Raises InputError if none of them is in the reference.
    """
    column = run.column("target")
    targets = np.where(column.missing, "", column.values)[:count].astype(str)
    place = {id: at for at, id in enumerate(reference.ids)}
    found = np.array([place.get(id, -1) for id in targets.tolist()], dtype=np.int64)
    if not (found >= 0).any():
        raise InputError(
            f"{run.path}: no target is a crystal of {reference.path}"
            f"{f', split {reference.split}' if reference.split else ''}; the first is {targets[0]!r}"
        )
    return Pairs("by target id", targets, _ordinals(targets), pointers(found >= 0), found[found >= 0])


def pairs_by_composition(run: Store, reference: Store, count: int) -> Pairs:
    """Each of the first `count` crystals with every one of the reference of its reduced composition and size.

    Raises InputError if there is none for any of them.
    """
    known = defaultdict(list)
    for at, key in enumerate(_compositions(reference)):
        known[key].append(at)
    asked_for = list(itertools.islice(_compositions(run), count))
    found = [known.get(key, []) for key in asked_for]
    if not any(found):
        raise InputError(
            f"{run.path}: no crystal has the composition and the number of atoms of one of {reference.path}; "
            f"the first is {run.ids[0]!r}, {asked_for[0]}"
        )
    names = np.array(asked_for)
    flat = np.array(list(itertools.chain.from_iterable(found)), dtype=np.int64)
    by = "by reduced composition and number of atoms, with every such crystal of the reference, the nearest counting"
    return Pairs(by, names, _ordinals(names), pointers(np.array([len(some) for some in found])), flat)


def _compositions(store: Store) -> Iterator[str]:
    for rows in Store(store.path, store.split, columns=[]).iter_rows():
        for numbers in rows.crystals.atomic_numbers.split(rows.crystals.num_atoms.tolist()):
            yield f"{formula_key(numbers)}, {len(numbers)} atoms"


def _ordinals(names: np.ndarray) -> np.ndarray:
    """How many equal names stand before each. (N,) -> (N,) int64."""
    _, group = np.unique(names, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    ordinals = np.empty(len(names), dtype=np.int64)
    ordinals[order] = np.arange(len(names)) - np.repeat(starts, np.diff([*starts, len(names)]))
    return ordinals


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
            value.update(asked_for=pairs.asked_for[start + at], sample=pairs.sample[start + at], candidates=len(places))
            nearest, match = self._nearest(crystals[at], targets.crystals, places, value, at, cursor)
            if nearest is not None:
                value["target"] = targets.ids[nearest]
                target_valid = valid[nearest] and charge_balanced(targets.crystals[nearest].atomic_numbers)
                value["target_valid"] = int(target_valid)
                value["matched"] = int(match is not None)
            if match is not None:
                value.update(rms=repr(match.rms), matched_strict=int(match.strict))
        cursor.rest()

    def _nearest(
        self, crystal: Crystals, targets: Crystals, places: range, value: dict[str, Any], at: int, cursor: Cursor
    ) -> tuple[int | None, Match | None]:
        """The candidate of lowest rms, else the first, and the match; a failure is noted in `value`."""
        if not places:
            value["reason"] = NO_TARGET
            return None, None
        nearest, best = places[0], None
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
            if match is not None and (best is None or match.rms < best.rms):
                nearest, best = place, match
        return nearest, best
