"""The summary of a store: counted right, the same in any order, drawn, and safe to open."""

import builtins
import csv
import gzip
import io
import re
import time
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from hpcgen.crystal.crystals import Crystals
from hpcgen.errors import InputError, SiteError
from hpcgen.report.figures import draw_space_groups, hermann_mauguin, place
from hpcgen.report.page import read_rejects, write_summary
from hpcgen.report.parts import text
from hpcgen.report.pictures import pictures, summary_png
from hpcgen.report.spread import Spread
from hpcgen.report.style import RAMP, four_digits, percent, short
from hpcgen.report.summary import CRYSTAL_SYSTEMS, ColumnCount, Summary
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.rows import Column, Rows
from hpcgen.store.write import write_store

pytest.importorskip("matplotlib")
DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "mp20_bt.csv.gz"
EVIL = "<script>alert(1)</script>&\"'"


def crystal(numbers: list[int], edge: float) -> Crystals:
    """A cubic cell with atoms somewhere in it."""
    sites = torch.arange(3 * len(numbers), dtype=torch.float64).reshape(-1, 3) / (3 * len(numbers))
    lattice = edge * torch.eye(3, dtype=torch.float64)[None]
    return Crystals(sites, lattice, torch.tensor(numbers), torch.tensor([len(numbers)]))


def column(kind: str, values: list, unit: str = "") -> Column:
    blank = {"float": np.nan, "int": 0, "bool": False, "str": ""}[kind]
    dtype = {"float": np.float64, "int": np.int64, "bool": np.bool_, "str": object}[kind]
    missing = np.array([value is None for value in values])
    return Column(ColumnSpec(kind, unit), np.array([blank if v is None else v for v in values], dtype), missing)


def some_rows() -> Rows:
    """NaCl twice (two settings), iron, diamond, and a ternary without a space group."""
    crystals = Crystals.cat(
        [
            crystal([11] * 4 + [17] * 4, 5.64),
            crystal([11, 17], 3.55),
            crystal([26, 26], 2.87),
            crystal([6] * 8, 3.567),
            crystal([3, 15, 16, 16], 4.5),
        ]
    )
    columns = {
        "space_group": column("int", [225, 225, 229, 227, None]),
        "band_gap": column("float", [5.0, 5.1, 0.0, 4.1, None], "eV"),
        "stable": column("bool", [True, True, True, False, None]),
        "origin": column("str", ["a", EVIL, "c", None, "e"]),
    }
    return Rows(crystals, ["NaCl-8", "NaCl-2", EVIL, "C", "LiPS"], columns)


