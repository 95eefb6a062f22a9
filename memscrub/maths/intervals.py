"""How sure a figure is that was measured on so many texts: confidence intervals; knows nothing of what was measured.

Resampling draws from its own generator with the given seed: the same values and seed give the same interval.
"""

from __future__ import annotations

import itertools
import math
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TypeVar

from memscrub.errors import NumericalError, UsageError

LEVEL = 0.95
RESAMPLES = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float


def wilson(hits: int, count: int, *, level: float = LEVEL) -> Interval:
    """The Wilson score interval of a rate of `hits` in `count` (Wilson 1927).

    Unlike the textbook interval it does not shrink to a point at 0 and at 1. Of a count of 0 nothing is known: the
    interval is (0, 1). Raises UsageError unless 0 <= hits <= count and 0 < level < 1.
    """
    if not 0 <= hits <= count:
        raise UsageError(f"{hits} of {count} is not a rate; the first is a part of the second.")
    if not count:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + _checked(level)) / 2)
    centre = (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(hits * (count - hits) / count + z * z / 4)
    # The ends at 0 and 1 are exact in the formula, not in its rounding.
    return Interval(0.0 if hits == 0 else centre - half, 1.0 if hits == count else centre + half)


def upper_bound(hits: int, count: int, *, level: float = LEVEL) -> float:
    """The one-sided upper bound of a rate of `hits` in `count` (Clopper and Pearson 1934): never too low.

    The rate at which `hits` or fewer would still turn up with probability `1 - level`; the true rate is above it in at
    most that share of all samples, however small they are. Of a count of 0 nothing is known: 1. Raises UsageError
    unless 0 <= hits <= count and 0 < level < 1.
    """
    if not 0 <= hits <= count:
        raise UsageError(f"{hits} of {count} is not a rate; the first is a part of the second.")
    doubt = 1 - _checked(level)
    if hits == count:
        return 1.0
    low, high = hits / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(hits, count, middle) > doubt else (low, middle)
    return high


def _at_most(hits: int, count: int, rate: float) -> float:
    """The probability of at most `hits` in `count` at this rate."""
    if rate in (0.0, 1.0):
        return 1.0 - rate
    every = math.lgamma(count + 1)
    yes, no = math.log(rate), math.log1p(-rate)
    return math.fsum(
        math.exp(every - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * yes + (count - k) * no)
        for k in range(hits + 1)
    )


def bootstrap(
    values: Sequence[T],
    statistic: Callable[[Sequence[T]], float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The percentile bootstrap interval of a statistic (Efron 1979): its quantiles over resamples of the values.

    `values` are one per text, so that texts are what is resampled. Cost: `resamples` times the statistic. A statistic
    that is the same for all values gives a point, however few they are. Raises UsageError without values or
    resamples, NumericalError where the statistic is a NaN.
    """
    _check(resamples, values)
    generator = random.Random(seed)
    drawn = [statistic(generator.choices(values, k=len(values))) for _ in range(resamples)]
    return _percentiles(drawn, level)


def bootstrap_mean(
    values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """The percentile bootstrap interval of the mean."""
    return bootstrap(values, fmean, seed=seed, resamples=resamples, level=level)


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """The probability that a member's value is above another's, ties counting half: the area under the ROC curve.

    The Mann-Whitney statistic over all pairs (Hanley and McNeil 1982), by sorting: O(n log n). 0.5 is no better than
    chance. Raises UsageError where one side is empty, NumericalError for a NaN.
    """
    _check_sides(members, others)
    ordered = sorted(others)
    # Twice the wins, so that all is whole numbers.
    twice = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in members)
    return twice / (2 * len(members) * len(others))


def bootstrap_auc(
    members: Sequence[float],
    others: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> Interval:
    """The percentile bootstrap interval of `auc`; members and others are resampled apart.

    Perfect separation (an AUC of 0 or 1) is perfect in every resample, however few values there are. Then the
    interval is the Wilson interval of as many disjoint pairs as the shorter list makes: each is won with the
    probability that the AUC is, independently of the others. Values are ranked once, so a resample is linear in their
    number. Raises as `auc` and `bootstrap` do.
    """
    _check(resamples, members or others)
    if (area := auc(members, others)) in (0.0, 1.0):
        pairs = min(len(members), len(others))
        return wilson(round(area) * pairs, pairs, level=level)
    distinct = {value: rank for rank, value in enumerate(sorted({*members, *others}))}
    above, below = ([distinct[value] for value in side] for side in (members, others))
    generator = random.Random(seed)
    drawn = []
    for _ in range(resamples):
        counts = [0] * len(distinct)
        for rank in generator.choices(below, k=len(below)):
            counts[rank] += 1
        through = list(itertools.accumulate(counts))
        twice = sum(2 * through[rank] - counts[rank] for rank in generator.choices(above, k=len(above)))
        drawn.append(twice / (2 * len(above) * len(below)))
    return _percentiles(drawn, level)


def _percentiles(drawn: Sequence[float], level: float) -> Interval:
    """The middle part of what was drawn that holds `level` of it, interpolated linearly between neighbours."""
    tail = (1 - _checked(level)) / 2
    if any(map(math.isnan, drawn)):
        raise NumericalError("a resampled statistic is not a number; there is no interval for it.")
    ordered = sorted(drawn)

    def quantile(share: float) -> float:
        place = share * (len(ordered) - 1)
        before = math.floor(place)
        after = min(before + 1, len(ordered) - 1)
        return ordered[before] + (place - before) * (ordered[after] - ordered[before])

    return Interval(quantile(tail), quantile(1 - tail))


def _check(resamples: int, values: Sequence[object]) -> None:
    if not values or resamples < 1:
        raise UsageError("an interval by resampling needs at least one value and at least one resample.")


def _check_sides(members: Sequence[float], others: Sequence[float]) -> None:
    if not members or not others:
        raise UsageError("an AUC compares two lists of texts and one is empty; name control texts to compare with.")
    if any(map(math.isnan, members)) or any(map(math.isnan, others)):
        raise NumericalError("a value to be ranked is not a number; there is no AUC.")


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise UsageError(f"a confidence level is between 0 and 1, not {level:g}; use one such as 0.95.")
    return level
