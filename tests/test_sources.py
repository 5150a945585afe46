"""Sources beside the CIF files: prototypes, the Materials Project, C2DB. All documents here are synthetic."""

import gzip
import json
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
import torch

from hpcgen.crystal.composition import SYMBOLS, parse_formula
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.refused import Refused
from hpcgen.errors import InputError, SiteError, UsageError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "preprocess"))

import c2db  # noqa: E402
import materials_project as mp  # noqa: E402
import prototypes  # noqa: E402

# --- prototypes


@pytest.mark.parametrize("key", [(0,), (1,), (7, 2, 3)])
def test_shuffled_is_a_permutation(key: tuple[int, ...]) -> None:
    for size in [*range(1, 70), 1000]:
        assert sorted(prototypes.shuffled(place, size, *key) for place in range(size)) == list(range(size))
    assert [prototypes.shuffled(place, 1000, *key) for place in range(1000)] != list(range(1000))


@pytest.mark.slow
def test_a_row_is_a_function_of_seed_and_number() -> None:
    source = prototypes.Prototypes(3000, seed=5)
    everything = list(source.rows(0, 3000))
    assert [raw.id for raw in source.rows(1234, 1300)] == [raw.id for raw in everything[1234:1300]]
    longer = pickle.loads(pickle.dumps(prototypes.Prototypes(5000, seed=5)))
    assert [raw.body for raw in longer.rows(2990, 3000)] == [raw.body for raw in everything[2990:]]
    other = list(prototypes.Prototypes(3000, seed=6).rows(0, 3000))
    assert sum(a.body == b.body for a, b in zip(everything, other, strict=True)) < 30
    assert [raw.id for raw in source.rows(2995, 9000)] == [raw.id for raw in everything[2995:]]


def test_no_decoration_comes_twice_and_prototypes_take_turns() -> None:
    rows = list(prototypes.Prototypes(20_000).rows(0, 20_000))
    assert len({raw.body for raw in rows}) == len({raw.id for raw in rows}) == 20_000
    plan = prototypes._plan(20)
    first = [raw.body[0] for raw in rows[: len(plan.prototypes)]]
    assert sorted(first) == list(range(len(plan.prototypes)))  # each once before any comes again
    assert len(plan.prototypes) > 200


def test_every_row_of_a_small_library_is_another_one() -> None:
    """To the very last decoration: rounds, drop-outs and shuffles add up to a bijection."""
    plan = prototypes._plan(2)
    size = prototypes.Prototypes(plan.capacity, cell_atoms=2).size()
    assert len({plan.decoration(3, row) for row in range(size)}) == size
    with pytest.raises(UsageError, match=f"have {size} decorations"):
        prototypes.Prototypes(size + 1, cell_atoms=2).size()


def states(number: int, anion: bool) -> set[int]:
    from pymatgen.core import Element

    element = Element.from_Z(number)
    every = {*element.common_oxidation_states, *element.icsd_oxidation_states, -4}
    return {state for state in every if (state < 0) == anion and state != 0}


def test_decorations_are_balanced_or_metals_or_elements() -> None:
    plan, kinds = prototypes._plan(20), {"element": 0, "metals": 0, "balanced": 0}
    for raw in prototypes.Prototypes(1500).rows(0, 1500):
        which, numbers = raw.body
        prototype = plan.prototypes[which]
        assert len(set(numbers)) == len(numbers) == len(prototype.counts)
        metals = [not prototypes._rank(number)[0] for number in numbers]
        if len(numbers) == 1:
            kinds["element"] += 1
        elif all(not prototypes._rank(number)[0] for number in prototype.elements):
            assert all(metals)
            kinds["metals"] += 1
        else:
            assert can_balance(numbers, prototype.counts), raw.id
            kinds["balanced"] += 1
    assert min(kinds.values()) > 50 and kinds["element"] < 200, kinds


def can_balance(numbers: tuple[int, ...], counts: tuple[int, ...]) -> bool:
    """Some first elements as cations, the others as anions, each in a state that it is known in."""
    for cations in range(1, len(numbers)):
        choices = [states(number, place >= cations) for place, number in enumerate(numbers)]
        if any(np.dot(charges, counts) == 0 for charges in product(*choices)):
            return True
    return False


def test_the_check_of_balance_is_able_to_fail() -> None:
    assert can_balance((11, 17), (4, 4)) and not can_balance((11, 17), (1, 2)) and not can_balance((11, 12), (1, 1))


