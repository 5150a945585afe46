"""CIF texts and CSV files of simple crystals, for tests that must not need outside data."""

import csv
import itertools
import random
from pathlib import Path

CATIONS = ["Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Ba", "Mn", "Fe", "Co", "Ni", "Zn", "Cd", "Pb", "La"]
ANIONS = ["O", "S", "Se", "F", "Cl", "Br"]
PROTOTYPES = {
    "rocksalt": [("A", p) for p in ((0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))]
    + [("X", p) for p in ((0.5, 0.5, 0.5), (0.5, 0, 0), (0, 0.5, 0), (0, 0, 0.5))],
    "caesium": [("A", (0, 0, 0)), ("X", (0.5, 0.5, 0.5))],
    "zincblende": [("A", p) for p in ((0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0))]
    + [("X", p) for p in ((0.25, 0.25, 0.25), (0.25, 0.75, 0.75), (0.75, 0.25, 0.75), (0.75, 0.75, 0.25))],
}
CELL = {"rocksalt": 5.2, "caesium": 3.3, "zincblende": 5.6}


def p1_cif(lengths: tuple, angles: tuple, sites: list[tuple[str, tuple]], occupancies: list | None = None) -> str:
    """A P1 CIF. sites: (type symbol, fractional coordinates)."""
    cell = "".join(
        f"_cell_length_{k} {v}\n_cell_angle_{a} {w}\n"
        for k, v, a, w in zip("abc", lengths, ("alpha", "beta", "gamma"), angles, strict=True)
    )
    loop = "".join(f"_atom_site_{k}\n" for k in ("type_symbol", "label", "fract_x", "fract_y", "fract_z", "occupancy"))
    given = occupancies or [1] * len(sites)
    atoms = "".join(
        f"{symbol} {symbol}{n} {x:.8f} {y:.8f} {z:.8f} {occupancy}\n"
        for n, ((symbol, (x, y, z)), occupancy) in enumerate(zip(sites, given, strict=True))
    )
    return f"data_x\n{cell}_symmetry_space_group_name_H-M 'P 1'\nloop_\n{loop}{atoms}"


def cubic(prototype: str, cation: str, anion: str, scale: float = 1.0) -> str:
    """A cubic AX crystal."""
    symbols = {"A": cation, "X": anion}
    sites = [(symbols[kind], place) for kind, place in PROTOTYPES[prototype]]
    return p1_cif((CELL[prototype] * scale,) * 3, (90, 90, 90), sites)


def rows(count: int) -> list[dict[str, str]]:
    """Distinct AX crystals with a band gap that is sometimes missing."""
    made = []
    for number, (prototype, cation, anion) in enumerate(itertools.product(PROTOTYPES, CATIONS, ANIONS)):
        gap = "" if number % 7 == 0 else f"{number / 50:.3f}"
        scale = 1 + 0.001 * (number % 40)
        cif = cubic(prototype, cation, anion, scale)
        made.append(
            {
                "material_id": f"t-{number}",
                "energy_above_hull": f"{number / 1000}",
                "band_gap": gap,
                "cif": cif,
            }
        )
    assert count <= len(made)
    return random.Random(5).sample(made, count)


def write_csv(path: Path, made: list[dict[str, str]]) -> Path:
    """Write rows as a CDVAE-style CSV."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(made[0]))
        table.writeheader()
        table.writerows(made)
    return path
