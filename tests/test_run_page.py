"""`hpcgen report`: a page of runs that is whole in itself, true to its crystals, and turns in a browser."""

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import browser
import campaign_jobs
import numpy as np
import pytest
import torch
from known_crystals import special

from hpcgen import cli
from hpcgen.campaign.evaluate import evaluate
from hpcgen.campaign.request import Request as Evaluation
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.report.candidates import choose, diffraction
from hpcgen.report.compare import Histogram, Series
from hpcgen.report.evaluated import figures_of, meaning_of
from hpcgen.report.gather import bonds_of, drawn, look_closely, pair_name
from hpcgen.report.grouped import as_html, groups_of
from hpcgen.report.run_page import CONTENTS, Request, write_report
from hpcgen.report.solid import solid
from hpcgen.report.spread import Spread
from hpcgen.runner.team import find_team
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Column, Rows
from hpcgen.store.write import write_store

pytest.importorskip("matplotlib")
EVIL = "<script>alert(1)</script>&\"'"
SPECIAL = special()
HULL = {"NaCl": 0.2, "fcc": 0.1, "diamond": None, "hcp": 0.05, "one atom": 0.3, "skewed": 0.4, "sixty": 0.5}
LOG = (
    {"kind": "train", "step": 10, "loss": 1.5, "lr": 1e-3},
    {"kind": "train", "step": 20, "loss": None, "lr": 1e-4},
    {"kind": "validation", "step": 20, "loss": 1.25},
    {"kind": "train", "step": 30, "loss": 1.0, "lr": 1e-5},
)


def store(path: Path, unit: str = "eV/atom", names: list[str] | None = None) -> Path:
    """The special crystals with an energy each but one."""
    names = list(SPECIAL) if names is None else names
    energies = np.array([np.nan if (e := HULL.get(name, 0.0)) is None else e for name in names])
    column = Column(ColumnSpec("float", unit), energies, np.isnan(energies))
    head = Head(f"hand {EVIL}", {"note": EVIL}, {"e_above_hull": column.spec})
    parts = [Rows(Crystals.cat([SPECIAL[name] for name in names]), names, {"e_above_hull": column})] if names else []
    write_store(path, head, [("all", rows) for rows in parts])
    return path


def training(path: Path) -> Path:
    path.mkdir()
    campaign_jobs.make_checkpoint(path / "best.pt")
    (path / "config.yaml").write_text("store: s\nsteps: 30\nbatch:\n  crystals: 4\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.0, **line}) + "\n" for line in LOG) + '{"torn')
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluated campaign and the training of its checkpoint, a store with energies, a reference, and their page."""
    place = tmp_path_factory.mktemp("report")
    campaign_jobs.run(training(place / "training") / "best.pt", place / "made", n=24)
    reference = store(place / "known", "meV/atom")
    evaluate(Evaluation(place / "made", reference), None, find_team(), 0)
    (place / "made" / "evaluate" / "broken.json").write_text("[1, 2")
    store(place / "S&<i>")
    runs = [place / "made", place / "S&<i>"]
    assert write_report(Request(runs, place / "page.html", reference, sample=6, seed=3, top=2)) == place / "page_files"
    return place


class Reader(HTMLParser):
    """Tags, addresses, words and crystals of a page; its tags close in order."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.solids: list[dict] = []
        self.words = self.script = ""
        self.source = page.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.links += [told[name] for name in ("src", "href", "srcset", "action", "poster", "data") if name in told]
        if tag == "canvas":
            self.solids.append(json.loads(told["data-solid"]))
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.script += data
        else:
            self.words += data


def table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_holds_all_in_itself(place: Path) -> None:
    page = Reader(place / "page.html")
    assert not re.search(r"url\(|@import|<link|https?:|\bimport\b|fetch\(|XMLHttp", page.source)
    assert page.links and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    policy = re.search(r'content="(default-src[^"]*)"', page.source)
    assert policy and f"script-src 'sha256-{digest}'" in policy[1] and policy[1].startswith("default-src 'none';")
    assert page.source.count("<script") == 1


def test_every_figure_and_table_is_a_file_too(place: Path) -> None:
    page, folder = Reader(place / "page.html"), place / "page_files"
    pngs, csvs = ({path.name for path in folder.glob(f"*.{kind}")} for kind in ("png", "csv"))
    assert set((folder / CONTENTS).read_text().split()) == pngs | csvs
    looks = {name for name in pngs if re.fullmatch(r"candidate_\d_\d+\.png", name)}
    assert len(page.links) == len(pngs) - len(looks) and len(page.solids) == len(looks) == 4
    quantities = ["num_atoms", "num_elements", "density", "volume_per_atom", "bond_reach", "column_e_above_hull"]
    quantities += [f"cell_{name}" for name in ("a", "b", "c", "alpha", "beta", "gamma")]
    others = ["validity", "elements", "space_groups", "crystal_systems", "periodic_table_1", "periodic_table_2",
              "training_1_loss", "candidate_1_01_diffraction"]  # fmt: skip
    assert {f"{name}.png" for name in quantities + others} <= pngs
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pngs)
    for name in ("runs", "settings_campaign", "settings_store", "evaluation_generate", "distributions", "quantiles",
                 "elements", "space_groups", "training", "candidates", "diffraction"):  # fmt: skip
        assert f"{name}.csv" in csvs and table(folder / f"{name}.csv"), name
    assert {row["quantity"] for row in table(folder / "distributions.csv")} >= set(quantities)


