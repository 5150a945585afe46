"""`hpcgen evaluate`: figures, their denominators, the table behind them, restarts and bad requests."""

import csv
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import campaign_jobs
import numpy as np
import pytest
import torch
from known_crystals import shaken, special

from hpcgen import cli
from hpcgen.campaign import evaluate as evaluate_module
from hpcgen.campaign import measure
from hpcgen.campaign.config import CampaignConfig
from hpcgen.campaign.evaluate import evaluate
from hpcgen.campaign.measure import MeasureBlock, header
from hpcgen.campaign.pairs import pair
from hpcgen.campaign.request import Request
from hpcgen.campaign.targets import targets_of
from hpcgen.config import to_yaml
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.bootstrap import share
from hpcgen.metrics.novelty import COLUMNS as NOVELTY
from hpcgen.metrics.prediction import predict_figures
from hpcgen.metrics.render import render
from hpcgen.metrics.summary import Table
from hpcgen.metrics.targeted import condition_figures
from hpcgen.runner.blocks import Block
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import Team, find_team
from hpcgen.runner.worker import Cursor
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Column, Rows
from hpcgen.store.write import write_store

TEXT = ColumnSpec("str")
NAMES = list(special())  # NaCl, fcc, diamond, hcp, one atom, skewed, sixty
SIZES = (0.0, 0.04, 2.5)  # Å by which the samples of a target are shaken


def known() -> dict[str, Crystals]:
    """The special crystals, the skewed one with helium, which no composition balances."""
    made = special()
    made["skewed"] = replace(made["skewed"], atomic_numbers=torch.tensor([3, 8, 15, 2]))
    return made


def texts(values: list[str]) -> Column:
    return Column(TEXT, np.array(values, dtype=object), np.zeros(len(values), dtype=bool))


def store(path: Path, crystals: list[Crystals], ids: list[str], targets: list[str] | None = None) -> Path:
    columns = {"target": texts(targets)} if targets else {}
    head = Head("campaign", {}, dict.fromkeys(columns, TEXT))
    write_store(path, head, [("val", Rows(Crystals.cat(crystals), ids, columns))])
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return store(tmp_path / "reference", list(known().values()), NAMES)


def predictions() -> dict[str, tuple[str, Crystals]]:
    """Id -> target and crystal: three samples of each target but the largest, none of 'sixty'."""
    made = {}
    for k, size in enumerate(SIZES):
        for name in NAMES[:-1]:
            made[f"{name}-{k}"] = name, shaken(known()[name], size, seed=k)
    return made


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = predictions()
    path = store(tmp_path / "run", [part for _, part in made.values()], list(made), [name for name, _ in made.values()])
    summary = {"asked": 21, "written": 18, "rejected": {"not-finite": 2, "atoms-too-close": 1, "never": 0}, "more": 1}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def alone() -> Team:
    return find_team()


