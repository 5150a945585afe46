"""Whether a crystal may have a smaller cell in the sense of pymatgen's `get_primitive_structure`: a quick no.

That search, within 0.25 Å along each cell vector, takes twice as long as the rest of reducing a crystal, and most have
no smaller cell. For each divisor d > 1 of all the numbers of atoms of its elements it tries every lattice that is d
times finer. A row r of the inverse of such a lattice's matrix is a whole multiple of 1/d, not all rows are whole, and
each must lie within t = 0.25 Å / |a_k| in every coordinate k of a step v from the first atom of the rarest element to
another one, where v takes every atom to within 2 t of one of its element. So where no step v (1) lies so near to an r
that is not whole and (2) maps all atoms, there is no smaller cell. Both are asked a little more loosely than rounding
errors are large.
"""

import math

import numpy as np

from hpcgen.crystal.composition import SYMBOLS

TOLERANCE = 0.25  # Å, of get_primitive_structure
_SLACK = 1e-9  # in fractional coordinates


def may_be_smaller(lattice: np.ndarray, frac: np.ndarray, numbers: np.ndarray) -> bool:
    """Whether the search for a smaller cell could find one; where not, it ends with the crystal as it is.

    lattice (3, 3) Å, frac (N, 3), numbers (N,).
    """
    symbols = sorted(set(numbers.tolist()), key=SYMBOLS.__getitem__)  # of equally rare elements the first
    elements = sorted((frac[numbers == number] for number in symbols), key=len)
    near = TOLERANCE / np.linalg.norm(lattice, axis=1) + _SLACK
    steps = elements[0] - elements[0][0]
    steps = steps[_near_fractions(steps, near, math.gcd(*map(len, elements)))]
    for sites in elements:
        for site in sites:
            if not len(steps):
                return False
            away = (site + steps)[:, None] - sites  # (V, n, 3)
            away -= np.round(away)
            steps = steps[(np.abs(away) <= 2 * near).all(2).any(1)]
    return len(steps) > 0


def _near_fractions(steps: np.ndarray, near: np.ndarray, most: int) -> np.ndarray:
    """Which steps (V, 3) lie within `near` (3,) of multiples of 1/d that are not all whole, d dividing `most`. (V,)."""
    found = np.zeros(len(steps), dtype=bool)
    for d in range(2, most + 1):
        if most % d == 0:
            least, last = np.ceil(d * (steps - near)), np.floor(d * (steps + near))
            broken = (last > least) | (least % d != 0)  # among these multiples of 1/d one is not whole
            found |= (last >= least).all(1) & broken.any(1)
    return found
