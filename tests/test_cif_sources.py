"""Folders of CIF files and ICSD exports, by the scripts a user runs. The ICSD-like files are synthetic."""

import csv
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cif_texts import cubic, p1_cif

from hpcgen.store.layout import read_manifest
from hpcgen.store.read import Store

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = """loop_
_symmetry_equiv_pos_site_id
_symmetry_equiv_pos_as_xyz
1 'x, y, z'
2 '-x, -y, z'
3 '-x, y, -z'
4 'x, -y, -z'
"""


def icsd_cif(code: int | None, length: float, sites: str, year: int = 1999, kelvin: str = "293.") -> str:
    """A file in the manner of an ICSD export (synthetic)."""
    known = f"_database_code_ICSD {code}\n" if code else ""
    return f"""#(C) synthetic, in the manner of an export
data_{code}-ICSD
{known}_chemical_name_common 'a test'
loop_
_citation_id
_citation_journal_abbrev
_citation_year
primary 'Acta Testica B (24,1968-38,1982)' {year}
_cell_measurement_temperature {kelvin}
_cell_length_a {length}(2)
_cell_length_b {length}(2)
_cell_length_c {length}(2)
_cell_angle_alpha 90.
_cell_angle_beta 90.
_cell_angle_gamma 90.
_symmetry_space_group_name_H-M 'P 2 2 2'
_symmetry_Int_Tables_number 16
{OPERATIONS}loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{sites}"""


NACL = "Na1 Na1+ 0 0 0 1.\nCl1 Cl1- 0.5 0.5 0.5 1.\n"
MIXED = "Na1 Na1+ 0 0 0 0.75\nK1 K1+ 0 0 0 0.25\nCl1 Cl1- 0.5 0.5 0.5 1.\n"
HEAVY = "D1 D 0 0 0 1.\nLi1 Li1+ 0.5 0.5 0.5 1.\n"


def run(script: str, inputs: list[Path], out: Path, *options: str, check: int = 0) -> str:
    command = [sys.executable, str(ROOT / "preprocess" / script), *map(str, inputs), "--out", str(out), "--no-page"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == check, done.stderr
    return done.stderr


def rejects(store: Path) -> Counter[str]:
    with (store / "rejects.csv").open() as file:
        return Counter(row["code"] for row in csv.DictReader(file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cifs = tmp_path / "cifs"
    (cifs / "deep").mkdir(parents=True)
    (cifs / "nacl.cif").write_text(cubic("rocksalt", "Na", "Cl"))
    (cifs / "deep" / "cscl.cif.gz").write_bytes(gzip.compress(cubic("caesium", "Rb", "Cl").encode()))
    (cifs / "two.cif").write_text(
        cubic("zincblende", "Zn", "S").replace("data_x", "data_first")
        + cubic("rocksalt", "Mg", "O").replace("data_x", "data_second")
    )
    (cifs / "latin.cif").write_bytes(b"# M\xfcller\n" + cubic("rocksalt", "Li", "F").encode())
    (cifs / "broken.cif").write_text("data_\n_cell_length_a 4\n")
    (cifs / "empty.cif").write_text("")
    (cifs / "prose.cif").write_text("hello world")
    (cifs / "bytes.cif").write_bytes(bytes(range(256)))
    (cifs / "torn.cif.gz").write_bytes(gzip.compress(cubic("caesium", "K", "Br").encode() * 9)[:-30])
    zipped = bytearray(gzip.compress(cubic("caesium", "K", "I").encode()))
    zipped[20:40] = bytes(20)
    (cifs / "flipped.cif.gz").write_bytes(bytes(zipped))
    (cifs / "notes.txt").write_text("not for us")
    (cifs / "deep" / "nacl.cif").write_text(cubic("rocksalt", "K", "Cl"))
    return cifs


def test_a_folder_of_cifs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("id,band_gap\nnacl,5.0\nlatin,\n")
    run("cif_folder.py", [folder], tmp_path / "store", "--properties", str(tmp_path / "p.csv"), "--split", "none")
    store = Store(tmp_path / "store")
    assert sorted(store.ids) == ["cscl", "deep/nacl", "latin", "nacl", "two-first", "two-second"]
    gaps = dict(zip(store.ids, store.column("band_gap").values.tolist(), strict=True))
    assert gaps["nacl"] == 5.0 and gaps["latin"] != gaps["latin"]
    with (tmp_path / "store" / "rejects.csv").open() as file:
        codes = {row["id"]: row["code"] for row in csv.DictReader(file)}
    assert set(codes) == {"broken", "empty", "prose", "bytes", "torn", "flipped"}
    assert codes["empty"] == "empty" and codes["prose"] == "not-cif" and codes["torn"] == "unreadable"


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (lambda path: None, 4, "no such file or folder"),
        (lambda path: path.mkdir(), 4, "holds no file"),
    ],
)
def test_no_cifs_to_read(tmp_path: Path, make, code: int, says: str) -> None:
    make(tmp_path / "in")
    assert says in run("cif_folder.py", [tmp_path / "in"], tmp_path / "store", check=code)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id,band_gap\nnacl,wide\n", "line 2: band_gap is 'wide', want a number"),
        ("id,band_gap\nnacl,1,2\n", "line 2: 3 cells, want 2"),
        ("id,band gap\nnacl,1\n", "column name 'band gap'"),
        ("id,space_group\nnacl,1\n", "space_group is made by hpcgen itself"),
        ("id,disordered\nnacl,1\n", "disordered is made by hpcgen itself"),
    ],
)
def test_broken_properties_are_named(folder: Path, tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "p.csv").write_text(text)
    told = run("cif_folder.py", [folder], tmp_path / "s", "--properties", str(tmp_path / "p.csv"), check=4)
    assert "p.csv" in told and says in told and "Traceback" not in told


