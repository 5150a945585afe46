"""CIF reading: each way to be broken has its code, and others read as pymatgen reads them."""

import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.io.cif import CifParser

from hpcgen.crystal.cif import CODES, _coincide, read_cif
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.disorder import OCCUPANCY_STEP
from hpcgen.crystal.refused import Refused
from hpcgen.errors import UsageError

SITE_TAGS = "_atom_site_label _atom_site_type_symbol _atom_site_fract_x _atom_site_fract_y _atom_site_fract_z"


def cif(
    cell: str,
    atoms: str,
    *,
    symmetry: str = "",
    head: str = "",
    tags: str = SITE_TAGS + " _atom_site_occupancy",
) -> str:
    """A CIF. cell: six words; atoms: one line each, the tags' values."""
    names = ["length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma"]
    lines = ["data_test", head]
    lines += [f"_cell_{name} {word}" for name, word in zip(names, cell.split(), strict=False)]
    lines += [symmetry, "loop_", *tags.split(), atoms.strip()]
    return "\n".join(line.strip() for line in lines) + "\n"


def operations(number: int, setting: str = "", tag: str = "_space_group_symop_operation_xyz") -> str:
    """All operations of a space group as a CIF loop, as the ICSD lists them."""
    import gemmi

    name = gemmi.find_spacegroup_by_number(number).hm + setting
    group = gemmi.find_spacegroup_by_name(name)
    listed = "\n".join(f"{n} '{op.triplet()}'" for n, op in enumerate(group.operations(), 1))
    number_tag = tag.replace("operation_xyz", "id").replace("as_xyz", "site_id")
    return f"_symmetry_space_group_name_H-M '{group.hm}'\nloop_\n{number_tag}\n{tag}\n{listed}"


NACL = cif("5.64 5.64 5.64 90 90 90", "Na1 Na1+ 0 0 0 1\nCl1 Cl1- 0.5 0.5 0.5 1", symmetry=operations(225))
QUARTZ = cif(
    "4.9134(2) 4.9134(2) 5.4052(3) 90. 90. 120.",
    "Si1 Si4+ 0.4697(1) 0 0.6667 1.\nO1 O2- 0.4133(3) 0.2672(2) 0.7855(2) 1.",
    symmetry=operations(154, tag="_symmetry_equiv_pos_as_xyz"),
)
SPINEL_ATOMS = "Mg1 Mg2+ 0.125 0.125 0.125 1\nAl1 Al3+ 0.5 0.5 0.5 1\nO1 O2- 0.2624(2) 0.2624 0.2624 1"
SPINEL_CELL = "8.083 8.083 8.083 90 90 90"
SPINEL = cif(SPINEL_CELL, SPINEL_ATOMS, symmetry=operations(227, ":2"))
PEROVSKITE = cif(
    "5.3796 7.6394 5.4423 90 90 90",
    "Ca1 Ca2+ 0.0065 0.25 0.0359 1\nTi1 Ti4+ 0 0 0.5 1\nO1 O2- 0.5711 0.25 -0.0161 1\nO2 O2- 0.2897 0.0371 0.711 1",
    symmetry=operations(62),
)
HCP = cif(
    "3.209 3.209 5.211 90 90 120",
    "Mg1 Mg0+ 0.3333 0.6667 0.25 1",
    symmetry=operations(194, tag="_symmetry_equiv_pos_as_xyz"),
)
CORUNDUM = cif(
    "4.7602 4.7602 12.9933 90 90 120",
    "Al1 Al3+ 0 0 0.35216(1) 1\nO1 O2- 0.30624(4) 0 0.25 1",
    symmetry=operations(167),
)
GOOD = {
    "NaCl": (NACL, 8),
    "quartz": (QUARTZ, 9),
    "spinel": (SPINEL, 56),
    "perovskite": (PEROVSKITE, 20),
    "hcp": (HCP, 2),
    "corundum": (CORUNDUM, 30),
}
LIF = "Li1 Li1+ 0 0 0 1\nF1 F1- 0.5 0.5 0.5 1"
CELL = "3 3 3 90 90 90"
HALF = cif("3.6 3.6 3.6 90 90 90", "Fe1 Fe 0 0 0 0.5\nNi1 Ni 0 0 0 0.5", symmetry=operations(225))
THREE_QUARTERS = cif("3.6 3.6 3.6 90 90 90", "Cu1 Cu 0 0 0 0.75\nAu1 Au 0 0 0 0.25", symmetry=operations(225))


