"""The texts that other programs read: a crystal, its id and its columns as CIF, POSCAR, extxyz or pymatgen's JSON."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import gemmi
import numpy as np
import torch

from hpcgen.crystal.composition import SYMBOLS
from hpcgen.crystal.convert import to_ase, to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import lattice_parameters
from hpcgen.crystal.symmetry import space_group_number
from hpcgen.crystal.torus import wrap

SYMPREC = 0.01  # Å, of the space group that a CIF in P1 names
Facts = Mapping[str, Any]  # columns of one crystal, without missing ones

__all__ = ["SYMPREC", "cif", "extxyz", "poscar", "pymatgen_json"]


def cif(crystal: Crystals, name: str, id: str, facts: Facts, symprec: float | None = None) -> str:
    """One data block. Without symprec all atoms as they are, in P1, and the space group found as an extra item.

    With symprec (Å) the symmetrised crystal in its conventional cell, by pymatgen and spglib; P1 where they find none.
    A CIF has no orientation: the crystal is the same one turned, never mirrored.
    """
    block = _symmetrised(crystal, symprec) if symprec is not None else None
    if block is None:
        block = _p1(crystal)
        block.set_pair("_hpcgen_space_group_found", str(space_group_number(crystal, SYMPREC) or "?"))
        block.set_pair("_hpcgen_space_group_symprec", f"{SYMPREC:g}")
    block.name = name
    for key, value in {**facts, "id": id}.items():
        block.set_pair(f"_hpcgen_{key}", gemmi.cif.quote(_line(value)))
    document = gemmi.cif.Document()
    document.add_copied_block(block)
    return document.as_string()


def _p1(crystal: Crystals) -> gemmi.cif.Block:
    frac, _, numbers = _right_handed(crystal)
    lengths, angles = lattice_parameters(crystal.lattice.double())
    symbols = [SYMBOLS[z] for z in numbers.tolist()]
    counts = {symbol: symbols.count(symbol) for symbol in sorted(set(symbols))}
    block = gemmi.cif.Block("P1")
    block.set_pair("_symmetry_space_group_name_H-M", "'P 1'")
    for names, values in ((("a", "b", "c"), lengths), (("alpha", "beta", "gamma"), angles)):
        for axis, value in zip(names, values[0].tolist(), strict=True):
            block.set_pair(f"_cell_{'length' if len(axis) == 1 else 'angle'}_{axis}", f"{value:.12g}")
    block.set_pair("_symmetry_Int_Tables_number", "1")
    block.set_pair("_chemical_formula_sum", f"'{' '.join(f'{symbol}{n}' for symbol, n in counts.items())}'")
    block.set_pair("_cell_volume", f"{crystal.volume.item():.12g}")
    operations = block.init_loop("_symmetry_equiv_pos_", ["site_id", "as_xyz"])
    operations.add_row(["1", "'x, y, z'"])
    sites = block.init_loop("_atom_site_", ["type_symbol", "label", "symmetry_multiplicity", "fract_x", "fract_y",
                                            "fract_z", "occupancy"])  # fmt: skip
    for at, (symbol, xyz) in enumerate(zip(symbols, frac.tolist(), strict=True)):
        sites.add_row([symbol, f"{symbol}{at}", "1", *(f"{x:.12f}" for x in xyz), "1"])
    return block


def _symmetrised(crystal: Crystals, symprec: float) -> gemmi.cif.Block | None:
    """What pymatgen writes; None where spglib finds no symmetry, which pymatgen meets in one of several ways."""
    from pymatgen.io.cif import CifWriter

    frac, lattice, numbers = _right_handed(crystal)
    right = Crystals(
        torch.from_numpy(frac), torch.from_numpy(lattice)[None], torch.from_numpy(numbers), crystal.num_atoms
    )
    try:
        text = str(CifWriter(to_pymatgen(right)[0], symprec=symprec, significant_figures=10))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError):
        return None
    block = gemmi.cif.read_string(text).sole_block()
    block.set_pair("_hpcgen_space_group_symprec", f"{symprec:g}")
    return block


def poscar(crystal: Crystals, id: str) -> str:
    """VASP 5, fractional coordinates, atoms by element, id as the comment. Right-handed, as VASP wants its cells."""
    frac, lattice, numbers = _right_handed(crystal)
    order = np.argsort(numbers, kind="stable")
    elements, counts = np.unique(numbers, return_counts=True)
    lines = [
        _line(id),
        "1.0",
        *(" ".join(f"{x:21.16f}" for x in row) for row in lattice.tolist()),
        " ".join(SYMBOLS[z] for z in elements.tolist()),
        " ".join(map(str, counts.tolist())),
        "direct",
        *(" ".join(f"{x:18.16f}" for x in frac[at].tolist()) + f" {SYMBOLS[numbers[at]]}" for at in order.tolist()),
    ]
    return "\n".join(lines) + "\n"


def extxyz(crystals: Crystals, ids: list[str], facts: Sequence[Facts]) -> str:
    """Frames as ASE writes them, id and columns in the comment line (`atoms.info`). Cartesian, in 1e-8 Å.

    ASE reads a text that looks like a number or T as one; empty texts, which the format cannot tell, are left out.
    """
    from ase.io.extxyz import write_xyz

    frames = to_ase(crystals)
    for frame, id, known in zip(frames, ids, facts, strict=True):
        words = {key: _escaped(value) for key, value in {**known, "id": id}.items()}
        frame.info.update({key: value for key, value in words.items() if value != ""})
    text = io.StringIO()
    write_xyz(text, frames)
    return text.getvalue()


def pymatgen_json(crystals: Crystals, ids: list[str], facts: Sequence[Facts]) -> list[str]:
    """Each as `Structure.as_dict()` on one line, id and columns in its `properties`."""
    lines = []
    for structure, id, known in zip(to_pymatgen(crystals), ids, facts, strict=True):
        structure.properties = {**known, "id": id}
        lines.append(json.dumps(structure.as_dict(), ensure_ascii=False))
    return lines


def _right_handed(crystal: Crystals) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """frac (A, 3), lattice (3, 3) and atomic numbers (A,) of one crystal in a right-handed cell of the same edges.

    Where the cell is left-handed all of its vectors are turned round, and the coordinates with them: the crystal
    stays, while its lengths and angles alone would make its mirror image.
    """
    frac, lattice = crystal.frac_coords.double(), crystal.lattice[0].double()
    if torch.linalg.det(lattice) < 0:
        frac, lattice = wrap(-frac), -lattice
    return frac.numpy(), lattice.numpy(), crystal.atomic_numbers.numpy()


def _escaped(value: Any) -> Any:
    """What ASE's writer leaves to others: one line, backslashes doubled."""
    return _line(value).replace("\\", "\\\\") if isinstance(value, str) else value


def _line(value: Any) -> str:
    """A value as one line of text."""
    return " ".join(str(value).split())
