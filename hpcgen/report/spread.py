"""How a property is spread: a count of rounded values that adds up the same in any order."""

import numpy as np

_DROPPED = 36  # bits of a float64 that are rounded away: 16 of the mantissa stay, an error below 1 in 100,000
_BATCH = 1 << 18  # values held back before they are counted


class Spread:
    """Counts of finite floats rounded to 17 binary digits, with exact count, minimum and maximum.

    Memory is bounded by the number of different rounded values, a few MB for millions. Zero and integers up
    to 131,072 are exact, so shares of exact zeros may be read off.
    """

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self._keys = np.zeros(0, dtype=np.int64)  # sorted; monotonic in the value
        self._counts = np.zeros(0, dtype=np.int64)
        self._waiting: list[np.ndarray] = []

    @staticmethod
    def of_counts(values: np.ndarray, counts: np.ndarray) -> "Spread":
        """Values (V,), ascending and all different, with how often each came (V,)."""
        spread, there = Spread(), counts > 0
        if there.any():
            known = values[there].astype(np.float64)
            spread.low, spread.high = float(known[0]), float(known[-1])
            spread._keys, spread._counts = _keys(known), counts[there].astype(np.int64)
        return spread

    def add(self, values: np.ndarray) -> None:
        """Count values (B,); those that are not finite are left out."""
        values = values[np.isfinite(values)].astype(np.float64)
        if len(values) == 0:
            return
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        self._waiting.append(_keys(values))
        if sum(map(len, self._waiting)) >= _BATCH:
            self._settle()

    def _settle(self) -> None:
        if self._waiting:
            keys, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
            self._waiting = []
            self._keys, self._counts = _merged(self._keys, self._counts, keys, counts)

    def __add__(self, other: "Spread") -> "Spread":
        self._settle()
        other._settle()
        both = Spread()
        both.low, both.high = min(self.low, other.low), max(self.high, other.high)
        both._keys, both._counts = _merged(self._keys, self._counts, other._keys, other._counts)
        return both

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spread):
            return NotImplemented
        same_ends = (self.low, self.high) == (other.low, other.high)
        return same_ends and all(map(np.array_equal, self.counted(), other.counted()))

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return int(self.counted()[1].sum())

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """The different rounded values, ascending, and how often each came. (V,) float64, (V,) int64."""
        self._settle()
        size = (np.abs(self._keys) << _DROPPED).view(np.float64)
        return np.clip(np.where(self._keys < 0, -size, size), self.low, self.high), self._counts

    def quantile(self, share: float) -> float:
        """The value with `share` of all at or below it (the mean of two on a tie); NaN without values."""
        values, counts = self.counted()
        if len(values) == 0:
            return float("nan")
        ends = counts.cumsum()
        rank = share * ends[-1]
        above = min(int(np.searchsorted(ends, rank, side="right")), len(values) - 1)
        at = int(np.searchsorted(ends, rank, side="left"))
        return float((values[at] + values[above]) / 2)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def zeros(self) -> int:
        """How many values are exactly zero."""
        self._settle()
        return int(self._counts[self._keys == 0].sum())

    def histogram(self, edges: np.ndarray) -> np.ndarray:
        """Counts between edges (K + 1,), the last one included; values outside are left out. (K,) int64."""
        values, counts = self.counted()
        return np.histogram(values, bins=edges, weights=counts)[0].astype(np.int64)


def _keys(values: np.ndarray) -> np.ndarray:
    """Integers in the order of the values, equal where the leading bits are. (B,) float64 -> (B,) int64."""
    size = (np.abs(values).view(np.int64) + (1 << (_DROPPED - 1))) >> _DROPPED
    return np.where(values < 0, -size, size)


def _merged(
    keys: np.ndarray, counts: np.ndarray, more_keys: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both counts as one, keys ascending."""
    merged, where = np.unique(np.concatenate([keys, more_keys]), return_inverse=True)
    total = np.zeros(len(merged), dtype=np.int64)
    np.add.at(total, where, np.concatenate([counts, more_counts]))
    return merged, total
