"""Real crystals of ../shared/data: our reading against pymatgen's, and what purifying keeps.

HPCGEN_REAL_STEP=1 takes all 37,409 rows in the slow tests (minutes), which otherwise take every eighth.
"""

import csv
import gzip
import os
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcgen.crystal.check import check
from hpcgen.crystal.cif import read_cif
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.purify import purify
from hpcgen.crystal.refused import Refused

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
FILES = ("mp20_bt", "mpts52", "lemat_mix", "perov_5", "carbon_24")
TOLERANCE = 1e-6
STEP = int(os.environ.get("HPCGEN_REAL_STEP", "8"))
csv.field_size_limit(sys.maxsize)

Row = tuple[str, str]  # id, CIF


def rows(name: str, step: int = 1) -> list[Row]:
    file = DATA / f"{name}.csv.gz"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    with gzip.open(file, "rt") as opened:
        found = [(row["material_id"], row["cif"]) for row in csv.DictReader(opened)]
    return found[::step]


def few(name: str, count: int) -> list[Row]:
    found = rows(name)
    return found[:: max(1, len(found) // count)][:count]


def difference(text: str) -> str | None:
    """How our reading of a CIF differs from pymatgen's; None where it does not."""
    from pymatgen.core import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = Structure.from_str(text, fmt="cif")
        except Exception as fault:
            theirs, reason = None, f"{type(fault).__name__}: {fault}"
    try:
        (ours,) = read_cif(text)
    except Refused as refused:
        return None if theirs is None else f"refused here ({refused}), read by pymatgen"
    return f"refused by pymatgen ({reason}), read here" if theirs is None else unlike(ours, theirs)


def unlike(ours: Crystals, theirs) -> str | None:
    if len(ours.frac_coords) != len(theirs):
        return f"{len(ours.frac_coords)} sites, pymatgen has {len(theirs)}"
    parameters = to_pymatgen(ours)[0].lattice.parameters
    apart = np.abs(np.array(parameters) - theirs.lattice.parameters).max()
    if not apart < TOLERANCE:
        return f"lattice parameters differ by {apart:.2g}"
    numbers, others = ours.atomic_numbers.numpy(), np.array(theirs.atomic_numbers)
    step = ours.frac_coords.numpy()[:, None] - theirs.frac_coords
    distance = np.abs(step - np.rint(step)).max(-1)
    distance[numbers[:, None] != others] = np.inf
    if len(set(distance.argmin(1).tolist())) < len(numbers):
        return "sites or species do not pair up"
    worst = distance.min(1).max()
    return None if worst < TOLERANCE else f"a site is {worst:.2g} of the cell away"


def changed(row: Row) -> str | None:
    """What becomes of a crystal in purify: a code of refusal, or None."""
    try:
        (crystal,) = read_cif(row[1])
        check(crystal)
    except Refused as refused:
        return str(refused)
    return next((str(refused) for refused in purify(crystal).refused.values()), None)


def matches(row: Row) -> bool | None:
    """Whether StructureMatcher takes a crystal and its purified form for one; None where it is refused.

    It misses the primitive cell of some carbon sheets; then supercells of the purified cell are tried.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    (crystal,) = read_cif(row[1])
    pure = purify(crystal).crystals
    if not len(pure):
        return None
    both = to_pymatgen(Crystals.cat([crystal, pure]))
    tight = {"ltol": 0.02, "stol": 0.03, "angle_tol": 1, "scale": False}
    return any(
        StructureMatcher(**tight, **how).fit(*both)
        for how in ({}, {"primitive_cell": False, "attempt_supercell": True})
    )


def _difference(row: Row) -> str | None:
    return difference(row[1])


def one_thread() -> None:
    torch.set_num_threads(1)


def over(work, given: list[Row]) -> list:
    with ProcessPoolExecutor(2, initializer=one_thread) as pool:
        return list(pool.map(work, given, chunksize=20))


@pytest.mark.parametrize("name", FILES)
def test_reads_as_pymatgen(name: str) -> None:
    assert not [(row[0], found) for row in few(name, 60) if (found := difference(row[1]))]


def test_the_comparison_is_able_to_fail() -> None:
    from pymatgen.core import Structure

    text = few("perov_5", 1)[0][1]
    (crystal,) = read_cif(text)
    theirs = Structure.from_str(text, fmt="cif")
    assert unlike(crystal, theirs) is None
    moved = crystal.frac_coords.clone()
    moved[0, 0] += 1e-5
    numbers, count = crystal.atomic_numbers, crystal.num_atoms
    assert "away" in unlike(Crystals(moved, crystal.lattice, numbers, count), theirs)
    assert "lattice" in unlike(Crystals(crystal.frac_coords, crystal.lattice * 1.0001, numbers, count), theirs)
    assert "pair" in unlike(Crystals(crystal.frac_coords, crystal.lattice, numbers.flip(0) + 1, count), theirs)


@pytest.mark.parametrize("name", FILES)
def test_purified_crystals_match(name: str) -> None:
    found = [matches(row) for row in few(name, 12)]
    assert all(found), found


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_crystals_read_as_pymatgen_reads_them(name: str) -> None:
    given = rows(name, STEP)
    found = over(_difference, given)
    assert not [(row[0], each) for row, each in zip(given, found, strict=True) if each]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_purify_refuses_next_to_none(name: str) -> None:
    given = rows(name, STEP)
    codes = Counter(each.split(":")[0] for each in over(changed, given) if each)
    assert sum(codes.values()) <= 0.002 * len(given), codes


@pytest.mark.slow
def test_a_thousand_purified_crystals_match() -> None:
    given = [row for name in FILES for row in few(name, 250)]
    found = over(matches, given)
    assert found.count(False) == 0, [row[0] for row, fits in zip(given, found, strict=True) if fits is False]
