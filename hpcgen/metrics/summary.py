"""Figures from the table of per-crystal metrics, every share with its denominator, and what they mean."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hpcgen.metrics import bootstrap
from hpcgen.metrics.bootstrap import mean_interval, ratio_interval, share

RULES = {
    "distances": "pairs 0.5 Å apart (CDVAE)",
    "distances_with_images": "own images too",
    "radii": "half the covalent radii apart",
    "composition": "composition balances (SMACT)",
    "valid": "valid: pairs and composition",
}
DEFINITIONS = {
    "distances": "all pairs of atoms at least 0.5 Å apart under periodic boundaries, an atom's own images left out, "
    "and a cell volume of at least 0.1 Å³ (structural validity, CDVAE)",
    "distances_with_images": "the same with every atom's own images",
    "radii": "and every distance, own images included, at least half the sum of the covalent radii (Cordero 2008, ASE)",
    "composition": "one element, or metals alone, or neutral with some oxidation states such that every cation is less "
    "electronegative than every anion (compositional validity, CDVAE; tables of SMACT 2.2.1)",
    "valid": "distances and composition",
    "bonds": "pairs of atoms, images included, at most 1.3 times the sum of their covalent radii apart; sound ones are "
    "at least 0.75 times that sum long (bond validation rate); crystals: of all asked those in which every bond is "
    "sound and every atom has one; counted in crystals without atoms within 0.5 Å",
    "charges": "neutral by bond valence: every site can have an oxidation state that its bond valence sum bears out "
    "(O'Keeffe and Brese 1991, statistics of the ICSD) such that charges sum to zero, as pymatgen's BVAnalyzer has it "
    "with symm_tol=0; over all asked but the undetermined: metals alone, one element alone, or elements without "
    "parameters",
    "unique_formulas": "distinct reduced formulas over crystals written",
    "by_num_atoms": "of the crystals written, rejected ones having no size; sizes beyond the largest crystal of the "
    "reference apart",
    "coverage": "recall: crystals of the reference within both cut-offs of the nearest crystal of the run in structure "
    "and of the nearest in composition, which may be two; precision: crystals of the run likewise, over all asked; "
    "amsd, amcd: mean distances to the nearest in structure and in composition; Euclidean distances of the mean of the "
    "sites' CrystalNN fingerprints (matminer's preset ops) and of Magpie features scaled as in CDVAE; valid: crystals "
    "that are valid and have a fingerprint, as CDVAE counts them, over all asked",
    "wasserstein": "distances of the samples to the whole reference, of density in g/cm³, of the number "
    "of elements and of the energy in eV/atom (CDVAE), and of the bond lengths in Å of each pair of elements with 10 "
    "bonds on both sides, their mean over the bonds of the samples (of a reference of more than 10,000 "
    "crystals, bonds of so many)",
    "energy": "of the crystals as they are, by the potential named; not of those without a fingerprint or with "
    "elements that the potential does not know",
    "element_divergence": "Kullback–Leibler divergence of the elements of the samples' atoms from those of the "
    "reference, in nats, half an atom of each element added on both sides",
    "symmetry": "space groups within symprec Å (moyo): the share beyond P1, and Jensen-Shannon divergences from the "
    "reference, of space groups and of crystal systems, in bits",
    "diversity": "mean distances of all pairs of samples, as for the coverage (CDVAE)",
    "samples": "of the valid crystals that have a fingerprint, drawn by chance; short where there are fewer than asked",
    "interval": bootstrap.DEFINITION,
}
BINS = ((1, 4), (5, 8), (9, 12), (13, 16), (17, 20), (21, 30), (31, 52), (53, 10**9))  # atoms


class Table:
    """The columns of the per-crystal table that figures are made of, at some 40 bytes a row."""

    def __init__(self, rows: Iterable[Mapping[str, str]]) -> None:
        """rows: as they stand in the CSV file, flags as 1 and 0, '' where there is no value."""
        sizes, flags, bonds, rms, lines, samples = [], [], [], [], [], []
        self.formulas: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.met: dict[int, float] = {}  # lowest rms by the place in the reference of what was matched
        for row in rows:
            sizes.append(int(row["num_atoms"]))
            flags.append(_packed(row))
            bonds.append([int(row.get(name) or 0) for name in ("bonds", "sound_bonds", "lonely_atoms")])
            self.formulas[row["formula"]] += 1
            if row["reason"]:
                self.reasons[row["reason"].partition(":")[0]] += 1
            if "line" in row:
                rms.append(float(row["rms"] or "nan"))
                lines.append(int(row["line"]))
                samples.append(int(row["sample"]))
                for place, found in (pair.split(":") for pair in row.get("met", "").split()):
                    self.met[int(place)] = min(float(found), self.met.get(int(place), np.inf))
        self.num_atoms = np.array(sizes, dtype=np.int64)
        self._flags = np.array(flags, dtype=np.uint16)
        self.bonds = np.array(bonds, dtype=np.int64).reshape(-1, 3)  # all, sound ones, atoms without
        self.rms = np.array(rms)  # NaN where not matched
        self.line = np.array(lines, dtype=np.int64)  # number of the target
        self.sample = np.array(samples, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.num_atoms)

    def flag(self, name: str) -> np.ndarray:
        """(N,) bool."""
        if name == "valid":
            return self.flag("distances") & self.flag("composition")
        return (self._flags >> _FLAGS.index(name) & 1).astype(bool)


_FLAGS = (
    "distances", "distances_with_images", "radii", "composition", "neutral", "target_valid", "matched",
    "matched_strict", "undetermined",
)  # fmt: skip


def _packed(row: Mapping[str, str]) -> int:
    undetermined = (row["neutral"] == "") << _FLAGS.index("undetermined")
    return undetermined + sum(1 << bit for bit, name in enumerate(_FLAGS) if row.get(name) == "1")


def validity_figures(table: Table, asked: int, seed: int) -> dict[str, Any]:
    """How many crystals keep each rule, of all asked. seed: of the intervals, here and below."""
    return {name: share(int(table.flag(name).sum()), asked, seed) for name in RULES}


def bond_figures(table: Table, asked: int, seed: int) -> dict[str, Any]:
    """How many bonds are sound, and how many crystals of all asked have sound bonds alone, and one at every atom."""
    bonds, sound, lonely = table.bonds.T
    whole = (bonds == sound) & (lonely == 0) & (bonds > 0)
    told = share(int(sound.sum()), int(bonds.sum()), seed) | {"interval": ratio_interval(sound, bonds, seed)}
    return {"sound": told, "crystals": share(int(whole.sum()), asked, seed), "lonely_atoms": int(lonely.sum())}


def charge_figures(table: Table, asked: int, seed: int) -> dict[str, Any]:
    """How many crystals are neutral by bond valence, of those asked of which it can be said."""
    undetermined = int(table.flag("undetermined").sum())
    return share(int(table.flag("neutral").sum()), asked - undetermined, seed) | {"undetermined": undetermined}


def generate_figures(table: Table, seed: int, largest: int | None = None) -> dict[str, Any]:
    """Of free generation. Without a crystal all are 0. largest: atoms of a crystal of the reference, at most."""
    sizes = table.num_atoms if len(table) else np.zeros(1, dtype=np.int64)
    return {
        "by_num_atoms": [
            {"atoms": atoms, **{name: share(int(table.flag(name)[some].sum()), len(some), seed) for name in RULES}}
            for atoms, some in by_size(table.num_atoms, largest)
        ],
        "largest_known": largest,
        "formulas": len(table.formulas),
        "unique_formulas": len(table.formulas) / len(table) if len(table) else 0.0,
        "num_atoms": {
            "min": int(sizes.min()),
            "mean": round(float(sizes.mean()), 3),
            "interval": mean_interval(table.num_atoms, seed),
            "max": int(sizes.max()),
            "counts": {str(n): count for n, count in sorted(Counter(table.num_atoms.tolist()).items())},
        },
    }


def by_size(num_atoms: np.ndarray, largest: int | None = None) -> list[tuple[list[int], np.ndarray]]:
    """Least and most atoms of each bin with crystals in it, and their places. A bin ends at `largest`."""
    found = []
    for low, high in BINS:
        parts = [(low, high)] if largest is None or not low <= largest < high else [(low, largest), (largest + 1, high)]
        for least, most in parts:
            some = np.flatnonzero((num_atoms >= least) & (num_atoms <= most))
            if len(some):
                found.append(([least, min(most, int(num_atoms.max()))], some))
    return found
