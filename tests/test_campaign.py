"""Campaigns: crystal i is a function of checkpoint, settings, seed and i, and none is lost on the way."""

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign_jobs import MOST, Launch, content, litter, make_checkpoint, rejected, run
from store_rows import HEAD, rows

from hpcgen.campaign.config import PACKAGED, CampaignConfig, read_config
from hpcgen.campaign.pieces import Kept, Sampled, pieces
from hpcgen.campaign.sampling import Sampler, size_chances
from hpcgen.campaign.targets import targets_of
from hpcgen.campaign.tuning import tried
from hpcgen.crystal.composition import formula_key
from hpcgen.crystal.crystals import Crystals
from hpcgen.diffusion.draw import Draw, Purpose
from hpcgen.errors import StoppedEarly, UsageError
from hpcgen.files import read_json_lines
from hpcgen.models.autoperi import AutoPeri
from hpcgen.models.saved import MODEL, read_saved
from hpcgen.runner.stop import StopFlag
from hpcgen.store.inspect import check, describe
from hpcgen.store.layout import sha256_of
from hpcgen.store.read import Store
from hpcgen.store.write import write_store

pytestmark = pytest.mark.usefixtures("threads_restored")

N = 100


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign in one go by one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(checkpoint, out, n=N)
    return out


# ---- what a run folder holds ---------------------------------------------------------------------------------------


def test_a_finished_run_is_a_store(whole: Path) -> None:
    store = Store(whole)
    assert check(whole) == [] and litter(whole) == []
    assert len(store) == N and store.ids == [f"s0-{i:09d}" for i in range(N)]
    assert store.column("index").values.tolist() == list(range(N)) and not store.column("halved").values.any()
    assert describe(whole)["source"] == "campaign" and store.head.settings["task"] == "generate"
    assert {"config.yaml", "events.jsonl", "metrics.jsonl", "manifest.json", "summary.json"} <= {
        path.name for path in whole.iterdir()
    }


def test_the_summary_counts_everything(whole: Path) -> None:
    told = json.loads((whole / "summary.json").read_text())
    assert told["asked"] == N == told["written"] + sum(told["rejected"].values())
    assert told["sampled"] == N and told["crystals_per_s"] > 0 and 0 <= told["outside"] <= 1
    lines = read_json_lines(whole / "metrics.jsonl")
    assert sum(line["crystals"] for line in lines) == N and len(lines) == 4
    assert [line["event"] for line in read_json_lines(whole / "events.jsonl")] == ["start", "done"]


def test_sizes_measured_at_the_start_are_those_of_the_run(checkpoint: Path, tmp_path: Path) -> None:
    tuned = {"tune": True, "tile": 0, "block": 0}
    run(checkpoint, tmp_path / "run", n=300, **tuned)
    config, events = read_config(tmp_path / "run"), read_json_lines(tmp_path / "run" / "events.jsonl")
    trials = next(event for event in events if event["event"] == "tuned")["trials"]
    assert {trial["tile"] for trial in trials} == {64, 128, 256}  # of 512 some of the 300 would be none
    best = max(trials, key=lambda trial: trial["crystals_per_s"])
    assert (config.tile, config.pairs) == (best["tile"], best["pairs"])

    run(checkpoint, tmp_path / "same", n=400, tile=config.tile, pairs=config.pairs, block=0)
    assert run(checkpoint, tmp_path / "run", n=400, **tuned).sampled < 400
    assert content(tmp_path / "run") == content(tmp_path / "same")
    assert run(checkpoint, tmp_path / "run", n=400, tile=0, block=0).sampled == 0, "the folder's go on"
    with pytest.raises(UsageError, match="was begun with tile = "):
        run(checkpoint, tmp_path / "run", n=400, **{**tuned, "tile": 3 * config.tile})


def test_a_stop_is_heard_while_sizes_are_measured(whole: Path) -> None:
    stop = StopFlag()
    stop.set("SIGTERM")
    config = replace(read_config(whole), tile=0, pairs=0, block=0)
    with pytest.raises(StoppedEarly, match="SIGTERM"):
        tried(config, None, 1, stop.check)


