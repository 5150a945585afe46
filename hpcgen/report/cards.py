"""Best candidates as cards: formula, symmetry, a view that turns, numbers, and the powder pattern."""

import re
from collections.abc import Sequence
from functools import partial
from importlib import resources

from hpcgen.metrics.coverage import density
from hpcgen.report.candidates import (
    WAVELENGTH,
    Candidate,
    Pattern,
    choose,
    diffraction,
    numbers_of,
    open_run,
)
from hpcgen.report.compare import ANGLES, draw_pattern
from hpcgen.report.distributions import Row, small
from hpcgen.report.figures import hermann_mauguin
from hpcgen.report.gather import SYMPREC
from hpcgen.report.parts import fact_list, figure, section, text
from hpcgen.report.pictures import Picture, picture
from hpcgen.report.run import Run
from hpcgen.report.sections import Part, Table, paragraph, subscripted
from hpcgen.report.solid import Solid, draw_solid, solid

STYLE = """
h3 { margin: 1.4rem 0 .5rem; font-size: 1rem; }
h4 { margin: 0 0 .3rem; font-size: 1.1rem; } h4 small { font-weight: 400; color: var(--quiet); }
p { overflow-wrap: anywhere; } section > p { max-width: 50rem; }
code { padding: .1rem .3rem; background: #eef1f3; overflow-wrap: anywhere; }
sub { line-height: 0; } .bar { text-decoration: overline; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1.6rem; }
article { padding: .9rem; border: 1px solid var(--rule); border-radius: .3rem; min-width: 0; break-inside: avoid; }
canvas { display: block; width: 100%; max-width: 21rem; aspect-ratio: 1; margin: 0 auto; cursor: grab;
  touch-action: pan-y; }
canvas:focus-visible { outline: 2px solid var(--ink); }
article dl { grid-template-columns: 1fr; margin-bottom: .6rem; font-size: .9rem; }
h4.group { margin: 1.5rem 0 .3rem; font-size: .95rem; }
.meaning, .figures small { color: var(--quiet); font-size: .85rem; max-width: 52rem; }
.meaning { margin: 0 0 .4rem; }
.figures small { display: block; }
.figures table { width: 100%; }
.figures td:first-child { white-space: normal; }
.figures td { vertical-align: top; }
@media (max-width: 700px) {
  .figures tr { display: flex; flex-wrap: wrap; gap: 0 1rem; border-bottom: 1px solid #eef1f3; }
  .figures th, .figures td { border: 0; padding: .2rem 0; }
  .figures td:first-child, .figures th:first-child { flex: 1 1 6rem; }
  .figures td:not(:first-child), .figures th:not(:first-child) { margin-left: auto; white-space: normal; }
  .figures td.told, .several td:first-child { flex: 1 0 100%; }
  .several thead { display: none; }
  .several td[data-run] { flex: 1 0 100%; display: flex; justify-content: space-between; gap: 1rem; }
  .several td[data-run]::before { content: attr(data-run); color: var(--quiet); }
  .settings td:first-child { min-width: 6.5rem; }
  .wide::after { content: "\\2194  wider than the screen: drag it sideways"; position: sticky; left: 0;
    display: block; width: max-content; color: var(--quiet); font-size: .8rem; }
}
.key { margin: .2rem 0 .6rem; font-size: .85rem; text-align: center; color: var(--quiet); }
"""
_HOW = (
    "Drag to turn, arrow keys and + or − where a picture has the focus, double click for the first look. "
    "On a touch screen begin with a movement to the side: up and down scroll the page."
)


def script() -> str:
    """What turns the pictures."""
    return resources.files("hpcgen.report").joinpath("view.js").read_text(encoding="utf-8")


_FACTS = ("run", "place", "id", "formula", "space group", "valid", "atoms", "density (g/cm³)", "column", "value",
          "unit")  # fmt: skip
_PEAKS = ("run", "place", "id", "two theta (degrees)", "intensity", "spacing (Å)", "h k l")