def done(request: Request, out: Path | None = None, processes: int = 0) -> dict[str, Any]:
    found = evaluate(request, out, alone(), processes)
    assert found is not None
    return found


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_predict(run: Path, reference: Path) -> None:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    told = done(Request(run, reference, "val", "predict"))
    assert (told["asked"], told["written"], told["rejected"]) == (21, 18, {"atoms-too-close": 1, "not-finite": 2})
    rows = table(run / "evaluate" / "predict.csv")
    assert [row["id"] for row in rows] == list(predictions())
    peers = StructureMatcher(stol=0.5, ltol=0.3, angle_tol=10)
    rms: dict[str, float] = {}
    for row, (id, (name, crystal)) in zip(rows, predictions().items(), strict=True):
        wanted = peers.get_rms_dist(*to_pymatgen(crystal), *to_pymatgen(known()[name]))
        assert (row["target"], row["asked_for"], row["sample"], row["reason"]) == (name, name, id[-1], "")
        assert row["matched"] == str(int(wanted is not None))
        if wanted is not None:
            rms[id] = wanted[0]
            assert float(row["rms"]) == wanted[0]
    assert 6 < len(rms) < 18
    figures = told["figures"]
    rate = figures["match_rate"]
    assert (rate["count"], rate["of"], rate["share"]) == (len(rms), 21, len(rms) / 21)
    assert rate["rms"] == pytest.approx(np.mean(list(rms.values())))
    assert rate["interval"][0] < rate["share"] < rate["interval"][1]
    assert rate["rms_interval"][0] < rate["rms"] < rate["rms_interval"][1]
    assert (figures["targets"], figures["samples_per_target"]) == (7, 3)  # 'sixty' has no sample: 21 / 3
    assert figures["targets_how"] == "estimated: 21 asked, at most 3 of each"
    assert figures["first"]["share"] == 6 / 7 and figures["best"]["share"] == 6 / 7
    assert figures["best"]["rms"] < 1e-6
    for name in ("first_valid", "best_valid"):  # the skewed one does not balance, so no sample of it counts
        assert (figures[name]["count"], figures[name]["of"]) == (5, 7) and figures[name]["rms"] < 1e-6
    assert sum(part["of"] for part in figures["by_num_atoms"]) == 18
    assert sum(part["count"] for part in figures["by_num_atoms"]) == len(rms)
    valid = {row["id"] for row in rows if row["distances"] == row["composition"] == "1"}
    assert figures["match_rate_valid"]["count"] == len(valid & set(rms)) < len(rms)  # the skewed one does not balance
    assert told["tolerances"]["match"] == {"ltol": 0.3, "stol": 0.5, "angle_tol": 10.0}
    assert told["control"]["real"]["distances"]["of"] == 7
    assert {"pymatgen", "torch", "hpcgen"} <= set(told["versions"])
    assert json.loads((run / "evaluate" / "predict.json").read_text()) == told
    assert sorted(path.name for path in (run / "evaluate").iterdir()) == ["predict.csv", "predict.json"]
    shown = render(told)
    for part in (
        "of 21 asked",
        "best of 3 samples",
        "2 not-finite",
        f"{100 * len(rms) / 21:.1f} %",
        "by target id",
        "ltol 0.3, stol 0.5, angle_tol 10; stricter: ltol 0.2",
        f"pymatgen {told['versions']['pymatgen']}",
    ):
        assert part in shown


def test_generate(run: Path, reference: Path, tmp_path: Path) -> None:
    told = done(Request(run, reference), tmp_path / "deep" / "g.json")
    rows = table(tmp_path / "deep" / "g.csv")
    assert list(rows[0]) == [*header(False), *NOVELTY] and len(rows) == 18
    for rule in ("distances", "distances_with_images", "radii", "composition"):
        kept = sum(row[rule] == "1" for row in rows)
        assert told["figures"]["validity"][rule] == share(kept, 21, seed=0)
    assert told["figures"]["formulas"] == 6 and told["figures"]["unique_formulas"] == 6 / 18
    assert told["figures"]["num_atoms"]["counts"] == {"1": 6, "2": 3, "4": 3, "8": 6}
    shown = render(told)
    assert "real" in shown and "random" in shown and "6 distinct, 33.3 % of written" in shown
    without = done(Request(run), tmp_path / "w.json")
    assert without["figures"].keys() == told["figures"].keys() - {
        "coverage", "energy", "wasserstein", "element_divergence", "symmetry", "diversity", "samples"
    }  # fmt: skip
    control = without["control"]
    assert (control["of"], control["crystals"]) == ("run", 18) and "real" not in control
    assert 0 <= control["random"]["radii"]["share"] < 1, "coordinates at random"
    assert "random: the cells of 18 of these crystals with" in render(without)


def test_what_was_asked_for_beside_what_came(tmp_path: Path) -> None:
    checkpoint = campaign_jobs.make_checkpoint(tmp_path / "model.pt")
    campaign_jobs.run(checkpoint, tmp_path / "run", n=4, conditions={"band_gap": 1.5})
    shown = render(done(Request(tmp_path / "run"), tmp_path / "g.json"))
    assert "condition     band_gap = 1.5: not screened" in shown
    found = condition_figures({"a": 2.0, "b": 1.0}, {"a": np.array([1.0, np.nan, 4.0])}, seed=0)
    assert (found["a"]["asked"], found["a"]["known"], found["a"]["mean_absolute_error"]) == (2.0, 2, 1.5)
    assert found["a"]["mean_absolute_error_interval"] == [1, 2]
    assert found["b"]["known"] == 0 and found["b"]["mean_absolute_error"] is None


