"""`hpcgen evaluate` among odd crystals, on damaged stores, after kills, and by several ranks."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import campaign_jobs
import numpy as np
import pytest
import torch
from known_crystals import cell, crystal, shaken, special
from test_fingerprints import layer, mixed

from hpcgen import cli
from hpcgen.crystal.convert import to_ase
from hpcgen.crystal.crystals import Crystals
from hpcgen.store.layout import Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Rows
from hpcgen.store.write import write_store

SPECIAL = special()


def store(path: Path, crystals: list[Crystals], names: list[str] | None = None) -> Path:
    names = names or [f"c{at}" for at in range(len(crystals))]
    write_store(path, Head("test", {}, {}), [("all", Rows(Crystals.cat(crystals), names, {}))])
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return store(tmp_path / "reference", list(SPECIAL.values()), list(SPECIAL))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def small(count: int) -> list[Crystals]:
    """Crystals of one or two atoms, no two the same."""
    kinds = [SPECIAL[name] for name in ("fcc", "hcp", "one atom")]
    return [shaken(kinds[at % 3], 0.05, seed=at, strain=0.03) for at in range(count)]


def command(*words: Any) -> tuple[list[str], dict[str, str]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(campaign_jobs.ROOT)}
    return [sys.executable, "-m", "hpcgen.cli", "evaluate", *map(str, words)], env


# ---- odd crystals --------------------------------------------------------------------------------------------


def salt(times: int) -> Crystals:
    """NaCl in a cell so many times as long and as wide, shaken a little."""
    one, steps = SPECIAL["NaCl"], torch.cartesian_prod(torch.arange(times), torch.arange(times)).double()
    steps = torch.cat([steps, torch.zeros(len(steps), 1, dtype=torch.float64)], 1)
    along = torch.tensor([times, times, 1], dtype=torch.float64)
    sites = (one.frac_coords + steps[:, None]).reshape(-1, 3) / along
    return shaken(crystal(one.lattice[0] * along[:, None], sites, one.atomic_numbers.tolist() * times**2), 0.1)


def odd() -> dict[str, Crystals]:
    """By name; all but the last can be stored."""
    lost = shaken(SPECIAL["NaCl"], 0.0)
    lost.frac_coords[3, 1] = np.nan
    return {
        "good": SPECIAL["NaCl"],
        "overlapping": crystal(cell(4, 4, 4), [[0, 0, 0], [0, 0, 0], [0.5, 0.5, 0.5]], [11, 11, 8]),
        "single": SPECIAL["one atom"],
        "thin": crystal(cell(0.4, 5, 5), [[0, 0, 0]], [6]),  # its own image 0.4 Å away, which the peers do not see
        "200 atoms": salt(5),
        "no oxidation state": mixed(10),
        "no radius": mixed(97),
        "no table": mixed(118),
        "molecule": crystal(cell(15, 15, 15), [[0.5, 0.5, 0.5], [0.55, 0.53, 0.5], [0.46, 0.54, 0.51]], [8, 1, 1]),
        "collapsed": Crystals(
            SPECIAL["NaCl"].frac_coords, SPECIAL["NaCl"].lattice / 50, SPECIAL["NaCl"].atomic_numbers,
            SPECIAL["NaCl"].num_atoms,
        ),
        "NaN": lost,
    }  # fmt: skip


def test_odd_crystals_are_counted_and_harm_nobody(reference: Path, tmp_path: Path) -> None:
    from ase.io import write

    frames = to_ase(Crystals.cat(list(odd().values())))
    for frame, name in zip(frames, odd(), strict=True):
        frame.info["id"] = name
    write(tmp_path / "odd.extxyz", frames)
    words = [str(tmp_path / "odd.extxyz"), "--reference", str(reference), "--energy", "--processes", "0"]
    assert cli.main(["evaluate", *words, "--json", str(tmp_path / "e.json")]) == 0
    told = json.loads((tmp_path / "e.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert (told["asked"], told["written"]) == (11, told["asked"] - sum(told["rejected"].values()))
    rows = {row["id"]: row for row in table(tmp_path / "e.csv")}
    assert len(rows) == told["written"] and not {"NaN"} & set(rows) and told["rejected"]["not-finite"] == 1
    assert {name for name in rows if rows[name]["distances"] == "0"} == {"overlapping", *({"collapsed"} & set(rows))}
    assert rows["thin"]["distances_with_images"] == "0" and rows["200 atoms"]["num_atoms"] == "200"
    assert {name for name in rows if rows[name]["composition"] == "0"} >= {"no oxidation state", "no table"}
    for name in ("no oxidation state", "no radius", "no table", "molecule"):
        assert rows[name]["novelty"] == "unknown", name
    assert rows["good"]["novelty"] == rows["single"]["novelty"] == "known"
    figures = told["figures"]
    valid = sum(row["distances"] == row["composition"] == "1" for row in rows.values())
    assert figures["validity"]["valid"]["count"] == valid and figures["validity"]["valid"]["of"] == 11
    assert figures["coverage"]["without_fingerprint"]["run"] >= 3  # elements 97 and 118, the molecule
    assert figures["coverage"]["precision"]["of"] == 11
    assert figures["coverage"]["valid"]["count"] < valid, "no fingerprint: not valid, as CDVAE counts"
    assert figures["by_num_atoms"][-1]["atoms"] == [61, 200] and figures["largest_known"] == 60
    assert figures["energy"]["of"] >= 4


@pytest.mark.slow
def test_a_fingerprint_that_takes_for_ever(reference: Path, tmp_path: Path) -> None:
    """A layer in 150 Å of vacuum, of which pymatgen looks at millions of neighbours: 40 s and more, if it may."""
    run = store(tmp_path / "run", [*small(3), layer(150.0, 0.2), *small(3)])
    words = ["--reference", reference, "--no-novelty", "--pair-timeout", 4, "--processes", 1]
    words += ["--json", tmp_path / "e.json"]
    told, env = command(run, *words)
    began = time.monotonic()
    ended = subprocess.run(told, env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "e.json").read_text())["figures"]
    assert figures["coverage"]["without_fingerprint"]["run"] == 1, f"after {time.monotonic() - began:.0f} s"
    assert figures["coverage"]["precision"]["of"] == 7 and figures["coverage"]["crystals"] == 6
    valid = figures["validity"]["valid"]["count"]
    assert figures["coverage"]["valid"]["count"] == valid - 1, "it counts as invalid, as with the peers"
    assert figures["samples"]["taken"] == valid - 1


# ---- damaged stores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["run", "reference"])
def test_a_truncated_block_is_named(
    reference: Path, tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = store(tmp_path / "run", small(4))
    (shard,) = (tmp_path / part).glob("*.h5")
    shard.write_bytes(shard.read_bytes()[:-600])
    words = ["evaluate", str(run), "--reference", str(reference), "--processes", "0"]
    assert cli.main(words) == 4
    err = capsys.readouterr().err
    assert str(shard) in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (run / "evaluate" / "generate.json").exists()


# ---- kills, ranks --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_columns_survive_a_kill_and_are_made_once(reference: Path, tmp_path: Path) -> None:
    """What a killed evaluation had finished is taken as it is: it is marked, and the mark comes through."""
    run = store(tmp_path / "run", small(520))
    words = ["--reference", reference, "--no-novelty", "--processes", 1, "--json"]
    told, env = command(run, *words, tmp_path / "killed.json")
    process = subprocess.Popen(told, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    first, begun = "killed.*.work/described-own-000000.npy", time.monotonic()
    while not (there := list(tmp_path.glob(first))):
        assert process.poll() is None and time.monotonic() - begun < 120
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed.json").exists()
    values = np.load(there[0])
    values[5, 0] += 0.25
    np.save(there[0], values)
    rows = there[0].with_name("rows-000001.csv")
    assert rows.read_text().count("\nc300,") == 1
    rows.write_text(rows.read_text().replace("\nc300,", "\nmarked,"))
    ended = subprocess.run(told, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    in_process = [str(run), *map(str, words), str(tmp_path / "whole" / "whole.json"), "--processes", "0"]
    assert cli.main(["evaluate", *in_process]) == 0
    killed, whole = (path.read_text() for path in (tmp_path / "killed.csv", tmp_path / "whole" / "whole.csv"))
    assert killed.replace("\nmarked,", "\nc300,") == whole != killed
    own = [folder / _described(folder, run) for folder in (tmp_path, tmp_path / "whole")]
    one, other = (np.nan_to_num(np.load(path)) for path in own)  # without energies
    assert np.argwhere(one != other).tolist() == [[5, 0]]
    assert not list(tmp_path.glob("*.work"))


def _described(folder: Path, run: Path) -> str:
    """Name of the file with the fingerprints of the run."""
    (name,) = [path.name for path in folder.glob("described-*.npy") if len(np.load(path)) == len(Store(run))]
    return name


@pytest.mark.slow
@pytest.mark.mpi
def test_ranks_of_mpi_find_the_figures_of_one(reference: Path, tmp_path: Path) -> None:
    run = store(tmp_path / "run", [*small(300), *SPECIAL.values()])
    mpi = [str(Path(sys.executable).parent / "mpiexec"), "-n", "2"]
    words = ["--reference", str(reference), "--processes", "0", "--json"]
    told, env = command(run, *words, tmp_path / "ranks" / "e.json")
    ended = subprocess.run([*mpi, *told], env=env, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("coverage ") == 1, "one rank speaks"
    assert cli.main(["evaluate", str(run), *words, str(tmp_path / "alone" / "e.json")]) == 0
    found = {}
    for name in ("alone", "ranks"):
        figures = json.loads((tmp_path / name / "e.json").read_text())["figures"]
        described = sorted((path.name, path.read_bytes()) for path in (tmp_path / name).glob("described-*.npy"))
        found[name] = figures, (tmp_path / name / "e.csv").read_bytes(), described
        assert not list((tmp_path / name).glob("*.work"))
    assert found["alone"] == found["ranks"] and len(found["alone"][2]) == 2
