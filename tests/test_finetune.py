"""The fine-tuning baselines do what their papers say, and nothing of them is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import changed, opened, ordinary_rows, random_text, snapshot, tiny_checkpoint, token_text
from torch import Tensor

from memscrub.bench import finetune_losses
from memscrub.bench.finetune import Method, Recipe, grid, large_grid, restored, rounded, tune
from memscrub.bench.finetune_losses import (
    ForgetTerm,
    KeepTerm,
    ascent_loss,
    divergence,
    largest_share,
    npo_loss,
    text_log_p,
)
from memscrub.errors import NumericalError, UsageError
from memscrub.locality.distance import compare
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, pad, prompted

TEXTS = tuple(random_text(seed, 24) for seed in range(100, 104))
# A tenth of the weights, since a thousandth of a tiny model is a dozen of them.
SHARE = 0.1


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model that knows the texts by heart."""
    return opened(tiny_checkpoint(tmp_path_factory.mktemp("memorized"), "llama", 7, TEXTS, steps=120))


@pytest.fixture
def texts(loaded: LoadedModel) -> list[TokenText]:
    return [token_text(loaded, text) for text in TEXTS]


@pytest.fixture
def rows(loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    """Retain text as a running stream and at the beginning of a text."""
    stream = ordinary_rows(5, 12, 20)
    return stream, prompted(loaded, stream[:, :8])


def recipe(method: Method, **changes: object) -> Recipe:
    settings: dict[str, object] = {"learning_rate": 3e-3, "steps": (12,), "keep_weight": 1.0, "batch_texts": 2}
    settings |= {"batch_rows": 4, "share": SHARE, "warm_up": 3}
    return Recipe(method.value, method, **{**settings, **changes})  # type: ignore[arg-type]


def run(
    loaded: LoadedModel,
    texts: list[TokenText],
    rows: tuple[Tensor, ...],
    chosen: Recipe,
    seen: Callable[[], None] = lambda: None,
    seed: int = 3,
) -> dict[str, Tensor]:
    """Tune, let `seen` look at every measured step, and put everything back; the tuned weights are returned."""
    with restored(loaded):
        tune(loaded, texts, rows, chosen, seed=seed, at_step=lambda step, seconds: seen())
        return snapshot(loaded)


def log_p(loaded: LoadedModel, texts: list[TokenText]) -> float:
    return float(ForgetTerm(loaded, texts, min_prefix_tokens=1, beta=None).log_p().sum())


def answers(loaded: LoadedModel, rows: tuple[Tensor, ...]) -> list[Tensor]:
    """Log-probabilities of the next token at each kind of rows, under the weights as they are now."""
    with torch.no_grad():
        return [loaded.logits(part)[:, :-1].log_softmax(-1) for part in rows]


# -- formulas ------------------------------------------------------------------------------------------------


def test_npo_is_the_formula_of_the_paper() -> None:
    log_p, reference, beta = [-3.0, -40.0, 2.5], [-1.0, -2.0, 0.5], 0.1
    ratios = [math.exp(one - other) for one, other in zip(log_p, reference, strict=True)]
    expected = 2 / beta * sum(math.log(1 + ratio**beta) for ratio in ratios) / 3
    assert float(npo_loss(torch.tensor(log_p), torch.tensor(reference), beta)) == pytest.approx(expected, rel=1e-6)


def test_npo_pushes_less_the_less_likely_a_text_has_become() -> None:
    log_p = torch.tensor([0.0, -20.0, -200.0], requires_grad=True)
    npo_loss(log_p, torch.zeros(3), 0.1).backward()
    assert log_p.grad is not None
    # d/d log_p of one text is 2 sigmoid(beta log_p) / 3: the gradient of ascent at the start, then vanishing.
    torch.testing.assert_close(log_p.grad, 2 / 3 * torch.sigmoid(torch.tensor([0.0, -2.0, -20.0])))


def test_ascent_is_the_mean_log_probability_per_token() -> None:
    assert float(ascent_loss(torch.tensor([-6.0, -1.0]), torch.tensor([3, 4]))) == pytest.approx((-2 - 0.25) / 2)


def test_divergence_is_kl_from_the_original() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert divergence(p.log(), q.log()).tolist() == pytest.approx([expected, 0.0], abs=1e-7)


def test_only_the_counted_tokens_of_a_text_are_scored() -> None:
    ids = torch.tensor([[1, 2, 0, 2], [0, 1, 1, 0]])
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([[True, False, True, True], [False, True, False, False]])
    table = logits.log_softmax(-1)
    expected = [table[0, 1, 0] + table[0, 2, 2], table[1, 0, 1]]
    torch.testing.assert_close(text_log_p(logits, ids, counted), torch.stack(expected))


def test_the_largest_share_is_taken_over_all_gradients_together() -> None:
    gradients = [torch.tensor([[1.0, -9.0], [0.5, 2.0]]), torch.tensor([-3.0, 0.1, 4.0, 0.2])]
    masks = largest_share(gradients, 0.4)  # 3.2 of 8 entries: 3
    assert [mask.tolist() for mask in masks] == [[[False, True], [False, False]], [True, False, True, False]]
    assert sum(int(mask.sum()) for mask in largest_share(gradients, 1e-6)) == 1


# -- the terms on a live model ---------------------------------------------------------------------------------


def test_the_forget_term_covers_what_is_judged_and_is_the_same_in_one_pass_or_several(
    loaded: LoadedModel, texts: list[TokenText], monkeypatch: pytest.MonkeyPatch
) -> None:
    term = ForgetTerm(loaded, [*texts, token_text(loaded, "w01 w02")], min_prefix_tokens=5, beta=None)
    assert len(term.texts) == len(texts)  # the last has no token that is judged
    with torch.no_grad():
        table = loaded.logits(pad([text.tokens for text in texts])).log_softmax(-1)
    expected = [
        sum(float(table[i, t - 1, text.tokens[t]]) for t in range(text.start + 5, len(text.tokens)))
        for i, text in enumerate(texts)
    ]
    assert term.log_p().tolist() == pytest.approx(expected, rel=1e-4)

    found = []
    for budget in (2048, 1):
        monkeypatch.setattr(finetune_losses, "BATCH_TOKENS", budget)
        with restored(loaded):
            loaded.model.requires_grad_(True)
            loss = ForgetTerm(loaded, texts, min_prefix_tokens=5, beta=0.1).backward([0, 1, 2])
            found.append((loss, loaded.model.lm_head.weight.grad.clone()))
    assert found[0][0] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-5)  # at the start pi = pi_ref
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-4)


