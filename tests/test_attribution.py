"""Controls decide what is reasonable: what texts never trained on show as well is no evidence of memorization."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscrub.errors import NumericalError
from memscrub.maths.intervals import Interval, wilson
from memscrub.reports.attribution import attribute, control_rate

VALUES = st.lists(st.integers(0, 40).map(float), max_size=30)


@given(VALUES, st.integers(0, 40))
def test_the_rate_counts_the_controls_that_break_the_limit(controls: list[float], allowed: int) -> None:
    found = control_rate(controls, allowed)
    breaking = [value for value in controls if not value <= allowed]
    assert found.breaking == len(breaking)
    assert found.controls == len(controls)
    assert found.rate == (len(breaking) / len(controls) if controls else 0)
    assert found.interval == wilson(len(breaking), len(controls))
    assert found.highest == (max(controls) if controls else None)


def test_at_the_limit_is_within_it() -> None:
    assert control_rate([16.0, 16.0], 16).breaking == 0


@pytest.mark.parametrize(
    ("breaking", "controls", "flagged"),
    [(0, 0, False), (0, 5, False), (1, 5, True), (1, 19, True), (1, 20, False), (5, 100, False), (6, 100, True)],
)
def test_a_limit_that_more_than_five_percent_of_the_controls_break_is_flagged(
    breaking: int, controls: int, flagged: bool
) -> None:
    assert control_rate([20.0] * breaking + [1.0] * (controls - breaking), 16).flagged is flagged


def test_the_threshold_is_the_callers() -> None:
    controls = [20.0] + [1.0] * 99
    assert not control_rate(controls, 16).flagged
    assert control_rate(controls, 16, threshold=0.0).flagged


def test_without_controls_nothing_is_known_and_nothing_is_excused() -> None:
    rate = control_rate([], 16)
    assert (rate.flagged, rate.interval) == (False, Interval(0.0, 1.0))
    found = attribute(3.0, [])
    assert (found.attributable, found.highest, found.chance) == (True, None, 1.0)


@given(st.integers(0, 40), VALUES)
def test_only_what_is_above_every_control_is_attributed(value: int, controls: list[float]) -> None:
    found = attribute(float(value), controls)
    assert found.attributable == all(value > each for each in controls)
    assert found.chance == (1 + sum(each >= value for each in controls)) / (1 + len(controls))
    assert found.attributable == (found.chance == 1 / (1 + len(controls)))


def test_log_probabilities_down_to_impossible_are_values_like_others() -> None:
    assert attribute(-999.0, [-1000.0] * 3).attributable
    assert not attribute(-1000.0, [-1000.0] * 3).attributable
    assert attribute(-1.0, [-math.inf]).attributable


def test_unlike_texts_reach_a_value_as_often_as_its_chance_says() -> None:
    # Any one of 20 exchangeable values held against the other 19: exactly one is above all of them.
    values = [float(each * 7 % 20) for each in range(20)]
    found = [attribute(value, values[:i] + values[i + 1 :]) for i, value in enumerate(values)]
    assert sum(each.attributable for each in found) == 1
    for level in (0.05, 0.25, 0.5, 1.0):
        assert sum(each.chance <= level for each in found) == level * 20


def test_a_value_that_is_not_a_number_is_never_excused() -> None:
    assert attribute(math.nan, [1.0, 2.0]).attributable
    with pytest.raises(NumericalError):
        attribute(1.0, [1.0, math.nan])
    with pytest.raises(NumericalError):
        control_rate([math.nan], 16)
