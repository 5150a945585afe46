#!/usr/bin/env python
"""A store without any input: the AFLOW prototypes that pymatgen carries, decorated with other elements.

python preprocess/prototypes.py --n 2000 --out stores/prototypes

Made for a first look at the pipeline, for tests and benchmarks: no energies are known, cells are scaled but
not relaxed, and most of these crystals would not be stable.

Row i is a function of (seed, i) alone: the prototypes take turns in rounds, each round in an order of its
own, and in round k each gives the k-th of its decorations, shuffled, until it has no more. So no two rows are
the same decoration of the same prototype.

- A prototype with a non-metal takes elements whose oxidation states can add up to zero: cations where its
  cations are, anions where its anions are (the last element, where its own formula does not balance), metals
  before non-metals and then by electronegativity, in the order of the prototype.
- A prototype of metals takes metals in the same order of electronegativity, with ratios of their atomic radii
  within 15 % of its own. A prototype of one element takes up to three: metals for a metal, and for a
  non-metal B, C, Si, P, S or those below them.
- The shape of the cell and the sites stay; the volume is the one at which the first two atoms touch by
  data-mined radii, which is pymatgen's DLSVolumePredictor without its bounds: I.-H. Chu, S. Roychowdhury,
  D. Han, A. Jain, S. P. Ong, Computational Materials Science 146, 184-192 (2018).
- A decoration is left out where that makes no sense: where the first two atoms to touch are anions, or where
  spheres of these radii fill less than 15 % of the cell (a gas of molecules; 1 % of the crystals of MP-20 do)
  or more than 75 % (none does).
"""

import argparse
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import ClassVar

import drive
import numpy as np
import torch

from hpcgen.crystal.composition import ATOMIC_NUMBERS, ELECTRONEGATIVITY, SYMBOLS
from hpcgen.crystal.convert import from_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.errors import UsageError
from hpcgen.store.layout import ColumnSpec
from hpcgen.store.source import Parsed, Raw

ELEMENTAL_ROWS = 3  # of a one-element prototype: a fifth of the library, but a hundredth of known crystals
MOST_ELEMENTS = 4  # the one prototype of five elements has more decorations than are worth counting
SIMILAR = 0.15  # relative change of a ratio of radii between metals
HIGHEST_STATE = 6
FILLED = (0.15, 0.75)  # share of the cell that touching spheres may fill
_LEFT_OUT = "He Ne Ar Kr Xe Rn Tc Pm"  # noble gases, no stable isotope; and all from Po on but for Th and U
_ANIONS = {"H": 1, "F": 1, "Cl": 1, "Br": 1, "I": 1, "O": 2, "S": 2, "Se": 2, "Te": 2,
           "N": 3, "P": 3, "As": 3, "Sb": 3, "C": 4, "Si": 4, "Ge": 4}  # fmt: skip
_NEVER_CATIONS = {"H", "O", "F", "Cl", "Br", "I"}
_MOLECULES = {"H", "N", "O", "F", "Cl", "Br", "I"}  # as elements

Places = tuple[int, ...]  # of chosen elements in the list by rank


