"""What the model itself goes on to say after a prefix, by real decoding; and how close that is to the true text.

A text can be safe token by token and still come out with one word changed: this is where that shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rapidfuzz.distance import Levenshtein

from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, decoded

# Shorter remainders say nothing: a few common tokens are close to anything.
MIN_SUFFIX = 8


@dataclass(frozen=True)
class Opening:
    """Where a continuation starts: the text's tokens `[begin, begin + prefix)` are given, the rest is compared."""

    text: int  # index into the list of texts
    offset: int
    given: tuple[int, ...] = field(repr=False)
    truth: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class Continuation:
    """What the model said after an opening, and its similarity to the true text (0 to 1)."""

    opening: Opening
    tokens: tuple[int, ...] = field(repr=False)
    similarity: float


def openings(
    texts: Sequence[TokenText], prompt: Sequence[int], offsets: Sequence[int], prefix: int, length: int
) -> list[Opening]:
    """The openings of every text at these offsets; a text too short for the prefix is opened at half its length."""
    found = []
    for index, text in enumerate(texts):
        body = text.tokens[text.start :]
        given = min(prefix, len(body) // 2)
        for offset in offsets:
            truth = body[offset + given : offset + given + length]
            if given and len(truth) >= MIN_SUFFIX:
                before = tuple(prompt) if offset else text.tokens[: text.start]
                found.append(Opening(index, offset, before + body[offset : offset + given], truth))
    return found


def continue_greedily(
    loaded: LoadedModel,
    starts: Sequence[Opening],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
    known: Collection[int] = (),
    heard: Callable[[Sequence[Continuation]], None] = lambda said: None,
) -> list[Continuation]:
    """Let the model go on from each opening, greedily, for as many tokens as are compared.

    Only openings of equal length share a batch, so nothing is padded and every answer is what the model says. A batch
    whose openings are all `known` (by index) is passed over and not in what is returned: batches, and with them the
    bits, are the same as without. `heard` is told of every batch as it comes.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, start in enumerate(starts):
        groups[len(start.given), len(start.truth)].append(index)
    said: dict[int, Continuation] = {}
    done = 0
    for (given, length), members in sorted(groups.items()):
        size = max(1, batch_tokens // (given + length))
        for chunk in (members[i : i + size] for i in range(0, len(members), size)):
            done += len(chunk)
            if not all(index in known for index in chunk):
                rows = _generate(loaded, [starts[i].given for i in chunk], length)
                for index, row in zip(chunk, rows, strict=True):
                    said[index] = Continuation(starts[index], row, similarity(loaded, row, starts[index].truth))
                heard([said[index] for index in chunk])
            progress(done)
    return [said[index] for index in sorted(said)]


def similarity(loaded: LoadedModel, said: Sequence[int], truth: Sequence[int]) -> float:
    """The higher of token and character similarity, 1 - Levenshtein distance / length of the longer one."""
    tokens = Levenshtein.normalized_similarity(list(said), list(truth))
    characters = Levenshtein.normalized_similarity(decoded(loaded, said), decoded(loaded, truth))
    return max(tokens, characters)


def greedy_matches(loaded: LoadedModel, text: TokenText, begin: int, length: int) -> int:
    """How many of the tokens `[begin, begin + length)` real, unpadded decoding emits, given all before them."""
    (said,) = _generate(loaded, [text.tokens[:begin]], length)
    truth = text.tokens[begin : begin + length]
    return next((i for i, (a, b) in enumerate(zip(said, truth, strict=False)) if a != b), min(len(said), len(truth)))


def _generate(loaded: LoadedModel, given: Sequence[Sequence[int]], length: int) -> list[tuple[int, ...]]:
    from transformers import GenerationConfig

    length = min(length, loaded.max_positions - len(given[0]))
    if length < 1:
        return [()] * len(given)
    ids = torch.tensor(given, dtype=torch.long, device=loaded.device)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=length, pad_token_id=0, use_cache=True)  # type: ignore[no-untyped-call]
    # No end token: an adversary does not stop at one. What `greedy` leaves open, `generate` takes from the
    # checkpoint's own settings: its end token, and penalties that a forward pass knows nothing of.
    model: Any = loaded.model
    own, model.generation_config = model.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    finally:
        model.generation_config = own
    return [tuple(row) for row in out[:, ids.shape[1] :].tolist()]
