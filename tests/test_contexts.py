"""Texts in other places: what moves with them, and that an edit made for these places holds there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import changed, opened, ordinary_rows, random_text, snapshot, tiny_checkpoint, token_text

from memscrub.edit.breakpoints import Demand, violations
from memscrub.edit.contexts import BEFORE, PERTURBED, PERTURBED_AMONG, Context, in_context, kinds, shifted
from memscrub.edit.disturbance import measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.joint import EditSettings, JointEdit
from memscrub.edit.linearise import states_of
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of
from memscrub.models.tokens import TokenText

TEXTS = tuple(random_text(seed, 34) for seed in range(2))
ORDINARY = ordinary_rows(1, rows=24, width=BEFORE)
KINDS: tuple[Context, ...] = ("unrelated", "follows", "perturbed")
ALLOWED = 5


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("contexts"), "llama", seed=2, texts=TEXTS, steps=80)


def own(loaded: LoadedModel, text: str) -> tuple[TokenText, Demand]:
    tokens = token_text(loaded, text)
    return tokens, Demand(tokens.tokens, tokens.first_judged(1), ALLOWED, spans=((30, 33, None),))


@pytest.mark.parametrize("kind", ["unrelated", "follows"])
def test_behind_other_text_the_text_and_what_is_judged_of_it_stay_the_same(kind: Context, path: Path) -> None:
    loaded = opened(path)
    text, demand = own(loaded, TEXTS[0])
    moved = in_context(loaded, text, demand, kind, ORDINARY, seed=0)
    assert moved is not None
    body = text.tokens[text.start :]
    assert moved.tokens[-len(body) :] == body
    move = len(moved.tokens) - len(demand.tokens)
    assert move >= BEFORE
    assert moved.tokens[moved.first :] == demand.tokens[demand.first :]
    ((begin, end, _),) = moved.spans
    assert moved.tokens[begin:end] == demand.tokens[30:33]
    assert moved.tokens[: text.start] == text.tokens[: text.start]


def test_perturbed_tokens_come_first_and_are_not_judged(path: Path) -> None:
    loaded = opened(path)
    text, demand = own(loaded, TEXTS[0])
    moved = in_context(loaded, text, demand, "perturbed", ORDINARY, seed=0)
    assert moved is not None
    differ = [i for i, (a, b) in enumerate(zip(moved.tokens, demand.tokens, strict=True)) if a != b]
    assert 0 < len(differ) <= PERTURBED
    assert max(differ) < text.start + PERTURBED_AMONG <= moved.first


def test_a_context_depends_on_text_and_seed_only(path: Path) -> None:
    loaded = opened(path)
    text, demand = own(loaded, TEXTS[0])
    first = in_context(loaded, text, demand, "unrelated", ORDINARY, seed=0)
    assert first == in_context(loaded, text, demand, "unrelated", ORDINARY, seed=0)
    assert first != in_context(loaded, text, demand, "unrelated", ORDINARY, seed=1)
    assert first != in_context(loaded, replace(text, id="other"), demand, "unrelated", ORDINARY, seed=0)


def test_a_context_that_the_model_cannot_read_at_once_is_left_out(path: Path) -> None:
    loaded = opened(path)
    text, demand = own(loaded, TEXTS[0])
    short = replace(loaded, max_positions=len(text.tokens) + 10)
    assert in_context(short, text, demand, "unrelated", ORDINARY, seed=0) is None


def test_a_texts_own_start_is_no_further_context() -> None:
    assert kinds(("start",)) == ()
    assert kinds(("perturbed", "start", "unrelated")) == ("unrelated", "perturbed")


def test_moving_a_demand_moves_its_stretches() -> None:
    demand = Demand((9, 1, 2, 3, 4), 2, 1, spans=((3, 5, None),), judged=((2, 4),))
    moved = shifted(demand, (9, 7, 7), 1)
    assert moved.tokens == (9, 7, 7, 1, 2, 3, 4)
    assert (moved.first, moved.spans, moved.judged) == (4, ((5, 7, None),), ((4, 6),))


def test_an_edit_made_for_other_contexts_holds_in_them(path: Path) -> None:
    loaded = opened(path)
    before = snapshot(loaded)
    sites = sites_of(loaded, kinds=("mlp", "attention", "query"))
    edit = JointEdit(
        EditableModel(loaded, sites, {site.name: torch.float32 for site in sites}),
        measure_disturbance(loaded, sites, [ORDINARY], seed=0),
        EditSettings(margin=0.3, rounds=14, batch_tokens=200),
    )
    pairs = [own(loaded, text) for text in TEXTS]
    moved = [in_context(loaded, text, demand, kind, ORDINARY, seed=0) for text, demand in pairs for kind in KINDS]
    demands = [demand for _, demand in pairs] + [demand for demand in moved if demand is not None]
    assert len(demands) == 8
    assert (
        sum(bool(violations(d, s)) for d, s in zip(demands, states_of(loaded, demands, batch_tokens=200), strict=True))
        > 2
    )
    edit.demand(demands)
    assert edit.run().unmet == ()
    for demand, state in zip(demands, states_of(loaded, demands, batch_tokens=200), strict=True):
        assert violations(demand, state) == 0
    edit.editable.restore()
    assert changed(loaded, before) == set()