def test_the_keep_term_is_zero_with_no_gradient_at_the_original_weights_and_kl_elsewhere(
    loaded: LoadedModel, rows: tuple[Tensor, Tensor]
) -> None:
    every = [range(len(part)) for part in rows]
    with restored(loaded):
        loaded.model.requires_grad_(True)
        keep, before = KeepTerm(loaded, rows, 4.0), answers(loaded, rows)
        assert keep.backward(every) == pytest.approx(0.0, abs=1e-5)
        # This is why the masked method needs no KL gradient to choose its weights by.
        assert max(float(parameter.grad.abs().max()) for parameter in loaded.model.parameters()) < 1e-5
        loaded.model.lm_head.weight.data.mul_(0.5)
        each = [divergence(*pair).flatten() for pair in zip(before, answers(loaded, rows), strict=True)]
        assert keep.backward(every) == pytest.approx(4.0 * float(torch.cat(each).mean()), rel=1e-4)


@pytest.mark.parametrize("room", [0, 20_000, 2**29])
def test_what_the_original_says_stays_the_same_while_the_model_is_tuned(
    loaded: LoadedModel, rows: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(finetune_losses, "KEPT_BYTES", room)
    before = answers(loaded, rows)
    with restored(loaded):
        keep = KeepTerm(loaded, rows, 1.0)
        keep.before(0, [1, 4])  # these are remembered where there is room
        loaded.model.requires_grad_(True)
        for parameter in loaded.model.parameters():
            parameter.data.add_(0.1)
        for kind, known in enumerate(before):
            for chosen in ([4, 2, 2, 0], [0, 1, 2, 3]):
                torch.testing.assert_close(keep.before(kind, chosen), known[chosen], atol=1e-5, rtol=1e-5)
        assert not keep.before(0, [0]).requires_grad
        held = sum(value.numel() * value.element_size() for value in keep.kept.values())
        assert held <= room and keep.room == room - held


# -- what is put back ------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_everything_is_put_back_bit_for_bit_also_after_an_exception(
    loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor]
) -> None:
    before = snapshot(loaded)
    places = [parameter.data_ptr() for parameter in loaded.model.parameters()]
    loaded.model.model.layers[0].train()  # a mode of its own, to see that it comes back
    frozen = loaded.model.model.norm.weight.requires_grad_(True)

    def interrupt(step: int, seconds: float) -> None:
        assert changed(loaded, before) == set(before)
        # No step starts with what is left of the gradients of another.
        assert all(parameter.grad is None for parameter in loaded.model.parameters())
        raise Interrupted

    try:
        with pytest.raises(Interrupted), restored(loaded) as originals:
            assert all(torch.equal(originals[name], before[name]) for name in originals)
            tune(loaded, texts, rows, recipe(Method.NPO, steps=(2,)), seed=0, at_step=interrupt)
        assert not changed(loaded, before)
        assert [parameter.data_ptr() for parameter in loaded.model.parameters()] == places
        assert all(parameter.grad is None for parameter in loaded.model.parameters())
        assert {name for name, value in loaded.model.named_parameters() if value.requires_grad} == {"model.norm.weight"}
        assert {name for name, module in loaded.model.named_modules() if module.training} == {
            name for name, _ in loaded.model.named_modules() if f"{name}.".startswith("model.layers.0.")
        }
    finally:
        loaded.model.eval()
        frozen.requires_grad_(False)


