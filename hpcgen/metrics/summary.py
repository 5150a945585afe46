"""Figures from the table of per-crystal metrics, every share with its denominator, and the table for people."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hpcgen.metrics.novelty import novelty_lines

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


def render(told: Mapping[str, Any]) -> str:
    """An evaluation, as its JSON file has it, for people to read."""
    figures, rejected = told["figures"], told["rejected"]
    lost = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items())
    head = [
        ("task", f"{told['task']}, {told['run']}" + (f" against {told['reference']}" if told["reference"] else "")),
        ("asked", f"{told['asked']:,}" + (f" ({told['note']})" if told["note"] else "")),
        ("written", f"{told['written']:,}" + (f"; rejected: {lost}" if lost else "")),
    ]
    if told["task"] == "predict":
        head += [("paired", told["paired"]), ("targets", f"{figures['targets']:,} ({figures['targets_how']})")]
    if told["not_measured"]:
        head.append(("not compared", ", ".join(f"{n:,} {reason}" for reason, n in told["not_measured"].items())))
    lines = [f"{name:<13} {value}" for name, value in head]
    if told["task"] == "predict":
        lines += ["", *_predict_lines(figures)]
    lines += ["", *_validity_lines(figures["validity"], told["control"])]
    lines += ["", _bond_line(figures["bonds"], told["control"])]
    if told["task"] == "generate":
        atoms = figures["num_atoms"]
        unique = f"{figures['formulas']:,} distinct, {_percent(figures['unique_formulas'])} of written"
        lines += ["", f"{'formulas':<13} {unique}"]
        if told["written"]:
            lines.append(f"{'atoms':<13} {atoms['min']} to {atoms['max']}, mean {atoms['mean']:.2f}")
            lines += ["", *_size_lines(figures)]
        if "novelty" in figures:
            lines += ["", *novelty_lines(told)]
    for name, part in figures.get("conditions", {}).items():
        error = part["mean_absolute_error"]
        told_error = f"off by {error:.3g} on average, {part['known']:,} known" if error is not None else "not screened"
        lines.append(f"{'condition':<13} {name} = {part['asked']:g}: {told_error}")
    if "coverage" in figures:
        lines += ["", *_likeness_lines(figures)]
    return "\n".join(lines)


def _validity_lines(validity: Mapping[str, Any], control: Mapping[str, Any] | None) -> list[str]:
    heads, columns = ["count", "share"], [
        [f"{validity[name]['count']:,}" for name in RULES],
        [_percent(validity[name]["share"]) for name in RULES],
    ]  # fmt: skip
    if control:
        for kind in [kind for kind in ("real", "random") if kind in control]:
            heads.append(kind)
            columns.append([_percent(control[kind][name]["share"]) for name in RULES])
    of = next(iter(validity.values()))["of"]
    lines = _aligned(f"of {of:,} asked", list(RULES.values()), heads, columns)
    if control:
        many, chance = f"{control['crystals']:,}", f"coordinates at random, seed {control['seed']}"
        if control["of"] == "reference":
            lines.append(f"real: {many} crystals of the reference; random: their cells with {chance}")
        else:
            lines.append(f"random: the cells of {many} of these crystals with {chance}")
    return lines


def _size_lines(figures: Mapping[str, Any]) -> list[str]:
    """Validity by number of atoms."""
    parts, largest = figures["by_num_atoms"], figures["largest_known"]
    beyond = [" *" if largest is not None and part["atoms"][0] > largest else "" for part in parts]
    names = [_sizes_named(part["atoms"]) + mark for part, mark in zip(parts, beyond, strict=True)]
    columns = [[f"{part['valid']['of']:,}" for part in parts]]
    columns += [[_percent(part[rule]["share"]) for part in parts] for rule in ("distances", "radii", "valid")]
    lines = _aligned("of written", names, ["count", "0.5 Å", "radii", "valid"], columns)
    return lines + ([f"* the largest crystal of the reference has {largest} atoms"] if any(beyond) else [])


def _sizes_named(atoms: Sequence[int]) -> str:
    low, high = atoms
    return f"{low} to {high} atoms" if low < high else f"{low} atoms"


def _bond_line(bonds: Mapping[str, Any], control: Mapping[str, Any] | None) -> str:
    sides = {kind: control[kind]["bonds"] for kind in ("real", "random") if control and kind in control}
    beside = [f"{kind} {_percent(side['sound']['share'])}, {_percent(side['crystals']['share'])}"
              for kind, side in sides.items()]  # fmt: skip
    told = f"{_percent(bonds['sound']['share'])} sound, all of them in {_percent(bonds['crystals']['share'])} of asked"
    return f"{'bonds':<13} {told}" + (f" ({'; '.join(beside)})" if beside else "")


def _likeness_lines(figures: Mapping[str, Any]) -> list[str]:
    told, samples = figures["coverage"], figures["samples"]
    near, lost = told["cut_offs"], told["without_fingerprint"]
    rows = [[_percent(told[side]["share"]), _number(told[f"amsd_{side}"]), _number(told[f"amcd_{side}"])]
            for side in ("recall", "precision")]  # fmt: skip
    heads = ["share", "structures apart", "compositions apart"]
    names = [f"recall, of {told['recall']['of']:,} known", f"precision, of {told['precision']['of']:,} asked"]
    lines = _aligned("coverage", names, heads, list(zip(*rows, strict=True)))
    lines.append(f"cut-offs {near['structure']:g} and {near['composition']:g}; without a fingerprint: "
                 f"{lost['run']:,} of the run, {lost['reference']:,} of the reference")  # fmt: skip
    apart, spread = figures["wasserstein"], figures["diversity"]
    few = "" if samples["taken"] == samples["asked"] else f", {samples['asked']:,} were asked for"
    return [
        *lines, "",
        f"{'apart':<13} density {_number(apart['density'])} g/cm³, elements {_number(apart['num_elements'])}",
        f"{'':<13} bond lengths {_number(apart['bond_lengths'])} Å; "
        f"element divergence {_number(figures['element_divergence'])}",
        *_energy_lines(figures["energy"], apart["energy"]),
        _symmetry_line(figures["symmetry"]),
        f"{'diversity':<13} structures {_number(spread['structure'])}, compositions {_number(spread['composition'])}",
        f"{'':<13} of {samples['taken']:,} valid crystals{few}, seed {samples['seed']}",
    ]  # fmt: skip


def _energy_lines(energy: Mapping[str, Any], apart: float | None) -> list[str]:
    if not energy["potential"]:
        return []
    told = f"{_number(energy['mean'])} eV/atom on average, {_number(apart)} from the reference"
    return [f"{'energy':<13} {told}; {energy['potential']}, unrelaxed, {energy['known']:,} crystals"]


def _symmetry_line(symmetry: Mapping[str, Any]) -> str:
    own, known = (_percent(symmetry[name]["share"]) for name in ("symmetric", "symmetric_reference"))
    return (
        f"{'symmetry':<13} {own} beyond P1 (real {known}) at {symmetry['symprec']:g} Å; "
        f"divergence of space groups {_number(symmetry['space_groups'])} bit, "
        f"of crystal systems {_number(symmetry['crystal_systems'])}"
    )


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None else "–"


def _predict_lines(figures: Mapping[str, Any]) -> list[str]:
    k = figures["samples_per_target"]
    rows = [
        ("match rate, all", figures["match_rate"]),
        ("valid ones only (CDVAE)", figures["match_rate_valid"]),
        ("target valid too (DiffCSP)", figures["match_rate_both_valid"]),
        ("stricter tolerances", figures["match_rate_strict"]),
    ]
    if k > 1:
        rows += [("first sample of a target", figures["first"]), (f"best of {k} samples", figures["best"])]
    for part in figures["by_num_atoms"]:
        rows.append((_sizes_named(part["atoms"]), part))
    columns = [
        [f"{part['count']:,}" for _, part in rows],
        [f"{part['of']:,}" for _, part in rows],
        [_percent(part["share"]) for _, part in rows],
        [f"{part['rms']:.4f}" if part.get("rms") is not None else "–" for _, part in rows],
    ]
    lines = _aligned("matched", [name for name, _ in rows], ["count", "of", "share", "RMSE"], columns)
    if "metre" in figures:
        met = figures["metre"]
        share = f"{met['count']:,} of {met['of']:,} known crystals, {_percent(met['share'])}"
        lines.append(f"METRe: {share}; cRMSE {_number(met['crms'])}")
    ceiling = figures["ceiling"]
    valid = f"{_percent(ceiling['share'])} of {ceiling['of']:,} have a valid target"
    return [*lines, f"{valid}: the most that DiffCSP's rate can be"]


def _aligned(title: str, names: Sequence[str], heads: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    width = max(map(len, [title, *names])) + 2
    widths = [max(map(len, [head, *column])) for head, column in zip(heads, columns, strict=True)]
    table = [
        (title, heads),
        *((f"  {name}", cells) for name, cells in zip(names, zip(*columns, strict=True), strict=True)),
    ]
    return [f"{name:<{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
            for name, cells in table]  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