def test_validity_by_size(reference: Path, tmp_path: Path) -> None:
    """Crystals larger than any of the reference stand apart."""
    small = store(tmp_path / "small", [known()["fcc"], known()["NaCl"]], ["a", "b"])
    large = store(tmp_path / "large", [known()["sixty"], known()["NaCl"], known()["fcc"]], ["c", "d", "e"])
    told = done(Request(large, small, coverage=False), tmp_path / "l.json")
    parts = told["figures"]["by_num_atoms"]
    assert [part["atoms"] for part in parts] == [[1, 4], [5, 8], [53, 60]] and told["figures"]["largest_known"] == 8
    assert [part["valid"]["of"] for part in parts] == [1, 1, 1] and parts[1]["valid"]["count"] == 1
    shown = render(told)
    assert "53 to 60 atoms *" in shown and "5 to 8 atoms *" not in shown and "has 8 atoms" in shown
    assert "has 8 atoms" not in render(done(Request(large, coverage=False), tmp_path / "w.json"))


def test_likeness_to_the_reference(run: Path, reference: Path, tmp_path: Path) -> None:
    """Of 18 crystals, six copies of known ones among them, every known one is covered but for the copy's tolerance."""
    found = done(Request(run, reference, samples=5, seed=2), tmp_path / "g.json")
    figures = found["figures"]
    coverage, valid = figures["coverage"], figures["validity"]["valid"]["count"]
    assert coverage["precision"]["of"] == 21 and coverage["recall"]["of"] == coverage["reference"] == 7
    assert coverage["cut_offs"] == {"structure": 0.4, "composition": 10.0}
    assert coverage["recall"]["count"] == 6, "of 'sixty' there is no crystal"
    assert coverage["without_fingerprint"] == {"run": 0, "reference": 0}
    assert coverage["valid"] == figures["validity"]["valid"]
    assert figures["samples"] == {"taken": 5, "asked": 5, "short": False, "seed": 2} and valid > 5
    shown = render(found)
    assert "recall, of 7 known" in shown and "of 5 valid crystals, seed 2" in shown and "fewer than" not in shown
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("described-*.npy")}
    assert len(kept) == 2
    again = done(Request(run, reference, cut_offs="carbon24"), tmp_path / "g.json")
    assert again["figures"]["coverage"]["precision"]["count"] <= coverage["precision"]["count"]
    assert f"of {valid} valid crystals, fewer than the 1,000 asked for" in render(again)
    assert kept == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("described-*.npy")}, "made once"
    assert "coverage" not in done(Request(run, reference, coverage=False), tmp_path / "n.json")["figures"]
    assert "energy  " not in shown and (figures["energy"]["potential"], figures["energy"]["of"]) == ("", 0)
    energy = done(Request(run, reference, energy=True), tmp_path / "e.json")
    assert energy["figures"]["energy"]["of"] == 18 and energy["figures"]["wasserstein"]["energy"] > 0
    assert "CHGNet 0.3.0 (chgnet" in render(energy)


def test_an_oracle_matches_all_and_reaches_the_ceiling(tmp_path: Path, reference: Path) -> None:
    path = store(tmp_path / "oracle", list(known().values()), [f"o-{name}" for name in NAMES], NAMES)
    figures = done(Request(path, reference, task="predict"))["figures"]
    assert figures["match_rate"]["share"] == figures["match_rate_strict"]["share"] == figures["best"]["share"] == 1
    assert figures["match_rate"]["rms"] < 1e-6
    assert figures["match_rate_both_valid"]["share"] == figures["ceiling"]["share"] < 1


