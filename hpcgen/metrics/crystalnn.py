"""Near neighbours as pymatgen's CrystalNN weighs them, for all sites of many crystals at once.

Pan et al., Inorg. Chem. 60, 1590 (2021), with its default settings and no oxidation states: every face of an atom's
Voronoi cell is a neighbour, weighed by the solid angle of the face, by how compact it is, by the difference of
electronegativities and by distance.
"""

import math
import warnings
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import torch
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import edge_vectors, radius_edges

CUTOFF = 7.0  # Å; atoms that may bound a Voronoi cell, to begin with
EDGE = 1e-9  # Å; pymatgen's search takes what is so little beyond its cut-off
FARTHEST = 1e4  # Å; a cell with a vertex beyond may as well be open
CLOSEST = 1e-2  # Å; the tessellation that CrystalNN asks errs for atoms nearer than that
LOSS = 1e-6  # steradian by which the faces of a cell may miss 4π
LEAST_ANGLE = 1e-9  # steradian; a smaller face is rounding
MOST_ASKED = 1_000_000  # neighbours in all that pymatgen may have to look at for one crystal: some 2 minutes
NEAR, FAR = 0.5, 1.0  # Å beyond the sum of the radii: where a weight begins to fall, and where it is nothing
CHEMISTRY = 3.0  # weight of the difference of electronegativities, of which 3.3 is the largest


@dataclass(frozen=True)
class Neighbours:
    """E near neighbours of the sites of a batch, sorted by site, then falling weight."""

    site: np.ndarray  # (E,) int64
    direction: np.ndarray  # (E, 3) unit vectors from the site
    weight: np.ndarray  # (E,) above 0, at most 1, three digits
    exact: np.ndarray  # (E,) the weight before it was rounded, by which they are sorted


@dataclass(frozen=True)
class Faces:
    """F faces of the Voronoi cells of the sites of a batch."""

    site: np.ndarray  # (F,) int64
    atom: np.ndarray  # (F,) int64: of which the neighbour across the face is an image
    vector: np.ndarray  # (F, 3) Å from the site to it
    angle: np.ndarray  # (F,) steradian, above 0
    area: np.ndarray  # (F,) Å²


class NoCell(Exception):
    """An atom whose Voronoi cell is open, or cannot be found."""


def coordination(near: Neighbours) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coordination numbers of every site and how likely they are: site, number, share of 1, first of its neighbours.

    Neighbours above each distinct weight make a coordination number; its share is that of the area of a quarter
    circle between this weight and the next lower one. The rest, if any, is coordination number 0. All (N,).
    """
    starts = np.flatnonzero(np.diff(near.site, prepend=-1))
    first = np.repeat(starts, np.diff(starts, append=len(near.site)))
    next_site, next_weight = (np.append(column[1:], -1) for column in (near.site, near.weight))
    last = np.flatnonzero((near.site != next_site) | (near.weight != next_weight))
    lower = np.where(near.site == next_site, next_weight, 0.0)[last]
    return near.site[last], last - first[last] + 1, _quarter(near.weight[last]) - _quarter(lower), first[last]


def _quarter(x: np.ndarray) -> np.ndarray:
    """Share of the area of a quarter circle of radius 1 from 0 to x."""
    return (x * np.sqrt(1 - x * x) + np.arcsin(x)) * (2 / math.pi)


@lru_cache(maxsize=1)
def radii() -> np.ndarray:
    """Covalent radii of pymatgen by atomic number, nan where it has none. (119,) Å."""
    from pymatgen.analysis.molecule_structure_comparator import CovalentRadius
    from pymatgen.core import Element

    symbols = [Element.from_Z(number).symbol for number in range(1, 119)]
    return np.array([math.nan, *(CovalentRadius.radius.get(symbol, math.nan) for symbol in symbols)])


@lru_cache(maxsize=1)
def _electronegativities() -> np.ndarray:
    """Pauling's, by atomic number, nan where an element has none. (119,)"""
    from pymatgen.core import Element

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen's, for each that has none
        return np.array([math.nan, *(float(Element.from_Z(number).X) for number in range(1, 119))])


# ---- weights -------------------------------------------------------------------------------------------------