def part(rows: Rows, start: int, stop: int) -> Rows:
    columns = {
        name: Column(each.spec, each.values[start:stop], each.missing[start:stop])
        for name, each in rows.columns.items()
    }
    return Rows(rows.crystals[start:stop], rows.ids[start:stop], columns)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with hostile names in it and a reject table beside it."""
    rows = some_rows()
    specs = {name: each.spec for name, each in rows.columns.items()}
    head = Head(f"source {EVIL}", {"note": EVIL, "deep": {"cutoff": 6.0}}, specs)
    write_store(tmp_path / "S&<i>", head, [("train", part(rows, 0, 3)), ("val", part(rows, 3, 5))])
    with (tmp_path / "S&<i>" / "rejects.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["row", "id", "code", "message"], [1, EVIL, "too-close", f"x\x07 $\\frac${EVIL}"]])
        table.writerows([[2, "b", "too-close", "y"], [3, "c", f"$bad {EVIL}", "z\nz"]])
    return tmp_path / "S&<i>"


@pytest.fixture(scope="module")
def real() -> tuple[Rows, list]:
    """Real crystals read by gemmi, and the same as pymatgen structures with their table rows."""
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    import gemmi
    from pymatgen.core import Structure

    with gzip.open(DATA, "rt") as file:
        told = [row for at, row in enumerate(csv.DictReader(file)) if at % 119 == 0]
    batch = []
    for row in told:
        cell = gemmi.make_small_structure_from_block(gemmi.cif.read_string(row["cif"]).sole_block())
        sites = cell.get_all_unit_cell_sites()
        frac = torch.tensor([site.fract.tolist() for site in sites], dtype=torch.float64) % 1
        lattice = torch.tensor(np.array(cell.cell.orth.mat.tolist()).T)[None]
        numbers = torch.tensor([site.element.atomic_number for site in sites])
        batch.append(Crystals(frac, lattice, numbers, torch.tensor([len(sites)])))
    columns = {
        "space_group": column("int", [int(row["spacegroup.number"]) for row in told]),
        "e_above_hull": column("float", [float(row["e_above_hull"]) for row in told], "eV/atom"),
    }
    rows = Rows(Crystals.cat(batch), [row["material_id"] for row in told], columns)
    return rows, [(Structure.from_str(row["cif"], fmt="cif"), row) for row in told]


# ------------------------------------------------------------------------------------------ counting


def test_counts_by_hand() -> None:
    summary = Summary.of([some_rows()], [("too-close", 2), ("too-close", 1)])
    assert (summary.crystals, summary.atoms) == (5, 24)
    holds = {number: int(count) for number, count in enumerate(summary.with_element) if count}
    assert holds == {3: 1, 6: 1, 11: 2, 15: 1, 16: 1, 17: 2, 26: 1}
    assert {n: int(c) for n, c in enumerate(summary.of_size) if c} == {2: 2, 4: 1, 8: 2}
    assert summary.of_variety.tolist() == [0, 2, 2, 1]
    assert {n: int(c) for n, c in enumerate(summary.in_space_group) if c} == {0: 1, 225: 2, 227: 1, 229: 1}
    assert summary.in_crystal_system["cubic"] == 4
    assert summary.density.high == pytest.approx(7.85, abs=0.02)  # iron
    assert summary.volume_per_atom.low == pytest.approx(3.567**3 / 8)
    assert [summary.missing(name) for name in ("space_group", "band_gap", "stable", "origin")] == [1] * 4
    assert summary.columns["band_gap"].spread.zeros == 1
    assert summary.columns["stable"].true == 3
    assert summary.rejects == {"too-close": 3}


def test_counts_equal_a_slow_count_with_pymatgen(real: tuple[Rows, list]) -> None:
    rows, slow = real
    summary = Summary.of([rows])
    elements = Counter(e.Z for structure, _ in slow for e in structure.composition.elements)
    assert {number: int(count) for number, count in enumerate(summary.with_element) if count} == elements
    sizes = Counter(len(structure) for structure, _ in slow)
    assert {number: int(count) for number, count in enumerate(summary.of_size) if count} == sizes
    varieties = Counter(len(structure.composition) for structure, _ in slow)
    assert {number: int(count) for number, count in enumerate(summary.of_variety) if count} == varieties
    groups = Counter(int(row["spacegroup.number"]) for _, row in slow)
    assert {number: int(count) for number, count in enumerate(summary.in_space_group) if count} == groups
    density = np.array([structure.density for structure, _ in slow])
    assert summary.density.low == pytest.approx(density.min(), rel=1e-4)  # masses of another year
    assert summary.density.median == pytest.approx(np.median(density), rel=1e-4)
    hull = np.array([float(row["e_above_hull"]) for _, row in slow])
    assert summary.columns["e_above_hull"].spread.high == hull.max()
    assert summary.columns["e_above_hull"].spread.zeros == (hull == 0).sum()
    assert summary.columns["e_above_hull"].spread.median == pytest.approx(np.median(hull), rel=2e-5)


def test_crystal_systems_cover_230_groups_once() -> None:
    numbers = [n for first, last in CRYSTAL_SYSTEMS.values() for n in range(first, last + 1)]
    assert numbers == list(range(1, 231))


def two_ways(rows: Rows) -> Iterator[tuple[Summary, Summary]]:
    """The whole, and the sum of two parts, for every cut."""
    whole = Summary.of([rows], [("a", 3)])
    for cut in range(len(rows) + 1):
        first = Summary.of([part(rows, 0, cut)], [("a", 1)])
        yield whole, first + Summary.of([part(rows, cut, len(rows))], [("a", 2)])


def same(one: Summary, other: Summary) -> bool:
    arrays = ("with_element", "of_size", "of_variety", "in_space_group")
    plain = ("crystals", "atoms", "density", "volume_per_atom", "columns", "rejects")
    return all(np.array_equal(getattr(one, n), getattr(other, n)) for n in arrays) and all(
        getattr(one, n) == getattr(other, n) for n in plain
    )


def test_two_parts_make_the_whole() -> None:
    for whole, sum_of_parts in two_ways(some_rows()):
        assert same(whole, sum_of_parts)


def test_parts_of_a_real_set_make_the_whole(real: tuple[Rows, list]) -> None:
    assert all(same(*pair) for pair in two_ways(real[0]))


@pytest.mark.parametrize("broken", [Spread, ColumnCount, Summary])
def test_a_broken_merge_is_noticed(broken: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken, "__add__", lambda self, other: self)
    assert not all(same(*pair) for pair in two_ways(some_rows()))


def test_a_sum_leaves_its_parts_alone() -> None:
    first, second = Summary.of([part(some_rows(), 0, 2)]), Summary.of([part(some_rows(), 2, 5)])
    first + second
    assert same(first, Summary.of([part(some_rows(), 0, 2)]))
    assert same(second, Summary.of([part(some_rows(), 2, 5)]))


def test_a_column_that_changes_its_unit_is_refused() -> None:
    rows = some_rows()
    other = Rows(rows.crystals, rows.ids, {"band_gap": column("float", [1.0] * 5, "meV")})
    with pytest.raises(InputError, match="band_gap: float in meV in one block, float in eV in another"):
        Summary.of([rows, other])
    with pytest.raises(InputError, match="band_gap"):
        Summary.of([rows]) + Summary.of([other])


def test_infinite_values_and_foreign_space_groups_count_as_missing() -> None:
    rows = Rows(
        crystal([1], 2.0),
        ["H"],
        {"energy": column("float", [np.inf], "eV"), "space_group": column("int", [231])},
    )
    summary = Summary.of([rows])
    assert summary.missing("energy") == 1 and len(summary.columns["energy"].spread) == 0
    assert summary.in_space_group[0] == 1 and not summary.has_space_groups


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1e-7, 0.0), (0.3, -154.3), (1e9, 5e9)])
def test_spread_agrees_with_numpy_in_any_order(scale: float, shift: float) -> None:
    values = np.random.default_rng(0).normal(size=4001) * scale + shift
    forward, backward = Spread(), Spread()
    forward.add(values)
    for few in np.array_split(values[::-1], 7):
        backward.add(few)
    assert forward == backward and len(forward) == 4001
    assert (forward.low, forward.high) == (values.min(), values.max())
    assert forward.median == pytest.approx(np.median(values), rel=1e-5)
    assert forward.quantile(0.25) == pytest.approx(np.quantile(values, 0.25), rel=1e-2, abs=1e-2 * scale)
    edges = np.linspace(values.min(), values.max(), 21)
    counts = np.histogram(values, edges)[0]
    assert forward.histogram(edges).sum() == 4001
    assert np.abs(forward.histogram(edges) - counts).max() <= 0.05 * counts.max()


def test_spread_of_hard_values() -> None:
    spread = Spread()
    assert np.isnan(spread.median) and len(spread) == 0
    spread.add(np.array([-0.0, 0.0, np.nan, np.inf, -3.0, 3.0, 131_072.0, -1.7e308, 1.7e308]))
    assert (len(spread), spread.zeros, spread.median) == (7, 2, 0.0)
    assert {-3.0, 3.0, 131_072.0} <= set(spread.counted()[0].tolist())
    assert (np.diff(spread.counted()[0]) > 0).all()


@pytest.mark.bench
@pytest.mark.slow
def test_a_million_crystals_are_counted_in_seconds() -> None:
    rng = np.random.default_rng(0)
    sizes = torch.from_numpy(rng.integers(1, 21, 4096))
    atoms = int(sizes.sum())
    numbers = torch.from_numpy(rng.integers(1, 95, atoms))
    lattice = torch.from_numpy(rng.uniform(3, 9, (4096, 1, 1)) * np.eye(3))
    crystals = Crystals(torch.rand(atoms, 3, dtype=torch.float64), lattice, numbers, sizes)

    def blocks() -> Iterator[Rows]:
        for _ in range(25):
            energies = Column(ColumnSpec("float", "eV"), rng.normal(size=4096), np.zeros(4096, dtype=bool))
            yield Rows(crystals, [""] * 4096, {"energy": energies})

    start = time.perf_counter()
    assert Summary.of(blocks()).crystals == 102_400
    assert time.perf_counter() - start < 1


# ------------------------------------------------------------------------------------------- drawing


def test_the_periodic_table_has_a_place_for_each_element() -> None:
    places = {number: place(number) for number in range(1, 119)}
    assert len(set(places.values())) == 118
    known = {1: (1, 1), 2: (18, 1), 5: (13, 2), 11: (1, 3), 26: (8, 4), 54: (18, 5), 72: (4, 6), 118: (18, 7)}
    assert {number: places[number] for number in known} == known
    assert places[57] == (3, 8.4) and places[71] == (17, 8.4) and places[103] == (17, 9.4)


def test_colours_survive_a_grey_printer() -> None:
    from matplotlib.colors import to_rgb

    light = [float(np.dot([0.2126, 0.7152, 0.0722], to_rgb(colour))) for colour in RAMP]
    assert light == sorted(light, reverse=True) and light[0] - light[-1] > 0.7


def test_numbers_in_words() -> None:
    assert [short(n) for n in (0, 9999, 12_345, 999_499, 1_234_567)] == [
        "0",
        "9999",
        "12.3k",
        "999k",
        "1.23M",
    ]
    assert [percent(n, 10_000) for n in (0, 3, 123, 4567, 9999, 10_000)] == [
        "0 %",
        "<0.1 %",
        "1.2 %",
        "46 %",
        ">99 %",
        "100 %",
    ]
    assert [four_digits(v) for v in (-0.66184, 2005.0, 1.5e-7)] == ["−0.6618", "2005", "1.5e−07"]
    assert hermann_mauguin(225) == r"$Fm\bar{3}m$"
    assert hermann_mauguin(194) == "$P6_3/mmc$" and hermann_mauguin(12) == "$C2/m$"


def size_of(png: bytes) -> tuple[int, int]:
    from PIL import Image

    image = Image.open(io.BytesIO(png))
    image.load()
    return image.size


def odd_summaries() -> dict[str, Summary]:
    rows = some_rows()
    many = {f"feature_{at}": column("float", [1.0 * at, None, 2.0, 3.0, 4.0]) for at in range(40)}
    return {
        "full": Summary.of([rows], [(f"reason-{at}", at + 1) for at in range(12)]),
        "empty": Summary(),
        "rejects only": Summary.of([], [("x" * 60, 1)]),
        "no space groups": Summary.of([Rows(rows.crystals, rows.ids)]),
        "one crystal": Summary.of([Rows(crystal([6], 2.5), ["C"], {"space_group": column("int", [1])})]),
        "large cell": Summary.of([Rows(crystal([6, 8] * 700, 30.0), ["CO"])]),
        "many columns": Summary.of([Rows(rows.crystals, rows.ids, many)]),
        "nothing known": Summary.of([Rows(crystal([6], 2.5), ["C"], {"energy": column("float", [None])})]),
    }


@pytest.mark.parametrize("name", list(odd_summaries()))
def test_every_store_can_be_drawn(name: str) -> None:
    summary = odd_summaries()[name]
    assert size_of(summary_png(summary, f"{name} $", "_^{")) == (1800, 1400)
    shown = pictures(summary)
    assert len(shown) >= 5 and all(picture.svg.startswith(b"<?xml") for picture in shown)


def test_the_same_summary_gives_the_same_bytes() -> None:
    first, second = (Summary.of([some_rows()], [("a", 1)]) for _ in range(2))
    assert summary_png(first, "t", "s") == summary_png(second, "t", "s")
    assert pictures(first) == pictures(second)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SiteError, match=r"in the checkout of hpcgen: pip install -e '\.\[report\]'"):
        summary_png(Summary(), "", "")


# ---------------------------------------------------------------------------------------------- page


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    assert not reader.open
    return reader


def test_the_page_tells_all_and_runs_nothing(store: Path, tmp_path: Path) -> None:
    write_summary(store, tmp_path / "out" / "s.png", tmp_path / "out" / "s.html")
    assert size_of((tmp_path / "out" / "s.png").read_bytes()) == (1800, 1400)
    reader = read(tmp_path / "out" / "s.html")
    assert reader.tags["script"] == 0 and reader.tags["i"] == 0 and reader.tags["h1"] == 1
    for words in (
        "S&<i>",
        f"source {EVIL}",
        f"$bad {EVIL}",
        "deep.cutoff",
        "band_gap",
        "too-close",
        "x\ufffd $",
    ):
        assert words in reader.words, words
    assert reader.links and all(link.startswith("data:image/svg+xml;base64,") for link in reader.links)
    source = (tmp_path / "out" / "s.html").read_text()
    assert not re.search(r"url\(|@import|<link|https?://", source)


def test_escaping_is_able_to_fail(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcgen.report.page.text", str)
    write_summary(store, None, tmp_path / "s.html")
    assert "<script>" in (tmp_path / "s.html").read_text()
    assert "<" not in text(EVIL) and '"' not in text(EVIL) and "'" not in text(EVIL)


def test_only_what_is_asked_for_is_written(store: Path, tmp_path: Path) -> None:
    write_summary(store, tmp_path / "a" / "s.png", None)
    write_summary(store, None, tmp_path / "b" / "s.html")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["s.png"]
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["s.html"]


def test_an_empty_store_has_a_page(tmp_path: Path) -> None:
    write_store(tmp_path / "store", Head("nothing"), [])
    write_summary(tmp_path / "store", tmp_path / "s.png", tmp_path / "s.html")
    assert "An empty store" in read(tmp_path / "s.html").words


def test_a_store_without_space_groups_says_so(tmp_path: Path) -> None:
    rows = some_rows()
    write_store(tmp_path / "store", Head("plain"), [("all", Rows(rows.crystals, rows.ids))])
    write_summary(tmp_path / "store", tmp_path / "s.png", tmp_path / "s.html")
    words = read(tmp_path / "s.html").words
    assert "not known" in words and "The store has no columns." in words


def test_no_store_no_page(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        write_summary(tmp_path / "nowhere", tmp_path / "s.png", None)
    assert not list(tmp_path.iterdir())


def test_a_foreign_reject_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rejects.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column code, id, message"):
        read_rejects(tmp_path / "rejects.csv")
    assert read_rejects(tmp_path / "absent.csv") == (Counter(), {})


def test_names_of_space_groups_end_within_the_frame() -> None:
    from matplotlib.figure import Figure

    for most in (3, 40, 120, 3000, 10**6):
        summary = Summary()
        for number in (2, 14, 62, 194, 227):  # P6₃/mmc has the longest of the frequent names
            summary.in_space_group[number] = most
        figure = Figure(figsize=(12, 1.12), dpi=150)
        axes = figure.add_axes((0.065, 0, 0.91, 1))
        draw_space_groups(axes, summary)
        frame = axes.get_window_extent()
        names = [text for text in axes.texts if text.get_rotation() == 90]
        assert len(names) == 5
        assert all(name.get_window_extent().y1 <= frame.y1 for name in names)
        assert max(name.get_window_extent().y1 for name in names) > 0.9 * frame.y1  # and the room is used


def test_settings_are_told_with_their_meaning_and_short_hashes(tmp_path: Path) -> None:
    made = {"input": {"files": ["0123456789abcdef" * 4]}, "settings": {"cutoff": 6.0}}
    write_store(tmp_path / "s", Head("x", made), [("all", Rows(crystal([11, 17], 3.5), ["a"]))])
    write_summary(tmp_path / "s", None, tmp_path / "s.html")
    words = (tmp_path / "s.html").read_text()
    assert "0123456789ab…" in words and "0123456789abcdef0" not in words
    assert re.search(r"<td>settings.cutoff</td><td>6.0</td><td>[^–<]+</td>", words)
