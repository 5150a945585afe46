"""A crystal as balls, sticks and the edges of its cell: for the view that turns, and for a picture of it."""

import json
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcgen.crystal.composition import SYMBOLS
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.validity import LEAST_DISTANCE, covalent_radii
from hpcgen.report.gather import BOND
from hpcgen.report.style import INK, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ATOMS = 600  # drawn, images on the faces of the cell included
_FACE = 0.04  # of a cell edge: atoms this near a face are drawn on the opposite one too
_BALL = 0.42  # of the covalent radius
_STICK = "#8a949d"
_TURN, _TILT = 0.45, 0.28  # radians of the first look


@dataclass(frozen=True)
class Solid:
    """What is drawn of one crystal; positions in Å around the middle of the cell."""

    atoms: np.ndarray  # (M, 3)
    numbers: np.ndarray  # (M,) atomic numbers
    bonds: list[tuple[int, int]]  # of atoms
    corners: np.ndarray  # (8, 3)
    note: str = ""

    def as_json(self) -> str:
        """For view.js. Symbols, colours and radii stand once for each element."""
        from ase.data.colors import jmol_colors

        kinds = sorted(set(self.numbers.tolist()))
        elements = [
            {"symbol": SYMBOLS[z], "colour": _hex(jmol_colors[min(z, len(jmol_colors) - 1)]),
             "radius": round(_BALL * float(covalent_radii()[z]), 3)}
            for z in kinds
        ]  # fmt: skip
        told: dict[str, Any] = {
            "elements": elements,
            "atoms": [[*map(_short, xyz), kinds.index(z)] for xyz, z in zip(self.atoms.tolist(), self.numbers.tolist(),
                                                                            strict=True)],
            "bonds": self.bonds,
            "corners": [list(map(_short, corner)) for corner in self.corners.tolist()],
            "edges": EDGES,
            "look": [_TURN, _TILT],
        }  # fmt: skip
        return json.dumps(told, separators=(",", ":"))


_CORNERS = np.array(list(product((0, 1), repeat=3)), dtype=np.float64)
EDGES = [(i, j) for i in range(8) for j in range(i + 1, 8) if np.abs(_CORNERS[i] - _CORNERS[j]).sum() == 1]


def solid(crystal: Crystals) -> Solid:
    """What to draw of the one crystal of a batch: its atoms, those on faces on both sides, and their bonds.

    The first atom of the rarest element is moved to the corner of the cell, where textbooks have it.
    """
    lattice = crystal.lattice[0].numpy()
    frac, numbers, note = crystal.frac_coords.numpy(), crystal.atomic_numbers.numpy(), ""
    frac = (frac - frac[_rarest(numbers)]) % 1.0
    frac, numbers = _on_both_faces(frac, numbers) if len(frac) <= MOST_ATOMS // 2 else (frac, numbers)
    if len(frac) > MOST_ATOMS:
        note = f"the first {MOST_ATOMS} of {len(frac):,} atoms"
        frac, numbers = frac[:MOST_ATOMS], numbers[:MOST_ATOMS]
    atoms = (frac - 0.5) @ lattice
    return Solid(atoms, numbers, _bonds(atoms, numbers), (_CORNERS - 0.5) @ lattice, note)


def _rarest(numbers: np.ndarray) -> int:
    """The first atom of the element with fewest atoms."""
    _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    return int(first[counts.argmin()])


def _on_both_faces(frac: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Atoms near a face, edge or corner are repeated on the opposite ones. (A, 3) -> (M, 3)."""
    places, kinds = [], []
    for xyz, z in zip(frac, numbers, strict=True):
        shifts = [(0, 1) if x < _FACE else (0, -1) if x > 1 - _FACE else (0,) for x in xyz]
        for shift in product(*shifts):
            places.append(xyz + np.array(shift))
            kinds.append(z)
    return np.array(places), np.array(kinds)


def _bonds(atoms: np.ndarray, numbers: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of drawn atoms closer than BOND times the sum of their covalent radii, those on top of each other not."""
    radius = covalent_radii().numpy()[numbers]
    apart = np.linalg.norm(atoms[:, None] - atoms[None], axis=-1)
    near = np.triu((apart < BOND * (radius[:, None] + radius[None])) & (apart > LEAST_DISTANCE), 1)
    return [(int(i), int(j)) for i, j in zip(*near.nonzero(), strict=True)]


def draw_solid(axes: "Axes", title: str, shown: Solid) -> None:
    """The first look at it, as a picture: back to front, letters on the balls."""
    from ase.data.colors import jmol_colors
    from matplotlib.patches import Circle

    turned, corners = shown.atoms @ _rotation(), shown.corners @ _rotation()
    size = _BALL * covalent_radii().numpy()[shown.numbers]
    for i, j in EDGES:
        axes.plot(*corners[[i, j], :2].T, color=QUIET, lw=0.8, zorder=float(corners[[i, j], 2].min()) - 0.01)
    for i, j in shown.bonds:
        ends = _between(turned[i], turned[j], size[i], size[j])
        axes.plot(*ends[:, :2].T, color=_STICK, lw=2.2, zorder=float(ends[:, 2].mean()), solid_capstyle="butt")
    for xyz, z, reach in zip(turned, shown.numbers.tolist(), size.tolist(), strict=True):
        face, depth = jmol_colors[min(z, len(jmol_colors) - 1)], float(xyz[2])
        axes.add_patch(Circle((xyz[0], xyz[1]), reach, facecolor=face, edgecolor=INK, lw=0.7, zorder=depth))
        ink = "white" if float(np.dot(face, (0.299, 0.587, 0.114))) < 0.5 else INK
        look: dict[str, Any] = {"ha": "center", "va": "center", "size": 6, "color": ink}
        axes.text(xyz[0], xyz[1], SYMBOLS[z], zorder=depth + 1e-6, **look)
    most = 1.03 * max(float(np.abs(corners[:, :2]).max()), float(np.abs(turned[:, :2]).max() + size.max()))
    axes.set(xlim=(-most, most), ylim=(-most, most), aspect="equal")
    axes.axis("off")
    axes.set_title(title.replace("$", r"\$"), pad=4)


def _between(one: np.ndarray, other: np.ndarray, radius: float, other_radius: float) -> np.ndarray:
    """Ends of a bond on the surfaces of its two balls. (3,), (3,) -> (2, 3)."""
    step = (other - one) / np.linalg.norm(other - one)
    return np.array([one + radius * step, other - other_radius * step])


def _rotation() -> np.ndarray:
    """About the vertical by _TURN, then about the horizontal by _TILT; rows are positions. (3, 3)."""
    s, c, u, v = np.sin(_TURN), np.cos(_TURN), np.sin(_TILT), np.cos(_TILT)
    about_y = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    about_x = np.array([[1, 0, 0], [0, v, u], [0, -u, v]])
    return about_y @ about_x


def _hex(rgb: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in rgb)


def _short(value: float) -> float:
    return round(value, 3)