def test_workers_give_the_same_table(run: Path, reference: Path, tmp_path: Path) -> None:
    request = Request(run, reference, task="predict")
    done(request, tmp_path / "a.json")
    done(request, tmp_path / "b.json", processes=2)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_pairs_by_composition(run: Path, reference: Path, tmp_path: Path) -> None:
    """Two crystals of one composition in the reference: the nearer one counts."""
    other = known()
    other["far"] = shaken(other["skewed"], 0.3, seed=9)
    both = store(tmp_path / "both", [*reversed(other.values())], [*reversed(other)])
    told = done(Request(run, both, task="predict", pair="composition"), tmp_path / "p.json")
    rows = {row["id"]: row for row in table(tmp_path / "p.csv")}
    assert rows["skewed-1"]["candidates"] == "2" and rows["skewed-1"]["target"] == "skewed"
    assert rows["skewed-1"]["asked_for"] == "HeLiOP, 4 atoms"
    assert rows["hcp-0"]["candidates"] == "1"
    assert "by reduced composition" in render(told)
    metre, ids = told["figures"]["metre"], [*reversed(other)]
    best: dict[str, float] = {}
    for row in rows.values():
        for place, rms in (told.split(":") for told in row["met"].split()):
            best[ids[int(place)]] = min(float(rms), best.get(ids[int(place)], 1.0))
    assert set(best) >= {"NaCl", "skewed"} and "sixty" not in best
    assert (metre["count"], metre["of"]) == (len(best), 8)
    assert metre["crms"] == pytest.approx((sum(best.values()) + 0.5 * (8 - len(best))) / 8)
    assert f"METRe: {len(best)} of 8 known crystals" in render(told)
    assert "metre" not in done(Request(run, both, task="predict"), tmp_path / "t.json")["figures"]
    plain = store(tmp_path / "plain", [known()["NaCl"]], ["x"])  # without a column target
    found = done(Request(plain, reference, task="predict"))
    assert found["figures"]["match_rate"]["share"] == 1.0 and "composition" in found["paired"]


def test_limit_counts_rejected_ones_in_proportion(run: Path, reference: Path) -> None:
    told = done(Request(run, reference, task="predict", limit=6))
    assert (told["asked"], told["written"], told["rejected"]) == (7, 6, {"in-proportion": 1})
    assert told["figures"]["match_rate"]["count"] == 6
    assert "the first 6 of 18 crystals written, of 21 asked" in render(told)
    assert done(Request(run, reference, task="predict", limit=99))["asked"] == 21


def test_a_target_that_is_not_there(run: Path, reference: Path, tmp_path: Path) -> None:
    some = store(tmp_path / "some", [known()["NaCl"]], ["NaCl"])
    told = done(Request(run, some, task="predict"))
    assert told["not_measured"] == {"no-target": 15} and told["figures"]["match_rate"]["of"] == 21
    assert "15 no-target" in render(told)
    none = store(tmp_path / "none", [known()["fcc"]], ["mp-1"])
    assert cli.main(["evaluate", str(run), "--reference", str(none), "--task", "predict"]) == 4
    assert cli.main(["evaluate", str(some), "--reference", str(none), "--task", "predict"]) == 4


