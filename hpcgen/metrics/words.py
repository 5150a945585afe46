"""Figures in words: numbers, shares and means with their intervals, tables."""

from collections.abc import Mapping, Sequence
from typing import Any


def percent(share: float) -> str:
    """52.1 %"""
    return f"{100 * share:.1f} %"


def share_told(found: Mapping[str, Any]) -> str:
    """52.1 % [49.0, 55.2]; no brackets where nothing could be drawn."""
    ends = found.get("interval")
    return percent(found["share"]) + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")


def mean_told(found: Mapping[str, Any], name: str = "mean", digits: int = 4) -> str:
    """0.1194 [0.1120, 0.1271], of `name` and its interval; a dash where there is no value."""
    value, ends = found.get(name), found.get("interval" if name == "mean" else f"{name}_interval")
    return number(value, digits) + (f" [{number(ends[0], digits)}, {number(ends[1], digits)}]" if ends else "")


def number(value: float | None, digits: int = 4) -> str:
    """0.1194, or a dash."""
    return f"{value:.{digits}f}" if value is not None else "–"


def intervals_told(intervals: Mapping[str, Any]) -> str:
    """What stands in brackets."""
    level, resamples, seed = (intervals[name] for name in ("level", "resamples", "seed"))
    return f"in brackets {100 * level:g} % intervals: bootstrap, {resamples:,} resamples, seed {seed}"


def aligned(title: str, names: Sequence[str], heads: Sequence[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """A table: title and heads, then a line for each name with its cell of each column."""
    width = max(map(len, [title, *names])) + 2
    widths = [max(map(len, [head, *column])) for head, column in zip(heads, columns, strict=True)]
    table = [
        (title, heads),
        *((f"  {name}", cells) for name, cells in zip(names, zip(*columns, strict=True), strict=True)),
    ]
    return [f"{name:<{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
            for name, cells in table]  # fmt: skip
