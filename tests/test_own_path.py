"""Break points' own paths, computed by themselves next to a pass without gradients, are those of the whole pass."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memscrub.edit import looks as module
from memscrub.edit.breakpoints import Demand, TextState
from memscrub.edit.editable import EditableModel
from memscrub.edit.linearise import Linearisation, linearise, linearise_at
from memscrub.models.architecture import FAMILIES
from memscrub.models.model import LoadedModel
from memscrub.models.own_path import At, Remembered
from memscrub.models.site_finding import sites_of
from tests.families import VARIANTS, config_of
from tests.models import memorizing_checkpoint, opened, random_text

CASES = sorted(FAMILIES) + sorted(VARIANTS)
# These have no scaled-dot-product attention in transformers, so the sum of all gaps is differentiated, as ever.
TOGETHER = {"bloom", "gemma2", "gpt_neo", "gpt_oss", "gptj", "mpt"}
LENGTHS = (40, 31, 38, 12, 25)


def loaded_of(case: str, path: Path, **settings: Any) -> LoadedModel:
    config = config_of(case, **{"vocab_size": 64, "initializer_range": 0.1, **settings})
    return opened(memorizing_checkpoint(path, config, [random_text(1, 40)], steps=2))


def demands_and_points() -> tuple[list[Demand], list[dict[int, float]]]:
    """Texts of several lengths with none to nine break points each."""
    rng = random.Random(5)
    demands = [Demand(tuple(rng.randrange(60) for _ in range(length)), 1) for length in LENGTHS]
    counts = (9, 1, 4, 0, 6)
    return demands, [
        {token: 0.1 * token for token in sorted(rng.sample(range(1, length), count))}
        for length, count in zip(LENGTHS, counts, strict=True)
    ]


def editable(loaded: LoadedModel) -> EditableModel:
    sites = sites_of(loaded, kinds=("mlp", "attention", "query"))
    return EditableModel(loaded, sites, {site.name: torch.float32 for site in sites})


def passed_on(self: Remembered, *given: Tensor, **more: Any) -> Tensor:
    """Remembers nothing."""
    return torch.nn.functional.scaled_dot_product_attention(*given, **more)


def by_whole_passes(made: EditableModel, monkeypatch: pytest.MonkeyPatch) -> Linearisation:
    """The same by passes with gradients at every token."""
    demands, points = demands_and_points()
    with monkeypatch.context() as patch:
        patch.setattr(Remembered, "attend", passed_on)
        return linearise_at(made, made.sites, demands, points, batch_tokens=100)


def assert_alike(one: Linearisation, other: Linearisation) -> None:
    assert one.owners == other.owners
    torch.testing.assert_close(one.margins, other.margins)
    torch.testing.assert_close(one.gaps, other.gaps, atol=1e-3, rtol=1e-4)
    for a, b in zip(one.sites, other.sites, strict=True):
        for found, expected in ((a.activations, b.activations), (a.gradients, b.gradients)):
            size = float(expected.abs().max())
            torch.testing.assert_close(found, expected, atol=1e-4 * size + 1e-7, rtol=1e-3)


@pytest.fixture
def whole_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each whole pass with gradients that is made from now on."""
    made: list[int] = []
    real = module.whole_pass

    def counted(*given: Any, **more: Any) -> Any:
        made.append(1)
        return real(*given, **more)

    monkeypatch.setattr(module, "whole_pass", counted)
    return made


@pytest.mark.parametrize("case", CASES)
def test_own_paths_by_themselves_are_those_of_the_whole_pass(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_passes: list[int]
) -> None:
    made = editable(loaded_of(case, tmp_path))
    expected = by_whole_passes(made, monkeypatch)
    whole_passes.clear()
    demands, points = demands_and_points()
    assert_alike(linearise_at(made, made.sites, demands, points, batch_tokens=100), expected)
    assert bool(whole_passes) == (case in TOGETHER)


