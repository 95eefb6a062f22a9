"""How close what was said comes to the truth: as sequences of tokens and of characters; knows no model.

Greedy exact match is beaten by one changed word, and so is a measure that stops at the first difference. The measures
here go on behind it. `rapidfuzz` has the Levenshtein distance; it has no longest common substring and no alignment by
blocks, so these are here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from memscrub.errors import UsageError

# Shorter blocks are found between texts that have nothing to do with each other.
SMALLEST_BLOCK = 8


@dataclass(frozen=True)
class Closeness:
    """How close a continuation comes to the true one.

    `token_similarity`, `character_similarity`: 1 - Levenshtein distance / length of the longer one, 0 to 1.
    `common_tokens`, `common_characters`: length of the longest piece that is in both without a break.
    `covered`: share of the truth's tokens in blocks that were said in the same order, 0 to 1 (`covered_tokens`).
    """

    token_similarity: float
    character_similarity: float
    common_tokens: int
    common_characters: int
    covered: float


def closeness(said: Sequence[int], truth: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Closeness:
    """All measures of what was said against the truth, both token ids; `decode` turns ids into text."""
    said_text, true_text = decode(said), decode(truth)
    return Closeness(
        token_similarity=Levenshtein.normalized_similarity(list(said), list(truth)),
        character_similarity=Levenshtein.normalized_similarity(said_text, true_text),
        common_tokens=longest_common_substring(said, truth),
        common_characters=longest_common_substring(said_text, true_text),
        covered=covered_tokens(said, truth) / max(1, len(truth)),
    )


def longest_common_substring(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Length of the longest piece that is in both without a break, in time linear in their lengths.

    The shorter one's suffix automaton (Blumer et al. 1985) is walked along the longer one.
    """
    short, long = (one, other) if len(one) <= len(other) else (other, one)
    moves, links, lengths = _suffix_automaton(short)
    best = state = length = 0
    for symbol in long:
        while state and symbol not in moves[state]:
            state = links[state]
            length = lengths[state]
        if symbol in moves[state]:
            state = moves[state][symbol]
            length += 1
            best = max(best, length)
    return best


def covered_tokens(said: Sequence[int], truth: Sequence[int], smallest_block: int = SMALLEST_BLOCK) -> int:
    """How many of the truth's tokens can be covered by blocks of at least so many tokens that were said in order.

    A block is a piece that is in both without a break; of two blocks, the later one in the truth comes later in what
    was said, and they do not overlap. The number is the largest over all choices of blocks, found by dynamic
    programming: an edit-distance alignment would pay for a shift, and drop a block rather than make it. Time is that
    of the pairs of equal tokens, and of len(truth) for each token said at which a block ends. Raises UsageError for
    blocks of less than one token.
    """
    if smallest_block < 1:
        raise UsageError(f"a block has at least one token, not {smallest_block}; use 8 where nothing else is asked.")
    places: dict[int, list[int]] = defaultdict(list)
    for end, token in enumerate(truth, start=1):
        places[token].append(end)
    # best[j]: the most that all said so far covers of truth[:j]. Of the rows only the last few are looked at.
    rows = [[0] * (len(truth) + 1)]
    runs: dict[int, tuple[int, int]] = {}  # end in the truth -> length of the common run, most covered by a block to it
    for token in said:
        now: dict[int, tuple[int, int]] = {}
        for end in places.get(token, ()):
            length, through = runs.get(end - 1, (0, 0))
            length += 1
            longer = through + 1 if length > smallest_block else 0
            fresh = rows[-smallest_block][end - smallest_block] + smallest_block if length >= smallest_block else 0
            now[end] = (length, max(longer, fresh))
        rows.append(_raised(rows[-1], {end: through for end, (_, through) in now.items() if through}))
        del rows[:-smallest_block]
        runs = now
    return rows[-1][-1]


def _raised(row: list[int], candidates: dict[int, int]) -> list[int]:
    """The row with each entry raised to the largest candidate at or before it; the same list where there is none."""
    if not candidates:
        return row
    raised, least = list(row), 0
    for end in range(min(candidates), len(row)):
        least = max(least, candidates.get(end, 0))
        raised[end] = max(raised[end], least)
    return raised


def _suffix_automaton(
    sequence: Sequence[Hashable],
) -> tuple[list[dict[Hashable, int]], list[int], list[int]]:
    """Moves by symbol, suffix links and longest lengths of the states; state 0 is the start, its link is -1."""
    moves: list[dict[Hashable, int]] = [{}]
    links, lengths, last = [-1], [0], 0
    for symbol in sequence:
        current, state = len(moves), last
        moves.append({})
        links.append(0)
        lengths.append(lengths[last] + 1)
        while state != -1 and symbol not in moves[state]:
            moves[state][symbol] = current
            state = links[state]
        if state != -1:
            reached = moves[state][symbol]
            if lengths[reached] == lengths[state] + 1:
                links[current] = reached
            else:
                # The state stands for longer pieces too, which are not suffixes here: split it.
                split = len(moves)
                moves.append(dict(moves[reached]))
                links.append(links[reached])
                lengths.append(lengths[state] + 1)
                links[reached] = links[current] = split
                while state != -1 and moves[state].get(symbol) == reached:
                    moves[state][symbol] = split
                    state = links[state]
        last = current
    return moves, links, lengths
