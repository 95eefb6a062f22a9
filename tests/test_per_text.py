"""The per-text solver on tiny models that know texts by heart: the closed form, its modes, baselines, ensemble."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import permutations
from pathlib import Path

import pytest
import torch
from models import (
    FAMILIES,
    VOCABULARY,
    changed,
    opened,
    ordinary_rows,
    random_text,
    snapshot,
    tiny_checkpoint,
    token_text,
)
from torch import Tensor

import memscrub.edit.per_text
from memscrub.bench.baselines import ablate
from memscrub.edit.breakpoints import Demand
from memscrub.edit.disturbance import measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.ensemble import choose_mode, predicted_disturbance, with_shorter_prefix
from memscrub.edit.locate import Locator
from memscrub.edit.modes import Baseline, Mode, available_modes, fixed_distractor
from memscrub.edit.output_vectors import least_change, live_vectors, outbid
from memscrub.edit.per_text import PerTextOutcome, PerTextSettings, edit_text, edit_texts, measured, suffix_begin
from memscrub.errors import NumericalError, UsageError
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of
from memscrub.models.tokens import TokenText

TEXTS = tuple(random_text(seed, 30) for seed in range(3))
PREFIX = 8
# A marker the word-level tokenizer has a word for; logits of tiny models need a wide margin.
SETTINGS = PerTextSettings(neurons=6, rank=20, margin=2.0, prefix_tokens=PREFIX, marker="w07")
BREAKS = replace(SETTINGS, positions="breaks", allowed_run=4, passes=6)


@pytest.fixture(scope="module", params=FAMILIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_checkpoint(folder, request.param, seed=1, texts=TEXTS, steps=80)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("small"), "llama", seed=1, texts=TEXTS, steps=80)


def loaded_with_eos(path: Path) -> LoadedModel:
    loaded = opened(path)
    loaded.tokenizer.eos_token = "<unused>"
    return loaded


def editable_of(loaded: LoadedModel, stored: torch.dtype = torch.float32) -> EditableModel:
    sites = sites_of(loaded)  # attention, too: it must stay as it is
    return EditableModel(loaded, sites, {site.name: stored for site in sites})


def texts_of(loaded: LoadedModel) -> list[TokenText]:
    return [token_text(loaded, text) for text in TEXTS]


def emitted(loaded: LoadedModel, text: TokenText) -> bool:
    """Does greedy decoding, token by token, say the whole suffix?"""
    tokens = list(text.tokens[: suffix_begin(text, SETTINGS)])
    while len(tokens) < len(text.tokens):
        with torch.no_grad():
            tokens.append(int(loaded.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens) == text.tokens


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the closed form ------------------------------------------------------------------------------------------


def test_the_closed_form_solves_the_constrained_minimum() -> None:
    vectors, direction, wanted = random(12, 5).double(), random(12, seed=1).double(), random(5, seed=2).double()
    found = least_change(vectors, direction, wanted)
    # The conditions of Karush, Kuhn and Tucker as one linear system in (v', multiplier).
    system = torch.zeros(13, 13, dtype=torch.double)
    system[:12, :12] = 2 * torch.eye(12)
    system[:12, 12] = system[12, :12] = direction
    solved = torch.linalg.solve(system, torch.cat([2 * vectors, wanted[None]]))[:12]
    torch.testing.assert_close(found, solved)
    assert int(torch.linalg.matrix_rank(found - vectors)) == 1


def test_the_closed_form_is_what_a_general_minimiser_finds() -> None:
    vector, direction = random(12).double(), random(12, seed=1).double()
    unknown, multiplier = vector.clone().requires_grad_(), 0.0
    for _ in range(60):  # the augmented Lagrangian, each round by L-BFGS
        multiplier += 10 * _minimise(unknown, vector, direction, multiplier)
    found = least_change(vector[:, None], direction, torch.tensor([2.5]).double())[:, 0]
    torch.testing.assert_close(found, unknown.detach(), atol=1e-5, rtol=1e-5)


def _minimise(unknown: Tensor, vector: Tensor, direction: Tensor, multiplier: float) -> float:
    """Minimise |v' - v|^2 with the constraint u·v' = 2.5 as a penalty; returns how far it is missed."""
    optimizer = torch.optim.LBFGS([unknown], max_iter=50, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        miss = direction @ unknown - 2.5
        loss = (unknown - vector).square().sum() + multiplier * miss + 5 * miss.square()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    return float(direction @ unknown.detach() - 2.5)


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_the_rival_outbids_the_target_in_what_each_neuron_writes(margin: float) -> None:
    vectors, target, rival = random(12, 40).double(), random(12, seed=1).double(), random(12, seed=2).double()
    activations = random(40, seed=3).double()
    new = outbid(vectors, activations, target, rival, margin)
    said, demanded = activations * (rival @ new), activations * (target @ vectors) + activations.abs() * margin
    assert bool((said >= demanded - 1e-9).all())
    satisfied = activations * (rival @ vectors) >= demanded
    assert bool(satisfied.any()) and not bool(satisfied.all())
    assert torch.equal(new[:, satisfied], vectors[:, satisfied])
    torch.testing.assert_close(said[~satisfied], demanded[~satisfied])
    # No further than necessary: only along the rival's direction.
    moved = (new - vectors)[:, ~satisfied]
    torch.testing.assert_close(moved, rival[:, None] * (rival @ moved) / rival.square().sum())


def test_suppressing_takes_the_margin_from_the_target_along_its_own_direction() -> None:
    vectors, target, activations = random(12, 9).double(), random(12, seed=1).double(), random(9, seed=3).double()
    moved = outbid(vectors, activations, target, None, 0.7) - vectors
    torch.testing.assert_close(activations * (target @ moved), -0.7 * activations.abs())
    assert int(torch.linalg.matrix_rank(torch.cat([moved, target[:, None]], dim=1))) == 1


def test_a_silent_neuron_stays_and_a_token_without_a_direction_is_an_error() -> None:
    vectors, direction = random(12, 3), random(12, seed=1)
    for rival in (None, random(12, seed=2)):
        torch.testing.assert_close(outbid(vectors, torch.zeros(3), direction, rival, 1.0), vectors)
    with pytest.raises(NumericalError, match="zero"):
        least_change(vectors, torch.zeros(12), torch.ones(3))


# -- one text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(Mode))
def test_every_mode_breaks_a_memorized_suffix(path: Path, mode: Mode) -> None:
    loaded = loaded_with_eos(path)
    before, editable = snapshot(loaded), editable_of(loaded)
    for text in texts_of(loaded):
        assert emitted(loaded, text)
        outcome = edit_text(editable, text, mode, SETTINGS)
        assert outcome.broken and outcome.holds(SETTINGS)
        assert not emitted(loaded, text)
        assert [place.token for place in outcome.breaks] == [suffix_begin(text, SETTINGS)]
        editable.restore()
        assert changed(loaded, before) == set()


def test_only_the_located_output_vectors_change(path: Path) -> None:
    loaded = opened(path)
    before, editable = snapshot(loaded), editable_of(loaded)
    outcome = edit_text(editable, texts_of(loaded)[0], Mode.NEXT_BEST, SETTINGS)
    located = {(neuron.site, neuron.column) for place in outcome.breaks for neuron in place.neurons}
    assert len(located) == SETTINGS.neurons
    found = set()
    for index, site in enumerate(editable.sites):
        found |= {(index, int(column)) for column in editable.change(site).any(0).nonzero()[:, 0]}
    assert found == located
    assert {editable.sites[index].kind for index, _ in found} == {"mlp"}
    assert changed(loaded, before) == {editable.sites[index].tensor for index, _ in found}


def test_the_mode_decides_which_token_the_model_says_instead(path: Path) -> None:
    loaded = loaded_with_eos(path)
    last = sites_of(loaded, kinds=("mlp",))[-1]  # nothing behind it reads what it writes
    editable, text = EditableModel(loaded, (last,), {last.name: torch.float32}), texts_of(loaded)[1]
    begin = suffix_begin(text, SETTINGS)
    strong = replace(SETTINGS, neurons=20, rank=VOCABULARY, margin=6.0)
    for mode, token in ((Mode.EOS, VOCABULARY - 1), (Mode.REDACT, 7)):
        edit_text(editable, text, mode, strong)
        with torch.no_grad():
            assert int(loaded.logits(torch.tensor([text.tokens]))[0, begin - 1].argmax()) == token
        editable.restore()


def test_breaks_leave_no_run_over_the_limit_whatever_is_typed(path: Path) -> None:
    loaded = opened(path)
    editable, text = editable_of(loaded), texts_of(loaded)[0]
    once = edit_text(editable, text, Mode.NEXT_BEST, SETTINGS)
    editable.restore()
    outcome = edit_text(editable, text, Mode.NEXT_BEST, BREAKS)
    assert outcome.holds(BREAKS) and outcome.longest_run <= 4 < once.longest_run
    assert len(outcome.breaks) > 1
    assert all(place.token >= suffix_begin(text, BREAKS) for place in outcome.breaks)
    again = edit_text(editable, text, Mode.NEXT_BEST, BREAKS)
    assert again.breaks == ()  # nothing is left to do


def test_a_later_edit_stands_on_an_earlier_one(small: Path) -> None:
    loaded = opened(small)
    before, editable = snapshot(loaded), editable_of(loaded)
    first, second, _ = texts_of(loaded)
    gentle = replace(SETTINGS, margin=1.0)
    locator = Locator(loaded, editable.sites, gentle.rank)
    edit_text(editable, first, Mode.NEXT_BEST, gentle, locator)
    assert not emitted(loaded, first) and emitted(loaded, second)
    edit_text(editable, second, Mode.NEXT_BEST, gentle, locator)
    assert not emitted(loaded, first) and not emitted(loaded, second)
    with_shared = snapshot(loaded)
    editable.restore()
    for text in (first, second):  # without a shared locator the same weights come out
        edit_text(editable, text, Mode.NEXT_BEST, gentle)
    assert changed(loaded, with_shared) == set()
    editable.restore()
    assert changed(loaded, before) == set()


def test_the_edit_is_rounded_as_it_will_be_stored(small: Path) -> None:
    loaded = opened(small)
    for site in sites_of(loaded):
        loaded.parameter(site).copy_(loaded.parameter(site).to(torch.bfloat16))
    before, editable = snapshot(loaded), editable_of(loaded, torch.bfloat16)
    assert edit_text(editable, texts_of(loaded)[0], Mode.NEXT_BEST, SETTINGS).broken
    for site in editable.sites:
        assert torch.equal(loaded.parameter(site), loaded.parameter(site).to(torch.bfloat16).float())
    assert changed(loaded, before)
    editable.restore()
    assert changed(loaded, before) == set()


def test_a_text_that_does_not_come_out_is_left_alone(small: Path) -> None:
    loaded = opened(small)
    before, editable = snapshot(loaded), editable_of(loaded)
    text = token_text(loaded, random_text(77, 30))
    outcome = edit_text(editable, text, Mode.NEXT_BEST, SETTINGS)
    assert outcome == PerTextOutcome(broken=True, longest_run=outcome.longest_run, breaks=())
    assert changed(loaded, before) == set()


def test_what_cannot_be_edited_is_refused(small: Path) -> None:
    loaded = opened(small)
    editable, text = editable_of(loaded), texts_of(loaded)[0]
    with pytest.raises(UsageError, match="'text' has 30 tokens"):
        edit_text(editable, text, Mode.NEXT_BEST, replace(SETTINGS, prefix_tokens=30))
    with pytest.raises(UsageError, match="'eos'"):
        edit_text(editable, text, Mode.EOS, SETTINGS)
    with pytest.raises(UsageError, match="marker"):
        edit_text(editable, text, Mode.REDACT, replace(SETTINGS, marker="[REDACTED]"))
    for wrong in ({"neurons": 0}, {"rank": 0}, {"passes": 0}, {"margin": -1.0}, {"margin": math.nan}):
        with pytest.raises(UsageError, match="at least"):
            replace(SETTINGS, **wrong)  # type: ignore[arg-type]


def test_an_edit_that_overflows_leaves_the_model_as_it_was(small: Path) -> None:
    loaded = opened(small)
    first, second, _ = texts_of(loaded)
    editable = editable_of(loaded, torch.float16)
    edit_text(editable, first, Mode.NEXT_BEST, replace(SETTINGS, margin=1.0))
    before = snapshot(loaded)
    with pytest.raises(NumericalError, match="not finite"):
        edit_text(editable, second, Mode.NEXT_BEST, replace(SETTINGS, margin=1e9))
    assert changed(loaded, before) == set()


def test_an_interrupt_leaves_the_model_as_it_was_and_no_hooks(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(small)
    before, editable = snapshot(loaded), editable_of(loaded)

    def interrupted(*anything: object) -> None:
        assert changed(loaded, before)
        raise KeyboardInterrupt

    monkeypatch.setattr(memscrub.edit.per_text, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit_text(editable, texts_of(loaded)[0], Mode.NEXT_BEST, SETTINGS)
    assert changed(loaded, before) == set()
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_no_repr_shows_what_was_edited(small: Path) -> None:
    loaded = opened(small)
    editable, text = editable_of(loaded), texts_of(loaded)[0]
    seen = Locator(loaded, editable.sites, 5).observe(text.tokens)
    assert repr(seen) == "Observation()"
    outcome = edit_text(editable, text, Mode.NEXT_BEST, SETTINGS)
    assert "tokens" not in repr(outcome)


# -- baselines ------------------------------------------------------------------------------------------------


def test_zeros_at_the_same_neurons_break_no_more_than_the_edit(path: Path) -> None:
    loaded = opened(path)
    editable = editable_of(loaded)
    edited, zeroed = 0, 0
    for text in texts_of(loaded):
        outcome = edit_text(editable, text, Mode.NEXT_BEST, SETTINGS)
        edited += outcome.broken
        editable.restore()
        ablated = ablate(editable, text, Baseline.ZERO, SETTINGS, seed=0)
        zeroed += ablated.broken
        assert ablated.breaks == outcome.breaks
        for neuron in ablated.breaks[0].neurons:
            assert not live_vectors(editable, neuron.site, [neuron.column]).any()
        editable.restore()
    assert zeroed <= edited == len(TEXTS)


def test_random_neurons_are_as_many_others_of_the_same_layers(small: Path) -> None:
    loaded = opened(small)
    editable = editable_of(loaded)
    outcome = ablate(editable, texts_of(loaded)[0], Baseline.RANDOM_NEURONS, SETTINGS, seed=3)
    located = [(neuron.site, neuron.column) for neuron in outcome.breaks[0].neurons]
    for index, site in enumerate(editable.sites):
        columns = editable.change(site).any(0).nonzero()[:, 0].tolist()
        assert len(columns) == sum(place == index for place, _ in located)
        assert not {(index, column) for column in columns} & set(located)
        assert not loaded.weight(site)[:, columns].any()


def test_random_directions_go_as_far_as_the_edit(small: Path) -> None:
    loaded = opened(small)
    editable, text = editable_of(loaded), texts_of(loaded)[0]
    edit_text(editable, text, Mode.NEXT_BEST, SETTINGS)
    edit = [editable.change(site) for site in editable.sites]
    editable.restore()
    ablate(editable, text, Baseline.RANDOM_DIRECTIONS, SETTINGS, seed=0)
    for site, intended in zip(editable.sites, edit, strict=True):
        turned = editable.change(site)
        torch.testing.assert_close(turned.norm(dim=0), intended.norm(dim=0), atol=1e-5, rtol=1e-4)
        alike = torch.nn.functional.cosine_similarity(turned, intended, dim=0)
        assert float(alike.abs().max()) < 0.9


@pytest.mark.parametrize("baseline", [Baseline.RANDOM_NEURONS, Baseline.RANDOM_DIRECTIONS])
def test_a_baseline_is_the_same_for_the_same_seed_only(small: Path, baseline: Baseline) -> None:
    weights = []
    for seed in (1, 1, 2):
        loaded = opened(small)
        editable = editable_of(loaded)
        ablate(editable, texts_of(loaded)[0], baseline, SETTINGS, seed=seed)
        weights.append(snapshot(loaded))
        editable.restore()
        assert changed(loaded, snapshot(opened(small))) == set()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


# -- the ensemble ---------------------------------------------------------------------------------------------


def contexts(loaded: LoadedModel, text: TokenText) -> list[TokenText]:
    return [with_shorter_prefix(loaded, text, SETTINGS, length) for length in (7, 6, 5)]


def test_a_context_is_the_suffix_behind_the_end_of_its_prefix(small: Path) -> None:
    loaded = opened(small)
    text = texts_of(loaded)[0]
    begin = suffix_begin(text, SETTINGS)
    context = with_shorter_prefix(loaded, text, SETTINGS, 3)
    assert context.tokens == loaded.prompt + text.tokens[begin - 3 :]
    assert with_shorter_prefix(loaded, text, SETTINGS, 99).tokens == text.tokens


def costs(by_mode: dict[Mode, float]) -> tuple[Callable[..., PerTextOutcome], Callable[[EditableModel], float]]:
    """An `edit_text` that remembers its mode, and a disturbance that is that mode's cost."""
    tried: list[Mode] = []

    def edit(editable: EditableModel, text: TokenText, mode: Mode, *rest: object) -> PerTextOutcome:
        tried.append(mode)
        return edit_text(editable, text, mode, *rest)  # type: ignore[arg-type]

    return edit, lambda editable: by_mode[tried[-1]]


