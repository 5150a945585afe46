"""CIF text to crystals: gemmi reads the syntax, this module the meaning, pymatgen what is left over.

Read as pymatgen reads it: 0.3333 is 1/3, sites closer than `site_tolerance` in every coordinate are one site,
the first data block with a structure counts, operations count more than a space group's name. Otherwise:
* D and T are H. Charges are dropped, so that Fe2+ and Fe3+ on one site are one iron.
* Occupancies that sum to 1 within `occupancy_tolerance` are whole, above that they are refused.
* Atoms keep the order of the file, the images of each in the order of the operations.
* A space group with two origins, named without one: the origin that gives the formula, else the first.
* A structure whose hydrogens were not located is refused, where the file tells.

pymatgen is asked where gemmi's syntax fails, where cell or operations are not given plainly (a cubic cell by
`a` alone), for magnetic operations, and for the Pauling file's shared sites ('0.8Nb + 0.2Zr').
"""

import math
import re
import warnings
from collections import Counter
from functools import lru_cache
from typing import Any

import gemmi
import numpy as np

from hpcgen.crystal.check import MAX_ATOMS
from hpcgen.crystal.cif_symmetry import (
    IDENTITY,
    NOTHING,
    Operations,
    Undecided,
    number_of,
    operations_of,
    value_of,
)
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.disorder import Occupants, Sites, is_full, one_crystal, orderings_of, resolve
from hpcgen.crystal.lattice import lattice_of
from hpcgen.crystal.refused import Refused

CODES = {
    "empty": "no text",
    "not-cif": "no CIF syntax, also to pymatgen",
    "no-cell": "cell lengths or angles are missing",
    "bad-cell": "lengths and angles enclose no volume, or are no numbers",
    "no-atoms": "no atom sites, or none that is occupied",
    "no-coordinates": "an atom has no position",
    "unknown-element": "a type symbol or label that names no element",
    "bad-occupancy": "an occupancy that is negative, no number, or sums to more than 1",
    "unknown-symmetry": "operations or a space group that nobody understands",
    "missing-hydrogen": "the formula, or attached_hydrogens, tells of hydrogen without positions",
    "too-many-atoms": "more than max_atoms",
    "disordered": "shared or partly occupied sites, under the policy drop",
    "not-orderable": "no small supercell meets the occupancies, under order:K",
}
SITE_TOLERANCE = 1e-4  # cell units, in each coordinate
OCCUPANCY_TOLERANCE = 0.01
FRAC_TOLERANCE = 1e-4  # relative, of a rounded 1/3 or 2/3
LONGEST_FOR_PYMATGEN = 1_000_000  # characters; its time grows with the square of the number of sites

_WHOLE = NOTHING | {"1", "1.0", "1.00", "1.000", "1.0000", "1."}
_ELEMENTS = {gemmi.Element(number).name: number for number in range(1, 119)} | {"D": 1, "T": 1}
_NO_ELEMENTS = {"wat", "oh", "vac", "va"}  # water, hydroxyl, vacancy
_SCATTERERS = {"Cval": 6, "Sival": 14, "Siva": 14, "Ow": 8, "OW": 8, "Hw": 1, "HW": 1}
_WHOLE_ATOMS: list[Occupants] = [{number: 1.0} for number in range(119)]  # of sites whose kind is their element
_LETTERS = re.compile(r"[A-Za-z]+")
_HYDROGEN = re.compile(r"(?<![A-Za-z])[HDT](?![a-z])")
_CELL = [f"_cell_length_{edge}" for edge in "abc"] + [f"_cell_angle_{a}" for a in ("alpha", "beta", "gamma")]
_SITE = "_atom_site_"

Columns = dict[str, list[str]]


