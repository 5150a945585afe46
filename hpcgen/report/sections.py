"""The sections of a run's page: each with its text, and the figures and tables that are files beside the page."""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hpcgen.metrics.summary import RULES
from hpcgen.report.compare import draw_bars, draw_curves, legend_rows
from hpcgen.report.distributions import (
    Row,
    distribution_rows,
    element_rows,
    group_rows,
    histogram_pictures,
    histograms,
    lacking,
    quantile_rows,
    small,
    systems_picture,
    wide_pictures,
)
from hpcgen.report.done import asked_and_done, settings_of
from hpcgen.report.evaluated import figures_of, intervals_of, raw_figures, validity_of
from hpcgen.report.gather import BOND, SYMPREC, Gathered
from hpcgen.report.grouped import as_html, groups_of
from hpcgen.report.parts import fact_list, figure, grid, section, table, text
from hpcgen.report.pictures import WIDE, Picture, picture
from hpcgen.report.run import Run
from hpcgen.report.style import percent
from hpcgen.report.training import Training, curve, training_of

_PASSING = {"time", "kind", "step", "epoch", "crystals", "bad"}  # of a line of metrics.jsonl: no curves
_MOST_POINTS = 1500  # of a curve in a figure; the table has all


@dataclass(frozen=True)
class Table:
    """A table that is a CSV file."""

    heads: tuple[str, ...]
    rows: Sequence[Row]


@dataclass
class Part:
    """One section. pictures, tables: what of it is written beside the page, tables by name."""

    html: str
    pictures: list[Picture] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def _columns(runs: Sequence[Run], told: Sequence[dict[str, str]]) -> list[Row]:
    """One row for each name that any run tells of, with a cell for each run."""
    names = dict.fromkeys(name for each in told for name in each)
    return [(name, *(each.get(name, "–") for each in told)) for name in names]


def _shown(heads: tuple[str, ...], rows: Sequence[Row]) -> str:
    """A list for one run, a table for several."""
    cells = [tuple(map(str, row)) for row in rows]
    return fact_list((row[0], row[1]) for row in cells) if len(heads) == 2 else table(heads, cells, "settings")


# ---- asked and done --------------------------------------------------------------------------------------------------


def asked_part(runs: Sequence[Run]) -> Part:
    """What was asked for, what became of it, how fast, and with which settings."""
    heads = ("", *(run.name for run in runs))
    done = _columns(runs, [asked_and_done(run) for run in runs])
    body = _shown(heads, done)
    tables = {"runs": Table(("fact", *heads[1:]), done)}
    reasons = sorted({why for run in runs for why in run.rejected})
    if reasons:
        tables["rejected"] = Table(
            ("reason", *heads[1:]), [(why, *(run.rejected.get(why, 0) for run in runs)) for why in reasons]
        )
        shares = [(why, *(_share(run.rejected.get(why, 0), run.asked) for run in runs)) for why in reasons]
        body += f"<h3>Rejected, of all asked for</h3>{table(('reason', *heads[1:]), shares)}"
    for kind in dict.fromkeys(run.kind for run in runs):
        body += _settings(kind, [run for run in runs if run.kind == kind], tables)
    return Part(section("Asked and done", body), [], tables)


def _share(count: int, of: int) -> str:
    return f"{count:,} ({percent(count, of)})"


def _settings(kind: str, runs: Sequence[Run], tables: dict[str, Table]) -> str:
    """Settings of the runs of one kind: those that differ in sight, the others folded away."""
    rows = _columns(runs, [settings_of(run) for run in runs])
    if not rows:
        return ""
    heads = ("setting", *(run.name for run in runs))
    tables[f"settings_{kind}"] = Table(heads, rows)
    differing = [row for row in rows if len(set(row[1:])) > 1]
    same = [row for row in rows if row not in differing]
    shown = f"<h3>Settings of the {kind} runs that differ</h3>{_shown(heads, differing)}" if differing else ""
    words = f"Settings of the {kind}" + (f" runs, the same in all: {len(same)}" if len(runs) > 1 else f": {len(same)}")
    return f"{shown}<details><summary>{words}</summary>{_shown(heads, same)}</details>"


