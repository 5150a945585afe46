"""Stable, unique, novel: figures from the columns of the per-crystal table, each with a bootstrap interval."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hpcgen.metrics.bootstrap import mean, share
from hpcgen.metrics.same import MATCHERS
from hpcgen.metrics.words import mean_told, share_told

STABLE, METASTABLE = 0.0, 0.1  # eV/atom above the hull, at most
LOW = 0.5  # and below this: AutoPeri's limit of an unrelaxed crystal
RESTS_ON = ("potential", "hull")  # of a column that a screen wrote, if it says so
KINDS = ("novel", "known", "unknown", "not-compared")
SCREENED = ("e_above_hull", "energy")  # columns of a store that a screen writes
COLUMNS = (
    *(f"{name}{end}" for end in ("", "_strict") for name in ("unique", "duplicate_of", "novelty", "known_as")),
    *("nearest", "similarity", *SCREENED),
)
DEFINITIONS = {
    "unique": "crystals that StructureMatcher matches to no earlier one of the run, over all asked",
    "novel": "crystals of elements that the reference has, which it matches to none of the reference, over all asked",
    "known": "crystals that it matches to one of the reference, over all asked",
    "unknown": "crystals with an element that no crystal of the reference has: neither known nor novel; over all asked",
    "not-compared": "crystals without a match, of which a comparison failed or took too long: neither unique nor novel",
    "valid_unique_novel": "unique, novel and valid, over all asked",
    "sun": f"unique, novel and at most {STABLE:g} eV/atom above the hull (column e_above_hull), over all asked; a "
    "crystal without a value counts as not stable",
    "metastable_sun": f"the same with at most {METASTABLE:g} eV/atom",
    "stability": f"at most {STABLE:g} (stable), at most {METASTABLE:g} (metastable) and below {LOW:g} eV/atom (low, "
    "AutoPeri's limit of an unrelaxed crystal) above the hull by the column e_above_hull, over all asked; potential "
    "and hull: what these values rest on, as the store has recorded it",
    "similarity": "mean of the largest Tanimoto coefficient with a crystal of the reference: counts of neighbours by "
    "pair of elements and distance, up to 3 (V/N)^(1/3)",
}
_LINES = {
    "unique": "unique", "novel": "novel", "known": "known", "unknown": "elements unknown", "not-compared":
    "not compared", "unique_novel": "unique and novel", "valid_unique_novel": "valid, unique, novel",
    "sun": "stable, unique, novel", "metastable_sun": "metastable, unique, novel",
}  # fmt: skip


class Verdicts:
    """The columns of the table, N crystals."""

    def __init__(self, rows: Iterable[Mapping[str, str]]) -> None:
        """rows: as they stand in the CSV file."""
        told = [
            (row["distances"] == row["composition"] == "1", *(row[f"{name}{end}"] for end in ("", "_strict")
             for name in ("unique", "novelty")), *(float(row[name] or "nan") for name in ("similarity", *SCREENED)))
            for row in rows
        ]  # fmt: skip
        valid, unique, novelty, unique_strict, novelty_strict, *numbers = zip(*told, strict=True)
        self.valid = np.array(valid)
        self.unique = {"standard": np.array(unique) == "1", "strict": np.array(unique_strict) == "1"}
        self.novelty = {"standard": np.array(novelty), "strict": np.array(novelty_strict)}
        self.failed = {"standard": np.array(unique) == "", "strict": np.array(unique_strict) == ""}
        self.similarity, self.e_above_hull, self.energy = (np.array(values) for values in numbers)


def novelty_figures(
    found: Verdicts, asked: int, seed: int, *, compared: bool, screened: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Figures of both tolerances. compared: with a reference.

    screened: of the columns SCREENED that the store has, the unit, and what is recorded of RESTS_ON.
    """
    stable = {
        name: found.e_above_hull <= most for name, most in (("sun", STABLE), ("metastable_sun", METASTABLE))
    }  # NaN is not
    told: dict[str, Any] = {}
    for name in MATCHERS:
        masks = {"unique": found.unique[name]}
        if compared:
            masks |= {kind: found.novelty[name] == kind for kind in KINDS}
            masks["unique_novel"] = masks["unique"] & masks["novel"]
            masks["valid_unique_novel"] = masks["unique_novel"] & found.valid
            if SCREENED[0] in screened:
                masks |= {kind: masks["unique_novel"] & mask for kind, mask in stable.items()}
        masks["not-compared"] = found.failed[name] | masks.get("not-compared", False)
        told[name] = {kind: share(int(mask.sum()), asked, seed) for kind, mask in masks.items()}
    told["similarity"] = mean(found.similarity, seed) if compared else None
    told["stability"] = None
    if SCREENED[0] in screened:
        masks = stable | {"low": found.e_above_hull < LOW}
        told["stability"] = {
            "screened": int(np.isfinite(found.e_above_hull).sum()),
            **{
                name: share(int(mask.sum()), asked, seed)
                for name, mask in zip(("stable", "metastable", "low"), masks.values(), strict=True)
            },
            **{what: screened[SCREENED[0]].get(what) for what in RESTS_ON},
        }
    told["energy"] = None
    if "energy" in screened:
        unit, potential = (screened["energy"].get(what) for what in ("unit", "potential"))
        told["energy"] = mean(found.energy, seed) | {"unit": unit, "potential": potential}
    return told