def test_a_match_that_hangs_or_fails_costs_itself_alone(
    run: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = tmp_path / "pairs.npz"
    pair("target", run, Store(reference), 18, 18).save(pairs)
    work = MeasureBlock(run, 18, (reference, None), pairs)
    begun: list[int] = []
    cursor = Cursor([0] * 4, lambda: None, tmp_path / "keep")
    cursor.culprits = {1: "timeout", 2: "crash"}
    monkeypatch.setattr(cursor, "at", begun.append)
    real = measure.Comparison.match

    def odd(self: measure.Comparison, predicted: Crystals, target: Crystals) -> object:
        if len(begun) == 4:
            raise IndexError("an odd\ncell")
        return real(self, predicted, target)

    monkeypatch.setattr(measure.Comparison, "match", odd)
    assert work(Block(0, tmp_path / "x", 18), tmp_path / "rows.csv", cursor) == {"measured": 18}
    rows = [dict(zip(header(True), line, strict=True)) for line in csv.reader((tmp_path / "rows.csv").open())]
    assert [row["reason"] for row in rows[:5]] == ["", "timeout", "crash", "IndexError: an odd cell", ""]
    assert [row["matched"] for row in rows[:5]] == ["1", "0", "0", "0", "1"]
    assert begun == list(range(18))
    found = Table(iter(rows))
    assert found.reasons == {"timeout": 1, "crash": 1, "IndexError": 1}
    assert predict_figures(found, 18, seed=0)["match_rate"]["of"] == 18


def test_it_goes_on_where_it_stopped(
    run: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate_module, "rows_per_block", lambda count, predicts: 5)
    real, calls = measure.MeasureBlock.__call__, []

    def interrupted(self: MeasureBlock, block: Block, draft: Path, cursor: Cursor) -> object:
        calls.append(block.index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, block, draft, cursor)

    monkeypatch.setattr(measure.MeasureBlock, "__call__", interrupted)
    words = ["evaluate", str(run), "--reference", str(reference), "--task", "predict", "--processes", "0"]
    assert cli.main(words) == 75
    assert "goes on from here" in capsys.readouterr().err
    assert not (run / "evaluate" / "predict.json").exists()
    assert cli.main(words) == 0
    assert len(calls) == 5 and len(set(calls)) == 4  # four blocks, one of them begun twice
    first = capsys.readouterr().out
    assert cli.main(words) == 0
    assert len(calls) == 5 and capsys.readouterr().out == first  # done is done
    assert cli.main([*words, "--seed", "1"]) == 0
    assert len(calls) == 9  # other settings, another evaluation


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--task", "reconstruct"], 2, "comes with a later version; there are now: generate, predict, optimize"),
        (["--task", "optimize"], 2, "--task optimize needs --reference STORE, whose percentiles"),
        (["--task", "dream"], 2, "is unknown"),
        (["--task", "predict"], 2, "needs --reference"),
        (["--split", "val"], 2, "means nothing without --reference"),
        (["--pair", "target"], 2, "means nothing with --task generate"),
        (["--limit", "0"], 2, "--limit 0"),
        (["--processes", "-1"], 2, "--processes -1"),
        (["--seed", "-1"], 2, "--seed -1"),
        (["--cut-offs", "mp21"], 2, "--cut-offs mp21: want one of mp20, perov5, carbon24"),
        (["--energy"], 2, "--energy: means nothing without --reference and a coverage"),
        (["--samples", "0"], 2, "--samples 0: want at least 1"),
        (["--pair-timeout", "nan"], 2, "--pair-timeout nan"),
        (["--reference", "/nowhere"], 4, "/nowhere: is no folder"),
        (["--json", "x.csv"], 2, "want the name of a JSON file"),
    ],
)
def test_bad_requests(run: Path, words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(run), *words]) == code
    err = capsys.readouterr().err
    assert told in err and err.startswith("hpcgen: ") and err.count("\n") == 1
    assert not (run / "evaluate").exists()


def test_bad_stores(run: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run), "--reference", str(reference), "--task", "predict"]
    assert cli.main([*words, "--split", "train"]) == 4
    assert "split 'train' is not in the store" in capsys.readouterr().err
    assert cli.main(["evaluate", str(reference), "--reference", str(run), "--task", "predict", "--pair", "target"]) == 4
    assert "no column 'target'" in capsys.readouterr().err
    (run / "summary.json").write_text('{"asked": 30, "rejected": {"x": 1}}')
    assert cli.main(words) == 4
    assert "30 crystals asked for are not the 18 of the store and 1 rejected ones" in capsys.readouterr().err
    (run / "summary.json").write_text("[]")
    assert cli.main(words) == 4
    assert "no summary of a campaign" in capsys.readouterr().err


def test_no_formula_and_no_match_still_give_numbers(tmp_path: Path, reference: Path) -> None:
    far = [shaken(known()["NaCl"], 3.0, seed=k) for k in range(3)]
    path = store(tmp_path / "far", far, list("abc"), ["NaCl"] * 3)
    told = done(Request(path, reference, task="predict"))
    assert told["figures"]["match_rate"] == share(0, 3, seed=0) | {"rms": None, "rms_interval": None}
    assert "–" in render(told)
    assert torch.isfinite(torch.tensor(told["figures"]["ceiling"]["share"]))


