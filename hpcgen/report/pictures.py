"""Figures as files: all of them in one picture, and one by one for the page."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hpcgen.report.figures import (
    draw_elements,
    draw_property,
    draw_rejects,
    draw_sizes,
    draw_space_groups,
    draw_varieties,
    properties,
)
from hpcgen.report.style import QUIET, four_digits, label, plain, style
from hpcgen.report.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes"], None]
SMALL = (3.75, 2.35)  # inches: 360 CSS pixels, so that letters keep their size on a phone
WIDE = 8.6
_LEFT, _RIGHT = 0.065, 0.975  # margins of the whole picture, as shares of its width
_DPI = 200  # of a figure that is a file of its own
_MOST = 14  # properties drawn on the page; the table there tells of all columns


def summary_png(summary: Summary, title: str, subtitle: str) -> bytes:
    """All figures as one picture of 1800 × 1400 pixels. Raises SiteError without matplotlib."""
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 9.3334), dpi=150, facecolor="white")
        figure.text(_LEFT, 0.962, plain(title), size=17, weight="bold", va="center")
        figure.text(_LEFT, 0.93, plain(subtitle), size=9.5, color=QUIET, va="center")
        draw_elements(figure.add_axes((_LEFT, 0.47, 0.625, 0.41)), summary)
        draw_sizes(figure.add_axes((0.755, 0.725, _RIGHT - 0.755, 0.155)), summary)
        draw_varieties(figure.add_axes((0.755, 0.485, _RIGHT - 0.755, 0.155)), summary)
        if summary.has_space_groups:
            draw_space_groups(figure.add_axes((_LEFT, 0.288, _RIGHT - _LEFT, 0.12)), summary)
            _draw_row(figure, _last(summary, 5), 0.058, 0.11)
        else:  # their room goes to the properties
            draws = _last(summary, 10)
            upper = draws[: -(-len(draws) // 2)] if len(draws) > 5 else []
            _draw_row(figure, upper, 0.265, 0.105)
            _draw_row(figure, draws[len(upper) :], 0.056, 0.105 if upper else 0.31)
        return _bytes(figure, "png")


def _last(summary: Summary, places: int) -> list[Draw]:
    """The first properties, and in the last place the rejects where there are any."""
    shown = properties(summary)[: places - 1 if summary.rejects else places]
    draws: list[Draw] = [partial(draw_property, what=what) for what in shown]
    return [*draws, partial(draw_rejects, summary=summary)] if summary.rejects else draws


def _draw_row(figure: "Figure", draws: list[Draw], bottom: float, height: float, gap: float = 0.05) -> None:
    """Panels of equal width from margin to margin."""
    for index, draw in enumerate(draws):
        width = (_RIGHT - _LEFT + gap) / len(draws)
        draw(figure.add_axes((_LEFT + index * width, bottom, width - gap, height)))


@dataclass(frozen=True)
class Picture:
    """One figure of the page: `alt` says it in words, a wide one takes the page's whole width."""

    alt: str
    svg: bytes
    wide: bool = False
    name: str = ""  # of its file beside the page, without ending; '': none is made
    png: bytes = b""


def pictures(summary: Summary) -> list[Picture]:
    """The single figures as SVG, wide ones first. Raises SiteError without matplotlib."""
    with style():
        draw = partial(draw_elements, summary=summary)
        shown = [picture(elements_in_words(summary), (WIDE, 4.8), (0.005, 0.0, 0.99, 0.94), draw, wide=True)]
        if summary.has_space_groups:
            words = "Bars of the number of crystals in each space group, 1 to 230, by crystal system"
            draw = partial(draw_space_groups, summary=summary)
            shown.append(picture(words, (WIDE, 2.6), (0.075, 0.18, 0.915, 0.54), draw, wide=True))
        shown += [
            _small("Histogram of the number of atoms in the cell", partial(draw_sizes, summary=summary)),
            _small("Bars of the number of elements in a crystal", partial(draw_varieties, summary=summary)),
        ]
        for what in properties(summary)[:_MOST]:
            words = f"Histogram of {label(what.name, what.unit)}, median {four_digits(what.spread.median)}"
            shown.append(_small(words, partial(draw_property, what=what)))
        if summary.rejects:
            words = "Bars of the number of rows rejected, by reason, as in the table below"
            shown.append(_small(words, partial(draw_rejects, summary=summary), left=0.03))
        return shown


def elements_in_words(summary: Summary) -> str:
    from ase.data import chemical_symbols

    order = (-summary.with_element).argsort(kind="stable")[:8]
    counts = [f"{chemical_symbols[z]} {summary.with_element[z]:,}" for z in order if summary.with_element[z]]
    return f"Periodic table of the number of crystals with each element: {', '.join(counts) or 'none'}"


def _small(alt: str, draw: Draw, left: float = 0.16) -> Picture:
    def draw_in_line(axes: "Axes") -> None:
        draw(axes)
        axes.set_title(axes.get_title("left"), pad=27)  # titles of one row at one height

    return picture(alt, SMALL, (left, 0.2, 0.97 - left, 0.55), draw_in_line)


def picture(
    alt: str,
    size: tuple[float, float],
    box: tuple[float, float, float, float],
    draw: Draw,
    *,
    wide: bool = False,
    name: str = "",
) -> Picture:
    """size in inches; box as left, bottom, width and height in shares of it. With a name also as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    draw(figure.add_axes(box))
    return Picture(alt, _bytes(figure, "svg"), wide, name, _bytes(figure, "png", _DPI) if name else b"")


def _bytes(figure: "Figure", kind: str, dpi: int = 0) -> bytes:
    """The figure as a file, without a date in it: the same summary gives the same bytes."""
    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(file, format=kind, metadata=metadata, dpi=dpi or "figure")
    return file.getvalue()