def test_storage_and_dtype_come_back_when_they_were_replaced(loaded: LoadedModel) -> None:
    before, place = snapshot(loaded), loaded.model.lm_head.weight.data_ptr()
    with restored(loaded):
        loaded.model.lm_head.weight.data = torch.zeros(2, dtype=torch.float16)
    assert not changed(loaded, before) and loaded.model.lm_head.weight.data_ptr() == place


def test_tied_weights_are_tuned_as_one_and_stay_tied(tmp_path: Path) -> None:
    tied = opened(tiny_checkpoint(tmp_path, "gpt2", 1))
    before, model = snapshot(tied), tied.model
    rows = (ordinary_rows(5, 4, 12),)
    assert model.lm_head.weight is model.transformer.wte.weight

    def tied_still(step: int, seconds: float) -> None:
        assert model.lm_head.weight is model.transformer.wte.weight
        assert {"lm_head.weight", "transformer.wte.weight"} <= changed(tied, before)

    with restored(tied) as originals:
        assert len({"lm_head.weight", "transformer.wte.weight"} & originals.keys()) == 1
        tune(tied, [token_text(tied, TEXTS[0])], rows, recipe(Method.NPO, steps=(2,)), seed=0, at_step=tied_still)
    assert model.lm_head.weight is model.transformer.wte.weight and not changed(tied, before)


def test_rounding_for_a_measurement_leaves_the_weights_that_are_trained_on(loaded: LoadedModel) -> None:
    before = snapshot(loaded)
    with pytest.raises(Interrupted), rounded(loaded, {"lm_head.weight": torch.bfloat16}):
        assert changed(loaded, before) == {"lm_head.weight"}
        live = loaded.model.lm_head.weight
        assert live.dtype == torch.float32 and torch.equal(live, before["lm_head.weight"].bfloat16().float())
        raise Interrupted
    assert not changed(loaded, before)


# -- the methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", Method)
def test_every_method_makes_the_texts_less_likely(
    loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor], method: Method
) -> None:
    before, found = log_p(loaded, texts), []
    chosen = recipe(method, learning_rate=1e-2, steps=(30,))
    run(loaded, texts, rows, chosen, lambda: found.append(log_p(loaded, texts)))
    assert found[0] < before - 50.0
    assert log_p(loaded, texts) == before


@pytest.mark.parametrize("method", Method)
def test_the_keep_term_keeps_the_model_closer(
    loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor], method: Method
) -> None:
    unseen, kl = ordinary_rows(99, 12, 20), {}
    for weight in (0.0, 20.0):
        chosen = recipe(method, keep_weight=weight, steps=(30,), learning_rate=1e-3)
        with restored(loaded) as originals:
            tune(loaded, texts, rows, chosen, seed=0, at_step=lambda step, seconds: None)
            kl[weight] = compare(loaded, originals, unseen).kl
    assert kl[20.0] < 0.5 * kl[0.0]


def test_without_a_keep_term_no_retain_text_is_needed(loaded: LoadedModel, texts: list[TokenText]) -> None:
    before = snapshot(loaded)
    assert run(loaded, texts, (), recipe(Method.ASCENT, keep_weight=0.0, steps=(1,))).keys() == before.keys()
    with pytest.raises(UsageError, match="retain"):
        run(loaded, texts, (ordinary_rows(0, 4, 8)[:0],), recipe(Method.NPO, steps=(1,)))


