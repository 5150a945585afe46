"""Several runs and a reference in one figure, told apart by dashes, marks and hatches as well as by colour."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcgen.report.spread import Spread
from hpcgen.report.style import INK, PALE, QUIET, REFUSED, RULE, plain, sentence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RUNS = 6
COLOURS = (INK, "#b3541e", "#2b6f97", "#6b4a8b", "#3d7a3a", "#8a6d00")
_DASHES: tuple[Any, ...] = (
    "-", (0, (5, 2)), (0, (1.2, 1.4)), (0, (7, 1.6, 1.2, 1.6)), (0, (10, 3)), (0, (4, 1.2, 1.2, 1.2, 1.2, 1.2)),
)  # fmt: skip
_MARKS = ("o", "s", "^", "D", "v", "P")
_HATCHES = ("", "////", "....", "xxxx", "----", "++++")
_BINS = 16, 40  # least and most of a histogram: few where there are few values
ANGLES = (10.0, 90.0)  # of diffraction patterns: 2θ in degrees
_LETTERS = 25  # of a name in a legend


@dataclass(frozen=True)
class Series:
    """Values of one store for one figure: a Spread, or shares of crystals by category."""

    name: str
    of: int  # place among the runs, which decides its dashes; -1: the reference
    spread: Spread | None = None
    shares: np.ndarray | None = None  # (K,)


@dataclass(frozen=True)
class Histogram:
    """One figure of several spreads, and the table behind it."""

    key: str  # name of its files
    title: str
    unit: str
    series: tuple[Series, ...]
    integer: bool = False
    note: str = ""

    @property
    def edges(self) -> np.ndarray:
        """Bins that hold all but the outermost 0.2 % on each side of every series; of integers one
        or more each, all of them where they lie within 60."""
        spreads = [each.spread for each in self.series if each.spread is not None and len(each.spread)]
        if not spreads:
            return np.array([0.0, 1.0])
        low = min(max(spread.low, spread.quantile(0.002)) for spread in spreads)
        high = max(min(spread.high, spread.quantile(0.998)) for spread in spreads)
        if self.integer:
            ends = min(spread.low for spread in spreads), max(spread.high for spread in spreads)
            low, high = map(round, ends if ends[1] - ends[0] <= 60 else (low, high))
            return np.arange(low, high + 2 * (step := -(-(high - low + 1) // 60)), step) - 0.5
        if low >= high:
            low, high = low - 0.5, high + 0.5
        bins = int(min(max(2.6 * min(map(len, spreads)) ** (1 / 3), _BINS[0]), _BINS[1]))
        return np.linspace(low, high, bins + 1)

    def shares(self, series: Series, edges: np.ndarray) -> np.ndarray:
        """Per cent of all its values in each bin; those outside count too. (K,)."""
        if series.spread is None or not len(series.spread):
            return np.zeros(len(edges) - 1)
        return 100 * series.spread.histogram(edges) / len(series.spread)


def short_name(name: str) -> str:
    """A run's name as a legend can hold it."""
    return plain(name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…")


def legend_rows(count: int) -> int:
    """Rows that a legend of so many series takes above a figure."""
    return -(-count // 2)


def draw_histogram(axes: "Axes", what: Histogram) -> None:
    """Shares of crystals as steps: the reference filled, each run a line of its own dashes."""
    from matplotlib.ticker import MaxNLocator

    edges = what.edges
    for series in what.series:
        values = what.shares(series, edges)
        label = short_name(series.name)
        if series.of < 0:
            axes.stairs(values, edges, fill=True, color=RULE, label=label)
        else:
            dash = _DASHES[series.of % len(_DASHES)]
            axes.stairs(values, edges, color=COLOURS[series.of % len(COLOURS)], ls=dash, lw=1.3, label=label)
    axes.set(xlim=(edges[0], edges[-1]), xlabel=plain(what.unit), ylabel="%", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=what.integer))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    top(axes, what.title)


def draw_categories(
    axes: "Axes", title: str, names: Sequence[str], series: Sequence[Series], *, upright: bool = False
) -> None:
    """Shares in per cent by category: the reference as bars, each run as marks on thin stems, none where it has none.

    upright: long names, written upwards, and a square-root scale, so that rare ones are seen beside a heap.
    """
    places = np.arange(len(names))
    for each in series:
        values = np.zeros(len(names)) if each.shares is None else each.shares
        if each.of < 0:
            axes.bar(places, values, width=0.8, color=RULE, label=short_name(each.name))
            continue
        runs = sum(1 for other in series if other.of >= 0)
        aside = 0.0 if runs == 1 else 0.44 * (each.of / (runs - 1) - 0.5)
        colour = COLOURS[each.of % len(COLOURS)]
        there = values > 0
        at, values = (places + aside)[there], values[there]
        axes.vlines(at, 0, values, color=colour, lw=0.7, ls=_DASHES[each.of % len(_DASHES)])
        face = colour if each.of % 2 == 0 else "white"
        look: dict[str, Any] = {"ls": "", "ms": 3.6, "mec": colour, "mfc": face, "mew": 0.9}
        axes.plot(at, values, _MARKS[each.of % len(_MARKS)], label=short_name(each.name), **look)
    stagger = len(names) > 30 and not upright
    labels = [f"\n{name}" if stagger and at % 2 else name for at, name in enumerate(names)]
    axes.set_xticks(places, labels, rotation=90 if upright else 0, size=5.8 if len(names) > 60 else 7)
    axes.set(xlim=(-0.8, max(len(names), 4) - 0.2), ylabel="% of crystals", ylim=(0, None))
    if upright:
        axes.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))
        axes.set(ylabel="% (square-root scale)", ylim=(0, None))
    top(axes, title)