@pytest.mark.parametrize("valid", [0, 1, 3])
def test_fewer_valid_crystals_than_samples_asked_for(tmp_path: Path, reference: Path, valid: int) -> None:
    """What can be computed of them is, and it is said and flagged that there are fewer."""
    bad = replace(known()["fcc"], lattice=known()["fcc"].lattice * 0.1)
    crystals = [*list(known().values())[:valid], *[bad] * (4 - valid)]
    told = done(Request(store(tmp_path / "few", crystals, list("abcd")), reference, novelty=False), tmp_path / "e.json")
    figures, shown = told["figures"], render(told)
    assert figures["validity"]["valid"]["count"] == valid
    assert figures["samples"] == {"taken": valid, "asked": 1000, "short": True, "seed": 0}
    assert f"of {valid} valid crystals, fewer than the 1,000 asked for" in shown
    assert (figures["wasserstein"]["density"] is None) == (valid == 0)
    assert (figures["diversity"]["structure"]["mean"] is None) == (valid < 2)
    assert figures["charges"] == share(int(valid > 0), 5 - max(valid, 1), seed=0) | {"undetermined": max(valid - 1, 0)}
    json.dumps(told, allow_nan=False)


def test_an_empty_store_is_refused(tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "empty", Head("test"), [])
    (tmp_path / "nothing").mkdir()
    for words, said in (
        (["empty"], "empty: the store holds no crystals"),
        (["nothing"], "nothing: "),
        (["reference", "--reference", "empty"], "empty: the store holds no crystals"),
        (["reference", "--reference", "empty", "--task", "predict"], "empty: the store holds no crystals"),
    ):
        paths = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in words]
        assert cli.main(["evaluate", *paths, "--processes", "0"]) == 4, words
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1


# ---- campaigns: what was asked for is known, also of what was rejected --------------------------------------


def asked_of(folder: Path, lines: list[str], k: int, lost: list[str], **settings: Any) -> Path:
    """The run folder of a campaign that was asked for k crystals of each line and made each perfectly, but the lost."""
    names = [(name, f"{name}-{sample}") for sample in range(k) for name in lines]
    kept = [at for at, (_, id) in enumerate(names) if id not in lost]
    head = Head("campaign", {}, {"index": ColumnSpec("int"), "target": TEXT})
    columns = {
        "index": Column(ColumnSpec("int"), np.array(kept, dtype=np.int64), np.zeros(len(kept), dtype=bool)),
        "target": texts([names[at][0] for at in kept]),
    }
    crystals = Crystals.cat([known()[names[at][0]] for at in kept])
    write_store(folder, head, [("all", Rows(crystals, [f"s0-{at}" for at in kept], columns))])
    config = CampaignConfig(n=len(names), per_formula=k, **settings)
    if config.formulas:
        targets = targets_of(config)
        assert targets is not None and targets.names(np.arange(len(lines))) == lines
        config = replace(config, targets_sha256=targets.sha256)
    (folder / "config.yaml").write_text(to_yaml(config))
    told = {"asked": len(names), "written": len(kept), "rejected": {"not-finite": len(names) - len(kept)}}
    (folder / "summary.json").write_text(json.dumps(told))
    return folder


def predicted(run: Path, reference: Path, **how: Any) -> dict[str, Any]:
    return done(Request(run, reference, task="predict", **how))["figures"]


def part(figures: dict[str, Any], name: str) -> tuple[int, int]:
    return figures[name]["count"], figures[name]["of"]


def test_targets_are_counted_as_they_were_asked_for(tmp_path: Path) -> None:
    lines = ["NaCl", "fcc"]
    reference = store(tmp_path / "reference", [known()[name] for name in lines], lines)
    run = asked_of(tmp_path / "run", lines, 3, ["NaCl-1", "fcc-2"], formulas=str(reference))
    figures = predicted(run, reference)
    assert (figures["targets"], figures["samples_per_target"]) == (2, 3)
    assert figures["targets_how"] == "lines of the campaign"
    assert part(figures, "first") == part(figures, "best") == (2, 2)
    assert [(row["line"], row["sample"]) for row in table(run / "evaluate" / "predict.csv")] == [
        ("0", "0"), ("1", "0"), ("1", "1"), ("0", "2")
    ]  # fmt: skip


