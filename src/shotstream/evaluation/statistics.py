"""Intervals by resampling whole stories: shots of one story are not independent of each other.

A metric keeps one tally per story, an array of counts, and is a function of their sum. So a bootstrap
resample is a weighted sum, and all of them together are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

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

    def text(self, digits: int = 2) -> str:
        """Value and interval with so many digits, "-" for none."""
        if self.value is None or self.low is None or self.high is None:
            return "-"
        value, low, high = (f"{round(x, digits) + 0.0:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def percent(self) -> str:
        """Value and interval in whole percent, "-" for none."""
        if self.value is None or self.low is None or self.high is None:
            return "-"
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def bootstrap(tallies: ArrayLike, statistic: Statistic, count: int) -> Interval:
    """95 % percentile interval over stories of `statistic(tallies.sum(0))`; tallies [story ...]."""
    tallies = np.asarray(tallies, np.float64)
    if not len(tallies) or not np.isfinite(value := float(statistic(tallies.sum(0)))):
        return Interval(None, None, None, count)
    stories = len(tallies)
    sums = (_weights(stories) @ tallies.reshape(stories, -1)).reshape(RESAMPLES, *tallies.shape[1:])
    low, high = np.nanquantile(statistic(sums), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value, float(low), float(high), count)


@cache
def _weights(stories: int) -> Floats:
    """How often each story is drawn in each resample [resample story]: the same for every metric."""
    random = np.random.default_rng(SEED)
    return random.multinomial(stories, np.full(stories, 1 / stories), RESAMPLES).astype(np.float64)


def difference(first: ArrayLike, second: ArrayLike, statistic: Statistic, count: int) -> Interval:
    """Paired bootstrap of statistic(first) - statistic(second): the same stories told by two systems."""
    return _paired(first, second, statistic, count, np.subtract)


def share(first: ArrayLike, second: ArrayLike, statistic: Statistic, count: int) -> Interval:
    """Paired bootstrap of statistic(first) / statistic(second): how much of a ceiling is reached."""
    return _paired(first, second, statistic, count, _divide)


def _paired(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Statistic,
    count: int,
    combine: Callable[[Floats, Floats], Floats],
) -> Interval:
    tallies = np.stack((np.asarray(first, np.float64), np.asarray(second, np.float64)), axis=1)
    side = 1 - tallies.ndim  # counted from the end, so that it is right with and without an axis of resamples

    def combined(sums: Floats) -> Floats:
        ours, theirs = (np.asarray(sums.take(i, axis=side)) for i in (0, 1))
        return combine(statistic(ours), statistic(theirs))

    return bootstrap(tallies, combined, count)


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


# Statistics of other counts


def ratio(counts: Floats) -> Floats:
    """[.. 2]: hits over all, or a mean as sum over number."""
    return _divide(counts[..., 0], counts[..., 1])


def excess(counts: Floats) -> Floats:
    """[.. 3], of (one way, any other one way, all): how much likelier the first is than the second."""
    return _divide(counts[..., 0] - counts[..., 1], counts[..., 2])


def evenness(counts: Floats) -> Floats:
    """[.. value]: entropy over log n; 1 when all n values are equally frequent, 0 for a single one."""
    shares = _divide(counts, counts.sum(-1, keepdims=True))
    terms = np.multiply(shares, np.log(shares, out=np.zeros_like(shares), where=shares > 0))
    return np.abs(terms.sum(-1)) / np.log(counts.shape[-1])


def slope(counts: Floats) -> Floats:
    """[.. step 2]: change per step of the ratio, by least squares; a step weighs as much as it has observations."""
    hits, weights = counts[..., 0], counts[..., 1]
    mean = _divide(weights @ (steps := np.arange(counts.shape[-2])), weights.sum(-1))[..., None]
    away = steps - mean
    return _divide((away * hits).sum(-1), (away**2 * weights).sum(-1))


def _divide(a: ArrayLike, b: ArrayLike) -> Floats:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)
