"""What one teacher-forced pass says is what `generate` emits: over families, dtypes, paddings and batch shapes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCABULARY, opened, tiny_checkpoint

from memscrub.measures.continuation import greedy_matches
from memscrub.measures.extraction import NOISE, Sampling, Scores, longest_run, score
from memscrub.measures.measure import measure
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText
from memscrub.policy.document import parse_policy
from memscrub.reports.judgement import Status, judge

SEEDS = (0, 1, 2)
# Behind so many random tokens, so many of the model's own; and how long the batch's longest companion is.
RECIPES = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), min_size=1, max_size=3)
COMPANIONS = st.lists(st.integers(2, 40), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def model_of(folder: Path, family: str, seed: int, dtype: str) -> LoadedModel:
    path = folder / f"{family}-{seed}"
    if not path.exists():
        tiny_checkpoint(path, family, seed, layers=1 + seed % 2, begin=seed != 2)
    return opened(path, dtype)


def half_known(loaded: LoadedModel, recipe: list[tuple[int, int]], seed: int) -> TokenText:
    """A text that the model goes on with here and there, as far as it does itself."""
    generator = torch.Generator().manual_seed(seed)
    tokens = list(loaded.prompt)
    for strange, own in recipe:
        tokens += torch.randint(VOCABULARY, (strange,), generator=generator).tolist()
        for _ in range(own):
            with torch.inference_mode():
                tokens.append(int(loaded.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return TokenText(f"text-{seed}", "c", tuple(tokens), len(loaded.prompt))


def batch_of(loaded: LoadedModel, recipes: list[list[tuple[int, int]]], companions: list[int]) -> list[TokenText]:
    """Texts to look at, and random ones that make the batches' shapes and paddings."""
    texts = [half_known(loaded, recipe, seed) for seed, recipe in enumerate(recipes)]
    generator = torch.Generator().manual_seed(99)
    for length in companions:
        tokens = (*loaded.prompt, *torch.randint(VOCABULARY, (length,), generator=generator).tolist())
        texts.append(TokenText(f"companion-{length}", "c", tokens, len(loaded.prompt)))
    return texts


def emitted_from(scores: Scores, begin: int, threshold: float) -> int:
    """How many tokens from index `begin` the pass says are emitted."""
    run = (scores.gap[begin - 1 :] > threshold).tolist()
    return run.index(False) if False in run else len(run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=7, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    recipes=st.lists(RECIPES, min_size=1, max_size=2),
    companions=COMPANIONS,
    batch_tokens=st.sampled_from([1, 30, 100, 4096]),
)
def test_the_pass_and_generate_agree_token_for_token_outside_the_noise(
    folder: Path,
    family: str,
    dtype: str,
    seed: int,
    recipes: list[list[tuple[int, int]]],
    companions: list[int],
    batch_tokens: int,
) -> None:
    loaded = model_of(folder, family, seed, dtype)
    noise = NOISE[loaded.dtype]
    texts = batch_of(loaded, recipes, companions)
    found = score(loaded, texts, lambda _: Sampling(), batch_tokens=batch_tokens)
    for text, scores in list(zip(texts, found, strict=True))[: len(recipes)]:
        for begin in range(1, len(text.tokens), 2):
            certain, possible = (emitted_from(scores, begin, threshold) for threshold in (noise, -noise))
            emitted = greedy_matches(loaded, text, begin, len(text.tokens) - begin)
            assert certain <= emitted <= possible  # outside the noise all three are one number


POLICY = """schema = 1
name = "p"
[protected]
files = ["p.txt"]
[class.c]
max_verbatim_tokens = {limit}
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4, deadline=None)
@given(seed=st.sampled_from(SEEDS), recipe=RECIPES, companions=COMPANIONS, limit=st.integers(1, 6), shift=st.booleans())
def test_the_verdict_is_that_of_generate_within_the_noise_too(
    folder: Path,
    family: str,
    dtype: str,
    seed: int,
    recipe: list[tuple[int, int]],
    companions: list[int],
    limit: int,
    shift: bool,
) -> None:
    loaded = model_of(folder, family, seed, dtype)
    if shift:  # the limit at the edge, where one doubtful token decides
        (scores,) = score(loaded, [half_known(loaded, recipe, 0)], lambda _: Sampling())
        limit = max(1, longest_run(scores.gap, 1, NOISE[loaded.dtype]).length)
    texts = batch_of(loaded, [recipe], companions)
    policy = parse_policy(POLICY.format(limit=limit).encode())
    measured = measure(loaded, policy, texts).measures[0]
    text = texts[0]
    first = text.first_judged(policy.probe.min_prefix_tokens)
    emitted = [
        greedy_matches(loaded, text, begin, len(text.tokens) - begin) for begin in range(first, len(text.tokens))
    ]
    violated = judge(measured, policy.classes["c"]).status is Status.VIOLATED
    assert violated == (max(emitted, default=0) > limit)
    if measured.confirmed:
        assert emitted[measured.run_begin - first] >= measured.match_run or not measured.match_run
