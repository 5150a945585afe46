"""Sites paired so that the sum of squared distances is least, in cells where the shortest steps are easily found."""

import itertools

import numpy as np

_FAR = 1e10  # a squared distance that stands for a pair that may not be made
_TIE = 1e-9
_IMAGES = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=3)))


def shorten(step: np.ndarray, wanted: np.ndarray, cells: np.ndarray, short: np.ndarray) -> None:
    """Put the shortest of 27 images in place of those steps (R, n, n, 3), of `wanted`, that are not sure to be it.

    cells (R, 3, 3); short (R,): what is no longer is the shortest.
    """
    row, one, other = np.nonzero(wanted & ((step**2).sum(3) > short[:, None, None] ** 2))
    images = step[row, one, other][:, None] + (_IMAGES @ cells)[row]  # (E, 27, 3)
    best = (images**2).sum(2).argmin(1)
    step[row, one, other] = np.take_along_axis(images, best[:, None, None], axis=1)[:, 0]


def paired(squares: np.ndarray) -> np.ndarray:
    """The pairing of least sum, inf for what may not be paired. (R, n, n) -> (R, n), -1 where there is none."""
    from scipy.optimize import linear_sum_assignment

    chosen = squares.argmin(2)
    none = np.isinf(squares.min(2)).any(1) | np.isinf(squares.min(1)).any(1)
    plain = (np.sort(chosen, axis=1) == np.arange(chosen.shape[1])).all(1)  # the nearest of each is another one
    for row in np.flatnonzero(~plain & ~none).tolist():
        costs = np.minimum(squares[row], _FAR)
        chosen[row] = linear_sum_assignment(costs)[1]
        none[row] = np.isinf(squares[row, np.arange(len(costs)), chosen[row]]).any()
    chosen[none] = -1
    return chosen


def lll_reduced(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LLL-reduced cells, and what takes fractional coordinates to them. (Q, 3, 3) -> (Q, 3, 3), (Q, 3, 3).

    Most mean cells of reduced ones are; a tie counts as reduced.
    """
    from pymatgen.core import Lattice

    a, b, c = cells.transpose(1, 0, 2)
    aa = (a * a).sum(1)
    of_b, of_c = (a * b).sum(1) / aa, (a * c).sum(1) / aa
    rest = b - of_b[:, None] * a
    bb = (rest * rest).sum(1)
    of_rest = (rest * c).sum(1) / bb
    last = c - of_c[:, None] * a - of_rest[:, None] * rest
    half = np.stack([of_b, of_c, of_rest]) ** 2 <= 0.25 + _TIE
    ordered = (bb >= (0.75 - _TIE - of_b**2) * aa) & ((last * last).sum(1) >= (0.75 - _TIE - of_rest**2) * bb)
    reduced, turn = cells.copy(), np.tile(np.eye(3), (len(cells), 1, 1))
    for k in np.flatnonzero(~(half.all(0) & ordered)).tolist():
        reduced[k] = Lattice(cells[k]).get_lll_reduced_lattice().matrix
        turn[k] = cells[k] @ np.linalg.inv(reduced[k])
    return reduced, turn
