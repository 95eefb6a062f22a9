"""The measuring engine: the same values as text by text, whatever the batch, the memory and the form of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, VOCABULARY, opened, random_text, tiny_checkpoint, token_text
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import memscrub.measures.measure
from memscrub.errors import IncompleteError, UsageError
from memscrub.measures import passes
from memscrub.measures.extraction import near_verbatim_bound
from memscrub.measures.measure import measure
from memscrub.measures.passes import halving, shared_prefix_forced, streamed, teacher_forced
from memscrub.models import architecture, model
from memscrub.models.model import LoadedModel, choose_device
from memscrub.models.tokens import TokenText
from memscrub.policy.document import parse_policy
from memscrub.reports.judgement import judge

EXHAUSTED = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "python": MemoryError,
}


@dataclass(frozen=True)
class LogP:
    """Log-probability at a temperature, and whether the true token is the likeliest."""

    temperature: float = 1.0

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        assert logits.dtype == torch.float32
        log_p = (logits / self.temperature).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return log_p, logits.argmax(-1) == targets


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=5))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=6))


def texts_of(loaded: LoadedModel, *lengths: int) -> list[TokenText]:
    return [token_text(loaded, random_text(seed, length)) for seed, length in enumerate(lengths)]


def alone(loaded: LoadedModel, text: TokenText, reader: LogP, first: int = 1) -> tuple[Tensor, ...]:
    """The slow definition: the model's own logits of one unpadded text."""
    with torch.inference_mode():
        logits = loaded.logits(torch.tensor([text.tokens]))[0]
    return reader(logits[first - 1 : -1], torch.tensor(text.tokens[first:]))


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-4, rtol=0)
    assert len(found[1]) == len(expected[1])


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    batch_tokens=st.sampled_from([1, 40, 4096]),
    firsts=st.lists(st.integers(0, 12), min_size=8, max_size=8),
    piece=st.sampled_from([1, 7, 10**6]),
)
def test_values_are_those_of_each_text_alone(
    loaded: LoadedModel, lengths: list[int], batch_tokens: int, firsts: list[int], piece: int
) -> None:
    texts = texts_of(loaded, *lengths)
    first = {text.tokens: value for text, value in zip(texts, firsts, strict=False)}
    reader = {text.tokens: LogP(1.0 + i % 2) for i, text in enumerate(texts)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PIECE_BYTES, "cpu", piece * 4 * VOCABULARY)
        found = teacher_forced(
            loaded,
            texts,
            lambda text: reader[text.tokens],
            first_of=lambda text: first[text.tokens],
            batch_tokens=batch_tokens,
        )
    for text, values in zip(texts, found, strict=True):
        assert_same(values, alone(loaded, text, reader[text.tokens], max(1, first[text.tokens])))


