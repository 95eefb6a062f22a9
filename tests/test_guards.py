"""What an edit does to ordinary text beyond its price: shares of the KL by site, and predictions that are guarded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import FAMILIES, changed, hooks, opened, ordinary_rows, random_text, snapshot, tiny_checkpoint, token_text
from torch import Tensor

from memscrub.edit.breakpoints import Demand, violations
from memscrub.edit.calibration import LEAST, MOST, price_factors, shares_of_kl
from memscrub.edit.disturbance import Metric, measure_disturbance
from memscrub.edit.editable import EditableModel
from memscrub.edit.guards import ALLOWED, AT_A_TIME, CONTEXT, HEAVY, YIELD, Guard, find_guards, standing
from memscrub.edit.joint import EditSettings, JointEdit
from memscrub.edit.linearise import states_of
from memscrub.edit.ordinary import Ordinary
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import sites_of
from memscrub.models.trace import traced

ORDINARY = ordinary_rows(1, rows=12, width=30)
SHARED = random_text(40, 8)
# Both texts hold the same eight words; one is protected and the other is not.
PROTECTED, ALIKE = f"{random_text(41, 14)} {SHARED} {random_text(42, 8)}", f"{random_text(43, 14)} {SHARED}"
KINDS = ("mlp", "attention", "query")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = (PROTECTED, f"{ALIKE} {random_text(44, 8)}")
    return tiny_checkpoint(tmp_path_factory.mktemp("guards"), "llama", seed=3, texts=texts, steps=100)


def editable(loaded: LoadedModel) -> EditableModel:
    sites = sites_of(loaded, kinds=KINDS)
    return EditableModel(loaded, sites, {site.name: torch.float32 for site in sites})


def pushed(loaded: LoadedModel, size: float, seed: int = 3) -> tuple[EditableModel, list[Tensor]]:
    """A model with a random edit of its editable parts, and that edit."""
    made = editable(loaded)
    generator = torch.Generator().manual_seed(seed)
    deltas = [size * torch.randn(loaded.weight(site).shape, generator=generator) for site in made.sites]
    deltas = [site.whole(site.part(delta), delta) for site, delta in zip(made.sites, deltas, strict=True)]
    made.apply(deltas)
    return made, deltas


def kl(loaded: LoadedModel, original: Tensor, rows: Tensor) -> Tensor:
    """The KL of every prediction, from the original's log-probabilities."""
    with torch.no_grad():
        return (original.exp() * (original - loaded.logits(rows).log_softmax(-1))).sum(-1)