# ---- validity --------------------------------------------------------------------------------------------------------


def validity_part(runs: Sequence[Run], reference: Path | None) -> Part:
    """What `hpcgen evaluate` found of each run, or the command that would find it."""
    runs = [run for run in runs if run.manifest is not None]
    body, part = [], Part("")
    for run in runs:
        body += [paragraph(note) for note in run.notes]
        if not run.evaluations:
            command = f"hpcgen evaluate {run.path}" + (f" --reference {reference}" if reference else "")
            body.append(f"<p>{text(run.name)} has not been evaluated. <code>{text(command)}</code> does it; "
                        "then make this page again.</p>")  # fmt: skip
    rules, series = validity_of(runs)
    if rules:
        names = [RULES.get(rule, rule.replace("_", " ")) for rule in rules]
        high = 0.62 + len(rules) * max(0.13 * len(series), 0.2) + 0.155 * legend_rows(len(series))
        box = (0.245, 0.4 / high, 0.735, (high - 0.66 - 0.155 * legend_rows(len(series))) / high)
        title = "Crystals that keep each rule, % of all asked for"
        draw = partial(draw_bars, title=title, names=names, series=series)
        part.pictures.append(picture(title, (WIDE, high), box, draw, wide=True, name="validity"))
        body.append(figure(part.pictures[0]))
    for task in dict.fromkeys(task for run in runs for task in run.evaluations):
        body.append(_evaluation(runs, task, part))
    part.html = section("Validity and other figures", "\n".join(body))
    return part


def _evaluation(runs: Sequence[Run], task: str, part: Part) -> str:
    """One evaluation of the runs that have it: every figure with what defines it."""
    having = [run for run in runs if task in run.evaluations]
    told = [run.evaluations[task] for run in having]
    rows = [tuple(map(str, row)) for row in _columns(having, [figures_of(each) for each in told])]
    names_of_runs = [run.name for run in having]
    raw = [dict(raw_figures(each["figures"])) for each in told]
    names = dict.fromkeys(name for each in raw for name in each)
    values = [(name, *("" if (one := each.get(name)) is None else one for each in raw)) for name in names]
    part.tables[f"evaluation_{task}"] = Table(("figure", *names_of_runs), values)
    said = []
    for run, each in zip(having, told, strict=True):
        lost = each.get("not_measured") if isinstance(each.get("not_measured"), dict) else {}
        facts = [
            f"reference {each['reference']}" if each.get("reference") else "no reference",
            str(each.get("note") or ""),
            f"not compared: {', '.join(f'{n} {why}' for why, n in lost.items())}" if lost else "",
        ]  # fmt: skip
        said.append(f"{run.name}: {'; '.join(filter(None, facts))}.")
    said.append(intervals_of(told))
    groups = as_html(groups_of(rows, told), names_of_runs)
    return f"<h3>{text(f'Evaluated: {task}')}</h3>{paragraph(' '.join(said))}{groups}"


# ---- distributions ---------------------------------------------------------------------------------------------------