def read_cif(
    text: str | bytes,
    *,
    disorder: str = "drop",
    seed: str | int = 0,
    max_atoms: int = MAX_ATOMS,
    site_tolerance: float = SITE_TOLERANCE,
    occupancy_tolerance: float = OCCUPANCY_TOLERANCE,
    notes: Counter[str] | None = None,
) -> list[Crystals]:
    """The crystal of a CIF, float64, a along x and b in the xy plane; several only for disorder = order:K.

    disorder is drop, majority or order:K (see `disorder`); `seed`, such as the row's id, fixes the orderings.
    notes counts what was done: latin-1, pymatgen, deuterium, disordered, majority-filled, majority-emptied.
    Raises Refused with a code of CODES, UsageError for an unknown policy.
    """
    orderings_of(disorder)
    notes = Counter() if notes is None else notes
    plain = _decoded(text, notes)
    rules = _Rules(max_atoms, site_tolerance, occupancy_tolerance)
    sites = _read(plain, rules, notes)
    if sites.occupants is _WHOLE_ATOMS:
        return [one_crystal(sites.frac_coords, sites.lattice, sites.kind)]
    if all(is_full(occupants) for occupants in sites.occupants):
        numbers = np.array([next(iter(occupants)) for occupants in sites.occupants], dtype=np.int64)
        return [one_crystal(sites.frac_coords, sites.lattice, numbers[sites.kind])]
    notes["disordered"] += 1
    return resolve(sites, disorder, seed=seed, max_atoms=max_atoms, notes=notes)


class _Rules:
    """The limits of one reading."""

    def __init__(self, max_atoms: int, site_tolerance: float, occupancy_tolerance: float) -> None:
        self.max_atoms = max_atoms
        self.site_tolerance = site_tolerance
        self.occupancy_tolerance = occupancy_tolerance

    def refuse_many(self, count: int) -> None:
        if count > self.max_atoms:
            raise Refused("too-many-atoms", f"at least {count} atoms, want at most {self.max_atoms}")


def _decoded(text: str | bytes, notes: Counter[str]) -> str:
    if isinstance(text, bytes):
        raw = text
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            notes["latin-1"] += 1
            text = raw.decode("latin-1")
    text = text.removeprefix("\ufeff")
    if not text or text.isspace():
        raise Refused("empty", "the text is empty, want a CIF")
    return text


def _read(text: str, rules: _Rules, notes: Counter[str]) -> Sites:
    """The first data block with a structure; the refusal of the first one with atoms if there is none."""
    try:
        document = gemmi.cif.read_string(text, 0)
    except (ValueError, RuntimeError) as fault:  # UnicodeEncodeError, of lone surrogates, is a ValueError
        return _by_pymatgen(text, Refused("not-cif", str(fault)), rules, notes)
    refusal = None
    for block in document:
        try:
            return _sites(block, rules, notes)
        except Undecided as undecided:
            return _by_pymatgen(text, undecided.args[0], rules, notes)
        except Refused as refused:
            if refused.code == "too-many-atoms":
                raise
            if refusal is None or refusal.code == "no-atoms":
                refusal = refused
    raise refusal or Refused("not-cif", "no data block")


def _sites(block: gemmi.cif.Block, rules: _Rules, notes: Counter[str]) -> Sites:
    columns = _atom_columns(block)
    if columns is None:
        raise Refused("no-atoms", f"data block {block.name}: no {_SITE}fract_x, want atom sites")
    rules.refuse_many(len(columns["fract_x"]))
    lattice, angles = _cell(block)
    occupancies = _occupancies(columns)
    if occupancies is not None or "calc_flag" in columns:
        columns, occupancies = _occupied(columns, occupancies)
    symbols, species = _species(columns, notes)
    _refuse_missing_hydrogen(block, columns, species)
    frac = _coordinates(columns, symbols)
    candidates = operations_of(block, angles)
    if candidates is None and occupancies is None and not _coincide(frac, rules.site_tolerance):
        return Sites(frac, lattice, np.array(species), _WHOLE_ATOMS)
    shares = [1.0] * len(species) if occupancies is None else occupancies
    found = [_expanded(frac, lattice, species, shares, operations, rules) for operations in candidates or [IDENTITY]]
    return found[0] if len(found) == 1 else _fitting_formula(block, found)


def _atom_columns(block: gemmi.cif.Block) -> Columns | None:
    """The atom_site loop by tag, without `_atom_site_`; a lone atom may stand outside of a loop."""
    for tag in (_SITE + "fract_x", "_atom_site.fract_x"):
        loop = block.find_loop(tag).get_loop()
        if loop is not None:
            tags, values = loop.tags, loop.values
            width = len(tags)
            columns = {tag[len(_SITE) :].lower(): values[k::width] for k, tag in enumerate(tags)}
            return columns if values and "fract_y" in columns and "fract_z" in columns else None
    names = ("fract_x", "fract_y", "fract_z", "type_symbol", "label", "occupancy")
    given = {name: block.find_value(_SITE + name) for name in names}
    lone = {name: [word] for name, word in given.items() if word}
    return lone if all(name in lone for name in names[:3]) else None