def test_a_rejected_first_sample_is_a_miss(tmp_path: Path) -> None:
    lines = ["NaCl", "fcc", "diamond"]
    reference = store(tmp_path / "reference", [known()[name] for name in lines], lines)
    run = asked_of(tmp_path / "run", lines, 2, ["NaCl-0", "fcc-0"], formulas=str(reference))
    for pairing in ("target", "composition"):
        figures = predicted(run, reference, pair=pairing)
        assert part(figures, "first") == (1, 3) and part(figures, "best") == (3, 3)
        assert part(figures, "match_rate") == (4, 6)
        assert part(figures, "ceiling") == (6, 6)  # every target is valid, whatever was made of it


def test_lines_of_one_composition_are_targets_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "formulas.txt"
    file.write_text("Na4Cl4\nNa4Cl4\n")
    run = asked_of(tmp_path / "run", ["NaCl", "NaCl"], 1, [])
    config = CampaignConfig(n=2, formulas=str(file))
    (run / "config.yaml").write_text(to_yaml(config))
    figures = predicted(run, store(tmp_path / "reference", [known()["NaCl"]], ["NaCl"]), pair="composition")
    assert figures["targets"] == 2 and part(figures, "first") == part(figures, "best") == (2, 2)


@pytest.mark.parametrize("pairing", ["target", "composition"])
def test_the_ceiling_is_of_all_asked(tmp_path: Path, pairing: str) -> None:
    """A valid and an invalid target of which nothing was made; when the formulas are gone, they are not counted."""
    lines = ["NaCl", "fcc", "skewed", "diamond"]  # the skewed one does not balance
    reference = store(tmp_path / "reference", [known()[name] for name in lines], lines)
    formulas = store(tmp_path / "formulas", [known()[name] for name in lines], lines)
    lost = ["fcc-0", "fcc-1", "skewed-0", "skewed-1", "NaCl-1"]
    run = asked_of(tmp_path / "run", lines, 2, lost, formulas=str(formulas))
    figures = predicted(run, reference, pair=pairing)
    assert part(figures, "ceiling") == (6, 8) and figures["ceiling"]["share"] == 0.75
    assert part(figures, "first") == (2, 4) and part(figures, "match_rate_both_valid") == (3, 8)
    (formulas / "manifest.json").unlink()
    (run / "evaluate" / "predict.json").unlink()
    assert part(predicted(run, reference, pair=pairing), "ceiling") == (4, 4)


def test_one_formula_is_one_target(tmp_path: Path) -> None:
    reference = store(tmp_path / "reference", [known()["NaCl"]], ["Na4Cl4"])
    run = asked_of(tmp_path / "run", ["NaCl"], 1, [])
    (run / "config.yaml").write_text(to_yaml(CampaignConfig(n=3, formula="Na4Cl4")))
    (run / "summary.json").write_text(json.dumps({"asked": 3, "rejected": {"crash": 2}}))
    figures = predicted(run, reference, pair="composition")
    assert (figures["targets"], figures["samples_per_target"]) == (1, 3)
    assert part(figures, "first") == (1, 1) and part(figures, "ceiling") == (3, 3)


def test_the_limit_of_a_campaign_is_exact(tmp_path: Path) -> None:
    lines = ["NaCl", "fcc", "diamond"]
    reference = store(tmp_path / "reference", [known()[name] for name in lines], lines)
    run = asked_of(tmp_path / "run", lines, 2, ["fcc-0", "NaCl-1"], formulas=str(reference))
    told = done(Request(run, reference, task="predict", limit=2))
    assert (told["asked"], told["written"], told["rejected"]) == (3, 2, {"for-any-reason": 1})
    assert part(told["figures"], "first") == (2, 3) and told["figures"]["samples_per_target"] == 1
    told = done(Request(run, reference, task="predict", limit=1))
    assert told["asked"] == told["figures"]["targets"] == 1


