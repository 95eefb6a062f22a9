"""From one sample to many: n for p is the least that is enough, however small or large the probability."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscrub.errors import NumericalError, UsageError
from memscrub.maths.sampling_odds import (
    CHANCES,
    chance_of_a_hit,
    discoverable_count,
    expected_leaked,
    is_discoverable,
    samples_for_chances,
    samples_needed,
)

LOG_PS = st.floats(-1000, -1e-9)
CHANCE = st.floats(1e-6, 1 - 1e-6)


def exact_chance(log_probability: float, samples: float) -> Decimal:
    """1 - (1 - p)^n with 500 digits."""
    with localcontext() as context:
        context.prec = 500
        miss = 1 - Decimal(log_probability).exp()
        return 1 - (Decimal(samples) * miss.ln()).exp() if miss else Decimal(bool(samples))


@pytest.mark.parametrize(
    ("probability", "chance", "samples"),
    [
        (1.0, 0.9, 1),
        (0.5, 0.5, 1),  # p = p_z: one sample is enough, and rounding must not ask for two
        (0.1, 0.1, 1),
        (0.3, 0.3, 1),
        (0.5, 0.9, 4),  # 1 - 2^-3 = 0.875 < 0.9
        (0.01, 0.5, 69),
        (0.01, 0.9, 230),
        (1e-6, 0.5, 693147),
    ],
)
def test_samples_needed_of_known_cases(probability: float, chance: float, samples: int) -> None:
    assert samples_needed(math.log(probability), chance) == samples


@given(LOG_PS, CHANCE)
@settings(max_examples=60, deadline=None)
def test_so_many_samples_are_enough_and_one_less_is_not(log_probability: float, chance: float) -> None:
    samples = samples_needed(log_probability, chance)
    if math.isinf(samples):
        assert log_probability < -690
        return
    slack = Decimal("1e-11")
    assert exact_chance(log_probability, samples) >= Decimal(chance) * (1 - slack)
    if samples < 1e9:  # beyond, neighbours differ by less than the rounding
        assert exact_chance(log_probability, samples - 1) < Decimal(chance) * (1 + slack)


@given(LOG_PS, st.floats(0, 1e300))
@settings(max_examples=60, deadline=None)
def test_the_chance_of_a_hit_is_that_of_five_hundred_digits(log_probability: float, samples: float) -> None:
    found = chance_of_a_hit(log_probability, samples)
    assert 0 <= found <= 1
    assert found == pytest.approx(float(exact_chance(log_probability, samples)), rel=1e-9, abs=1e-300)


def test_a_probability_of_e_to_the_minus_thousand_is_not_taken_for_zero() -> None:
    # 1e300 samples of e^-1000: n p is e^(690.8 - 1000), far below one and far above the smallest float.
    assert chance_of_a_hit(-1000.0, 1e300) == pytest.approx(math.exp(math.log(1e300) - 1000), rel=1e-9)
    assert samples_needed(-1000.0, 0.5) == math.inf
    assert samples_needed(-700.0, 0.5) == pytest.approx(math.exp(700 + math.log(math.log(2))), rel=1e-9)


def test_certain_and_impossible_texts() -> None:
    assert samples_for_chances(0.0) == (1, 1, 1)
    assert samples_for_chances(1e-7) == (1, 1, 1)  # above 0 by rounding only
    assert samples_for_chances(-math.inf) == (math.inf,) * 3
    assert chance_of_a_hit(0.0, 1) == 1
    assert chance_of_a_hit(0.0, 0) == 0
    assert chance_of_a_hit(-math.inf, 1e300) == 0
    assert expected_leaked([], 100) == 0


@given(LOG_PS)
def test_n_grows_with_p(log_probability: float) -> None:
    few, some, many = samples_for_chances(log_probability)
    assert few <= some <= many
    assert (few, some, many) == tuple(samples_needed(log_probability, chance) for chance in CHANCES)


@given(st.lists(st.floats(-30, 0), min_size=1, max_size=8), st.integers(0, 10**6), CHANCE)
def test_counts_and_expectations_are_those_of_the_texts(log_ps: list[float], samples: int, chance: float) -> None:
    assert expected_leaked(log_ps, samples) == pytest.approx(
        sum(1 - (1 - math.exp(each)) ** samples for each in log_ps), abs=1e-8
    )
    assert discoverable_count(log_ps, samples, chance) == sum(is_discoverable(each, samples, chance) for each in log_ps)


@given(LOG_PS, st.floats(1, 1e12), CHANCE)
def test_discoverable_is_a_hit_with_that_chance(log_probability: float, samples: float, chance: float) -> None:
    found = chance_of_a_hit(log_probability, math.floor(samples))
    if abs(found - chance) > 1e-9:
        assert is_discoverable(log_probability, samples, chance) == (found > chance)


def test_what_is_not_a_number_is_refused() -> None:
    for chance in (0.0, 1.0, -1.0, 2.0, math.nan):
        with pytest.raises(UsageError, match="between 0 and 1"):
            samples_needed(-1.0, chance)
    for samples in (-1.0, math.nan):
        with pytest.raises(UsageError, match="0 or more"):
            chance_of_a_hit(-1.0, samples)
    with pytest.raises(NumericalError):
        samples_needed(math.nan, 0.5)
    with pytest.raises(NumericalError):
        expected_leaked([-1.0, math.nan], 10)
