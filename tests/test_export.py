"""Export: what stands in the files is what stands in the store, and conditions choose as they say."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from known_crystals import special
from store_rows import HEAD, RADIUS, SPECS, rows, same

from hpcgen import cli
from hpcgen.crystal.convert import from_ase, from_pymatgen, to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.errors import InputError, UsageError
from hpcgen.store import export as export_module
from hpcgen.store import writers
from hpcgen.store.export import Request, choose, export
from hpcgen.store.inspect import check
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Column, Rows
from hpcgen.store.where import Condition
from hpcgen.store.write import write_store
from hpcgen.store.writers import Names

IDS = ["mp-1", "a b/c", "A B/C", "../up", "Łódź", "7", "q\"u'o\\te"]
GAPS = [0.5, math.nan, 2.5, 1.5, 0.0, math.nan, 1.5]
COLUMNS = {
    "band_gap": ColumnSpec("float", "eV"),
    "space.group": ColumnSpec("int"),
    "stable": ColumnSpec("bool"),
    "label": ColumnSpec("str"),
}


def known() -> Rows:
    """Seven crystals, one of them in a left-handed cell."""
    some = special()
    some["skewed"] = mirrored(some["skewed"])
    missing = np.array([False, False, True, False, False, False, True])
    labels = np.array(["plain", "two words", "", 'a "quote"', "it's", "new\nline", "c:\\x"], dtype=object)
    columns = {
        "band_gap": Column(COLUMNS["band_gap"], np.array(GAPS), np.isnan(GAPS)),
        "space.group": Column(COLUMNS["space.group"], np.array([225, 225, 0, 194, 221, 1, 0]), missing),
        "stable": Column(COLUMNS["stable"], np.array([True, False, False, True, True, False, False]), missing),
        "label": Column(COLUMNS["label"], labels, missing),
    }
    return Rows(Crystals.cat(list(some.values())), IDS, columns)


def mirrored(of: Crystals) -> Crystals:
    """The same axes in another order: a left-handed cell."""
    return Crystals(of.frac_coords[:, [1, 0, 2]], of.lattice[:, [1, 0, 2]], of.atomic_numbers, of.num_atoms)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_store(tmp_path / "run", Head("campaign", {}, COLUMNS), [("all", known())])
    return tmp_path / "run"


def same_crystal(one: Crystals, other: Crystals, tolerance: float) -> None:
    """Equal up to a rotation and the order of atoms: metric, and sites of each element. Not up to a mirror image."""
    gram = [part.lattice.double() @ part.lattice.double().mT for part in (one, other)]
    assert torch.allclose(*gram, atol=tolerance * 100)
    assert (torch.linalg.det(one.lattice) * torch.linalg.det(other.lattice) > 0).all()
    assert sorted(one.atomic_numbers.tolist()) == sorted(other.atomic_numbers.tolist())
    step = one.frac_coords[:, None] - other.frac_coords[None]
    near = ((step - step.round()).abs() < tolerance).all(-1) & (one.atomic_numbers[:, None] == other.atomic_numbers)
    assert near.any(1).all() and near.any(0).all()


def right_handed(of: Crystals) -> Crystals:
    if torch.linalg.det(of.lattice[0]) > 0:
        return of
    return Crystals((-of.frac_coords) % 1.0, -of.lattice, of.atomic_numbers, of.num_atoms)


# ---- formats -----------------------------------------------------------------------------------------------


def test_cif(run: Path, tmp_path: Path) -> None:
    import gemmi
    from pymatgen.core import Structure

    assert export(Request(run, "cif", tmp_path / "out")) == 7
    index = list(csv.DictReader((tmp_path / "out" / "index.csv").open(encoding="utf-8")))
    assert [row["id"] for row in index] == IDS
    assert len({row["file"].lower() for row in index}) == 7
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.csv", *(row["file"] for row in index)}
    for k, row in enumerate(index):
        file = tmp_path / "out" / row["file"]
        same_crystal(from_pymatgen([Structure.from_file(file)]), right_handed(known().crystals[k]), 1e-8)
        block = gemmi.cif.read(str(file)).sole_block()
        assert gemmi.cif.as_string(block.find_value("_hpcgen_id")) == IDS[k]
        assert block.find_value("_symmetry_space_group_name_H-M") == "'P 1'"
        gap = block.find_value("_hpcgen_band_gap")
        assert gap is None if math.isnan(GAPS[k]) else float(gap) == GAPS[k]
        assert row["band_gap"] == ("" if math.isnan(GAPS[k]) else str(GAPS[k]))
    found = {row["id"]: gemmi.cif.read(str(tmp_path / "out" / row["file"])).sole_block().find_value(
        "_hpcgen_space_group_found") for row in index}  # fmt: skip
    assert found["mp-1"] == "225" and found["A B/C"] == "227" and found["q\"u'o\\te"] == "1"


def test_cif_with_symmetry(run: Path, tmp_path: Path) -> None:
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

    export(Request(run, "cif", tmp_path / "out", symprec=0.01, top=4))
    index = list(csv.DictReader((tmp_path / "out" / "index.csv").open(encoding="utf-8")))
    texts = [(tmp_path / "out" / row["file"]).read_text() for row in index]
    assert "Fm-3m" in texts[0] and "Fd-3m" in texts[2]
    for k, text in enumerate(texts):
        one, other = Structure.from_str(text, "cif"), to_pymatgen(known().crystals[k])[0]
        assert StructureMatcher(ltol=1e-4, stol=1e-4, angle_tol=1e-3, scale=False).fit(one, other)


def test_poscar(run: Path, tmp_path: Path) -> None:
    from pymatgen.io.vasp import Poscar

    export(Request(run, "poscar", tmp_path / "out"))
    index = list(csv.DictReader((tmp_path / "out" / "index.csv").open(encoding="utf-8")))
    assert all(row["file"].startswith("POSCAR_") for row in index)
    for k, row in enumerate(index):
        found = Poscar.from_file(tmp_path / "out" / row["file"], check_for_potcar=False)
        assert found.comment == IDS[k]
        same_crystal(from_pymatgen([found.structure]), right_handed(known().crystals[k]), 1e-12)
        assert np.linalg.det(found.structure.lattice.matrix) > 0  # VASP refuses other cells


def test_extxyz(run: Path, tmp_path: Path) -> None:
    from ase.io import read

    export(Request(run, "extxyz", tmp_path / "out"))
    frames = read(tmp_path / "out" / "crystals.extxyz", ":")
    assert [str(frame.info["id"]) for frame in frames] == IDS
    assert [frame.info.get("band_gap", math.nan) for frame in frames] == pytest.approx(GAPS, nan_ok=True)
    assert frames[5].info["label"] == "new line" and frames[3].info["label"] == 'a "quote"'
    assert "stable" not in frames[2].info and frames[3].info["stable"]
    for k, frame in enumerate(frames):
        found, wanted = from_ase([frame]), known().crystals[k]
        assert torch.equal(found.lattice, wanted.lattice) and torch.equal(found.atomic_numbers, wanted.atomic_numbers)
        same_crystal(found, wanted, 1e-8)


def test_json(run: Path, tmp_path: Path) -> None:
    from pymatgen.core import Structure

    export(Request(run, "json", tmp_path / "out"))
    text = (tmp_path / "out" / "crystals.json").read_text(encoding="utf-8")
    told = json.loads(text)
    assert len(text.splitlines()) == len(told) + 2  # one a line
    structures = [Structure.from_dict(each) for each in told]
    assert [structure.properties["id"] for structure in structures] == IDS
    assert structures[5].properties["label"] == "new\nline" and "band_gap" not in structures[5].properties
    found, wanted = from_pymatgen(structures), known().crystals
    assert torch.equal(found.frac_coords, wanted.frac_coords) and torch.equal(found.lattice, wanted.lattice)


def test_csv_with_cifs(run: Path, tmp_path: Path) -> None:
    from pymatgen.core import Structure

    export(Request(run, "csv", tmp_path / "out"))
    table = list(csv.DictReader((tmp_path / "out" / "crystals.csv").open(encoding="utf-8", newline="")))
    assert [row["id"] for row in table] == IDS
    assert [row["formula"] for row in table][:2] == ["NaCl", "Cu"] and table[0]["num_atoms"] == "8"
    assert table[5]["label"] == "new\nline"
    for k, row in enumerate(table):
        found = Structure.from_str(row["cif_string"], "cif")
        same_crystal(from_pymatgen([found]), right_handed(known().crystals[k]), 1e-8)


def test_names_are_safe_and_no_two_alike() -> None:
    names = Names("cif")
    made = [
        names.of(id) for id in ("a", "A", "a~2", "../../etc/passwd", "", ".hidden", "-rf", "x" * 300, "index", "日本")
    ]
    assert made[:3] == ["a.cif", "A~2.cif", "a_2.cif"]
    assert len({name.lower() for name in made}) == len(made)
    assert not any("/" in name or name.startswith((".", "-")) or len(name) > 140 for name in made)


# ---- choosing ----------------------------------------------------------------------------------------------


def chosen(store: Path, where: str) -> list[str]:
    condition = Condition(where, COLUMNS, Store(store, dtype=None).rows([]))
    everything = Store(store, dtype=None).rows(range(7))
    return [id for id, keep in zip(everything.ids, condition(everything), strict=True) if keep]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("band_gap > 1", [2, 3, 6]),
        ("not band_gap > 1", [0, 4]),  # what is missing is neither above nor not above
        ("not (band_gap > 1 or stable)", []),
        ("band_gap > 1 or stable", [0, 2, 3, 4, 6]),  # missing or true is true
        ("not (stable and band_gap > 1)", [0, 1, 4, 5]),  # missing and false is false
        ("band_gap is None", [1, 5]),
        ("band_gap is not None and not stable", []),
        ("label is None", [2, 6]),
        ("0 < band_gap <= 1.5", [0, 3, 6]),
        ("1 / band_gap > 0", [0, 2, 3, 6]),  # a division by zero has no value
        ("-band_gap + 2 * 1 == 0.5", [3, 6]),
        ("space.group == 225", [0, 1]),
        ("num_atoms <= 2 and band_gap is not None", [3, 4]),
        ('"Na" in elements', [0]),
        ('"Na" not in elements and num_elements == 1 and num_atoms > 8', [6]),
        ('formula == "NaCl"', [0]),
        ('formula in ("Cu", "C")', [1, 2]),
        ("id in ['mp-1', 'Łódź'] and True", [0, 4]),
        ("space.group not in [225, 1]", [3, 4]),
        ('label != "plain"', [1, 3, 4, 5]),
        ("volume > 900", [6]),
        ("num_atoms < 10 ** 1 or True", None),
        ("False", []),
    ],
)
def test_where(run: Path, where: str, wanted: list[int] | None) -> None:
    if wanted is None:
        with pytest.raises(UsageError, match="is not understood"):
            chosen(run, where)
    else:
        assert chosen(run, where) == [IDS[k] for k in wanted]


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("bandgap > 1", "did you mean band_gap"),
        ("xyzzy > 1", "there are: band_gap, space.group, stable, label, id, formula"),
        ("__import__('os').system('true')", "not understood"),
        ("().__class__.__bases__", "is no name"),
        ("band_gap.__class__ == 1", "no column 'band_gap.__class__'"),
        ("(lambda: True)()", "not understood"),
        ("[x for x in id]", "not understood"),
        ("band_gap", "is a number, want a condition"),
        ("label > 1", "cannot be compared: text and number"),
        ("band_gap == None", "by `is None`"),
        ("stable + 1 > 1", "'stable' is yes or no, want number"),
        ("band_gap and stable", "'band_gap' is number, want yes or no"),
        ('"Xx" in elements', "'Xx' is no element"),
        ('"Li" in formula', "`in` wants a list of values"),
        ("elements == elements", "cannot be compared"),
        ("band_gap > ", "invalid syntax"),
        ("", "syntax"),
        ("\0", "null"),
        ("(" * 500 + "1" + ")" * 500, "too many nested"),
        ("num_atoms" + "+1" * 900 + " > 1", "too many nested"),
        ("not " * 400 + "stable", ""),
        ("band_gap > " + "1" * 3000, "characters"),
        ("band_gap + " + "9" * 400 + " > 1", "too large"),
        ("9 ** 9 ** 9 > 1", "not understood"),
        ("b'x' == id", "not understood"),
        ("f'{id}' == id", "not understood"),
        ("(band_gap := 1) > 0", "not understood"),
    ],
)
def test_what_is_no_condition(run: Path, where: str, told: str) -> None:
    if told:
        with pytest.raises(UsageError, match=told.replace("(", r"\(").replace(")", r"\)")):
            chosen(run, where)
    else:
        assert chosen(run, where) == [IDS[k] for k in (0, 3, 4)]


def test_top_and_order(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(run, dtype=None)

    def order(**how: object) -> list[int]:
        return choose(store, Request(run, "json", tmp_path / "x", **how)).tolist()  # type: ignore[arg-type]

    assert order(top=3) == [0, 1, 2]
    assert order(by="band_gap") == [4, 0, 3, 6, 2]
    assert "2 crystals without a value of band_gap are left out" in caplog.text
    assert order(by="-band_gap", top=3) == [2, 3, 6]
    assert order(by="num_atoms", where="num_atoms > 1") == [3, 5, 0, 2, 6]
    assert order(by="label") == [3, 4, 5, 0, 1]
    assert order(by="-stable", top=3) == [0, 3, 4]
    for by, told in (("elements", "no order"), ("bandgap", "did you mean band_gap")):
        with pytest.raises(UsageError, match=told):
            order(by=by)
    with pytest.raises(InputError, match="none of 7 crystals fulfils 'band_gap > 9'"):
        order(where="band_gap > 9")


def test_every_shard_and_split_is_seen(tmp_path: Path) -> None:
    parts = [("train", rows(33)), ("val", rows(5, 2, first=90))]
    write_store(tmp_path / "run", HEAD, parts, shard_rows=10)
    every = Store(tmp_path / "run", dtype=None)
    gaps = every.column("band_gap")
    wanted = np.flatnonzero(~gaps.missing & (gaps.values > 0.3))
    assert (
        choose(every, Request(tmp_path / "run", "json", tmp_path, where="band_gap > 0.3")).tolist() == wanted.tolist()
    )
    assert export(Request(tmp_path / "run", "extxyz", tmp_path / "out", split="val")) == 5
    assert set(SPECS) == set(every.columns)


# ---- the command -------------------------------------------------------------------------------------------


def test_a_store_of_chosen_crystals_keeps_splits_and_edges(tmp_path: Path) -> None:
    parts = [("train", rows(30, 1, edges=True)), ("val", rows(12, 2, first=50, edges=True))]
    write_store(tmp_path / "all", replace(HEAD, edges=RADIUS), parts, shard_rows=7)
    request = Request(tmp_path / "all", "store", tmp_path / "some", where="band_gap > 0")
    count = export(request)
    for split, whole in parts:
        column = whole.columns["band_gap"]
        wanted = np.flatnonzero(~column.missing & (column.values > 0))
        found = Store(tmp_path / "some", split, dtype=None, edges=RADIUS)
        assert found.ids == [whole.ids[k] for k in wanted]
        assert same(found.rows(range(len(found))), Store(tmp_path / "all", split, dtype=None, edges=True).rows(wanted))
        count -= len(found)
    assert count == 0 and check(tmp_path / "some") == []
    assert Store(tmp_path / "some").head.settings["chosen"]["where"] == "band_gap > 0"
    export(replace(request, out=tmp_path / "first", split="val", top=2))
    assert Store(tmp_path / "first").ids == Store(tmp_path / "some", "val").ids[:2]
    with pytest.raises(UsageError, match="--top and --by want --split too"):
        replace(request, top=2)
    with pytest.raises(InputError, match="none of 42 crystals fulfils 'num_atoms > 999'"):
        export(replace(request, out=tmp_path / "none", where="num_atoms > 999"))
    assert not (tmp_path / "none").exists()


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    words = ["export", str(run), "--format", "cif", "--where", "band_gap > 1", "--by=-band_gap", "--top", "2"]
    assert cli.main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 crystals as cif\n"
    assert sorted(path.name for path in out.iterdir()) == ["A_B_C.cif", "_up.cif", "index.csv"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]  # no drafts
    assert cli.main([*words, "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main([*words, "--out", str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize("format", ["cif", "store"])
@pytest.mark.parametrize("kind", [".", "link", "link to nothing"])
def test_an_empty_folder_is_filled_and_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, format: str
) -> None:
    folder = tmp_path / "there"
    if kind != "link to nothing":
        folder.mkdir()
        (folder / ".export-there.1-x.draft").mkdir()  # of a killed one
        monkeypatch.chdir(folder)
        before = folder.stat().st_ino
    (tmp_path / "link").symlink_to(folder)
    out = "." if kind == "." else str(tmp_path / "link")
    assert cli.main(["export", str(run), "--format", format, "--out", out]) == 0
    assert len(list(folder.glob("[!.]*"))) == {"cif": 8, "store": 2}[format]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run", "there"]
    assert (tmp_path / "link").is_symlink()
    if kind != "link to nothing":
        assert folder.stat().st_ino == before, "a shell in that folder would see nothing"
        assert cli.main(["export", str(run), "--format", format, "--out", out]) == 2


def test_a_link_to_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert cli.main(["export", str(run), "--format", "cif", "--out", str(tmp_path / "loop")]) in (2, 7)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--format", "xyz"], 2, "want one of cif, zip, extxyz, poscar, json, csv, cdvae, diffcsp, store"),
        (["--format", "cif", "--top", "0"], 2, "--top 0"),
        (["--format", "cif", "--where", "gap > 1"], 2, "no column 'gap'"),
        (["--format", "cif", "--where", "band_gap > 99"], 4, "none of 7 crystals"),
        (["--format", "json", "--symprec", "0.1"], 2, "only a CIF holds symmetry"),
        (["--format", "cif", "--symprec", "nan"], 2, "want Å above 0"),
        (["--format", "cif", "--split", "val"], 4, "split 'val' is not in the store"),
        (["--format", "cif", "--by", "nothing"], 2, "no column 'nothing'"),
    ],
)
def test_bad_requests(
    run: Path, tmp_path: Path, words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), *words]) == code
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_too_many_files_and_a_file_in_the_way(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "MOST_FILES", 6)
    with pytest.raises(UsageError, match="7 crystals would be as many files, want at most 6"):
        export(Request(run, "poscar", tmp_path / "out"))
    assert export(Request(run, "json", tmp_path / "out")) == 7
    with pytest.raises(UsageError, match="is a file"):
        export(Request(run, "json", tmp_path / "out" / "crystals.json"))


def test_a_failure_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers.formats, "poscar", full)
    assert cli.main(["export", str(run), "--format", "poscar", "--out", str(tmp_path / "out")]) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
