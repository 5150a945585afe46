"""CDVAE's and DiffCSP's figures against the libraries called plainly: equal, and faster. `pytest -m bench -s` it.

HPCGEN_BENCH_CRYSTALS: crystals on each side of the timed suite (1000); HPCGEN_BENCH_PARITY: of each kind of those
that are compared one by one (500). Wants matminer, smact 2.2.1 and chgnet. HPCGEN_SMACT_4: a folder with SMACT 4.0.2
(pip install --no-deps --target FOLDER smact==4.0.2), whose verdicts are counted beside those of 2.2.1.
"""

import csv
import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import peers
import pytest
from campaign_jobs import run
from known_crystals import shaken
from test_fingerprints import DATA, real

from hpcgen.campaign.config import PACKAGED
from hpcgen.campaign.describe import Described, Side
from hpcgen.crystal.cif import read_cif
from hpcgen.crystal.composition import SYMBOLS, formula_key
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.charge_balance import charge_balanced
from hpcgen.metrics.validity import random_coordinates
from hpcgen.screen.potential import potential_named
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Column, Rows
from hpcgen.store.write import write_store

ROOT = Path(__file__).resolve().parent.parent
N = int(os.environ.get("HPCGEN_BENCH_CRYSTALS", "1000"))
OF_A_KIND = int(os.environ.get("HPCGEN_BENCH_PARITY", "500"))
PROCESSES = 2
CLOSE = 1e-6
SAMPLING: dict[str, Any] = {"steps": 16, "tile": 256, "block": 256, "processes": PROCESSES}
pytestmark = [pytest.mark.bench, pytest.mark.slow]