def test_only_wanted_positions_are_projected_and_only_so_many_at_a_time(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    project = LoadedModel.unembed
    monkeypatch.setattr(LoadedModel, "unembed", lambda self, hidden: rows.append(len(hidden)) or project(self, hidden))
    monkeypatch.setitem(model.PIECE_BYTES, "cpu", 5 * 4 * VOCABULARY)
    texts = texts_of(llama, 3, 30, 9, 17)
    teacher_forced(llama, texts, lambda _: LogP(), first_of=lambda text: 3)
    assert sum(rows) == sum(len(text.tokens) - 3 for text in texts)
    assert max(rows) == 5


def test_equal_readers_read_a_batch_together(llama: LoadedModel) -> None:
    calls: list[int] = []

    @dataclass(frozen=True)
    class Counting:
        name: str

        def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            calls.append(len(targets))
            return (targets,)

    texts = texts_of(llama, 4, 5, 6, 7)
    found = teacher_forced(llama, texts, lambda text: Counting("odd" if len(text.tokens) % 2 else "even"))
    assert sorted(calls) == [4 + 6, 5 + 7]
    assert [values[0].tolist() for values in found] == [list(text.tokens[1:]) for text in texts]


def test_the_same_texts_and_budget_give_the_same_bits(loaded: LoadedModel) -> None:
    texts = texts_of(loaded, 5, 21, 9, 9, 30)
    one, two = (teacher_forced(loaded, texts, lambda _: LogP(), batch_tokens=50) for _ in range(2))
    assert all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


# -- memory --------------------------------------------------------------------------------------------------


def small_memory(monkeypatch: pytest.MonkeyPatch, most: int, exhausted: Callable[[], BaseException]) -> list[int]:
    """A model that runs out of memory in batches of more than `most` tokens; the sizes it was asked for."""
    asked: list[int] = []
    features = LoadedModel.features

    def limited(self: LoadedModel, tokens: Tensor, past: Any = None, **more: Any) -> Any:
        asked.append(tokens.numel())
        if tokens.numel() > most:
            raise exhausted()
        return features(self, tokens, past, **more)

    monkeypatch.setattr(LoadedModel, "features", limited)
    return asked


@pytest.mark.parametrize("exhausted", EXHAUSTED.values(), ids=EXHAUSTED)
def test_out_of_memory_halves_the_batch_and_those_that_follow(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch, exhausted: Callable[[], BaseException]
) -> None:
    texts = texts_of(llama, *[15] * 16)
    expected = teacher_forced(llama, texts, lambda _: LogP())
    asked = small_memory(monkeypatch, 80, exhausted)
    found = teacher_forced(llama, texts, lambda _: LogP())
    for values, others in zip(found, expected, strict=True):
        assert_same(values, others)
    assert asked == [256, 128, 64, 64, 64, 64]


def test_a_single_text_that_does_not_fit_ends_the_run_with_advice(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(monkeypatch, 10, MemoryError)
    with pytest.raises(IncompleteError, match="batch_tokens"):
        teacher_forced(llama, texts_of(llama, 4, 30), lambda _: LogP())


def test_other_errors_of_the_model_are_not_taken_for_a_lack_of_memory(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = small_memory(monkeypatch, 10, lambda: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        teacher_forced(llama, texts_of(llama, 30, 30), lambda _: LogP())
    assert len(asked) == 1


def test_halving_calls_again_with_half_the_budget_until_it_fits() -> None:
    def call(budget: int) -> int:
        if budget > 20:
            raise MemoryError
        return budget

    assert halving(call, 100) == 12
    with pytest.raises(IncompleteError):
        halving(lambda budget: call(21), 100)


# -- streams -------------------------------------------------------------------------------------------------


def test_a_stream_gives_each_text_its_values_in_order_and_reads_no_further_than_it_may(llama: LoadedModel) -> None:
    texts = texts_of(llama, *[3 + (7 * i) % 11 for i in range(23)])
    taken = 0

    def source() -> Iterator[TokenText]:
        nonlocal taken
        for text in texts:
            taken += 1
            yield text

    done: list[int] = []
    ahead = []
    for number, (text, values) in enumerate(
        streamed(llama, source(), lambda _: LogP(), lookahead=5, batch_tokens=30, progress=done.append)
    ):
        assert text is texts[number]
        assert_same(values, alone(llama, text, LogP()))
        ahead.append(taken - number)
    assert len(ahead) == 23
    assert max(ahead) == 5
    assert done == sorted(done)
    assert done[-1] == 23


def test_what_a_stream_has_given_is_not_lost_when_a_later_text_fails(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_memory(monkeypatch, 20, MemoryError)
    stream = streamed(llama, texts_of(llama, 5, 6, 30, 7), lambda _: LogP(), lookahead=2)
    assert len([next(stream) for _ in range(2)]) == 2
    with pytest.raises(IncompleteError):
        next(stream)


# -- one prefix, many continuations --------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    prefix=st.integers(1, 20),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    batch_tokens=st.sampled_from([1, 60, 4096]),
)
def test_a_shared_prefix_changes_nothing(
    loaded: LoadedModel, prefix: int, lengths: list[int], batch_tokens: int
) -> None:
    given_tokens, *rest = (
        text.tokens[-length:] if length else () for text, length in zip(
            texts_of(loaded, 20, *[12] * len(lengths)), [prefix, *lengths], strict=True
        )
    )  # fmt: skip
    found = shared_prefix_forced(loaded, given_tokens, rest, LogP(), batch_tokens=batch_tokens)
    for tokens, values in zip(rest, found, strict=True):
        whole = TokenText("t", "c", given_tokens + tokens, prefix)
        assert_same(values, alone(loaded, whole, LogP(), prefix))


# -- hidden states and the head ------------------------------------------------------------------------------


def built(name: str, **settings: Any) -> LoadedModel:
    """A two-layer model of a family with random weights."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = AutoConfig.for_model(
        name, vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3, **small, **settings
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    device = torch.device("cpu")
    return LoadedModel(made, None, architecture.FAMILIES[name], (1,), device, torch.float32, 96, 64)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("granite", {"logits_scaling": 4.0, "intermediate_size": 48, "num_key_value_heads": 2}),
        ("gemma2", {"final_logit_softcapping": 2.0, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}),
        ("phi", {"intermediate_size": 48}),  # a bias in the head
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),  # a projection before the head
    ],
)
def test_hidden_states_and_head_give_the_logits_of_families_that_scale_them(
    name: str, settings: dict[str, Any]
) -> None:
    loaded = built(name, **settings)
    assert loaded.projects
    text = TokenText("t", "c", (1, 5, 9, 80, 33, 7), 1)
    (values,) = teacher_forced(loaded, [text], lambda _: LogP())
    assert_same(values, alone(loaded, text, LogP()))


def test_a_head_that_does_something_unknown_is_noticed_and_the_models_own_logits_are_used() -> None:
    loaded = built("llama", intermediate_size=48)
    plain = loaded.model.forward

    def sharpened(*args: Any, **named: Any) -> Any:
        output = plain(*args, **named)
        output.logits = output.logits * 1.7
        return output

    loaded.model.forward = sharpened  # type: ignore[method-assign]
    assert not loaded.projects
    texts = [TokenText("t", "c", (1, 5, 9, 80, 33, 7), 1), TokenText("u", "c", (1, 5, 9), 1)]
    for text, values in zip(texts, teacher_forced(loaded, texts, lambda _: LogP()), strict=True):
        assert_same(values, alone(loaded, text, LogP()))
    (values,) = shared_prefix_forced(loaded, (1, 5), [(9, 80, 33, 7)], LogP())
    assert_same(values, alone(loaded, texts[0], LogP(), first=2))


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_fastest_device_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert choose_device("auto") == torch.device(chosen)


@pytest.mark.parametrize("name", ["meta", "hpu", "nonsense", ""])
def test_a_device_that_cannot_compute_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="is not available here"):
        choose_device(name)


# -- decoding only where needed ------------------------------------------------------------------------------

KNOWN = [random_text(seed, 40) for seed in (0, 1)]
NEAR = """schema = 1
name = "n"
[protected]
files = ["p.txt"]
[class.c]
max_near_verbatim = 0.9
[probe]
near_verbatim_prefix = 8
near_verbatim_tokens = 32
offsets = [0]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp("known"), "llama", seed=4, texts=KNOWN, steps=60))


def test_screening_decodes_what_is_known_and_changes_no_judgement(trained: LoadedModel) -> None:
    policy = parse_policy(NEAR.encode())
    texts = [token_text(trained, text) for text in (*KNOWN, *(random_text(seed, 40) for seed in range(2, 30)))]
    every = measure(trained, policy, texts)
    some = measure(trained, policy, texts, screen=True)
    screened = {index for index, each in enumerate(some.measures) if each.screened}
    assert not any(each.screened for each in every.measures)
    assert not screened & {0, 1}
    assert len(screened) > 20
    assert {each.opening.text for each in some.continuations} == set(range(len(texts))) - screened  # one opening each
    for index, (one, other) in enumerate(zip(every.measures, some.measures, strict=True)):
        assert judge(one, policy.classes["c"]).status is judge(other, policy.classes["c"]).status
        assert index in screened or one == other
        assert replace(one, near_verbatim=None) == replace(other, near_verbatim=None, screened=False)


def test_a_text_of_which_an_opening_was_not_decoded_says_so_whatever_another_shows(trained: LoadedModel) -> None:
    policy = parse_policy(NEAR.replace("offsets = [0]", "offsets = [0, 40]").encode())
    # The first forty words are known by heart, so their opening is decoded; what follows the other one is not known.
    text = f"{KNOWN[0]} {random_text(77, 20)}"
    (found,) = (some := measure(trained, policy, [token_text(trained, text)], screen=True)).measures
    (decoded,) = some.continuations
    assert decoded.similarity == found.near_verbatim == 1.0 and found.screened


def test_classes_whose_limits_are_made_of_measured_values_are_never_screened(trained: LoadedModel) -> None:
    policy = parse_policy(NEAR.replace("max_near", "like_controls = true\nmax_near").encode())
    text = token_text(trained, random_text(9, 40))
    assert not measure(trained, policy, [text], screen=True).measures[0].screened


def test_measures_do_not_need_the_continuations_to_be_kept(trained: LoadedModel) -> None:
    policy = parse_policy(NEAR.encode())
    texts = [token_text(trained, text) for text in KNOWN]
    bare, full = measure(trained, policy, texts, keep_continuations=False), measure(trained, policy, texts)
    assert bare.measures == full.measures
    assert (len(bare.continuations), len(full.continuations)) == (0, 2)


def test_decoding_that_runs_out_of_memory_goes_on_with_less(
    trained: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, texts = parse_policy(NEAR.encode()), [token_text(trained, text) for text in KNOWN]
    expected = measure(trained, policy, texts).measures
    decode = memscrub.measures.measure.continue_greedily

    def limited(loaded: LoadedModel, starts: Any, *, batch_tokens: int, **more: Any) -> Any:
        if batch_tokens > 100:
            raise torch.cuda.OutOfMemoryError
        return decode(loaded, starts, batch_tokens=batch_tokens, **more)

    monkeypatch.setattr(memscrub.measures.measure, "continue_greedily", limited)
    assert measure(trained, policy, texts).measures == expected


@pytest.mark.parametrize(
    ("hits", "chance", "expected"),
    [
        ("0" * 50, 0.0, 0.15 + 3.5 / 50),
        ("0" * 50, 0.6, 0.7),
        ("10" * 25, 0.0, 0.25 + 0.15 + 3.5 / 50),  # half of the tokens, none in a run
        ("1" * 25 + "0" * 25, 0.0, 0.5 + 0.15 + 3.5 / 50),  # half of the tokens, all in a run
        ("1" * 25 + "0" * 25, 0.5, 0.85),
        ("0" * 7 + "1", 0.0, 1 / 16 + 0.15 + 3.5 / 8),
        ("1" * 50, 0.3, 1.0),
    ],
)
def test_the_near_verbatim_bound_weighs_runs_and_chance(hits: str, chance: float, expected: float) -> None:
    gaps = [5.0, *(1.0 if hit == "1" else -1.0 for hit in hits), 5.0]
    assert near_verbatim_bound(torch.tensor(gaps), 2, len(hits), 1e-3, chance) == pytest.approx(expected)


def test_within_the_noise_counts_as_emitted_for_the_near_verbatim_bound() -> None:
    gaps = torch.full((40,), -1e-4)
    assert near_verbatim_bound(gaps, 1, 40, 1e-3, 0.0) == 1.0


def test_a_batch_larger_than_a_cpu_likes_is_cut(llama: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "CPU_TOKENS", 32)
    asked = small_memory(monkeypatch, 10**9, MemoryError)
    teacher_forced(llama, texts_of(llama, *[15] * 4), lambda _: LogP())
    assert asked == [32, 32]
