"""Whether an edit leaves the model within its locality limits, asked of the solver's text before anything is written;
does not know what becomes of an edit that does not, nor the text that judges in the end.

A few rows say this only roughly, texts given up are given up for good, and an edit that breaks a limit after all is
withheld by the judge. So a limit is surely broken where more than the rows' own standard error says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import stdev

from torch import Tensor

from memscrub.locality.distance import Compared, compare_stream
from memscrub.reports.locality_limits import DistanceLimits, StreamDistance, broken_distance, limit_of

# The standard error is taken from so many consecutive parts of the text.
PARTS = 8


def without_room(
    compared: Callable[[Tensor], Compared], rows: Tensor, limits: DistanceLimits, *, surely: bool = True
) -> tuple[str, ...]:
    """A sentence for each limit that the edit breaks on `rows` `[rows, width]` (`surely`: by more than a standard
    error), with what was measured: `compared` says what both models make of them. No limit is on the beginnings of
    texts. Raises NumericalError when the edited model's output is not finite."""
    measured = compare_stream(compared(rows))
    broken = broken_distance(measured, limits)
    if not broken or not surely or len(rows) == 1:
        return tuple(broken)
    parts = [compare_stream(compared(part)) for part in rows.tensor_split(min(PARTS, len(rows)))]
    certain = {limit_of(sentence) for sentence in broken_distance(at_its_kindest(measured, parts), limits)}
    return tuple(sentence for sentence in broken if limit_of(sentence) in certain)


def at_its_kindest(measured: StreamDistance, parts: Sequence[StreamDistance]) -> StreamDistance:
    """What was measured, each mean a standard error nearer to the original; `parts`, two or more, are equal shares of
    the text. The worst row is no mean and stays."""

    def error(value: Callable[[StreamDistance], float]) -> float:
        return stdev(map(value, parts)) / math.sqrt(len(parts))

    ratio = error(lambda part: math.log(part.perplexity_ratio))
    return replace(
        measured,
        kl=max(0.0, measured.kl - error(lambda part: part.kl)),
        agreement=min(1.0, measured.agreement + error(lambda part: part.agreement)),
        perplexity_ratio=measured.perplexity_ratio * math.exp(-ratio),
    )
