"""Bootstrap intervals of shares and means (Efron, Ann. Statist. 7, 1, 1979): percentiles of what resampling gives."""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 1000
_TOGETHER = 1 << 22  # numbers drawn at a time


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
    known = np.asarray(values, dtype=np.float64)
    if not len(known):
        return None
    chance = np.random.Generator(np.random.Philox(seed))
    means = np.empty(RESAMPLES)
    for k in range(RESAMPLES):
        parts = (known[chance.integers(0, len(known), size)].sum() for size in _sizes(len(known)))
        means[k] = sum(parts) / len(known)
    return _percentiles(means)


def _sizes(count: int) -> list[int]:
    """`count` in parts of up to _TOGETHER."""
    whole, rest = divmod(count, _TOGETHER)
    return [_TOGETHER] * whole + ([rest] if rest else [])


def _percentiles(values: np.ndarray) -> list[float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return [low, high]