def log_p(loaded: LoadedModel, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return loaded.logits(rows).log_softmax(-1)


# -- shares of the KL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sites_share_is_half_of_what_the_kl_loses_as_its_part_shrinks(family: str, tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path / "checkpoint", family, seed=4))
    original = log_p(loaded, ORDINARY)
    made, deltas = pushed(loaded, 0.02)
    shares = shares_of_kl(Ordinary(made), ORDINARY, batch_tokens=100)
    step = 0.05
    for index in range(len(deltas)):
        around = []
        for scale in (1 - step, 1 + step):
            made.apply([scale * delta if n == index else delta for n, delta in enumerate(deltas)])
            around.append(float(kl(loaded, original, ORDINARY).double().mean()))
        slope = (around[1] - around[0]) / (2 * step)
        assert shares[index] == pytest.approx(slope / 2, rel=0.03, abs=2e-3 * sum(map(abs, shares)))


def test_the_shares_of_a_small_edit_add_up_to_its_kl_and_their_parts_alone_do_not(path: Path) -> None:
    loaded = opened(path)
    before, original = snapshot(loaded), log_p(loaded, ORDINARY)
    made = editable(loaded)
    # Every site writes the same to every token, as far as its mean activation tells: what they do adds up.
    with traced(loaded, made.sites) as trace:
        loaded.logits(ORDINARY)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    deltas = []
    for site, seen in zip(made.sites, trace.activations, strict=True):
        mean = seen.detach().flatten(0, 1).mean(0)
        write = 0.03 * direction[:, None] * mean / mean.square().sum()
        deltas.append(torch.zeros_like(write) if "q_proj" in site.name else write)
    made.apply(deltas)
    together = float(kl(loaded, original, ORDINARY).mean())
    shares = shares_of_kl(Ordinary(made), ORDINARY)
    alone = []
    for index in range(len(deltas)):
        made.apply([delta if n == index else torch.zeros_like(delta) for n, delta in enumerate(deltas)])
        alone.append(float(kl(loaded, original, ORDINARY).mean()))
    assert sum(shares) == pytest.approx(together, rel=0.1)
    assert abs(sum(alone) - together) > 0.2 * together
    made.restore()
    assert changed(loaded, before) == set()


def test_a_price_factor_is_the_sites_share_over_its_prediction(path: Path) -> None:
    loaded = opened(path)
    made, deltas = pushed(loaded, 0.02)
    deltas[1].zero_()
    made.apply(deltas)
    metrics = measure_disturbance(loaded, made.sites, [ORDINARY], seed=0)
    metrics[2] = metrics[2].scaled(1e-6)  # far too cheap
    metrics[3] = metrics[3].scaled(1e6)
    factors, shares = price_factors(Ordinary(made), metrics, ORDINARY), shares_of_kl(Ordinary(made), ORDINARY)
    assert (factors[1], factors[2], factors[3]) == (1.0, MOST, LEAST)
    for index in (0, 4, 5):
        expected = shares[index] / made.price(index, metrics[index])
        assert factors[index] == pytest.approx(min(max(expected, LEAST), MOST))


def test_measuring_shares_leaves_weights_and_no_hooks(path: Path) -> None:
    loaded = opened(path)
    made, _ = pushed(loaded, 0.02)
    before = snapshot(loaded)
    shares_of_kl(Ordinary(made), ORDINARY)
    find_guards(Ordinary(made), ORDINARY)
    assert changed(loaded, before) == set()
    assert hooks(loaded) == 0


# -- guards --------------------------------------------------------------------------------------------------


def test_guards_are_the_heaviest_predictions_and_the_originals_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = opened(path)
    original = log_p(loaded, ORDINARY)
    gaps = original.topk(2).values
    made, _ = pushed(loaded, 0.01)
    moved = kl(loaded, original, ORDINARY)
    heavy = (moved >= HEAVY) & (gaps[..., 0] - gaps[..., 1] > ALLOWED)
    assert 5 < int(heavy.sum()) < heavy.numel()
    found = find_guards(Ordinary(made), ORDINARY, batch_tokens=100)
    assert len(found) < AT_A_TIME
    expected = {}
    for row, place in heavy.nonzero().tolist():
        context = tuple(ORDINARY[row, max(0, place + 1 - CONTEXT) : place + 1].tolist())
        floor = float(gaps[row, place, 0] - gaps[row, place, 1]) - ALLOWED
        expected[(*context, int(original[row, place].argmax()))] = floor
    assert {guard.tokens for guard in found} == set(expected)
    for guard in found:
        assert guard.floor == pytest.approx(expected[guard.tokens], abs=1e-4)
    assert find_guards(Ordinary(made), ORDINARY, known=found) == []
    monkeypatch.setattr("memscrub.edit.guards.AT_A_TIME", 3)
    fewer = find_guards(Ordinary(made), ORDINARY, known=found[:1])
    ranked = [guard.tokens for guard in sorted(found, key=lambda guard: -_kl_of(guard, moved)) if guard != found[0]]
    assert 0 < len(fewer) <= 3  # of the three heaviest, those that the original was sure of
    assert [guard.tokens for guard in fewer] == ranked[: len(fewer)]


def _kl_of(guard: Guard, moved: Tensor) -> float:
    for row, ids in enumerate(ORDINARY.tolist()):
        if tuple(ids[: len(guard.tokens) - 1]) == guard.tokens[:-1]:
            return float(moved[row, len(guard.tokens) - 2])
    raise AssertionError("a guard of no row")


def test_an_unedited_model_needs_no_guards(path: Path) -> None:
    assert find_guards(Ordinary(editable(opened(path))), ORDINARY) == []


def test_a_guard_shows_no_tokens() -> None:
    assert "123" not in repr(Guard((123, 123), 1.0))


def test_a_guards_constraint_is_its_gap_at_least_its_floor(path: Path) -> None:
    loaded = opened(path)
    made, _ = pushed(loaded, 0.05)
    guards = find_guards(Ordinary(made), ORDINARY)[:7]
    found = standing(made, guards, batch_tokens=64)
    assert sorted(found.owners) == list(range(7))
    assert bool((found.yields == YIELD).all())
    for index, owner in enumerate(found.owners):
        guard = guards[owner]
        logits = loaded.logits(torch.tensor([guard.tokens]))[0, -2].detach()
        rest = logits.clone()
        rest[guard.tokens[-1]] = -torch.inf
        gap = float(logits[guard.tokens[-1]] - rest.max())
        assert float(found.gaps[index]) == pytest.approx(-gap, abs=1e-4)
        assert float(found.margins[index]) == pytest.approx(guard.floor)
        # The functional is the negative gap: an edit D of the last MLP, behind which no position sees another, moves
        # it by g^T D a.
        last = next(n for n, site in enumerate(made.sites) if site.layer == 1 and "mlp" in site.name)
        a, g = found.sites[last].activations[index], found.sites[last].gradients[index]
        weight = loaded.weight(made.sites[last])
        before = weight.clone()
        weight.add_(1e-2 * torch.outer(g, a) / (g.square().sum() * a.square().sum()))
        logits = loaded.logits(torch.tensor([guard.tokens]))[0, -2].detach()
        weight.copy_(before)
        moved = float(logits[guard.tokens[-1]] - logits[rest.argmax()])
        assert moved == pytest.approx(gap - 1e-2, abs=1e-3)


def _edit(loaded: LoadedModel, metrics: list[Metric], rows: Tensor | None) -> JointEdit:
    """Break the words of the protected text that the other one holds too, by the last block's MLP alone."""
    edit = JointEdit(_narrow(loaded), metrics, EditSettings(margin=1.0, rounds=14, batch_tokens=200))
    text = token_text(loaded, PROTECTED)
    shared = text.start + 14
    edit.demand([Demand(text.tokens, 1, 1, judged=((shared + 1, shared + 8),))])
    edit.rehearse(2)
    if rows is not None:
        edit.guards += find_guards(Ordinary(edit.editable), rows)
        assert edit.guards
    assert edit.run().unmet == ()
    (state,) = states_of(loaded, edit.demands, batch_tokens=200)
    assert violations(edit.demands[0], state) == 0
    return edit


def _narrow(loaded: LoadedModel) -> EditableModel:
    sites = sites_of(loaded, kinds=("mlp",), layers=(1,))
    return EditableModel(loaded, sites, {site.name: torch.float32 for site in sites})


def test_guards_keep_ordinary_text_that_holds_the_same_words(path: Path) -> None:
    loaded = opened(path)
    alike = torch.tensor([token_text(loaded, ALIKE).tokens])
    metrics = measure_disturbance(loaded, _narrow(loaded).sites, [ORDINARY], seed=0)
    original = log_p(loaded, alike)
    disturbed = []
    for rows in (None, alike):
        edit = _edit(loaded, metrics, rows)
        disturbed.append(float(kl(loaded, original, alike).max()))
        edit.editable.restore()
    assert disturbed[0] > 2 * HEAVY
    assert disturbed[1] < disturbed[0] / 4


def test_a_guard_of_the_protected_text_itself_gives_way(path: Path) -> None:
    loaded = opened(path)
    tokens = torch.tensor([token_text(loaded, PROTECTED).tokens])
    metrics = measure_disturbance(loaded, _narrow(loaded).sites, [ORDINARY], seed=0)
    edit = _edit(loaded, metrics, tokens)
    assert edit.cost() < 100 * _edit(opened(path), metrics, None).cost()