def test_the_page_says_what_was_asked_and_done(place: Path) -> None:
    words = " ".join(Reader(place / "page.html").words.split())
    for said in (
        "made: 24 crystals. S&<i>: 7 crystals.",
        f"hpcgen evaluate {place / 'S&<i>'} --reference {place / 'known'}",  # what is missing, and how to get it
        "broken.json: is no evaluation",
        f"hand {EVIL}",
        "made: 6 of 24 crystals, drawn at random with seed 3; S&<i>: 6 of 7 crystals, drawn at random with seed 3",
        "The reference has no column e_above_hull in the same unit",
        f"{place / 'training'}, for made.",
        "S&<i> was made by no checkpoint",
        "lowest e_above_hull of the 6 crystals that have one",
        "no column e_above_hull, so nothing is known of stability",
        "an atom's own images left out",  # what defines a figure
    ):
        assert said in words, said


def test_figures_and_tables_agree_with_the_stores(place: Path) -> None:
    folder = place / "page_files"
    elements = {row["element"]: row for row in table(folder / "elements.csv")}
    chlorine = sum(1 for crystal in SPECIAL.values() if 17 in crystal.atomic_numbers)
    assert elements["Cl"]["crystals of S&<i>"] == str(chlorine)
    sizes = [row for row in table(folder / "quantiles.csv") if row["quantity"] == "atoms in the cell"]
    assert {row["of"]: row["values"] for row in sizes} == {"made": "24", "S&<i>": "7", "reference known": "7"}
    told = json.loads((place / "made" / "evaluate" / "generate.json").read_text())
    (share,) = [row for row in table(folder / "evaluation_generate.csv") if row["figure"] == "validity.valid.count"]
    assert share["made"] == str(told["figures"]["validity"]["valid"]["count"])
    curves = table(folder / "training.csv")
    assert [(row["kind"], row["step"], row["value"]) for row in curves if row["quantity"] == "loss"] == [
        ("training", "10", "1.5"), ("training", "30", "1.0"), ("validation", "20", "1.25")]  # fmt: skip


def test_the_same_run_makes_the_same_page_and_only_its_own_files_go(tmp_path: Path) -> None:
    run, out, mine = training(tmp_path / "run"), tmp_path / "page.html", tmp_path / "page_files" / "mine.png"
    write_report(Request([run], out))
    first = out.read_bytes()
    mine.write_text("mine")
    write_report(Request([run], out))
    assert out.read_bytes() == first
    (run / "metrics.jsonl").write_text(json.dumps(LOG[2]) + "\n")
    write_report(Request([run], out))
    assert {path.name for path in mine.parent.glob("*.png")} == {"mine.png", "training_1_loss.png"}


