"""Figures of structure prediction from the per-crystal table: match rates, RMSE, METRe, and their ceiling."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hpcgen.metrics.bootstrap import mean_interval, ratio_interval, share
from hpcgen.metrics.summary import Table, by_size

DEFINITIONS = {
    "match_rate": "predictions that StructureMatcher matches to their target over all asked, so the mean over the "
    "samples of a target; rejected and not compared ones count as not matched",
    "match_rate_valid": "only valid predictions count as matched (CDVAE), over all asked; a crystal is valid here "
    "without regard to its fingerprint, of which CDVAE also wants that it can be computed",
    "match_rate_both_valid": "only where prediction and target are valid (DiffCSP), over all asked",
    "ceiling": "crystals asked for whose target is valid: the most that match_rate_both_valid can be; over all asked, "
    "but for those rejected of which it is not known what they asked for",
    "match_rate_strict": "matched within the stricter tolerances too, over all asked",
    "rms": "mean over the matched of the root mean square distance in units of (V/N)^(1/3)",
    "targets": "of a campaign the lines of its formulas, crystal i being of line i modulo their number; of any other "
    "store the names it holds, or, where crystals were rejected, asked over the most crystals of one name if that is "
    "more: an estimate",
    "first": "sample 0 of each target, which matches nothing if it was rejected, over targets; of a store that is no "
    "campaign's the first one written",
    "best": "targets matched by any of their samples, over targets, and the mean of their lowest rms",
    "first_valid": "first, where it counts only if it is valid",
    "best_valid": "best of the valid samples alone (CDVAE, DiffCSP: of k samples)",
    "metre": "crystals of the reference that any prediction of their composition and size matches, over all of the "
    "reference (METRe), and the mean over these of the lowest rms, the tolerance 0.5 where there is no match (cRMSE; "
    "Martirossyan et al. 2025); only with --pair composition",
}


def predict_figures(
    table: Table, asked: int, seed: int, lines: int | None = None, lost: Mapping[int, bool] | None = None
) -> dict[str, Any]:
    """Of structure prediction. seed: of the intervals, for which targets are drawn, each with all its samples.

    lines: L targets that a campaign was asked for, crystal i being of i % L; None: not known. lost: of targets without
    a crystal in the table, whether they are valid, where that is known.
    """
    valid = table.flag("valid")
    both = valid & table.flag("target_valid")
    targets, each = _targets(table, asked, lines)
    return {
        "match_rate": _matches(table.rms, table.line, each, seed),
        "match_rate_valid": _matches(np.where(valid, table.rms, np.nan), table.line, each, seed),
        "match_rate_both_valid": _matches(np.where(both, table.rms, np.nan), table.line, each, seed),
        "ceiling": _ceiling(table, asked, seed, lines, lost or {}),
        "match_rate_strict": _rate(table.flag("matched_strict"), table.line, each, seed),
        **targets,
        **_per_target(table, valid, len(each), seed),
        "by_num_atoms": [
            {"atoms": atoms, **_matches(table.rms[some], *_among(table.line[some]), seed)}
            for atoms, some in by_size(table.num_atoms)
        ],
    }


def metre_figures(table: Table, known: int, stol: float, seed: int) -> dict[str, Any]:
    """How many of the `known` crystals of a reference were met by any prediction, and the rms corrected for the others.

    stol: the rms of one that was not met. seed: of the intervals.
    """
    rms = np.full(known, stol)
    rms[list(table.met)] = list(table.met.values())
    told = {"crms": float(rms.mean()) if known else None, "crms_interval": mean_interval(rms, seed)}
    return share(len(table.met), known, seed) | told


def _targets(table: Table, asked: int, lines: int | None) -> tuple[dict[str, Any], np.ndarray]:
    """How many targets there are, as DEFINITIONS has it, and how many crystals were asked for of each. (T,)"""
    counts = np.bincount(table.line)
    if lines is not None:
        targets, k, how = min(lines, asked), -(-asked // lines), "lines of the campaign"
        each = (asked - np.arange(targets) + lines - 1) // lines
    else:
        k = int(counts.max(initial=1))
        targets = max(len(np.unique(table.line)), round(asked / k))
        how = "names in the store" if asked == len(table) else f"estimated: {asked:,} asked, at most {k} of each"
        each = np.full(targets, asked / max(targets, 1))
    return {"targets": targets, "targets_how": how, "samples_per_target": k}, each


def _per_target(table: Table, valid: np.ndarray, targets: int, seed: int) -> dict[str, Any]:
    """First and best of the samples of each target, of all and of the valid (N,) alone."""
    first, one = table.sample == 0, np.ones(targets)
    figures = {}
    for end, rms in (("", table.rms), ("_valid", np.where(valid, table.rms, np.nan))):
        lowest = np.full(targets, np.nan)
        np.fmin.at(lowest, table.line, rms)
        figures[f"first{end}"] = _matches(rms[first], table.line[first], one, seed)
        figures[f"best{end}"] = _matches(lowest, np.arange(targets), one, seed)
    return figures


def _among(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Targets (N,) of crystals numbered anew, and how many crystals each has. -> (N,), (T,)"""
    _, line, counts = np.unique(line, return_inverse=True, return_counts=True)
    return line, counts


def _ceiling(table: Table, asked: int, seed: int, lines: int | None, lost: Mapping[int, bool]) -> dict[str, Any]:
    """Crystals asked for whose target is valid, of those whose target is known."""
    valid = table.flag("target_valid")
    if lines is None:  # nobody knows what rejected ones were asked to be
        return _rate(valid, *_among(table.line), seed)
    whether = dict.fromkeys(table.line.tolist(), False) | dict.fromkeys(table.line[valid].tolist(), True) | dict(lost)
    known = np.array(list(whether), dtype=np.int64)
    of = (asked - known + lines - 1) // lines
    count = of * np.array(list(whether.values()), dtype=bool)
    return share(int(count.sum()), int(of.sum()), seed) | {"interval": ratio_interval(count, of, seed)}


def _matches(rms: np.ndarray, line: np.ndarray, of: np.ndarray, seed: int) -> dict[str, Any]:
    """How many are matched, and their mean rms. rms (N,), nan where not; line (N,) of T targets; of (T,) asked for."""
    matched = ~np.isnan(rms)
    counts, sums = (np.bincount(line[matched], weights, len(of)) for weights in (None, rms[matched]))
    return {
        **_rate(matched, line, of, seed),
        "rms": float(rms[matched].mean()) if matched.any() else None,
        "rms_interval": ratio_interval(sums, counts, seed),
    }


def _rate(which: np.ndarray, line: np.ndarray, of: np.ndarray, seed: int) -> dict[str, Any]:
    """`which` (N,) of all that was asked of the T targets, of (T,)."""
    counts = np.bincount(line[which], minlength=len(of))
    interval = {"interval": ratio_interval(counts, of, seed)}
    return share(int(counts.sum()), round(float(of.sum())), seed) | interval