def pymatgen_reading(text: str):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CifParser.from_str(text, occupancy_tolerance=1.01).parse_structures(primitive=False)[0]


def code(text: str | bytes, **options) -> str:
    with pytest.raises(Refused) as caught:
        read_cif(text, **options)
    assert caught.value.code in CODES
    assert "\n" not in caught.value.message
    return caught.value.code


def one(text: str | bytes, **options) -> Crystals:
    (crystal,) = read_cif(text, **options)
    assert crystal.frac_coords.dtype == crystal.lattice.dtype == torch.float64
    assert crystal.atomic_numbers.dtype == crystal.num_atoms.dtype == torch.int64
    assert ((crystal.frac_coords >= 0) & (crystal.frac_coords < 1)).all()
    return crystal


def same_as_pymatgen(text: str) -> bool:
    ours, theirs = to_pymatgen(one(text))[0], pymatgen_reading(text)
    theirs.remove_oxidation_states()
    matcher = StructureMatcher(ltol=1e-4, stol=1e-4, angle_tol=1e-2, primitive_cell=False, scale=False)
    same = len(ours) == len(theirs) and abs(ours.volume - theirs.volume) < 1e-6
    return same and bool(matcher.fit(ours, theirs))


@pytest.mark.parametrize("name", GOOD)
def test_icsd_style_files_read_as_by_pymatgen(name: str) -> None:
    text, atoms = GOOD[name]
    assert len(one(text).frac_coords) == atoms
    assert same_as_pymatgen(text)


def test_the_comparison_with_pymatgen_is_able_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcgen.crystal.cif.operations_of", lambda block, angles: None)
    assert not same_as_pymatgen(NACL)


@pytest.mark.parametrize(
    ("symmetry", "atoms"),
    [
        ("_symmetry_space_group_name_H-M 'F m -3 m'", 8),
        ("_space_group_name_H-M_alt 'F m -3 m'", 8),
        ("_symmetry_space_group_name_Hall '-F 4 2 3'", 8),
        ("_space_group_IT_number 225", 8),
        ("_symmetry_Int_Tables_number 225", 8),
        ("_symmetry_Int_Tables_number 1", 2),
        ("", 2),
    ],
)
def test_a_name_or_number_stands_for_the_operations(symmetry: str, atoms: int) -> None:
    text = cif("5.64 5.64 5.64 90 90 90", "Na1 Na1+ 0 0 0 1\nCl1 Cl1- 0.5 0.5 0.5 1", symmetry=symmetry)
    assert len(one(text).frac_coords) == atoms
    assert "Hall" in symmetry or same_as_pymatgen(text)  # pymatgen does not know Hall symbols


@pytest.mark.parametrize(
    "symmetry",
    [
        "_symmetry_space_group_name_H-M 'F d -3 m :2'",
        "_symmetry_space_group_name_H-M 'F d -3 m Z'",
        "_symmetry_space_group_name_H-M 'F d -3 m'\n_symmetry_space_group_name_Hall '-F 4vw 2vw 3'",
        "_space_group_name_H-M_alt 'F d -3 m'\n_chemical_formula_sum 'Al2 Mg1 O4'\n_cell_formula_units_Z 8",
        "_space_group_IT_number 227\n_chemical_formula_sum 'Al2 Mg O4'",
    ],
)
def test_the_origin_of_a_space_group_with_two(symmetry: str) -> None:
    text = cif(SPINEL_CELL, SPINEL_ATOMS, symmetry=symmetry)
    assert torch.equal(one(text).atomic_numbers, one(SPINEL).atomic_numbers)
    matcher = StructureMatcher(primitive_cell=False, scale=False)
    assert matcher.fit(to_pymatgen(one(text))[0], to_pymatgen(one(SPINEL))[0])


