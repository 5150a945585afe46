"""`hpcgen evaluate`: figures, their denominators, the table behind them, restarts and bad requests."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_crystals import shaken, special

from hpcgen import cli
from hpcgen.campaign import evaluate as evaluate_module
from hpcgen.campaign import measure
from hpcgen.campaign.evaluate import Request, evaluate
from hpcgen.campaign.measure import MeasureBlock, header, pairs_by_target
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.summary import Table, predict_figures, render
from hpcgen.runner.blocks import Block
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
    assert figures["match_rate"] == {
        "count": len(rms), "of": 21, "share": len(rms) / 21, "rms": pytest.approx(np.mean(list(rms.values())))
    }  # fmt: skip
    assert (figures["targets"], figures["samples_per_target"]) == (7, 3)  # 'sixty' has no sample: 21 / 3
    assert figures["first"]["share"] == 6 / 7 and figures["best"]["share"] == 6 / 7
    assert figures["best"]["rms"] < 1e-6
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
    for part in ("of 21 asked", "best of 3 samples", "2 not-finite", f"{100 * len(rms) / 21:.1f} %", "by target id"):
        assert part in shown


def test_generate(run: Path, reference: Path, tmp_path: Path) -> None:
    told = done(Request(run, reference), tmp_path / "deep" / "g.json")
    rows = table(tmp_path / "deep" / "g.csv")
    assert list(rows[0]) == header(False) and len(rows) == 18
    for rule in ("distances", "distances_with_images", "radii", "composition"):
        kept = sum(row[rule] == "1" for row in rows)
        assert told["figures"]["validity"][rule] == {"count": kept, "of": 21, "share": kept / 21}
    assert told["figures"]["formulas"] == 6 and told["figures"]["unique_formulas"] == 6 / 18
    assert told["figures"]["num_atoms"]["counts"] == {"1": 6, "2": 3, "4": 3, "8": 6}
    shown = render(told)
    assert "real" in shown and "random" in shown and "6 distinct, 33.3 % of written" in shown
    without = done(Request(run), tmp_path / "w.json")
    assert without["control"] is None and "random" not in render(without)


def test_an_oracle_matches_all_and_reaches_the_ceiling(tmp_path: Path, reference: Path) -> None:
    path = store(tmp_path / "oracle", list(known().values()), [f"o-{name}" for name in NAMES], NAMES)
    figures = done(Request(path, reference, task="predict"))["figures"]
    assert figures["match_rate"]["share"] == figures["match_rate_strict"]["share"] == figures["best"]["share"] == 1
    assert figures["match_rate"]["rms"] < 1e-6
    assert figures["match_rate_both_valid"]["share"] == figures["ceiling"] < 1


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
    pairs_by_target(Store(run), Store(reference), 18).save(pairs)
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
    assert predict_figures(found, 18)["match_rate"]["of"] == 18


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
        (["--task", "reconstruct"], 2, "comes with a later version; there are now: generate, predict"),
        (["--task", "optimize"], 2, "comes with a later version"),
        (["--task", "dream"], 2, "is unknown"),
        (["--task", "predict"], 2, "needs --reference"),
        (["--split", "val"], 2, "means nothing without --reference"),
        (["--pair", "target"], 2, "means nothing with --task generate"),
        (["--limit", "0"], 2, "--limit 0"),
        (["--processes", "-1"], 2, "--processes -1"),
        (["--seed", "-1"], 2, "--seed -1"),
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
    assert told["figures"]["match_rate"] == {"count": 0, "of": 3, "share": 0.0, "rms": None}
    assert "–" in render(told)
    assert torch.isfinite(torch.tensor(told["figures"]["ceiling"]))
