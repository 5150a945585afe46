"""The symmetry operations of a CIF's data block: as listed, or by the name or number of its space group."""

import math
import re
from collections.abc import Iterator
from functools import lru_cache

import gemmi
import numpy as np

from hpcgen.crystal.refused import Refused

NOTHING = {"", "?", "."}
_OPERATIONS = (
    "_symmetry_equiv_pos_as_xyz",
    "_space_group_symop_operation_xyz",
    "_space_group_symop.operation_xyz",
    "_symmetry_equiv_pos_as_xyz_",
    "_space_group_symop_operation_xyz_",
)
_NAMES = ("_symmetry_space_group_name_H-M", "_space_group_name_H-M_alt", "_symmetry_space_group_name_H_M")
_HALL_NAMES = ("_symmetry_space_group_name_Hall", "_space_group_name_Hall")
_NUMBERS = ("_space_group_IT_number", "_symmetry_Int_Tables_number")
_MAGNETIC = ("_space_group_symop_magn", "_space_group_magn", "_space_group.magn")
_TRIPLET = set("xyz0123456789+-*/., '\"")

Operations = tuple[np.ndarray, np.ndarray]  # rotations (G, 3, 3), translations (G, 3): frac' = R frac + t


class Undecided(Exception):
    """This file is for pymatgen. Carries the refusal to give if pymatgen fails too."""


def number_of(word: str) -> float:
    """A CIF number without its uncertainty: 5.4321(3) is 5.4321. Raises ValueError."""
    value = float(word.strip("'\" \t\r\n;").split("(", 1)[0])
    if not math.isfinite(value) or "_" in word:
        raise ValueError(f"{word!r} is not a number")
    return value


def value_of(block: gemmi.cif.Block, tags: tuple[str, ...]) -> str:
    """The first of the tags that says something."""
    for tag in tags:
        word = block.find_value(tag)
        if word and word not in NOTHING:
            return gemmi.cif.as_string(word).strip()
    return ""


IDENTITY: Operations = (np.eye(3)[None], np.zeros((1, 3)))


def operations_of(block: gemmi.cif.Block, angles: list[float]) -> list[Operations] | None:
    """Operations that the atoms are to be expanded by, several where the origin is open; None for P1."""
    for tag in _OPERATIONS:
        column = block.find_values(tag)
        if column:
            words = tuple([column[k] for k in range(len(column))])  # a third of the time of tuple(column)
            if not NOTHING.issuperset(words):
                return _of_triplets(words)
    if any(tag.lower().startswith(_MAGNETIC) for tag in _tags(block)):
        raise Undecided(Refused("unknown-symmetry", "magnetic operations that pymatgen does not read"))
    hall, name, number = value_of(block, _HALL_NAMES), value_of(block, _NAMES), value_of(block, _NUMBERS)
    return _of_names(hall, name, number, angles[0], angles[2])


def _tags(block: gemmi.cif.Block) -> Iterator[str]:
    for item in block:
        if item.loop is not None:
            yield from item.loop.tags
        elif isinstance(item.pair, list | tuple):
            yield item.pair[0]


@lru_cache(maxsize=1024)
def _of_triplets(words: tuple[str, ...]) -> list[Operations] | None:
    try:
        operations = [gemmi.Op(gemmi.cif.as_string(word).replace(" ", "")) for word in words]
    except (RuntimeError, ValueError) as fault:
        refusal = Refused("unknown-symmetry", f"operations {words[:3]}: {fault}")
        if _TRIPLET.issuperset("".join(words).lower()):
            raise Undecided(refusal) from fault
        raise refusal from fault
    return _as_arrays(operations)


def _as_arrays(operations: list[gemmi.Op]) -> list[Operations] | None:
    identity = gemmi.Op("x,y,z")
    if all(operation == identity for operation in operations):
        return None
    rotations = np.array([operation.rot for operation in operations]) / gemmi.Op.DEN
    return [(rotations, np.array([operation.tran for operation in operations]) / gemmi.Op.DEN)]


@lru_cache(maxsize=1024)
def _of_names(hall: str, name: str, number: str, alpha: float, gamma: float) -> list[Operations] | None:
    """By Hall symbol where the name agrees, by Hermann-Mauguin name, by number, else P1 as pymatgen."""
    group = _group_of_name(name, alpha, gamma) if name else None
    by_hall = _group_of_hall(hall) if hall else None
    if by_hall is not None and (group is None or group.number == by_hall.number):
        return _as_arrays(list(by_hall.operations()))
    if group is None and name:
        raise Undecided(Refused("unknown-symmetry", f"no operations, and space group {name!r} is unknown"))
    if group is None and number:
        try:
            group = gemmi.find_spacegroup_by_number(int(number_of(number)))
        except (ValueError, RuntimeError) as fault:
            raise Refused("unknown-symmetry", f"space group number {number!r}, want 1 to 230") from fault
        if group is None:
            raise Refused("unknown-symmetry", f"space group number {number!r}, want 1 to 230")
        name, group = group.hm, _group_of_name(group.hm, alpha, gamma)
    if group is None:
        return None
    if group.ext in ("1", "2") and not name.rstrip().endswith((":1", ":2", "S", "Z")):
        both = [gemmi.find_spacegroup_by_name(f"{group.hm}:{origin}") for origin in "12"]
        return [each for origin in both for each in _as_arrays(list(origin.operations())) or []]
    return _as_arrays(list(group.operations()))


def _group_of_name(name: str, alpha: float, gamma: float) -> gemmi.SpaceGroup | None:
    """Also with the ICSD's endings: S and Z for the first and second origin, HR and H for hexagonal axes."""
    name = name.replace("_", " ").strip()
    plain = re.sub(r"\s*:?\s*(HR|RS|[SZ])$", "", name)
    ending = {"S": ":1", "Z": ":2", "HR": ":H", "RS": ":R"}.get(name[len(plain) :].strip(" :"), "")
    for word in (name, plain + ending, plain) if ending else (name,):
        group = gemmi.find_spacegroup_by_name(word, alpha, gamma)
        if group is not None:
            return group
    return None


def _group_of_hall(hall: str) -> gemmi.SpaceGroup | None:
    try:
        return gemmi.find_spacegroup_by_ops(gemmi.symops_from_hall(hall))
    except (RuntimeError, ValueError):
        return None