def draw_bars(axes: "Axes", title: str, names: Sequence[str], series: Sequence[Series]) -> None:
    """Shares in per cent as horizontal bars with their number, hatched differently; first category on top."""
    width = 0.84 / max(len(series), 1)
    for at, each in enumerate(series):
        values = np.zeros(len(names)) if each.shares is None else each.shares
        places = np.arange(len(names)) - 0.42 + (at + 0.5) * width
        colour = {-1: RULE, -2: REFUSED}.get(each.of) or COLOURS[each.of % len(COLOURS)]
        hatch = "" if each.of < 0 else _HATCHES[each.of % len(_HATCHES)]
        face = colour if not hatch else "white"
        there = ~np.isnan(values)
        if each.of == -2:  # not to be told from the reference by shade alone
            face, hatch = "white", "\\\\\\\\"
        bars = axes.barh(places[there], values[there], height=0.86 * width, facecolor=face, edgecolor=colour,
                         hatch=hatch, lw=0.7, label=short_name(each.name))  # fmt: skip
        axes.bar_label(bars, [f"{value:.1f}" for value in values[there]], padding=2, fontsize=6.5)
    axes.set_yticks(np.arange(len(names)), names)
    axes.set(xlim=(0, 108), ylim=(len(names) - 0.5, -0.5), xlabel="%")
    top(axes, title)


def draw_curves(
    axes: "Axes", title: str, train: Sequence[tuple[float, float]], validation: Sequence[tuple[float, float]]
) -> None:
    """One quantity of a training against its steps; logarithmic where it spans more than a factor of 30."""
    from matplotlib.ticker import MaxNLocator

    if train:
        axes.plot(*zip(*train, strict=True), color=QUIET, lw=0.9, label="training")
    if validation:
        look: dict[str, Any] = {"color": INK, "lw": 1.2, "ls": (0, (4, 2)), "marker": "o", "ms": 2.6}
        axes.plot(*zip(*validation, strict=True), label="validation", **look)
    values = [value for _, value in (*train, *validation)]
    if values and min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    top(axes, title)


def draw_pattern(
    axes: "Axes", title: str, angles: Sequence[float], heights: Sequence[float], hkl: Sequence[tuple[int, ...]]
) -> None:
    """A powder pattern as sticks, the five strongest named by the indices of their planes."""
    from matplotlib.ticker import MaxNLocator

    axes.vlines(angles, 0, heights, color=INK, lw=1.0)
    taken: list[float] = []
    for at in sorted(range(len(angles)), key=lambda at: -heights[at]):
        if len(taken) < 5 and all(abs(angles[at] - other) > 5 for other in taken):
            name = "".join(rf"\bar{{{-h}}}" if h < 0 else str(h) for h in hkl[at])
            axes.text(angles[at], heights[at] + 2, f"${name}$", ha="center", va="bottom", size=6.5, color=QUIET)
            taken.append(angles[at])
    axes.set(xlim=ANGLES, xlabel="2θ (°)", ylabel="intensity", ylim=(0, 118), yticks=[0, 50, 100])
    axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_title(plain(title), pad=6)


def top(axes: "Axes", title: str) -> None:
    """Title above, and between it and the frame a legend where there is something to tell apart."""
    _, labels = axes.get_legend_handles_labels()
    rows = legend_rows(len(labels))
    axes.set_title(sentence(plain(title)), pad=6 + 11 * rows)
    if labels:
        look: dict[str, Any] = {"frameon": False, "fontsize": 7, "handlelength": 2.6, "labelspacing": 0.25}
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0, borderpad=0.2, ncols=2, **look)
    axes.set_facecolor("white" if axes.has_data() else PALE)