def test_rhombohedral_and_hexagonal_axes() -> None:
    symmetry = "_symmetry_space_group_name_H-M 'R -3 m'"
    assert len(one(cif("4.75 4.75 4.75 57 57 57", "As1 As 0.227 0.227 0.227 1", symmetry=symmetry)).num_atoms) == 1
    assert one(cif("4.75 4.75 4.75 57 57 57", "As1 As 0.227 0.227 0.227 1", symmetry=symmetry)).num_atoms == 2
    assert one(cif("3.76 3.76 10.55 90 90 120", "As1 As 0 0 0.227 1", symmetry=symmetry)).num_atoms == 6
    hexagonal = symmetry.replace("-3 m", "-3 m H")
    assert one(cif("3.76 3.76 10.55 90 90 120", "As1 As 0 0 0.227 1", symmetry=hexagonal)).num_atoms == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        ("no cif at all", "not-cif"),
        ("{'a': 1}", "not-cif"),
        ("data_x\nloop_\n_a\n_b\n1 2 3\n", "not-cif"),
        ("# only a comment\n", "not-cif"),
        (QUARTZ[: len(QUARTZ) // 2], "not-cif"),
        ("data_x\n_cell_length_a 3\n", "no-atoms"),
        (cif("", LIF), "no-cell"),
        (cif("3 3", LIF), "no-cell"),
        (cif("? ? ? ? ? ?", LIF), "no-cell"),
        (cif("3 3 0 90 90 90", LIF), "bad-cell"),
        (cif("3 3 -3 90 90 90", LIF), "bad-cell"),
        (cif("3 3 nan 90 90 90", LIF), "bad-cell"),
        (cif("3 3 wide 90 90 90", LIF), "bad-cell"),
        (cif("3 3 3 90 90 180", LIF), "bad-cell"),
        (cif("3 3 3 60 60 120", LIF), "bad-cell"),
        (cif("3 3 3 150 150 150", LIF), "bad-cell"),
        (cif(CELL, "Li1 Li 0 0 0 0"), "no-atoms"),
        (cif(CELL, "Li1 Li ? ? ? 1"), "no-coordinates"),
        (cif(CELL, "Li1 Li 0 . 0 1"), "no-coordinates"),
        (cif(CELL, "Li1 Li 0 inf 0 1"), "no-coordinates"),
        (cif(CELL, "Li1 Li 0 1_0 0 1"), "no-coordinates"),
        (cif(CELL, "Xx1 Xx 0 0 0 1"), "unknown-element"),
        (cif(CELL, "Vac Vac 0 0 0 1"), "unknown-element"),
        (cif(CELL, "Wat1 Wat 0 0 0 1"), "unknown-element"),
        (cif(CELL, "1 ? 0 0 0 1"), "unknown-element"),
        (cif(CELL, "Li1 Li 0 0 0 1.2"), "bad-occupancy"),
        (cif(CELL, "Li1 Li 0 0 0 -0.5"), "bad-occupancy"),
        (cif(CELL, "Li1 Li 0 0 0 much"), "bad-occupancy"),
        (cif(CELL, "Li1 Li 0 0 0 0.7\nNa1 Na 0 0 0 0.7"), "bad-occupancy"),
        (cif(CELL, "Li1 Li 0 0 0 1\nF1 F 0.00001 0 0.99999 1"), "bad-occupancy"),
        (cif(CELL, LIF, symmetry="loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,q'"), "unknown-symmetry"),
        (cif(CELL, LIF, symmetry="_symmetry_space_group_name_H-M 'Q 9 9'"), "unknown-symmetry"),
        (cif(CELL, LIF, symmetry="_space_group_IT_number 500"), "unknown-symmetry"),
        (cif(CELL, "O1 O 0 0 0 1", head="_chemical_formula_sum 'H2 O1'"), "missing-hydrogen"),
        (cif(CELL, "O1 O 0 0 0 2", tags=SITE_TAGS + " _atom_site_attached_hydrogens"), "missing-hydrogen"),
        (HALF, "disordered"),
        (cif(CELL, "Li1 Li 0 0 0 0.9"), "disordered"),
        (cif(CELL, "Li1 Li 0 0 0 0.985"), "disordered"),
    ],
)
def test_each_way_to_be_broken_has_its_code(text: str, expected: str) -> None:
    assert code(text) == expected
    if text.strip():
        assert code(text.encode()) == expected


