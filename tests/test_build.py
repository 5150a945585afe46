"""Building a store: counts add up, nothing depends on order or ranks, kills cost nothing, bad input is named."""

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import torch
from cif_texts import cubic, p1_cif, rows, write_csv
from known_crystals import cell, crystal

from hpcgen.store.parse import _in_niggli_cells, _Row
from hpcgen.store.read import Store
from hpcgen.store.source import Parsed, Raw

ROOT = Path(__file__).resolve().parent.parent
MP20 = [sys.executable, str(ROOT / "preprocess" / "mp20.py")]
SMALL_DISK = "120k"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(inputs: list, out: Path, *options: str, launcher: tuple[str, ...] = (), check: int | None = 0, script=MP20):
    """Run a preprocessing script to its end."""
    command = [*launcher, *script, *map(str, inputs), "--out", str(out), "--no-page", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert check is None or done.returncode == check, done.stderr
    return done


def datasets(store: Path) -> dict[str, bytes]:
    """Every dataset of every shard and the manifest (with the hash of every shard file) as bytes."""
    found: dict[str, bytes] = {"manifest": (store / "manifest.json").read_bytes()}
    for shard in sorted(store.glob("*.h5")):
        with h5py.File(shard, "r") as file:
            file.visititems(
                lambda name, item, shard=shard: (
                    found.update({f"{shard.name}/{name}": item[()].tobytes()})
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
    return found


def counts(store: Path) -> dict:
    return json.loads((store / "build.json").read_text())["counts"]


def rejects(store: Path) -> list[dict[str, str]]:
    with (store / "rejects.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("csv") / "table.csv", rows(200))


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store made in one go by one process."""
    out = tmp_path_factory.mktemp("whole") / "store"
    run([table], out, "--processes", "1", "--block-rows", "16", "--shard-crystals", "32")
    return out


def test_a_store_holds_what_the_source_held(whole: Path) -> None:
    made = counts(whole)
    assert made["rows"] == 200 == made["written"] + sum(made["refused"].values())
    store = Store(whole, dtype=None, edges=True)
    assert len(store) == made["written"]
    by_id = {row["material_id"]: row for row in rows(200)}
    gaps, hull = store.column("band_gap"), store.column("e_above_hull")
    assert (gaps.spec.unit, hull.spec.unit) == ("eV", "eV/atom")
    for name, gap, missing, above in zip(store.ids, gaps.values, gaps.missing, hull.values, strict=True):
        assert missing == (by_id[name]["band_gap"] == "")
        assert missing or gap == float(by_id[name]["band_gap"])
        assert above == float(by_id[name]["energy_above_hull"])
    assert set(store.column("space_group").values.tolist()) == {225, 221, 216}
    assert not (whole / "work").exists() and not (whole / "lease").exists()


def test_split_is_80_10_10_in_every_space_group(whole: Path) -> None:
    sizes = {split: len(Store(whole, split)) for split in ("train", "val", "test")}
    total = sum(sizes.values())
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(sizes[split] - share * total) <= 1
        groups = Store(whole, split).column("space_group").values
        everything = Store(whole).column("space_group").values
        for group in (225, 221, 216):
            assert abs((groups == group).sum() - share * (everything == group).sum()) <= 2


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [((), "2"), pytest.param(("mpiexec", "-n", "3"), "1", marks=pytest.mark.mpi)],
)
def test_number_of_processes_changes_no_byte(
    whole: Path, table: Path, tmp_path: Path, launcher, processes: str
) -> None:
    out = tmp_path / "store"
    options = ("--processes", processes, "--block-rows", "16", "--shard-crystals", "32")
    run([table], out, *options, launcher=launcher)
    assert datasets(out) == datasets(whole)


def test_array_tasks_make_the_same_store(whole: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    command = [*MP20, str(table), "--out", str(out), "--no-page", "--processes", "1"]
    command += ["--block-rows", "16", "--shard-crystals", "32"]
    tasks = []
    for task in range(2):
        array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_JOB_ID": str(78 + task), "SLURM_ARRAY_TASK_ID": str(task)}
        bounds = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1"}
        tasks.append(subprocess.Popen(command, env={**ENV, **array, **bounds}, stderr=subprocess.PIPE, text=True))
    ends = [(task.communicate(timeout=120)[1], task.returncode) for task in tasks]
    assert [code for _, code in ends] == [0, 0], ends
    assert datasets(out) == datasets(whole)


@pytest.mark.slow
def test_an_array_without_its_first_task_finishes_and_clears_up(fine: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    command = [*MP20, str(table), "--out", str(out), "--no-page", "--processes", "1", *FINE]
    bounds = {"SLURM_ARRAY_JOB_ID": "79", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
    tasks = [
        subprocess.Popen(command, env={**ENV, **bounds, "SLURM_ARRAY_TASK_ID": str(task)}, stderr=subprocess.PIPE)
        for task in range(2)
    ]
    _wait_for(lambda: list(out.glob("work/parsed-*.npz")))
    tasks[0].kill()
    told = tasks[1].communicate(timeout=120)[1].decode()
    tasks[0].communicate()
    assert tasks[1].returncode == 0, told
    assert datasets(out) == datasets(fine) and not (out / "work").exists()


def test_order_of_rows_changes_neither_duplicates_nor_split(tmp_path: Path) -> None:
    made = rows(100)
    made += [{**row, "material_id": row["material_id"] + "-copy"} for row in made[:20]]
    splits = []
    for order in (made, random.Random(1).sample(made, len(made))):
        out = tmp_path / f"store-{len(splits)}"
        run([write_csv(tmp_path / "t.csv", order)], out, "--edges", "none")
        splits.append({name: split for split in ("train", "val", "test") for name in Store(out, split).ids})
    assert splits[0] == splits[1]
    assert not [name for name in splits[0] if name.endswith("-copy")]


@pytest.mark.slow
def test_duplicates_in_disguise_stay_on_one_side(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made, pairs = rows(60), []
    for row in made[:25]:
        sites = [("Na", (0, 0, 0)), ("Cl", (0.5, 0.5, 0.5))]
        shift = rng.random(3)
        length = 3.3 + 0.01 * len(pairs)
        plain = p1_cif((length,) * 3, (90, 90, 90), sites)
        double = [(s, ((x + shift[0]) / 2 + half, (y + shift[1]) % 1, (z + shift[2]) % 1))
                  for s, (x, y, z) in sites for half in (0, 0.5)]  # fmt: skip
        disguised = p1_cif((2 * length, length, length), (90, 90, 90), double)
        pairs.append((row["material_id"], row["material_id"] + "-twin"))
        made.append({**row, "material_id": pairs[-1][1], "cif": disguised})
        row["cif"] = plain
    out = tmp_path / "keep"
    run([write_csv(tmp_path / "t.csv", made)], out, "--duplicates", "keep", "--edges", "none")
    side = {name: split for split in ("train", "val", "test") for name in Store(out, split).ids}
    assert len(side) == len(made) and all(side[one] == side[other] for one, other in pairs)
    run([tmp_path / "t.csv"], tmp_path / "drop", "--duplicates", "drop", "--edges", "none")
    # scaled volumes match too, so all of these CsCl-type NaCl crystals are one
    assert counts(tmp_path / "drop")["refused"]["duplicate"] == 49


def test_bad_rows_among_good_ones(tmp_path: Path) -> None:
    good, bad = rows(100), []
    texts = {
        "empty": "", "prose": "this is no CIF", "half": cubic("rocksalt", "Na", "Cl")[:150],
        "element": cubic("rocksalt", "Qq", "Cl"), "no-cell": "data_x\nloop_\n_atom_site_label\nNa1\n",
        "flat": p1_cif((4, 4, 4), (90, 90, 0), [("Na", (0, 0, 0))]),
        "zero": p1_cif((0, 4, 4), (90, 90, 90), [("Na", (0, 0, 0))]),
        "close": p1_cif((4, 4, 4), (90, 90, 90), [("Na", (0, 0, 0)), ("Cl", (0.01, 0, 0))]),
        "crowd": p1_cif((90, 90, 90), (90, 90, 90), [("Na", (i / 25, j / 25, k / 16))
                        for i in range(25) for j in range(25) for k in range(16)]),
        "over": p1_cif((4, 4, 4), (90, 90, 90), [("Na", (0, 0, 0))], [1.7]),
        "partial": p1_cif((4, 4, 4), (90, 90, 90), [("Na", (0, 0, 0))], [0.5]),
        "wild": p1_cif((1e20, 1e-20, 100), (90, 90, 90), [("Na", (0, 0, 0))]),
    }  # fmt: skip
    codes = {
        "empty": "empty", "prose": "not-cif", "half": "not-cif", "element": "unknown-element", "no-cell": "no-atoms",
        "flat": "bad-cell", "zero": "bad-cell", "close": "atoms-too-close", "crowd": "too-many-atoms",
        "over": "bad-occupancy", "partial": "disordered", "wild": "atoms-too-close",
    }  # fmt: skip
    for number in range(200):
        kind = list(texts)[number % len(texts)]
        bad.append(
            {
                "material_id": f"bad-{number}-{kind}",
                "energy_above_hull": "0",
                "band_gap": "1",
                "cif": texts[kind],
            }
        )
    bad[3]["band_gap"] = "wide"
    made = random.Random(2).sample(good + bad, 300)
    file = write_csv(tmp_path / "t.csv", made)
    with file.open("a") as table:
        table.write("too,few\n")
    data = file.read_bytes().replace(b"bad-4-", b"bad-\xff-", 1)
    file.write_bytes(data)
    done = run([file], tmp_path / "store", "--duplicates", "ignore", check=5)
    assert "were refused" in done.stderr
    made_of = counts(tmp_path / "store")
    assert made_of["rows"] == 301 and made_of["written"] == 100
    told = {row["id"]: row for row in rejects(tmp_path / "store")}
    assert len(told) == 201 and all(row["message"] for row in told.values())
    assert told["row-300"]["code"] == "bad-row" and "2 cells, want 4" in told["row-300"]["message"]
    assert told["bad-3-element"]["code"] == "bad-value" and "'wide'" in told["bad-3-element"]["message"]
    assert "not-utf-8" in {row["code"] for row in told.values()}
    found = {(row["id"].rpartition("-")[2], row["code"]) for row in told.values()}
    for kind, code in codes.items():
        assert {which for of, which in found if of == kind.rpartition("-")[2]} - {"bad-value", "not-utf-8"} == {code}
    assert sorted(Store(tmp_path / "store").ids) == sorted(row["material_id"] for row in good)


def test_what_no_column_can_hold_is_refused_by_row(tmp_path: Path) -> None:
    made = [{**row, "year": "1999", "source": "x"} for row in rows(10)]
    made[1]["year"], made[2]["material_id"], made[3]["source"] = "1e30", "i" * 300, "y" * 5000
    file = write_csv(tmp_path / "t.csv", made)
    file.write_bytes(file.read_bytes().replace(made[4]["material_id"].encode() + b",", b"\xff,"))
    run([file], tmp_path / "store", "--duplicates", "ignore", "--edges", "none")
    assert [row["code"] for row in rejects(tmp_path / "store")] == ["bad-value"] * 3 + ["not-utf-8"]
    assert len(Store(tmp_path / "store")) == 6


@pytest.mark.mpi
def test_one_rank_without_its_input_ends_all(table: Path, tmp_path: Path) -> None:
    command = [*MP20, "--out", str(tmp_path / "store"), "--no-page", "--processes", "1"]
    ranks = ["mpiexec", "-n", "2", *command, str(table), ":", "-n", "1", *command, str(tmp_path / "nowhere.csv")]
    done = subprocess.run(ranks, capture_output=True, text=True, env=ENV, timeout=30)
    assert done.returncode != 0 and "nowhere.csv" in done.stderr


def test_a_source_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    script = tmp_path / "shrunk.py"
    script.write_text(
        TROUBLE.format(preprocess=str(ROOT / "preprocess"), root=str(ROOT)).replace(
            "    def parse(", "    def size(self):\n        return super().size() + 10\n\n    def parse("
        )
    )
    table = write_csv(tmp_path / "t.csv", rows(20))
    done = run([table], tmp_path / "store", script=[sys.executable, str(script)], check=5)
    assert "gave 20, want 30" in done.stderr and not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "inputs", "code", "says"),
    [
        ((), ["nowhere.csv"], 4, "nowhere.csv"),
        ((), ["nocif.csv"], 4, "no column cif among a, b"),
        ((), ["empty.csv"], 4, "is empty"),
        ((), ["header.csv"], 4, "holds no rows"),
        ((), ["torn.csv.gz"], 4, "torn.csv.gz, line"),
        ((), ["rubbish.csv"], 4, "none of 1 rows"),
        (("--split", "0.5,0.5"), ["good.csv"], 2, "split = 0.5,0.5"),
        (("--split", "source"), ["good.csv"], 2, "end in train, val or test"),
        (("--cutoff", "-1"), ["good.csv"], 2, "cutoff = -1"),
        (("--cutoff", "nan"), ["good.csv"], 2, "cutoff = nan"),
        (("--column", "magic"), ["good.csv"], 4, "magic"),
        ((), ["twins.csv"], 4, "energy_above_hull and e_above_hull both mean e_above_hull"),
        ((), ["stray.csv"], 4, "stray.csv, line 5: cannot be read as CSV"),
        (("--id-column", "name"), ["good.csv"], 4, "no column name among material_id"),
        (("--column", "space_group"), ["own.csv"], 2, "space_group is made by hpcgen itself"),
        (("--processes", "-3"), ["good.csv"], 2, "--processes -3"),
        (("--item-timeout", "nan"), ["good.csv"], 2, "--item-timeout nan"),
        (("--max-refused", "7"), ["good.csv"], 2, "--max-refused 7"),
        (("--seed", "-1"), ["good.csv"], 2, "seed = -1"),
    ],
)
def test_unusable_input_is_one_sentence(tmp_path: Path, options: tuple, inputs: list, code: int, says: str) -> None:
    write_csv(tmp_path / "good.csv", rows(5))
    write_csv(tmp_path / "twins.csv", [{**row, "e_above_hull": "1"} for row in rows(3)])
    write_csv(tmp_path / "own.csv", [{**row, "space_group": "1"} for row in rows(3)])
    (tmp_path / "stray.csv").write_text('material_id,cif\na,"x"\nb,"y"\nc,"z"\nd,"w" "\ne,"v"\n')
    (tmp_path / "nocif.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("material_id,cif\n")
    (tmp_path / "rubbish.csv").write_text("material_id,cif\nx,no\n")
    (tmp_path / "torn.csv.gz").write_bytes(gzip.compress((tmp_path / "good.csv").read_bytes())[:-50])
    done = run([tmp_path / name for name in inputs], tmp_path / "store", *options, check=None)
    assert done.returncode == code, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path).glob("store/*.h5"))


def test_gzipped_input_is_the_same(whole: Path, table: Path, tmp_path: Path) -> None:
    zipped = tmp_path / "table.csv.gz"
    zipped.write_bytes(gzip.compress(table.read_bytes()))
    run([zipped], tmp_path / "store", "--block-rows", "16", "--shard-crystals", "32")
    ours, theirs = datasets(tmp_path / "store"), datasets(whole)
    assert ours.pop("manifest") != theirs["manifest"]
    assert ours == {key: value for key, value in theirs.items() if key != "manifest"}


def test_a_byte_order_mark_hides_no_column(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", rows(12))
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    run([table], tmp_path / "store", "--edges", "none")
    assert sorted(Store(tmp_path / "store").ids) == sorted(row["material_id"] for row in rows(12))


def test_a_file_in_the_way_of_the_store(table: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, code in ((tmp_path / "file", 2), (tmp_path / "file" / "store", 7)):
        done = run([table], out, check=code)
        assert "Traceback" not in done.stderr and "file" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_other_settings_are_refused_and_the_same_again_is_done(table: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    run([table], out, "--cutoff", "4")
    before = datasets(out)
    done = run([table], out, "--cutoff", "5", check=2)
    assert "settings.cutoff = 4.0, now it is 5.0" in done.stderr
    run([table], out, "--cutoff", "4")
    assert datasets(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    done = run([table], tmp_path / "other", check=2)
    assert "thesis.tex" in done.stderr and [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def test_started_twice_at_the_same_moment(whole: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    command = [*MP20, str(table), "--out", str(out), "--no-page", "--processes", "1"]
    command += ["--block-rows", "16", "--shard-crystals", "32"]
    both = [subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in both]
    assert sorted(code for _, code in ends) in ([0, 7], [0, 0]), ends  # the later one may find it finished
    assert all("belongs to another run, pid" in told for told, code in ends if code == 7), ends
    assert datasets(out) == datasets(whole)


def test_ctrl_c_ends_with_75_and_the_same_command_goes_on(whole: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    command = [
        *MP20,
        str(table),
        "--out",
        str(out),
        "--no-page",
        "--block-rows",
        "16",
        "--shard-crystals",
        "32",
    ]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True, start_new_session=True)
    _wait_for(lambda: list(out.glob("work/parsed-*.npz")))
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 75 and "goes on from here" in told, told
    assert not list(out.rglob("*.draft"))
    run([table], out, "--block-rows", "16", "--shard-crystals", "32")
    assert datasets(out) == datasets(whole)


def _wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


FINE = ("--block-rows", "4", "--shard-crystals", "16")  # many files, so that twenty kills do not outlast the work


@pytest.fixture(scope="module")
def fine(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of many small files, made in one go by one process."""
    out = tmp_path_factory.mktemp("fine") / "store"
    run([table], out, "--processes", "1", *FINE)
    return out


def stop_with_draft(process: subprocess.Popen, drafts) -> None:
    """Suspend a build at a moment when a new draft exists; return as well when it has ended."""
    while process.poll() is None:
        _wait_for(lambda: drafts() or process.poll() is not None)
        family = _family(process)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.suspend()
        time.sleep(0.01)  # a rename under way is over by now
        if drafts() and {member.pid for member in _family(process)} <= {member.pid for member in family}:
            return
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.resume()


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        first = psutil.Process(process.pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_often(table: Path, out: Path, kills: int, launcher: tuple[str, ...], processes: str) -> int:
    """Start and SIGKILL a build, three times in four while a new draft exists. Returns the kills that left a draft."""
    chance, with_draft = random.Random(3), 0
    command = [*launcher, *MP20, str(table), "--out", str(out), "--no-page", "--processes", processes, *FINE]
    for number in range(kills):
        before = set(out.rglob("*.draft"))
        process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True)  # fmt: skip
        if number % 4 < 3:
            stop_with_draft(process, lambda b=before: set(out.rglob("*.draft")) - b)
        else:
            time.sleep(chance.uniform(0.1, 2.0))
        for member in _family(process):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with_draft += bool(set(out.rglob("*.draft")) - before)
    assert not (out / "manifest.json").exists(), "finished before the last kill"
    return with_draft


MPI = ("mpiexec", "-n", "3")


@pytest.mark.parametrize(
    ("launcher", "processes", "kills"),
    [
        pytest.param(MPI, "1", 3, marks=pytest.mark.mpi),
        pytest.param((), "1", 20, marks=pytest.mark.bench),
        pytest.param((), "2", 20, marks=pytest.mark.bench),
        pytest.param(MPI, "1", 20, marks=[pytest.mark.mpi, pytest.mark.bench]),
    ],
)
@pytest.mark.slow
def test_many_sigkills_change_no_byte(
    fine: Path, table: Path, tmp_path: Path, launcher, processes: str, kills: int
) -> None:
    out = tmp_path / "store"
    assert kill_often(table, out, kills, launcher, processes) >= kills // 2
    run([table], out, "--processes", processes, *FINE, launcher=launcher)
    assert datasets(out) == datasets(fine)


def test_three_sigkills_change_no_byte(fine: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    assert kill_often(table, out, 3, (), "2") >= 1
    run([table], out, *FINE)
    assert datasets(out) == datasets(fine)


def test_a_worker_killed_from_outside_costs_no_crystal(fine: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    command = [*MP20, str(table), "--out", str(out), "--no-page", "--processes", "1", *FINE]
    process = subprocess.Popen(command, env=ENV, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: list(out.glob("work/parsed-*.npz")))
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if not child.children()]
    workers = [child for child in workers if "resource_tracker" not in " ".join(child.cmdline())]
    for worker in workers:
        worker.kill()
    assert workers and process.wait(timeout=60) == 0, process.stderr
    assert datasets(out) == datasets(fine)


def test_a_cell_without_a_niggli_cell_costs_its_row_alone() -> None:
    """Sources that give lattices as they are may bring one so sheared that the reduction gives up."""
    flat = torch.tensor([[1e4, 0, 0], [1e4, 1e-2, 0], [1e4, 0, 1e-2]], dtype=torch.float64)
    cells = [cell(3, 4, 5), flat, cell(4, 4, 9, 90, 90, 120), flat]
    made = [crystal(each, [[0, 0, 0]], [29]) for each in cells]
    rows = [_Row(at, at, Raw(f"t-{at}", "", {}), None, [Parsed(f"t-{at}", one)]) for at, one in enumerate(made)]
    left, crystals = _in_niggli_cells(rows)
    assert [row.raw.id for row in left] == ["t-0", "t-2"] and len(crystals) == 2
    assert [row.refused.code if row.refused else None for row in rows] == [None, "no-niggli-cell"] * 2
    assert torch.allclose(crystals.volume, torch.stack([made[0].volume[0], made[2].volume[0]]))


TROUBLE = """
import os, sys, time
sys.path[:0] = [{preprocess!r}, {root!r}]
import drive, mp20
from dataclasses import dataclass

@dataclass
class Trouble(mp20.CsvFiles):
    def parse(self, raw):
        if raw.id == "t-7":
            while True:
                pass
        if raw.id == "t-8":
            os.abort()
        if raw.id == "t-9":
            raise RuntimeError("a reader's own fault")
        return super().parse(raw)

def make_source(args):
    return Trouble(tuple(args.inputs))

if __name__ == "__main__":
    import argparse
    from pathlib import Path
    parser = argparse.ArgumentParser()
    parser.add_argument("inputs", nargs="+", type=Path)
    sys.exit(drive.run(parser, make_source))
"""


def test_an_endless_and_a_crashing_structure_cost_themselves_alone(tmp_path: Path) -> None:
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE.format(preprocess=str(ROOT / "preprocess"), root=str(ROOT)))
    ordered = [{**row, "material_id": f"t-{number}"} for number, row in enumerate(rows(40))]
    table = write_csv(tmp_path / "t.csv", ordered)
    run(
        [table],
        tmp_path / "store",
        "--item-timeout",
        "3",
        "--duplicates",
        "ignore",
        script=[sys.executable, str(script)],
    )
    told = {row["id"]: row["code"] for row in rejects(tmp_path / "store")}
    assert told == {"t-7": "timeout", "t-8": "crash", "t-9": "parse-error"}
    assert len(Store(tmp_path / "store")) == 37


def test_a_full_disk_ends_with_7_and_more_room_finishes_it(whole: Path, table: Path, small_disk: Path) -> None:
    out = small_disk / "store"
    options = ("--block-rows", "16", "--shard-crystals", "32")
    done = run([table], out, *options, check=7)
    assert "No space left" in done.stderr and "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run([table], out, *options)
    assert datasets(out) == datasets(whole)


def test_a_read_only_folder_ends_with_7(table: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = run([table], small_disk / "store", check=7)
    assert "Read-only" in done.stderr and "Traceback" not in done.stderr
