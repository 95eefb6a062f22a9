"""From the probability of sampling a text once to what many samples give away; knows neither models nor texts.

After Hayes et al., "Measuring memorization in language models via probabilistic extraction" (arXiv 2410.19482): with
p_z the probability of one sample, a text is (n, p)-discoverable when n independent samples give it away at least once
with probability p or more, 1 - (1 - p_z)^n >= p. Log-probabilities are natural logarithms. All is computed through
log(-log(1 - p_z)), which neither underflows nor cancels, so that p_z = e^-1000 is as sound as p_z = 1 - 1e-12.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

from memscrub.errors import NumericalError, UsageError

# The chances of at least one hit that reports state n for.
CHANCES = (0.1, 0.5, 0.9)
# Below this p_z, log(1 - p_z) and -p_z are the same number in double precision.
_TINY = -37.0
_LARGEST = math.log(sys.float_info.max)
# So much of n is rounding of the logarithms; without it p = p_z would ask for two samples.
_ROUNDING = 1e-12


def samples_needed(log_probability: float, chance: float) -> float:
    """The least n for which n samples give the text away at least once with probability `chance`: n for p.

    A whole number, at least 1; `math.inf` where it is above the largest float (log p_z below about -709), which
    holds for texts that cannot be sampled at all. Raises UsageError for a chance outside (0, 1), NumericalError for
    a NaN.
    """
    if not 0 < chance < 1:
        raise UsageError(f"a chance of extraction is between 0 and 1, not {chance:g}; use one such as 0.5.")
    log_samples = math.log(-math.log1p(-chance)) - _log_hazard(log_probability)
    if log_samples > _LARGEST:
        return math.inf
    return max(1.0, float(math.ceil(math.exp(log_samples) * (1 - _ROUNDING))))


def samples_for_chances(log_probability: float) -> tuple[float, ...]:
    """`samples_needed` for each of `CHANCES`: n for p = 0.1, 0.5 and 0.9."""
    return tuple(samples_needed(log_probability, chance) for chance in CHANCES)


def chance_of_a_hit(log_probability: float, samples: float) -> float:
    """The probability that at least one of so many independent samples is the text, 1 - (1 - p_z)^samples.

    Raises UsageError for a negative number of samples, NumericalError for a NaN.
    """
    if not samples >= 0:
        raise UsageError(f"a number of samples is 0 or more, not {samples:g}.")
    hazard = _log_hazard(log_probability)
    if samples == 0 or hazard == -math.inf:
        return 0.0
    # e^-e^7 is 0 in double precision: larger exponents need not be computed.
    return -math.expm1(-math.exp(min(math.log(samples) + hazard, 7.0)))


def is_discoverable(log_probability: float, samples: float, chance: float) -> bool:
    """Whether the text is (n, p)-discoverable for n = `samples` and p = `chance`."""
    return samples_needed(log_probability, chance) <= samples


def discoverable_count(log_probabilities: Iterable[float], samples: float, chance: float) -> int:
    """How many texts are (n, p)-discoverable; one log-probability per text, that of its likeliest window.

    Over the number of texts this is the (n, p)-discoverable extraction rate; `intervals.wilson` bounds it.
    """
    return sum(is_discoverable(each, samples, chance) for each in log_probabilities)


def expected_leaked(log_probabilities: Iterable[float], samples: float) -> float:
    """The expected number of texts given away at least once when each is sampled so many times.

    One log-probability per text, that of its likeliest window, so this bounds from below what samples from other
    offsets add. Texts need not be independent: expectations add up.
    """
    return math.fsum(chance_of_a_hit(each, samples) for each in log_probabilities)


def _log_hazard(log_probability: float) -> float:
    """log(-log(1 - p_z)): -inf for p_z = 0, inf for p_z = 1."""
    if math.isnan(log_probability):
        raise NumericalError("the log-probability of a text is not a number; nothing can be said of samples of it.")
    if log_probability >= 0:  # above 0 by rounding only
        return math.inf
    if log_probability < _TINY:
        return log_probability
    if log_probability > -math.log(2):
        return math.log(-math.log(-math.expm1(log_probability)))
    return math.log(-math.log1p(-math.exp(log_probability)))