def test_too_many_atoms_are_refused_before_the_work() -> None:
    many = cif("90 90 90 90 90 90", "\n".join(f"C{n} C {n / 20000:.6f} 0 0 1" for n in range(10_001)))
    assert code(many) == "too-many-atoms"
    general = "\n".join(f"C{n} C 0.{n + 101} 0.{n + 302} 0.{n + 603} 1" for n in range(60))
    assert code(cif("90 90 90 90 90 90", general, symmetry=operations(225))) == "too-many-atoms"
    assert code(NACL, max_atoms=7) == "too-many-atoms"
    assert one(NACL, max_atoms=8).num_atoms == 8
    full = cif("90 90 90 90 90 90", "\n".join(f"C{n} C {n % 100 / 100} {n // 100 / 100} 0 1" for n in range(10_000)))
    assert one(full).num_atoms == 10_000


def test_deuterium_and_tritium_are_hydrogen_and_counted() -> None:
    notes: Counter[str] = Counter()
    text = cif("4 4 4 90 90 90", "Li1 Li 0 0 0 1\nD1 D 0.5 0.5 0.5 1\nT1 T1+ 0.5 0 0 1\nH1 H 0 0.5 0 1")
    assert one(text, notes=notes).atomic_numbers.tolist() == [3, 1, 1, 1]
    assert notes["deuterium"] == 2
    mixed = cif("4 4 4 90 90 90", "D1 D 0 0 0 0.6\nH1 H 0 0 0 0.4", head="_chemical_formula_sum 'D0.6 H0.4'")
    assert one(mixed).atomic_numbers.tolist() == [1]


def test_equal_labels_at_different_places_are_different_atoms() -> None:
    assert one(cif(CELL, "Li1 Li 0 0 0 1\nLi1 Li 0.5 0.5 0.5 1")).num_atoms == 2


@pytest.mark.parametrize(
    ("symbol", "number"),
    [
        ("Fe3+", 26),
        ("O2-", 8),
        ("O-2", 8),
        ("FE", 26),
        ("Si4+", 14),
        ("Cval", 6),
        ("'Fe3+'", 26),
        ("H1+", 1),
        ("B", 5),
    ],
)
def test_type_symbols(symbol: str, number: int) -> None:
    assert one(cif(CELL, f"X1 {symbol} 0 0 0 1")).atomic_numbers.tolist() == [number]


@pytest.mark.parametrize(
    ("label", "number"), [("Fe1", 26), ("O2A", 8), ("CL", 17), ("OW1", 8), ("N", 7), ("Si(1)", 14)]
)
def test_labels_without_a_type_symbol(label: str, number: int) -> None:
    tags = SITE_TAGS.replace("_atom_site_type_symbol ", "")
    assert one(cif(CELL, f"{label} 0 0 0", tags=tags)).atomic_numbers.tolist() == [number]
    assert one(cif(CELL, f"{label} ? 0 0 0", tags=SITE_TAGS)).atomic_numbers.tolist() == [number]


def test_uncertainties_and_unknown_occupancies() -> None:
    crystal = one(cif("5.43(2) 5.43(2) 5.43(2) 90(0) 90 90", "Si1 Si 0.1250(3) -0.25(1) 1.5 ?\nSi2 Si 0 0 0 ."))
    assert crystal.frac_coords[0].tolist() == [0.125, 0.75, 0.5]
    assert crystal.lattice[0].tolist() == [[5.43, 0, 0], [0, 5.43, 0], [0, 0, 5.43]]


def test_rows_in_one_place_are_one_site_whatever_their_order() -> None:
    """Against every pair by brute force, also across the faces of the cell."""
    draw, tolerance, met = random.Random(0), 1e-4, 0
    for _ in range(400):
        sites = [
            [draw.choice((0.0, 0.5, 0.9999999, draw.random())) for _ in range(3)] for _ in range(draw.randint(2, 12))
        ]
        near = [x + draw.choice((-1.0, 1.0, 0.0)) + draw.uniform(-1.5, 1.5) * tolerance for x in draw.choice(sites)]
        sites.insert(draw.randint(0, len(sites)), near)
        apart = np.subtract.outer(np.array(sites), np.array(sites))[:, range(3), :, range(3)].transpose(1, 2, 0)
        touching = (np.abs(apart - np.rint(apart)) <= tolerance).all(-1).sum() > len(sites)
        assert _coincide(np.array(sites), tolerance) == touching
        met += touching
    assert 100 < met < 390


