"""An evaluation for people to read."""

from collections.abc import Mapping, Sequence
from typing import Any

from hpcgen.metrics.novelty import novelty_lines
from hpcgen.metrics.summary import RULES


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
