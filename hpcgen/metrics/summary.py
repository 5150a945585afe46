"""Figures from the table of per-crystal metrics, every share with its denominator, and what they mean."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

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
    "unique_formulas": "distinct reduced formulas over crystals written",
    "match_rate": "predictions that StructureMatcher matches to their target over all asked, so the mean over the "
    "samples of a target; rejected and not compared ones count as not matched",
    "match_rate_valid": "only valid predictions count as matched (CDVAE), over all asked",
    "match_rate_both_valid": "only where prediction and target are valid (DiffCSP), over all asked",
    "ceiling": "crystals asked for whose target is valid: the most that match_rate_both_valid can be; over all asked, "
    "but for those rejected of which it is not known what they asked for",
    "match_rate_strict": "matched within the stricter tolerances too, over all asked",
    "rms": "mean over the matched of the root mean square distance in units of (V/N)^(1/3)",
    "targets": "of a campaign the lines of its formulas, crystal i being of line i modulo their number; of any other "
    "store the names it holds, or, where crystals were rejected, asked over the most crystals of one name if that is "
    "more: an estimate",
    "first": "sample 0 of each target, which matches nothing if it was rejected, over targets; of a store that is no "
    "campaign's the first one written",
    "best": "targets matched by any of their samples, over targets, and the mean of their lowest rms",
    "conditions": "mean absolute difference of what was asked for from the column of that name, over crystals with a "
    "value; without such a column not screened",
    "metre": "crystals of the reference that any prediction of their composition and size matches, over all of the "
    "reference (METRe), and the mean over these of the lowest rms, the tolerance 0.5 where there is no match (cRMSE; "
    "Martirossyan et al. 2025); only with --pair composition",
    "by_num_atoms": "of the crystals written, rejected ones having no size; sizes beyond the largest crystal of the "
    "reference apart",
    "coverage": "recall: crystals of the reference within both cut-offs of the nearest crystal of the run in structure "
    "and of the nearest in composition, which may be two; precision: crystals of the run likewise, over all asked; "
    "amsd, amcd: mean distances to the nearest in structure and in composition; Euclidean distances of the mean of the "
    "sites' CrystalNN fingerprints (matminer's preset ops) and of Magpie features scaled as in CDVAE",
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
    "samples": "of the valid crystals that have a fingerprint, drawn by chance",
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
        self._flags = np.array(flags, dtype=np.uint8)
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


_FLAGS = ("distances", "distances_with_images", "radii", "composition", "target_valid", "matched", "matched_strict")


def _packed(row: Mapping[str, str]) -> int:
    return sum(1 << bit for bit, name in enumerate(_FLAGS) if row.get(name) == "1")


def validity_figures(table: Table, asked: int) -> dict[str, Any]:
    """How many crystals keep each rule, of all asked."""
    return {name: _share(int(table.flag(name).sum()), asked) for name in RULES}


def bond_figures(table: Table, asked: int) -> dict[str, Any]:
    """How many bonds are sound, and how many crystals of all asked have sound bonds alone, and one at every atom."""
    bonds, sound, lonely = table.bonds.sum(0).tolist() if len(table) else (0, 0, 0)
    whole = (table.bonds[:, 0] == table.bonds[:, 1]) & (table.bonds[:, 2] == 0) & (table.bonds[:, 0] > 0)
    return {"sound": _share(sound, bonds), "crystals": _share(int(whole.sum()), asked), "lonely_atoms": lonely}


def generate_figures(table: Table, largest: int | None = None) -> dict[str, Any]:
    """Of free generation. Without a crystal all are 0. largest: atoms of a crystal of the reference, at most."""
    sizes = table.num_atoms if len(table) else np.zeros(1, dtype=np.int64)
    return {
        "by_num_atoms": [
            {"atoms": atoms, **{name: _share(int(table.flag(name)[some].sum()), len(some)) for name in RULES}}
            for atoms, some in _by_size(table.num_atoms, largest)
        ],
        "largest_known": largest,
        "formulas": len(table.formulas),
        "unique_formulas": _ratio(len(table.formulas), len(table)),
        "num_atoms": {
            "min": int(sizes.min()),
            "mean": round(float(sizes.mean()), 3),
            "max": int(sizes.max()),
            "counts": {str(n): count for n, count in sorted(Counter(table.num_atoms.tolist()).items())},
        },
    }


def condition_figures(asked: Mapping[str, float], obtained: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mean absolute error of each property asked for, over crystals of which it is known.

    obtained: values (N,) of the properties that the run has a column of, nan where one is not known.
    """
    figures: dict[str, Any] = {}
    for name, value in asked.items():
        known = obtained.get(name, np.zeros(0))
        known = known[np.isfinite(known)]
        error = float(np.abs(known - value).mean()) if len(known) else None
        figures[name] = {"asked": value, "known": len(known), "mean_absolute_error": error}
    return figures


