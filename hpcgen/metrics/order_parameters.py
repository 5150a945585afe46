"""Local order parameters: how near the directions from an atom to its neighbours come to a tetrahedron, an octahedron …

They are those of pymatgen's `LocalStructOrderParams` (Zimmermann, Horton, Jain & Haranczyk, Front. Mater. 4:34, 2017,
and Zimmermann & Jain, RSC Adv. 10:6063, 2020), many sites of one coordination number at a time. Each neighbour j in
turn is put at the north pole, each other neighbour k on the prime meridian; every further neighbour m then has a polar
angle θ_jm and an azimuth φ_jkm, and a motif is what it expects of the two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

ON_AXIS = 1e-12  # sine of θ below which a neighbour counts as lying on the axis and has no azimuth
SOUTH = 0.75 * math.pi  # θ from which a neighbour counts as being at the south pole, for most motifs
SWAY = 1e-9  # what a pair adds to an order parameter that counts
RIGHT = 1e-9  # cosine of an angle that is right but for rounding
MOST_ANGLES = 2_000_000  # azimuths held at a time, 8 bytes each and some ten such arrays


@dataclass(frozen=True)
class Angles:
    """Of S sites with k neighbours each, in radians."""

    cosine: np.ndarray  # (S, k, k) cos θ_jm
    polar: np.ndarray  # (S, k, k) θ_jm
    azimuth: np.ndarray  # (S, k, k, k) φ_jkm from 0 to π
    distinct: np.ndarray  # (k, k, k) bool: j, k and m are three
    meridian: np.ndarray  # (S, k, k, 1) bool: k is not on j's axis, so it sets a prime meridian
    third: np.ndarray  # (S, k, k, k) bool: they are three, k sets a meridian, and m has an azimuth


def order_parameters(directions: np.ndarray) -> np.ndarray:
    """All order parameters of one coordination number: (S, k, 3) unit vectors -> (S, len(MOTIFS[k])).

    Only "body-centered cubic" depends on the order of the neighbours. Raises KeyError for a k that has none.
    """
    motifs, k = list(MOTIFS[directions.shape[1]].values()), directions.shape[1]
    step = max(1, MOST_ANGLES // k**3)
    parts = [np.zeros((0, len(motifs)))]
    for start in range(0, len(directions), step):
        angles = _angles(directions[start : start + step])
        parts.append(np.stack([motif(angles) for motif in motifs], 1))
    return np.concatenate(parts)


def _angles(directions: np.ndarray) -> Angles:
    """(S, k, 3) unit vectors -> all polar and azimuthal angles."""
    k = directions.shape[1]
    poles, others = directions[:, :, None], directions[:, None]
    inner = (poles * others).sum(-1)
    cosine = inner.clip(-1.0, 1.0)
    across = others - (inner / (poles * poles).sum(-1))[..., None] * poles  # (S, k, k, 3)
    sine = np.sqrt((across * across).sum(-1))
    same = np.eye(k, dtype=bool)
    off_axis = (sine >= ON_AXIS) & ~same
    across = across / np.where(off_axis, sine, 1.0)[..., None]
    azimuth = np.arccos((across @ across.swapaxes(-1, -2)).clip(-1.0, 1.0))
    distinct = ~(same[:, :, None] | same[:, None] | same)
    meridian = off_axis[..., None]
    third = distinct & meridian & off_axis[:, :, None]
    return Angles(cosine, np.arccos(cosine), azimuth, distinct, meridian, third)


def _bell(angle: np.ndarray, target: float | np.ndarray, sharpness: float) -> np.ndarray:
    """1 at the target and less on both sides; angle in radians, target and 1 / sharpness in units of π."""
    return np.exp(-0.5 * (sharpness * (angle / math.pi - target)) ** 2)


def _best(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The best mean over all choices of pole and meridian. (S, k, k), (S, k, k) -> (S,)."""
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0).max((1, 2))


def single_bond(angles: Angles) -> np.ndarray:
    """Of one neighbour: 1."""
    return np.ones(len(angles.polar))


def bent(angles: Angles, target: float, sharpness: float) -> np.ndarray:
    """Of two neighbours: the bell of their angle."""
    return (_bell(angles.polar[:, 0, 1], target, sharpness) + _bell(angles.polar[:, 1, 0], target, sharpness)) / 2


