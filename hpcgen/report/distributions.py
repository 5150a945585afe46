"""The figures that hold runs against each other and against a reference, and the tables behind them."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hpcgen.crystal.composition import SYMBOLS
from hpcgen.report.compare import Histogram, Series, draw_categories, draw_histogram, legend_rows
from hpcgen.report.figures import draw_elements, hermann_mauguin
from hpcgen.report.gather import BOND, CELL, Gathered, pair_name
from hpcgen.report.pictures import SMALL, WIDE, Draw, Picture, elements_in_words, picture
from hpcgen.report.spread import Spread
from hpcgen.report.style import label
from hpcgen.report.summary import CRYSTAL_SYSTEMS, NUM_ELEMENTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROUPS = 26  # space groups drawn
_PAIRS = 6  # of elements, whose bond lengths are drawn
_COLUMNS = 12  # drawn; the table has all
_SIGNS = {"alpha": "α", "beta": "β", "gamma": "γ"}
Row = tuple[str | float | int, ...]


def small(name: str, alt: str, draw: Draw, rows: int = 1, left: float = 0.14, bottom: float = 0.46) -> Picture:
    """A figure that fits a phone. rows: of the legend above it; left: share of the width; bottom: inches."""
    wide, high = SMALL[0], SMALL[1] + 0.155 * (rows - 1)
    above = 0.26 + 0.155 * rows  # inches
    return picture(
        alt, (wide, high), (left, bottom / high, 0.965 - left, (high - bottom - above) / high), draw, name=name
    )


def histograms(runs: Sequence[Gathered], reference: Gathered | None) -> list[Histogram]:
    """Sizes, density, volume, the Niggli cell, bonds and the columns of the runs."""
    every = [*runs, *([reference] if reference else [])]

    def made(key: str, title: str, unit: str, spreads: Sequence[Spread | None], integer: bool = False) -> Histogram:
        series = [
            Series(each.name, -1 if each is reference else at, spread)
            for at, (each, spread) in enumerate(zip(every, spreads, strict=True))
            if spread is not None
        ]
        return Histogram(key, title, unit, tuple(sorted(series, key=lambda one: one.of)), integer)

    found = [
        made("num_atoms", "atoms in the cell", "atoms", [_counted(g.all.of_size) for g in every], True),
        made("num_elements", "elements in a crystal", "elements", [_counted(g.all.of_variety) for g in every], True),
        made("density", "density", "density (g/cm³)", [g.all.density for g in every]),
        made("volume_per_atom", "volume per atom", "Å³", [g.all.volume_per_atom for g in every]),
    ]
    for name in CELL:
        what, unit = ("length", "Å") if len(name) == 1 else ("angle", "°")
        title = f"{what} {_SIGNS.get(name, name)} of the Niggli cell"
        found.append(made(f"cell_{name}", title, unit, [g.close.cell[name] for g in every]))
    found += [
        made("bond_reach", "bonds over the sum of covalent radii", f"length / (r + r'), below {BOND:g}",
             [_spread(g.close.reach) for g in every]),
        *(
            made(f"bond_{pair_name(pair).replace('–', '-')}", f"bonds {pair_name(pair)}", "Å",
                 [_spread(g.close.bonds[g.close.pair == pair]) for g in every])
            for pair in _frequent_pairs(runs)
        ),
    ]  # fmt: skip
    for name, unit in _columns_of(runs):
        spreads = [_column(each, name, unit) for each in every]
        whole = all(g.all.columns[name].spec.kind == "int" for g in runs if name in g.all.columns)
        found.append(made(f"column_{name}", label(name), unit or label(name), spreads, whole))
    return found


def _counted(counts: np.ndarray) -> Spread:
    """Small integers, of which it is known how often each is there. (K,) -> Spread."""
    return Spread.of_counts(np.arange(len(counts)), counts)


def _spread(values: np.ndarray) -> Spread:
    spread = Spread()
    spread.add(values)
    return spread


def _frequent_pairs(runs: Sequence[Gathered]) -> list[int]:
    """Pairs of elements with most bonds in the runs."""
    pairs, counts = np.unique(np.concatenate([each.close.pair for each in runs]), return_counts=True)
    return [int(pair) for pair in pairs[np.argsort(-counts, kind="stable")][:_PAIRS]]


def _columns_of(runs: Sequence[Gathered]) -> list[tuple[str, str]]:
    """Numbers that the runs hold, with their units: energies first."""
    names = {
        (name, count.spec.unit): None for each in runs for name, count in each.all.columns.items() if len(count.spread)
    }
    first = ("e_above_hull", "energy", "formation_energy_per_atom")
    order = sorted(names, key=lambda one: (first.index(one[0]) if one[0] in first else len(first), one[0]))
    return order[:_COLUMNS]


def _column(of: Gathered, name: str, unit: str) -> Spread | None:
    """The column of one store; None where it has none, or in another unit."""
    count = of.all.columns.get(name)
    return count.spread if count is not None and count.spec.unit == unit and len(count.spread) else None


def lacking(runs: Sequence[Gathered], reference: Gathered) -> list[str]:
    """Columns of the runs that the reference cannot be held against."""
    return [name for name, unit in _columns_of(runs) if _column(reference, name, unit) is None]


def histogram_pictures(all_histograms: Sequence[Histogram]) -> list[Picture]:
    shown = []
    for what in all_histograms:
        medians = [f"{s.name} {s.spread.median:.4g}" for s in what.series if s.spread is not None and len(s.spread)]
        words = f"Histogram of {what.title} ({what.unit}); medians: {', '.join(medians) or 'no values'}"
        draw = partial(draw_histogram, what=what)
        shown.append(small(what.key, words, draw, legend_rows(len(what.series))))
    return shown


# ---- elements and space groups ---------------------------------------------------------------------------------------


def element_shares(of: Gathered) -> np.ndarray:
    """Per cent of crystals that hold each element. (119,)."""
    return 100 * of.all.with_element / max(of.all.crystals, 1)


def group_shares(of: Gathered) -> np.ndarray:
    """Per cent of the sample in each space group; 0: none found. (231,)."""
    return 100 * of.close.in_space_group / max(of.close.count, 1)


def wide_pictures(runs: Sequence[Gathered], reference: Gathered | None) -> list[Picture]:
    """Elements of each run as a periodic table; elements and space groups of all in one figure each."""
    shown = [
        picture(
            f"{each.name}: {elements_in_words(each.all)}", (WIDE, 4.8), (0.005, 0.0, 0.99, 0.94),
            partial(_draw_table, of=each), wide=True, name=f"periodic_table_{at + 1}",
        )
        for at, each in enumerate(runs)
    ]  # fmt: skip
    every = [*runs, *([reference] if reference else [])]
    shares = np.stack([element_shares(each) for each in every])
    numbers = [z for z in range(1, NUM_ELEMENTS + 1) if shares[:, z].any()]
    names, values = [SYMBOLS[z] for z in numbers], shares[:, numbers]
    shown.append(_categories("elements", "Crystals that hold each element", names, values, every, reference))
    shares = np.stack([group_shares(each) for each in every])
    most = [int(n) for n in np.argsort(-shares.max(0), kind="stable")[:_GROUPS] if shares[:, n].any()]
    names = [f"{hermann_mauguin(n)} ({n})" if n else "none found" for n in most]
    title = f"Space groups of the samples, the {len(most)} most frequent"
    shown.append(_categories("space_groups", title, names, shares[:, most], every, reference, upright=True))
    return shown


def systems_picture(runs: Sequence[Gathered], reference: Gathered | None) -> Picture:
    """Crystal systems of the samples."""
    every = [*runs, *([reference] if reference else [])]
    spans = CRYSTAL_SYSTEMS.values()
    values = [[group_shares(each)[first : last + 1].sum() for first, last in spans] for each in every]
    series = _series(np.array(values), every, reference)

    def draw(axes: "Axes") -> None:
        draw_categories(axes, "Crystal systems of the samples", list(CRYSTAL_SYSTEMS), series)
        for tick in axes.get_xticklabels():
            tick.set(rotation=28, ha="right", rotation_mode="anchor")

    return small("crystal_systems", "Shares of the seven crystal systems", draw, legend_rows(len(every)), bottom=0.62)


def _series(values: np.ndarray, every: Sequence[Gathered], reference: Gathered | None) -> list[Series]:
    """values (S, K), a row for each store; the reference comes first, below the others."""
    made = [Series(each.name, -1 if each is reference else at, shares=values[at]) for at, each in enumerate(every)]
    return sorted(made, key=lambda one: one.of)


def _categories(
    name: str,
    title: str,
    names: Sequence[str],
    values: np.ndarray,
    every: Sequence[Gathered],
    reference: Gathered | None,
    *,
    upright: bool = False,
) -> Picture:
    series = _series(values, every, reference)

    draw = partial(draw_categories, title=title, names=names, series=series, upright=upright)
    high = 3.0 + 0.155 * legend_rows(len(every))
    below = 0.95 if upright else 0.42
    box = (0.065, below / high, 0.925, (high - below - 0.27 - 0.155 * legend_rows(len(every))) / high)
    return picture(f"{title}, per cent", (WIDE, high), box, draw, wide=True, name=name)


def _draw_table(axes: "Axes", of: Gathered) -> None:
    draw_elements(axes, of.all)
    axes.set_title(f"Crystals of {of.name} that hold each element".replace("$", r"\$"))


# ---- tables ----------------------------------------------------------------------------------------------------------


def distribution_rows(all_histograms: Sequence[Histogram]) -> list[Row]:
    """quantity, unit, of, bin from, bin to, per cent."""
    rows: list[Row] = []
    for what in all_histograms:
        edges = what.edges
        for series in what.series:
            shares = what.shares(series, edges)
            bins = zip(edges.tolist(), edges[1:].tolist(), shares.tolist(), strict=False)
            rows += [(what.key, what.unit, series.name, _six(a), _six(b), _six(share)) for a, b, share in bins]
    return rows


def quantile_rows(all_histograms: Sequence[Histogram]) -> list[Row]:
    """quantity, unit, of, values, minimum, 5 %, median, 95 %, maximum."""
    return [
        (what.title, what.unit, series.name, len(s), *(_six(v) for v in
         (s.low, s.quantile(0.05), s.median, s.quantile(0.95), s.high)))
        for what in all_histograms
        for series in what.series
        if (s := series.spread) is not None and len(s)
    ]  # fmt: skip


def element_rows(every: Sequence[Gathered]) -> list[Row]:
    """element, then of each store its crystals with it."""
    counts = np.stack([each.all.with_element for each in every])
    return [(SYMBOLS[z], *counts[:, z].tolist()) for z in range(1, NUM_ELEMENTS + 1) if counts[:, z].any()]


def group_rows(every: Sequence[Gathered]) -> list[Row]:
    """space group, then of each sample its crystals in it."""
    counts = np.stack([each.close.in_space_group for each in every])
    return [(n or "none found", *counts[:, n].tolist()) for n in range(231) if counts[:, n].any()]


def _six(value: float) -> float:
    return float(f"{value:.6g}")
