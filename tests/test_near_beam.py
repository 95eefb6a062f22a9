"""Near-verbatim mass: the bounds enclose what adding up every continuation gives, and only get better with width."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCABULARY, ids_of, opened, random_text, tiny_checkpoint
from rapidfuzz.distance import Levenshtein

from memscrub.errors import NumericalError, UsageError
from memscrub.measures.continuation import Opening
from memscrub.measures.extraction import IMPOSSIBLE, Sampling
from memscrub.measures.near_beam import NearMass, first_band, near_verbatim_mass, next_bands, reach
from memscrub.models.model import LoadedModel

KNOWN = [random_text(seed, 16) for seed in range(3)]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Texts half learned: their continuations are likely, and so are others."""
    path = tmp_path_factory.mktemp(request.param)
    return opened(tiny_checkpoint(path, request.param, seed=2, texts=KNOWN, steps=12))


def opening(loaded: LoadedModel, text: str, given_words: int, length: int) -> Opening:
    ids = ids_of(text)
    end = given_words + length
    return Opening(0, 0, loaded.prompt + tuple(ids[:given_words]), tuple(ids[given_words:end]))


def every_continuation(loaded: LoadedModel, start: Opening, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Probability of every continuation that the sampling can draw, each scored without a cache."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    k = min(sampling.top_k, VOCABULARY)
    for _ in start.truth:
        with torch.inference_mode():
            logits = loaded.logits(torch.tensor([start.given + said for said in found]))[:, -1].double()
        values, tokens = (logits / sampling.temperature).topk(k)
        shares = values.softmax(-1).tolist()
        found = {
            (*said, token): p * share
            for (said, p), row, names in zip(found.items(), shares, tokens.tolist(), strict=True)
            for token, share in zip(names, row, strict=True)
        }
    return found


def near_mass(every: dict[tuple[int, ...], float], truth: tuple[int, ...], distance: int) -> float:
    return sum(p for said, p in every.items() if Levenshtein.distance(said, truth) <= distance)


def bounds(loaded: LoadedModel, start: Opening, sampling: Sampling, distance: int, width: int) -> tuple[float, float]:
    (found,) = near_verbatim_mass(loaded, [start], sampling, distance=distance, width=width)
    return math.exp(found.lower), math.exp(found.upper)


@pytest.mark.parametrize("sampling", [Sampling(4, 1.0), Sampling(3, 0.7), Sampling(4, 2.0)], ids=["1", "0.7", "2"])
@pytest.mark.parametrize("text", KNOWN[:2], ids=["one", "two"])
def test_the_bounds_enclose_the_exact_mass_and_meet_it(loaded: LoadedModel, text: str, sampling: Sampling) -> None:
    start = opening(loaded, text, 6, 5)
    every = every_continuation(loaded, start, sampling)
    for distance in (0, 1, 2, 4):
        exact = near_mass(every, start.truth, distance)
        verbatim = every.get(start.truth, 0.0)
        before = (0.0, 1.0)
        for width in (1, 2, 3, 7, 20, 60):
            lower, upper = bounds(loaded, start, sampling, distance, width)
            assert lower <= exact + 1e-6 and upper >= exact - 1e-6
            assert lower >= verbatim - 1e-6
            assert lower >= before[0] - 1e-6 and upper <= before[1] + 1e-6, "a wider search is worse"
            before = lower, upper
        lower, upper = bounds(loaded, start, sampling, distance, sampling.top_k**5)
        assert lower == pytest.approx(exact, abs=1e-6) and upper == pytest.approx(exact, abs=1e-6)


def test_over_the_whole_vocabulary_the_mass_is_exact_too(loaded: LoadedModel) -> None:
    start, sampling = opening(loaded, KNOWN[0], 6, 2), Sampling(VOCABULARY)
    exact = near_mass(every_continuation(loaded, start, sampling), start.truth, 1)
    lower, upper = bounds(loaded, start, sampling, 1, VOCABULARY**2)
    assert 0 < exact < 1
    assert lower == pytest.approx(exact, abs=1e-6) and upper == pytest.approx(exact, abs=1e-6)


def test_near_mass_is_more_than_the_verbatim_probability_where_one_word_is_doubtful(loaded: LoadedModel) -> None:
    gains = []
    for text in KNOWN:
        start = opening(loaded, text, 8, 6)
        verbatim = every_continuation(loaded, start, Sampling(3)).get(start.truth, 0.0)
        gains.append(bounds(loaded, start, Sampling(3), 1, 20)[0] - verbatim)
    assert min(gains) >= -1e-6 and max(gains) > 1e-3


@pytest.mark.parametrize("batch_tokens", [1, 300, 8192])
def test_openings_in_one_batch_are_what_they_are_alone(loaded: LoadedModel, batch_tokens: int) -> None:
    shapes = [(6, 8), (4, 8), (6, 8), (6, 3), (6, 8)]
    starts = [opening(loaded, KNOWN[i % 3], *shape) for i, shape in enumerate(shapes)]
    told: list[int] = []
    found = near_verbatim_mass(
        loaded, starts, Sampling(5), distance=2, width=6, batch_tokens=batch_tokens, progress=told.append
    )
    for start, mass in zip(starts, found, strict=True):
        (alone,) = near_verbatim_mass(loaded, [start], Sampling(5), distance=2, width=6)
        assert math.exp(mass.lower) == pytest.approx(math.exp(alone.lower), abs=1e-5)
        assert math.exp(mass.upper) == pytest.approx(math.exp(alone.upper), abs=1e-5)
    assert told[-1] == len(starts) and told == sorted(told)


def test_a_truth_that_cannot_be_drawn_has_no_mass(loaded: LoadedModel) -> None:
    start = opening(loaded, KNOWN[0], 6, 5)
    with torch.inference_mode():
        worst = int(loaded.logits(torch.tensor([start.given]))[0, -1].argmin())
    never = Opening(0, 0, start.given, (worst,) * 5)
    assert near_verbatim_mass(loaded, [never], Sampling(2), distance=0) == [NearMass(IMPOSSIBLE, IMPOSSIBLE)]


def test_any_continuation_is_near_when_all_tokens_may_differ(loaded: LoadedModel) -> None:
    start = opening(loaded, KNOWN[1], 6, 4)
    (found,) = near_verbatim_mass(loaded, [start], Sampling(40), distance=4)
    assert found.lower == pytest.approx(0.0, abs=1e-9) and found.upper == pytest.approx(0.0, abs=1e-9)


def test_an_unlikely_truth_is_followed_though_no_beam_is_left_for_it(loaded: LoadedModel) -> None:
    """With one beam and a truth made of the third likeliest tokens, the bound is still the truth's probability."""
    start = opening(loaded, KNOWN[0], 6, 5)
    said: tuple[int, ...] = ()
    for _ in range(5):
        with torch.inference_mode():
            said += (int(loaded.logits(torch.tensor([start.given + said]))[0, -1].topk(3).indices[2]),)
    third = Opening(0, 0, start.given, said)
    verbatim = every_continuation(loaded, third, Sampling(3))[said]
    lower, _ = bounds(loaded, third, Sampling(3), 0, 1)
    assert lower == pytest.approx(verbatim, rel=1e-3) and verbatim > 0


def test_impossible_settings_are_refused(loaded: LoadedModel) -> None:
    for wrong in ({"distance": -1}, {"width": 0}):
        with pytest.raises(UsageError, match="at least"):
            near_verbatim_mass(loaded, [opening(loaded, KNOWN[0], 6, 4)], Sampling(), **wrong)
    assert near_verbatim_mass(loaded, [], Sampling()) == []


def test_a_model_that_says_nothing_finite_is_refused(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=5))
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(NumericalError, match="not finite"):
        near_verbatim_mass(loaded, [opening(loaded, KNOWN[0], 6, 4)], Sampling())