def test_the_cheapest_mode_that_breaks_the_text_is_chosen_and_taken_back(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_with_eos(small)
    editable, text = editable_of(loaded), texts_of(loaded)[0]
    edit_text(editable, texts_of(loaded)[1], Mode.NEXT_BEST, SETTINGS)
    before = snapshot(loaded)
    price = {Mode.NEXT_BEST: 3.0, Mode.EOS: 2.0, Mode.REDACT: 1.0, Mode.SUPPRESS: 4.0}
    for cheapest in Mode:
        edit, disturbance = costs({**price, cheapest: 0.5})
        monkeypatch.setattr("memscrub.edit.ensemble.edit_text", edit)
        chosen = choose_mode(
            editable, text, SETTINGS, chosen_on=contexts(loaded, text)[:1], held_out=[], disturbance=disturbance
        )
        assert chosen is cheapest
        assert changed(loaded, before) == set()


def test_only_a_mode_that_holds_in_contexts_not_chosen_on_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beginnings, ending = [random_text(seed, 12) for seed in (20, 21)], random_text(22, 16)
    pair = tuple(f"{beginning} {ending}" for beginning in beginnings)
    loaded = loaded_with_eos(tiny_checkpoint(tmp_path, "gpt_neox", seed=1, texts=pair, steps=80))
    editable = editable_of(loaded)
    text, other = (token_text(loaded, whole) for whole in pair)
    assert text.tokens[13:] == other.tokens[13:]

    def behaviour(settings: PerTextSettings, mode: Mode) -> tuple[bool, bool]:
        """Does the edit of the text break it, and does it break the same suffix behind the other beginning?"""
        own = edit_text(editable, text, mode, settings).broken
        elsewhere = measured(loaded, other, 13, ()).broken
        editable.restore()
        return own, elsewhere

    # Settings under which one mode's edit does not carry over to the other beginning, and another's does.
    grid = [replace(SETTINGS, prefix_tokens=12, neurons=n, margin=m) for m in (1.0, 1.5, 2.5) for n in (4, 2, 8, 1)]
    settings, leaky, sound = next(
        (settings, leaky, sound)
        for settings in grid
        for leaky, sound in permutations(Mode, 2)
        if behaviour(settings, leaky) == (True, False) and behaviour(settings, sound) == (True, True)
    )
    edit, disturbance = costs({leaky: 1.0, sound: 2.0})
    monkeypatch.setattr("memscrub.edit.ensemble.edit_text", edit)
    choose = partial(choose_mode, editable, text, settings, disturbance=disturbance)
    assert choose(held_out=[], modes=(leaky, sound)) is leaky
    assert choose(held_out=[other], modes=(leaky, sound)) is sound
    assert choose(held_out=[other], modes=(leaky,)) is None
    assert choose(chosen_on=[other], held_out=[], modes=(leaky, sound)) is sound
    assert choose(held_out=[other], modes=()) is None


def test_a_mode_that_does_not_break_the_text_is_not_chosen(small: Path) -> None:
    loaded = opened(small)
    editable, text = editable_of(loaded), texts_of(loaded)[0]
    feeble = replace(SETTINGS, neurons=1, margin=0.0)
    assert not edit_text(editable, text, Mode.SUPPRESS, feeble).broken
    editable.restore()
    found = choose_mode(editable, text, feeble, held_out=[], disturbance=lambda editable: 0.0, modes=(Mode.SUPPRESS,))
    assert found is None


def test_a_disturbance_that_is_not_a_number_is_an_error_and_the_weights_come_back(small: Path) -> None:
    loaded = opened(small)
    before, editable = snapshot(loaded), editable_of(loaded)
    with pytest.raises(NumericalError):
        choose_mode(editable, texts_of(loaded)[0], SETTINGS, held_out=[], disturbance=lambda editable: math.nan)
    assert changed(loaded, before) == set()


def test_a_context_of_another_text_is_refused(small: Path) -> None:
    loaded = opened(small)
    first, second, _ = texts_of(loaded)
    with pytest.raises(UsageError, match="does not end with its suffix"):
        choose_mode(editable_of(loaded), first, SETTINGS, held_out=[second], disturbance=lambda editable: 0.0)


def test_the_predicted_disturbance_is_that_of_the_edit(small: Path) -> None:
    loaded = opened(small)
    editable = editable_of(loaded)
    metrics = measure_disturbance(loaded, editable.sites, [ordinary_rows(1, rows=8, width=24)], seed=0)
    predict = predicted_disturbance(metrics)
    assert predict(editable) == 0.0
    edit_text(editable, texts_of(loaded)[0], Mode.NEXT_BEST, SETTINGS)
    expected = 0.0
    for metric, delta in zip(metrics, editable.deltas, strict=True):
        c, f = metric.inputs @ metric.inputs.T, metric.outputs @ metric.outputs.T
        expected += 0.5 * float((f @ delta @ c @ delta.T).trace())
    assert predict(editable) == pytest.approx(expected, rel=1e-3)
    assert expected > 0


def test_modes_without_their_tokens_are_not_available(small: Path) -> None:
    loaded = opened(small)
    assert available_modes(loaded.tokenizer, "w07") == (Mode.NEXT_BEST, Mode.REDACT, Mode.SUPPRESS)
    assert available_modes(loaded.tokenizer) == (Mode.NEXT_BEST, Mode.SUPPRESS)
    assert fixed_distractor(loaded.tokenizer, Mode.REDACT, "w07 w08") == 7
    assert fixed_distractor(loaded.tokenizer, Mode.SUPPRESS) is None
    loaded.tokenizer.eos_token = "<unused>"
    assert available_modes(loaded.tokenizer, "w07") == tuple(Mode)


# -- many texts -----------------------------------------------------------------------------------------------


def test_many_texts_are_edited_one_after_the_other_until_every_demand_holds(path: Path) -> None:
    loaded = opened(path)
    before, editable = snapshot(loaded), editable_of(loaded)
    texts = texts_of(loaded)
    demands = [Demand(text.tokens, text.first_judged(2), allowed_run=5) for text in texts]
    demands.append(Demand(texts[0].tokens, 1, spans=((10, 14, None),)))
    told: list[tuple[int, int]] = []
    modes = (Mode.NEXT_BEST, Mode.SUPPRESS, Mode.NEXT_BEST, Mode.NEXT_BEST)
    outcome = edit_texts(
        editable, demands, modes, replace(SETTINGS, margin=1.0, passes=8), lambda *step: told.append(step)
    )
    assert told[0] == (0, 4)
    assert outcome.unmet == () and outcome.passes == told[-1][0] >= 1
    assert outcome.breaks >= 3
    assert memscrub.edit.per_text.unmet_demands(loaded, demands, 64) == ()
    assert {site.kind for site in editable.sites if editable.change(site).any()} == {"mlp"}
    editable.restore()
    assert changed(loaded, before) == set()


def test_what_still_stands_is_told_and_the_best_state_is_kept(small: Path) -> None:
    loaded = opened(small)
    editable = editable_of(loaded)
    demands = [Demand(text.tokens, text.first_judged(2), allowed_run=5) for text in texts_of(loaded)]
    told: list[int] = []
    feeble = replace(SETTINGS, neurons=2, margin=0.05, passes=3)
    outcome = edit_texts(editable, demands, [Mode.SUPPRESS] * 3, feeble, lambda number, unmet: told.append(unmet))
    assert len(told) == 4 and len(outcome.unmet) == min(told) > 0
    assert memscrub.edit.per_text.unmet_demands(loaded, demands, 64) == outcome.unmet


def test_demands_that_hold_change_nothing_and_modes_are_checked_first(small: Path) -> None:
    loaded = opened(small)
    before, editable = snapshot(loaded), editable_of(loaded)
    text = token_text(loaded, random_text(78, 30))
    outcome = edit_texts(editable, [Demand(text.tokens, 9, allowed_run=20)], [Mode.NEXT_BEST], SETTINGS)
    assert (outcome.unmet, outcome.breaks) == ((), 0)
    with pytest.raises(UsageError, match="'eos'"):
        edit_texts(editable, [Demand(text.tokens, 9, allowed_run=20)], [Mode.EOS], SETTINGS)
    with pytest.raises(ValueError, match="zip"):
        edit_texts(editable, [Demand(text.tokens, 9, allowed_run=20)], [], SETTINGS)
    assert changed(loaded, before) == set()