def test_settings_that_are_no_campaigns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = store(tmp_path / "reference", [known()["NaCl"]], ["NaCl"])
    run = asked_of(tmp_path / "run", ["NaCl"], 1, [], formulas=str(reference))
    words = ["evaluate", str(run), "--reference", str(reference), "--task", "predict", "--processes", "0"]
    for text, told in (("colour: red", "unknown key colour"), ("n: 3\nformulas: x\nper_formula: 2", "want a multiple")):
        (run / "config.yaml").write_text(text)
        assert cli.main(words) == 4
        assert told in capsys.readouterr().err
        assert cli.main(["evaluate", str(run), "--processes", "0"]) == 0  # validity needs none of it


@pytest.mark.parametrize("task", ["generate", "predict"])
def test_a_campaign_of_which_all_was_rejected(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    reference = store(tmp_path / "reference", [known()["NaCl"]], ["Na4Cl4"])
    bad = campaign_jobs.make_checkpoint(tmp_path / "bad.pt", poison=11)
    file = tmp_path / "formulas.txt"
    file.write_text("Na4Cl4\nNa2O\n")
    made = campaign_jobs.run(bad, tmp_path / "run", formulas=str(file), per_formula=2)
    assert made.written == 0
    words = ["evaluate", str(tmp_path / "run"), "--reference", str(reference), "--task", task, "--processes", "0"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "rejected: 4 not-finite" in shown and "of 4 asked" in shown
    told = json.loads((tmp_path / "run" / "evaluate" / f"{task}.json").read_text())
    assert part(told["figures"]["validity"], "valid") == (0, 4)
    if task == "predict":
        assert part(told["figures"], "match_rate") == (0, 4) and part(told["figures"], "best") == (0, 2)
        assert part(told["figures"], "ceiling") == (2, 4)  # Na2O is not in the reference
    assert cli.main([*words[:2], "--processes", "0"]) == 0  # without reference
    assert cli.main(["evaluate", str(tmp_path / "run"), "--limit", "5", "--processes", "0"]) == 0


# ---- several members ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [1, 2])
def test_the_lowest_rank_alive_speaks(run: Path, reference: Path, monkeypatch: pytest.MonkeyPatch, other: int) -> None:
    """Rank 0 of 3 never came. Of the others the lower one waits for the higher one, and speaks."""
    team, peer = (Team("array", rank, 3, "launch") for rank in (3 - other, other))
    real, peers = evaluate_module.once, []

    def accompanied(path: Path, make: Any, *, lease: Lease, stop: StopFlag) -> bool:
        if not peers:
            peers.append(Lease.take(lease.folder, peer))
            if other == 2:
                threading.Timer(1.0, peers[0].release).start()
        return real(path, make, lease=lease, stop=stop)

    monkeypatch.setattr(evaluate_module, "once", accompanied)
    began = time.monotonic()
    found = evaluate(Request(run, reference, task="predict"), None, team, 0)
    assert (found is not None) == (other == 2)
    assert json.loads((run / "evaluate" / "predict.json").read_text())["written"] == 18
    if found is None:
        peers[0].release()
    else:
        assert time.monotonic() - began > 0.9
        assert sorted(path.name for path in (run / "evaluate").iterdir()) == ["predict.csv", "predict.json"]


@pytest.mark.mpi
def test_ranks_of_mpi_share_an_evaluation(run: Path, reference: Path, tmp_path: Path) -> None:
    words = ["evaluate", str(run), "--reference", str(reference), "--task", "predict", "--processes", "0", "--json"]
    command = [sys.executable, "-m", "hpcgen.cli", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(campaign_jobs.ROOT)}
    mpi = [str(Path(sys.executable).parent / "mpiexec"), "-n", "2"]
    ended = subprocess.run(
        [*mpi, *command, str(tmp_path / "a.json")], env=env, capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("best of 3 samples") == 1, "one rank speaks"
    done(Request(run, reference, task="predict"), tmp_path / "b.json")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.csv", "a.json"]
