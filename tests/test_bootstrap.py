"""Intervals are those of a bootstrap over what is independent, also of many values and of pairs."""

import csv
import io

import numpy as np
import pytest
from scipy.spatial.distance import pdist, squareform

from hpcgen.metrics.bootstrap import GROUPS, mean, mean_interval, ratio_interval, share_interval
from hpcgen.metrics.coverage import diversity
from hpcgen.metrics.prediction import metre_figures, predict_figures
from hpcgen.metrics.summary import Table, bond_figures
from hpcgen.metrics.words import mean_told, share_told

CHANCE = np.random.default_rng(5)


def width(interval: list[float] | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


def test_a_ratio_is_drawn_pair_by_pair() -> None:
    above, below = CHANCE.poisson(3, 300), CHANCE.poisson(7, 300) + 1
    plain = [above[some].sum() / below[some].sum() for some in (CHANCE.integers(0, 300, 300) for _ in range(4000))]
    assert ratio_interval(above, below, seed=2) == pytest.approx(np.quantile(plain, [0.025, 0.975]).tolist(), abs=0.01)
    assert ratio_interval([0, 0], [0, 0], seed=2) is None
    assert ratio_interval([1, 0], [1, 0], seed=2) == [1, 1]  # a resample in which nothing is below says nothing


def test_many_values_are_drawn_in_groups_of_the_same_spread() -> None:
    values = CHANCE.exponential(2, 30 * GROUPS + 3)
    error = values.std() / np.sqrt(len(values))
    low, high = mean_interval(values, seed=4) or (0, 0)
    assert (values.mean() - low, high - values.mean()) == pytest.approx((1.96 * error, 1.96 * error), rel=0.15)
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4) != mean_interval(values, seed=5)
    weights = CHANCE.poisson(4, len(values))
    assert width(ratio_interval(values * weights, weights, seed=4)) == pytest.approx(
        2 * 1.96 * (weights * (values - 2)).std() / weights.mean() / np.sqrt(len(values)), rel=0.15
    )


def test_a_mean_is_of_what_is_there() -> None:
    assert mean([1, np.nan, 4], seed=0)["of"] == 2 and mean([1, np.nan, 4], seed=0)["mean"] == 2.5
    for none in ([], [np.nan], [np.inf, 1]):
        assert mean(none, seed=0)["mean"] is mean(none, seed=0)["interval"] is None
    assert mean_told(mean([2, 2], seed=0), digits=1) == "2.0 [2.0, 2.0]" and mean_told(mean([], seed=0)) == "–"
    assert share_told({"share": 0.521, "interval": [0.49, 0.552]}) == "52.1 % [49.0, 55.2]"
    assert share_told({"share": 0.0, "interval": None}) == "0.0 %"


def test_the_spread_of_a_mean_over_pairs() -> None:
    """Against drawing crystals and taking the mean over pairs of different ones, again and again."""
    some = CHANCE.normal(size=(80, 3)) * CHANCE.exponential(1, (80, 1))
    apart = squareform(pdist(some))
    plain = []
    for _ in range(3000):
        drawn = CHANCE.integers(0, 80, 80)
        other = drawn[:, None] != drawn
        plain.append(apart[np.ix_(drawn, drawn)][other].mean())
    found = diversity(some, seed=1)
    assert found["mean"] == pytest.approx(pdist(some).mean(), abs=1e-12) and found["of"] == 80
    assert found["interval"] == pytest.approx(np.quantile(plain, [0.025, 0.975]).tolist(), rel=0.06)
    assert width(found["interval"]) > 1.8 * width(mean_interval(apart.mean(1), seed=1)), "twice that of the crystals'"


# ---- of the per-crystal table ----------------------------------------------------------------------------------------

_ROW = dict.fromkeys(("formula", "num_atoms", "neutral", "distances", "composition", "reason"), "1") | {"reason": ""}


def predictions(targets: int, k: int) -> Table:
    """Each target is met by all of its samples or by none: k samples say no more than one."""
    rows = []
    for line in range(targets):
        for sample in range(k):
            rms = f"{0.1 + 0.001 * line}" if line % 3 == 0 else ""
            met = f"{line}:{rms}" if rms else ""
            rows.append(_ROW | {"line": str(line), "sample": str(sample), "rms": rms, "met": met, "target_valid": "1",
                                "matched_strict": "1" if rms else "0"})  # fmt: skip
    return Table(rows)


def test_the_samples_of_a_target_are_no_trials_of_their_own() -> None:
    few, many = (predict_figures(predictions(60, k), 60 * k, seed=3, lines=60) for k in (1, 10))
    assert many["match_rate"]["of"] == 600 and few["match_rate"]["share"] == many["match_rate"]["share"] == 1 / 3
    for name in ("match_rate", "match_rate_valid", "match_rate_strict", "best"):
        assert width(many[name]["interval"]) == pytest.approx(width(few[name]["interval"]), rel=0.05)
        assert width(many[name]["interval"]) == pytest.approx(width(share_interval(20, 60, seed=3)), rel=0.15)
    assert width(many["match_rate"]["rms_interval"]) == pytest.approx(width(few["match_rate"]["rms_interval"]), rel=0.1)
    assert width(many["by_num_atoms"][0]["interval"]) > 2.5 * width(share_interval(200, 600, seed=3))
    assert many["ceiling"]["share"] == 1 and many["ceiling"]["interval"] == [1, 1]


def test_a_target_of_which_all_was_rejected_is_drawn_too() -> None:
    found = predict_figures(predictions(30, 2), 80, seed=3, lines=40)["match_rate"]
    assert found["share"] == 20 / 80
    assert width(found["interval"]) == pytest.approx(width(share_interval(10, 40, seed=3)), rel=0.2)


def test_metre_and_its_interval() -> None:
    found = metre_figures(predictions(30, 1), 40, 0.5, seed=3)
    rms = [0.1 + 0.001 * line if line % 3 == 0 and line < 30 else 0.5 for line in range(40)]
    assert found["crms"] == pytest.approx(np.mean(rms)) and found["share"] == 10 / 40
    assert found["crms_interval"] == pytest.approx(mean_interval(rms, seed=3))
    assert metre_figures(Table([]), 0, 0.5, seed=3)["crms"] is None


def test_bonds_of_one_crystal_are_not_drawn_one_by_one() -> None:
    text = "formula,num_atoms,reason,neutral,bonds,sound_bonds,lonely_atoms\n" + "A,1,,1,50,50,0\nB,1,,1,50,0,0\n" * 20
    found = bond_figures(Table(csv.DictReader(io.StringIO(text))), 40, seed=1)["sound"]
    assert found["share"] == 0.5
    assert width(found["interval"]) > 5 * width(share_interval(1000, 2000, seed=1))