def _cell(block: gemmi.cif.Block) -> tuple[np.ndarray, list[float]]:
    """Lattice (3, 3) Å and angles in degrees."""
    words = [block.find_value(tag) for tag in _CELL]
    if None in words or not NOTHING.isdisjoint(words):
        refusal = Refused("no-cell", f"data block {block.name}: cell lengths and angles are {words}, want six numbers")
        if words[0] in (None, *NOTHING):
            raise refusal
        raise Undecided(refusal)  # the crystal system may tell the others
    try:
        numbers = [number_of(word) for word in words]
    except ValueError as fault:
        raise Refused("bad-cell", f"data block {block.name}: {fault}") from fault
    return lattice_of(numbers), numbers[3:]


def _occupancies(columns: Columns) -> list[float] | None:
    """The share of each row; None where all are 1."""
    words = columns.get("occupancy")
    if words is None or _WHOLE.issuperset(words):
        return None
    shares = []
    for word in words:
        try:
            share = 1.0 if word in NOTHING else number_of(word)
        except ValueError as fault:
            raise Refused("bad-occupancy", str(fault)) from fault
        if not share >= 0:
            raise Refused("bad-occupancy", f"occupancy {word}, want 0 to 1")
        shares.append(share)
    return None if all(share == 1.0 for share in shares) else shares


def _occupied(columns: Columns, occupancies: list[float] | None) -> tuple[Columns, list[float] | None]:
    """Without rows of occupancy 0 and without dummy atoms."""
    count = len(columns["fract_x"])
    shares = occupancies or [1.0] * count
    flags = columns.get("calc_flag", [""] * count)
    kept = [k for k in range(count) if shares[k] > 0 and flags[k] != "dum"]
    if not kept:
        raise Refused("no-atoms", "every atom site is empty")
    if len(kept) < count:
        columns = {name: [column[k] for k in kept] for name, column in columns.items()}
    return columns, None if occupancies is None else [shares[k] for k in kept]


def _species(columns: Columns, notes: Counter[str]) -> tuple[list[str], list[int]]:
    """Symbols and atomic numbers of the rows."""
    symbols, labels = columns.get("type_symbol"), columns.get("label")
    if symbols is None and labels is None:
        raise Refused("unknown-element", "neither type symbols nor labels, want one of them")
    if symbols is not None and not NOTHING.isdisjoint(symbols) and labels is not None:
        symbols = [label if symbol in NOTHING else symbol for symbol, label in zip(symbols, labels, strict=True)]
        labels, symbols = symbols, None
    reader = _of_label if symbols is None else _of_symbol
    words = symbols or labels or []
    species = [reader(word) for word in words]
    if 0 in species:
        word = words[species.index(0)]
        refusal = Refused("unknown-element", f"{word!r} names no element")
        if " + " in word:
            raise Undecided(refusal)
        raise refusal
    if 1 in species:
        notes["deuterium"] += sum(
            word.strip("'\"")[:1] in "DT" for word, z in zip(words, species, strict=True) if z == 1
        )
    return words, species


@lru_cache(maxsize=8192)
def _of_symbol(word: str) -> int:
    """Atomic number of a type symbol such as Fe, Fe3+, O2-, FE or D; 0 if it is none."""
    if " + " in word:
        return 0
    match = _LETTERS.match(word.strip("'\" "))
    letters = match.group() if match else ""
    if letters in _SCATTERERS:
        return _SCATTERERS[letters]
    return _ELEMENTS.get(letters.title(), 0) if len(letters) <= 2 else 0


@lru_cache(maxsize=8192)
def _of_label(word: str) -> int:
    """Atomic number of a label such as Fe1 or O2A, two letters tried before one as by pymatgen; 0 if none."""
    match = _LETTERS.match(word.strip("'\" "))
    letters = match.group() if match else ""
    if letters.lower() in _NO_ELEMENTS - {"oh"}:
        return 0
    return _SCATTERERS.get(letters) or _ELEMENTS.get(letters[:2].title()) or _ELEMENTS.get(letters[:1].upper(), 0)


