"""Closeness goes on behind the first difference, and its fast forms are their slow definitions."""

from __future__ import annotations

import difflib
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import WORDS, ids_of, opened, random_text, tiny_checkpoint
from rapidfuzz.distance import Levenshtein

from memscrub.errors import UsageError
from memscrub.maths.alignment import SMALLEST_BLOCK, Closeness, closeness, covered_tokens, longest_common_substring
from memscrub.measures.continuation import similarity

FEW = st.lists(st.integers(0, 2), max_size=10)
TRUTH = tuple(range(100, 150))
OTHER = tuple(range(500, 600))


def words(ids: object) -> str:
    return " ".join(map(str, ids))  # type: ignore[call-overload]


def slow_common(one: list[int], other: list[int]) -> int:
    pieces = {tuple(one[i:j]) for i in range(len(one)) for j in range(i + 1, len(one) + 1)}
    return max(
        (j - i for i in range(len(other)) for j in range(i + 1, len(other) + 1) if tuple(other[i:j]) in pieces),
        default=0,
    )


def slow_covered(said: list[int], truth: list[int], least: int) -> int:
    """Every choice of blocks, tried."""

    @cache
    def best(i: int, j: int) -> int:
        if i >= len(said) or j >= len(truth):
            return 0
        found = max(best(i + 1, j), best(i, j + 1))
        for length in range(least, min(len(said) - i, len(truth) - j) + 1):
            if said[i : i + length] == truth[j : j + length]:
                found = max(found, length + best(i + length, j + length))
        return found

    return best(0, 0)


@given(FEW, FEW)
def test_the_longest_common_substring_is_that_of_all_pieces(one: list[int], other: list[int]) -> None:
    assert longest_common_substring(one, other) == slow_common(one, other) == longest_common_substring(other, one)


@given(st.text("ab", max_size=60), st.text("ab", max_size=60))
def test_characters_agree_with_difflib(one: str, other: str) -> None:
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    assert longest_common_substring(one, other) == matcher.find_longest_match().size


def test_a_loop_of_ten_thousand_characters_takes_no_quadratic_time() -> None:
    # Quadratic, this is 10^8 steps and more than half a minute; linear, milliseconds.
    assert longest_common_substring("ab" * 5000, "ba" * 5000) == 9999


@given(FEW, FEW, st.integers(1, 4))
@settings(max_examples=200)
def test_covered_tokens_are_the_most_of_all_choices_of_blocks(said: list[int], truth: list[int], least: int) -> None:
    assert covered_tokens(said, truth, least) == slow_covered(said, truth, least)


@given(FEW, FEW, st.integers(1, 4))
def test_covered_tokens_are_no_fewer_than_those_of_an_edit_distance_alignment(
    said: list[int], truth: list[int], least: int
) -> None:
    blocks = Levenshtein.editops(said, truth).as_matching_blocks()
    assert covered_tokens(said, truth, least) >= sum(block.size for block in blocks if block.size >= least)
    longest = longest_common_substring(said, truth)
    assert covered_tokens(said, truth, least) >= (longest if longest >= least else 0)


@pytest.mark.parametrize("place", [10, 25, 40])
def test_one_inserted_word_does_not_hide_the_rest(place: int) -> None:
    said = (*TRUTH[:place], OTHER[0], *TRUTH[place:])[:50]
    found = closeness(said, TRUTH, words)
    assert found.covered == 49 / 50
    assert found.common_tokens == max(place, 49 - place)


def test_a_skipped_and_a_changed_word_do_not_hide_the_rest() -> None:
    said = (*TRUTH[:15], *TRUTH[16:30], OTHER[0], *TRUTH[31:])
    assert closeness(said, TRUTH, words).covered == 48 / 50


def test_a_block_that_comes_late_counts_though_an_edit_distance_would_rather_substitute() -> None:
    said = (*OTHER[:30], *TRUTH[:20])
    blocks = Levenshtein.editops(said, TRUTH).as_matching_blocks()
    assert sum(block.size for block in blocks) == 0
    assert closeness(said, TRUTH, words).covered == 20 / 50


def test_blocks_out_of_order_or_too_short_do_not_count() -> None:
    assert covered_tokens((*TRUTH[25:], *TRUTH[:25]), TRUTH) == 25
    pieces = [token for i in range(0, 49, SMALLEST_BLOCK) for token in (*TRUTH[i : i + SMALLEST_BLOCK - 1], OTHER[i])]
    assert covered_tokens(pieces, TRUTH) == 0
    assert covered_tokens(pieces, TRUTH, SMALLEST_BLOCK - 1) == 6 * (SMALLEST_BLOCK - 1)


def test_what_is_said_twice_counts_once() -> None:
    assert covered_tokens(TRUTH[:20] * 3, TRUTH) == 20


@given(st.lists(st.integers(0, 9), max_size=30))
def test_the_truth_itself_is_as_close_as_can_be(truth: list[int]) -> None:
    covered = 1.0 if len(truth) >= SMALLEST_BLOCK else 0.0
    assert closeness(truth, truth, words) == Closeness(1.0, 1.0, len(truth), len(words(truth)), covered)


def test_nothing_said_is_close_to_nothing() -> None:
    assert closeness((), TRUTH, words) == Closeness(0.0, 0.0, 0, 0, 0.0)
    assert closeness(TRUTH, (), words) == Closeness(0.0, 0.0, 0, 0, 0.0)
    assert closeness(OTHER, TRUTH, lambda ids: "x" * len(ids)).covered == 0


def test_the_similarity_is_the_one_that_near_verbatim_is_judged_by(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=1))
    source = random.Random(0)
    for seed in range(5):
        truth = ids_of(random_text(seed, 30))
        said = [source.randrange(len(WORDS)) if source.random() < 0.3 else token for token in truth][3:]
        found = closeness(said, truth, lambda ids: loaded.tokenizer.decode(list(ids)))
        assert max(found.token_similarity, found.character_similarity) == similarity(loaded, said, truth)


def test_blocks_of_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one token"):
        covered_tokens(TRUTH, TRUTH, 0)