# ---- what is found out -----------------------------------------------------------------------------------------------


def test_best_candidates(place: Path) -> None:
    best, how = choose(Store(place / "S&<i>", dtype=None), 3, 10, 0)
    assert [candidate.id for candidate in best] == ["hcp", "fcc", "NaCl"] and how.startswith("lowest e_above_hull")
    assert [candidate.space_group for candidate in best] == [194, 225, 225]
    assert best[0].values["e_above_hull"] == (0.05, "eV/atom")
    without = Store(place / "S&<i>", dtype=None, columns=[])
    ranked, how = choose(without, 10, 10, 0)
    assert "nothing is known of stability" in how
    assert len({candidate.formula for candidate in ranked}) == len(ranked) <= 7
    order = [(not candidate.valid, candidate.space_group <= 1) for candidate in ranked if candidate.valid]
    assert order == sorted(order)
    assert choose(without, 0, 10, 0)[0] == []


def test_powder_patterns() -> None:
    salt = diffraction(SPECIAL["NaCl"])
    edge = float(SPECIAL["NaCl"].volume[0]) / int(SPECIAL["NaCl"].num_atoms[0]) * 8  # Å³ of the cubic cell
    strongest = int(np.argmax(salt.heights))
    assert salt.spacings[strongest] == pytest.approx(edge ** (1 / 3) / 2, rel=1e-4)  # 200
    assert salt.angles[strongest] == pytest.approx(31.8, abs=0.5) and salt.heights[strongest] == 100
    assert diffraction(SPECIAL["hcp"]).hkl and all(len(hkl) == 3 for hkl in diffraction(SPECIAL["hcp"]).hkl)
    heavy = replace(SPECIAL["one atom"], atomic_numbers=torch.tensor([110]))
    assert diffraction(heavy).note.startswith("not computed: ") and not diffraction(heavy).angles
    large = Crystals(torch.rand(900, 3, dtype=torch.float64), 300 * torch.eye(3, dtype=torch.float64)[None],
                     torch.full((900,), 6), torch.tensor([900]))  # fmt: skip
    assert "too many reflections" in diffraction(large).note


def test_bonds_cells_and_space_groups(place: Path) -> None:
    lengths, reach, pair = bonds_of(SPECIAL["diamond"])
    assert len(lengths) == 2 * int(SPECIAL["diamond"].num_atoms[0]) and set(map(pair_name, pair)) == {"C–C"}
    structure = to_pymatgen(SPECIAL["diamond"])[0]
    assert lengths == pytest.approx(np.full(len(lengths), structure.get_neighbors(structure[0], 1.8)[0].nn_distance))
    assert reach == pytest.approx(lengths / (2 * 0.76))  # Cordero: C 0.76 Å
    lengths, _, pair = bonds_of(SPECIAL["NaCl"])
    between = [length for length, name in zip(lengths, map(pair_name, pair), strict=True) if name == "Na–Cl"]
    assert len(between) == 6 * int((SPECIAL["NaCl"].atomic_numbers == 11).sum())
    close = look_closely(Store(place / "S&<i>", dtype=None), 100, 0)
    assert close.in_words() == "all 7 crystals"
    assert close.in_space_group[225] >= 2 and close.in_space_group[194] == 1 and close.in_space_group.sum() == 7
    assert len(close.cell["gamma"]) == 7 and 59 < close.cell["gamma"].low <= close.cell["gamma"].high < 121


def test_a_sample_is_a_function_of_its_seed() -> None:
    first, again, other = drawn(10**6, 50, 1), drawn(10**6, 50, 1), drawn(10**6, 50, 2)
    assert first.tolist() == again.tolist() == sorted(set(first.tolist())) != other.tolist()
    assert drawn(5, 50, 1).tolist() == [0, 1, 2, 3, 4]


