"""Properties asked for: Recall@K and the success of an optimisation, by hand and through `hpcgen evaluate`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from known_crystals import special

from hpcgen import cli
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.targeted import recall_figures, success_figures
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.rows import Column, Rows
from hpcgen.store.write import write_store

SALT = special()["NaCl"]
NUMBER, TEXT, FLAG = ColumnSpec("float", "eV/atom"), ColumnSpec("str"), ColumnSpec("bool")


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_recall_by_hand() -> None:
    values = np.array([0.0, 1, 2, 3, np.nan, 4, 5, 6, 7, 8])
    ranks = np.array([9.0, 0, 8, 1, 0, 2, np.nan, 3, 4, 5])
    found = recall_figures(values, ranks, k=3, top=0.3, seed=1)  # of 8: best 0, 1, 3 (2.4 rounded up); first 1, 3, 5
    assert (found["count"], found["of"], found["crystals"], found["k"]) == (1, 3, 8, 3)
    assert found["interval"][0] <= 1 / 3 <= found["interval"][1]
    assert recall_figures(values, ranks, k=8, top=0.3, seed=1)["share"] == 1
    highest = recall_figures(values, ranks, k=3, top=0.3, seed=1, highest=(True, False))  # best 9, 8, 7
    assert highest["count"] == 0
    assert recall_figures(values, -ranks, k=3, top=0.3, seed=1, highest=(False, True))["count"] == 1
    assert recall_figures(values, values, k=2, top=0.2, seed=1)["share"] == 1
    nothing = recall_figures(np.full(3, np.nan), np.arange(3.0), k=1, top=0.5, seed=1)
    assert (nothing["count"], nothing["of"], nothing["interval"]) == (0, 0, None)


def by_cdvae(values: np.ndarray, valid: np.ndarray, limits: np.ndarray, starts: int) -> list[float]:
    """As the paper says it: the best of the valid candidates of each start, and how many are within each limit."""
    best = np.full(starts, np.inf)
    for at in range(len(values)):
        if valid[at]:
            best[at % starts] = min(best[at % starts], values[at])
    return [float((best <= limit).mean()) for limit in limits]


def test_success_is_cdvaes() -> None:
    chance = np.random.default_rng(2)
    known = chance.normal(size=400)
    values, valid = chance.normal(-0.5, 1, 100), chance.random(100) < 0.6
    found = success_figures(values, valid, np.arange(100) % 10, known, asked=100, seed=0)
    limits = np.percentile(known, [5, 10, 15])
    shares = [found[f"sr{percent}"]["share"] for percent in (5, 10, 15)]
    assert shares == by_cdvae(values, valid, limits, 10) and 0 < shares[0] < shares[-1]
    assert [found[f"sr{percent}"]["limit"] for percent in (5, 10, 15)] == limits.tolist()
    assert (found["starts"], found["candidates"]) == (10, 10)
    upside = success_figures(-values, valid, np.arange(100) % 10, -known, asked=100, seed=0, highest=True)
    assert [upside[f"sr{percent}"]["share"] for percent in (5, 10, 15)] == shares
    assert upside["sr5"]["limit"] == pytest.approx(np.percentile(-known, 95))


def test_lost_candidates_and_values_are_no_success() -> None:
    known = np.linspace(0, 1, 101)
    values = np.array([0.01, 0.01, np.nan, 0.9])
    found = success_figures(values, np.array([True, False, True, True]), np.arange(4), known, asked=8, seed=0)
    assert (found["sr5"]["count"], found["sr5"]["of"], found["without_value"]) == (1, 8, 1)
    grouped = success_figures(values, np.ones(4, dtype=bool), np.array([0, 0, 0, 1]), known, asked=12, seed=0)
    assert (grouped["starts"], grouped["candidates"], grouped["sr15"]["count"]) == (4, 3, 1)
    none = success_figures(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=int), known, asked=3, seed=0)
    assert (none["starts"], none["sr15"]["share"]) == (3, 0)


# ---- through the command line ----------------------------------------------------------------------------------------


def column(spec: ColumnSpec, values: list[object]) -> Column:
    missing = np.array([value is None for value in values])
    filler = {"float": np.nan, "str": "", "bool": False}[spec.kind]
    kind = {"float": np.float64, "str": object, "bool": bool}[spec.kind]
    return Column(spec, np.array([filler if value is None else value for value in values], dtype=kind), missing)


def store(path: Path, valid: list[bool], **columns: tuple[ColumnSpec, list[object]]) -> Path:
    """Rock salt, which is valid, or of helium and oxygen, which is not; and columns."""
    other = replace(SALT, atomic_numbers=torch.where(SALT.atomic_numbers == 11, 2, 8))
    crystals = Crystals.cat([SALT if good else other for good in valid])
    made = {name: column(*told) for name, told in columns.items()}
    head = Head("test", {}, {name: told[0] for name, told in columns.items()})
    write_store(path, head, [("all", Rows(crystals, [f"c{k}" for k in range(len(valid))], made))])
    return path


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return store(tmp_path / "known", [True] * 21, gap=(NUMBER, [k / 20 for k in range(21)]), name=(TEXT, ["x"] * 21),
                 none=(NUMBER, [None] * 21))  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return store(
        tmp_path / "run", [True, True, False, True, True, True],
        gap=(NUMBER, [0.5, 0.04, 0.0, 0.12, None, 0.99]), start=(TEXT, ["a", "a", "b", "b", "c", None]),
        other=(TEXT, ["x", "x", "y", "y", "y", "y"]), score=(NUMBER, [3, 1, 2, 0, 0, 4]), sound=(FLAG, [True] * 6),
        none=(NUMBER, [None] * 6),
    )  # fmt: skip


def evaluated(run: Path, *words: str) -> dict[str, object]:
    out = run.parent / "e.json"
    assert cli.main(["evaluate", str(run), "--json", str(out), "--processes", "0", *words]) == 0
    return json.loads(out.read_text())["figures"]


def test_optimize(run: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "optimize", "--reference", str(reference), "--property"]
    found = evaluated(run, *words, "gap")["success"]
    assert (found["starts"], found["candidates"], found["grouped_by"]) == (4, 2, "start")  # a, b, c, and one alone
    assert [found[f"sr{p}"]["count"] for p in (5, 10, 15)] == [1, 1, 2]  # b's best is not valid
    assert [found[f"sr{p}"]["limit"] for p in (5, 10, 15)] == pytest.approx([0.05, 0.1, 0.15])
    shown = capsys.readouterr().out
    assert "SR5" in shown and "at most 0.05" in shown and "of 4 starts" in shown and "by the column start" in shown
    assert "without a value: 1" in shown and "25.0 % [" in shown
    assert evaluated(run, *words[:-1], "--property=-gap")["success"]["sr5"]["count"] == 1  # 0.99 is at least 0.95
    assert "at least 0.95" in capsys.readouterr().out
    assert evaluated(run, *words, "gap", "--start", "other")["success"]["starts"] == 2
    assert evaluated(run, *words, "gap", "--limit", "2")["success"]["starts"] == 1
    (run / "summary.json").write_text(json.dumps({"asked": 10, "rejected": {"crash": 4}}))
    assert evaluated(run, *words, "gap")["success"]["starts"] == 5


def test_recall(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--property", "gap", "--rank-by", "score", "--recall-of", "0.4", "--no-novelty"]
    assert evaluated(run, *words)["recall_at_k"]["share"] == 1
    shown = capsys.readouterr().out
    assert (
        "recall        100.0 % [100.0, 100.0] of the 2 best by gap (40.0 % of 5) among the first 100 by score" in shown
    )
    found = evaluated(run, *words, "--recall-at", "2")["recall_at_k"]
    assert (found["count"], found["of"]) == (1, 2)
    assert evaluated(run, *words[2:], "--property=-gap", "--recall-at", "2")["recall_at_k"]["count"] == 0


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--task", "optimize", "--reference", "known"], 2, "--task optimize needs --property NAME"),
        (["--task", "optimize", "--property", "gap"], 2, "--task optimize needs --reference STORE"),
        (["--task", "optimize", "--reference", "known", "--property", "mass"], 4, "run: no column 'mass'; the"),
        (["--task", "optimize", "--reference", "known", "--property", "score"], 4, "known: no column 'score'"),
        (["--task", "optimize", "--reference", "known", "--property", "none"], 4, "known: column 'none' has no value"),
        (["--task", "optimize", "--reference", "known", "--property", "other"], 4, "'other' is of kind str"),
        (["--task", "optimize", "--reference", "known", "--property", "gap", "--start", "seed"], 4, "no column 'seed'"),
        (["--property", "gap"], 2, "--property gap: means nothing without --rank-by"),
        (["--rank-by", "gap"], 2, "--rank-by gap: means nothing without --property"),
        (["--start", "start"], 2, "--start start: means nothing with --task generate"),
        (["--property", "gap", "--rank-by", "sound"], 4, "'sound' is of kind bool, want numbers"),
        (["--property", "gap", "--rank-by", "score", "--recall-at", "0"], 2, "--recall-at 0: want at least 1"),
        (["--property", "gap", "--rank-by", "score", "--recall-of", "nan"], 2, "--recall-of nan: want a share"),
    ],
)  # fmt: skip
def test_bad_requests(
    run: Path, reference: Path, words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(run.parent)
    assert cli.main(["evaluate", "run", *words]) == code
    err = capsys.readouterr().err
    assert told in err and err.startswith("hpcgen: ") and err.count("\n") == 1
    assert not (run / "evaluate").exists()
