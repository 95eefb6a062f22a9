"""What the page shows of single tokens: probability and margin in coarse steps, never the tokens unless revealed.

Plain values: knows no model. Exact probabilities beside the weights would tell which tokens they belong to, so a mark
keeps ten steps of each and nothing finer. A strip is a string of two characters per token: a digit for the step of the
probability, a letter for the step of the margin, in capitals where greedy decoding emits the true token.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

# Lower ends of the steps; the last step has no upper end. A margin is the distance to the best other token, in logits.
PROBABILITIES = (0.0, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
MARGINS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 15.0)
_LETTERS = "abcdefghij"


@dataclass(frozen=True)
class TokenView:
    """The tokens of one text as a page shows them.

    `first`: index of the first token shown, in the numbering of `Measures.run_begin`. `before` and `after`: strips of
    equal length, `after` None without an edit. `judged`: how many tokens from `first` on are given to the adversary
    before judging starts. `secrets`: ranges `[begin, end)` of marked secrets, in the same numbering. `tokens`: the
    tokens as text, one each, only where they may be shown; else None.
    """

    first: int
    before: str
    after: str | None = None
    judged: int = 0
    secrets: tuple[tuple[int, int], ...] = ()
    tokens: tuple[str, ...] | None = field(default=None, repr=False)


def probability(log_p: float) -> float:
    """A probability from its logarithm; of a stated logarithm that cannot be one, at most 1."""
    return math.exp(min(log_p, 0.0))


def strip(gaps: Sequence[float], log_probabilities: Sequence[float]) -> str:
    """The marks of tokens in a row, from the true token's logit minus the best other one and its log-probability."""
    return "".join(_mark(gap, log_p) for gap, log_p in zip(gaps, log_probabilities, strict=True))


def _mark(gap: float, log_p: float) -> str:
    digit = bisect_right(PROBABILITIES, probability(log_p)) - 1
    letter = _LETTERS[bisect_right(MARGINS, abs(gap)) - 1]
    return f"{digit}{letter.upper() if gap > 0 else letter}"
