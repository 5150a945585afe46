"""The figures of a summary, each drawn into given axes: readable small, on paper, and in black and white."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcgen.report.spread import Spread
from hpcgen.report.style import (
    BAR,
    BAR_LIGHT,
    INK,
    PALE,
    QUIET,
    RAMP,
    REFUSED,
    RULE,
    four_digits,
    label,
    percent,
    plain,
    sentence,
    short,
)
from hpcgen.report.summary import CRYSTAL_SYSTEMS, SPACE_GROUP, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

_FIRST = ("formation_energy_per_atom", "e_above_hull", "band_gap")  # drawn before other columns


def place(number: int) -> tuple[float, float]:
    """Column 1 to 18 and row of an element in the usual table; the f block in rows 8.4 and 9.4."""
    if number <= 2:
        return (1, 1) if number == 1 else (18, 1)
    if number <= 18:
        along, row = (number - 2) % 8 or 8, 2 if number <= 10 else 3
        return (along if along <= 2 else along + 10), row
    if number <= 54:
        along, row = (number - 18, 4) if number <= 36 else (number - 36, 5)
        return along, row
    along, row = (number - 54, 6) if number <= 86 else (number - 86, 7)
    if along <= 2:
        return along, row
    if along <= 17:  # 15 elements of the f block
        return along, row + 2.4
    return along - 14, row


def draw_elements(axes: "Axes", summary: Summary) -> None:
    """Periodic table: cells by the share of crystals that hold the element, logarithmic, with their count."""
    from ase.data import chemical_symbols
    from matplotlib.colors import LinearSegmentedColormap, LogNorm
    from matplotlib.patches import Rectangle

    counts = summary.with_element
    most = max(int(counts.max()), 1)
    least = most / 316  # 2.5 decades: rarer elements are as pale as this
    ramp = LinearSegmentedColormap.from_list("shares", RAMP)
    norm = LogNorm(least, most, clip=True)
    for number in range(1, len(counts)):
        column, row = place(number)
        count = int(counts[number])
        face = ramp(float(norm(count))) if count else "white"
        ink = _readable_on(face) if count else "#9aa3ab"
        edge = "white" if count else RULE
        axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, facecolor=face, edgecolor=edge, lw=0.6))
        symbol = chemical_symbols[number]
        if count:
            axes.text(column, row - 0.13, symbol, ha="center", va="center", color=ink, size=10, weight="bold")
            axes.text(column, row + 0.27, short(count), ha="center", va="center", color=ink, size=6.6)
        else:
            axes.text(column, row, symbol, ha="center", va="center", color=ink, size=9)
    for row, series in ((6, "57–71"), (7, "89–103")):
        axes.text(3, row, series, ha="center", va="center", color=QUIET, size=6.6)
    axes.set(xlim=(0.52, 18.55), ylim=(9.95, 0.45), aspect="equal", anchor="NW")
    axes.axis("off")
    axes.set_title("Crystals that hold each element")
    if summary.crystals:
        _draw_key(axes, ramp, norm, summary.crystals)


def _readable_on(face: Any) -> str:
    """White or ink, whichever stands out more by the contrast rule of WCAG 2.2."""
    from matplotlib.colors import to_rgb

    luminance = [
        sum(share * _linear(value) for share, value in zip((0.2126, 0.7152, 0.0722), to_rgb(colour), strict=True))
        for colour in (face, INK)
    ]
    return "white" if 1.05 * (luminance[1] + 0.05) > (luminance[0] + 0.05) ** 2 else INK


def _linear(value: float) -> float:
    """sRGB value to linear light."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _draw_key(axes: "Axes", ramp: Any, norm: Any, total: int) -> None:
    """Colour key in the gap above the transition metals, in shares of all crystals."""
    key = axes.inset_axes((0.19, 0.865, 0.42, 0.028))
    key.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=ramp, extent=(0, 1, 0, 1))
    key.set_yticks([])
    decades = 10.0 ** np.arange(-8, 1)
    ticks = [share for share in decades if norm.vmin <= share * total <= norm.vmax]
    if len(ticks) < 2:
        ticks = [norm.vmin / total, norm.vmax / total]
    key.set_xticks([float(norm(share * total)) for share in ticks], [f"{100 * share:.3g} %" for share in ticks])
    key.tick_params(length=2.5, labelsize=7.5, pad=2)
    for spine in key.spines.values():
        spine.set_visible(False)
    key.set_title("colour: share of all crystals · number: crystals", size=7.5, weight="normal", pad=4)


