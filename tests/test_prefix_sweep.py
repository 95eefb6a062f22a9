"""The prefix sweep: its verdicts are those of decoding behind exactly the tokens it says were given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import FAMILIES, opened, random_text, tiny_checkpoint, token_text

from memscrub.measures import prefix_sweep
from memscrub.measures.extraction import Sampling, discoverable, score
from memscrub.measures.prefix_sweep import LENGTHS, Rate, Sweep, Variant, rates, sweep_prefixes
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText

KNOWN = [random_text(seed, 30) for seed in range(4)]
VARIANTS: tuple[Variant, ...] = ("before_suffix", "from_start")


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp(request.param)
    return opened(tiny_checkpoint(path, request.param, seed=2, texts=KNOWN, steps=60))


def texts_of(loaded: LoadedModel) -> list[TokenText]:
    """Known texts, unknown ones, and known ones behind something else."""
    other = [random_text(seed, 30) for seed in (100, 101)]
    moved = [f"{random_text(200 + i, 6)} {text}" for i, text in enumerate(KNOWN)]
    return [token_text(loaded, text) for text in (*KNOWN, *other, *moved)]


def emits(loaded: LoadedModel, given: tuple[int, ...], truth: tuple[int, ...]) -> bool:
    """Greedy decoding without cache, padding or `generate`."""
    tokens = list(given)
    for _ in truth:
        with torch.inference_mode():
            tokens.append(int(loaded.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(given) :]) == truth


@pytest.mark.parametrize("batch_tokens", [1, 8192])
def test_verdicts_are_those_of_decoding_behind_the_prefix_alone(loaded: LoadedModel, batch_tokens: int) -> None:
    texts, suffix, lengths = texts_of(loaded), 5, (1, 4, 12, 25)
    found = {
        variant: sweep_prefixes(
            loaded, texts, lengths=lengths, suffix=suffix, variant=variant, batch_tokens=batch_tokens
        )
        for variant in VARIANTS
    }
    for i, text in enumerate(texts):
        body = text.tokens[text.start :]
        end = len(body) - suffix
        for j, length in enumerate(lengths):
            standard = emits(loaded, loaded.prompt + body[end - length : end], body[end:])
            assert found["before_suffix"][i].extracted[j] == standard
            opening = emits(loaded, text.tokens[: text.start + length], body[length : length + suffix])
            assert found["from_start"][i].extracted[j] == opening
    for sweeps in found.values():  # the texts above do tell the two answers apart
        assert {out for sweep in sweeps for out in sweep.extracted} == {True, False}


def test_the_two_variants_agree_where_both_give_the_text_from_its_beginning(loaded: LoadedModel) -> None:
    texts = texts_of(loaded)[:6]  # 30 tokens
    one, other = (sweep_prefixes(loaded, texts, lengths=[24], suffix=6, variant=each) for each in VARIANTS)
    assert one == other
    scores = score(loaded, texts, lambda _: Sampling())
    classic = [discoverable(s.gap, t.start, 24, 6) for s, t in zip(scores, texts, strict=True)]
    assert [sweep.extracted == (True,) for sweep in one] == classic


def test_tokens_before_the_prefix_are_not_given(loaded: LoadedModel) -> None:
    """Whatever stands before the last L + suffix tokens, the answer for L is the same."""
    tails = [text.split()[-16:] for text in KNOWN]
    plain = [token_text(loaded, " ".join(tail)) for tail in tails]
    behind = [token_text(loaded, " ".join([*random_text(7, 20).split(), *tail])) for tail in tails]
    first, second = (sweep_prefixes(loaded, each, lengths=[4, 12], suffix=4) for each in (plain, behind))
    assert first == second


def test_only_lengths_that_fit_are_tried(loaded: LoadedModel) -> None:
    text = token_text(loaded, random_text(1, 20))
    for variant in VARIANTS:
        (sweep,) = sweep_prefixes(loaded, [text], lengths=[30, 15, 8, 16, 8], suffix=5, variant=variant)
        assert sweep.lengths == (8, 15)
        (nothing,) = sweep_prefixes(loaded, [text], suffix=50, variant=variant)
        assert nothing == Sweep((), ()) and nothing.shortest is None
    assert sweep_prefixes(loaded, []) == []
    assert min(LENGTHS) == 8 and max(LENGTHS) == 200


def test_from_the_start_one_row_answers_for_all_lengths(loaded: LoadedModel) -> None:
    texts, seen = texts_of(loaded)[:3], {}
    for variant in VARIANTS:
        done: list[int] = []
        sweep_prefixes(loaded, texts, lengths=[2, 4, 8], suffix=5, variant=variant, progress=done.append)
        seen[variant] = done[-1]
    assert seen == {"before_suffix": 9, "from_start": 3}


def test_doubtful_gaps_are_decided_by_real_decoding(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = texts_of(loaded)[:6]
    plain = sweep_prefixes(loaded, texts, lengths=[4, 12], suffix=5)
    monkeypatch.setattr(prefix_sweep, "NOISE", {torch.float32: 1e9})
    decoded = sweep_prefixes(loaded, texts, lengths=[4, 12], suffix=5)
    assert [sweep.confirmed for sweep in decoded] == [2] * 6
    assert [replace(sweep, confirmed=0) for sweep in decoded] == [replace(sweep, confirmed=0) for sweep in plain]


def test_the_shortest_is_the_first_that_extracts() -> None:
    assert Sweep((8, 12, 16), (False, True, False)).shortest == 12
    assert Sweep((8, 12), (False, False)).shortest is None


def test_rates_count_the_texts_that_a_length_fits() -> None:
    sweeps = [Sweep((8, 12), (True, True)), Sweep((8,), (False,)), Sweep((), ()), Sweep((8, 12), (True, False))]
    assert rates(sweeps) == [Rate(8, 2, 3), Rate(12, 1, 2)]
    assert rates([]) == []


def test_a_texts_own_prefix_is_given_from_its_start_only(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=2, texts=KNOWN, steps=60))
    whole = token_text(loaded, KNOWN[0])
    entry = replace(whole, start=whole.start + 8)  # its first eight tokens are the entry's own prefix
    (opening,) = sweep_prefixes(loaded, [entry], lengths=[2, 4], suffix=5, variant="from_start")
    body = whole.tokens[whole.start :]
    expected = tuple(emits(loaded, whole.tokens[: entry.start + n], body[8 + n : 13 + n]) for n in (2, 4))
    assert opening.extracted == expected
    (standard,) = sweep_prefixes(loaded, [entry], lengths=[17], suffix=5)
    assert standard.extracted == (emits(loaded, loaded.prompt + body[8:25], body[25:30]),)