def test_a_solid_shows_what_is_on_its_faces() -> None:
    one = solid(SPECIAL["one atom"])
    assert len(one.atoms) == 8 and np.allclose(sorted(map(tuple, one.atoms)), sorted(map(tuple, one.corners)))
    diamond = json.loads(solid(SPECIAL["diamond"]).as_json())
    assert {element["symbol"] for element in diamond["elements"]} == {"C"} and len(diamond["edges"]) == 12
    many = Crystals(torch.rand(700, 3, dtype=torch.float64), 30 * torch.eye(3, dtype=torch.float64)[None],
                    torch.full((700,), 6), torch.tensor([700]))  # fmt: skip
    assert len(solid(many).atoms) == 600 and solid(many).note == "the first 600 of 700 atoms"
    heap = Crystals(torch.zeros(9, 3, dtype=torch.float64), 5 * torch.eye(3, dtype=torch.float64)[None],
                    torch.full((9,), 8), torch.tensor([9]))  # fmt: skip
    assert len(solid(heap).atoms) == 72 and not solid(heap).bonds


def test_histograms_count_what_is_outside_too() -> None:
    spread = Spread()
    spread.add(np.append(np.linspace(0, 1, 1999), 1e6))
    what = Histogram("x", "x", "", (Series("run", 0, spread),))
    assert what.edges[-1] < 2 and what.shares(what.series[0], what.edges).sum() == pytest.approx(100, abs=0.5)
    few = Spread.of_counts(np.arange(5), np.array([0, 3, 0, 0, 1]))
    sizes = Histogram("n", "n", "", (Series("run", 0, few),), True)
    assert sizes.edges.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert sizes.shares(sizes.series[0], sizes.edges).tolist() == [75, 0, 0, 25]
    counted = Spread()
    counted.add(np.array([1, 1, 1, 4.0]))
    assert few == counted
    assert Histogram("x", "x", "", (Series("run", 0, Spread()),)).edges.tolist() == [0, 1]


def test_figures_that_are_not_known_are_shown() -> None:
    told = {
        "figures": {
            "valid": {"count": 3, "of": 4, "share": 0.75, "interval": [0.5, 0.9], "how": "so"},
            "cov": {"recall": 0.5, "deep": {"amsd": None}, "far": {"mean": 0.5, "of": 3, "interval": [0.25, 0.75]}},
            "rate": {"count": 1, "of": 2, "share": 0.5, "interval": None, "rms": 0.1, "rms_interval": [0.05, 0.2]},
            "none": {"mean": None, "of": 0, "interval": None},
            "atoms": {"min": 1, "mean": 2.5, "interval": [2, 3]},
            "sizes": {str(n): n for n in range(40)},
            "parts": [{"atoms": [1, 4], "share": 0.25}, {"atoms": [5, 8], "share": 0.5}],
            "flag": True,
            "list": list(range(30)),
        },
        "definitions": {"recall": "of what"},
    }
    assert figures_of(told) == {
        "valid": "75.0 % [50.0, 90.0], 3 of 4",
        "valid.how": "so",
        "cov.recall": "0.5",
        "cov.deep.amsd": "–",
        "cov.far": "0.5 [0.25, 0.75], of 3",
        "rate": "50.0 %, 1 of 2",
        "rate.rms": "0.1 [0.05, 0.2]",
        "none": "–, of 0",
        "atoms.min": "1",
        "atoms.mean": "2.5 [2, 3]",
        "sizes": "40 values, see the JSON file",
        "parts.atoms 1 to 4": "25.0 %",
        "parts.atoms 5 to 8": "50.0 %",
        "flag": "yes",
        "list": "30 values, see the JSON file",
    }
    assert meaning_of("cov.recall", [told]) == "of what" and meaning_of("flag", [told]) == ""