def weighed(faces: Faces, numbers: np.ndarray) -> Neighbours:
    """Near neighbours of sites with faces, which are sorted by site. numbers (A,) are the atomic numbers of the batch.

    Elements must be among those that `radii` knows.
    """
    starts = np.flatnonzero(np.diff(faces.site, prepend=-1))
    counts = np.diff(starts, append=len(faces.site))
    if not len(starts):
        return Neighbours(faces.site, faces.vector, faces.angle, faces.angle)
    mine, other = numbers[faces.site], numbers[faces.atom]
    pull = np.abs(_electronegativities()[mine] - _electronegativities()[other])
    weight = faces.angle / np.repeat(np.maximum.reduceat(faces.angle, starts), counts)
    weight = weight * (faces.angle / faces.area) * (1 + CHEMISTRY * np.sqrt(np.nan_to_num(pull) / 3.3))
    weight = weight / np.repeat(np.maximum.reduceat(weight, starts), counts)
    distance = np.sqrt((faces.vector * faces.vector).sum(-1))
    beyond = (distance - (radii()[mine] + radii()[other] + NEAR)) / (FAR - NEAR)
    weight = weight * ((np.cos(beyond.clip(0.0, 1.0) * math.pi) + 1) * 0.5)
    rounded = np.round(weight, 3)
    order = np.lexsort((-weight, faces.site))
    order = order[rounded[order] > 0]
    return Neighbours(faces.site[order], faces.vector[order] / distance[order, None], rounded[order], weight[order])


# ---- Voronoi cells -------------------------------------------------------------------------------------------


def voronoi_faces(crystals: Crystals) -> tuple[Faces, dict[int, str]]:
    """The Voronoi cells of all sites, sorted by site, and why crystals are left out: a cell is open, say.

    Nearly all come from convex hulls; where a cell is open or numerically doubtful, pymatgen's VoronoiNN is asked,
    so that what fails there fails here. crystals: on the CPU in float64. Raises ValueError for what `radius_edges`
    cannot search.
    """
    part, doubtful = _cells(crystals)
    parts, reasons = [part], {}
    first, of_crystal = crystals.ptr.numpy(), crystals.batch.numpy()
    for b in np.unique(of_crystal[doubtful]).tolist():
        atoms = doubtful[of_crystal[doubtful] == b] - first[b]
        try:
            parts += [_moved(faces, int(first[b])) for faces in _asked(crystals[b], atoms.tolist())]
        except NoCell as failure:
            reasons[b] = str(failure)
    faces = Faces(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(Faces)))
    faces = _some(faces, faces.site.argsort(kind="stable"))
    return _some(faces, ~np.isin(of_crystal[faces.site], list(reasons))), reasons


def _some(faces: Faces, which: np.ndarray) -> Faces:
    return Faces(*(getattr(faces, column.name)[which] for column in fields(Faces)))


def _moved(faces: Faces, first: int) -> Faces:
    """Faces of one crystal in a batch where `first` is its first atom."""
    return replace(faces, site=faces.site + first, atom=faces.atom + first)


def expected_neighbours(crystals: Crystals, cutoff: float = CUTOFF) -> Tensor:
    """Neighbours within `cutoff` Å of an atom, by the mean density. (B,) float64."""
    return crystals.num_atoms / crystals.volume * (4 / 3 * math.pi * cutoff**3)


def _asked(crystal: Crystals, atoms: list[int]) -> list[Faces]:
    """The cells of some atoms of one crystal by pymatgen's VoronoiNN itself. Raises NoCell where that fails.

    It doubles its cut-off as long as a cell seems open, up to the longest diagonal of the crystal's cell.
    """
    from pymatgen.analysis.local_env import VoronoiNN

    signs = torch.tensor([[1.0, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1]], dtype=torch.float64)
    longest = float(torch.linalg.vector_norm(signs @ crystal.lattice[0], dim=-1).max())
    expected = float(expected_neighbours(crystal, max(CUTOFF, longest)))
    if len(atoms) * expected > MOST_ASKED:
        raise NoCell(f"{len(atoms)} open or crowded Voronoi cells among up to {expected:.3g} neighbours each")
    structure, found = to_pymatgen(crystal)[0], []
    for atom in atoms:
        try:
            cell = VoronoiNN(cutoff=CUTOFF).get_voronoi_polyhedra(structure, atom).values()
        except (RuntimeError, ValueError) as error:
            raise NoCell(f"atom {atom}: {str(error).splitlines()[0]}") from error
        rows = [face for face in cell if face["solid_angle"] > 0]
        found.append(
            Faces(
                np.full(len(rows), atom),
                np.array([face["site"].index for face in rows]),
                np.array([face["site"].coords for face in rows]) - structure[atom].coords,
                np.array([face["solid_angle"] for face in rows]),
                np.array([face["area"] for face in rows]),
            )
        )
    return found