def _refuse_missing_hydrogen(block: gemmi.cif.Block, columns: Columns, species: list[int]) -> None:
    attached = columns.get("attached_hydrogens")
    if attached is not None and not NOTHING.issuperset(word.strip("0.") for word in attached):
        raise Refused("missing-hydrogen", "sites with attached hydrogens, want hydrogen sites")
    formula = block.find_value("_chemical_formula_sum")
    if formula and 1 not in species and _HYDROGEN.search(formula):
        raise Refused("missing-hydrogen", f"formula {formula}, but no hydrogen site")


def _coordinates(columns: Columns, symbols: list[str]) -> np.ndarray:
    """(rows, 3), with 0.3333 and 0.6667 made whole thirds."""
    words = columns["fract_x"] + columns["fract_y"] + columns["fract_z"]
    try:
        if "_" in "".join(words):
            raise ValueError("float reads 1_0 as 10")
        values = [float(word) for word in words]
    except ValueError:
        values = [_coordinate(word, symbol) for word, symbol in zip(words, symbols * 3, strict=True)]
    if not all(map(math.isfinite, values)):
        row = min(k % len(symbols) for k, value in enumerate(values) if not math.isfinite(value))
        raise Refused("no-coordinates", f"{symbols[row]} at {values[row :: len(symbols)]}, want numbers")
    whole = [_whole_third(value) if 0.33 < value < 0.34 or 0.66 < value < 0.67 else value for value in values]
    return np.array(whole).reshape(3, -1).T.copy()


def _whole_third(value: float) -> float:
    """The third that a value near one was rounded from, if it was."""
    third = 1 / 3 if value < 0.5 else 2 / 3
    return third if abs(value - third) <= third * FRAC_TOLERANCE else value


def _coordinate(word: str, symbol: str) -> float:
    try:
        return number_of(word)
    except ValueError as fault:
        raise Refused("no-coordinates", f"{symbol} at {word!r}, want a number") from fault


def _coincide(frac: np.ndarray, tolerance: float) -> bool:
    """Whether two of the sites (S, 3) lie within the tolerance in each coordinate, modulo 1.

    Such sites differ little in a sum of three lopsided triangle waves of slopes up to 1, so they are near each other
    when sorted by it. In plain Python: for ten or twenty sites numpy takes twice as long.
    """
    top, fall = 0.38, 0.38 / 0.62
    waves = [
        (x if x < top else fall - fall * x)
        + 0.79 * (y if y < top else fall - fall * y)
        + 0.62 * (z if z < top else fall - fall * z)
        for x, y, z in (frac % 1.0).tolist()
    ]
    order = sorted(range(len(waves)), key=waves.__getitem__)
    reach = 3 * tolerance + 1e-9
    for offset in range(1, len(order)):
        near = [(i, j) for i, j in zip(order, order[offset:], strict=False) if waves[j] - waves[i] <= reach]
        if not near:
            break
        if any(_in_one_place(frac[i].tolist(), frac[j].tolist(), tolerance) for i, j in near):
            return True
    return False


def _in_one_place(one: list[float], other: list[float], tolerance: float) -> bool:
    apart = [abs(u - v) % 1.0 for u, v in zip(one, other, strict=True)]
    return all(min(step, 1.0 - step) <= tolerance for step in apart)


def _expanded(
    frac: np.ndarray,
    lattice: np.ndarray,
    species: list[int],
    shares: list[float],
    operations: Operations,
    rules: _Rules,
) -> Sites:
    """Every row's images; rows at an image of an earlier one share its sites."""
    rotations, translations = operations
    if len(rotations) > 1:
        frac = _whole_sixths(frac)
    sites = np.empty((0, 3))
    kind: list[int] = []
    occupants: list[Occupants] = []
    for row, number, share in zip(frac, species, shares, strict=True):
        step = sites - row
        at = np.flatnonzero((np.abs(step - np.rint(step)) <= rules.site_tolerance).all(1))
        if at.size:
            shared = occupants[kind[at[0]]]
            shared[number] = shared.get(number, 0.0) + share
            continue
        images = rotations @ row + translations
        images -= np.floor(images)
        if len(images) > 1:
            apart = images[:, None] - images
            same = (np.abs(apart - np.rint(apart)) <= rules.site_tolerance).all(-1)
            images = images[~np.tril(same, -1).any(1)]
        kind += [len(occupants)] * len(images)
        occupants.append({number: share})
        sites = np.concatenate([sites, images])
        rules.refuse_many(len(sites))
    return Sites(sites, lattice, np.array(kind), [_rounded(o, rules.occupancy_tolerance) for o in occupants])


