"""Bootstrap intervals of shares and means (Efron, Ann. Statist. 7, 1, 1979): percentiles of what resampling gives."""

from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 1000
GROUPS = 1024  # what is resampled, at most: it makes a width wrong by 2 %, as RESAMPLES do by 4 %
DEFINITION = (
    f"{LEVEL:.0%} percentile bootstrap, {RESAMPLES:,} resamples, Philox of the seed: crystals are drawn, of "
    f"predictions targets with all samples, of a share of bonds crystals with all bonds; more than {GROUPS:,} are "
    "dealt at random into so many groups, which are drawn. Distances of distributions, divergences and counts of what "
    "is distinct have no interval: a resample repeats crystals, which shifts them; "
    "and at 0 and 100 % an interval has no width, since every resample is alike"
)


def share(count: int, of: int, seed: int) -> dict[str, Any]:
    """How many, of how many, and the interval."""
    return {"count": count, "of": of, "share": count / of if of else 0.0, "interval": share_interval(count, of, seed)}


def mean(values: Sequence[float] | np.ndarray, seed: int) -> dict[str, Any]:
    """Of the values (N,) that are there, not nan: mean, how many, and the interval."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    told = float(known.mean()) if len(known) and np.isfinite(known).all() else None
    return {"mean": told, "of": len(known), "interval": mean_interval(known, seed) if told is not None else None}


def share_interval(count: int, of: int, seed: int) -> list[float] | None:
    """Of `count` among `of`, [low, high] at LEVEL. None without any.

    Drawing `of` times from so many yeses and noes, put back each time, gives a binomial number of yeses.
    """
    if not of:
        return None
    drawn = np.random.Generator(np.random.Philox(seed)).binomial(of, count / of, RESAMPLES) / of
    return _percentiles(drawn)


def mean_interval(values: Sequence[float] | np.ndarray, seed: int) -> list[float] | None:
    """Of the mean of `values` (N,), [low, high] at LEVEL. None without any."""
    return ratio_interval(values, np.ones(len(values)), seed)


def ratio_interval(
    above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray, seed: int
) -> list[float] | None:
    """Of Σ above / Σ below, pairs (N,) being drawn, [low, high] at LEVEL. None where nothing is below.

    Of more than GROUPS pairs the sums of random groups are drawn: their spread is that of the pairs.
    """
    pairs = np.stack([np.asarray(side, dtype=np.float64) for side in (above, below)], 1)
    if not pairs[:, 1].any():
        return None
    chance = np.random.Generator(np.random.Philox(seed))
    if len(pairs) > GROUPS:
        group = chance.permutation(len(pairs)) % GROUPS
        pairs = np.stack([np.bincount(group, weights=side, minlength=GROUPS) for side in pairs.T], 1)
    sums = np.stack([pairs[chance.integers(0, len(pairs), len(pairs))].sum(0) for _ in range(RESAMPLES)])
    sums = sums[sums[:, 1] > 0]  # a resample in which nothing is below says nothing
    return _percentiles(sums[:, 0] / sums[:, 1])


def _percentiles(values: np.ndarray) -> list[float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return [low, high]
