"""Text is read at once where its inputs fit into what the edited weights take, else in portions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import opened, tiny_checkpoint

from memscrub.edit.portions import LEAST, portions, statistics_size, tokens_at_once
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
    each = 3 * TOKEN  # two blocks and a gradient
    assert tokens_at_once(loaded, sites, 2 * LAYER // each) == 2 * LAYER // each
    room = tokens_at_once(loaded, sites, 2 * LAYER // each + 1)
    size = statistics_size(loaded, sites)
    assert room == (2 * LAYER - size) // each
    assert room * each + size <= 2 * LAYER
    assert tokens_at_once(loaded, sites, 2 * LAYER // each, beside=4000) == (2 * LAYER - size - 4000) // each


def test_an_eighth_of_the_weights_is_theirs_however_large_the_sums_are(loaded: LoadedModel) -> None:
    sites = sites_of(loaded, kinds=("mlp",), layers=[3]) * 6
    many = [replace(site, rows=tuple(range(32 - n))) for n, site in enumerate(sites)]
    assert statistics_size(loaded, many) > LAYER
    assert tokens_at_once(loaded, many, 10**6) == LAYER // LEAST // (2 * TOKEN)


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