def distributions_part(runs: Sequence[Gathered], reference: Gathered | None) -> Part:
    """Elements, sizes, density, cells, bonds, space groups and columns, held against the reference."""
    every = [*runs, *([reference] if reference else [])]
    shown = histograms(runs, reference)
    wide = wide_pictures(runs, reference)
    others = [*histogram_pictures(shown), systems_picture(runs, reference)]
    rows = quantile_rows(shown)
    names = tuple(each.name for each in every)
    quantiles = ("quantity", "unit", "of", "values", "minimum", "5 %", "median", "95 %", "maximum")
    tables = {
        "distributions": Table(("quantity", "unit", "of", "from", "to", "per cent"), distribution_rows(shown)),
        "quantiles": Table(quantiles, rows),
        "elements": Table(("element", *(f"crystals of {name}" for name in names)), element_rows(every)),
        "space_groups": Table(("space group", *(f"in the sample of {name}" for name in names)), group_rows(every)),
    }
    words = [
        "Elements, sizes, density, volume and columns are counted over all crystals.",
        "Cells (reduced after Niggli), bonds and space groups are those of samples:",
        "; ".join(f"{each.name}: {each.close.in_words()}" for each in every) + ".",
        f"Two atoms are bonded if closer than {BOND:g} times the sum of their covalent radii (Cordero et al. 2008), in "
        "crystals without pairs closer than 0.5 Å.",
        f"Space groups are found by moyo within {SYMPREC:g} Å.",
    ]
    if reference is None:
        words.append("With --reference STORE known crystals would stand beside.")
    elif missing := lacking(runs, reference):
        words.append(f"The reference has no column {', '.join(missing)} in the same unit: the run alone is drawn.")
    cells = [tuple(value if isinstance(value, str) else f"{value:,.6g}" for value in row) for row in rows]
    body = [
        paragraph(" ".join(words)),
        *map(figure, wide),
        grid(map(figure, others)),
        f"<details><summary>Medians and ranges</summary>{table(quantiles, cells)}</details>",
    ]
    return Part(section("Distributions", "\n".join(body)), [*wide, *others], tables)


# ---- training --------------------------------------------------------------------------------------------------------


def training_part(runs: Sequence[Run]) -> Part:
    """Curves of every training that made a checkpoint of the runs, each once."""
    found: dict[Path, tuple[Training, list[str]]] = {}
    body: list[str] = []
    part = Part("")
    for run in runs:
        if isinstance(told := training_of(run), str):
            body.append(paragraph(told))
        else:
            found.setdefault(told.path.resolve(), (told, []))[1].append(run.name)
    rows: list[Row] = []
    for at, (training, users) in enumerate(found.values()):
        body.append(_curves(at + 1, training, users, part))
        for kind, lines in (("training", training.train), ("validation", training.validation)):
            for name in _quantities(lines):
                rows += [(str(training.path), kind, name, int(step), value) for step, value in curve(lines, name)]
    if rows:
        part.tables["training"] = Table(("training run", "kind", "quantity", "step", "value"), rows)
    part.html = section("Training", "\n".join(dict.fromkeys(body)))
    return part


def _quantities(lines: Iterable[dict[str, object]]) -> list[str]:
    """What the lines tell of, in the order in which it first comes."""
    return [name for name in dict.fromkeys(name for line in lines for name in line) if name not in _PASSING]


def _curves(number: int, training: Training, users: Sequence[str], part: Part) -> str:
    shown = []
    for name in _quantities([*training.train, *training.validation]):
        train, validation = (_thinned(list(curve(lines, name))) for lines in (training.train, training.validation))
        if train or validation:
            title = name.replace("_", " ").replace("crystals per s", "crystals per second")
            draw = partial(draw_curves, title=title, train=train, validation=validation)
            words = f"{title} against steps of {training.path.name}"
            shown.append(small(f"training_{number}_{re.sub(r'[^A-Za-z0-9_-]', '_', name)}", words, draw, 1, left=0.17))
    part.pictures += shown
    told = f"{training.path}, for {', '.join(users)}." + (f" Note: {training.note}." if training.note else "")
    return paragraph(told) + (grid(map(figure, shown)) if shown else paragraph("It has told nothing yet."))


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS of them, the last one included."""
    step = -(-len(points) // _MOST_POINTS) if points else 1
    return points[::-step][::-1]


def subscripted(formula: str) -> str:
    """A formula as HTML, its numbers below the line."""
    return re.sub(r"(\d+)", r"<sub>\1</sub>", html.escape(formula))