def test_the_masked_method_moves_the_weights_with_the_largest_gradient_and_no_other(
    loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor]
) -> None:
    names = [name for name, p in loaded.model.named_parameters() if name.startswith("model.layers.") and p.dim() == 2]
    with restored(loaded):
        loaded.model.requires_grad_(True)
        ForgetTerm(loaded, texts, min_prefix_tokens=1, beta=None).backward(range(len(texts)))
        gradients = [loaded.model.get_parameter(name).grad.clone() for name in names]
    masks = dict(zip(names, largest_share(gradients, SHARE), strict=True))
    before = snapshot(loaded)
    after = run(loaded, texts, rows, recipe(Method.MASKED))
    moved = {name: after[name].view(torch.int32) != value.view(torch.int32) for name, value in before.items()}
    assert sum(int(mask.sum()) for mask in moved.values()) <= SHARE * sum(g.numel() for g in gradients)
    assert {name for name, mask in moved.items() if mask.any()} == {name for name, mask in masks.items() if mask.any()}
    assert all(torch.equal(moved[name], mask) for name, mask in masks.items())


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor]
) -> None:
    first, again, other = (run(loaded, texts, rows, recipe(Method.NPO, steps=(4,)), seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_run_measured_on_its_way_is_the_shorter_run(
    loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor]
) -> None:
    seen: list[dict[str, Tensor]] = []
    run(loaded, texts, rows, recipe(Method.NPO, steps=(2, 5)), lambda: seen.append(snapshot(loaded)))
    for steps, known in zip((2, 5), seen, strict=True):
        alone = run(loaded, texts, rows, recipe(Method.NPO, steps=(steps,)))
        assert all(torch.equal(alone[name], value) for name, value in known.items())


def test_measuring_is_not_counted_as_training(
    loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, points, done = [0.0], [], []
    monkeypatch.setattr("memscrub.bench.clock.time.perf_counter", lambda: clock[0])

    def measure(step: int, seconds: float) -> None:
        points.append((step, seconds))
        clock[0] += 1000.0

    def told(step: int) -> None:
        done.append(step)
        clock[0] += 1.0

    with restored(loaded):
        chosen = recipe(Method.NPO, steps=(2, 5))
        seconds = tune(loaded, texts, rows, chosen, seed=0, at_step=measure, progress=told)
    assert points == [(2, 2.0), (5, 5.0)] and seconds == 5.0 and done == [1, 2, 3, 4, 5]


def test_tuning_runs_without_dropout_and_leaves_the_settings_as_they_were(tmp_path: Path) -> None:
    gpt2 = opened(tiny_checkpoint(tmp_path, "gpt2", 1))
    for module in gpt2.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    gpt2.model.train()
    text, rows = token_text(gpt2, TEXTS[0]), (ordinary_rows(5, 4, 12),)
    with restored(gpt2):
        tune(gpt2, [text], rows, recipe(Method.MASKED, steps=(2,)), seed=0, at_step=lambda step, seconds: None)
        first = snapshot(gpt2)
        assert gpt2.model.training and not any(p.requires_grad for p in gpt2.model.parameters())
        assert all(p.grad is None for p in gpt2.model.parameters())
    with restored(gpt2):
        tune(gpt2, [text], rows, recipe(Method.MASKED, steps=(2,)), seed=0, at_step=lambda step, seconds: None)
        assert not changed(gpt2, first)


# -- what is refused -------------------------------------------------------------------------------------------


def test_a_run_that_diverges_says_so(loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor]) -> None:
    before = snapshot(loaded)
    with pytest.raises(NumericalError, match="'npo' diverged: its loss is not finite at step"):
        run(loaded, texts, rows, recipe(Method.NPO, learning_rate=1e30, warm_up=1))
    assert not changed(loaded, before)


def test_texts_without_a_judged_token_and_other_dtypes_are_refused(
    loaded: LoadedModel, texts: list[TokenText], rows: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no text is long enough"):
        tune(loaded, texts, rows, recipe(Method.NPO), seed=0, min_prefix_tokens=50, at_step=lambda *_: None)
    half = opened(tiny_checkpoint(tmp_path, "llama", 1), dtype="bfloat16")
    with pytest.raises(UsageError, match="float32"):
        run(half, texts, rows, recipe(Method.NPO))


@pytest.mark.parametrize("steps", [(), (0, 3), (5, 3), (3, 3)])
def test_steps_that_do_not_ascend_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="ascending"):
        recipe(Method.NPO, steps=steps)


def test_the_grid_has_every_method_under_names_that_tell_its_settings_apart() -> None:
    for recipes in (grid(), large_grid()):
        assert {one.method for one in recipes} == set(Method)
        assert len({one.name for one in recipes}) == len(recipes)
        settings = {(one.method, one.learning_rate, one.keep_weight, one.keep_starts) for one in recipes}
        assert len(settings) == len(recipes)
    assert {one.name for one in grid()} <= {one.name for one in large_grid()}