def _cells(crystals: Crystals) -> tuple[Faces, np.ndarray]:
    """Voronoi cells of all atoms among those within CUTOFF, and the atoms whose cell is open or not certain.

    A neighbour at q bounds the cell by the plane x·p = 1 with p = 2 q / |q|². The vertices of the cell are then the
    planes of the convex hull of all p, and its faces the hull's vertices: one hull of some 80 points for each atom.
    """
    edges = radius_edges(crystals, CUTOFF + EDGE)
    vectors, owner = edge_vectors(crystals, edges).numpy(), edges.index[0].numpy()
    square = (vectors * vectors).sum(-1)
    poles = 2 * vectors / np.where(square > 0, square, 1.0)[:, None]
    ptr = np.searchsorted(owner, np.arange(len(crystals.batch) + 1))
    doubtful = np.bincount(owner[square < CLOSEST**2], minlength=len(crystals.batch)) > 0
    hulls = []
    for atom in np.flatnonzero(~doubtful).tolist():
        start, stop = ptr[atom : atom + 2].tolist()
        if (hull := _hull(poles[start:stop])) is not None:
            hulls.append((start, hull))
    angle, area = _measured(hulls, vectors, poles)
    sphere = np.bincount(owner, angle, minlength=len(doubtful))  # nothing for a cell that is open
    doubtful |= np.abs(sphere - 4 * math.pi) > LOSS
    keep = np.flatnonzero((angle > LEAST_ANGLE) & ~doubtful[owner])
    faces = Faces(owner[keep], edges.index[1].numpy()[keep], vectors[keep], angle[keep], area[keep])
    return faces, np.flatnonzero(doubtful)


def _hull(poles: np.ndarray) -> ConvexHull | None:
    """Of points (n, 3), if it holds the origin well inside: if all planes are at least 1 / FARTHEST from it."""
    try:
        hull = ConvexHull(poles)
    except (QhullError, ValueError):  # fewer than 4 points, or all in one plane
        return None
    return hull if hull.equations[:, 3].max() < -1 / FARTHEST else None


def _measured(
    hulls: list[tuple[int, ConvexHull]], vectors: np.ndarray, poles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Solid angle in steradian and area in Å² of the faces towards all neighbours, 0 where there is none. (E,), (E,)

    hulls: with the first neighbour of each, of `poles` (E, 3). vectors (E, 3) Å. Two planes of a hull that share an
    edge j k are the ends u, v of an edge of the cell, between its faces j and k. With the foot f = q / 2 of the
    centre on face j, the triangle f u v has the area f·(u × v) / 2|f|, and, seen from the centre, half its solid
    angle has the tangent f·(u × v) / (|f||u||v| + f·u|v| + f·v|u| + u·v|f|), where f·u = f·v = |f|² (van Oosterom &
    Strackee, IEEE Trans. Biomed. Eng. 30, 125, 1983).
    """
    if not hulls:
        return np.zeros(len(vectors)), np.zeros(len(vectors))
    sizes = np.array([len(hull.simplices) for _, hull in hulls])
    first = np.repeat(np.cumsum(sizes) - sizes, sizes)[:, None]
    corner = np.concatenate([hull.equations for _, hull in hulls])
    corner = corner[:, :3] / -corner[:, 3:]  # (P, 3) Å, one for each plane
    points = np.concatenate([hull.simplices + start for start, hull in hulls])  # (P, 3): neighbours
    across = np.concatenate([hull.neighbors for _, hull in hulls]) + first  # (P, 3): plane opposite each of them
    a, b, c = (poles[points[:, k]] for k in range(3))
    inward = (np.cross(b - a, c - a) * corner).sum(-1) < 0
    points[inward], across[inward] = points[inward][:, [0, 2, 1]], across[inward][:, [0, 2, 1]]
    j = points[:, [1, 2, 0]].reshape(-1)  # from j to k, counterclockwise seen from outside
    u, v = corner[across.reshape(-1)], np.repeat(corner, 3, axis=0)
    foot = vectors[j] / 2
    height, far_u, far_v = (np.sqrt((x * x).sum(-1)) for x in (foot, u, v))
    triple = (foot * np.cross(u, v)).sum(-1)
    rest = height * (far_u * far_v + height * (far_u + far_v) + (u * v).sum(-1))
    angle = np.bincount(j, 2 * np.arctan2(triple, rest), minlength=len(vectors))
    return angle, np.bincount(j, triple / (2 * height), minlength=len(vectors))