@pytest.fixture
def export(tmp_path: Path) -> Path:
    files = tmp_path / "icsd"
    files.mkdir()
    (files / "a.cif").write_text(icsd_cif(1001, 3.51, NACL))
    (files / "b.cif").write_text(icsd_cif(1002, 3.62, MIXED, 2004))
    (files / "c.cif").write_text(icsd_cif(1001, 3.70, NACL))  # a collection code that was there already
    (files / "d.cif").write_text(icsd_cif(1004, 4.09, HEAVY, kelvin="."))
    return files


@pytest.mark.parametrize(
    ("policy", "ids", "refused"),
    [
        ("drop", {"icsd-1001", "icsd-1004"}, {"disordered": 1, "duplicate-id": 1}),
        ("majority", {"icsd-1001", "icsd-1002", "icsd-1004"}, {"duplicate-id": 1}),
    ],
)
def test_an_icsd_export(export: Path, tmp_path: Path, policy: str, ids: set[str], refused: dict) -> None:
    out = tmp_path / "store"
    run("icsd.py", [export], out, "--disorder", policy, "--split", "none", "--duplicates", "ignore")
    store = Store(out)
    assert set(store.ids) == ids and rejects(out) == refused
    marks = json.loads((out / "build.json").read_text())["counts"]["marked"]
    assert marks == {"disordered": int(policy == "majority"), "deuterium": 1}
    years = dict(zip(store.ids, store.column("publication_year").values.tolist(), strict=True))
    assert years["icsd-1001"] == 1999
    kelvin = store.column("temperature")
    assert kelvin.spec.unit == "K"
    assert dict(zip(store.ids, kelvin.missing.tolist(), strict=True)) == {name: name == "icsd-1004" for name in ids}


def test_orderings_of_a_mixed_site(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    run("icsd.py", [export], out, "--disorder", "order:3", "--split", "none", "--duplicates", "ignore")
    store = Store(out)
    made = [i for i, name in enumerate(store.ids) if name.startswith("icsd-1002")]
    assert 1 <= len(made) <= 3
    run(
        "icsd.py",
        [export],
        tmp_path / "split",
        "--disorder",
        "order:3",
        "--split",
        "0.4,0.3,0.3",
        "--duplicates",
        "ignore",
    )
    present = {shard.split for shard in read_manifest(tmp_path / "split").shards}
    sides = [s for s in present for name in Store(tmp_path / "split", s).ids if name.startswith("icsd-1002")]
    assert len(sides) == len(made) and len(set(sides)) == 1, "orderings of one structure on two sides of the split"
    for i in made:
        numbers = Counter(store[i].crystals.atomic_numbers.tolist())
        assert numbers[11] == 3 * numbers[19] and numbers[17] == numbers[11] + numbers[19]


def test_a_wrong_policy_is_named(export: Path, tmp_path: Path) -> None:
    assert "order:0" in run("icsd.py", [export], tmp_path / "s", "--disorder", "order:0", check=2)


def test_overlapping_atoms_are_refused(tmp_path: Path) -> None:
    cifs = tmp_path / "cifs"
    cifs.mkdir()
    (cifs / "good.cif").write_text(cubic("rocksalt", "Na", "Cl"))
    (cifs / "close.cif").write_text(p1_cif((4, 4, 4), (90, 90, 90), [("Na", (0, 0, 0)), ("Cl", (0.05, 0, 0))]))
    run("cif_folder.py", [cifs], tmp_path / "store", "--split", "none")
    assert rejects(tmp_path / "store") == {"atoms-too-close": 1}