def cone(angles: Angles, bell: Callable[[np.ndarray], np.ndarray], folds: float) -> np.ndarray:
    """Neighbours on one cone round the pole, π / folds apart in azimuth: the bell of θ times cos²(folds φ)."""
    near = bell(angles.polar)
    ring = near[:, :, None] * np.cos(folds * angles.azimuth) ** 2
    off_diagonal = ~np.eye(near.shape[1], dtype=bool)
    total = near * off_diagonal + (ring * angles.third).sum(-1)
    return _best(total, off_diagonal + angles.third.sum(-1))


def belt(
    angles: Angles,
    bell: Callable[[np.ndarray], np.ndarray],
    folds: float,
    south_sharpness: float,
    south: float = SOUTH,
    widest: float = math.inf,
) -> np.ndarray:
    """Neighbours on a belt, π / folds apart in azimuth, and at the south pole, `south` or more from the north pole.

    widest: azimuth from which a neighbour on the belt does not count.
    """
    polar, size = angles.polar, angles.polar.shape[1]
    northern = (polar < south) & ~np.eye(size, dtype=bool)
    near = bell(polar)
    ring = near[:, :, None] * np.cos(folds * angles.azimuth) ** 2
    on_belt = angles.third & northern[..., None] & northern[:, :, None] & (angles.azimuth < widest)
    at_pole = angles.meridian & angles.distinct & (polar >= south)[:, :, None]
    pole = _bell(polar, 1.0, south_sharpness)[:, :, None]
    total = near * northern + (ring * on_belt).sum(-1) + (pole * at_pole).sum(-1)
    return _best(total, northern + on_belt.sum(-1) + at_pole.sum(-1))


def body_centred(angles: Angles) -> np.ndarray:
    """Peters, J. Chem. Phys. 131, 244103 (2009); of pairs j before k only, hence the order of neighbours matters."""
    size = angles.polar.shape[1]
    before = np.triu(np.ones((size, size), dtype=bool), 1)
    return (_body_centred_pairs(angles) * before).sum((1, 2)) / (0.5 * size * (6 + (size - 2) * (size - 3)))


def _body_centred_pairs(angles: Angles) -> np.ndarray:
    """What each pair of pole and meridian adds to it. (S, k, k)"""
    opposite = angles.polar >= 2.5261129449194057
    tilt = (angles.polar - 0.5 * math.pi) / math.asin(1 / 3)
    height = math.exp(0.5) * tilt * np.exp(-0.5 * tilt**2)
    wave = (np.cos(3 * angles.azimuth) * height[:, :, None] * angles.third).sum(-1)
    side = np.where(angles.polar > 0.5 * math.pi, 1.0, -1.0)
    return np.where(opposite, 6 * _bell(angles.polar, 1.0, 15), side * wave)