def tolerances() -> dict[str, Any]:
    """Of StructureMatcher."""
    return {name: asdict(matcher) for name, matcher in MATCHERS.items()}


def novelty_lines(told: Mapping[str, Any]) -> list[str]:
    """These figures for people. told: an evaluation as its JSON file has it."""
    figures, head = told["figures"]["novelty"], f"of {told['asked']:,} asked"
    lines = [f"{head:<28}" + "".join(f"  {f'{name} tolerances':>27}" for name in MATCHERS)]
    for kind, words in _LINES.items():
        if kind in figures["standard"] and (kind != "not-compared" or figures["standard"][kind]["count"]):
            lines.append(f"  {words:<26}" + "".join(f"  {share_told(figures[name][kind]):>27}" for name in MATCHERS))
    version = told["versions"].get("pymatgen-core") or told["versions"].get("pymatgen", "")
    for name, matcher in MATCHERS.items():
        how = f"ltol {matcher.ltol:g}, stol {matcher.stol:g}, angle_tol {matcher.angle_tol:g}"
        lines.append(f"{name}: as StructureMatcher with {how} (pymatgen {version})")
    named = (
        f"{told['reference']}, {told['reference_crystals']:,} crystals" if told["reference"] else "none, so no novelty"
    )
    lines.append(f"reference: {named}")
    if (near := figures["similarity"]) and near["of"]:
        lines.append(f"likeness of the nearest there: {mean_told(near, digits=3)} (Tanimoto, {near['of']:,} crystals)")
    return lines + _stability(figures)


def _stability(figures: Mapping[str, Any]) -> list[str]:
    found, lines = figures["stability"], []
    if found is None:
        lines.append("stability: not screened (no column e_above_hull)")
    else:
        parts = (f"{name} {share_told(found[name])}" for name in ("stable", "metastable", "low"))
        limits = f"at most {STABLE:g}, at most {METASTABLE:g} and below {LOW:g} eV/atom above the hull"
        lines.append(f"stability: {', '.join(parts)}")
        lines.append(f"  {limits} by the column e_above_hull, {found['screened']:,} screened")
        lines.append(f"  {_rests_on(found, RESTS_ON)}")
    if (energy := figures["energy"]) and energy["of"]:
        value = f"{mean_told(energy, digits=3)} {energy['unit']} (column energy, {energy['of']:,} crystals)"
        lines.append(f"energy: {value}; {_rests_on(energy, RESTS_ON[:1])}")
    return lines


def _rests_on(found: Mapping[str, Any], kinds: Sequence[str]) -> str:
    return "; ".join(f"{kind}: {found[kind] or 'not recorded in the store'}" for kind in kinds)