# ------------------------------------------------------------------------------------ counts and groups


def draw_sizes(axes: "Axes", summary: Summary) -> None:
    """Number of atoms in the cell: one bar per number up to 60 of them, else equal steps."""
    axes.set_title("Atoms in the cell")
    counts = summary.of_size[1:]
    if not counts.any():
        _nothing(axes, "no crystals")
        return
    first, last = int(counts.nonzero()[0][0]) + 1, len(counts)
    first = 1 if first <= 10 else first
    step = -(-(last - first + 1) // 60)
    starts = np.arange(first, last + 1, step)
    heights = np.add.reduceat(counts[first - 1 :], starts - first)
    axes.bar(starts + (step - 1) / 2, heights, width=0.82 * step, color=BAR)
    axes.set_xlim(first - 0.9, max(last + step, first + 7))
    axes.xaxis.set_major_locator(_few_integers(8, steps=[1, 2, 5, 10]))
    axes.set_xlabel("atoms" if step == 1 else f"atoms, in steps of {step}")
    _count_axis(axes)


def draw_varieties(axes: "Axes", summary: Summary) -> None:
    """Number of different elements in a crystal."""
    axes.set_title("Elements in a crystal", pad=9)
    counts = summary.of_variety[1:]
    if not counts.any():
        _nothing(axes, "no crystals")
        return
    axes.set_xlim(0.4, max(len(counts), 4) + 0.6)
    bars = axes.bar(np.arange(1, len(counts) + 1), counts, width=0.7, color=BAR)
    if len(counts) <= 9:
        shares = [percent(int(count), summary.crystals) if count else "" for count in counts]
        axes.bar_label(bars, shares, padding=2, fontsize=7.5 if len(counts) <= 6 else 6)
        axes.set_ymargin(0.14)
        axes.autoscale_view(scalex=False)
    axes.set_xticks(np.arange(1, max(len(counts), 4) + 1))
    axes.set_xlabel("elements")
    _count_axis(axes)


def hermann_mauguin(number: int) -> str:
    """International symbol of a space group's standard setting as mathtext: bars over, screw axes below."""
    import gemmi

    lattice, *axes = gemmi.find_spacegroup_by_number(number).hm.split()
    if 3 <= number <= 15:  # C 1 2/m 1 is C2/m to all
        axes = [axis for axis in axes if axis != "1"]
    axes = [re.sub(r"^(\d)(\d)", r"\1_\2", axis) for axis in axes]
    symbol = re.sub(r"-(.)", r"\\bar{\1}", lattice + "".join(axes))
    return f"${symbol}$"


def draw_space_groups(axes: "Axes", summary: Summary) -> None:
    """Space groups 1 to 230 as bars in bands of crystal systems, the most frequent ones named."""
    known = int(summary.in_space_group[1:].sum())
    axes.set_title("Space groups", pad=26)
    if not known:
        _nothing(axes, "the store has no space groups")
        return
    counts = summary.in_space_group
    most = int(counts.max() if counts[0] == 0 else counts[1:].max())
    logarithmic = most >= 100
    bottom = 0.7 if logarithmic else 0.0
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(_decades())
        axes.yaxis.set_major_formatter(lambda value, _: short(round(value)))
    else:
        axes.yaxis.set_major_locator(_few_integers())
    axes.set_xlim(0, 231)
    for band, (system, (first, last)) in enumerate(CRYSTAL_SYSTEMS.items()):
        if band % 2 == 0:
            axes.axvspan(first - 0.5, last + 0.5, color=PALE, lw=0, zorder=0)
        numbers = np.arange(first, last + 1)
        colour = BAR if band % 2 == 0 else INK
        axes.bar(numbers, counts[first : last + 1] - bottom, bottom=bottom, width=0.8, color=colour)
        along, aligned = {0: (-3.0, "right"), 1: (0.5, "left")}.get(band, ((first + last) / 2, "center"))
        text = f"{system}\n{percent(summary.in_crystal_system[system], known)}"
        where: dict[str, Any] = {"ha": aligned, "va": "bottom", "size": 7.8, "color": INK}
        axes.text(along, 1.02, text, transform=axes.get_xaxis_transform(), linespacing=1.35, **where)
    names = [axes.text(n, counts[n], f" {hermann_mauguin(n)}", rotation=90, **_NAME) for n in _named(counts)]
    _make_room(axes, bottom, names)
    axes.set_xticks([1, *range(25, 226, 25)])
    unknown = f" (not drawn, as not known: {int(counts[0]):,})" if counts[0] else ""
    axes.set_xlabel(f"space-group number{unknown}")
    axes.set_ylabel("crystals (log scale)" if logarithmic else "crystals")


def _make_room(axes: "Axes", bottom: float, names: Sequence["Text"]) -> None:
    """Set the upper end of the y axis so that names that stand on top of bars end within the frame."""
    rise, back = (np.log, np.exp) if axes.get_yscale() == "log" else (np.float64, np.float64)
    frame, start = axes.get_window_extent().height, rise(bottom)
    spans = [
        (rise(name.get_position()[1]) - start) / max(0.2, 0.98 - name.get_window_extent().height / frame)
        for name in names
    ]
    axes.set_ylim(bottom, float(back(start + max(spans))))


_NAME: dict[str, Any] = {"ha": "center", "va": "bottom", "size": 7.5, "color": INK}


def _named(counts: np.ndarray, most: int = 10, apart: int = 4) -> list[int]:
    """The most frequent space groups, left out where a name would cover another."""
    named: list[int] = []
    for number in np.argsort(-counts[1:], kind="stable") + 1:
        if len(named) == most or counts[number] == 0:
            break
        if all(abs(int(number) - other) >= apart for other in named):
            named.append(int(number))
    return named


def draw_rejects(axes: "Axes", summary: Summary) -> None:
    """Rows turned away, by reason, the most frequent first; past eight reasons the rest is one bar."""
    axes.set_title("Rows rejected", pad=27)
    if not summary.rejects:
        _nothing(axes, "none recorded")
        return
    ranked = sorted(summary.rejects.items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) > 8:
        ranked = [*ranked[:7], (f"{len(ranked) - 7} other reasons", sum(count for _, count in ranked[7:]))]
    _note(axes, f"{summary.rejects.total():,} in all")
    highest = ranked[0][1]
    rows = np.arange(len(ranked))
    axes.barh(rows, [count for _, count in ranked], height=0.8, color=REFUSED)
    for row, (code, count) in enumerate(ranked):
        name = plain(code if len(code) <= 24 else code[:23] + "…")
        axes.text(0.015 * highest, row, name, va="center", size=7.8)
        axes.text(1.4 * highest, row, f"{count:,}", va="center", ha="right", size=7.8)
    axes.set(xlim=(0, 1.4 * highest), ylim=(max(len(ranked), 6) - 0.4, -0.5), xticks=[], yticks=[])
    axes.spines[["left", "bottom"]].set_visible(False)


# ------------------------------------------------------------------------------------------ properties


@dataclass(frozen=True)
class Property:
    """Something each crystal has a number of."""

    name: str
    unit: str
    spread: Spread
    missing: int  # crystals without it
    integer: bool = False


def draw_property(axes: "Axes", what: Property) -> None:
    """Histogram and its median; what is far outside, exactly zero or missing is told in words."""
    axes.set_title(plain(sentence(label(what.name))), pad=27)
    axes.set_xlabel(plain(label(what.name, what.unit)))
    spread, total = what.spread, len(what.spread)
    if not total:
        _nothing(axes, "no values")
        return
    edges, counts, heap, outside = _binned(spread, what.integer)
    axes.stairs(counts, edges, fill=True, color=BAR_LIGHT)
    axes.stairs(counts, edges, color=BAR, lw=0.9)
    if edges[0] <= spread.median <= edges[-1]:
        axes.axvline(spread.median, color=INK, lw=1.1, ls=(0, (4, 2)))
    notes = [
        f"{percent(heap, total)} are 0, not drawn" if heap else "",
        f"{short(outside)} outside" if outside else "",
        f"{short(what.missing)} missing" if what.missing else "",
    ]
    words = f"median {four_digits(spread.median)}\n{' · '.join(filter(None, notes))}"
    _note(axes, words)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(counts.max(), 1) * 1.08)
    axes.xaxis.set_major_locator(_few_integers() if what.integer else _few_numbers())
    _count_axis(axes)