def test_rounded_fractions_become_whole_ones() -> None:
    crystal = one(HCP)
    assert sorted(crystal.frac_coords[:, :2].flatten().tolist()) == pytest.approx([1 / 3] * 2 + [2 / 3] * 2, abs=1e-15)
    assert one(cif(CELL, "C1 C 0.333 0.33345 0.6666 1")).frac_coords[0].tolist() == [0.333, 0.33345, 2 / 3]


def test_the_first_block_with_a_structure_counts() -> None:
    other = LIF.replace("Li", "Na")
    blocks = "data_global\n_journal_year 1999\n" + NACL + cif(CELL, other).replace("data_test", "data_b")
    assert one(blocks).num_atoms == 8
    assert one("data_bad\n" + cif("0 0 0 90 90 90", LIF).replace("data_test", "") + NACL).num_atoms == 8
    assert code("data_global\n_journal_year 1999\n" + cif("0 0 0 90 90 90", LIF)) == "bad-cell"


def test_bytes_that_are_not_utf8_are_latin1_and_counted() -> None:
    notes: Counter[str] = Counter()
    text = NACL.replace("data_test", "# Müller, Ångström\ndata_test")
    assert one(text.encode("latin-1"), notes=notes).num_atoms == 8
    assert one(text.encode("utf-8")).num_atoms == one(b"\xef\xbb\xbf" + text.encode()).num_atoms == 8
    assert notes == {"latin-1": 1}
    assert code(b"\x00\xff\xfe\x89PNG") == "not-cif"
    assert code(b"\xff\xfe\x00\x01" * 50) == "not-cif"


def test_pymatgen_is_asked_where_the_file_is_not_plain() -> None:
    notes: Counter[str] = Counter()
    cubic = cif("5.64", "Na1 Na 0 0 0 1\nCl1 Cl 0.5 0.5 0.5 1", symmetry="_symmetry_cell_setting cubic")
    assert one(cubic + operations(225) + "\n", notes=notes).num_atoms == 8
    assert notes["pymatgen"] == 1
    magnetic = cif(CELL, LIF, symmetry="loop_\n_space_group_symop_magn_operation.xyz\nx,y,z,+1\n-x,-y,-z,-1")
    assert one(magnetic, notes=notes).num_atoms == 2
    shared = cif(CELL, "'Nb,Zr' '0.8Nb + 0.2Zr' 0 0 0 1")
    assert code(shared, notes=notes) in ("disordered", "unknown-element")
    unquoted = NACL.replace("data_test", "data_test\n_publ_section_title a title nobody quoted")
    assert one(unquoted, notes=notes).num_atoms == 8


def test_a_site_shared_by_charges_of_one_element_is_whole() -> None:
    text = cif("8.4 8.4 8.4 90 90 90", "Fe1 Fe2+ 0 0 0 0.333\nFe2 Fe3+ 0 0 0 0.667")
    assert one(text).atomic_numbers.tolist() == [26]


def test_majority_takes_the_most_frequent_element_and_counts() -> None:
    notes: Counter[str] = Counter()
    text = cif(
        "9 9 9 90 90 90",
        "Fe1 Fe 0 0 0 0.4\nNi1 Ni 0 0 0 0.3\nLi1 Li 0.5 0.5 0.5 0.5\nO1 O 0.5 0 0 0.6\nS1 S 0 0.5 0 1",
    )
    assert one(text, disorder="majority", notes=notes).atomic_numbers.tolist() == [26, 8, 16]
    assert notes["majority-filled"] == 2
    assert notes["majority-emptied"] == 1
    assert notes["disordered"] == 1
    assert one(HALF, disorder="majority").atomic_numbers.tolist() == [26] * 4  # a tie: the lighter
    assert code(cif(CELL, "Li1 Li 0 0 0 0.5"), disorder="majority") == "no-atoms"


