"""The 132 Magpie features of a composition, equal to matminer's ElementProperty.from_preset("magpie").

Six statistics over the atoms of 22 elemental properties: L. Ward, A. Agrawal, A. Choudhary, C. Wolverton,
npj Computational Materials 2, 16028 (2016). `magpie.csv` holds Magpie's elemental values as matminer 0.10.1
(BSD licence) carries them; an empty field is a value that Magpie lacks (He has no melting point). As in
matminer, such a value is replaced by the mean over the elements that have one. Units are Magpie's: K, g/mol,
pm (CovalentRadius), eV (GSbandgap), Å³/atom (GSvolume_pa), μB (GSmagmom).
"""

import csv
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from hpcgen.crystal.composition import SYMBOLS

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = (
    "Number MendeleevNumber AtomicWeight MeltingT Column Row CovalentRadius Electronegativity "
    "NsValence NpValence NdValence NfValence NValence NsUnfilled NpUnfilled NdUnfilled NfUnfilled NUnfilled "
    "GSvolume_pa GSbandgap GSmagmom SpaceGroupNumber"
)
PROPERTIES = tuple(_NAMES.split())
STATISTICS = ("minimum", "maximum", "range", "mean", "avg_dev", "mode")
MAGPIE_COLUMNS = tuple(f"magpie_{how}_{what}" for what in PROPERTIES for how in STATISTICS)  # matminer's order


def matminer_name(column: str) -> str:
    """matminer's label of a column: magpie_avg_dev_MeltingT -> 'MagpieData avg_dev MeltingT'."""
    statistic, _, what = column.removeprefix("magpie_").rpartition("_")
    if what == "pa":  # GSvolume_pa has a low line of its own
        statistic, what = statistic.removesuffix("_GSvolume"), "GSvolume_pa"
    return f"MagpieData {statistic} {what}"


def magpie_features(atomic_numbers: "np.ndarray | Tensor", num_atoms: "np.ndarray | Tensor") -> np.ndarray:
    """Features of B crystals, columns as MAGPIE_COLUMNS. (A,), (B,) -> (B, 132) float64.

    The mode is the value of the most frequent element, the smallest of them where several are.
    Raises ValueError for an atomic number outside 1 to 118 or a crystal without atoms.
    """
    numbers, sizes = np.asarray(atomic_numbers), np.asarray(num_atoms)
    _check(numbers, sizes)
    if not len(sizes):
        return np.zeros((0, len(MAGPIE_COLUMNS)))
    crystal = np.repeat(np.arange(len(sizes)), sizes)
    pairs, count = np.unique(crystal * len(SYMBOLS) + numbers, return_counts=True)  # crystal and element
    owner = pairs // len(SYMBOLS)
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    share = (count / sizes[owner])[:, None]  # (P, 1)
    often = (count == np.maximum.reduceat(count, start)[owner])[:, None]
    value = _table()[pairs % len(SYMBOLS)]  # (P, 22)

    lowest, highest = np.minimum.reduceat(value, start), np.maximum.reduceat(value, start)  # (B, 22)
    mean = np.add.reduceat(share * value, start)
    deviation = np.add.reduceat(share * np.abs(value - mean[owner]), start)
    mode = np.minimum.reduceat(np.where(often, value, np.inf), start)
    stacked = np.stack([lowest, highest, highest - lowest, mean, deviation, mode], axis=2)
    return stacked.reshape(len(sizes), -1)


def element_properties() -> np.ndarray:
    """Magpie's properties of the elements, each of mean 0 and deviation 1 over 1 to 118. (119, 22), row 0 all zero."""
    known = _table()[1:]
    scaled = (known - known.mean(axis=0)) / known.std(axis=0)
    return np.concatenate([np.zeros((1, len(PROPERTIES))), scaled])


def _check(numbers: np.ndarray, sizes: np.ndarray) -> None:
    if numbers.size and not (numbers.min() >= 1 and numbers.max() < len(SYMBOLS)):
        raise ValueError(f"atomic numbers {numbers.min()} to {numbers.max()}, want 1 to {len(SYMBOLS) - 1}")
    if sizes.size and not sizes.min() >= 1:
        raise ValueError(f"crystal {sizes.argmin()} has {sizes.min()} atoms, want at least 1")
    if sizes.sum() != len(numbers):
        raise ValueError(f"num_atoms add up to {sizes.sum()}, but there are {len(numbers)} atoms")


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """Elemental values, missing ones as the mean of the others. (119, 22), row 0 unused."""
    text = resources.files("hpcgen.crystal").joinpath("magpie.csv").read_text(encoding="utf-8")
    head, *rows = csv.reader(text.splitlines())
    assert head[1:] == list(PROPERTIES) and [row[0] for row in rows] == list(SYMBOLS[1:])
    known = np.array([[float(field) if field else np.nan for field in row[1:]] for row in rows])
    filled = np.where(np.isnan(known), np.nanmean(known, axis=0), known)
    return np.concatenate([np.full((1, len(PROPERTIES)), np.nan), filled])