def is_chance(directions: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Whether rounding decides "body-centered cubic" of k neighbours. (S, k, 3), (S, k, k) bool -> (S,) bool.

    It does where the order of two that are `alike` in weight matters, and where an angle is right: there it jumps.
    """
    angles = _angles(directions)
    pairs = _body_centred_pairs(angles)
    turned = alike & (np.abs(pairs - pairs.swapaxes(1, 2)) > SWAY)
    right = (np.abs(angles.cosine) < RIGHT) & (np.abs(pairs) > SWAY)
    return (turned | right).any((1, 2))


def cuboctahedral(angles: Angles) -> np.ndarray:
    """A belt of four at 90°, and four at 60° and at 120° between them, seen from each of twelve; and one opposite."""
    polar, south, low, high = angles.polar, 2.792526803190927, 1.3089969389957472, 1.8325957145940461
    opposite = (polar >= south) * 1.8
    on_belt = (low < polar) & (polar < high)
    between = np.exp(-0.5 * (0.0556 * (np.cos(angles.azimuth - 0.5 * math.pi) - 0.81649658)) ** 2)
    upper, lower = (
        np.where(side, _bell(polar, at, 31.25), 0.0) for side, at in ((polar < low, 1 / 3), (polar > high, 2 / 3))
    )
    ring = np.where(on_belt, _bell(polar, 0.5, 25.5), 0.0)[:, :, None] * np.cos(angles.azimuth) ** 2
    ring = ring + (upper + lower)[:, :, None] * between
    counted = (polar < south) & (on_belt | (polar < low) | (polar > high))
    of_ring = angles.third & on_belt[..., None] & counted[:, :, None]
    total = opposite * _bell(polar, 1.0, 28.75) + (ring * of_ring).sum(-1)
    return _best(total, opposite + of_ring.sum(-1))


def steinhardt(angles: Angles, degree: int) -> np.ndarray:
    """Bond-orientational order q_l, l = 2, 4 or 6 (Steinhardt, Nelson & Ronchetti, Phys. Rev. B 28, 784, 1983).

    By the addition theorem of spherical harmonics q_l² is the mean of the Legendre polynomial P_l(cos θ_jm) over
    all pairs, j = m included.
    """
    coefficients = np.zeros(degree + 1)
    coefficients[degree] = 1.0
    mean = np.polynomial.legendre.legval(angles.cosine, coefficients).mean((1, 2))
    return np.sqrt(mean.clip(0.0))


def _pentagon(sharpness: float) -> Callable[[np.ndarray], np.ndarray]:
    """The bell of 72° up to 108°, of 144° beyond."""
    return lambda polar: _bell(polar, np.where(polar <= 0.6 * math.pi, 0.4, 0.8), sharpness)


def _cone(target: float, sharpness: float, folds: float) -> Callable[[Angles], np.ndarray]:
    return partial(cone, bell=partial(_bell, target=target, sharpness=sharpness), folds=folds)


def _belt(
    sharpness: float, south_sharpness: float, folds: float, widest: float = math.inf
) -> Callable[[Angles], np.ndarray]:
    bell = partial(_bell, target=0.5, sharpness=sharpness)
    return partial(belt, bell=bell, folds=folds, south_sharpness=south_sharpness, widest=widest)


def _hexagon(polar: np.ndarray) -> np.ndarray:
    """The bell of 60° and 120°."""
    return _bell(np.abs(polar - 0.5 * math.pi), 0.16666667, 25.0)


Motif = Callable[[Angles], np.ndarray]  # the order parameter of each of S sites, (S,)
TETRAHEDRON = 0.6081734479693927  # 109.47° in units of π
STEINHARDT: dict[str, Motif] = {f"q{degree}": partial(steinhardt, degree=degree) for degree in (2, 4, 6)}
MOTIFS: dict[
    int, dict[str, Callable[[Angles], np.ndarray]]
] = {  # by coordination number, in matminer's order and names
    1: {"sgl_bd": single_bond},
    2: {
        "L-shaped": partial(bent, target=0.5, sharpness=15.15),
        "water-like": partial(bent, target=0.5802777777777778, sharpness=13.95),
        "bent 120 degrees": partial(bent, target=0.666666666667, sharpness=13.25),
        "bent 150 degrees": partial(bent, target=0.833333333333333, sharpness=12.45),
        "linear": partial(bent, target=1.0, sharpness=8.667),
    },
    3: {
        "trigonal planar": _cone(0.66666666667, 17.5, folds=1),
        "trigonal non-coplanar": _cone(TETRAHEDRON, 18.33, folds=1.5),
        "T-shaped": _cone(0.5, 15.5, folds=1),
    },
    4: {
        "square co-planar": _belt(17.7, 13.5, folds=1),
        "tetrahedral": _cone(TETRAHEDRON, 18.5, folds=1.5),
        "rectangular see-saw-like": _belt(27.0, 11.5, folds=2, widest=0.75 * math.pi),
        "see-saw-like": _belt(15.75, 12.75, folds=1.5),
        "trigonal pyramidal": _cone(0.5, 15.5, folds=1.5),
    },
    5: {
        "pentagonal planar": partial(cone, bell=_pentagon(19.333), folds=1),
        "square pyramidal": _cone(0.5, 14.9, folds=2),
        "trigonal bipyramidal": _belt(16.6, 12.0, folds=1.5),
    },
    6: {
        "hexagonal planar": partial(belt, bell=_hexagon, folds=1, south_sharpness=7.5, south=2.6179938779914944),
        "octahedral": _belt(18.0, 15.0, folds=2),
        "pentagonal pyramidal": _cone(0.5, 13.8, folds=2.5),
    },
    7: {
        "hexagonal pyramidal": _cone(0.5, 12.5, folds=3),
        "pentagonal bipyramidal": _belt(14.75, 12.5, folds=2.5),
    },
    8: {
        "body-centered cubic": body_centred,
        "hexagonal bipyramidal": _belt(13.6, 14.1, folds=3),
    },
    9: STEINHARDT,
    10: STEINHARDT,
    11: STEINHARDT,
    12: {"cuboctahedral": cuboctahedral, **STEINHARDT},
}