def _binned(spread: Spread, integer: bool, bins: int = 44) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Edges, counts, and how many are not drawn: a heap of exact zeros, and those far outside."""
    low, high = spread.low, spread.high
    near, far = spread.quantile(0.002), spread.quantile(0.998)
    if near < far and high - low > 1.6 * (far - near):
        low, high = max(low, near - 0.04 * (far - near)), min(high, far + 0.04 * (far - near))
        low = 0.0 if spread.low >= 0 and low < 0.1 * high else low
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    if integer:  # equal steps that hold equally many integers
        step = max(1.0, np.ceil((high - low + 1) / 60))
        edges = np.arange(np.floor(low), high + step, step) - 0.5
        edges = np.append(edges, edges[-1] + step) if edges[-1] < high else edges
    counts = spread.histogram(edges)
    outside, heap = len(spread) - int(counts.sum()), 0
    if 0.2 * len(spread) < spread.zeros < len(spread) and low <= 0 <= high:
        heap = spread.zeros
        counts[min(int(np.searchsorted(edges, 0.0, side="right")) - 1, len(counts) - 1)] -= heap
    return edges, counts, heap, outside


def properties(summary: Summary) -> list[Property]:
    """All that is drawn as a histogram, in order of interest: density, volume, energies, then by name."""
    density, volume = summary.density, summary.volume_per_atom
    found = [
        Property("density", "g/cm³", density, summary.crystals - len(density)),
        Property("volume_per_atom", "Å³", volume, summary.crystals - len(volume)),
    ]
    drawn = [
        name
        for name, count in summary.columns.items()
        if count.spec.kind in ("float", "int") and name not in (SPACE_GROUP, "density", "volume_per_atom")
    ]
    drawn.sort(key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    for name in drawn:
        count = summary.columns[name]
        found.append(Property(name, count.spec.unit, count.spread, summary.missing(name), count.spec.kind == "int"))
    return found


# ----------------------------------------------------------------------------------------- small parts


def _few_integers(most: int = 4, steps: list[int] | None = None) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, steps=steps)


def _decades() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(numticks=7)


def _few_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)


def _count_axis(axes: "Axes") -> None:
    axes.set_ylabel("crystals")
    axes.yaxis.set_major_locator(_few_integers())
    axes.yaxis.set_major_formatter(lambda value, _: short(round(value)))


def _note(axes: "Axes", words: str) -> None:
    """Up to two quiet lines between title and frame."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    axes.annotate(words, (0, 1), (0, 24), size=7.5, color=QUIET, **place)


def _nothing(axes: "Axes", words: str) -> None:
    """An empty frame that says why it is empty."""
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
    axes.spines[:].set_visible(False)
    axes.set_facecolor(PALE)
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=QUIET)
