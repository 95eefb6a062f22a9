"""Benign prompts: what counts as degenerate, and that a broken model shows where an unedited one does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import FAMILIES, opened, ordinary_rows, tiny_checkpoint

from memscrub.locality.benign import CONTINUED, GIVEN, benign_openings, compare_benign, end_tokens, talk
from memscrub.measures.continuation import continue_greedily
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of

ROWS = ordinary_rows(5, rows=12, width=80)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("benign")
    return opened(tiny_checkpoint(path, "llama", seed=3, texts=["w01 w02 w03 " * 8], steps=60))


@pytest.mark.parametrize(
    ("tokens", "degenerate"),
    [
        (range(48), False),
        ([1] * 48, True),
        ([*range(24), *([5, 6, 7] * 8)], True),  # the end is a loop
        ([*range(30), *([5, 6, 7] * 6)], False),  # not for long enough yet
        ([*range(12)] * 4, True),  # too long a stretch for a loop, but most of it was there before
        ([*range(30), *range(18)], False),
        ([], True),
        ([1, 2, 3], False),
    ],
)
def test_loops_repetition_and_silence_are_degenerate(tokens: list[int], degenerate: bool) -> None:
    assert talk(tuple(tokens), frozenset()).degenerate is degenerate


def test_what_follows_the_end_token_does_not_count() -> None:
    said = talk((1, 2, 3, 9, *([4] * 44)), frozenset({9}))
    assert said.ended and not said.empty and not said.degenerate
    assert talk((9, 1, 2, 3), frozenset({9})).empty
    assert not talk((1, 2, 3), frozenset({9})).ended


def test_openings_are_spread_over_the_rows_and_never_alike(loaded: LoadedModel) -> None:
    starts = benign_openings(loaded, ROWS, prompts=8)
    assert len(starts) == 8
    assert {len(start.given) for start in starts} == {len(loaded.prompt) + GIVEN}
    assert {len(start.truth) for start in starts} == {CONTINUED}
    assert len({start.given for start in starts}) == 8
    assert len(benign_openings(loaded, ROWS, prompts=1000)) == len(ROWS)
    assert benign_openings(loaded, ROWS[:0]) == []
    (short,) = benign_openings(loaded, ROWS[:1, :5])
    assert (len(short.given) - len(loaded.prompt), len(short.truth)) == (2, 3)


def test_an_unedited_model_says_the_same(loaded: LoadedModel) -> None:
    site = sites_of(loaded)[0]
    found = compare_benign(loaded, {site.tensor: loaded.parameter(site).clone()}, ROWS)
    assert found is not None
    assert found.prompts == len(ROWS) and found.agreement == 1.0
    assert found.newly_degenerate == found.newly_ended == 0
    assert found.degenerate_before == found.degenerate_after and found.repeated_rise == 0


def test_a_model_that_says_one_word_only_is_newly_degenerate_and_the_live_weights_stay(loaded: LoadedModel) -> None:
    head = loaded.model.get_parameter("lm_head.weight")
    original = head.data.clone()
    try:
        head.data = torch.zeros_like(original)  # all logits equal: the likeliest token is the first, for ever
        found = compare_benign(loaded, {"lm_head.weight": original}, ROWS)
        assert not head.data.any()
    finally:
        head.data = original
    assert found is not None
    assert found.degenerate_after == found.prompts
    assert found.newly_degenerate == found.prompts - found.degenerate_before > 0
    assert found.repeated_rise > 0 and found.agreement < 0.7


def test_ending_where_the_original_goes_on_is_counted(loaded: LoadedModel) -> None:
    head = loaded.model.get_parameter("lm_head.weight")
    original = head.data.clone()
    loaded.model.config.eos_token_id = 0
    try:
        assert end_tokens(loaded) == {0}
        head.data = torch.zeros_like(original)
        found = compare_benign(loaded, {"lm_head.weight": original}, ROWS)
    finally:
        head.data = original
        loaded.model.config.eos_token_id = None
    assert found is not None
    assert found.ended_after == found.empty_after == found.prompts
    assert found.newly_ended == found.prompts - found.ended_before > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoints_own_generation_settings_do_not_change_what_the_model_says(family: str, tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, family, seed=4))
    starts = benign_openings(loaded, ROWS)
    free = [said.tokens for said in continue_greedily(loaded, starts)]
    own = loaded.model.generation_config
    own.eos_token_id, own.repetition_penalty, own.do_sample = free[0][2], 5.0, True  # type: ignore[union-attr]
    assert [said.tokens for said in continue_greedily(loaded, starts)] == free
    assert loaded.model.generation_config is own
