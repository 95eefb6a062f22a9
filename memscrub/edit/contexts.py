"""The same text in other places: behind ordinary text, behind an end-of-text token, with perturbed first tokens.

A text that is safe at the start of a prompt is not safe everywhere: the model has learned it in other contexts too.
Knows token ids and demands, no model's answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from memscrub.edit.breakpoints import Demand
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText

Context = Literal["unrelated", "follows", "perturbed"]

# Tokens of ordinary text before a protected one.
BEFORE = 48
# Of the first so many tokens of a text, so many are replaced; judging starts behind them.
PERTURBED_AMONG, PERTURBED = 16, 4


def in_context(
    loaded: LoadedModel, text: TokenText, demand: Demand, kind: Context, ordinary: Tensor, *, seed: int
) -> Demand | None:
    """The demand on a text, moved into another context; None where the model reads too few tokens at once.

    `ordinary` `[rows, width]` is where ordinary tokens are taken from; the choice depends on the text's id and the
    seed only.
    """
    generator = random.Random(f"{seed}/{kind}/{text.id}")
    if kind == "perturbed":
        return _perturbed(text, demand, ordinary, generator)
    before = list(loaded.prompt) + _piece(ordinary, generator, BEFORE)
    if kind == "follows":
        end = loaded.tokenizer.eos_token_id
        before.append(int(end) if end is not None else before[-1])
    if len(before) - text.start + len(text.tokens) > loaded.max_positions:
        return None
    return shifted(demand, tuple(before), text.start)


def shifted(demand: Demand, before: tuple[int, ...], start: int) -> Demand:
    """The demand with other tokens before index `start`."""
    move = len(before) - start
    return replace(
        demand,
        tokens=before + demand.tokens[start:],
        first=max(1, demand.first + move),
        spans=tuple((begin + move, end + move, limit) for begin, end, limit in demand.spans),
        judged=None if demand.judged is None else tuple((a + move, b + move) for a, b in demand.judged),
    )


def _perturbed(text: TokenText, demand: Demand, ordinary: Tensor, generator: random.Random) -> Demand | None:
    begin, end = text.start, text.start + PERTURBED_AMONG
    if len(text.tokens) < end + PERTURBED_AMONG:
        return None
    tokens = list(demand.tokens)
    for place, other in zip(
        generator.sample(range(begin, end), PERTURBED), _piece(ordinary, generator, PERTURBED), strict=True
    ):
        tokens[place] = other
    # Spans among the perturbed tokens are not the text's any more.
    spans = tuple(span for span in demand.spans if span[0] >= end)
    return replace(demand, tokens=tuple(tokens), first=max(demand.first, end), spans=spans)


def _piece(ordinary: Tensor, generator: random.Random, length: int) -> list[int]:
    """So many tokens running from a row of ordinary text."""
    row = ordinary[generator.randrange(len(ordinary))].tolist()
    length = min(length, len(row))
    begin = generator.randrange(len(row) - length + 1)
    return [int(token) for token in row[begin : begin + length]]


def kinds(names: Sequence[str]) -> tuple[Context, ...]:
    """The contexts other than the text's own start among the names of a policy's `contexts`."""
    known: tuple[Context, ...] = ("unrelated", "follows", "perturbed")
    return tuple(kind for kind in known if kind in names)
