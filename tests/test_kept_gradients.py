"""Gradients used again: the same constraints as measured anew where nothing changed, and new ones where asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from models import (
    opened,
    ordinary_rows,
    random_text,
    tiny_checkpoint,
    token_text,
)

import memscrub.edit.joint
from memscrub.edit.breakpoints import Demand, TextState
from memscrub.edit.disturbance import measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.joint import EditSettings, JointEdit
from memscrub.edit.kept_gradients import ROUNDS, KeptGradients
from memscrub.edit.linearise import Linearisation, gaps_at, linearise
from memscrub.edit.solver import Linearised
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of

TEXTS = tuple(random_text(seed, 30) for seed in range(3))
RETAIN = ordinary_rows(1, rows=24, width=24)
TOKENS = 64

Points = Mapping[int, Mapping[int, float]]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp("kept"), "llama", seed=1, texts=TEXTS, steps=80))


@pytest.fixture(scope="module")
def demands(loaded: LoadedModel) -> list[Demand]:
    texts = [token_text(loaded, text) for text in TEXTS]
    return [Demand(text.tokens, text.first_judged(1), 6) for text in texts]


def editable_of(loaded: LoadedModel) -> EditableModel:
    sites = sites_of(loaded)
    return EditableModel(loaded, sites, {site.name: torch.float32 for site in sites})


def measured(editable: EditableModel, demands: list[Demand], points: Points) -> Linearisation:
    def choose(index: int, state: TextState) -> Mapping[int, float]:
        return points.get(index, {})

    return linearise(editable, editable.sites, demands, choose, own_path=True, batch_tokens=TOKENS)


def assert_same(found: list[Linearised], expected: list[Linearised]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.activations, other.activations, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.gradients, other.gradients, atol=1e-5, rtol=1e-4)


FIRST: Points = {0: {9: 0.3, 15: 0.3}, 1: {8: 0.3}, 2: {7: 0.3}}
THEN: Points = {0: {15: 0.3, 12: 0.5}, 1: {8: 0.3}, 2: {7: 0.3, 10: 0.3}}


def test_gaps_alone_are_those_of_the_pass_with_gradients(loaded: LoadedModel, demands: list[Demand]) -> None:
    expected = measured(editable_of(loaded), demands, FIRST).at
    found = gaps_at(loaded, demands, lambda index, state: FIRST[index], batch_tokens=TOKENS)
    assert sorted(found.points) == sorted(expected.points)
    order = [expected.points.index(point) for point in found.points]
    torch.testing.assert_close(found.gaps, expected.gaps[order], atol=1e-4, rtol=1e-4)
    assert found.margins.tolist() == expected.margins[order].tolist()


def test_new_and_dropped_points_give_what_measuring_all_gives(loaded: LoadedModel, demands: list[Demand]) -> None:
    editable = editable_of(loaded)
    kept = KeptGradients(measured(editable, demands, FIRST), own=True)
    expected = measured(editable, demands, THEN)
    found = kept.constraints(editable, demands, replace(expected.at), (), batch_tokens=TOKENS)
    assert_same(found, expected.sites)


def test_only_the_demands_that_are_asked_for_are_measured_at_the_weights_as_they_are(
    loaded: LoadedModel, demands: list[Demand]
) -> None:
    editable = editable_of(loaded)
    before = measured(editable, demands, FIRST)
    generator = torch.Generator().manual_seed(0)
    with editable.restored_on_error():
        noise = [0.02 * torch.randn(delta.shape, generator=generator) for delta in editable.deltas]
        editable.apply(noise)
        now = measured(editable, demands, FIRST)
        found = KeptGradients(before, own=True).constraints(
            editable, demands, replace(now.at), (1,), batch_tokens=TOKENS
        )
    editable.restore()
    anew = torch.tensor([index == 1 for index, _ in now.at.points])
    for site, old, new in zip(found, before.sites, now.sites, strict=True):
        torch.testing.assert_close(site.gradients[anew], new.gradients[anew], atol=1e-5, rtol=1e-4)
        assert torch.equal(site.gradients[~anew], old.gradients[~anew])
    assert any(
        not torch.allclose(old.gradients, new.gradients) for old, new in zip(before.sites, now.sites, strict=True)
    )


def test_gradients_serve_a_few_rounds_and_only_if_they_are_each_points_own(
    loaded: LoadedModel, demands: list[Demand]
) -> None:
    editable = editable_of(loaded)
    found = measured(editable, demands, FIRST)
    assert not KeptGradients().serve
    assert not KeptGradients(found, own=False).serve
    kept = KeptGradients(found, own=True)
    for _ in range(ROUNDS):
        assert kept.serve
        kept.constraints(editable, demands, replace(found.at), (), batch_tokens=TOKENS)
    assert not kept.serve


def test_rounds_take_no_gradients_while_all_texts_hold(
    loaded: LoadedModel, demands: list[Demand], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = {"with": 0, "without": 0}

    def with_gradients(*given: object, **more: object) -> Linearisation:
        looks["with"] += 1
        return linearise(*given, **more)  # type: ignore[arg-type]

    def without(*given: object, **more: object) -> object:
        looks["without"] += 1
        return gaps_at(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(memscrub.edit.joint, "linearise", with_gradients)
    monkeypatch.setattr(memscrub.edit.joint, "gaps_at", without)
    monkeypatch.setattr(memscrub.edit.joint, "EASY", -1.0)  # the schedule goes on when all texts hold
    editable = editable_of(loaded)
    edit = JointEdit(editable, measure_disturbance(loaded, editable.sites, [RETAIN], seed=0), EditSettings(0.3, 14, 64))
    edit.demand(demands)
    assert edit.run().unmet == ()
    editable.restore()
    assert looks["without"] >= 1
    assert looks["with"] >= 3
