"""An evaluation for people to read."""

from collections.abc import Mapping, Sequence
from typing import Any

from hpcgen.metrics.novelty import novelty_lines
from hpcgen.metrics.summary import RULES
from hpcgen.metrics.targeted import PERCENTILES
from hpcgen.metrics.words import aligned, intervals_told, mean_told, number, percent, share_told


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
        lines += ["", *_predict_lines(figures), _tolerances_line(told["tolerances"])]
    if "success" in figures:
        lines += ["", *_success_lines(figures["success"])]
    lines += ["", *_validity_lines(figures["validity"], told["control"])]
    lines += ["", _bond_line(figures["bonds"], told["control"]), _charge_line(figures["charges"], told["control"])]
    if told["task"] != "predict":
        lines += ["", *_content_lines(figures, told["written"])]
        if "novelty" in figures:
            lines += ["", *novelty_lines(told)]
    for name, part in figures.get("conditions", {}).items():
        off = f"off by {mean_told(part, 'mean_absolute_error', 3)} on average, {part['known']:,} known"
        lines.append(f"{'condition':<13} {name} = {part['asked']:g}: {off if part['known'] else 'not screened'}")
    if "recall_at_k" in figures:
        lines.append(_recall_line(figures["recall_at_k"]))
    if "coverage" in figures:
        lines += ["", *_likeness_lines(figures)]
    made = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return "\n".join([*lines, "", intervals_told(told["intervals"]), f"made with {made}"])


def _validity_lines(validity: Mapping[str, Any], control: Mapping[str, Any] | None) -> list[str]:
    heads, columns = ["count", "share"], [
        [f"{validity[name]['count']:,}" for name in RULES],
        [share_told(validity[name]) for name in RULES],
    ]  # fmt: skip
    if control:
        for kind in [kind for kind in ("real", "random") if kind in control]:
            heads.append(kind)
            columns.append([percent(control[kind][name]["share"]) for name in RULES])
    of = next(iter(validity.values()))["of"]
    lines = aligned(f"of {of:,} asked", list(RULES.values()), heads, columns)
    if control:
        many, chance = f"{control['crystals']:,}", f"coordinates at random, seed {control['seed']}"
        if control["of"] == "reference":
            lines.append(f"real: {many} crystals of the reference; random: their cells with {chance}")
        else:
            lines.append(f"random: the cells of {many} of these crystals with {chance}")
    return lines


def _content_lines(figures: Mapping[str, Any], written: int) -> list[str]:
    """Formulas and sizes, and validity by size."""
    atoms, of_written = figures["num_atoms"], percent(figures["unique_formulas"])
    lines = [f"{'formulas':<13} {figures['formulas']:,} distinct, {of_written} of written"]
    if written:
        lines.append(f"{'atoms':<13} {atoms['min']} to {atoms['max']}, mean {mean_told(atoms, digits=2)}")
        lines += ["", *_size_lines(figures)]
    return lines


def _size_lines(figures: Mapping[str, Any]) -> list[str]:
    """Validity by number of atoms."""
    parts, largest = figures["by_num_atoms"], figures["largest_known"]
    beyond = [" *" if largest is not None and part["atoms"][0] > largest else "" for part in parts]
    names = [_sizes_named(part["atoms"]) + mark for part, mark in zip(parts, beyond, strict=True)]
    columns = [[f"{part['valid']['of']:,}" for part in parts]]
    columns += [[share_told(part[rule]) for part in parts] for rule in ("distances", "radii", "valid")]
    lines = aligned("of written", names, ["count", "0.5 Å", "radii", "valid"], columns)
    return lines + ([f"* the largest crystal of the reference has {largest} atoms"] if any(beyond) else [])


def _sizes_named(atoms: Sequence[int]) -> str:
    low, high = atoms
    return f"{low} to {high} atoms" if low < high else f"{low} atoms"


def _bond_line(bonds: Mapping[str, Any], control: Mapping[str, Any] | None) -> str:
    beside = [f"{kind} {percent(side['bonds']['sound']['share'])}, {percent(side['bonds']['crystals']['share'])}"
              for kind, side in _controls(control)]  # fmt: skip
    told = f"{share_told(bonds['sound'])} sound, all of them in {share_told(bonds['crystals'])} of asked"
    return f"{'bonds':<13} {told}" + (f" ({'; '.join(beside)})" if beside else "")


def _charge_line(charges: Mapping[str, Any], control: Mapping[str, Any] | None) -> str:
    beside = [f"{kind} {percent(side['charges']['share'])}" for kind, side in _controls(control)]
    told = f"{share_told(charges)} neutral by bond valence, of {charges['of']:,}"
    left = f", {charges['undetermined']:,} undetermined"
    return f"{'charges':<13} {told}{left}" + (f" ({'; '.join(beside)})" if beside else "")


def _controls(control: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any]]]:
    return [(kind, control[kind]) for kind in ("real", "random") if control and kind in control]