def candidates_part(runs: Sequence[Run], top: int, sample: int, seed: int) -> Part:
    """The best crystals of each run, each run in a column of its own."""
    facts: list[Row] = []
    peaks: list[Row] = []
    part = Part("", tables={"candidates": Table(_FACTS, facts), "diffraction": Table(_PEAKS, peaks)})
    columns = []
    for at, run in enumerate(runs):
        chosen, how = choose(open_run(run.path), top, sample, seed)
        cards = []
        for place, candidate in enumerate(chosen, start=1):
            shown, pattern = solid(candidate.crystal), diffraction(candidate.crystal)
            pictures = _pictures(f"candidate_{at + 1}_{place:02d}", candidate, shown, pattern)
            part.pictures += pictures
            cards.append(_card(candidate, shown, pattern, pictures[1:]))
            facts += _facts(run.name, place, candidate)
            peaks += [(run.name, place, candidate.id, *peak) for peak in _peaks(pattern)]
        title = f"<h3>{text(run.name)}</h3>" if len(runs) > 1 else ""
        said = paragraph(f"Chosen: {how}; no formula twice.")
        columns.append(f"<div>{title}{said}<div class=cards>{''.join(cards)}</div></div>")
    words = (
        f"Space groups within {SYMPREC:g} Å. Valid: atoms 0.5 Å apart and a composition that balances. Pictures: "
        "the cell as it is, moved so that an atom of the rarest element is at its corners. Patterns: "
        f"pymatgen's XRDCalculator, {WAVELENGTH[:2]} Kα, 2θ {ANGLES[0]:g}° to {ANGLES[1]:g}°, strongest peak 100. "
    )
    side = "side" if len(runs) > 1 else "alone"
    part.html = section("Best candidates", f"{paragraph(words + _HOW)}<div class={side}>{''.join(columns)}</div>")
    return part


def _pictures(name: str, candidate: Candidate, shown: Solid, pattern: Pattern) -> list[Picture]:
    """The first look, as a file alone, and the pattern where there is one."""
    title = f"{candidate.formula}, {candidate.id}"
    look = picture(
        title, (3.6, 3.75), (0.02, 0.02, 0.96, 0.9), partial(draw_solid, title=title, shown=shown), name=name
    )
    if not pattern.angles:
        return [look]
    draw = partial(draw_pattern, title="powder diffraction", angles=pattern.angles, heights=pattern.heights,
                   hkl=pattern.hkl)  # fmt: skip
    strongest = max(zip(pattern.heights, pattern.angles, strict=True))[1]
    words = f"Powder pattern of {candidate.formula}: {len(pattern.angles)} peaks, the strongest at {strongest:.2f}°"
    return [look, small(f"{name}_diffraction", words, draw, 0)]


def _card(candidate: Candidate, shown: Solid, pattern: Pattern, pictures: Sequence[Picture]) -> str:
    words = f"{candidate.formula} in its cell: {len(shown.atoms)} atoms, those on faces on both sides; drag to turn"
    canvas = f"<canvas tabindex=0 role=img aria-label='{text(words)}' data-solid='{text(shown.as_json())}'></canvas>"
    note = f"<p class=key>{text(shown.note)}</p>" if shown.note else ""
    below = "".join(map(figure, pictures)) or f"<p class=key>Powder pattern {text(pattern.note)}</p>"
    title = f"<h4>{subscripted(candidate.formula)} <small>{symmetry(candidate.space_group)}</small></h4>"
    return f"<article>{title}{canvas}{note}{fact_list(numbers_of(candidate))}{below}</article>"


def symmetry(number: int) -> str:
    """A space group as HTML: its symbol and number."""
    if not number:
        return "no space group found"
    symbol = re.sub(r"\\bar\{(.)\}", r"<span class=bar>\1</span>", hermann_mauguin(number).strip("$"))
    symbol = re.sub(r"(\d)_(\d)", r"\1<sub>\2</sub>", symbol)
    return f"{symbol} ({number})"


def _facts(run: str, place: int, candidate: Candidate) -> list[Row]:
    """A line for each column of the crystal, or one without."""
    head = (run, place, candidate.id, candidate.formula, candidate.space_group or "none found", int(candidate.valid),
            len(candidate.crystal.atomic_numbers), round(float(density(candidate.crystal)[0]), 4))  # fmt: skip
    values = [(name, value, unit) for name, (value, unit) in candidate.values.items()]
    return [(*head, *value) for value in values or [("", "", "")]]


def _peaks(pattern: Pattern) -> list[Row]:
    """Angle, intensity, spacing and plane of each."""
    sticks = zip(pattern.angles, pattern.heights, pattern.spacings, pattern.hkl, strict=True)
    return [(*(float(f"{x:.6g}") for x in stick), " ".join(map(str, hkl))) for *stick, hkl in sticks]
