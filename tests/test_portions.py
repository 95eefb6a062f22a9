"""Text is read at once where its inputs fit into what the edited weights take, else in portions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import opened, tiny_checkpoint

from memscrub.edit.portions import (
    LEAST,
    LEAST_AGAIN,
    Reading,
    every_input,
    few_inputs,
    portions,
    reading_of,
    statistics_size,
)
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp("brain"), "llama", 0, layers=4))


# What one layer of the tiny Llama takes: queries and outputs [32, 32], keys and values [16, 32], three MLP matrices
# of [32, 48] and two norms of 32.
LAYER = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32)
TOKEN = 4 * 32


@pytest.mark.parametrize("kinds", [("mlp",), ("mlp", "attention", "query"), ("query",)])
def test_inputs_take_what_the_sums_leave_of_the_edited_weights(loaded: LoadedModel, kinds: tuple[str, ...]) -> None:
    sites = sites_of(loaded, kinds=kinds, layers=[2, 3])
    each, both = 3 * TOKEN, every_input(2)  # two blocks and a gradient
    assert reading_of(loaded, sites, 2 * LAYER // each) == Reading(2 * LAYER // each, both)
    room = reading_of(loaded, sites, 2 * LAYER // each + 1)
    size = statistics_size(loaded, sites)
    assert room == Reading((2 * LAYER - size) // each, both)
    assert room.tokens * each + size <= 2 * LAYER
    assert reading_of(loaded, sites, 2 * LAYER // each, beside=4000).tokens == (2 * LAYER - size - 4000) // each


def test_where_the_sums_leave_less_than_an_eighth_few_inputs_lie_on_disk(loaded: LoadedModel) -> None:
    sites = sites_of(loaded, kinds=("mlp",))
    size = statistics_size(loaded, sites)
    few, each = few_inputs(4), 4 * TOKEN  # three blocks and a gradient
    for left, expected in (
        (4 * LAYER // LEAST, Reading(4 * LAYER // LEAST // (5 * TOKEN), every_input(4))),
        (4 * LAYER // LEAST - 1, Reading((4 * LAYER // LEAST - 1) // each, few)),
        (4 * LAYER // LEAST_AGAIN, Reading(4 * LAYER // LEAST_AGAIN // each, few)),
        # A forty-eighth of the weights is theirs however large the sums are.
        (0, Reading(4 * LAYER // LEAST_AGAIN // each, few)),
        (-(10**6), Reading(4 * LAYER // LEAST_AGAIN // each, few)),
    ):
        assert reading_of(loaded, sites, 10**6, beside=4 * LAYER - size - left) == expected


@given(st.integers(1, 130))
def test_segments_hold_every_block_and_as_few_inputs_as_their_number(blocks: int) -> None:
    for segments in (every_input(blocks), few_inputs(blocks)):
        assert [number for segment in segments for number in segment] == list(range(blocks))
    assert Reading(1, every_input(blocks)).kept == blocks
    few = Reading(1, few_inputs(blocks)).kept
    assert few == len(few_inputs(blocks))
    assert (few - 1) * few // 2 < blocks <= few * (few + 1) // 2


def test_segments_grow_downwards() -> None:
    assert few_inputs(9) == (range(0, 3), range(3, 6), range(6, 8), range(8, 9))
    assert len(few_inputs(36)) == 8


def test_the_size_of_statistics_is_two_triangles_for_each_site(loaded: LoadedModel) -> None:
    def triangle(size: int) -> int:
        return 4 * size * (size + 1) // 2

    mlp, attention, query = (sites_of(loaded, kinds=(kind,), layers=[0]) for kind in ("mlp", "attention", "query"))
    assert statistics_size(loaded, mlp) == triangle(48) + triangle(32)
    assert statistics_size(loaded, [*mlp, *attention, *query]) == triangle(48) + 5 * triangle(32)
    heads = [replace(attention[0], columns=columns) for columns in (tuple(range(8)), tuple(range(8, 16)))]
    assert statistics_size(loaded, heads) == 2 * triangle(8) + triangle(32)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 30))), st.integers(0, 100))
def test_portions_are_the_batches_in_order_and_as_full_as_can_be(shapes: list[tuple[int, int]], tokens: int) -> None:
    batches = [torch.zeros(shape) for shape in shapes]
    found = portions(iter(batches), tokens)
    assert [id(batch) for part in found for batch in part] == list(map(id, batches))
    sizes = [sum(batch.numel() for batch in part) for part in found]
    for part, size in zip(found, sizes, strict=True):
        assert part and (size <= tokens or len(part) == 1)
    for size, following in zip(sizes, found[1:], strict=False):
        assert size + following[0].numel() > tokens
