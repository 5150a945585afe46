"""Compositional validity as CDVAE defines it with SMACT (Xie et al. 2022; Davies et al., JOSS 4, 1361, 2019).

A composition is valid if it is one element, or metals alone, or if each element can be given one of its oxidation
states so that the charges sum to zero and every cation is less electronegative than every anion. CDVAE tries every
combination of states, which for ten elements never ends; here the sums of charge are counted up instead: a number of
steps that grows with the cube of the number of elements, and the same verdict.

The tables are those of SMACT 2.2.1, which CDVAE and its successors score with. Of 6,176 compositions of known crystals
SMACT 2.2.1 itself says the same of every one, SMACT 4.0.2 with `oxidation_states_set="smact14"` otherwise of 15, and
with its own default, the states that the ICSD of 2024 bears out, of 364 (236 are valid there alone, 128 here alone):
figures by another version are not to be compared with these.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from hpcgen.crystal.composition import SYMBOLS

TABLE = Path(__file__).with_name("smact_2_2_1.json")
States = tuple[int, ...]


def charge_balanced(atomic_numbers: Sequence[int] | np.ndarray | Tensor) -> bool:
    """Whether the composition of these atoms is valid. (A,) -> bool. False with an element SMACT lacks, Z > 103."""
    numbers = atomic_numbers if isinstance(atomic_numbers, list | tuple) else atomic_numbers.tolist()  # type: ignore[union-attr]
    counts = Counter(numbers)
    factor = math.gcd(*counts.values())
    return _valid(tuple((z, counts[z] // factor) for z in sorted(counts)))


@lru_cache(maxsize=1)
def _table() -> dict[int, tuple[States, float | None, bool]]:
    """Oxidation states, Pauling electronegativity and whether it is a metal, by atomic number."""
    elements = json.loads(TABLE.read_text(encoding="utf-8"))["elements"]
    return {SYMBOLS.index(symbol): (tuple(states), strength, metal) for symbol, (states, strength, metal) in
            elements.items()}  # fmt: skip


@lru_cache(maxsize=100_000)
def _valid(composition: tuple[tuple[int, int], ...]) -> bool:
    """composition: (atomic number, count) by atomic number, counts without a common factor."""
    if len(composition) == 1:
        return True
    known = [_table().get(z) for z, _ in composition]
    rows = [row for row in known if row is not None]
    if len(rows) < len(known):
        return False
    if all(metal for _, _, metal in rows):
        return True
    counts = [count for _, count in composition]
    choices = _choices([states for states, _, _ in rows], [strength for _, strength, _ in rows])
    return any(_neutral(states, counts) for states in choices)


def _neutral(states: Sequence[States], counts: Sequence[int]) -> bool:
    """Whether one state each can be taken so that the charges sum to zero."""
    sums = {0}
    for some, count in zip(states, counts, strict=True):
        sums = {total + state * count for total in sums for state in some}
    return 0 in sums


def _choices(states: list[States], strengths: list[float | None]) -> Iterator[list[States]]:
    """Ways to narrow the states of each element such that any combination of what is left passes SMACT's test.

    Together they hold every combination that passes. The table has no state 0, so each element is cation or anion.
    """
    if None in strengths:
        yield from _choices_of_unknown(states, strengths)
        return
    for highest in sorted({strength for strength in strengths if strength is not None})[:-1]:  # of the cations
        yield [
            _of_sign(some, 1 if strength <= highest else -1)  # type: ignore[operator]
            for some, strength in zip(states, strengths, strict=True)
        ]


def _choices_of_unknown(states: list[States], strengths: list[float | None]) -> Iterator[list[States]]:
    """Where electronegativities are missing (Pm, Rn, Lr, He, Ne, Ar), as CDVAE's code has it.

    SMACT's test goes through the pairs of elements in order, and fails at the first pair with a missing value if its
    charges are of one sign; if they are of opposite signs it raises TypeError, which CDVAE takes as passed. So the
    first such pair decides, and no pair behind it is looked at.
    """
    partner = max(strengths.index(None), 1)  # the first element and this one are the first such pair
    for sign in (1, -1):
        first = strengths[0]
        narrowed = [_of_sign(states[0], sign)]
        for some, strength in zip(states[1:partner], strengths[1:partner], strict=True):
            assert first is not None and strength is not None
            fits = first < strength if sign > 0 else first > strength
            narrowed.append(some if fits else _of_sign(some, sign))
        yield [*narrowed, _of_sign(states[partner], -sign), *states[partner + 1 :]]


def _of_sign(states: States, sign: int) -> States:
    return tuple(state for state in states if state * sign > 0)
