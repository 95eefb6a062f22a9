"""The joint edit on tiny models that know texts by heart: the texts go, and nothing else is touched."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import (
    FAMILIES,
    changed,
    opened,
    ordinary_rows,
    random_text,
    snapshot,
    tiny_checkpoint,
    token_text,
)
from torch import Tensor

import memscrub.edit.linearise
from memscrub.edit.attention import top_heads
from memscrub.edit.breakpoints import Demand
from memscrub.edit.disturbance import Metric, measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.joint import EditOutcome, EditSettings, JointEdit
from memscrub.edit.modes import Mode, fixed_distractor
from memscrub.edit.solver import Linearised
from memscrub.errors import NumericalError
from memscrub.measures.extraction import NOISE, Sampling, longest_run, score
from memscrub.models.architecture import Orientation
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import head_count, sites_of
from memscrub.models.sites import Site
from memscrub.models.tokens import TokenText

TEXTS = tuple(random_text(seed, 30) for seed in range(3))
RETAIN = ordinary_rows(1, rows=24, width=24)
ALLOWED = 6
SETTINGS = EditSettings(margin=0.3, rounds=14, batch_tokens=64)


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_checkpoint(folder, request.param, seed=1, texts=TEXTS, steps=80)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("small"), "llama", seed=1, texts=TEXTS, steps=80)


def texts_of(loaded: LoadedModel) -> list[TokenText]:
    return [token_text(loaded, text) for text in TEXTS]


def longest(loaded: LoadedModel) -> list[int]:
    texts = texts_of(loaded)
    threshold = -NOISE[loaded.dtype]
    scores = score(loaded, texts, lambda text: Sampling())
    return [
        longest_run(each.gap, text.first_judged(1), threshold).length for text, each in zip(texts, scores, strict=True)
    ]


def joint(loaded: LoadedModel, sites: tuple[Site, ...], stored: torch.dtype = torch.float32) -> JointEdit:
    metrics = measure_disturbance(loaded, sites, [RETAIN], seed=0)
    editable = EditableModel(loaded, sites, {site.name: stored for site in sites})
    edit = JointEdit(editable, metrics, SETTINGS)
    edit.demand([Demand(text.tokens, text.first_judged(1), ALLOWED) for text in texts_of(loaded)])
    return edit


def edited(loaded: LoadedModel, sites: tuple[Site, ...]) -> tuple[JointEdit, EditOutcome]:
    edit = joint(loaded, sites)
    return edit, edit.run()


def test_texts_lose_every_run_over_the_limit_and_only_the_sites_change(path: Path) -> None:
    loaded = opened(path)
    before, sites = snapshot(loaded), sites_of(loaded)
    assert min(longest(loaded)) > 3 * ALLOWED
    edit, outcome = edited(loaded, sites)
    assert outcome.unmet == ()
    assert max(longest(loaded)) <= ALLOWED
    assert outcome.break_points >= len(TEXTS)
    assert changed(loaded, before) <= {site.tensor for site in sites}
    assert changed(loaded, before)
    edit.editable.restore()
    assert changed(loaded, before) == set()


def test_the_predicted_cost_is_that_of_the_whole_edit(small: Path) -> None:
    edit, outcome = edited(opened(small), sites_of(opened(small)))
    expected = 0.0
    for metric, delta in zip(edit.metrics, edit.editable.deltas, strict=True):
        expected += 0.5 * float((metric.outputs.T @ delta @ metric.inputs).square().sum())
    assert expected > 0
    assert outcome.cost == pytest.approx(expected, rel=1e-2)


def test_no_hook_is_left_while_an_error_is_handled(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(small)
    edit = joint(loaded, sites_of(loaded))

    def broken(*anything: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memscrub.edit.joint.extend", broken)
    with pytest.raises(KeyboardInterrupt):
        edit.run()
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_an_edit_costs_ordinary_text_less_than_the_same_without_the_metrics(path: Path) -> None:
    loaded = opened(path)
    with torch.no_grad():
        before = loaded.logits(RETAIN).log_softmax(-1)

    def kl() -> float:
        with torch.no_grad():
            after = loaded.logits(RETAIN).log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    sites = sites_of(loaded)
    edit, _ = edited(loaded, sites)
    ours = kl()
    edit.editable.restore()
    plain = joint(loaded, sites)
    plain.metrics = [Metric(torch.eye(len(m.inputs)), torch.eye(len(m.outputs))) for m in plain.metrics]
    plain.run()
    assert 0 < ours < kl()


def test_the_same_edit_twice_is_bit_for_bit_the_same(small: Path) -> None:
    weights = []
    for _ in range(2):
        loaded = opened(small)
        edited(loaded, sites_of(loaded))
        weights.append(snapshot(loaded))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_live_weights_are_what_comes_back_from_the_stored_precision(small: Path) -> None:
    loaded = opened(small)
    site = sites_of(loaded)[0]
    # As a checkpoint stored in bfloat16 and computed with in float32.
    for each in sites_of(loaded):
        parameter = loaded.parameter(each)
        parameter.copy_(parameter.to(torch.bfloat16))
    before = snapshot(loaded)
    edit = joint(loaded, sites_of(loaded), torch.bfloat16)
    assert edit.run().unmet == ()
    assert max(longest(loaded)) <= ALLOWED
    for each in edit.editable.sites:
        live = loaded.parameter(each)
        assert torch.equal(live, live.to(torch.bfloat16).float())
    assert torch.equal(edit.editable.change(site), loaded.weight(site) - before[site.tensor])
    edit.editable.restore()
    assert changed(loaded, before) == set()


def test_an_edit_that_overflows_the_stored_precision_is_refused(small: Path) -> None:
    loaded = opened(small)
    site = sites_of(loaded)[0]
    editable = EditableModel(loaded, (site,), {site.name: torch.float16})
    with pytest.raises(NumericalError, match="not finite"):
        editable.apply([torch.full_like(loaded.weight(site), 1e6)])
    editable.restore()


def test_only_the_columns_of_a_restricted_site_change(path: Path) -> None:
    loaded = opened(path)
    before = snapshot(loaded)
    whole = sites_of(loaded, kinds=("mlp",))[-1]
    site = replace(whole, columns=(1, 4, 9, 16))
    (metric,) = measure_disturbance(loaded, [site], [RETAIN], seed=0)
    editable = EditableModel(loaded, (site,), {site.name: torch.float32})
    edit = JointEdit(editable, [metric], replace(SETTINGS, rounds=2))
    edit.demand([Demand(text.tokens, text.first_judged(1), ALLOWED) for text in texts_of(loaded)])
    edit.run()
    assert list(edit.linearised((site,))[0][0].activations.shape)[1] == 4
    editable.apply([editable.deltas[0] + 0.0])
    assert changed(loaded, before) <= {site.tensor}
    touched = {int(column) for column in editable.change(site).any(0).nonzero()[:, 0]}
    assert touched <= {1, 4, 9, 16}


def test_a_later_run_goes_on_with_more_sites_and_more_texts(small: Path) -> None:
    loaded = opened(small)
    before = snapshot(loaded)
    first, later = sites_of(loaded, kinds=("mlp",)), sites_of(loaded, kinds=("attention",))
    texts = texts_of(loaded)
    edit = JointEdit(
        EditableModel(loaded, first, {site.name: torch.float32 for site in first}),
        measure_disturbance(loaded, first, [RETAIN], seed=0),
        SETTINGS,
    )
    edit.demand([Demand(texts[0].tokens, 2, ALLOWED)])
    edit.run()
    assert longest(loaded)[0] <= ALLOWED
    assert changed(loaded, before) <= {site.tensor for site in first}
    metrics = measure_disturbance(loaded, later, [RETAIN], seed=0)
    edit.add_sites(later, metrics, {site.name: torch.float32 for site in later})
    edit.demand([Demand(text.tokens, 2, ALLOWED) for text in texts[1:]])
    assert edit.run().unmet == ()
    assert max(longest(loaded)) <= ALLOWED
    edit.editable.restore()
    assert changed(loaded, before) == set()


def test_a_demand_that_already_holds_changes_nothing(small: Path) -> None:
    loaded = opened(small)
    before = snapshot(loaded)
    sites = sites_of(loaded)
    edit = JointEdit(
        EditableModel(loaded, sites, {site.name: torch.float32 for site in sites}),
        measure_disturbance(loaded, sites, [RETAIN], seed=0),
        SETTINGS,
    )
    edit.demand([Demand(texts_of(loaded)[0].tokens, 1, allowed_run=31)])
    outcome = edit.run()
    assert (outcome.unmet, outcome.break_points, outcome.cost) == ((), 0, 0.0)
    assert changed(loaded, before) == set()


def test_what_cannot_be_reached_is_reported_as_unmet(small: Path) -> None:
    loaded = opened(small)
    edit = joint(loaded, sites_of(loaded)[:1])
    edit.settings = replace(SETTINGS, rounds=0)
    assert edit.run().unmet == (0, 1, 2)


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_metrics_that_are_not_finite_are_an_error_and_the_weights_come_back(small: Path, where: str) -> None:
    loaded = opened(small)
    before = snapshot(loaded)
    edit = joint(loaded, sites_of(loaded))
    edit.run()
    broken = edit.metrics[1]
    getattr(broken, where)[3, 0] = math.nan
    edit.demand([Demand(random_tokens(loaded), 1, allowed_run=0)])
    edit.settings = replace(SETTINGS, rounds=20)
    with pytest.raises(NumericalError):
        edit.run()
    assert changed(loaded, before) == set()


def random_tokens(loaded: LoadedModel) -> tuple[int, ...]:
    """What the model says by itself: every token is emitted, so a demand for none must edit."""
    tokens = [*loaded.prompt, 3]
    for _ in range(10):
        with torch.no_grad():
            tokens.append(int(loaded.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens)


def test_gradients_that_are_not_finite_end_the_run_in_the_best_state_before_them(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = opened(small)
    before = snapshot(loaded)
    edit = joint(loaded, sites_of(loaded))
    real, calls = memscrub.edit.linearise._gaps, []

    def gaps(logits: Tensor, *rest: Tensor) -> Tensor:
        calls.append(1)
        return real(logits, *rest) * (math.nan if len(calls) > 6 else 1.0)

    monkeypatch.setattr(memscrub.edit.linearise, "_gaps", gaps)
    outcome = edit.run()
    assert len(calls) > 6
    assert outcome.diverged
    assert all(bool(torch.isfinite(value).all()) for value in snapshot(loaded).values())
    # What is live is the best state before the break-down, and its demands are told as they stand.
    assert outcome.unmet == tuple(i for i, run in enumerate(longest(loaded)) if run > ALLOWED)
    edit.editable.restore()
    assert changed(loaded, before) == set()


def test_the_weights_come_back_when_the_user_interrupts(small: Path) -> None:
    loaded = opened(small)
    before = snapshot(loaded)
    edit = joint(loaded, sites_of(loaded))

    def interrupt(number: int, unmet: int) -> None:
        if number == 2:
            assert changed(loaded, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit.run(interrupt)
    assert changed(loaded, before) == set()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_of_a_fused_projection_only_the_queries_change(family: str, tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, family, seed=1, texts=TEXTS, steps=80))
    before = snapshot(loaded)
    sites = sites_of(loaded, kinds=("mlp", "attention", "query"))
    edit, outcome = edited(loaded, sites)
    assert outcome.unmet == ()
    queries = [site for site in sites if site.kind == "query"]
    assert any(bool(edit.editable.change(site).any()) for site in queries)
    for site in queries:
        rows = {int(row) for row in edit.editable.change(site).any(1).nonzero()[:, 0]}
        allowed = set(range(32)) if site.rows is None else set(site.rows)
        assert len(allowed) == 32
        assert rows <= allowed
    assert changed(loaded, before) <= {site.tensor for site in sites}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_rows_of_the_queries_move_no_key_and_no_value(family: str, tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, family, seed=1))
    site = sites_of(loaded, kinds=("query",))[0]
    module, ids = loaded.model.get_submodule(site.name), torch.tensor([[3, 4, 5, 6]])
    heads = head_count(loaded)

    def parts() -> tuple[Tensor, Tensor, Tensor]:
        seen: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, i, output: seen.append(output.detach().clone()))
        with torch.no_grad():
            loaded.logits(ids)
        handle.remove()
        if family == "gpt2":
            return tuple(seen[0].split(32, dim=-1))  # type: ignore[return-value]
        return tuple(seen[0].view(1, 4, heads, 3, -1).unbind(3))  # type: ignore[return-value]

    was = parts()
    change = torch.randn(32, loaded.weight(site).shape[1], generator=torch.Generator().manual_seed(0))
    loaded.weight(site).add_(site.whole(change, loaded.weight(site)))
    now = parts()
    assert not torch.equal(was[0], now[0])
    assert torch.equal(was[1], now[1])
    assert torch.equal(was[2], now[2])


@pytest.mark.parametrize("mode", list(Mode))
def test_every_mode_takes_the_texts_out(mode: Mode, small: Path) -> None:
    loaded = opened(small)
    # The tiny tokenizer has no end token; any token that the texts do not hold can stand for one.
    rival = fixed_distractor(loaded.tokenizer, mode, "w00") if mode is not Mode.EOS else 60
    edit = joint(loaded, sites_of(loaded, kinds=("mlp", "attention", "query")))
    for index, demand in enumerate(list(edit.demands)):
        edit.replace(index, replace(demand, mode=mode, rival=rival))
    assert edit.run().unmet == ()
    assert max(longest(loaded)) <= ALLOWED
    if rival is None:
        return
    loud = [
        int(loaded.logits(torch.tensor([demand.tokens]))[0, token - 1].argmax()) == rival
        for demand, held in zip(edit.demands, edit.held, strict=True)
        for token in held
        if demand.tokens[token] != rival
    ]
    assert sum(loud) > len(loud) / 2


# -- attention heads -----------------------------------------------------------------------------------------


def test_top_heads_are_the_columns_of_the_heads_that_raise_the_gaps_most(path: Path) -> None:
    loaded = opened(path)
    sites = sites_of(loaded, kinds=("attention",))
    heads = head_count(loaded)
    size = loaded.weight(sites[0]).shape[1] // heads
    generator = torch.Generator().manual_seed(0)
    weight = loaded.weight(sites[0])
    linear = []
    for site in sites:
        gradients = torch.randn(3, len(loaded.weight(site)), generator=generator)
        # Activations along the gradient's image raise the gap; the second site's third head raises it most.
        activations = (gradients @ loaded.weight(site)) * 1e-3
        linear.append(Linearised(activations, gradients))
    linear[1].activations[:, 2 * size : 3 * size] *= 1e4
    linear[0].activations[:, 0 * size : 1 * size] *= 1e3
    # Large, but against the gap: never chosen.
    linear[0].activations[:, 3 * size : 4 * size] *= -1e5
    assert weight.shape == (32, heads * size)
    (one,) = top_heads(loaded, sites, linear, share=1 / 8)
    assert one == replace(sites[1], columns=tuple(range(2 * size, 3 * size)))
    first, second = top_heads(loaded, sites, linear, share=2 / 8)
    assert first == replace(sites[0], columns=tuple(range(size)))
    assert second == one
    everything = top_heads(loaded, sites, linear, share=1.0)
    assert [site.columns for site in everything] == [tuple(range(heads * size))] * 2


def test_gpt2_stores_output_vectors_as_rows_even_where_the_matrix_is_square(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "gpt2", seed=1))
    site = sites_of(loaded, kinds=("mlp",))[0]
    assert site.orientation is Orientation.ROWS
    assert loaded.parameter(site).shape[0] == loaded.parameter(site).shape[1]
    assert torch.equal(loaded.weight(site), loaded.parameter(site).T)