def test_figures_stand_in_groups_and_long_ones_are_folded() -> None:
    names = ["validity.valid", "validity.radii", "far.density", *(f"far.of_pairs.{n}" for n in range(10))]
    names += [f"by_num_atoms.atoms {n}.valid" for n in range(21)] + ["alone", "deep.a.b", "deep.a.c"]
    told = {"definitions": {"validity": "of all", "radii": "half", "far": "how far", "alone": "by itself"}}
    groups = groups_of([(name, "1", "<2>") for name in names], [told])
    assert [group.title for group in groups] == [
        "Validity", "Far", "Validity by number of atoms", "Deep", "Further figures"
    ]  # fmt: skip
    validity, far, sizes, deep, single = groups
    assert (validity.meaning, [row[:2] for row in validity.rows]) == ("of all", [("valid", ""), ("radii", "half")])
    assert [row[0] for row in far.rows] == ["density"] and len(far.folded["of_pairs"]) == 10
    assert not sizes.rows and len(sizes.folded[""]) == 21 and sizes.folded[""][0][0] == "atoms 0 · valid"
    assert [row[0] for row in deep.rows] == ["a · b", "a · c"] and single.rows == [("alone", "by itself", ("1", "<2>"))]
    page = as_html(groups, ["one", "two"])
    assert page.count("<details>") == 2 and page.count("&lt;2&gt;") == len(names) and "<2>" not in page
    assert page.count("how far") == 1 and "<th scope=col>two</th>" in page
    assert page.count('data-run="two"') == len(names)
    alone = as_html(groups_of([(name, "1") for name in names], [told]), ["one"])
    assert "<th" not in alone and "data-run" not in alone


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, out = str(place / "S&<i>"), str(tmp_path / "p.html")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("checkpoint: c\ntile: 16\n")
    store(tmp_path / "empty", names=[])
    shutil.copytree(good, tmp_path / "cut")
    shard = next((tmp_path / "cut").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:1000])
    for words, code, said in (
        ([str(tmp_path / "nowhere")], 4, "nowhere: is no folder"),
        ([str(tmp_path / "nothing")], 4, "holds no run of hpcgen"),
        ([str(tmp_path / "begun")], 4, "campaign has not ended"),
        ([str(tmp_path / "empty")], 4, "holds no crystals"),
        ([str(tmp_path / "cut")], 4, "1000 bytes"),
        ([good, good], 2, "want every run once"),
        ([good, "--reference", str(tmp_path / "nowhere")], 4, "nowhere: is no folder"),
        ([good, "--reference", str(tmp_path / "empty")], 4, "holds no crystals"),
        ([good, "--reference", good, "--split", "val"], 4, "split 'val' is not in the store"),
        ([good, "--split", "val"], 2, "without --reference"),
        ([good, "--sample", "0"], 2, "--sample 0: want at least 1"),
        ([good, "--out", str(tmp_path / "p.txt")], 2, "want the name of an HTML file"),
        ([good, "--out", f"{shard}/p.html"], 7, "cut"),
        ([f"{good}/../S&<i>"] * 7, 2, "want every run once"),
    ):
        given = [] if "--out" in words else ["--out", out]
        assert cli.main(["report", *words, *given]) == code, words
        told = capsys.readouterr().err
        assert said in told.splitlines()[-1] and "Traceback" not in told, words
    assert not (tmp_path / "p.html").exists() and not list(tmp_path.glob("p_files/*"))


