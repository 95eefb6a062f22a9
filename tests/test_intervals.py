"""Intervals hold what the books say, at the edges too, and the same seed gives the same ones."""

from __future__ import annotations

import math
import random
from statistics import fmean, median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscrub.errors import NumericalError, UsageError
from memscrub.maths.intervals import Interval, auc, bootstrap, bootstrap_auc, bootstrap_mean, upper_bound, wilson

VALUES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


def slow_auc(members: list[float], others: list[float]) -> float:
    return fmean((a > b) + (a == b) / 2 for a in members for b in others)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(hits: int, count: int, low: float, high: float) -> None:
    found = wilson(hits, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_wilson_at_the_edges() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)
    z = 1.959963984540054
    assert wilson(0, 10).low == 0 and wilson(0, 10).high == pytest.approx(z * z / (10 + z * z))
    assert wilson(10, 10).high == 1 and wilson(10, 10).low == pytest.approx(10 / (10 + z * z))
    assert wilson(0, 73).high < 0.05 < wilson(0, 72).high


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate_and_its_ends_solve_the_score_equation(case: tuple[int, int]) -> None:
    hits, count = case
    rate, found, z = hits / count, wilson(hits, count), 1.959963984540054
    assert 0 <= found.low <= rate <= found.high <= 1
    for end in (found.low, found.high):
        assert count * (rate - end) ** 2 == pytest.approx(z * z * end * (1 - end), rel=1e-5, abs=1e-9)
    mirrored = wilson(count - hits, count)
    assert (1 - mirrored.high, 1 - mirrored.low) == (pytest.approx(found.low), pytest.approx(found.high))


def test_a_higher_level_is_a_wider_interval() -> None:
    assert wilson(3, 10, level=0.99).low < wilson(3, 10).low < wilson(3, 10, level=0.5).low
    values = [float(each) for each in range(50)]
    assert bootstrap_mean(values, level=0.99).high > bootstrap_mean(values, level=0.5).high


@given(VALUES, VALUES)
def test_auc_is_the_share_of_pairs_won(members: list[float], others: list[float]) -> None:
    assert auc(members, others) == pytest.approx(slow_auc(members, others))
    assert auc(members, others) + auc(others, members) == pytest.approx(1)
    assert auc([2 * each + 1 for each in members], [2 * each + 1 for each in others]) == auc(members, others)


def test_auc_at_the_edges() -> None:
    assert auc([1.0, 2.0], [0.0, 0.5]) == 1
    assert auc([0.0], [1.0]) == 0
    assert auc([1.0] * 3, [1.0] * 5) == 0.5
    assert auc([math.inf], [-math.inf, math.inf]) == 0.75


@given(VALUES, st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_bootstrap_is_the_quantiles_of_resampled_statistics(values: list[float], seed: int) -> None:
    for statistic in (fmean, median):
        source = random.Random(seed)
        drawn = [statistic(source.choices(values, k=len(values))) for _ in range(200)]
        found = bootstrap(values, statistic, seed=seed, resamples=200, level=0.9)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.05, 0.95])))
        assert min(values) <= found.low <= found.high <= max(values)


@given(VALUES, VALUES)
@settings(max_examples=30, deadline=None)
def test_the_bootstrap_of_an_auc_is_that_of_resampled_lists(members: list[float], others: list[float]) -> None:
    source = random.Random(3)
    drawn = []
    for _ in range(100):
        below = source.choices(others, k=len(others))
        drawn.append(slow_auc(source.choices(members, k=len(members)), below))
    found = bootstrap_auc(members, others, seed=3, resamples=100)
    if auc(members, others) in (0, 1):
        pairs = min(len(members), len(others))
        assert found == wilson(int(auc(members, others)) * pairs, pairs)
        return
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    source = random.Random(0)
    values = [source.gauss(5, 2) for _ in range(400)]
    half = 1.96 * 2 / math.sqrt(400)
    found = bootstrap_mean(values, resamples=2000)
    assert found.low == pytest.approx(fmean(values) - half, abs=0.04)
    assert found.high == pytest.approx(fmean(values) + half, abs=0.04)