def test_again_does_nothing(checkpoint: Path, whole: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.glob("*.*") if path.is_file()}
    assert run(checkpoint, whole, n=N).sampled == 0
    after = {path.name: path.stat().st_mtime_ns for path in whole.glob("*.*") if path.is_file()}
    assert after == before


def test_a_block_that_went_away_comes_again(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path, n=N)
    (tmp_path / "all-00001.h5").unlink()
    assert run(checkpoint, tmp_path, n=N).sampled == 32
    assert (tmp_path / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


# ---- the same crystals, however they are made ------------------------------------------------------------------------


@pytest.mark.parametrize("block", [16, 48, 112])
def test_another_block_size(checkpoint: Path, whole: Path, tmp_path: Path, block: int) -> None:
    run(checkpoint, tmp_path, n=N, block=block)
    assert content(tmp_path) == content(whole)
    assert len(Store(tmp_path).shards) == -(-N // block)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [0, 1, 3])
def test_ranks_and_worker_processes(checkpoint: Path, whole: Path, tmp_path: Path, ranks: int) -> None:
    out, more = tmp_path / "run", {} if ranks else {"processes": 2, "block": None}
    code, said = Launch(checkpoint, out, ranks=ranks, n=N, **more).end()
    assert code == 0, said
    assert said.count("asked for") == 1 and said.count("seed 0") == 1
    assert content(out) == content(whole) and litter(out) == [] and check(out) == []
    assert json.loads((out / "summary.json").read_text())["sampled"] == N
    if ranks:
        assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


@pytest.mark.parametrize("first", [1, 20, 32, 90])
def test_n_grows(checkpoint: Path, whole: Path, tmp_path: Path, first: int) -> None:
    run(checkpoint, tmp_path, n=first)
    assert len(Store(tmp_path)) == first
    grown = run(checkpoint, tmp_path, n=N)
    assert grown.asked == grown.written == N
    assert grown.sampled == N - first // 16 * 16, "whole tiles are not sampled again"
    assert (tmp_path / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("*.h5")) == sorted(p.name for p in whole.glob("*.h5"))
    assert litter(tmp_path) == []


def test_n_grows_beyond_an_interrupted_growth(
    checkpoint: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(checkpoint, tmp_path, n=40)
    with monkeypatch.context() as patched:
        stopping_after(patched, 9)
        with pytest.raises(StoppedEarly):
            run(checkpoint, tmp_path, n=90)
    assert len(Store(tmp_path)) == 40, "readers see what was complete before"
    with pytest.raises(UsageError, match="n = 90"):
        run(checkpoint, tmp_path, n=40)
    run(checkpoint, tmp_path, n=N)
    assert content(tmp_path) == content(whole) and litter(tmp_path) == []


def stopping_after(patched: pytest.MonkeyPatch, calls: int) -> None:
    """Let the campaign stop once so many pieces are sampled."""
    sample, left = Sampler.sample, [calls]

    def stop(*arguments: Any) -> Sampled:
        left[0] -= 1
        if left[0] < 0:
            raise StoppedEarly("the test says so")
        return sample(*arguments)

    patched.setattr(Sampler, "sample", stop)


@pytest.mark.parametrize("setting", [{"seed": 1}, {"steps": 4}, {"churn": 0.5}, {"conditions": {"band_gap": 2.0}},
                                     {"elements": "Li-P-S"}, {"precision": "bf16"}])  # fmt: skip
def test_what_shall_matter_does(checkpoint: Path, whole: Path, tmp_path: Path, setting: dict) -> None:
    run(checkpoint, tmp_path, n=32, **setting)
    made, before = Store(tmp_path), Store(whole)
    assert not torch.equal(made[0].crystals.lattice, before[0].crystals.lattice)
    assert made.sizes().atoms.tolist() == before.sizes().atoms[:32].tolist() or setting == {"seed": 1}


def assert_same_files(out: Path, whole: Path) -> None:
    """No crystal lost, doubled or torn, every byte as in the uninterrupted run."""
    assert content(out) == content(whole) and check(out) == [] and litter(out) == []
    assert sorted(path.name for path in out.glob("*.h5")) == sorted(path.name for path in whole.glob("*.h5"))
    for path in whole.glob("*.h5"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_kills_at_random_moments_cost_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Each launch is a fork of this process, which has imported everything and loaded the model."""
    n, settings, chance = 240, {"steps": 20, "num_atoms": "3-8"}, random.Random(0)
    run(checkpoint, tmp_path / "whole", n=n, **settings)
    for _ in range(6):
        there = len(list((tmp_path / "run").glob("all-*.h5*")))
        child = os.fork()
        if not child:
            with suppress(BaseException):
                run(checkpoint, tmp_path / "run", n=n, **settings)
            os._exit(0)
        end = time.monotonic() + 30
        while len(list((tmp_path / "run").glob("all-*.h5*"))) <= there and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert 1 <= len(list((tmp_path / "run").glob("all-*.h5"))) < 8, "all kills came while there was something to do"
    run(checkpoint, tmp_path / "run", n=n, **settings)
    assert_same_files(tmp_path / "run", tmp_path / "whole")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "kills"),
    [
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(0, 20, marks=pytest.mark.bench),
        pytest.param(3, 20, marks=pytest.mark.bench),
    ],
)
def test_kills_of_the_command_cost_nothing(checkpoint: Path, tmp_path: Path, ranks: int, kills: int) -> None:
    """SIGKILL to all processes of a launch, at random moments after the first of many blocks."""
    n, chance = 60 * kills + 800, random.Random(ranks)
    settings: dict[str, Any] = {"steps": 20, "num_atoms": "3-8"}
    run(checkpoint, tmp_path / "whole", n=n, **settings)
    settings["processes"] = None if ranks else 2
    out = tmp_path / "run"
    for _ in range(kills):
        launch, end = Launch(checkpoint, out, n=n, ranks=ranks, **settings), time.monotonic() + 60
        before = len(read_json_lines(out / "metrics.jsonl"))
        while launch.process.poll() is None and len(read_json_lines(out / "metrics.jsonl")) <= before:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert launch.process.poll() is None, "killed while there is something to do"
        time.sleep(chance.uniform(0.0, 0.3))
        launch.kill()
    code, said = Launch(checkpoint, out, n=n, ranks=ranks, **settings).end(300)
    assert code == 0, said
    assert_same_files(out, tmp_path / "whole")


def test_the_packaged_checkpoint(tmp_path: Path) -> None:
    assert PACKAGED.stat().st_size <= 12_000_000 and PACKAGED.with_suffix(".md").exists()
    made = run(PACKAGED, tmp_path, n=16, steps=5, formula="Na4Cl4")
    assert (made.asked, made.written) == (16, 16)
    volume = Store(tmp_path).rows(range(16)).crystals.volume / 8
    assert ((volume > 8) & (volume < 60)).all(), "Å³ an atom"


FAULTS = """
import resource, sys
import numpy as np
from hpcgen.campaign import sampling
from hpcgen.campaign.config import CampaignConfig
from hpcgen.campaign.pieces import Piece

config = CampaignConfig(n=100, steps=3, device="cpu", checkpoint_sha256=sys.argv[1])
piece = Piece(0, np.arange(100), np.full(100, 12), 12)
keep, sampling._keep_freed_memory = sampling._keep_freed_memory, lambda: None
for settle in (lambda: None, keep):
    sampler = sampling.Sampler(config, None)
    settle()
    for _ in range(3):
        sampler.sample(piece, lambda: None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sampler.sample(piece, lambda: None)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_fetched_once_and_not_in_each_call() -> None:
    """Pages that a piece makes the kernel fetch, without and with what a worker tells its C library."""
    command = [sys.executable, "-c", FAULTS, sha256_of(PACKAGED)]
    told = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    before, after = map(int, told.stdout.split())
    assert before > 5000 and after < before / 4, told.stderr


# ---- sizes, compositions ---------------------------------------------------------------------------------------------


def test_sizes_follow_the_training_crystals(checkpoint: Path) -> None:
    config = CampaignConfig(n=1, checkpoint=str(checkpoint), device="cpu")
    counts = np.append(0, np.arange(MOST, 0, -1.0))
    chances = size_chances(counts, config)
    chance = Draw(3).uniform(Purpose.SIZE, torch.arange(20_000), dtype=torch.float64)[:, 0].numpy()
    found = np.bincount(np.searchsorted(chances, chance, side="right"), minlength=MOST + 1)
    expected = 20_000 * counts / counts.sum()
    assert found[0] == 0 and len(found) == MOST + 1
    assert ((found - expected)[1:] ** 2 / expected[1:]).sum() < 45, "chi² of 19 degrees of freedom, one in 1,000"


@pytest.mark.parametrize(
    ("asked", "found"), [("12", {12}), ("3-5", {3, 4, 5}), ("19-30", {19, 20}), ("30-31", {30, 31})]
)
def test_sizes_asked_for(checkpoint: Path, tmp_path: Path, asked: str, found: set, caplog: Any) -> None:
    run(checkpoint, tmp_path, n=32, num_atoms=asked)
    assert set(Store(tmp_path).sizes().atoms.tolist()) == found
    assert ("largest training crystal had 20" in caplog.text) == (max(found) > 20 or asked == "19-30")


def test_pieces_hold_every_crystal_once() -> None:
    sizes = np.random.default_rng(0).integers(1, 30, 200)
    made = pieces(np.arange(200) + 600, sizes, most_pairs=4000)
    assert sorted(np.concatenate([piece.index for piece in made]).tolist()) == list(range(600, 800))
    for number, piece in enumerate(made):
        assert piece.number == number and piece.length % 4 == 0
        assert (piece.num_atoms <= piece.length).all() and (piece.num_atoms > piece.length - 4).all()
        assert (piece.num_atoms == sizes[piece.index - 600]).all()
        assert len(piece.index) * piece.length**2 <= 4000 and (np.diff(piece.index) > 0).all()


def test_one_formula(checkpoint: Path, tmp_path: Path) -> None:
    run(checkpoint, tmp_path, n=20, formula="Li9P3S12")
    store = Store(tmp_path)
    assert store.head.settings["task"] == "predict"
    for at in range(20):
        numbers = store[at].crystals.atomic_numbers
        assert len(numbers) == 24 and formula_key(numbers) == formula_key([3] * 3 + [15] + [16] * 4)
    assert set(store.column("target").values.tolist()) == {"Li9P3S12"}


def test_the_order_in_a_formula_is_nothing(checkpoint: Path, tmp_path: Path) -> None:
    for formula in ("Li9P3S12", "S12P3Li9"):
        run(checkpoint, tmp_path / formula, n=4, formula=formula)
    first, second = (Store(tmp_path / formula)[0].crystals for formula in ("Li9P3S12", "S12P3Li9"))
    assert torch.equal(first.frac_coords, second.frac_coords)


def test_a_file_of_formulas(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "formulas.txt"
    file.write_text("# wanted\nNaCl\n\nCa(OH)2\nNaCl  \n")
    run(checkpoint, tmp_path / "one", formulas=str(file))
    run(checkpoint, tmp_path / "run", formulas=str(file), per_formula=7)
    store = Store(tmp_path / "run")
    assert Counter(store.column("target").values.tolist()) == {"NaCl": 14, "Ca(OH)2": 7}
    assert store.sizes().atoms.tolist() == [2, 5, 2] * 7
    grown = run(checkpoint, tmp_path / "one", formulas=str(file), per_formula=7)
    assert grown.asked == 21 and content(tmp_path / "one") == content(tmp_path / "run")


def test_a_table_of_formulas_keeps_its_ids(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "formulas.csv"
    file.write_text("id,note,formula\nmp-1,a,NaCl\nmp-2,b,Fe2O3\n")
    run(checkpoint, tmp_path / "run", formulas=str(file), per_formula=2)
    assert Store(tmp_path / "run").column("target").values.tolist() == ["mp-1", "mp-2", "mp-1", "mp-2"]


def test_a_store_as_a_list_of_compositions(checkpoint: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "store", HEAD, [("train", rows(9)), ("val", rows(8, 2, first=100))])
    settings = {"formulas": str(tmp_path / "store"), "split": "val", "limit": 6, "per_formula": 2}
    run(checkpoint, tmp_path / "run", **settings)
    known, made = Store(tmp_path / "store", "val"), Store(tmp_path / "run")
    assert made.column("target").values.tolist() == known.ids[:6] * 2
    for at in range(12):
        wanted = known[at % 6].crystals.atomic_numbers
        assert sorted(made[at].crystals.atomic_numbers.tolist()) == sorted(wanted.tolist())
    assert (
        targets_of(CampaignConfig(**{**settings, "limit": 0})).sha256 != targets_of(CampaignConfig(**settings)).sha256
    )  # type: ignore[union-attr]


# ---- crystals that are none ------------------------------------------------------------------------------------------


def test_a_crystal_of_nan_costs_itself_alone(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "formulas.txt"
    file.write_text("NaCl\nCs4\nFe2O3\nCsCl\n")
    poisoned = make_checkpoint(tmp_path / "poisoned.pt", poison=55)
    made = run(poisoned, tmp_path / "bad", formulas=str(file), per_formula=10)
    assert (made.asked, made.written, made.rejected) == (40, 20, {"not-finite": 20})
    assert rejected(tmp_path / "bad") == dict.fromkeys(range(1, 40, 2), "not-finite")
    good = make_checkpoint(tmp_path / "good.pt")
    run(good, tmp_path / "good", formulas=str(file), per_formula=10)
    bad, good_ones = content(tmp_path / "bad"), content(tmp_path / "good")
    assert bad == {id: good_ones[id] for id in bad} and len(good_ones) == 40
    assert check(tmp_path / "bad") == []


def test_nothing_but_rejected_ones(tmp_path: Path) -> None:
    made = run(make_checkpoint(tmp_path / "poisoned.pt", poison=55), tmp_path / "run", n=20, formula="Cs")
    assert (made.written, made.rejected) == (0, {"not-finite": 20})
    grown = run(tmp_path / "poisoned.pt", tmp_path / "run", n=60, formula="Cs")
    assert (grown.written, grown.rejected) == (0, {"not-finite": 60})


def test_odd_cells_are_rejected_by_name(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = AutoPeri.sample

    def odd(self: AutoPeri, request: Any, *rest: Any) -> Crystals:
        made = sample(self, request, *rest)
        lattice, first = made.lattice.clone(), request.index % 16
        lattice[first == 1] = 0.0
        lattice[first == 2] *= 1e12
        lattice[first == 3] = torch.inf
        return Crystals(made.frac_coords, lattice, made.atomic_numbers, made.num_atoms)

    monkeypatch.setattr(AutoPeri, "sample", odd)
    made = run(checkpoint, tmp_path, n=32)
    assert made.rejected == {"bad-volume": 4, "not-finite": 2} and made.written == 26
    assert rejected(tmp_path) == {k + i: "not-finite" if i == 3 else "bad-volume" for k in (0, 16) for i in (1, 2, 3)}


# ---- finished pieces of an unfinished block --------------------------------------------------------------------------


def test_torn_records_are_left_out(tmp_path: Path) -> None:
    some = Sampled.none(np.arange(5), "crash")
    path = tmp_path / "kept"
    for number in range(3):
        Kept(path, []).add(7, number, some)
    data = path.read_bytes()
    each = len(data) // 3
    for cut in (*range(0, len(data), 97), each, 2 * each):
        path.write_bytes(data[:cut])
        kept = Kept(path, [])
        assert path.stat().st_size == cut // each * each
        assert [kept.take(7, number) is not None for number in range(3)] == [
            number < cut // each for number in range(3)
        ]
    for flipped in (each + 2, each + 6, each + 60):
        path.write_bytes(bytes(byte ^ (at == flipped) for at, byte in enumerate(data)))
        kept = Kept(path, [])
        assert kept.take(7, 0) is not None and kept.take(7, 1) is None
    path.write_bytes(data + bytes(1000))
    kept = Kept(path, [])
    assert kept.take(7, 2) is not None and path.stat().st_size == len(data)


def test_the_checkpoint_of_the_tests_is_one(checkpoint: Path) -> None:
    assert read_saved(checkpoint, MODEL)["model"] == "autoperi"