def shares(crystal: Crystals) -> dict[int, float]:
    counts = Counter(crystal.atomic_numbers.tolist())
    return {number: count / len(crystal.atomic_numbers) for number, count in counts.items()}


def test_orderings_keep_the_composition_and_depend_on_the_seed_alone() -> None:
    first = read_cif(THREE_QUARTERS, disorder="order:4", seed="row-1")
    again = read_cif(THREE_QUARTERS, disorder="order:4", seed="row-1")
    assert len(first) == len(again) == 1  # fcc with one of four sites: all four choices are one by symmetry
    assert all(torch.equal(a.atomic_numbers, b.atomic_numbers) for a, b in zip(first, again, strict=True))
    assert shares(first[0]) == {29: 0.75, 79: 0.25}
    text = cif("4 4 4 90 90 90", "Li1 Li 0 0 0 0.625\nNa1 Na 0 0 0 0.375\nCl1 Cl 0.5 0.5 0.5 1")
    many = read_cif(text, disorder="order:4", seed=1)
    assert [len(each.atomic_numbers) for each in many] == [16] * len(many)
    assert len(many) > 1
    assert all(Counter(each.atomic_numbers.tolist()) == {3: 5, 11: 3, 17: 8} for each in many)
    matcher = StructureMatcher(primitive_cell=False, scale=False)
    assert len(matcher.group_structures([to_pymatgen(each)[0] for each in many])) == len(many)
    seeds = [read_cif(text, disorder="order:1", seed=seed)[0].atomic_numbers.tolist() for seed in range(6)]
    assert len({tuple(each) for each in seeds}) > 1


def test_an_ordering_may_miss_an_occupancy_by_a_step_and_no_more() -> None:
    near = cif(CELL, f"Li1 Li 0 0 0 {0.5 + OCCUPANCY_STEP * 0.9}")
    assert read_cif(near, disorder="order:1")[0].volume.item() == pytest.approx(54)
    assert code(cif(CELL, "Li1 Li 0 0 0 0.93\nNa1 Na 0 0 0 0.07"), disorder="order:2") == "not-orderable"
    assert code(cif(CELL, "Li1 Li 0 0 0 0.985\nNa1 Na 0 0 0 0.015"), disorder="order:2") == "not-orderable"
    assert code(HALF, disorder="order:2", max_atoms=3) == "too-many-atoms"


def test_split_sites_are_never_filled_together() -> None:
    text = cif("5 5 5 90 90 90", "Li1 Li 0 0 0.05 0.5\nLi2 Li 0 0 -0.05 0.5\nCl1 Cl 0.5 0.5 0.5 1")
    for crystal in read_cif(text, disorder="order:3"):
        assert crystal.atomic_numbers.tolist() in ([3, 17], [3, 17])
    pairs = cif("5 5 5 90 90 90", "Li1 Li 0 0 0.05 1\nNa1 Na 0 0 -0.05 0.5")
    assert code(pairs, disorder="order:1") == "not-orderable"


@pytest.mark.parametrize("name", [*GOOD, "half"])
def test_a_damaged_file_is_read_or_refused_and_nothing_else(name: str) -> None:
    text = GOOD[name][0] if name in GOOD else HALF
    chance = random.Random(name)
    codes: Counter[str] = Counter()
    for _ in range(60):
        lines = text.splitlines()
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(lines)) if chance.random() < 0.5 else -chance.randint(1, 14)
            words = lines[at].split(" ")
            damage = chance.choice(["", "?", ".", "'", ";", "-1", "1e400", "nan", "loop_", "_tag", "data_", "0.5"])
            words[chance.randrange(len(words))] = damage
            lines[at] = " ".join(words)
        try:
            read_cif("\n".join(lines), disorder=chance.choice(["drop", "majority", "order:2"]), max_atoms=100)
            codes["read"] += 1
        except Refused as refused:
            codes[refused.code] += 1
    assert codes["read"]
    assert len(codes) > 3


@pytest.mark.parametrize("policy", ["", "keep", "order", "order:", "order:0", "order:-1", "order:x", "majority:2"])
def test_an_unknown_policy_is_a_wrong_usage(policy: str) -> None:
    with pytest.raises(UsageError, match="drop, majority or order:K"):
        read_cif(NACL, disorder=policy)