@pytest.fixture(autouse=True)
def libraries() -> None:
    for name in ("matminer", "smact", "chgnet"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def stored(path: Path, crystals: Crystals, targets: list[str] | None = None) -> Path:
    """A store; targets: what each is a prediction of."""
    spec, count = ColumnSpec("str"), len(crystals)
    columns = {"target": Column(spec, np.array(targets, dtype=object), np.zeros(count, dtype=bool))} if targets else {}
    rows = Rows(crystals, [f"c{at}" for at in range(count)], columns)
    write_store(path, Head("test", {}, dict.fromkeys(columns, spec)), [("train", rows)])
    return path


def evaluated(run: Path, reference: Path, out: Path, *words: Any) -> tuple[dict[str, Any], float]:
    """Figures by the command, and seconds it took."""
    command = ["evaluate", run, "--reference", reference, "--processes", PROCESSES, "--json", out, *words]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpcgen.cli", *map(str, command)], cwd=ROOT, check=True, capture_output=True)
    return json.loads(out.read_text())["figures"], time.perf_counter() - start


def by_the_peers_names(figures: dict[str, Any]) -> dict[str, float]:
    """The suite as compute_metrics.py names it."""
    near, apart = figures["coverage"], figures["wasserstein"]
    found = {
        "struct_valid": figures["validity"]["distances"]["share"],
        "comp_valid": figures["validity"]["composition"]["share"],
        "valid": near["valid"]["share"],
        "wdist_density": apart["density"],
        "wdist_num_elems": apart["num_elements"],
        "struct_div": figures["diversity"]["structure"]["mean"],
        "comp_div": figures["diversity"]["composition"]["mean"],
    }
    for side in ("recall", "precision"):
        found[f"cov_{side}"] = near[side]["share"]
        found |= {f"{name}_{side}": near[f"{name}_{side}"]["mean"] for name in ("amsd", "amcd")}
    return found | ({"wdist_prop": apart["energy"]} if apart["energy"] is not None else {})


def greatest(wanted: dict[str, float], found: dict[str, float]) -> float:
    """Difference."""
    return max(abs(value - found[name]) for name, value in wanted.items())


def one_by_one(out: Path, described: Described, plain: list[peers.Plain]) -> float:
    """Asserts that each crystal has the peers' verdicts; the greatest difference of a fingerprint."""
    with out.with_suffix(".csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    worst = 0.0
    for row, own, one in zip(table, described.fingerprints, plain, strict=True):
        assert row["distances"] == str(int(one.structural)) and row["composition"] == str(int(one.compositional)), row
        assert np.isfinite(own).all() == (one.structure is not None), row
        if one.structure is not None:
            worst = max(worst, float(np.abs(own - one.structure).max()))
    return worst


# ---- speed ---------------------------------------------------------------------------------------------------


def test_the_suite_against_the_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Energies by CHGNet are part of it, on both sides; the figures without them are timed too."""
    known = Crystals.cat(real(N))
    run(PACKAGED, tmp_path / "made", n=N, **SAMPLING)
    generated = Store(tmp_path / "made", dtype=None).rows(range(N)).crystals
    own, reference = (stored(tmp_path / name, side) for name, side in (("own", generated), ("known", known)))
    words = "--samples", N, "--no-novelty"
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    _, quick_s = evaluated(own, reference, tmp_path / "without" / "e.json", *words)
    figures, ours_s = evaluated(own, reference, tmp_path / "with" / "e.json", *words, "--energy")
    start = time.perf_counter()
    plain = peers.in_processes(peers.measured, to_pymatgen(generated) + to_pymatgen(known), PROCESSES)
    middle = time.perf_counter()
    energies = peers.in_processes(peers.energy, to_pymatgen(generated) + to_pymatgen(known), PROCESSES)
    wanted = peers.suite(plain[:N], plain[N:], energies[:N], energies[N:])
    without_s, theirs_s = middle - start, time.perf_counter() - start
    found = by_the_peers_names(figures)
    side = Side(own, None, N, potential_named())
    worst = one_by_one(tmp_path / "with" / "e.json", side.read(tmp_path / "with"), plain[:N])
    with capsys.disabled():
        print(f"\n{N} generated and {N} real crystals of {len(known.batch) / N:.1f} atoms, {PROCESSES} processes: "
              f"libraries {theirs_s:.1f} s, hpcgen evaluate {ours_s:.1f} s, {theirs_s / ours_s:.1f} times as fast; "
              f"without energies {without_s:.1f} s, {quick_s:.1f} s, {without_s / quick_s:.1f} times; "
              f"fingerprints differ by {worst:.1e} at most")  # fmt: skip
        for name, value in wanted.items():
            print(f"{name:16} {value:12.8f} {found[name]:12.8f} {abs(value - found[name]):.1e}")
    assert set(wanted) == set(found)
    assert greatest(wanted, found) < CLOSE and worst < CLOSE
    assert theirs_s > 4 * ours_s


# ---- parity --------------------------------------------------------------------------------------------------


def test_all_kinds_against_the_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real, shaken and random crystals, and predictions of the real ones: the suite, and how they match these."""
    known = real(OF_A_KIND)
    reference = stored(tmp_path / "known", Crystals.cat(known))
    names = [f"c{at}" for at in range(OF_A_KIND)]
    run(PACKAGED, tmp_path / "made", formulas=str(reference), per_formula=2, **SAMPLING)
    made = Store(tmp_path / "made", dtype=None)
    assert list(made.column("target").values) == names * 2, "none rejected"
    predicted = [made[at].crystals for at in range(2 * OF_A_KIND)]
    kinds = {
        "real": known,
        "shaken": [shaken(one, 0.1, seed) for seed, one in enumerate(known)],
        "random": [random_coordinates(one, seed) for seed, one in enumerate(known)],
        "generated": predicted[:OF_A_KIND],
    }
    plain: dict[str, list[peers.Plain]] = {}
    stores = {kind: stored(tmp_path / kind, Crystals.cat(crystals), names) for kind, crystals in kinds.items()}
    for kind, beside in zip(kinds, ("shaken", "real", "real", "real"), strict=True):
        for each in (kind, beside):
            if each not in plain:
                crystals = to_pymatgen(Crystals.cat(kinds[each]))
                plain[each] = peers.in_processes(peers.measured, crystals, PROCESSES)
        (folder := tmp_path / f"suite-{kind}").mkdir()
        told, _ = evaluated(stores[kind], stores[beside], folder / "e.json", "--samples", OF_A_KIND, "--no-novelty")
        worst = one_by_one(folder / "e.json", Side(stores[kind], None, OF_A_KIND).read(folder), plain[kind])
        wanted, found = peers.suite(plain[kind], plain[beside]), by_the_peers_names(told)
        assert set(wanted) == set(found)
        apart = greatest(wanted, found)
        with capsys.disabled():
            print(f"\n{kind} beside {beside}, {OF_A_KIND} each: fingerprints differ by {worst:.1e} at most, "
                  f"the suite's figures by {apart:.1e}; not valid: {sum(not one.valid for one in plain[kind])}, "
                  f"without a fingerprint: {sum(one.structure is None for one in plain[kind])}")  # fmt: skip
        assert worst < CLOSE and apart < CLOSE
    stores["generated"] = stored(tmp_path / "both", Crystals.cat(predicted), names * 2)
    for kind, crystals in (kinds | {"generated": predicted}).items():
        told, _ = evaluated(stores[kind], reference, tmp_path / f"{kind}.json", "--task", "predict")
        wanted, differ = matches(crystals, known, tmp_path / f"{kind}.csv")
        found = {name: (told[name]["share"], told[name]["rms"]) for name in wanted}
        figures = ", ".join(f"{name} {share:.4f} {rms or 0:.4f}" for name, (share, rms) in wanted.items())
        with capsys.disabled():
            print(f"{kind}: rms differ by {differ:.1e} at most; {figures}")
        assert differ < CLOSE
        for name, pair in wanted.items():
            assert found[name] == pytest.approx(pair, abs=CLOSE), (kind, name)


def matches(crystals: list[Crystals], known: list[Crystals], file: Path) -> tuple[dict[str, Any], float]:
    """RecEval and RecEvalBatch of CDVAE and DiffCSP: match rate and RMSE of each kind, as our figures name them.

    crystals: of one sample after the other. Asserts that the table in `file` has each match, and each rms that near.
    """
    targets, predictions = to_pymatgen(Crystals.cat(known)), to_pymatgen(Crystals.cat(crystals))
    k, many = len(predictions) // len(targets), len(targets)
    rms = peers.in_processes(peers.rms_dist, list(zip(predictions, targets * k, strict=True)), PROCESSES)
    with file.open(newline="") as told:
        table = list(csv.DictReader(told))
    assert [row["matched"] for row in table] == [str(int(one is not None)) for one in rms]
    differ = [abs(float(row["rms"]) - one) for row, one in zip(table, rms, strict=True) if one is not None]
    valid, valid_target = (np.array(peers.in_processes(peers.is_valid, side, PROCESSES))
                           for side in (predictions, targets))  # fmt: skip
    each = np.array([np.nan if one is None else one for one in rms]).reshape(k, many)
    ours = np.where(valid.reshape(k, many), each, np.nan)
    found = {
        "match_rate": each,
        "match_rate_valid": ours,
        "match_rate_both_valid": np.where(valid_target, ours, np.nan),
        "first": each[0],
        "first_valid": ours[0],
        "best": np.fmin.reduce(each),
        "best_valid": np.fmin.reduce(ours),
    }
    told = {name: (float(np.isfinite(some).mean()), float(some[np.isfinite(some)].mean()) if np.isfinite(some).any()
            else None) for name, some in found.items()}  # fmt: skip
    return told, max(differ, default=0.0)


# ---- versions of SMACT ---------------------------------------------------------------------------------------


def test_versions_of_smact(capsys: pytest.CaptureFixture[str]) -> None:
    """The rule is 2.2.1's for every real composition; how often newer tables say otherwise."""
    folder = os.environ.get("HPCGEN_SMACT_4")
    if folder is None:
        pytest.skip("HPCGEN_SMACT_4 names no folder with SMACT 4.0.2")
    compositions = real_compositions(every=5)
    ours = np.array([charge_balanced(list(Counter(one).elements())) for one in compositions])
    older = np.array([peers.smact_validity(list(Counter(one).elements())) for one in compositions])
    told = json.dumps([{SYMBOLS[number]: count for number, count in one.items()} for one in compositions])
    counts = {}
    for table in ("smact14", ""):
        found = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "smact_verdicts.py"), table], input=told, text=True, check=True,
            capture_output=True, env={**os.environ, "PYTHONPATH": folder},
        )  # fmt: skip
        newer = np.array(json.loads(found.stdout.splitlines()[-1]))
        counts[table or "default"] = int((newer & ~older).sum()), int((older & ~newer).sum())
    with capsys.disabled():
        print(
            f"\n{len(ours)} compositions, valid by 2.2.1: {older.sum()}, by hpcgen otherwise: {(ours != older).sum()}"
        )
        for table, (more, fewer) in counts.items():
            print(f"SMACT 4.0.2, table {table}: {more} valid there alone, {fewer} in 2.2.1 alone")
    assert (ours == older).all()


def real_compositions(every: int) -> list[dict[int, int]]:
    """Atomic numbers and counts, each reduced composition once."""
    found: dict[str, dict[int, int]] = {}
    for name in ("mp20_bt", "mpts52", "lemat_mix"):
        with gzip.open(DATA / f"{name}.csv.gz", "rt", newline="") as source:
            for row in itertools.islice(csv.DictReader(source), 0, None, every):
                numbers = read_cif(row["cif"])[0].atomic_numbers
                found.setdefault(formula_key(numbers), dict(Counter(numbers.tolist())))
    return list(found.values())