@dataclass(frozen=True)
class Element:
    """What is asked of an element that may take a site."""

    number: int
    metal: bool
    positive: tuple[int, ...]  # oxidation states of pymatgen's common and ICSD lists, up to +6
    negative: int  # its one state as an anion, 0 where it is none
    radius: float  # Å, Slater
    bond: tuple[float, float]  # Å: a data-mined radius and its growth with the spread of electronegativity

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Order of the elements of a formula: metals first, then by electronegativity."""
        return not self.metal, ELECTRONEGATIVITY[self.number], self.number


@dataclass(frozen=True)
class Prototype:
    """A structure whose elements can be exchanged. Slots are its elements, by rank."""

    label: str  # AFLOW's, as AB2_oP6_58_a_g
    crystal: Crystals
    slot: np.ndarray  # (n,) of each atom
    counts: tuple[int, ...]  # atoms of each slot
    elements: tuple[int, ...]  # its own, of each slot
    touch: np.ndarray  # (slots, slots) Å, the nearest two atoms of each pair of slots, inf for none

    @property
    def formula_units(self) -> int:
        return math.gcd(*self.counts)


@dataclass
class Prototypes:
    """Decorated AFLOW prototypes with at most `cell_atoms` atoms, `n` of them."""

    n: int
    seed: int = 0
    cell_atoms: int = 20

    name: ClassVar[str] = "prototypes"
    columns: ClassVar[dict[str, ColumnSpec]] = {"prototype": ColumnSpec("str")}

    def __post_init__(self) -> None:
        if not self.n >= 1:
            raise UsageError(f"--n {self.n}: want at least 1")

    def identity(self) -> dict:
        """What determines the rows. A new pymatgen may bring new prototypes."""
        from importlib.metadata import version

        return {"n": self.n, "seed": self.seed, "cell_atoms": self.cell_atoms,
                "pymatgen": version("pymatgen-core")}  # fmt: skip

    def size(self) -> int:
        """`n`. Raises UsageError where there are not so many decorations."""
        plan = _plan(self.cell_atoms)
        if self.n > plan.capacity:
            raise UsageError(
                f"--n {self.n}: {len(plan.rounds)} prototypes of at most {self.cell_atoms} atoms have "
                f"{plan.capacity} decorations"
            )
        return self.n

    def rows(self, start: int, stop: int) -> Iterator[Raw]:
        """Rows start to stop."""
        plan = _plan(self.cell_atoms)
        for row in range(start, min(stop, self.n)):
            which, numbers = plan.decoration(self.seed, row)
            prototype = plan.prototypes[which]
            name = f"proto-{prototype.label}-{_formula(prototype, numbers)}-{row}"
            yield Raw(name, (which, numbers), {"prototype": prototype.label})

    def parse(self, raw: Raw) -> list[Parsed]:
        """The decorated prototype at its predicted volume."""
        which, numbers = raw.body
        return [Parsed(raw.id, decorate(_plan(self.cell_atoms).prototypes[which], numbers))]


@dataclass(frozen=True)
class Plan:
    """Which decoration a row is. Prototypes with few decorations drop out of the later rounds."""

    prototypes: tuple[Prototype, ...]
    decorations: tuple[np.ndarray, ...]  # (N, slots) atomic numbers, of each prototype
    rounds: np.ndarray  # (P,) decorations that each may give, falling

    @cached_property
    def rows_before(self) -> np.ndarray:
        """Rows of all rounds before each round, and of all. (rounds + 1,)"""
        of_round = np.bincount(self.rounds, minlength=1)[::-1].cumsum()[::-1][1:]
        return np.concatenate([[0], of_round.cumsum()])

    @property
    def capacity(self) -> int:
        return int(self.rounds.sum())

    def decoration(self, seed: int, row: int) -> tuple[int, tuple[int, ...]]:
        """Prototype and atomic number of each slot of a row below `capacity`."""
        turn = int(np.searchsorted(self.rows_before, row, side="right")) - 1
        taking, place = np.diff(self.rows_before[turn : turn + 2])[0], row - self.rows_before[turn]
        which = shuffled(int(place), int(taking), seed, 1, turn)
        choice = self.decorations[which]
        return which, tuple(choice[shuffled(turn, len(choice), seed, 2, which)].tolist())


def shuffled(place: int, size: int, *key: int) -> int:
    """`place` under a permutation of range(size) that `key` chooses: a Feistel network walked into range."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ (_mixed(right, turn, *key) & mask)
        place = left << half | right
        if place < size:
            return place


def _mixed(*words: int) -> int:
    """64 well-mixed bits of the words (splitmix64)."""
    state = 0
    for word in words:
        state = (state ^ word) + 0x9E3779B97F4A7C15 & 2**64 - 1
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 2**64 - 1
        state ^= state >> 31
    return state


