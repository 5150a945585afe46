"""The figures of an evaluation in groups, each figure and each group with what defines it, as HTML."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcgen.report.evaluated import meaning_of
from hpcgen.report.parts import text

Figure = tuple[str, ...]  # its dotted name, and its value in each run
_LONG = 10  # figures of one kind, as lengths of bonds by pair of elements: so many are folded away
_MOST = 20  # figures in sight of one group
_TITLES = {
    "by_num_atoms": "Validity by number of atoms",
    "charges": "Charges by bond valence",
    "coverage": "Coverage, and distances to the nearest",
    "wasserstein": "Wasserstein distances from the reference",
    "novelty": "Unique, novel, stable",
    "num_atoms": "Atoms in the cell",
    "recall_at_k": "Recall@K",
    "metre": "METRe",
}
_SINGLE = "Further figures"  # of those that are a group by themselves


@dataclass
class Group:
    """Figures that belong together."""

    title: str
    meaning: str = ""
    rows: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)  # name, what defines it, values
    folded: dict[str, list[tuple[str, str, tuple[str, ...]]]] = field(default_factory=dict)  # by kind


def groups_of(rows: Sequence[Figure], evaluations: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Figures by the first part of their names, in their order; a definition is told once."""
    by_first: dict[str, list[Figure]] = {}
    for row in rows:
        by_first.setdefault(row[0].partition(".")[0], []).append(row)
    told: set[str] = set()
    groups, single = [], Group(_SINGLE)
    for name, members in by_first.items():
        group = single if len(members) == 1 else Group(_TITLES.get(name, _words(name).capitalize()))
        if group is not single:
            group.meaning = _once(meaning_of(name, evaluations), told)
            groups.append(group)
        kinds = _kinds(name, members)
        for row in members:
            own = row[0] if group is single else row[0].removeprefix(name).removeprefix(".")
            line = (_words(own) or "overall", _once(meaning_of(row[0], evaluations), told), row[1:])
            group.folded.setdefault(kinds[row[0]], []).append(line) if row[0] in kinds else group.rows.append(line)
    return [*groups, *([single] if single.rows else [])]


def _kinds(group: str, rows: Sequence[Figure]) -> dict[str, str]:
    """By its name, the kind under which a figure is folded away, of those that are."""
    if len(rows) > _MOST and all("." in row[0].removeprefix(f"{group}.") for row in rows):
        return {row[0]: "" for row in rows}
    kinds = {row[0]: row[0].split(".")[1] for row in rows if row[0].count(".") > 1}
    counts = {kind: list(kinds.values()).count(kind) for kind in kinds.values()}
    return {name: kind for name, kind in kinds.items() if counts[kind] >= _LONG}


def _once(meaning: str, told: set[str]) -> str:
    if meaning in told:
        return ""
    told.add(meaning)
    return meaning


def _words(name: str) -> str:
    """'of_pairs.Na-Cl' -> 'of pairs · Na-Cl'."""
    return " · ".join(part.replace("_", " ") for part in name.split("."))


def as_html(groups: Sequence[Group], runs: Sequence[str]) -> str:
    """runs: their names."""
    return "\n".join(part for group in groups for part in _parts(group, runs))


def _parts(group: Group, runs: Sequence[str]) -> Iterator[str]:
    yield f"<h4 class=group>{text(group.title)}</h4>"
    if group.meaning:
        yield f"<p class=meaning>{text(group.meaning)}</p>"
    if group.rows:
        yield _table(group.rows, runs)
    for kind, rows in group.folded.items():
        title = f"{_words(kind) or group.title}: {len(rows)} figures"
        yield f"<details><summary>{text(title)}</summary>{_table(rows, runs)}</details>"


def _table(rows: Sequence[tuple[str, str, tuple[str, ...]]], runs: Sequence[str]) -> str:
    """On a phone the head goes, and each value of several runs stands beside the name of its own."""
    several, lines = len(runs) > 1, []
    for name, meaning, values in rows:
        first = f"<td class=told>{text(name)}<small>{text(meaning)}</small></td>" if meaning else _cell(name)
        cells = (_cell(value, run if several else "") for run, value in zip(runs, values, strict=True))
        lines.append(f"<tr>{first}{''.join(cells)}</tr>")
    heads = "".join(f"<th scope=col>{text(name)}</th>" for name in runs)
    top = f"<thead><tr><th scope=col>figure</th>{heads}</tr></thead>" if several else ""
    kind = "figures several" if several else "figures"
    return f"<div class='scroll {kind}'><table>{top}<tbody>{''.join(lines)}</tbody></table></div>"


def _cell(value: str, run: str = "") -> str:
    return f'<td data-run="{text(run)}">{text(value)}</td>' if run else f"<td>{text(value)}</td>"