def metre_figures(table: Table, known: int, stol: float) -> dict[str, Any]:
    """How many of the `known` crystals of a reference were met by any prediction, and the rms corrected for the others.

    stol: the rms of one that was not met.
    """
    missed = known - len(table.met)
    corrected = (sum(table.met.values()) + stol * missed) / known if known else None
    return {**_share(len(table.met), known), "crms": corrected}


def predict_figures(
    table: Table, asked: int, lines: int | None = None, lost: Mapping[int, bool] | None = None
) -> dict[str, Any]:
    """Of structure prediction.

    lines: L targets that a campaign was asked for, crystal i being of i % L; None: not known. lost: of targets without
    a crystal in the table, whether they are valid, where that is known.
    """
    matched, valid = ~np.isnan(table.rms), table.flag("valid")
    both = valid & table.flag("target_valid")
    return {
        "match_rate": _matches(table.rms, matched, asked),
        "match_rate_valid": _matches(table.rms, matched & valid, asked),
        "match_rate_both_valid": _matches(table.rms, matched & both, asked),
        "ceiling": _ceiling(table, asked, lines, lost or {}),
        "match_rate_strict": _share(int(table.flag("matched_strict").sum()), asked),
        **_per_target(table, asked, lines),
        "by_num_atoms": [
            {"atoms": atoms, **_matches(table.rms[some], matched[some], len(some))}
            for atoms, some in _by_size(table.num_atoms)
        ],
    }


def _by_size(num_atoms: np.ndarray, largest: int | None = None) -> list[tuple[list[int], np.ndarray]]:
    """Least and most atoms of each bin with crystals in it, and their places. A bin ends at `largest`."""
    found = []
    for low, high in BINS:
        parts = [(low, high)] if largest is None or not low <= largest < high else [(low, largest), (largest + 1, high)]
        for least, most in parts:
            some = np.flatnonzero((num_atoms >= least) & (num_atoms <= most))
            if len(some):
                found.append(([least, min(most, int(num_atoms.max()))], some))
    return found


def _ceiling(table: Table, asked: int, lines: int | None, lost: Mapping[int, bool]) -> dict[str, Any]:
    """Crystals asked for whose target is valid, of those whose target is known."""
    target_valid = table.flag("target_valid")
    if lines is None:  # nobody knows what rejected ones were asked to be
        return _share(int(target_valid.sum()), len(table))
    valid = {*table.line[target_valid].tolist(), *(line for line, is_valid in lost.items() if is_valid)}
    known = {*table.line.tolist(), *lost}
    count, of = (sum(-(-(asked - line) // lines) for line in some) for some in (valid, known))
    return _share(count, of)


def _per_target(table: Table, asked: int, lines: int | None) -> dict[str, Any]:
    """First and best of the samples of each target, and how many targets there are, as DEFINITIONS has it."""
    met, counts = np.unique(table.line, return_counts=True)
    if lines is not None:
        targets, k, how = min(lines, asked), -(-asked // lines), "lines of the campaign"
    else:
        k = int(counts.max(initial=1))
        targets = max(len(met), round(asked / k))
        how = "names in the store" if asked == len(table) else f"estimated: {asked:,} asked, at most {k} of each"
    lowest = np.full(targets, np.inf)
    np.fmin.at(lowest, table.line, table.rms)
    first = table.rms[table.sample == 0]
    return {
        "targets": targets,
        "targets_how": how,
        "samples_per_target": k,
        "first": _matches(first, ~np.isnan(first), targets),
        "best": _matches(lowest, np.isfinite(lowest), targets),
    }


def _matches(rms: np.ndarray, matched: np.ndarray, of: int) -> dict[str, Any]:
    mean = float(rms[matched].mean()) if matched.any() else None
    return {**_share(int(matched.sum()), of), "rms": mean}


def _share(count: int, of: int) -> dict[str, Any]:
    return {"count": count, "of": of, "share": _ratio(count, of)}


def _ratio(count: int, of: int) -> float:
    return count / of if of else 0.0