def _whole_sixths(frac: np.ndarray) -> np.ndarray:
    """0.1667 and -0.3333 as fractions, where operations multiply the rounding."""
    sixths = np.rint(frac * 6)
    rounded = (np.abs(frac - sixths / 6) <= 3.4e-5) & (sixths % 3 != 0)
    return np.where(rounded, sixths / 6, frac)


def _rounded(occupants: Occupants, tolerance: float) -> Occupants:
    """Shares that sum to exactly 1 where they do so within the tolerance."""
    total = sum(occupants.values())
    if not total <= 1 + tolerance + 1e-9:
        parts = ", ".join(f"{share:g} of element {number}" for number, share in occupants.items())
        raise Refused("bad-occupancy", f"a site holds {parts}: {total:g} in all, want at most 1")
    if total < 1 - tolerance - 1e-9:
        return occupants
    if len(occupants) == 1:
        return dict.fromkeys(occupants, 1.0)
    return {number: share / total for number, share in occupants.items()}


def _fitting_formula(block: gemmi.cif.Block, found: list[Sites]) -> Sites:
    """The one of several expansions with the composition of the formula, times Z if given; else the first."""
    formula, units = value_of(block, ("_chemical_formula_sum",)), value_of(block, ("_cell_formula_units_Z",))
    wanted: Occupants = {}
    try:
        for symbol, count in re.findall(r"([A-Z][a-z]?)([0-9.]*)", formula):
            number = _ELEMENTS.get(symbol, 0)
            wanted[number] = wanted.get(number, 0.0) + float(count or 1)
        times = number_of(units) if units else 0.0
    except ValueError:
        return found[0]
    for sites in found if wanted else []:
        held: Occupants = {}
        for kind, places in enumerate(np.bincount(sites.kind).tolist()):
            for number, share in sites.occupants[kind].items():
                held[number] = held.get(number, 0.0) + share * places
        ratio = times or sum(held.values()) / sum(wanted.values())
        if held.keys() == wanted.keys() and all(
            abs(held[number] - ratio * count) <= 0.01 * held[number] for number, count in wanted.items()
        ):
            return sites
    return found[0]


def _by_pymatgen(text: str, refusal: Refused, rules: _Rules, notes: Counter[str]) -> Sites:
    """pymatgen's reading; `refusal` where it has none either."""
    lower = text.lower()
    if "_cell_" not in lower or _SITE not in lower or len(text) > LONGEST_FOR_PYMATGEN:
        raise refusal
    from pymatgen.io.cif import CifParser

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parser = CifParser.from_str(text, occupancy_tolerance=1 + rules.occupancy_tolerance)
            structure = parser.parse_structures(primitive=False, on_error="ignore")[0]
        except Exception as fault:  # it raises whatever comes up: KeyError, IndexError, AssertionError, ...
            raise refusal from fault
        said = " ".join(getattr(parser, "warnings", []))
        if refusal.code == "unknown-symmetry" and "Defaulting to P1" in said:
            raise refusal
        notes["pymatgen"] += 1
        rules.refuse_many(len(structure))
        return _from_structure(structure, rules)


def _from_structure(structure: Any, rules: _Rules) -> Sites:
    occupants: list[Occupants] = []
    for site in structure:
        shared: Occupants = {}
        for specie, share in site.species.items():
            number = _ELEMENTS.get(specie.symbol, 0)
            if not number:
                raise Refused("unknown-element", f"{specie.symbol!r} names no element")
            shared[number] = shared.get(number, 0.0) + float(share)
        occupants.append(_rounded(shared, rules.occupancy_tolerance))
    cell = lattice_of([float(value) for value in structure.lattice.parameters])
    frac = np.array(structure.frac_coords, dtype=float)
    return Sites(frac, cell, np.arange(len(frac)), occupants)
