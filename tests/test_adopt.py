"""`hpcgen evaluate` of files that another generator made: figures as of a run folder, nothing silently lost."""

import csv
import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import campaign_jobs
import numpy as np
import pytest
import torch
from known_crystals import special, supercell

from hpcgen import cli
from hpcgen.campaign import adopt
from hpcgen.campaign.adopt import adopted
from hpcgen.crystal.convert import to_ase, to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.launch.status import describe
from hpcgen.metrics.bootstrap import share
from hpcgen.runner.team import find_team
from hpcgen.store import formats
from hpcgen.store.export import Request, export
from hpcgen.store.foreign import kind_of, place_of, state_of
from hpcgen.store.foreign_index import distinct
from hpcgen.store.foreign_tables import words_of
from hpcgen.store.inspect import check
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Column, Rows
from hpcgen.store.write import write_store

REAL = campaign_jobs.ROOT.parent / "shared" / "data" / "mp20_bt.csv.gz"
IDS = ["mp-1", "a b/c", "A B/C", "007", "Łódź", "T", "q\"u'o\\te"]
TARGETS = ["x", "y", "", "z z", 'say "u"', "x", "7"]
HULL = [0.0, 0.1, np.nan, -0.5, 2.0, 0.3, 0.0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The special crystals, one of them in a left-handed cell, one with two atoms nearly in one place."""
    some = special()
    skewed = some["skewed"]
    some["skewed"] = Crystals(skewed.frac_coords[:, [1, 0, 2]], skewed.lattice[:, [1, 0, 2]], skewed.atomic_numbers,
                              skewed.num_atoms)  # fmt: skip
    some["hcp"] = moved(some["hcp"], [[0.1, 0.1, 0.1], [0.12, 0.1, 0.1]])
    columns = {"target": ColumnSpec("str"), "e_above_hull": ColumnSpec("float", "eV/atom")}
    gaps = np.array([not target for target in TARGETS])
    values = {
        "target": Column(columns["target"], np.array(TARGETS, dtype=object), gaps),
        "e_above_hull": Column(columns["e_above_hull"], np.array(HULL), np.isnan(HULL)),
    }
    rows = Rows(Crystals.cat(list(some.values())), IDS, values)
    write_store(tmp_path / "run", Head("campaign", {}, columns), [("all", rows)])
    return tmp_path / "run"


def moved(crystal: Crystals, sites: list[list[float]]) -> Crystals:
    return Crystals(
        torch.tensor(sites, dtype=torch.float64), crystal.lattice, crystal.atomic_numbers, crystal.num_atoms
    )


def cif(crystal: Crystals, name: str = "x") -> str:
    return formats.cif(crystal, name, name, {})


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def evaluated(given: Path, *words: str) -> dict[str, Any]:
    """What the command says of it, as JSON."""
    assert cli.main(["evaluate", str(given), "--processes", "0", *words]) == 0
    return json.loads((place_of(given, None) / "evaluate" / "generate.json").read_text())


def rejects(given: Path) -> dict[str, str]:
    return {row["id"]: row["code"] for row in table(place_of(given, None) / "rejects.csv")}


FILES = {"cif": "", "zip": "crystals.zip", "extxyz": "crystals.extxyz", "csv": "crystals.csv"}


@pytest.mark.parametrize("format", FILES)
def test_our_own_files_are_measured_as_the_run_is(run: Path, tmp_path: Path, format: str) -> None:
    assert cli.main(["evaluate", str(run), "--processes", "0"]) == 0
    wanted = table(run / "evaluate" / "generate.csv")
    export(Request(run, format, tmp_path / "out"))
    given = tmp_path / "out" / FILES[format]
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    told = evaluated(given)
    assert (told["asked"], told["written"], told["rejected"]) == (7, 7, {})
    found = table(place_of(given, None) / "evaluate" / "generate.csv")
    names = [row["id"] for row in found]
    if format in ("cif", "zip"):
        index = {row["file"].removesuffix(".cif"): row["id"] for row in table(tmp_path / "out" / "index.csv")}
        found = [{**row, "id": index[row["id"]]} for row in found]
        assert names == sorted(names) if format == "cif" else [index[name] for name in names] == IDS
    wanted, found = (sorted(rows, key=lambda row: row["id"]) for rows in (wanted, found))
    for row in wanted + found:
        row["volume_per_atom"] = f"{float(row['volume_per_atom']):.4g}"
        if format in ("cif", "zip"):  # which carry no columns
            row["e_above_hull"] = ""
    assert found == wanted
    assert [row["distances"] for row in found].count("0") == 2, "atoms in one place are measured, not rejected"
    beside = {place_of(given, None).name} if format != "cif" else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*before, *beside}
    assert not check(place_of(given, None))


@pytest.mark.parametrize("format", ["extxyz", "csv"])
def test_targets_and_energies_are_carried_through(run: Path, tmp_path: Path, format: str) -> None:
    export(Request(run, format, tmp_path / "out"))
    place = adopted(tmp_path / "out" / FILES[format], None, find_team(), 0)
    store = Store(place, dtype=None)
    assert store.ids == IDS
    target, hull = store.column("target"), store.column("e_above_hull")
    assert [value or "" for value in target.values.tolist()] == TARGETS and target.missing.tolist()[2]
    assert np.array_equal(hull.values, HULL, equal_nan=True) and hull.spec.unit == "eV/atom"
    words = ["evaluate", str(tmp_path / "out" / FILES[format]), "--task", "predict", "--processes", "0"]
    reference = tmp_path / "reference"
    write_store(reference, Head("known"), [("all", Rows(Store(run, dtype=None).rows(range(2)).crystals, ["x", "y"]))])
    assert cli.main([*words, "--reference", str(reference)]) == 0
    figures = json.loads((place / "evaluate" / "predict.json").read_text())["figures"]
    assert figures["match_rate"]["count"] == 2 and figures["match_rate"]["of"] == 7


def test_nothing_is_symmetrised_reduced_or_left_out(tmp_path: Path) -> None:
    large = supercell(special()["NaCl"], (2, 1, 1))
    (tmp_path / "cifs" / "deep").mkdir(parents=True)
    for name in ("a.cif", "b.CIF", "deep/a.cif"):
        (tmp_path / "cifs" / name).write_text(cif(large))
    (tmp_path / "cifs" / "c.cif.gz").write_bytes(gzip.compress(cif(large).encode()))
    store = Store(adopted(tmp_path / "cifs", None, find_team(), 0), dtype=None)
    assert store.ids == ["a", "b", "c", "deep/a"]
    for crystal in (store[k].crystals for k in range(4)):
        assert torch.allclose(crystal.lattice, large.lattice, atol=1e-9) and len(crystal.atomic_numbers) == 16
        assert torch.allclose(crystal.frac_coords, large.frac_coords, atol=1e-9)


# ---- broken ones among good ones -------------------------------------------------------------------------------------


def broken_cifs() -> dict[str, tuple[str, str]]:
    """Name -> text and the code it is rejected for, '' for none."""
    good = cif(special()["NaCl"])
    return {
        "close": (cif(moved(special()["hcp"], [[0, 0, 0], [0.001, 0, 0]])), ""),
        "empty": ("", "empty"),
        "good": (good, ""),
        "half": (good.replace(" 1\n", " 0.5\n"), "disordered"),
        "many": (good + good.replace("data_x", "data_y"), "several-structures"),
        "nan": (good.replace("0.500000000000", "nan", 1), "no-coordinates"),
        "one place": (cif(moved(special()["hcp"], [[0, 0, 0], [0, 0, 0]])), "bad-occupancy"),
        "text": ("no crystal", "not-cif"),
        "thin": (good.replace("_cell_length_c 5.64", "_cell_length_c 1e-9"), "bad-volume"),
        "unknown": (good.replace("Na", "Xx"), "unknown-element"),
    }


@pytest.mark.parametrize("kind", ["folder", "zip", "csv"])
def test_broken_cifs_among_good_ones(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = broken_cifs()
    given = tmp_path / {"folder": "cifs", "zip": "cifs.zip", "csv": "cifs.csv"}[kind]
    if kind == "folder":
        given.mkdir()
        for name, (text, _) in texts.items():
            (given / f"{name}.cif").write_text(text)
        (given / "notes.txt").write_text("no crystal, and not meant to be one")
    elif kind == "zip":
        with zipfile.ZipFile(given, "w") as archive:
            for name, (text, _) in texts.items():
                archive.writestr(f"{name}.cif", text)
            archive.writestr("__MACOSX/._good.cif", "no crystal, and not meant to be one")
    else:
        with given.open("w", newline="") as file:
            csv.writer(file).writerows([["name", "cif"], *([name, text] for name, (text, _) in texts.items())])
    told = evaluated(given)
    wanted = {name: code for name, (_, code) in texts.items() if code}
    assert rejects(given) == wanted
    assert (told["asked"], told["written"]) == (10, 2) and sum(told["rejected"].values()) == 8
    assert told["figures"]["validity"]["distances"] == share(1, 10, seed=0)
    assert "1 bad-occupancy, 1 bad-volume, 1 disordered" in capsys.readouterr().out


def test_broken_frames(tmp_path: Path) -> None:
    from ase.io import write

    nacl, one = special()["NaCl"], special()["one atom"]
    frames = to_ase(Crystals.cat([nacl, nacl, one, nacl, one, one]))
    frames[1].positions[3, 1] = np.nan
    frames[2].pbc = (True, True, False)
    frames[4].numbers[0] = 0
    frames[5].cell[2] *= 1e-9
    frames[3].info["material_id"] = 'with "marks" and = \\'.replace("\\", "\\\\")
    write(tmp_path / "x.xyz", frames, format="extxyz")
    with (tmp_path / "x.xyz").open("a") as file:
        file.write("\n8\nLattice")  # the generator was killed
    told = evaluated(tmp_path / "x.xyz")
    assert (told["asked"], told["written"]) == (7, 2)
    assert rejects(tmp_path / "x.xyz") == {
        "frame-1": "not-finite", "frame-2": "not-periodic", "frame-4": "unknown-element", "frame-5": "bad-volume",
        "frame-6": "bad-frame",
    }  # fmt: skip
    assert Store(tmp_path / "x.xyz.store").ids == ["frame-0", 'with "marks" and = \\']


def test_broken_rows(tmp_path: Path) -> None:
    good, structure = cif(special()["NaCl"]), to_pymatgen(special()["hcp"])[0]
    rows = [
        ["Unnamed: 0", "id", "structure", "e_above_hull"],
        [0, "a", good, "0.1"],
        [1, "a", json.dumps(structure.as_dict()), "none"],
        [2, "", good],
        [3, "", good, ""],
        [4, "b", '{"no": "structure"}', ""],
        [5, "c" * 5000, good, "inf"],
        [6, "a~2", good, "1e3"],
    ]
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
        file.write("\r\n")
    told = evaluated(tmp_path / "x.csv")
    assert (told["asked"], told["written"], told["rejected"]) == (7, 5, {"bad-row": 1, "parse-error": 1})
    assert rejects(tmp_path / "x.csv") == {"row-2": "bad-row", "b": "parse-error"}
    store = Store(tmp_path / "x.csv.store", dtype=None)
    assert store.ids == ["a", "a~2", "row-3", "c" * 200, "a~2~2"]
    assert np.array_equal(store.column("e_above_hull").values, [0.1, *[np.nan] * 3, 1e3], equal_nan=True)
    assert store[1].crystals.atomic_numbers.tolist() == [12, 12]


def test_a_damaged_entry_of_a_zip(tmp_path: Path) -> None:
    with pytest.warns(match="Duplicate name"), zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("a", "b", "b"):
            archive.writestr(f"{name}.cif", cif(special()["NaCl"], name))
    raw = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(raw.replace(b"data_a", b"data_c"))  # no longer fits its checksum
    assert evaluated(tmp_path / "x.zip")["rejected"] == {"unreadable": 1}
    assert Store(tmp_path / "x.zip.store").ids == ["b", "b~2"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x", None, "holds neither manifest.json nor a file that ends in .cif"),
        ("x", {"a.txt": "", "b.pdf": ""}, "holds neither manifest.json nor a file that ends in .cif"),
        ("x", {"a.cif": "nothing"}, "none of 1 structures can be read (1 not-cif); the first, a:"),
        ("x.pdb", "ATOM", "a file of unknown kind; want a run folder or a store; or, of another generator"),
        ("x.csv", "", "columns none; want one of cif_string, cif"),
        ("x.csv", "id,energy\na,1\n", "columns id, energy; want one of cif_string, cif"),
        ("x.csv", "id,cif\n", "holds no rows"),
        ("x.csv", 'id,cif\na,"data_\n', "line 2: cannot be read as CSV (unexpected end of data)"),
        ("x.csv.gz", "id,cif\n", "cannot be unpacked (Not a gzipped file"),
        ("x.extxyz", "\n \n", "holds no frames"),
        ("x.extxyz", "1\nLattice\nH 0 0 0\n\nH 1 1 1\n", "line 5: 'H 1 1 1', want the number of atoms"),
        ("x.zip", "PK", "cannot be read as a zip archive"),
        ("nowhere", "", "is no folder"),
    ],
)
def test_what_nobody_understands(
    tmp_path: Path, name: str, content: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / name
    if isinstance(content, str) and name != "nowhere":
        given.write_text(content)
    elif name != "nowhere":
        given.mkdir()
        for file, text in (content or {}).items():
            (given / file).write_text(text)
    assert cli.main(["evaluate", str(given), "--processes", "0"]) == 4
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hpcgen: ")]
    assert len(err) == 1 and told in err[0]
    assert not list(tmp_path.rglob("generate.*"))


def test_a_zip_without_cifs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "")
    assert cli.main(["evaluate", str(tmp_path / "x.zip")]) == 4
    assert "holds no file that ends in .cif" in capsys.readouterr().err


# ---- where it goes, again and again ----------------------------------------------------------------------------------


def cifs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for k in range(count):
        (folder / f"{k:03d}.cif").write_text(cif(special()["NaCl"], f"x{k}"))
    return folder


def test_beside_the_file_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = cifs(tmp_path / "cifs", 3)
    words = ["evaluate", str(given), "--processes", "0", "--json"]
    assert cli.main([*words, str(tmp_path / "mine" / "figures.json")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifs", "mine"]
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["cifs.store", "figures.csv", "figures.json"]
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    assert cli.main([*words, str(tmp_path / "file" / "figures.json")]) == 7
    assert "with --json FILE the crystals are read into a folder beside FILE" in capsys.readouterr().err
    place = tmp_path / "cifs.store"
    place.mkdir()
    (place / "thesis.tex").write_text("")
    assert cli.main(words[:-1]) == 2
    assert "holds 'thesis.tex', want a new folder" in capsys.readouterr().err
    (place / "thesis.tex").rename(tmp_path / "thesis.tex")
    place.rmdir()
    place.write_text("")
    assert cli.main(words[:-1]) == 2
    assert "is a file" in capsys.readouterr().err


def test_read_once_and_anew_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, parsed = cifs(tmp_path / "cifs", 3), []
    real = adopt.ReadBlock._parsed

    def counted(self: adopt.ReadBlock, raw: Any, culprit: str | None) -> Crystals:
        parsed.append(raw.id)
        return real(self, raw, culprit)

    monkeypatch.setattr(adopt.ReadBlock, "_parsed", counted)
    assert evaluated(given)["asked"] == 3
    first = capsys.readouterr().out
    evaluated(given)
    assert parsed == ["000", "001", "002"] and capsys.readouterr().out == first
    assert cli.main(["evaluate", str(given / ".." / "cifs"), "--processes", "0", "--seed", "1"]) == 0
    assert len(parsed) == 3, "the same folder by another name, other settings"
    (given / "new.cif").write_text("no crystal")
    told = evaluated(given)
    assert (told["asked"], told["written"], told["rejected"]) == (4, 3, {"not-cif": 1}) and len(parsed) == 7
    assert sorted(path.name for path in (tmp_path / "cifs.store").iterdir()) == [
        "all-00000.h5", "evaluate", "events.jsonl", "manifest.json", f"read-{state_of(given)}.json", "rejects.csv",
        "summary.json",
    ]  # fmt: skip


def test_it_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, begun = cifs(tmp_path / "cifs", 12), []
    monkeypatch.setattr(adopt, "rows_per_block", lambda count, predicts: 5)
    real = adopt.ReadBlock.__call__

    def interrupted(self: adopt.ReadBlock, block: Any, draft: Path, cursor: Any) -> Any:
        begun.append(block.index)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(self, block, draft, cursor)

    monkeypatch.setattr(adopt.ReadBlock, "__call__", interrupted)
    words = ["evaluate", str(given), "--processes", "0"]
    assert cli.main(words) == 75
    assert "goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "cifs.store" / "manifest.json").exists()
    assert describe(tmp_path / "cifs.store").state != "done"
    assert cli.main(words) == 0
    assert len(begun) == 4 and set(begun) == {0, 1, 2}
    assert Store(tmp_path / "cifs.store").ids == [f"{k:03d}" for k in range(12)]
    assert not (tmp_path / "cifs.store" / "reading").exists()
    status = describe(tmp_path / "cifs.store")
    assert status.state == "done" and status.progress is not None
    assert (status.progress.done, status.progress.total) == (3, 3)


def test_a_structure_that_hangs_or_crashes_costs_itself_alone(tmp_path: Path) -> None:
    given = cifs(tmp_path / "cifs", 4)
    reader = adopt.CifFolder(given)
    reader.index().save(tmp_path / "index.npz")
    cursor = adopt.Cursor([0] * 4, lambda: None, tmp_path / "keep")
    cursor.culprits = {1: "timeout", 3: "crash"}
    work = adopt.ReadBlock(reader, tmp_path / "index.npz", Head("foreign"), 4)
    assert work(adopt.Block(0, tmp_path / "all-00000.h5", 4), tmp_path / "draft", cursor) == {
        "crystals": 2, "refused": 2,
    }  # fmt: skip
    assert [(r.id, r.code) for r in adopt.read_refusals(tmp_path / "draft")] == [("001", "timeout"), ("003", "crash")]


def test_a_change_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = cifs(tmp_path / "cifs", 2)
    real = adopt.ReadBlock._parsed

    def late(self: adopt.ReadBlock, raw: Any, culprit: str | None) -> Crystals:
        (given / "late.cif").write_text(cif(special()["fcc"]))
        return real(self, raw, culprit)

    monkeypatch.setattr(adopt.ReadBlock, "_parsed", late)
    assert cli.main(["evaluate", str(given), "--processes", "0"]) == 4
    monkeypatch.undo()
    assert evaluated(given)["asked"] == 3


def test_a_job_has_its_folder_where_the_crystals_are_read_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = cifs(tmp_path / "cifs", 1)
    assert cli.main(["submit", "evaluate", str(given), "--dry-run"]) == 0
    assert f"{tmp_path / 'cifs.store'}" in capsys.readouterr().out
    assert cli.main(["submit", "evaluate", str(given), "--json", str(tmp_path / "b" / "x.json"), "--dry-run"]) == 0
    assert f"{tmp_path / 'b' / 'cifs.store'}" in capsys.readouterr().out
    (given / "events.jsonl").write_text("")  # an unfinished run
    assert kind_of(given) is None
    assert cli.main(["submit", "evaluate", str(given), "--dry-run"]) == 0
    assert "cifs.store" not in capsys.readouterr().out


def test_workers_and_ranks_read_the_same(tmp_path: Path) -> None:
    given = cifs(tmp_path / "cifs", 5)
    (given / "bad.cif").write_text("no crystal")
    made = [adopted(given, tmp_path / name / "x.json", find_team(), count) for name, count in (("a", 0), ("b", 2))]
    for name in ("all-00000.h5", "rejects.csv", "summary.json", "manifest.json"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes()


@pytest.mark.mpi
def test_ranks_of_mpi_share_the_reading(tmp_path: Path) -> None:
    given = cifs(tmp_path / "cifs", 5)
    command = [sys.executable, "-m", "hpcgen.cli", "evaluate", str(given), "--processes", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(campaign_jobs.ROOT)}
    mpi = [str(Path(sys.executable).parent / "mpiexec"), "-n", "2"]
    ended = subprocess.run([*mpi, *command], env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("task          generate") == 1, "one rank speaks"
    assert not (tmp_path / "cifs.store" / "reading").exists()


@pytest.mark.skipif(not REAL.exists(), reason="no real crystals in ../shared/data")
def test_a_table_of_real_crystals(tmp_path: Path) -> None:
    with gzip.open(REAL, "rt", newline="") as source:
        rows = [row for row, _ in zip(csv.reader(source), range(101), strict=False)]
    with gzip.open(tmp_path / "real.csv.gz", "wt", newline="") as few:
        csv.writer(few).writerows(rows)
    told = evaluated(tmp_path / "real.csv.gz")
    assert (told["asked"], told["written"]) == (100, 100)
    assert told["figures"]["validity"]["radii"]["share"] == 1.0
    store, at = Store(tmp_path / "real.csv.gz.store", dtype=None), rows[0].index("e_above_hull")
    assert store.ids == [row[rows[0].index("material_id")] for row in rows[1:]]
    assert store.column("e_above_hull").values.tolist() == [float(row[at]) for row in rows[1:]]


# ---- names -----------------------------------------------------------------------------------------------------------


def test_ids_that_no_two_share() -> None:
    made = distinct(["a", "a", "a~2", "a", "", " ", "b\0", "\udcff"], "row")
    assert made == ["a", "a~2", "a~2~2", "a~3", "row-4", "row-5", "b", "\\udcff"]
    assert len(set(distinct(["a"] * 1000, "row"))) == 1000


def test_words_of_a_comment() -> None:
    comment = b'Lattice="1 0 0 0 1 0 0 0 1" pbc="T T T" id="a \\"b\\" id=x" energy=-1.5 flag name=\xff'
    words = words_of(comment)
    assert words["id"] == 'a "b" id=x' and words["energy"] == "-1.5" and words["name"] == "\ufffd"
