"""Figures of what was asked for: properties wanted and obtained, candidates found by their rank, optimised crystals."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hpcgen.metrics.bootstrap import mean_interval, share

PERCENTILES = (5, 10, 15)
DEFINITIONS = {
    "conditions": "mean absolute difference of what was asked for from the column of that name, over crystals with a "
    "value; without such a column not screened",
    "recall_at_k": "of the best crystals of the run by a property, the share found among the first K by another "
    "column, which ranks them; best are the share of `top`, rounded up, lowest first or, where highest is true, "
    "highest first; of crystals that have both values, equal ones in their order",
    "success": "SR5, SR10, SR15: starts whose best valid candidate is at or under that percentile of the property in "
    "the reference, over all starts (CDVAE; numpy's linear percentile); where highest is true the property is to be "
    "large, and the percentile is counted from above",
    "starts": "what stands in the column that groups candidates, and as many more as the rejected crystals would be "
    "at most candidates each: an estimate; without such a column each crystal is a start of its own",
}


def condition_figures(asked: Mapping[str, float], obtained: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    """Mean absolute error of each property asked for, over crystals of which it is known. seed: of the intervals.

    obtained: values (N,) of the properties that the run has a column of, nan where one is not known.
    """
    figures: dict[str, Any] = {}
    for name, value in asked.items():
        known = obtained.get(name, np.zeros(0))
        errors = np.abs(known[np.isfinite(known)] - value)
        figures[name] = {
            "asked": value,
            "known": len(errors),
            "mean_absolute_error": float(errors.mean()) if len(errors) else None,
            "mean_absolute_error_interval": mean_interval(errors, seed),
        }
    return figures


def recall_figures(
    values: np.ndarray, ranks: np.ndarray, *, k: int, top: float, seed: int, highest: tuple[bool, bool] = (False, False)
) -> dict[str, Any]:
    """Recall@K of the AutoPeri proposal, which leaves open what ranks and what share is the top.

    values (N,): the property, nan where unknown; ranks (N,): what ranks crystals; highest: of both, whether more is
    better. top: share of the crystals that are the best.
    """
    known = np.flatnonzero(np.isfinite(values) & np.isfinite(ranks))
    best, first = (
        known[np.argsort(-side[known] if more else side[known], kind="stable")]
        for side, more in zip((values, ranks), highest, strict=True)
    )
    wanted = best[: int(np.ceil(top * len(known)))]
    found = np.isin(wanted, first[:k]).sum()
    return share(int(found), len(wanted), seed) | {"k": k, "top": top, "crystals": len(known)}


def success_figures(
    values: np.ndarray,
    valid: np.ndarray,
    starts: np.ndarray,
    reference: np.ndarray,
    *,
    asked: int,
    seed: int,
    highest: bool = False,
) -> dict[str, Any]:
    """Property optimisation of CDVAE. asked: candidates, rejected ones included.

    values (N,): the property of each candidate, nan where unknown; valid (N,) bool; starts (N,): which start each is
    of, from 0; reference (M,): the property in the reference, nan where unknown.
    """
    sign = -1.0 if highest else 1.0
    known = sign * reference[np.isfinite(reference)]
    candidates = int(np.bincount(starts).max(initial=1))
    many = max(len(np.unique(starts)), round(asked / candidates))
    lowest = np.full(many, np.inf)
    good = valid & np.isfinite(values)
    np.minimum.at(lowest, starts[good], sign * values[good])
    figures: dict[str, Any] = {
        "starts": many,
        "candidates": candidates,
        "highest": highest,
        "reference_values": len(known),
        "without_value": int((~np.isfinite(values)).sum()),
    }
    for percent in PERCENTILES:
        limit = float(np.percentile(known, percent))
        reached = int((lowest <= limit).sum())
        figures[f"sr{percent}"] = share(reached, many, seed) | {"limit": sign * limit}
    return figures
