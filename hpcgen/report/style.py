"""How the report looks and speaks: its colours, its letters, and numbers in words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hpcgen.errors import SiteError

INK, QUIET, RULE, PALE = "#1f2b36", "#5d6873", "#c9d0d6", "#eef1f3"
BAR, BAR_LIGHT, REFUSED = "#46678a", "#93aac0", "#dcc8bd"
RAMP = ("#e6ebef", "#9db3c7", "#4f7397", "#172f4a")  # lightness falls evenly: it survives a grey printer
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "svg.fonttype": "path",
    "svg.hashsalt": "hpcgen",  # the same summary gives the same bytes
}
_LABELS = {  # axis titles of well-known columns; others are their name with spaces
    "e_above_hull": "energy above hull",
    "formation_energy_per_atom": "formation energy",
    "energy_per_atom": "energy",
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in the house's style. Raises SiteError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as fault:
        raise SiteError(
            "figures need matplotlib, which is not installed; in the checkout of hpcgen: pip install -e '.[report]'"
        ) from fault
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        yield


def short(count: int) -> str:
    """A count in at most five characters: 9999, 12.3k, 123k, 1.23M."""
    if count < 10_000:
        return str(count)
    for size, letter in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if count < 999.5 * size:
            return f"{count / size:.3g}{letter}"
    return f"{count:.2g}"


def percent(part: int, whole: int) -> str:
    """A share in words that hides neither the rare nor the nearly full: '34 %', '0.4 %', '<0.1 %'."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "<0.1 %"
    if 99.5 <= share < 100:
        return ">99 %"
    return f"{share:.1f} %" if 0 < share < 9.95 else f"{share:.0f} %"


def label(name: str, unit: str = "") -> str:
    """Axis title of a column: 'band gap (eV)'."""
    words = _LABELS.get(name, name.replace("_", " "))
    return f"{words} ({unit})" if unit else words


def four_digits(value: float) -> str:
    """A measured value in four digits, '−0.6618'; integers in all of them, '20051'."""
    whole = abs(value) < 1e7 and value == int(value)
    return (f"{value:.0f}" if whole else f"{value:.4g}").replace("-", "−")


def sentence(words: str) -> str:
    """With a capital in front, the rest as it is."""
    return words[:1].upper() + words[1:]


def plain(text: str) -> str:
    """Text from a file as matplotlib shall show it: one line, no mathematics."""
    return " ".join(text.split()).replace("$", r"\$")
