"""Symbols and formulas: cheap exact keys for machines, pymatgen's reduced formula for people."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from hpcgen.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb "
    "Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf "
    "Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
SYMBOLS: tuple[str, ...] = tuple(_NAMES.split())  # SYMBOLS[z]; 0 is no element
ATOMIC_NUMBERS: dict[str, int] = {symbol: z for z, symbol in enumerate(SYMBOLS) if z}
_PAULING = (
    "nan 2.2 nan 0.98 1.57 2.04 2.55 3.04 3.44 3.98 nan 0.93 1.31 1.61 1.9 2.19 2.58 3.16 nan 0.82 1 1.36 "
    "1.54 1.63 1.66 1.55 1.83 1.88 1.91 1.9 1.65 1.81 2.01 2.18 2.55 2.96 3 0.82 0.95 1.22 1.33 1.6 2.16 "
    "1.9 2.2 2.28 2.2 1.93 1.69 1.78 1.96 2.05 2.1 2.66 2.6 0.79 0.89 1.1 1.12 1.13 1.14 1.13 1.17 1.2 1.2 "
    "1.1 1.22 1.23 1.24 1.25 1.1 1.27 1.3 1.5 2.36 1.9 2.2 2.2 2.28 2.54 2 1.62 2.33 2.02 2 2.2 2.2 0.7 "
    "0.9 1.1 1.3 1.5 1.38 1.36 1.28 1.3 1.3 1.3 1.3 1.3 1.3 1.3 1.3 1.3" + 15 * " nan"
)
# Pauling electronegativities by atomic number, as pymatgen has them; NaN where there is none.
ELECTRONEGATIVITY: tuple[float, ...] = tuple(float(value) for value in _PAULING.split())
_NOT_HALVED = {  # what chemists do not reduce to the end
    "LiO": "Li2O2",
    "NaO": "Na2O2",
    "KO": "K2O2",
    "RbO": "Rb2O2",
    "CsO": "Cs2O2",
    "HO": "H2O2",
    **{gas: f"{gas}2" for gas in ("H", "N", "O", "F", "Cl")},
}
_IONIC = 1.65  # two last elements nearer than this in electronegativity may be a polyanion
_TOKEN = re.compile(r"([A-Z][a-z]?)|([()])|(\d+(?:\.\d*)?|\.\d+)|(\S)")


class BadFormula(UsageError, ValueError):
    """A formula that says no composition: an unknown element, no atoms, a fraction, an open bracket."""


def formula_key(atomic_numbers: "Sequence[int] | np.ndarray | Tensor") -> str:
    """Exact key of the reduced composition, elements by atomic number: O12Fe8 -> 'O3Fe2'. (n,) -> str."""
    return _key(_reduced(atomic_numbers))


def reduced_formula(atomic_numbers: "Sequence[int] | np.ndarray | Tensor") -> str:
    """The formula that pymatgen's Composition.reduced_formula gives, as 'LiFePO4' or 'Ca(OH)2'. (n,) -> str.

    Elements by growing electronegativity (those without one last), then by name; the last two of three or
    more as a group in brackets where they share a factor; O2, Na2O2 and their like are not halved.
    """
    return _formula(_reduced(atomic_numbers))


def parse_formula(formula: str) -> dict[str, int]:
    """Atoms by symbol, in the order of the first mention: 'Li9P3S12', 'Ca(OH)2'. Raises BadFormula."""
    levels: list[Counter[str]] = [Counter()]
    last: Counter[str] | None = None  # what a number behind it would multiply
    for match in _TOKEN.finditer(formula):
        symbol, bracket, number, other = match.groups()
        if symbol:
            last = _add(levels[-1], {_known(symbol, formula): 1})
        elif bracket == "(":
            levels.append(Counter())
            last = None
        elif bracket and len(levels) > 1:
            last = _add(levels[-2], levels.pop())
        elif number and last:
            _add(levels[-1], last, _count(number, formula) - 1)
            last = None
        else:
            raise BadFormula(f"formula {formula!r}: {(other or bracket or number)!r} is out of place")
    if len(levels) > 1:
        raise BadFormula(f"formula {formula!r}: a bracket is not closed")
    if not levels[0]:
        raise BadFormula(f"formula {formula!r}: no atoms; want for example Li9P3S12")
    return dict(levels[0])


def _add(total: Counter[str], part: Mapping[str, int], times: int = 1) -> Counter[str]:
    for symbol, count in part.items():
        total[symbol] += times * count
    return Counter(part)


def _known(symbol: str, formula: str) -> str:
    if symbol not in ATOMIC_NUMBERS:
        raise BadFormula(f"formula {formula!r}: {symbol!r} is no element")
    return symbol


def _count(number: str, formula: str) -> int:
    if not number.isdigit() or len(number) > 9 or int(number) == 0:
        raise BadFormula(f"formula {formula[:80]!r}: {number[:20]} atoms; want whole numbers from 1 on")
    return int(number)


def _reduced(atomic_numbers: "Sequence[int] | np.ndarray | Tensor") -> tuple[tuple[int, int], ...]:
    """(atomic number, count), counts without a common factor, by atomic number."""
    numbers = atomic_numbers if isinstance(atomic_numbers, list | tuple) else atomic_numbers.tolist()  # type: ignore[union-attr]
    counts = Counter(numbers)
    if not (counts and min(counts) >= 1 and max(counts) < len(SYMBOLS)):
        raise ValueError(f"atomic numbers {sorted(counts)}, want some of 1 to {len(SYMBOLS) - 1}")
    factor = math.gcd(*counts.values())
    return tuple((z, counts[z] // factor) for z in sorted(counts))


@lru_cache(maxsize=100_000)
def _key(counts: tuple[tuple[int, int], ...]) -> str:
    return "".join(_term(SYMBOLS[z], count) for z, count in counts)


@lru_cache(maxsize=100_000)
def _formula(counts: tuple[tuple[int, int], ...]) -> str:
    text = "".join(_terms(sorted(counts, key=_order)))
    return _NOT_HALVED.get(text, text)


def _order(part: tuple[int, int]) -> tuple[float, str]:
    strength = ELECTRONEGATIVITY[part[0]]
    return (math.inf if math.isnan(strength) else strength), SYMBOLS[part[0]]


def _terms(ordered: list[tuple[int, int]]) -> list[str]:
    terms = [_term(SYMBOLS[z], count) for z, count in ordered]
    if len(ordered) < 3:
        return terms
    (z, m), (last, n) = ordered[-2:]
    factor = math.gcd(m, n)
    if factor > 1 and ELECTRONEGATIVITY[last] - ELECTRONEGATIVITY[z] < _IONIC:
        group = _term(SYMBOLS[z], m // factor) + _term(SYMBOLS[last], n // factor)
        return [*terms[:-2], f"({group}){factor}"]
    return terms


def _term(symbol: str, count: int) -> str:
    return symbol if count == 1 else f"{symbol}{count}"