@pytest.mark.filterwarnings("ignore")
def test_volumes_are_those_of_pymatgen() -> None:
    from pymatgen.analysis.structure_prediction.volume_predictor import DLSVolumePredictor

    predictor = DLSVolumePredictor(cutoff=4.0, min_scaling=None, max_scaling=None)
    source = prototypes.Prototypes(236)
    for raw in list(source.rows(0, 236))[::4]:
        crystal = source.parse(raw)[0].crystal
        volume = float(crystal.volume[0])
        assert predictor.predict(to_pymatgen(crystal)[0]) == pytest.approx(volume, rel=1e-5), raw.id
        assert 1.5 < volume / int(crystal.num_atoms[0]) < 200, raw.id


def test_a_decorated_prototype_keeps_its_sites_and_shape() -> None:
    source, plan = prototypes.Prototypes(60), prototypes._plan(20)
    for raw in source.rows(0, 60):
        (parsed,) = source.parse(raw)
        prototype, crystal = plan.prototypes[raw.body[0]], parsed.crystal
        assert torch.equal(crystal.frac_coords, prototype.crystal.frac_coords)
        ratio = crystal.lattice / prototype.crystal.lattice
        assert torch.allclose(ratio[ratio.isfinite()], ratio[ratio.isfinite()][0])
        assert crystal.frac_coords.dtype == crystal.lattice.dtype == torch.float64
        label, formula, row = raw.id.removeprefix("proto-").split("-")
        counts = parse_formula(formula)
        units = prototype.formula_units
        held = {SYMBOLS[z]: n // units for z, n in zip(raw.body[1], prototype.counts, strict=True)}
        assert raw.columns == {"prototype": label} and counts == held and 0 <= int(row) < 60


def test_perovskite_is_decorated_as_a_chemist_would() -> None:
    plan = prototypes._plan(20)
    which = next(n for n, p in enumerate(plan.prototypes) if p.label == "AB3C_cP5_221_a_c_b")
    found = {tuple(SYMBOLS[z] for z in numbers) for numbers in plan.decorations[which].tolist()}
    assert {("Ba", "Ti", "O"), ("Sr", "Ti", "O"), ("Cs", "Pb", "I"), ("La", "Al", "O")} <= found
    assert not [names for names in found if names[2] in {"Na", "Ti", "Fe"}]
    assert ("Ti", "Ba", "O") not in found and ("Na", "K", "O") not in found


IMPOSSIBLE = [(0, 20, "--n 0"), (10, 0, "--cell-atoms 0"), (10**8, 20, "decorations")]


@pytest.mark.parametrize(("n", "cell_atoms", "says"), IMPOSSIBLE)
def test_prototypes_refuse(n: int, cell_atoms: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        prototypes.Prototypes(n, cell_atoms=cell_atoms).size()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["prototypes", "c2db"])
def test_the_script_builds_a_store(script: str, tmp_path: Path) -> None:
    """Its source is a class of `__main__`, which worker processes must be able to read again."""
    from ase.db import connect

    with connect(tmp_path / "layers.db") as database:
        for gap in range(3):
            database.write(layer(), uid=f"layer-{gap}", gap=float(gap))
    given = {"prototypes": ["--n", "12", "--cell-atoms", "4"], "c2db": [str(tmp_path / "layers.db")]}[script]
    file = Path(prototypes.__file__).with_name(f"{script}.py")
    command = [sys.executable, file, *given, "--out", tmp_path / "store", "--processes", "2", "--no-page"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "store" / "manifest.json").exists()


# --- Materials Project


def rock_salt(a: float = 5.6) -> Any:
    from pymatgen.core import Lattice, Structure

    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def plain_document(name: str, **more: Any) -> dict[str, Any]:
    """A synthetic document as the client gives it without its model."""
    told = {"material_id": name, "deprecated": False, "structure": rock_salt().as_dict(), "energy_above_hull": 0.01,
            "formation_energy_per_atom": -2.1, "energy_per_atom": -3.3, "band_gap": 5.0, "theoretical": False,
            "total_magnetization_normalized_vol": 0.0, "bulk_modulus": {"voigt": 24.0, "reuss": 23.0, "vrh": 23.5},
            "shear_modulus": None}  # fmt: skip
    return {**told, **more}


def write_pages(
    folder: Path, documents: list[dict[str, Any]], ids: list[str], *, deprecated: tuple[str, ...] = ()
) -> None:
    folder.mkdir()
    index = {"query": {}, "page_size": 2, "ids": ids, "deprecated": list(deprecated)}
    (folder / "index.json").write_text(json.dumps(index))
    for page in range((len(ids) + 1) // 2):
        here = {d["material_id"]: d for d in documents if d["material_id"] in ids[2 * page : 2 * page + 2]}
        with gzip.open(folder / f"page-{page:05d}.json.gz", "wt") as text:
            json.dump(here, text)


def test_complete_pages_need_neither_key_nor_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MP_API_KEY", raising=False)
    documents = [
        plain_document("mp-1"),
        plain_document("mp-2", deprecated=True),
        plain_document("mp-4", structure=None),
        plain_document("mp-5", energy_above_hull=None, band_gap=float("nan"), theoretical=None, bulk_modulus=None),
    ]
    write_pages(tmp_path / "pages", documents, [f"mp-{n}" for n in range(1, 6)], deprecated=("mp-9",))
    source = pickle.loads(pickle.dumps(mp.MaterialsProject(tmp_path / "pages")))
    assert source.size() == 6
    rows = list(source.rows(0, 6))
    assert [raw.id for raw in rows] == [f"mp-{n}" for n in (1, 2, 3, 4, 5, 9)]
    assert [raw.fault and raw.fault[0] for raw in rows] == [
        None, "deprecated", "not-delivered", "no-structure", None, "deprecated"
    ]  # fmt: skip
    assert [raw.id for raw in source.rows(3, 5)] == ["mp-4", "mp-5"]
    assert rows[0].columns == {
        "e_above_hull": 0.01, "formation_energy_per_atom": -2.1, "energy_per_atom": -3.3, "band_gap": 5.0,
        "theoretical": False, "magnetization_per_volume": 0.0, "bulk_modulus": 23.5, "shear_modulus": None,
    }  # fmt: skip
    assert set(rows[0].columns) == set(source.columns)
    missing = [rows[4].columns[name] for name in ("e_above_hull", "band_gap", "theoretical", "bulk_modulus")]
    assert missing == [None] * 4
    (parsed,) = source.parse(rows[0])
    assert parsed.id == "mp-1" and len(parsed.crystal) == 1
    assert to_pymatgen(parsed.crystal)[0] == rock_salt()


def test_a_disordered_document_is_refused(tmp_path: Path) -> None:
    structure = rock_salt()
    structure[0] = {"Na": 0.5, "K": 0.5}
    write_pages(tmp_path / "pages", [plain_document("mp-1", structure=structure.as_dict())], ["mp-1"])
    source = mp.MaterialsProject(tmp_path / "pages")
    with pytest.raises(Refused, match="disordered"):
        source.parse(next(source.rows(0, 1)))


def test_a_broken_page_and_another_query_are_named(tmp_path: Path) -> None:
    write_pages(tmp_path / "pages", [plain_document("mp-1")], ["mp-1"])
    with pytest.raises(UsageError, match="was fetched for"):
        mp.MaterialsProject(tmp_path / "pages", {"elements": ["Li"]}).size()
    (tmp_path / "pages" / "page-00000.json.gz").write_bytes(b"\x1f\x8b no gzip")
    with pytest.raises(InputError, match="page-00000"):
        next(mp.MaterialsProject(tmp_path / "pages").rows(0, 1))
    (tmp_path / "pages" / "index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index\.json"):
        mp.MaterialsProject(tmp_path / "pages").size()


def test_without_a_key_the_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MP_API_KEY", raising=False)
    with pytest.raises(UsageError, match="MP_API_KEY"):
        mp.MaterialsProject(tmp_path / "pages").size()


def test_without_the_client_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MP_API_KEY", "0" * 32)
    monkeypatch.setitem(sys.modules, "mp_api.client", None)
    with pytest.raises(SiteError, match=r"\[materials-project\]"):
        mp.MaterialsProject(tmp_path / "pages").size()


class Server(ThreadingHTTPServer):
    """Answers the client's own requests on this machine, with documents made by the client's own classes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.documents: dict[str, dict] = {}
        self.faults: list[int] = []  # status of the next answers, 0 for a good one
        self.pages: list[list[str]] = []  # ids asked for, of good answers
        self.listings: list[dict[str, list[str]]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = urlparse(self.path)
        if asked.path.endswith("heartbeat"):
            return self._send(200, {"db_version": "2026.04.01", "access_controlled_batch_ids": [], "version": "99.0.0"})
        status = self.server.faults.pop(0) if self.server.faults else 0
        if status:
            return self._send(status, {"detail": "made up"})
        return self._send(200, self._answer(parse_qs(asked.query)))

    def _answer(self, query: dict[str, list[str]]) -> dict[str, Any]:
        documents, gone = self.server.documents, query.get("deprecated", [""])[0] == "True"
        if "material_ids" in query:
            wanted = query["material_ids"][0].split(",")
            self.server.pages.append(wanted)
            found = [documents[name] for name in wanted if name in documents]
        else:
            self.server.listings.append(query)
            found = [document for document in documents.values() if document["deprecated"] == gone]
        first, most = int(query.get("_skip", ["0"])[0]), int(query["_limit"][0])
        fields = query["_fields"][0].split(",")
        data = [{name: document[name] for name in fields} for document in found[first : first + most]]
        return {"data": data, "meta": {"total_doc": len(found)}}

    def _send(self, status: int, told: dict[str, Any]) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@cache
def client_document(name: str, deprecated: bool) -> dict[str, Any]:
    """A synthetic document of the client's own class, as the server would send it."""
    from emmet.core.summary import SummaryDoc

    structure = rock_salt(5.6 + 0.01 * int(name.partition("-")[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = SummaryDoc.from_structure(
            meta_structure=structure, material_id=name, deprecated=deprecated,
            energy_above_hull=0.02, formation_energy_per_atom=-1.5, energy_per_atom=-3.0, band_gap=4.0,
            theoretical=False, total_magnetization_normalized_vol=0.001,
            bulk_modulus={"voigt": 25.0, "reuss": 24.0, "vrh": 24.5},
        )  # fmt: skip
    return json.loads(made.model_dump_json())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("mp_api", reason="mp-api (extra materials-project) is not installed")
    monkeypatch.setenv("MP_API_KEY", "0" * 32)
    running = Server()
    running.documents = {f"mp-{n}": client_document(f"mp-{n}", n == 7) for n in range(1, 8)}
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def of_server(server: Server, folder: Path, **more: Any) -> mp.MaterialsProject:
    endpoint = f"http://127.0.0.1:{server.server_port}/"
    return mp.MaterialsProject(folder, page_size=2, first_wait=0.01, endpoint=endpoint, **more)


def test_the_client_fetches_whole_pages(server: Server, tmp_path: Path) -> None:
    source = of_server(server, tmp_path)
    assert source.size() == 7
    assert server.pages == [["mp-1", "mp-2"], ["mp-3", "mp-4"], ["mp-5", "mp-6"]]
    rows = list(source.rows(0, 7))
    assert [raw.fault and raw.fault[0] for raw in rows] == [None] * 6 + ["deprecated"]
    expected = rock_salt(5.64)
    (parsed,) = source.parse(rows[3])
    assert to_pymatgen(parsed.crystal)[0].matches(expected) and rows[3].columns["e_above_hull"] == 0.02
    assert rows[3].columns["bulk_modulus"] == 24.5 and rows[3].columns["theoretical"] is False
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["database"] == "2026.04.01"
    assert of_server(server, tmp_path).size() == 7 and len(server.pages) == 3  # nothing twice


def test_a_stopped_download_goes_on_at_the_missing_page(server: Server, tmp_path: Path) -> None:
    server.faults = [0, 0, 0] + 3 * [500]
    with pytest.raises(InputError, match="page 1: no answer in 3 attempts"):
        of_server(server, tmp_path, attempts=3).size()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["index.json", "page-00000.json.gz"]
    server.documents["mp-8"] = client_document("mp-8", False)  # the database has moved on meanwhile
    del server.documents["mp-6"]
    source = of_server(server, tmp_path)
    assert source.size() == 7
    assert server.pages == [["mp-1", "mp-2"], ["mp-3", "mp-4"], ["mp-5", "mp-6"]]
    assert list(source.rows(5, 6))[0].fault[0] == "not-delivered"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_passing_faults_are_waited_out(server: Server, tmp_path: Path, status: int) -> None:
    server.faults = [status, status, 0, 0, status]
    assert of_server(server, tmp_path).size() == 7


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refusal_is_not_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.faults = [status] + 20 * [500]
    with pytest.raises(UsageError, match="is MP_API_KEY right"):
        of_server(server, tmp_path).size()
    assert len(server.faults) == 20


def test_the_query_reaches_the_server(server: Server, tmp_path: Path) -> None:
    query = {
        "elements": ["Na", "Cl"],
        "num_sites": [1, 20],
        "energy_above_hull": [0.0, 0.1],
        "include_gnome": False,
    }
    source = of_server(server, tmp_path, query=query)
    assert source.size() == 7 and source.identity() == {"query": query}
    for listing, deprecated in zip(server.listings, ("False", "True"), strict=True):
        assert listing["elements"] == ["Na,Cl"] and listing["nsites_max"] == ["20"]
        assert listing["energy_above_hull_max"] == ["0.1"] and listing["batch_id_not_eq"]
        assert listing["deprecated"] == [deprecated]


# --- C2DB


def layer(vacuum: bool = True) -> Any:
    from ase import Atoms

    cell = [[3.18, 0, 0], [-1.59, 2.754, 0], [0, 0, 18.0 if vacuum else 0]]
    return Atoms("MoS2", positions=[[0, 0, 9], [0, 1.836, 10.56], [0, 1.836, 7.44]], cell=cell, pbc=[True, True, False])


@pytest.fixture(params=[".db", ".json"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A synthetic database with C2DB's keys."""
    from ase.build import bulk
    from ase.db import connect

    file = tmp_path / f"c2db{request.param}"
    with connect(file) as open_database:
        open_database.write(layer(), uid="1MoS2-1", hform=-0.93, ehull=0.0, gap=1.58, gap_hse=2.09, workfunction=5.1,
                            lgnum=78, layergroup="p-6m2", is_magnetic=False, data={"big": [1, 2]})  # fmt: skip
        open_database.write(layer(), uid="1MoS2-2", hform=float("nan"))
        open_database.write(layer(vacuum=False), uid="1MoS2-3")
        open_database.write(layer(), gap="wide")
        open_database.write(bulk("NaCl", "rocksalt", a=5.6))
        open_database.write(layer(), uid="1MoS2-6")
        del open_database[6]
    return file


def test_rows_of_an_ase_database(database: Path) -> None:
    source = pickle.loads(pickle.dumps(c2db.AseDatabase(database)))
    assert source.size() == 5
    rows = list(source.rows(0, 5))
    assert [raw.id for raw in rows] == ["1MoS2-1", "1MoS2-2", "1MoS2-3", "row-4", "row-5"]
    assert [raw.id for raw in source.rows(2, 4)] == ["1MoS2-3", "row-4"]
    assert rows[0].columns == {
        "formation_energy_per_atom": -0.93, "e_above_hull": 0.0, "band_gap": 1.58, "band_gap_hse": 2.09,
        "band_gap_gw": None, "work_function": 5.1, "smallest_hessian_eigenvalue": None, "magnetic": False,
        "layer_group": 78, "layer_group_symbol": "p-6m2", "dimension": 2,
    }  # fmt: skip
    assert set(rows[0].columns) == set(source.columns)
    assert rows[1].columns["formation_energy_per_atom"] is None and rows[1].columns["e_above_hull"] is None
    assert rows[3].fault == ("bad-value", "gap is 'wide', want float")
    assert rows[4].columns["dimension"] == 3


def test_a_layer_keeps_its_vacuum(database: Path) -> None:
    source = c2db.AseDatabase(database)
    rows = list(source.rows(0, 3))
    (parsed,) = source.parse(rows[0])
    np.testing.assert_allclose(parsed.crystal.lattice[0].numpy(), layer().cell.array, atol=1e-12)
    np.testing.assert_allclose(parsed.crystal.cart_coords.numpy(), layer().get_positions(wrap=True), atol=1e-9)
    assert parsed.crystal.atomic_numbers.tolist() == [42, 16, 16]
    with pytest.raises(Refused, match="no-cell"):
        source.parse(rows[2])


def test_what_is_no_database_is_named(tmp_path: Path) -> None:
    for name, content in (
        ("a.db", b"not a database, but long enough to be one"),
        ("b.db", b""),
        ("c.json", b"{broken"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            c2db.AseDatabase(tmp_path / name).size()
        assert (tmp_path / name).read_bytes() == content
    with pytest.raises(InputError, match="no such file"):
        c2db.AseDatabase(tmp_path / "d.db").identity()
    (tmp_path / "e.txt").write_text("x")
    with pytest.raises(InputError, match=r"ends in \.db or \.json"):
        c2db.AseDatabase(tmp_path / "e.txt").size()
