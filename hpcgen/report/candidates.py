"""The crystals of a run worth a first look: which ones, what is known of them, and how they diffract."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcgen.crystal.composition import reduced_formula
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import lattice_parameters
from hpcgen.crystal.symmetry import space_group_number
from hpcgen.metrics.charge_balance import charge_balanced
from hpcgen.metrics.coverage import density
from hpcgen.metrics.validity import validity
from hpcgen.report.compare import ANGLES
from hpcgen.report.gather import SYMPREC, drawn
from hpcgen.report.style import four_digits
from hpcgen.store.layout import read_manifest
from hpcgen.store.read import Store
from hpcgen.store.rows import Rows

ENERGY = "e_above_hull"
WAVELENGTH = "CuKa"  # of the diffraction patterns: 1.5418 Å
_HIDDEN = {"index", "halved"}
_FIRST = 64  # crystals looked at together
_MOST_WORK = 30_000_000  # reflections times atoms of a pattern: some ten seconds


@dataclass(frozen=True)
class Candidate:
    """One crystal and what is known of it."""

    id: str
    formula: str
    crystal: Crystals  # a batch of 1, float64
    space_group: int  # within gather.SYMPREC, 0 where none is found
    valid: bool  # atoms 0.5 Å apart and a balanced composition
    values: dict[str, tuple[float | int | str | bool, str]]  # of the store's columns: value and unit


@dataclass(frozen=True)
class Pattern:
    """A powder diffraction pattern: sticks, the strongest 100 high. note: why there is none."""

    angles: list[float]  # 2θ in degrees
    heights: list[float]
    spacings: list[float]  # Å
    hkl: list[tuple[int, ...]]  # one of each family of planes
    note: str = ""


def choose(store: Store, top: int, sample: int, seed: int) -> tuple[list[Candidate], str]:
    """The best crystals of a run, no reduced formula twice, and in words how they were chosen.

    By energy above hull where the run has it; else from the sample the valid ones, those with a symmetry first.
    """
    if ENERGY in store.columns:
        energy = store.column(ENERGY)
        known = np.flatnonzero(~energy.missing & np.isfinite(np.asarray(energy.values, dtype=np.float64)))
        if len(known):
            order = known[np.argsort(energy.values[known], kind="stable")]
            return _first(store, order, top), f"lowest {ENERGY} of the {len(known):,} crystals that have one"
    places = drawn(len(store), sample, seed)
    ranked = _ranked(store, places)
    how = f"{len(places):,} crystals, drawn at random with seed {seed}" if len(places) < len(store) else "all crystals"
    words = f"no column {ENERGY}, so nothing is known of stability: of {how} valid ones first, those with a symmetry "
    return _first(store, ranked, top), f"{words}before P1, else in the order of the run"


def _ranked(store: Store, places: np.ndarray) -> np.ndarray:
    """The places with valid symmetric crystals first, then valid ones, then the rest."""
    ranks = []
    for start in range(0, len(places), _FIRST):
        crystals = store.rows(places[start : start + _FIRST]).crystals
        for at, good in enumerate(_valid(crystals)):
            ranks.append(2 if not good else int(space_group_number(crystals[at], SYMPREC) <= 1))
    return places[np.argsort(np.array(ranks), kind="stable")]


def _valid(crystals: Crystals) -> list[bool]:
    apart = validity(crystals).distances
    numbers = crystals.atomic_numbers.split(crystals.num_atoms.tolist())
    return [bool(ok) and charge_balanced(own) for ok, own in zip(apart, numbers, strict=True)]


def _first(store: Store, order: np.ndarray, top: int) -> list[Candidate]:
    """The first `top` in that order with formulas of their own."""
    chosen: dict[str, Candidate] = {}
    for start in range(0, len(order), _FIRST):
        for candidate in _described(store.rows(order[start : start + _FIRST])):
            if len(chosen) == top:
                return list(chosen.values())
            chosen.setdefault(candidate.formula, candidate)
    return list(chosen.values())[:top]


def _described(rows: Rows) -> Iterator[Candidate]:
    crystals = rows.crystals.to(dtype=torch.float64)
    valid = _valid(crystals)
    for at in range(len(rows)):
        crystal = crystals[at]
        values = {
            name: (column.values[at].item() if hasattr(column.values[at], "item") else column.values[at],
                   column.spec.unit)
            for name, column in rows.columns.items()
            if name not in _HIDDEN and not column.missing[at]
        }  # fmt: skip
        formula = reduced_formula(crystal.atomic_numbers.tolist())
        yield Candidate(str(rows.ids[at]), formula, crystal, space_group_number(crystal, SYMPREC), valid[at], values)


def open_run(path: Any) -> Store:
    """All columns of a run at a small cache."""
    read_manifest(path)
    return Store(path, dtype=None, cache_bytes=64 << 20)


def numbers_of(candidate: Candidate) -> list[tuple[str, str]]:
    """What is known, for people."""
    crystal = candidate.crystal
    lengths, angles = lattice_parameters(crystal.lattice)
    told = [
        ("id", candidate.id),
        ("valid", "yes" if candidate.valid else "no"),
        ("atoms in the cell", str(int(crystal.num_atoms[0]))),
        ("a, b, c", ", ".join(f"{x:.3f}" for x in lengths[0].tolist()) + " Å"),
        ("α, β, γ", ", ".join(f"{x:.2f}" for x in angles[0].tolist()) + "°"),
        ("volume per atom", f"{_volume(crystal) / len(crystal.atomic_numbers):.2f} Å³"),
        ("density", f"{density(crystal)[0]:.3f} g/cm³"),
    ]
    for name, (value, unit) in candidate.values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        words = four_digits(float(value)) if number else str(value)
        told.append((name.replace("_", " "), f"{words} {unit}".rstrip()))
    return told


def _volume(crystal: Crystals) -> float:
    return float(crystal.volume[0])


def diffraction(crystal: Crystals) -> Pattern:
    """Powder pattern by pymatgen's XRDCalculator: kinematic, no temperature factors, Cu Kα."""
    from pymatgen.analysis.diffraction.xrd import WAVELENGTHS, XRDCalculator

    reach = 2 * np.sin(np.radians(ANGLES[1] / 2)) / WAVELENGTHS[WAVELENGTH]  # of the reciprocal lattice, 1/Å
    work = 4 / 3 * np.pi * reach**3 * _volume(crystal) * len(crystal.atomic_numbers)
    if work > _MOST_WORK:
        return Pattern([], [], [], [], f"not computed: a cell of {_volume(crystal):,.0f} Å³ has too many reflections")
    try:
        found = XRDCalculator(WAVELENGTH).get_pattern(to_pymatgen(crystal)[0], two_theta_range=ANGLES)
    except (ValueError, ArithmeticError, LookupError) as fault:  # no form factor of an element, no peak at all
        return Pattern([], [], [], [], f"not computed: {' '.join(str(fault).split())}")
    planes = [_three(family[0]["hkl"]) for family in found.hkls]
    return Pattern(found.x.tolist(), found.y.tolist(), list(map(float, found.d_hkls)), planes)


def _three(hkl: tuple[int, ...]) -> tuple[int, ...]:
    """Without the third of the four indices of a hexagonal lattice."""
    return tuple(int(h) for h in (hkl if len(hkl) == 3 else (hkl[0], hkl[1], hkl[3])))