@pytest.mark.parametrize("case", ["mistral", "gemma3_text"])
def test_own_paths_by_themselves_see_no_further_back_than_a_sliding_window(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_passes: list[int]
) -> None:
    made = editable(loaded_of(case, tmp_path, sliding_window=6))
    expected = by_whole_passes(made, monkeypatch)
    demands, points = demands_and_points()
    whole_passes.clear()
    assert_alike(linearise_at(made, made.sites, demands, points, batch_tokens=100), expected)
    assert not whole_passes


def test_where_own_paths_by_themselves_say_otherwise_whole_passes_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_passes: list[int]
) -> None:
    made = editable(loaded_of("llama", tmp_path))
    expected = by_whole_passes(made, monkeypatch)
    looks: list[int] = []

    class Astray(At):
        def __init__(self, remembered: Remembered, positions: Tensor) -> None:
            looks.append(1)
            super().__init__(remembered, positions + 1)

    monkeypatch.setattr(module, "At", Astray)
    demands, points = demands_and_points()
    whole_passes.clear()
    found = linearise_at(made, made.sites, demands, points, batch_tokens=40)
    assert_alike(found, expected)
    assert len(looks) == 1  # nor is it tried again in the batches after that
    assert len(whole_passes) > 2


def test_what_is_chosen_from_states_is_what_is_given_at_once(tmp_path: Path) -> None:
    made = editable(loaded_of("llama", tmp_path))
    demands, points = demands_and_points()
    seen: list[int] = []

    def choose(index: int, state: TextState) -> dict[int, float]:
        seen.append(len(state.gap))
        return points[index]

    chosen = linearise(made, made.sites, demands, choose, batch_tokens=100)
    assert sorted(seen) == sorted(LENGTHS)
    assert_alike(chosen, linearise_at(made, made.sites, demands, points, batch_tokens=100))
    nothing = linearise_at(made, made.sites, demands, [{} for _ in demands], batch_tokens=100)
    assert nothing.sites == [] and len(nothing.gaps) == 0


def test_a_gap_moves_as_its_own_path_says_behind_the_last_attention(tmp_path: Path) -> None:
    loaded = loaded_of("llama", tmp_path)
    made = editable(loaded)
    demands, points = demands_and_points()
    found = linearise_at(made, made.sites, demands, points, batch_tokens=100)
    last = next(n for n, site in enumerate(made.sites) if site.layer == 1 and "mlp" in site.name)
    weight = loaded.weight(made.sites[last])
    before = weight.clone()
    for index in (0, 7, 12):
        a, g = found.sites[last].activations[index], found.sites[last].gradients[index]
        weight.add_(1e-2 * torch.outer(g, a) / (g.square().sum() * a.square().sum()))
        moved = linearise_at(made, made.sites, demands, points, batch_tokens=100).gaps[index]
        weight.copy_(before)
        assert float(moved - found.gaps[index]) == pytest.approx(1e-2, rel=0.1)


def test_the_gradient_of_the_sum_counts_later_gaps_too(tmp_path: Path) -> None:
    loaded = loaded_of("llama", tmp_path)
    made = editable(loaded)
    demands, points = demands_and_points()
    summed, own = (
        linearise_at(made, made.sites, demands, points, own_path=which, batch_tokens=100) for which in (False, True)
    )
    torch.testing.assert_close(summed.gaps, own.gaps, atol=1e-4, rtol=1e-4)
    first = next(n for n, site in enumerate(made.sites) if site.layer == 0 and "mlp" in site.name)
    last = next(n for n, site in enumerate(made.sites) if site.layer == 1 and "mlp" in site.name)
    torch.testing.assert_close(summed.sites[last].gradients, own.sites[last].gradients, atol=1e-4, rtol=1e-3)
    assert float((summed.sites[first].gradients - own.sites[first].gradients).abs().max()) > 1e-2
