"""Intervals by resampling whole stories: shots of one story are not independent of each other.

A metric keeps one tally per story, an array of counts, and is a function of their sum. So a bootstrap
resample is a weighted sum, and all of them together are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Summed tallies [.. tally] -> values [..]; NaN where the tally is empty."""

RESAMPLES, SEED, LEVEL = 2000, 0, 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, from `count` observations; of none, all three are None."""

    value: float | None
    low: float | None
    high: float | None
    count: int

    def __str__(self) -> str:
        if self.value is None or self.low is None or self.high is None:
            return "-"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(tallies: ArrayLike, statistic: Statistic, count: int) -> Interval:
    """95 % percentile interval over stories of `statistic(tallies.sum(0))`; tallies [story ...]."""
    tallies = np.asarray(tallies, np.float64)
    if not len(tallies) or not np.isfinite(value := float(statistic(tallies.sum(0)))):
        return Interval(None, None, None, count)
    random = np.random.default_rng(SEED)
    stories = len(tallies)
    weights = random.multinomial(stories, np.full(stories, 1 / stories), RESAMPLES).astype(np.float64)
    sums = (weights @ tallies.reshape(stories, -1)).reshape(RESAMPLES, *tallies.shape[1:])
    low, high = np.nanquantile(statistic(sums), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value, float(low), float(high), count)


def difference(first: ArrayLike, second: ArrayLike, statistic: Statistic, count: int) -> Interval:
    """Paired bootstrap of statistic(first) - statistic(second): the same stories told by two systems."""
    tallies = np.stack((np.asarray(first, np.float64), np.asarray(second, np.float64)), axis=1)
    side = 1 - tallies.ndim  # counted from the end, so that it is right with and without an axis of resamples

    def gap(sums: Floats) -> Floats:
        ours, theirs = (np.asarray(sums.take(i, axis=side)) for i in (0, 1))
        return np.subtract(statistic(ours), statistic(theirs))

    return bootstrap(tallies, gap, count)


# Statistics of confusion matrices [.. reference reading]


def agreement(confusion: Floats) -> Floats:
    """Share of the diagonal."""
    return _divide(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def chance(confusion: Floats) -> Floats:
    """The agreement that the two marginals alone would give."""
    both = (confusion.sum(-1) * confusion.sum(-2)).sum(-1)
    return _divide(both, confusion.sum((-2, -1)) ** 2)


def kappa(confusion: Floats) -> Floats:
    """Agreement beyond chance, 1 when perfect: Cohen's kappa."""
    by_chance = chance(confusion)
    return _divide(np.subtract(agreement(confusion), by_chance), np.subtract(1, by_chance))


def ratio(counts: Floats) -> Floats:
    """[.. 2]: hits over all."""
    return _divide(counts[..., 0], counts[..., 1])


def _divide(a: ArrayLike, b: ArrayLike) -> Floats:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
