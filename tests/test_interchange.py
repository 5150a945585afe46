"""What `hpcgen export` writes is read as the evaluators of other generators read it, and is the same crystals."""

import csv
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import GAPS, IDS, known, right_handed, run, same_crystal

from hpcgen.crystal.convert import from_pymatgen, to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.errors import UsageError
from hpcgen.store import export as export_module
from hpcgen.store import writers
from hpcgen.store.export import Request, export

__all__ = ["run"]  # a fixture
ARRAYS = ("frac_coords", "atom_types", "lengths", "angles", "num_atoms")


def structures(data: dict[str, Any]) -> list[Any]:
    """Crystals of arrays as CDVAE's and DiffCSP's evaluation builds them, with their checks of the shapes."""
    from pymatgen.core import Lattice, Structure

    frac, types, lengths, angles, counts = (data[name] for name in ARRAYS)
    assert frac.size(0) == types.size(0) == counts.sum()
    assert lengths.size(0) == angles.size(0) == counts.size(0)
    made, start = [], 0
    for k, count in enumerate(counts.tolist()):
        lattice = Lattice.from_parameters(*lengths[k].numpy().tolist(), *angles[k].numpy().tolist())
        species = types.narrow(0, start, count).numpy()
        made.append(Structure(lattice, species, frac.narrow(0, start, count).numpy()))
        start += count
    return made


def same_as_known(found: list[Any], tolerance: float = 1e-8) -> None:
    wanted = known().crystals
    assert len(found) == len(wanted)
    for k, structure in enumerate(found):
        same_crystal(from_pymatgen([structure]), right_handed(wanted[k]), tolerance)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ---- LeMat-GenBench ------------------------------------------------------------------------------------------------


def test_a_folder_of_cifs_for_lemat_genbench(run: Path, tmp_path: Path) -> None:
    from pymatgen.core import Structure

    export(Request(run, "cif", tmp_path / "out"))
    found = {path.name: Structure.from_file(str(path)) for path in (tmp_path / "out").rglob("*.cif")}
    index = table(tmp_path / "out" / "index.csv")
    assert [row["id"] for row in index] == IDS
    same_as_known([found[row["file"]] for row in index])


def test_a_csv_for_lemat_genbench(run: Path, tmp_path: Path) -> None:
    import pandas as pd
    from pymatgen.core import Structure

    export(Request(run, "csv", tmp_path / "out"))
    frame = pd.read_csv(tmp_path / "out" / "crystals.csv")
    column = next(name for name in ("structure", "LeMatStructs", "cif_string") if name in frame.columns)
    assert not {"structural_validity", "smact_validity"} & set(frame.columns)  # it would leave rows out by them
    assert frame["id"].astype(str).tolist() == IDS and not frame[column].isna().any()
    same_as_known([Structure.from_str(text, fmt="cif") for text in frame[column]])


# ---- MatterGen -----------------------------------------------------------------------------------------------------


def test_extxyz_for_mattergen(run: Path, tmp_path: Path) -> None:
    import ase.io
    from pymatgen.io.ase import AseAtomsAdaptor

    export(Request(run, "extxyz", tmp_path / "out"))
    (file,) = (tmp_path / "out").iterdir()
    assert file.suffix == ".extxyz"
    found = [AseAtomsAdaptor.get_structure(atoms) for atoms in ase.io.read(file, ":")]
    for k, structure in enumerate(found):
        same_crystal(from_pymatgen([structure]), known().crystals[k], 1e-8)


def test_a_zip_of_cifs_for_mattergen(run: Path, tmp_path: Path) -> None:
    from pymatgen.core import Structure

    assert export(Request(run, "zip", tmp_path / "out")) == 7
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["crystals.zip", "index.csv"]
    with zipfile.ZipFile(tmp_path / "out" / "crystals.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "within")
    names = [path.name for path in (tmp_path / "within").iterdir() if path.suffix == ".cif"]  # it looks no deeper
    index = table(tmp_path / "out" / "index.csv")
    assert [row["id"] for row in index] == IDS and [row["band_gap"] for row in index][0] == str(GAPS[0])
    assert sorted(names) == sorted(row["file"] for row in index)
    same_as_known([Structure.from_file(str(tmp_path / "within" / row["file"])) for row in index])
    export(Request(run, "cif", tmp_path / "cifs"))
    for name in names:
        assert (tmp_path / "within" / name).read_bytes() == (tmp_path / "cifs" / name).read_bytes()


def test_a_zip_holds_more_than_a_folder_may(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "MOST_FILES", 6)
    with pytest.raises(UsageError, match="or --format zip"):
        export(Request(run, "cif", tmp_path / "out"))
    assert export(Request(run, "zip", tmp_path / "out", top=3, symprec=0.01)) == 3
    export(Request(run, "zip", tmp_path / "again", top=3, symprec=0.01))
    one, other = (tmp_path / name / "crystals.zip" for name in ("out", "again"))
    assert one.read_bytes() == other.read_bytes()
    with zipfile.ZipFile(one) as archive:
        assert b"Fm-3m" in archive.read("mp-1.cif")


# ---- CDVAE, DiffCSP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["cdvae", "diffcsp"])
def test_arrays(run: Path, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "CHUNK", 3)
    assert export(Request(run, format, tmp_path / "out")) == 7
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval_gen.pt", "index.csv"]
    data = torch.load(tmp_path / "out" / "eval_gen.pt", weights_only=True)
    assert set(data) == set(ARRAYS)
    if format == "cdvae":
        assert all(len(data[name]) == 1 for name in ARRAYS)
        data = {name: data[name][0] for name in ARRAYS}
    assert data["atom_types"].dtype == data["num_atoms"].dtype == torch.int64
    found = structures(data)
    same_as_known(found)
    for structure, wanted in zip(found, to_pymatgen(known().crystals), strict=True):
        assert structure.composition == wanted.composition
        assert np.allclose(structure.lattice.parameters, wanted.lattice.parameters, atol=1e-10)
        assert np.allclose(structure.distance_matrix, wanted.distance_matrix, atol=1e-8)
    index = table(tmp_path / "out" / "index.csv")
    assert [row["id"] for row in index] == IDS and [row["place"] for row in index] == list("0123456")


def test_arrays_of_the_best(run: Path, tmp_path: Path) -> None:
    request = Request(run, "diffcsp", tmp_path / "out", where="num_atoms > 1", top=2, by="-band_gap")
    assert export(request) == 2
    assert [row["id"] for row in table(tmp_path / "out" / "index.csv")] == [IDS[2], IDS[3]]
    data = torch.load(tmp_path / "out" / "eval_gen.pt", weights_only=True)
    wanted = Crystals.cat([known().crystals[2], known().crystals[3]])
    assert torch.equal(data["atom_types"], wanted.atomic_numbers) and data["num_atoms"].tolist() == [8, 2]


def test_a_failure_leaves_no_part(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writers, "reduced_formula", full)
    for format in ("zip", "cdvae"):
        with pytest.raises(Exception, match="cannot write"):
            export(Request(run, format, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