def test_a_campaign_of_which_nothing_is_left_and_a_training_alone(place: Path, tmp_path: Path) -> None:
    checkpoint = campaign_jobs.make_checkpoint(tmp_path / "bad.pt", poison=3)
    campaign_jobs.run(checkpoint, tmp_path / "none", n=6, formula="Li2")
    write_report(Request([tmp_path / "none"], tmp_path / "none.html"))
    words = Reader(tmp_path / "none.html").words
    assert "no crystals: all 6 asked for were rejected" in words and "not-finite" in words
    assert [row["none"] for row in table(tmp_path / "none_files" / "rejected.csv")] == ["6"]
    assert "The training run of" in words and "is not in the folder of that file" in words
    write_report(Request([place / "training"], tmp_path / "training.html"))
    assert "30 of 30" in Reader(tmp_path / "training.html").words
    assert (tmp_path / "training_files" / "training_1_lr.png").exists()


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.found() is None:
        pytest.skip(f"no Chromium here: none of {', '.join(browser.NAMES)} is installed")
    with browser.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


LOOK = "document.querySelector('canvas').dataset.look"
INKED = """(() => { const c = document.querySelector('canvas');
  return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size })()"""
MIDDLE = """(() => { const c = document.querySelector('canvas'); c.scrollIntoView({block: 'center'});
  const box = c.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] })()"""


def test_in_a_browser_nothing_is_asked_for_and_nothing_complained_of(place: Path, chromium: browser.Page) -> None:
    for width, height, touch in ((1280, 900, False), (390, 844, True)):
        chromium.open((place / "page.html").as_uri(), width, height, touch=touch)
        assert chromium.complaints() == []
        assert chromium.requests() == [(place / "page.html").as_uri()]
        assert chromium.value("document.documentElement.scrollWidth") <= width
        assert chromium.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert chromium.value(INKED) > 20


def test_crystals_turn_by_mouse_touch_and_keys(place: Path, chromium: browser.Page) -> None:
    chromium.open((place / "page.html").as_uri(), 1280, 900)
    x, y = chromium.value(MIDDLE)
    looks = [chromium.value(LOOK)]
    for kind, along, buttons in (("mousePressed", 0, 1), ("mouseMoved", 40, 1), ("mouseReleased", 40, 0)):
        point = {"x": x + along, "y": y + along / 2, "button": "left", "buttons": buttons, "clickCount": 1}
        chromium.ask("Input.dispatchMouseEvent", type=kind, **point)
    looks.append(chromium.value(LOOK))
    chromium.value("document.querySelector('canvas').focus()")
    for kind in ("keyDown", "keyUp"):
        chromium.ask("Input.dispatchKeyEvent", type=kind, key="ArrowLeft", code="ArrowLeft")
    looks.append(chromium.value(LOOK))
    chromium.open((place / "page.html").as_uri(), 390, 844, touch=True)
    x, y = chromium.value(MIDDLE)
    for kind, along in (("touchStart", 0), ("touchMove", 20), ("touchMove", 60), ("touchEnd", None)):
        points = [] if along is None else [{"x": x + along, "y": y}]
        chromium.ask("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    looks.append(chromium.value(LOOK))
    assert len(set(looks)) == 4, looks
    assert chromium.complaints() == []


def test_the_browser_would_have_told(tmp_path: Path, chromium: browser.Page) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); missing()</script>")
    chromium.open(bad.as_uri(), 400, 400)
    assert len(chromium.complaints()) >= 2 and "http://127.0.0.1:9/x.png" in chromium.requests()


@pytest.mark.bench
def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    rows = Crystals.cat(list(SPECIAL.values()) * 500)
    ids = np.arange(len(rows))
    parts = (("all", Rows(rows, [f"{part}-{at}" for at in ids])) for part in range(60))
    write_store(tmp_path / "large", Head("large"), parts)
    write_store(tmp_path / "small", Head("small"), [("all", Rows(rows, list(map(str, ids))))])
    peaks = {}
    for name in ("small", "large"):
        code = (
            "import resource, sys; from hpcgen import cli; code = cli.main(sys.argv[1:]); "
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); sys.exit(code)"
        )
        words = ["report", str(tmp_path / name), "--out", str(tmp_path / f"{name}.html"), "--top", "1"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout.split()[-1])
    print(f"\n3,500 crystals: {peaks['small']} MB at the peak; 210,000: {peaks['large']} MB")
    assert peaks["large"] < peaks["small"] + 100
