"""Membership signals are what their papers define, and a trained text shows in them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import WORDS, opened, random_text, tiny_checkpoint, token_text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memscrub.errors import NumericalError, UsageError
from memscrub.maths.intervals import auc, bootstrap_auc
from memscrub.measures import membership
from memscrub.measures.membership import Separation, Signals, separations, signals, signals_of, token_statistics
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText

TRAINED = [random_text(seed, 24) for seed in range(4)]
UNSEEN = [random_text(seed, 24) for seed in range(100, 108)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp("model"), "llama", 3, TRAINED, 60))


def brute_force(logits: Tensor, target: int) -> tuple[float, float, float]:
    """One token, word for word, in double precision."""
    values = [float(each) for each in logits]
    top = max(values)
    total = top + math.log(math.fsum(math.exp(each - top) for each in values))
    log_p = [each - total for each in values]
    mean = math.fsum(math.exp(each) * each for each in log_p if each > -math.inf)
    variance = math.fsum(math.exp(each) * (each - mean) ** 2 for each in log_p if each > -math.inf)
    return log_p[target], mean, math.sqrt(variance)


@given(st.integers(1, 9), st.integers(1, 40), st.floats(0.01, 20), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_token_statistics_are_those_of_the_definition(rows: int, vocabulary: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * scale + 30
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    before = logits.clone()
    found = torch.stack(token_statistics(logits, targets), dim=-1)
    expected = torch.tensor([brute_force(row, int(target)) for row, target in zip(logits, targets, strict=True)])
    assert torch.allclose(found, expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(logits, before)


def test_a_nearly_certain_token_has_its_small_deviation() -> None:
    # The mean of squares less the square of the mean would leave nothing but rounding here.
    logits = torch.full((1, 1000), 10.0)
    logits[0, 7] = 30.0
    _, mean, deviation = token_statistics(logits, torch.tensor([7]))
    _, true_mean, true_deviation = brute_force(logits[0], 7)
    assert float(mean) == pytest.approx(true_mean, rel=0.1)
    assert float(deviation) == pytest.approx(true_deviation, rel=1e-3)


def test_a_masked_entry_of_the_vocabulary_counts_for_nothing() -> None:
    logits = torch.tensor([[1.0, 2.0, -torch.inf]])
    for found, expected in zip(
        token_statistics(logits, torch.tensor([0])), token_statistics(logits[:, :2], torch.tensor([0])), strict=True
    ):
        assert torch.allclose(found, expected)


def test_no_rows_give_no_statistics() -> None:
    assert [len(each) for each in token_statistics(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))] == [0, 0, 0]


class Allocations(TorchDispatchMode):
    """The sizes of everything that is allocated: results that share no storage with anything that went in."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = (*args, *(kwargs or {}).values())
        old = {each.untyped_storage().data_ptr() for each in given if isinstance(each, Tensor)}
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in old:
                self.sizes.append(each.untyped_storage().nbytes() // each.element_size())
        return out


@pytest.mark.parametrize(("rows", "chunk"), [(64, 2**20), (65, 2**20), (64, 300)])
def test_temporaries_are_two_of_half_the_logits_and_smaller_for_many_rows(
    rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "CPU_CHUNK", chunk)
    logits, targets = torch.randn(rows, 100), torch.randint(100, (rows,))
    with Allocations() as allocated:
        token_statistics(logits, targets)
    size = min(rows // 2, chunk // 100)
    large = [each for each in allocated.sizes if each > rows]  # beyond one number a row
    assert max(large) == size * 100
    assert len(large) == 2 * math.ceil(rows / size)  # log p and p of each chunk, and nothing else


def test_signals_are_those_of_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(11, 50, generator=generator) * 3, torch.randint(50, (11,), generator=generator)
    text = "eleven tokens or so, so or tokens eleven"
    found = signals_of(*token_statistics(logits, targets), text)
    each = [brute_force(row, int(target)) for row, target in zip(logits, targets, strict=True)]
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert found.negative_loss == pytest.approx(-float(loss) / 11, rel=1e-5)
    assert found.negative_zlib_ratio == pytest.approx(-float(loss) / len(zlib.compress(text.encode())), rel=1e-5)
    scores = sorted((log_p - mean) / deviation for log_p, mean, deviation in each)
    assert found.min_k_plus_plus == pytest.approx(sum(scores[:2]) / 2, rel=1e-4)  # a fifth of 11 is 2
    assert signals_of(*token_statistics(logits, targets), text, share=1.0).min_k_plus_plus == pytest.approx(
        sum(scores) / 11, rel=1e-4
    )


def test_tokens_that_leave_no_choice_are_no_surprise() -> None:
    uniform = signals_of(*token_statistics(torch.zeros(3, 8), torch.tensor([1, 2, 3])), "abc")
    assert uniform.min_k_plus_plus == pytest.approx(0, abs=1e-2)
    assert uniform.negative_loss == pytest.approx(-math.log(8))
    certain = torch.zeros(3, 8)
    certain[:, 5] = 1e4
    assert signals_of(*token_statistics(certain, torch.tensor([5, 5, 5])), "abc").min_k_plus_plus == 0


def test_signals_of_a_list_are_those_of_each_text_alone(loaded: LoadedModel) -> None:
    texts = [token_text(loaded, random_text(seed, 5 + 3 * seed)) for seed in range(8)]
    texts[2] = replace(texts[2], start=4)  # an own prefix is given, not judged
    done: list[int] = []
    found = signals(loaded, texts, batch_tokens=60, progress=done.append)
    assert done[-1] == len(texts) and len(done) > 1
    for text, each in zip(texts, found, strict=True):
        with torch.inference_mode():
            logits = loaded.logits(torch.tensor([text.tokens]))[0]
        chosen = range(text.start, len(text.tokens))
        tokens = [brute_force(logits[place - 1], text.tokens[place]) for place in chosen]
        characters = " ".join(WORDS[text.tokens[place]] for place in chosen)
        scores = sorted((log_p - mean) / deviation for log_p, mean, deviation in tokens)[: max(1, len(tokens) // 5)]
        assert each is not None
        assert each.negative_loss == pytest.approx(sum(log_p for log_p, _, _ in tokens) / len(tokens), rel=1e-4)
        assert each.negative_zlib_ratio == pytest.approx(
            sum(log_p for log_p, _, _ in tokens) / len(zlib.compress(characters.encode())), rel=1e-4
        )
        assert each.min_k_plus_plus == pytest.approx(sum(scores) / len(scores), rel=1e-3, abs=1e-3)


def test_a_text_without_a_predicted_token_has_no_signals(loaded: LoadedModel) -> None:
    nothing = TokenText("a", "c", (*loaded.prompt, 3), start=2)
    unpredicted = TokenText("b", "c", (3,), start=0)
    long = token_text(loaded, TRAINED[0])
    assert [each is None for each in signals(loaded, [nothing, long, unpredicted])] == [True, False, True]
    assert signals(loaded, []) == []


def test_trained_texts_stand_out_in_every_signal(loaded: LoadedModel) -> None:
    inside = [each for each in signals(loaded, [token_text(loaded, text) for text in TRAINED]) if each]
    outside = [each for each in signals(loaded, [token_text(loaded, text) for text in UNSEEN]) if each]
    found = separations(inside, outside, resamples=50)
    assert [each.signal for each in found] == [each.name for each in fields(Signals)]
    assert all(each.auc == 1 for each in found)
    # The same lists the other way round: a signal that had the wrong sign would show here as 1.
    assert all(each.auc == 0 for each in separations(outside, inside, resamples=50))


def test_separations_are_the_auc_of_each_signal_with_its_interval() -> None:
    inside = [Signals(-1.0, -0.5, -2.0), Signals(-3.0, -0.2, -1.0), Signals(-2.0, -0.1, -1.5)]
    outside = [Signals(-2.0, -0.4, -3.0), Signals(-4.0, -0.1, -1.0)]
    losses = [each.negative_loss for each in inside], [each.negative_loss for each in outside]
    expected = Separation("negative_loss", auc(*losses), bootstrap_auc(*losses, seed=4, resamples=30))
    assert separations(inside, outside, seed=4, resamples=30)[0] == expected


def test_without_controls_there_is_no_auc() -> None:
    with pytest.raises(UsageError, match="control texts"):
        separations([Signals(-1.0, -1.0, -1.0)], [])


def test_an_output_that_is_not_finite_is_refused() -> None:
    for bad in (math.nan, math.inf):
        logits = torch.zeros(4, 6)
        logits[2, 1] = bad
        with pytest.raises(NumericalError):
            signals_of(*token_statistics(logits, torch.tensor([0, 1, 2, 3])), "abcd")