WORDS_OF_THREE = st.lists(st.integers(0, 2), min_size=1, max_size=7)


@settings(max_examples=200, deadline=None)
@given(truth=WORDS_OF_THREE, said=WORDS_OF_THREE, distance=st.integers(0, 4))
def test_a_band_is_the_edit_distance_to_the_truths_beginnings(truth: list[int], said: list[int], distance: int) -> None:
    said = said[: len(truth)]
    band = first_band(len(truth), distance)[None]
    for step, token in enumerate(said):
        band = next_bands(band, torch.tensor([[token]]), torch.tensor(truth), step, distance)[:, 0]
        for b, value in enumerate(band[0].tolist()):
            end = step + 1 + b - distance
            exact = Levenshtein.distance(said[: step + 1], truth[:end]) if 0 <= end <= len(truth) else math.inf
            assert value == exact or (value > distance and exact > distance)


@settings(max_examples=80, deadline=None)
@given(
    truth=st.lists(st.integers(0, 1), min_size=1, max_size=5),
    said=st.lists(st.integers(0, 2), max_size=5),
    distance=st.integers(0, 3),
)
def test_reach_says_whether_some_and_whether_all_endings_are_near(
    truth: list[int], said: list[int], distance: int
) -> None:
    """Token 2 is not in the truth, so the worst ending is among those tried."""
    said = said[: len(truth)]
    band = first_band(len(truth), distance)[None]
    for step, token in enumerate(said):
        band = next_bands(band, torch.tensor([[token]]), torch.tensor(truth), step, distance)[:, 0]
    endings = itertools.product(range(3), repeat=len(truth) - len(said))
    near = [Levenshtein.distance([*said, *ending], truth) <= distance for ending in endings]
    some, every = reach(band[0], len(said), len(truth), distance)
    assert (bool(some), bool(every)) == (any(near), all(near))
