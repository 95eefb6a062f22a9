"""One teacher-forced pass: what it says is what decoding does, and its sums are what they are defined as."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCABULARY, opened, random_text, tiny_checkpoint, token_text
from torch import Tensor

import memscrub.measures.measure
from memscrub.edit.breakpoints import Prices, TextState, extend, log_p_at
from memscrub.edit.demands import demand_of
from memscrub.errors import NumericalError
from memscrub.measures import extraction
from memscrub.measures.continuation import Opening, continue_greedily, greedy_matches
from memscrub.measures.extraction import (
    IMPOSSIBLE,
    NOISE,
    Run,
    Sampling,
    Scores,
    discoverable,
    likeliest_window,
    longest_run,
    score,
    score_logits,
    span_emitted,
    span_log_p,
)
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText
from memscrub.policy.document import parse_policy
from memscrub.reports.judgement import Status, judge

PLAIN = Sampling(VOCABULARY)
GAPS = st.lists(st.sampled_from([-3.0, -0.5, 0.0, 0.25, 1.0, 4.0]), min_size=1, max_size=14)
LOG_PS = st.lists(st.floats(-20, 0, width=32) | st.just(IMPOSSIBLE), min_size=1, max_size=14)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=5))


def greedy(loaded: LoadedModel, given_tokens: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache, padding or `generate`: the slow definition."""
    tokens = list(given_tokens)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(loaded.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(given_tokens) :]


def as_text(tokens: list[int]) -> TokenText:
    return TokenText("t", "c", tuple(tokens), start=1)


@st.composite
def half_known(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    """A recipe: random tokens and, behind each bunch of them, how many of the model's own."""
    piece = st.tuples(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=2), st.integers(0, 5))
    return draw(st.lists(piece, min_size=1, max_size=4))


@settings(max_examples=6, deadline=None)
@given(recipes=st.lists(half_known(), min_size=1, max_size=4), batch_tokens=st.sampled_from([1, 20, 64, 4096]))
def test_one_pass_says_exactly_what_generate_emits(
    loaded: LoadedModel, recipes: list[list[tuple[list[int], int]]], batch_tokens: int
) -> None:
    texts = []
    for recipe in recipes:
        tokens = list(loaded.prompt)
        for given_tokens, count in recipe:
            tokens += given_tokens
            tokens += greedy(loaded, tokens, count)
        texts.append(as_text(tokens))
    scores = score(loaded, texts, lambda text: PLAIN, batch_tokens=batch_tokens)
    for text, each in zip(texts, scores, strict=True):
        assert len(each.gap) == len(text.tokens) - 1
        assume(float(each.gap.abs().min()) > NOISE[torch.float32])
        for begin in range(1, len(text.tokens), 3):
            expected = longest_prefix(each.gap[begin - 1 :] > 0)
            assert greedy_matches(loaded, text, begin, min(expected + 1, len(text.tokens) - begin)) == expected


def longest_prefix(emitted: Tensor) -> int:
    return next((i for i, value in enumerate(emitted.tolist()) if not value), len(emitted))


def test_scores_do_not_depend_on_what_shares_the_batch(loaded: LoadedModel) -> None:
    texts = [token_text(loaded, random_text(seed, 5 + 7 * seed)) for seed in range(5)]
    kinds = [Sampling(3, 0.7), Sampling(40), Sampling(3, 0.7), Sampling(1), Sampling(9, 2.0)]
    of = dict(zip(map(id, texts), kinds, strict=True))
    together = score(loaded, texts, lambda text: of[id(text)])
    for text, kind, scores in zip(texts, kinds, together, strict=True):
        (alone,) = score(loaded, [text], lambda _, kind=kind: kind)
        torch.testing.assert_close(scores.gap, alone.gap, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.log_p, alone.log_p, atol=1e-4, rtol=0)
        torch.testing.assert_close(scores.rest, alone.rest, atol=1e-4, rtol=0)