def decorate(prototype: Prototype, numbers: tuple[int, ...]) -> Crystals:
    """The prototype with an atomic number for each slot, scaled to where the first two atoms touch."""
    radii = _radii(np.array([numbers]), prototype.counts)
    scale = _scale(prototype, radii).max()
    crystal = prototype.crystal
    chosen = torch.from_numpy(np.array(numbers)[prototype.slot])
    return Crystals(crystal.frac_coords, crystal.lattice * scale, chosen, crystal.num_atoms)


def _radii(numbers: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    """Radii of touching atoms; they depend on the spread of electronegativity. (N, slots) -> (N, slots) Å."""
    bond, strength = _bonds()[numbers], np.array(ELECTRONEGATIVITY)[numbers]
    share = np.array(counts) / sum(counts)
    mean = (share * strength).sum(axis=1, keepdims=True)
    spread = np.sqrt((share * (strength - mean) ** 2).sum(axis=1, keepdims=True))
    return bond[..., 0] + bond[..., 1] * spread


def _scale(prototype: Prototype, radii: np.ndarray) -> np.ndarray:
    """Scale of the lattice at which each pair of slots touches. (N, slots) Å -> (N, slots, slots)."""
    return (radii[:, :, None] + radii[:, None, :]) / prototype.touch


def _fitting(prototype: Prototype, choice: np.ndarray, anions: int) -> np.ndarray:
    """The decorations whose volume can be believed. (N, slots) -> (M, slots)."""
    radii = _radii(choice, prototype.counts)
    scale = _scale(prototype, radii)
    largest = scale.max(axis=(1, 2))
    spheres = (4 / 3 * math.pi * radii**3 * np.array(prototype.counts)).sum(axis=1)
    filled = spheres / (float(prototype.crystal.volume[0]) * largest**3)
    fits = (filled >= FILLED[0]) & (filled <= FILLED[1])
    if anions:
        fits &= scale[:, -anions:, -anions:].max(axis=(1, 2)) < largest
    return choice[fits]


def _formula(prototype: Prototype, numbers: tuple[int, ...]) -> str:
    units = prototype.formula_units
    pairs = zip(numbers, prototype.counts, strict=True)
    terms = ((SYMBOLS[number], count // units) for number, count in pairs)
    return "".join(symbol if count == 1 else f"{symbol}{count}" for symbol, count in terms)


@lru_cache(maxsize=1)
def _elements() -> dict[int, Element]:
    """The elements that may take a site, by atomic number."""
    from pymatgen.analysis.structure_prediction.volume_predictor import bond_params
    from pymatgen.core import Element as Reference

    left_out = {ATOMIC_NUMBERS[symbol] for symbol in _LEFT_OUT.split()}
    found = {}
    for number in [*range(1, ATOMIC_NUMBERS["Po"]), ATOMIC_NUMBERS["Th"], ATOMIC_NUMBERS["U"]]:
        symbol = SYMBOLS[number]
        if number in left_out or symbol not in bond_params:
            continue
        known = Reference(symbol)
        states = {*known.common_oxidation_states, *known.icsd_oxidation_states}
        positive = [] if symbol in _NEVER_CATIONS else [q for q in sorted(states) if 0 < q <= HIGHEST_STATE]
        bond = bond_params[symbol]
        found[number] = Element(
            number, bool(known.is_metal), tuple(positive), -_ANIONS.get(symbol, 0),
            _radius(number), (float(bond["r"]), float(bond["k"])),
        )  # fmt: skip
    return found


@lru_cache(maxsize=1)
def _bonds() -> np.ndarray:
    """Data-mined radius and its growth with the spread of electronegativity, by atomic number. (119, 2) Å."""
    table = np.full((len(SYMBOLS), 2), np.nan)
    for number, element in _elements().items():
        table[number] = element.bond
    return table


@lru_cache(maxsize=2)
def _plan(cell_atoms: int) -> Plan:
    """Every prototype that can be decorated, with its decorations. The same in every process."""
    every = [(prototype, _decorations(prototype)) for prototype in _library(cell_atoms)]
    found = [(prototype, choice) for prototype, choice in every if len(choice)]
    if not found:
        raise UsageError(f"--cell-atoms {cell_atoms}: no prototype is so small; want for example 20")
    found.sort(key=lambda pair: -_rounds(*pair))
    prototypes, decorations = zip(*found, strict=True)
    return Plan(prototypes, decorations, np.array([_rounds(*pair) for pair in found]))


def _rounds(prototype: Prototype, choice: np.ndarray) -> int:
    return len(choice) if len(prototype.counts) > 1 else min(len(choice), ELEMENTAL_ROWS)


def _library(cell_atoms: int) -> list[Prototype]:
    """pymatgen's AFLOW prototypes of at most `cell_atoms` atoms, in the library's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

        entries = [(entry["tags"]["aflow"], entry["snl"].structure) for entry in AFLOW_PROTOTYPE_LIBRARY]
        small = [
            (label, from_pymatgen([structure]))
            for label, structure in entries
            if len(structure) <= cell_atoms and len(structure.composition) <= MOST_ELEMENTS
        ]
    return [_prototype(label, crystal) for label, crystal in small]


def _prototype(label: str, crystal: Crystals) -> Prototype:
    numbers = crystal.atomic_numbers.tolist()
    own = sorted(set(numbers), key=_rank)
    slot = np.array([own.index(number) for number in numbers])
    counts = tuple(np.bincount(slot).tolist())
    return Prototype(label, crystal, slot, counts, tuple(own), _nearest(crystal, slot))


@cache
def _rank(number: int) -> tuple[bool, float, int]:
    from pymatgen.core import Element as Reference

    return not Reference.from_Z(number).is_metal, ELECTRONEGATIVITY[number], number


def _nearest(crystal: Crystals, slot: np.ndarray) -> np.ndarray:
    """Nearest two atoms of each pair of slots, an atom and its own image too. (slots, slots) Å."""
    frac, lattice = crystal.frac_coords.numpy(), crystal.lattice[0].numpy()
    steps = np.stack(np.meshgrid(*3 * [np.arange(-3.0, 4.0)], indexing="ij"), axis=-1).reshape(-1, 3)
    apart = frac[:, None, None] - frac[None, :, None] + steps  # (n, n, 343, 3)
    distance = np.linalg.norm(apart @ lattice, axis=-1)
    distance[distance < 1e-8] = np.inf
    nearest = distance.min(axis=2)
    pairs = np.full(2 * (slot.max() + 1,), np.inf)
    np.minimum.at(pairs, (slot[:, None], slot[None, :]), nearest)
    return pairs


def _decorations(prototype: Prototype) -> np.ndarray:
    """All elements that its slots may take. (N, slots) atomic numbers, in a fixed order."""
    units = prototype.formula_units
    counts = tuple(count // units for count in prototype.counts)
    metal = tuple(not _rank(number)[0] for number in prototype.elements)
    if len(counts) == 1:
        same = [element.number for element in _elements().values() if element.metal == metal[0]]
        choice = np.array([[z] for z in same if SYMBOLS[z] not in _MOLECULES])
        return _fitting(prototype, choice, 0)
    if all(metal):
        return _fitting(prototype, _alloys(tuple(_radius(number) for number in prototype.elements)), 0)
    anions = _anion_slots(prototype, counts, metal)
    return _fitting(prototype, _salts(counts, metal, anions), anions)


def _radius(number: int) -> float:
    from pymatgen.core import Element as Reference

    radius = Reference.from_Z(number).atomic_radius
    assert radius is not None  # of every element of the library and of those that may take a site
    return float(radius)


def _anion_slots(prototype: Prototype, counts: tuple[int, ...], metal: tuple[bool, ...]) -> int:
    """Slots, from the last, that are anions in the prototype itself; 1 where its formula does not balance."""
    own = [_elements().get(number) for number in prototype.elements]
    for anions in range(1, len(counts)):
        cations = len(counts) - anions
        states = [
            () if element is None else (element.positive if place < cations else (element.negative,))
            for place, element in enumerate(own)
        ]
        if 0 in _charges(counts, states) and all(state != (0,) for state in states):
            return anions
    return 1


def _charges(counts: tuple[int, ...], states: list[tuple[int, ...]]) -> set[int]:
    sums = {0}
    for count, choices in zip(counts, states, strict=True):
        sums = {total + count * state for total in sums for state in choices}
    return sums


def _ranked() -> list[Element]:
    return sorted(_elements().values(), key=lambda element: element.rank)


@cache
def _salts(counts: tuple[int, ...], metal: tuple[bool, ...], anions: int) -> np.ndarray:
    """Elements by growing rank whose charges can add up to zero. (N, slots) atomic numbers.

    A slot that a metal held takes no non-metal as its cation: SiO2 may become CO2, TiO2 may not.
    """
    elements = _ranked()
    cations = len(counts) - anions
    allowed = [[_states(e, slot < cations, held) for e in elements] for slot, held in enumerate(metal)]
    closing: dict[int, list[int]] = {}  # charge that the last slot can take up -> places in `elements`
    for place, states in enumerate(allowed[-1]):
        for state in states:
            closing.setdefault(-counts[-1] * state, []).append(place)
    found = []
    for chosen, sums in _beginnings(counts[:-1], allowed).items():
        ends = {place for total in sums for place in closing.get(total, ()) if place > chosen[-1]}
        found += [(*chosen, place) for place in sorted(ends)]
    numbers = np.array([element.number for element in elements])
    return numbers[np.array(found, dtype=np.int64).reshape(-1, len(counts))]


def _beginnings(counts: Places, allowed: list[list[tuple[int, ...]]]) -> dict[Places, set[int]]:
    """Growing places of the first slots, and the charges that they can have together."""
    partial: dict[Places, set[int]] = {(): {0}}
    for slot, count in enumerate(counts):
        partial = {
            (*chosen, place): {total + count * state for total in sums for state in states}
            for chosen, sums in partial.items()
            for place, states in enumerate(allowed[slot])
            if states and (not chosen or place > chosen[-1])
        }
    return partial


def _states(element: Element, cation: bool, of_metal: bool) -> tuple[int, ...]:
    if not cation:
        return (element.negative,) if element.negative else ()
    return element.positive if element.metal or not of_metal else ()


@cache
def _alloys(radii: tuple[float, ...]) -> np.ndarray:
    """Metals by growing rank with ratios of radii like those given, each to the first. (N, slots)."""
    metals = [element for element in _ranked() if element.metal]
    chosen: list[Places] = [(place,) for place in range(len(metals))]
    for radius in radii[1:]:
        wanted = radius / radii[0]
        chosen = [
            (*places, place)
            for places in chosen
            for place in range(places[-1] + 1, len(metals))
            if abs(metals[place].radius / metals[places[0]].radius / wanted - 1) <= SIMILAR
        ]
    numbers = [[metals[place].number for place in places] for places in chosen]
    return np.array(numbers, dtype=np.int64).reshape(-1, len(radii))


def make_source(args: argparse.Namespace) -> Prototypes:
    """The source that the command line names."""
    return Prototypes(args.n, args.seed, args.cell_atoms)


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--n", type=int, default=2000, help="number of crystals to make (default: 2000)")
    parser.add_argument("--cell-atoms", type=int, default=20, help="largest prototype (default: 20 atoms)")
    return drive.run(parser, make_source)


if __name__ == "__main__":
    sys.exit(main())
