"""Is it memorization? Measures of protected texts held against those of texts that were never trained on.

Plain values of one measure and one class, on the scale of the class's limit (higher is closer to the text); knows
neither models nor reports.

Two questions. Of a limit: do control texts break it too (`control_rate`)? Then breaking it is no evidence. Of a text:
is it above all controls (`attribute`)? Otherwise boilerplate or guessing explains as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from memscrub.errors import NumericalError
from memscrub.maths.intervals import Interval, wilson

# As in a test at the level of 5 %. With fewer than 20 controls a single one that breaks the limit is more than that.
UNREASONABLE = 0.05


@dataclass(frozen=True)
class ControlRate:
    """How a limit stands to texts that were never trained on.

    `breaking` of `controls` are above `allowed`; `rate` is their share (0 without controls) and `interval` its Wilson
    interval. `highest` is the largest value of any control, None without controls. `threshold` is the rate above
    which the limit is flagged.
    """

    allowed: float
    controls: int
    breaking: int
    rate: float
    interval: Interval
    highest: float | None
    threshold: float

    @property
    def flagged(self) -> bool:
        """Texts never trained on break the limit so often that breaking it says little about memorization."""
        return self.rate > self.threshold


@dataclass(frozen=True)
class Attribution:
    """One protected text's value against the controls of its class.

    `attributable`: above every control; also where there are none, for then nothing else explains it. `chance` is the
    probability that a text which was never trained on, and is like the controls, reaches the value:
    (1 + controls that reach it) / (1 + controls). With n controls it is at least 1 / (n + 1), so of T such texts
    T / (n + 1) are expected to be above all controls.
    """

    value: float
    highest: float | None
    chance: float
    attributable: bool


def control_rate(controls: Sequence[float], allowed: float, *, threshold: float = UNREASONABLE) -> ControlRate:
    """How many control texts break the limit `allowed`; one value per control of the class.

    A share and not "any control": one break in thousands is a phrase that everybody writes or a control that was
    trained on after all, and does not make the limit useless. What a single text may show is decided by the highest
    control (`attribute`). Raises NumericalError for a NaN.
    """
    highest = _highest(controls)
    breaking = sum(value > allowed for value in controls)
    rate = breaking / max(1, len(controls))
    return ControlRate(allowed, len(controls), breaking, rate, wilson(breaking, len(controls)), highest, threshold)


def attribute(value: float, controls: Sequence[float]) -> Attribution:
    """Whether a protected text's run, similarity or probability is more than any control of its class shows.

    A NaN counts as attributable: what was not measured is never excused. Raises NumericalError for a NaN among the
    controls.
    """
    highest = _highest(controls)
    reaching = sum(not each < value for each in controls) if not math.isnan(value) else 0
    attributable = highest is None or not value <= highest
    return Attribution(value, highest, (1 + reaching) / (1 + len(controls)), attributable)


def _highest(controls: Sequence[float]) -> float | None:
    if any(map(math.isnan, controls)):
        raise NumericalError("a control text's measure is not a number; nothing can be held against it.")
    return max(controls, default=None)