def test_progress_counts_up_to_every_text(loaded: LoadedModel) -> None:
    texts = [token_text(loaded, random_text(seed, 6)) for seed in range(5)]
    seen: list[int] = []
    score(loaded, texts, lambda text: PLAIN, batch_tokens=14, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 5


def test_a_continuation_is_what_plain_greedy_decoding_says(loaded: LoadedModel) -> None:
    text = token_text(loaded, random_text(3, 24))
    starts = [
        Opening(0, 0, text.tokens[:given_tokens], text.tokens[given_tokens : given_tokens + 10])
        for given_tokens in (4, 9, 4)
    ]
    for said in continue_greedily(loaded, starts, batch_tokens=30):
        assert list(said.tokens) == greedy(loaded, list(said.opening.given), 10)
        assert 0 <= said.similarity <= 1


def test_the_models_own_continuation_is_similar_to_itself_by_one(loaded: LoadedModel) -> None:
    given_tokens = [*loaded.prompt, 4, 8, 15]
    own = tuple(greedy(loaded, given_tokens, 12))
    (said,) = continue_greedily(loaded, [Opening(0, 0, tuple(given_tokens), own)])
    assert said.similarity == 1.0


def test_decoding_does_not_stop_at_an_end_token_or_beyond_the_last_position(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "gpt2", seed=5)
    said = greedy(opened(path), [3, 4, 5], 6)
    for name in ("config.json", "generation_config.json"):
        file = path / name
        file.write_text(file.read_text().replace('"eos_token_id": null', f'"eos_token_id": {said[1]}'))
    loaded = opened(path)
    assert greedy_matches(loaded, as_text([3, 4, 5, *said]), 3, 6) == 6
    (long,) = continue_greedily(loaded, [Opening(0, 0, (1,) * 90, (2,) * 20)])
    assert len(long.tokens) == loaded.max_positions - 90


# -- the sums ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12, unique=True),
    target=st.integers(0, 11),
    top_k=st.integers(1, 15),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
)
def test_log_probability_is_that_of_top_k_sampling_by_definition(
    values: list[float], target: int, top_k: int, temperature: float
) -> None:
    target %= len(values)
    (scores,) = score_logits(
        torch.tensor([[values]], dtype=torch.float32), torch.tensor([[target]]), Sampling(top_k, temperature)
    )
    kept = sorted(values, reverse=True)[:top_k]
    best_other = max(value for index, value in enumerate(values) if index != target)
    assert float(scores.gap) == pytest.approx(values[target] - best_other, abs=1e-4)
    if values[target] not in kept:
        assert float(scores.log_p) == IMPOSSIBLE
    else:
        total = math.fsum(math.exp((value - kept[0]) / temperature) for value in kept)
        expected = (values[target] - kept[0]) / temperature - math.log(total)
        assert float(scores.log_p) == pytest.approx(expected, abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True),
    target=st.integers(0, 11),
    top_k=st.integers(1, 15),
    top_p=st.sampled_from([0.05, 0.3, 0.5, 0.9, 0.99]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_log_probability_is_that_of_top_p_sampling_by_definition(
    values: list[float], target: int, top_k: int, top_p: float, temperature: float
) -> None:
    target %= len(values)
    (scores,) = score_logits(
        torch.tensor([[values]], dtype=torch.float32), torch.tensor([[target]]), Sampling(top_k, temperature, top_p)
    )
    likeliest = sorted(values, reverse=True)[:top_k]
    weights = [math.exp(value / temperature) for value in likeliest]
    shares = [weight / math.fsum(weights) for weight in weights]
    before = [math.fsum(shares[:index]) for index in range(len(shares))]
    assume(all(abs(each - top_p) > 1e-4 for each in before))
    kept = [weight for weight, each in zip(weights, before, strict=True) if each < top_p]
    if values[target] < likeliest[len(kept) - 1]:
        assert float(scores.log_p) == IMPOSSIBLE
    else:
        expected = values[target] / temperature - math.log(math.fsum(kept))
        assert float(scores.log_p) == pytest.approx(expected, abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=12, unique=True),
    target=st.integers(0, 11),
    top_k=st.integers(2, 15),
    temperature=st.sampled_from([0.1, 0.5, 1.0, 2.0]),
)
def test_rest_predicts_the_log_probability_from_the_gap(
    values: list[float], target: int, top_k: int, temperature: float
) -> None:
    target %= len(values)
    (scores,) = score_logits(
        torch.tensor([[values]], dtype=torch.float32), torch.tensor([[target]]), Sampling(top_k, temperature)
    )
    gap, log_p, rest = float(scores.gap), float(scores.log_p), float(scores.rest)
    assert 0 <= rest <= math.log(top_k) + 1e-4
    if log_p > IMPOSSIBLE:
        assert log_p_at(-gap, rest, temperature) == pytest.approx(log_p, abs=1e-3)