def _likeness_lines(figures: Mapping[str, Any]) -> list[str]:
    told, samples = figures["coverage"], figures["samples"]
    near, lost = told["cut_offs"], told["without_fingerprint"]
    rows = [[share_told(told[side]), mean_told(told[f"amsd_{side}"]), mean_told(told[f"amcd_{side}"])]
            for side in ("recall", "precision")]  # fmt: skip
    heads = ["share", "structures apart", "compositions apart"]
    names = [f"recall, of {told['recall']['of']:,} known", f"precision, of {told['precision']['of']:,} asked"]
    lines = aligned("coverage", names, heads, list(zip(*rows, strict=True)))
    lines.append(f"valid, and with a fingerprint (CDVAE): {share_told(told['valid'])} of asked")
    lines.append(f"cut-offs {near['structure']:g} and {near['composition']:g}; without a fingerprint: "
                 f"{lost['run']:,} of the run, {lost['reference']:,} of the reference")  # fmt: skip
    apart, spread = figures["wasserstein"], figures["diversity"]
    few = f", fewer than the {samples['asked']:,} asked for" if samples["short"] else ""
    structures, compositions = (mean_told(spread[name]) for name in ("structure", "composition"))
    return [
        *lines, "",
        f"{'apart':<13} density {number(apart['density'])} g/cm³, elements {number(apart['num_elements'])}",
        f"{'':<13} bond lengths {number(apart['bond_lengths'])} Å; "
        f"element divergence {number(figures['element_divergence'])}",
        *_energy_lines(figures["energy"], apart["energy"]),
        _symmetry_line(figures["symmetry"]),
        f"{'diversity':<13} structures {structures}, compositions {compositions}",
        f"{'':<13} of {samples['taken']:,} valid crystals{few}, seed {samples['seed']}",
    ]  # fmt: skip


def _energy_lines(energy: Mapping[str, Any], apart: float | None) -> list[str]:
    if not energy["potential"]:
        return []
    told = f"{mean_told(energy)} eV/atom on average, {number(apart)} from the reference"
    return [f"{'energy':<13} {told}; {energy['potential']}, unrelaxed, {energy['of']:,} crystals"]


def _symmetry_line(symmetry: Mapping[str, Any]) -> str:
    own, known = share_told(symmetry["symmetric"]), percent(symmetry["symmetric_reference"]["share"])
    return (
        f"{'symmetry':<13} {own} beyond P1 (real {known}) at {symmetry['symprec']:g} Å; "
        f"divergence of space groups {number(symmetry['space_groups'])} bit, "
        f"of crystal systems {number(symmetry['crystal_systems'])}"
    )


def _recall_line(recall: Mapping[str, Any]) -> str:
    best = f"of the {recall['of']:,} best by {recall['property']} ({percent(recall['top'])} of {recall['crystals']:,})"
    return f"{'recall':<13} {share_told(recall)} {best} among the first {recall['k']:,} by {recall['rank_by']}"


def _success_lines(success: Mapping[str, Any]) -> list[str]:
    """Property optimisation."""
    rows = [(f"SR{percent}", success[f"sr{percent}"]) for percent in PERCENTILES]
    sign = "at least" if success["highest"] else "at most"
    columns = [
        [f"{sign} {part['limit']:.4g}" for _, part in rows],
        [f"{part['count']:,}" for _, part in rows],
        [share_told(part) for _, part in rows],
    ]
    title = f"of {success['starts']:,} starts"
    lines = aligned(title, [name for name, _ in rows], [success["property"], "count", "share"], columns)
    grouped = f"by the column {success['grouped_by']}" if success["grouped_by"] else "each crystal a start of its own"
    return [*lines, f"the best valid one of at most {success['candidates']:,} of a start ({grouped}); "
            f"without a value: {success['without_value']:,}; limits of {success['reference_values']:,} values of the "
            "reference"]  # fmt: skip


def _tolerances_line(tolerances: Mapping[str, Mapping[str, float]]) -> str:
    match, strict = (", ".join(f"{name} {value:g}" for name, value in tolerances[kind].items())
                     for kind in ("match", "strict"))  # fmt: skip
    return f"matched: StructureMatcher with {match}; stricter: {strict}; RMSE in units of (V/N)^(1/3)"


def _predict_lines(figures: Mapping[str, Any]) -> list[str]:
    k = figures["samples_per_target"]
    rows = [
        ("match rate, all", figures["match_rate"]),
        ("valid ones only (CDVAE)", figures["match_rate_valid"]),
        ("target valid too (DiffCSP)", figures["match_rate_both_valid"]),
        ("stricter tolerances", figures["match_rate_strict"]),
    ]
    if k > 1:
        rows += [
            ("first sample of a target", figures["first"]),
            ("  valid ones only", figures["first_valid"]),
            (f"best of {k} samples", figures["best"]),
            ("  valid ones only", figures["best_valid"]),
        ]
    for part in figures["by_num_atoms"]:
        rows.append((_sizes_named(part["atoms"]), part))
    columns = [
        [f"{part['count']:,}" for _, part in rows],
        [f"{part['of']:,}" for _, part in rows],
        [share_told(part) for _, part in rows],
        [mean_told(part, "rms") for _, part in rows],
    ]
    lines = aligned("matched", [name for name, _ in rows], ["count", "of", "share", "RMSE"], columns)
    if "metre" in figures:
        met = figures["metre"]
        share = f"{met['count']:,} of {met['of']:,} known crystals, {share_told(met)}"
        lines.append(f"METRe: {share}; cRMSE {mean_told(met, 'crms')}")
    ceiling = figures["ceiling"]
    valid = f"{share_told(ceiling)} of {ceiling['of']:,} have a valid target"
    return [*lines, f"{valid}: the most that DiffCSP's rate can be"]