def test_the_same_seed_gives_the_same_interval_and_the_global_generator_is_left_alone() -> None:
    values = [math.sin(each) for each in range(30)]
    state = random.getstate()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)
    assert bootstrap_auc(values, values[::2], seed=1) == bootstrap_auc(values, values[::2], seed=1)
    assert random.getstate() == state


def test_one_value_and_one_resample_give_a_point() -> None:
    assert bootstrap_mean([0.25]) == Interval(0.25, 0.25)
    assert bootstrap_mean([1.0, 3.0], resamples=1).low == bootstrap_mean([1.0, 3.0], resamples=1).high


def test_perfect_separation_of_few_values_is_not_sure() -> None:
    few, many = [float(each) for each in range(3)], [float(each) for each in range(100)]
    assert bootstrap_auc([200.0 + each for each in few], many) == wilson(3, 3)
    assert bootstrap_auc(few, [200.0 + each for each in many]) == wilson(0, 3)
    assert bootstrap_auc([200.0 + each for each in many], many).low > 0.96 > wilson(3, 3).low


def test_what_makes_no_interval_is_refused() -> None:
    for hits, count in ((-1, 5), (6, 5), (0, -1)):
        with pytest.raises(UsageError, match="is not a rate"):
            wilson(hits, count)
    for level in (0.0, 1.0, 95.0, math.nan):
        with pytest.raises(UsageError, match="confidence level"):
            wilson(1, 5, level=level)
        with pytest.raises(UsageError, match="confidence level"):
            bootstrap_mean([1.0], level=level)
    for values, resamples in (([], 10), ([1.0], 0)):
        with pytest.raises(UsageError, match="at least one"):
            bootstrap_mean(values, resamples=resamples)
    for members, others in (([], [1.0]), ([1.0], [])):
        for compare in (auc, bootstrap_auc):
            with pytest.raises(UsageError, match="name control texts"):
                compare(members, others)
    with pytest.raises(NumericalError):
        auc([1.0, math.nan], [1.0])
    with pytest.raises(NumericalError):
        bootstrap_auc([1.0], [math.nan])
    with pytest.raises(NumericalError):
        bootstrap_mean([1.0, math.nan])


@pytest.mark.parametrize(
    ("hits", "count", "level", "bound"),
    [
        (0, 299, 0.95, 0.00997),  # no hit in n: 1 - 0.05 ** (1 / n), the rule of three
        (0, 1, 0.95, 0.95),
        (1, 20, 0.95, 0.2161),
        (1, 29, 0.975, 0.1776),  # Newcombe 1998, table I, method 5, whose two-sided 95% has this upper end
        (15, 148, 0.975, 0.1617),
        (5, 5, 0.9, 1.0),
        (0, 0, 0.95, 1.0),
    ],
)
def test_the_upper_bound_is_the_published_exact_one(hits: int, count: int, level: float, bound: float) -> None:
    assert upper_bound(hits, count, level=level) == pytest.approx(bound, abs=6e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99), st.sampled_from([0.5, 0.9, 0.95]))
def test_the_true_rate_is_above_the_bound_no_more_often_than_stated(count: int, rate: float, level: float) -> None:
    missed = sum(
        math.comb(count, hits) * rate**hits * (1 - rate) ** (count - hits)
        for hits in range(count + 1)
        if upper_bound(hits, count, level=level) < rate
    )
    assert missed <= 1 - level + 1e-9


def test_an_upper_bound_of_thousands_is_quick_and_impossible_ones_are_refused() -> None:
    assert upper_bound(5_000, 10_000) == pytest.approx(0.5 + 1.645 * 0.005, abs=2e-4)
    for hits, count, level in ((2, 1, 0.95), (-1, 1, 0.95), (0, 1, 1.0), (0, 1, math.nan)):
        with pytest.raises(UsageError):
            upper_bound(hits, count, level=level)