def test_rest_is_exact_where_the_true_token_is_far_ahead() -> None:
    # e^25 swallows the others' mass of 3 in float32, and e^250 overflows.
    for temperature, ahead in ((1.0, 25.0), (0.1, 25.0)):
        logits = torch.tensor([[[ahead, 0.0, 0.0, 0.0]]])
        (scores,) = score_logits(logits, torch.tensor([[0]]), Sampling(4, temperature))
        assert float(scores.rest) == pytest.approx(math.log(3), abs=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_output_that_is_not_finite_is_an_error_and_never_passes_as_safe(broken: float) -> None:
    logits = torch.zeros(1, 3, 5)
    logits[0, 1, 2] = broken
    with pytest.raises(NumericalError, match="not finite"):
        list(score_logits(logits, torch.zeros(1, 3, dtype=torch.long), PLAIN))


def test_a_model_whose_arithmetic_overflows_is_an_error_and_never_passes_as_safe(loaded: LoadedModel) -> None:
    head = loaded.model.get_output_embeddings().weight
    kept = head.data.clone()
    try:
        head.data.copy_(head.data.sign() * 3e38)
        with pytest.raises(NumericalError):
            score(loaded, [token_text(loaded, random_text(1, 9))], lambda text: PLAIN)
    finally:
        head.data.copy_(kept)


@given(gaps=GAPS, first=st.integers(1, 6), threshold=st.sampled_from([-1.0, 0.0, 0.5]))
def test_longest_run_is_the_first_of_the_longest_by_brute_force(
    gaps: list[float], first: int, threshold: float
) -> None:
    tokens = len(gaps) + 1
    best = Run(0, first, math.inf)
    for begin in range(first, tokens):
        for end in range(begin + 1, tokens + 1):
            run = gaps[begin - 1 : end - 1]
            if all(value > threshold for value in run) and end - begin > best.length:
                best = Run(end - begin, begin, min(map(abs, run)))
    found = longest_run(torch.tensor(gaps), first, threshold)
    assert (found.length, found.margin) == (best.length, best.margin)
    assert not found.length or found.begin == best.begin


@given(log_ps=LOG_PS, first=st.integers(1, 6), width=st.integers(1, 8))
def test_likeliest_window_is_the_largest_of_all_sums(log_ps: list[float], first: int, width: int) -> None:
    judged = log_ps[first - 1 :]
    sums = [math.fsum(judged[i : i + width]) for i in range(len(judged) - width + 1)]
    found = likeliest_window(torch.tensor(log_ps), first, width)
    if not sums:
        assert found is None
    else:
        assert found == pytest.approx(max(*sums, IMPOSSIBLE), abs=1e-6)


@given(gaps=GAPS, start=st.integers(0, 3), prefix=st.integers(0, 6), suffix=st.integers(1, 6))
def test_discoverable_looks_at_exactly_the_suffix(gaps: list[float], start: int, prefix: int, suffix: int) -> None:
    found = discoverable(torch.tensor(gaps), start, prefix, suffix)
    by_token = {token: gap > 0 for token, gap in enumerate(gaps, start=1)}
    wanted = range(start + prefix, start + prefix + suffix)
    if any(token not in by_token for token in wanted):
        assert found is None
    else:
        assert found is all(by_token[token] for token in wanted)


@given(log_ps=LOG_PS, data=st.data())
def test_a_span_is_judged_token_by_token_from_the_first_that_can_be_predicted(
    log_ps: list[float], data: st.DataObject
) -> None:
    end = data.draw(st.integers(2, len(log_ps) + 1))
    begin = data.draw(st.integers(0, end - 1))
    inside = [log_ps[token - 1] for token in range(max(begin, 1), end)]
    values = torch.tensor(log_ps)
    assert span_log_p(values, (begin, end)) == pytest.approx(max(math.fsum(inside), IMPOSSIBLE), abs=1e-4)
    assert span_emitted(values, (begin, end), -5.0) is all(value > -5.0 for value in inside)


def test_scores_hold_one_value_per_predicted_token(loaded: LoadedModel) -> None:
    (scores,) = score(loaded, [as_text([1, 2, 3, 4])], lambda text: PLAIN)
    assert isinstance(scores, Scores)
    assert [len(values) for values in (scores.gap, scores.log_p, scores.rest)] == [3, 3, 3]


# -- what is made of the scores ------------------------------------------------------------------------------

POLICY = """\
schema = 1
name = "p"
[protected]
files = ["protected.jsonl"]
[class.c]
max_verbatim_tokens = 4
[class.pii]
secret = true
"""


def fake_scores(gaps: list[float]) -> Scores:
    values = torch.tensor(gaps)
    return Scores(values, values.clamp(max=0), torch.zeros(len(gaps)))


def test_every_doubtful_run_over_the_limit_is_decoded(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two runs within rounding noise: decoding breaks the longer in the middle and emits the shorter whole.
    gaps = [2.0, 2, 2, -1e-4, 2, 2, 2, -5, 2, 2, 1e-4, 2, 2, -5]
    monkeypatch.setattr(
        memscrub.measures.measure, "scored", lambda loaded, texts, *given, **more: [(texts[0], fake_scores(gaps))]
    )
    monkeypatch.setattr(
        memscrub.measures.measure,
        "greedy_matches",
        lambda loaded, text, begin, length: min(length, 4 - begin if begin < 4 else length),
    )
    text = as_text(list(range(len(gaps) + 1)))
    (found,) = memscrub.measures.measure.measure(loaded, parse_policy(POLICY.encode()), [text]).measures
    assert (found.match_run, found.confirmed) == (5, True)


def test_a_run_in_no_doubt_is_not_forgotten_for_a_shorter_one_that_was_decoded(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Decoding breaks every doubtful position; behind them stands a run of four that no rounding could break.
    gaps = [2.0, -1e-4, 2, 2, 2, -1e-4, -5, 2, 2, 2, 2, -5]
    monkeypatch.setattr(
        memscrub.measures.measure, "scored", lambda loaded, texts, *given, **more: [(texts[0], fake_scores(gaps))]
    )
    broken = [index + 1 for index, gap in enumerate(gaps) if gap < 0]
    monkeypatch.setattr(
        memscrub.measures.measure,
        "greedy_matches",
        lambda loaded, text, begin, length: min([length, *(at - begin for at in broken if at >= begin)]),
    )
    text = as_text(list(range(len(gaps) + 1)))
    (found,) = memscrub.measures.measure.measure(loaded, parse_policy(POLICY.encode()), [text]).measures
    assert (found.match_run, found.run_begin, found.confirmed) == (4, 8, True)


def test_a_text_with_fewer_judged_tokens_than_the_limit_can_break_is_inconclusive(
    loaded: LoadedModel,
) -> None:
    policy = parse_policy(POLICY.encode() + b"[probe]\nmin_prefix_tokens = 10\n")
    text = token_text(loaded, random_text(0, 13))  # 3 judged tokens can never make a run of 5
    (found,) = memscrub.measures.measure.measure(loaded, policy, [text]).measures
    assert judge(found, policy.classes["c"]).status is Status.INCONCLUSIVE


def test_a_secret_that_nothing_precedes_cannot_be_judged(tmp_path: Path) -> None:
    # Without a beginning-of-text token nothing predicts the first token.
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=1, begin=False))
    policy = parse_policy(POLICY.encode())
    text = replace(token_text(loaded, random_text(0, 9), secrets=((0, 3),)), class_name="pii")
    (found,) = memscrub.measures.measure.measure(loaded, policy, [text]).measures
    assert judge(found, policy.classes["pii"]).status is Status.INCONCLUSIVE
    demand = demand_of(text, policy.classes["pii"], policy.probe)
    zeros = [0.0] * len(text.tokens)
    assert extend(demand, TextState(zeros, zeros, zeros), Prices(zeros, zeros), {}, 0.3) == {}


def test_a_text_with_one_secret_that_cannot_be_judged_is_not_within_by_the_other(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=1, begin=False))
    policy = parse_policy(POLICY.encode())
    text = replace(token_text(loaded, random_text(0, 9), secrets=((0, 3), (12, 15))), class_name="pii")
    assert (len(text.secrets), text.unjudged) == (1, 1)
    (found,) = memscrub.measures.measure.measure(loaded, policy, [text]).measures
    assert judge(found, policy.classes["pii"]).status is Status.INCONCLUSIVE
    (secret,) = found.secrets
    given_away = replace(found, secrets=(replace(secret, emitted=True),))
    assert judge(given_away, policy.classes["pii"]).status is Status.VIOLATED


@given(vocabulary=st.integers(2, 400), k=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_the_grouped_top_k_equals_topk(vocabulary: int, k: int, seed: int) -> None:
    k = min(k, vocabulary)
    logits = torch.randn(3, 5, vocabulary, generator=torch.Generator().manual_seed(seed))
    values, indices = extraction.largest(logits, k)
    assert torch.equal(values, logits.topk(k, dim=-1).values)
    assert torch.equal(logits.gather(-1, indices), values)
