"""Texts in other places: what moves with them, and that an edit made for these places holds there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import changed, opened, ordinary_rows, random_text, snapshot, tiny_checkpoint, token_text

from memscrub.edit.breakpoints import Demand, violations
from memscrub.edit.calibration import LEAST, MOST, price_factors
from memscrub.edit.contexts import BEFORE, PERTURBED, PERTURBED_AMONG, Context, in_context, kinds, shifted
from memscrub.edit.disturbance import measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.joint import EditSettings, JointEdit
from memscrub.edit.linearise import states_of
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of
from memscrub.models.tokens import TokenText
from memscrub.models.trace import by_module

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


# -- measured prices -----------------------------------------------------------------------------------------


def test_price_factors_are_measured_over_predicted_for_each_site_alone(path: Path) -> None:
    loaded = opened(path)
    before = snapshot(loaded)
    sites = sites_of(loaded)
    metrics = measure_disturbance(loaded, sites, [ORDINARY], seed=0)
    editable = EditableModel(loaded, sites, {site.name: torch.float32 for site in sites})
    generator = torch.Generator().manual_seed(3)
    deltas = [0.02 * torch.randn(loaded.weight(site).shape, generator=generator) for site in sites]
    deltas[1].zero_()
    editable.apply(deltas)
    factors = price_factors(editable, metrics, ORDINARY)
    assert factors[1] == 1.0
    editable.restore()
    for index in (0, 2, 3):
        editable.apply([delta if number == index else torch.zeros_like(delta) for number, delta in enumerate(deltas)])
        with torch.no_grad():
            after = loaded.logits(ORDINARY)[:, :-1].log_softmax(-1)
            editable.restore()
            original = loaded.logits(ORDINARY)[:, :-1].log_softmax(-1)
        kl = float((original.exp() * (original - after)).sum(-1).mean())
        expected = min(max(kl / metrics[index].price(deltas[index]), LEAST), MOST)
        assert factors[index] == pytest.approx(expected, rel=1e-2)
    assert changed(loaded, before) == set()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_price_factors_are_to_the_bit_those_of_whole_passes_and_cost_half_of_them(family: str, tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path / "checkpoint", family, seed=4, layers=4))
    rows = ORDINARY[:6]
    sites = sites_of(loaded, kinds=("mlp", "attention", "query"))
    metrics = measure_disturbance(loaded, sites, [rows], seed=0)
    editable = EditableModel(loaded, sites, {site.name: torch.float32 for site in sites})
    generator = torch.Generator().manual_seed(5)
    deltas = [0.02 * torch.randn(loaded.weight(site).shape, generator=generator) for site in sites]
    deltas = [site.whole(site.part(delta), delta) for site, delta in zip(sites, deltas, strict=True)]
    modules = by_module(sites)

    def of_whole_passes(indices: list[int]) -> float:
        editable.restore()
        with torch.inference_mode():
            before = loaded.logits(rows)[:, :-1].log_softmax(-1)
            editable.apply([d if n in indices else torch.zeros_like(d) for n, d in enumerate(deltas)])
            after = loaded.logits(rows)[:, :-1].log_softmax(-1)
            moved = float((before.exp() * (before - after)).sum()) / rows[:, 1:].numel()
        return min(max(moved / sum(editable.price(n, metrics[n]) for n in indices), LEAST), MOST)

    expected = {n: of_whole_passes(indices) for indices in modules.values() for n in indices}
    editable.apply(deltas)
    run: list[str] = []
    for name in modules:
        loaded.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: run.append(name))
    assert price_factors(editable, metrics, rows) == [expected[n] for n in range(len(sites))]
    each = len(modules) // 4  # modules of a block: once for the original, then for every module at or below their block
    assert len(run) == each * 4 + each * each * (4 + 3 + 2 + 1)
