"""Formulas against pymatgen, Magpie features against matminer."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Composition, Element

from hpcgen.crystal.composition import (
    ATOMIC_NUMBERS,
    ELECTRONEGATIVITY,
    SYMBOLS,
    BadFormula,
    formula_key,
    parse_formula,
    reduced_formula,
)
from hpcgen.crystal.magpie import MAGPIE_COLUMNS, magpie_features, matminer_name
from hpcgen.errors import UsageError

REFERENCE = Path(__file__).parent / "data" / "magpie_matminer.csv"  # made with matminer 0.10.1


def atoms(formula: str) -> list[int]:
    return [ATOMIC_NUMBERS[symbol] for symbol, count in parse_formula(formula).items() for _ in range(count)]


def random_atoms(seed: int) -> list[int]:
    random = np.random.default_rng(seed)
    elements = random.integers(1, 119, random.integers(1, 6))
    return np.repeat(elements, random.integers(1, 9, len(elements))).tolist()


def of_pymatgen(numbers: list[int]) -> Composition:
    return Composition({SYMBOLS[z]: numbers.count(z) for z in set(numbers)})


def test_the_tables_are_those_of_pymatgen() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        elements = [Element.from_Z(z) for z in range(1, 119)]
        assert [element.symbol for element in elements] == list(SYMBOLS[1:])
        assert np.array_equal([element.X for element in elements], ELECTRONEGATIVITY[1:], equal_nan=True)


@pytest.mark.filterwarnings("ignore:No Pauling")
@pytest.mark.parametrize("start", range(0, 2000, 500))
def test_reduced_formula_is_that_of_pymatgen(start: int) -> None:
    for seed in range(start, start + 500):
        numbers = random_atoms(seed)
        want = of_pymatgen(numbers).reduced_formula
        assert reduced_formula(numbers) == want
        assert Composition(want) == Composition(parse_formula(want))


SPECIAL = "O2 N2 H2 F2 Cl2 Br Na2O2 Li2O2 H2O2 LiFePO4 Ca(OH)2 LiFe(PO3)3 NH4NO3 Li9P3S12 HHe3 CaTiO3"


@pytest.mark.parametrize("formula", SPECIAL.split())
def test_special_formulas(formula: str) -> None:
    want = Composition(formula).reduced_formula
    for times in (1, 2, 3):
        assert reduced_formula(torch.tensor(atoms(formula) * times)) == want


def test_key_joins_equal_compositions_and_only_those() -> None:
    assert formula_key(np.array(atoms("Fe8O12"))) == "O3Fe2" == formula_key(atoms("O3Fe2"))
    assert formula_key(atoms("OH")) != formula_key(atoms("H2O"))
    everything = [random_atoms(seed) for seed in range(500)]
    assert len({formula_key(n) for n in everything}) == len({reduced_formula(n) for n in everything})


@pytest.mark.parametrize("numbers", [[], [0, 8], [119], [-1]])
def test_no_composition(numbers: list[int]) -> None:
    with pytest.raises(ValueError, match="atomic numbers"):
        formula_key(numbers)


def test_parse_formula() -> None:
    assert parse_formula("Li9P3S12") == {"Li": 9, "P": 3, "S": 12}
    assert parse_formula("Ca(OH)2") == {"Ca": 1, "O": 2, "H": 2}
    assert parse_formula("K4(Fe(CN)6)(H2O)3") == {"K": 4, "Fe": 1, "C": 6, "N": 6, "H": 6, "O": 3}
    assert list(parse_formula("CH3CH2OH").items()) == [("C", 2), ("H", 6), ("O", 1)]


@pytest.mark.parametrize(
    ("formula", "says"),
    [
        ("", "no atoms"),
        ("()", "no atoms"),
        ("Xx2O", "'Xx' is no element"),
        ("li2O", "'l' is out of place"),
        ("Li0.5O", "0.5 atoms"),
        ("Li0O", "0 atoms"),
        ("2Li", "'2' is out of place"),
        ("Ca(OH", "not closed"),
        ("CaOH)2", "out of place"),
        ("Li+", "out of place"),
    ],
)
def test_bad_formulas_are_named(formula: str, says: str) -> None:
    with pytest.raises(BadFormula, match=says) as caught:
        parse_formula(formula)
    assert isinstance(caught.value, UsageError) and isinstance(caught.value, ValueError)
    assert repr(formula) in str(caught.value)


def reference() -> tuple[list[str], list[str], np.ndarray]:
    head, *rows = csv.reader(REFERENCE.read_text().splitlines())
    return head[1:], [row[0] for row in rows], np.array([[float(v) for v in row[1:]] for row in rows])


def flat(batch: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.array(one) for one in batch]), np.array([len(one) for one in batch])


def test_magpie_is_that_of_matminer() -> None:
    labels, formulas, want = reference()
    assert [matminer_name(column) for column in MAGPIE_COLUMNS] == labels
    assert len(set(MAGPIE_COLUMNS)) == 132 and MAGPIE_COLUMNS[0] == "magpie_minimum_Number"
    found = magpie_features(*flat([atoms(formula) for formula in formulas]))
    np.testing.assert_allclose(found, want, rtol=1e-8, atol=1e-8)
    assert np.isfinite(found).all()  # also He, Rn, Es, Nh, Og, whose gaps matminer fills with means


def test_magpie_depends_on_the_composition_alone() -> None:
    batch = [random_atoms(seed) for seed in range(40)]
    together = magpie_features(*flat(batch))
    for one, row in zip(batch, together, strict=True):
        alone = magpie_features(torch.tensor(one), torch.tensor([len(one)]))
        np.testing.assert_array_equal(alone[0], row)
        np.testing.assert_allclose(magpie_features(*flat([one[::-1] * 2]))[0], row, rtol=1e-12, atol=1e-9)
    assert magpie_features(np.zeros(0, int), np.zeros(0, int)).shape == (0, 132)


@pytest.mark.parametrize(("numbers", "sizes"), [([8, 119], [2]), ([0], [1]), ([8], [1, 0]), ([8, 8], [1])])
def test_magpie_refuses(numbers: list[int], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="want|but there are"):
        magpie_features(np.array(numbers), np.array(sizes))


@pytest.mark.slow
def test_magpie_against_matminer_itself() -> None:
    pytest.importorskip("matminer", reason="matminer is not installed")
    from matminer.featurizers.composition import ElementProperty

    preset = ElementProperty.from_preset("magpie")
    assert preset.feature_labels() == [matminer_name(column) for column in MAGPIE_COLUMNS]
    batch = [random_atoms(seed) for seed in range(500)]
    want = np.array([preset.featurize(of_pymatgen(one)) for one in batch])
    np.testing.assert_allclose(magpie_features(*flat(batch)), want, rtol=1e-9, atol=1e-9)
