"""Exposure: candidates are the secret's like, and their ranking is what scoring every text by itself gives."""

from __future__ import annotations

import math
import random
import string
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, opened, random_text, tiny_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from memscrub.errors import NumericalError, UsageError
from memscrub.maths.secret_candidates import candidates, shape_of
from memscrub.measures.exposure import Exposure, exposures, extrapolated_bits
from memscrub.measures.extraction import IMPOSSIBLE, Sampling, score
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import tokenize
from memscrub.texts.protected import ProtectedText

SECRETS = st.text("01279abcdefxyzABFZéñжЖ北 -.:@/", min_size=1, max_size=14)


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return opened(tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=5))


def entry(text: str, *secrets: tuple[int, int], prefix: str | None = None, name: str = "t") -> ProtectedText:
    return ProtectedText(name, text, "c", secrets, source=None, prefix=prefix, file="texts.txt", line=1)


def draw(secret: str, count: int = 50, *, seed: int = 0, given: str = "") -> tuple[str, ...]:
    return candidates(secret, count, random.Random(seed), given=given).values


def spelling(loaded: LoadedModel) -> LoadedModel:
    """The same model with a tokenizer of single characters, of which some pairs merge, across a secret's edge too."""
    alphabet = string.ascii_lowercase + string.digits + " -@."
    merges = [("a", "1"), ("1", "2"), ("3", "4"), ("34", "5"), ("9", " ")]
    pieces = [*alphabet, *map("".join, merges), "<s>"]
    model = BPE({piece: i for i, piece in enumerate(pieces)}, merges)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), bos_token="<s>")
    return replace(loaded, tokenizer=tokenizer, prompt=(pieces.index("<s>"),))


def log_p_up_to(loaded: LoadedModel, text: str, end: int) -> float:
    """Log-probability of the tokens up to the last that overlaps the text's first `end` characters."""
    encoded = loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    count = sum(begin < end for begin, _ in encoded["offset_mapping"])
    ids = [*loaded.prompt, *encoded["input_ids"][:count]]
    log_p = loaded.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(float(log_p[i - 1, ids[i]]) for i in range(1, len(ids)))


# -- candidates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("4111 1111 1111 1111", "digits"),
        ("+44 505-9535", "digits"),
        ("deadbeef01", "hex"),
        ("550E8400-E29B-41D4", "hex"),
        ("jane.doe42@corp.example", "email"),
        ("Maria Keller", "name"),
        ("O'Brien", "name"),
        ("J. R. van der Berg", "name"),
        ("MARIA KELLER", "name"),
        ("PASSWORD", "mixed"),
        ("AB-1234x", "mixed"),
        ("cafe", "mixed"),
        ("the patient", "mixed"),
        ("Иван Петров", "mixed"),
    ],
)
def test_a_shape_is_read_off_the_characters(secret: str, kind: str) -> None:
    assert shape_of(secret).kind == kind


@settings(max_examples=80, deadline=None)
@given(secret=SECRETS, count=st.integers(1, 60), seed=st.integers(0, 9))
def test_candidates_are_distinct_and_never_the_secret(secret: str, count: int, seed: int) -> None:
    shape, found = shape_of(secret), candidates(secret, count, random.Random(seed))
    assert shape.value(shape.own) == secret
    assert secret not in found.values
    assert len(set(found.values)) == len(found.values) == min(count, shape.size - 1)
    assert found.complete == (count >= shape.size - 1)
    assert found.space_bits == pytest.approx(math.log2(shape.size))
    assert found == candidates(secret, count, random.Random(seed))


@settings(max_examples=80, deadline=None)
@given(secret=SECRETS)
def test_candidates_have_the_secrets_pattern(secret: str) -> None:
    def pattern(value: str) -> str:
        letters = "".join("A" if char.isupper() else "a" if char.isalpha() else char for char in value)
        return "".join("0" if char.isdigit() else char for char in letters)

    def separators(value: str) -> str:
        return "".join(char for char in value if not char.isalnum())

    kind = shape_of(secret).kind
    for value in draw(secret, 20):
        assert separators(value) == separators(secret)
        if kind == "hex":
            assert len(value) == len(secret) and {c for c in value if c.isalnum()} <= set(string.hexdigits)
        elif kind in ("digits", "mixed"):
            assert pattern(value) == pattern(secret)


def test_a_small_space_is_counted_in_full() -> None:
    found = candidates("042", 1000, random.Random(0))
    assert found.complete
    assert set(found.values) == {f"{number:03}" for number in range(1000)} - {"042"}
    assert not candidates("042", 998, random.Random(0)).complete


def test_an_email_keeps_its_domain_and_its_separators() -> None:
    for value in draw("jane.doe42@corp.example"):
        local, domain = value.split("@")
        first, rest = local.split(".")
        assert domain == "corp.example"
        assert first.isalpha() and first.islower() and rest[:-2].isalpha() and rest[-2:].isdigit()


def test_words_that_the_text_before_holds_stay() -> None:
    before = "Customer Jane Doe, mail "
    assert set(draw("jane.doe4@x.org", given=before)) == {f"jane.doe{i}@x.org" for i in range(10) if i != 4}
    assert all(value.startswith("Jane ") for value in draw("Jane Miller", given=before))
    assert draw("jane.doe@x.org", given=before) == ()
    assert "042" not in draw("042", 999, given="042") and len(draw("042", 999, given="042")) == 999


def test_names_keep_their_case_initials_and_particles() -> None:
    for value in draw("J. van Berg-Meyer"):
        initial, particle, last = value.split(" ")
        assert initial[0].isupper() and initial[1:] == "." and particle == "van"
        assert all(part[0].isupper() and part[1:].islower() for part in last.split("-"))
    assert all(value.isupper() for value in draw("MARIA KELLER"))


def test_candidates_show_nothing_in_a_repr() -> None:
    assert "Keller" not in repr(shape_of("Maria Keller"))
    assert not any(value in repr(candidates("1234", 9, random.Random(0))) for value in ("1234", *draw("1234", 9)))


def test_no_candidates_at_all_are_not_asked_for() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        candidates("123", 0, random.Random(0))


# -- exposure ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["34", "4512", "12-9", "x1"])
def test_the_rank_is_that_of_scoring_every_text_by_itself(loaded: LoadedModel, secret: str) -> None:
    """ "a" merges with a "1" behind it and "9" with the space: candidates change tokens outside the secret."""
    spelled = spelling(loaded)
    before, after = "pin 77 a", " then on"
    span = (len(before), len(before) + len(secret))
    (found,) = exposures(spelled, entry(before + secret + after, span), count=100, seed=3)
    assert found is not None
    drawn = candidates(secret, 100, random.Random(f"3/t/{span[0]}"), given=before)
    true = log_p_up_to(spelled, before + secret + after, span[1])
    others = [log_p_up_to(spelled, before + value + after, span[1]) for value in drawn.values]
    assert found.rank == 1 + sum(other >= true for other in others)
    assert (found.candidates, found.complete) == (len(drawn.values), drawn.complete)
    assert found.bits == pytest.approx(math.log2((len(others) + 1) / found.rank))


def test_token_ranks_and_log_probability_are_the_teacher_forced_pass(loaded: LoadedModel) -> None:
    text = entry(random_text(1, 12), (16, 23))  # three words
    (found,) = exposures(loaded, text, count=5)
    (tokens,) = tokenize(loaded, [text])
    assert found is not None and (found.begin, found.end) == tokens.secrets[0]
    logits = loaded.logits(torch.tensor([tokens.tokens]))[0].double()
    log_p = logits.log_softmax(-1)
    span = range(found.begin, found.end)
    assert found.log_probability == pytest.approx(sum(float(log_p[i - 1, tokens.tokens[i]]) for i in span), abs=1e-4)
    assert found.token_ranks == tuple(1 + int((logits[i - 1] > logits[i - 1, tokens.tokens[i]]).sum()) for i in span)
    for top_k in (found.top_k_reach, found.top_k_reach - 1):
        (scores,) = score(loaded, [tokens], lambda _, k=top_k: Sampling(top_k=max(k, 1)))
        reached = all(float(scores.log_p[i - 1]) > IMPOSSIBLE for i in span)
        assert reached == (top_k >= found.top_k_reach)


@pytest.mark.parametrize("batch_tokens", [1, 37, 8192])
def test_batches_change_nothing(loaded: LoadedModel, batch_tokens: int) -> None:
    text = entry(random_text(2, 9), (5, 7), (17, 19), prefix="w00 w01 ")
    one, other = exposures(loaded, text, batch_tokens=batch_tokens), exposures(loaded, text, batch_tokens=300)
    for a, b in zip(one, other, strict=True):
        assert a is not None and b is not None
        assert a.log_probability == pytest.approx(b.log_probability, abs=1e-4)
        assert replace(a, log_probability=0.0) == replace(b, log_probability=0.0)


def test_a_learned_secret_is_exposed_and_an_unknown_one_is_not(tmp_path: Path) -> None:
    learned = [random_text(seed, 16) for seed in range(3)]
    other = [random_text(seed, 16) for seed in range(100, 108)]
    loaded = opened(tiny_checkpoint(tmp_path, "llama", 1, learned, steps=120))

    def at_word_twelve(text: str) -> Exposure:
        (found,) = exposures(loaded, entry(text, (12 * 4 + 1, 12 * 4 + 3)))  # the digits of the twelfth word
        assert found is not None and found.complete and found.candidates == 99
        return found

    for text in learned:
        found = at_word_twelve(text)
        assert found.bits == pytest.approx(math.log2(100)) and found.top_k_reach == 1 and not found.at_least
    unknown = [at_word_twelve(text).bits for text in other]
    assert sum(unknown) / len(unknown) < 3


def test_values_that_tokenise_alike_tie_and_expose_nothing(loaded: LoadedModel) -> None:
    """No word of this secret's shape is in the vocabulary: all are the unknown token, and equals count as likelier."""
    (found,) = exposures(loaded, entry("w01 w02 8888 w03", (8, 12)), count=64)
    assert found is not None and found.rank == 65 and found.bits == 0.0


def test_a_sampled_first_rank_is_only_a_lower_bound(tmp_path: Path) -> None:
    text = random_text(3, 16)
    loaded = opened(tiny_checkpoint(tmp_path, "llama", 1, [text], steps=60))
    (sampled,) = exposures(loaded, entry(text, (49, 51)), count=20)
    assert sampled is not None and sampled.rank == 1 and not sampled.complete
    assert sampled.at_least and sampled.bits == pytest.approx(math.log2(21))
    assert sampled.extrapolated_bits is None  # 20 scores are too few to fit


def test_a_secret_in_which_nothing_can_vary_has_no_exposure(loaded: LoadedModel) -> None:
    spelled = spelling(loaded)
    text = entry("jane doe -- jane-doe@x.org 12", (9, 11), (12, 26), (27, 29))
    dashes, mail, digits = exposures(spelled, text)
    assert dashes is None and mail is None
    assert digits is not None and digits.candidates == 99
    assert exposures(spelled, entry("no secret")) == ()


def test_a_secret_whose_first_token_nothing_predicts_has_no_exposure(loaded: LoadedModel) -> None:
    nameless = replace(spelling(loaded), prompt=())
    assert exposures(nameless, entry("4711 is it", (0, 4))) == (None,)
    (found,) = exposures(nameless, entry("it is 4711", (6, 10)))
    assert found is not None and found.begin > 0


def test_candidates_longer_than_the_model_reads_are_left_out(loaded: LoadedModel) -> None:
    spelled = spelling(loaded)
    text = entry("pin 345", (4, 7))  # the secret is one token, most others are three
    full = replace(spelled, max_positions=len(tokenize(spelled, [text])[0].tokens))
    (cut,) = exposures(full, text)
    (whole,) = exposures(spelled, text)
    assert cut is not None and whole is not None
    assert whole.complete and whole.candidates == 999
    assert not cut.complete and cut.candidates == 0 and cut.bits == 0.0
    with pytest.raises(UsageError, match="more than the"):
        exposures(replace(full, max_positions=full.max_positions - 1), text)


def test_a_model_that_says_nothing_finite_is_refused(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=5))
    head = loaded.model.get_output_embeddings()
    with torch.no_grad():
        head.weight.fill_(math.nan)
    with pytest.raises(NumericalError, match="not finite"):
        exposures(loaded, entry(random_text(1, 5), (5, 7)))


def test_the_choice_of_candidates_depends_on_the_seed_only(loaded: LoadedModel) -> None:
    text = entry(random_text(1, 12), (16, 23))
    again = [exposures(loaded, text, count=30, seed=seed) for seed in (0, 0, 1, 2, 3, 4)]
    assert again[0] == again[1]
    assert len({each[0] for each in again}) > 1


# -- extrapolation -------------------------------------------------------------------------------------------


def normal_scores(count: int) -> torch.Tensor:
    """Quantiles of the standard normal distribution: a sample without chance."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


@pytest.mark.parametrize("deviations", [-3.0, 0.0, 2.0, 6.0])
def test_the_tail_of_normal_scores_is_the_normal_tail(deviations: float) -> None:
    scores = 3.0 * normal_scores(4000) - 40.0
    at = float(scores.mean() + deviations * scores.std(correction=0))
    found = extrapolated_bits(scores, at, space_bits=60.0)
    assert found == pytest.approx(-math.log2(0.5 * math.erfc(deviations / math.sqrt(2))), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("delta", [-0.9, 0.5, 0.9])
def test_the_tail_of_skew_normal_scores_is_found_again(delta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 200_000, generator=generator, dtype=torch.float64)
    scores = 2.0 * (delta * z[0].abs() + math.sqrt(1 - delta**2) * z[1]) - 30.0
    at = float(scores.sort().values[-200])  # one in a thousand
    found = extrapolated_bits(scores[:2000], at, space_bits=60.0)
    assert found == pytest.approx(math.log2(1000), abs=0.7)


def test_extrapolation_never_exceeds_the_space() -> None:
    assert extrapolated_bits(normal_scores(1000), 50.0, space_bits=20.0) == 20.0


def test_scores_that_are_no_skew_normal_are_not_extrapolated() -> None:
    heaps = torch.cat([normal_scores(500), normal_scores(500) + 12])
    assert extrapolated_bits(heaps, 20.0, 30.0) is None
    assert extrapolated_bits(torch.zeros(500), 1.0, 30.0) is None
    assert extrapolated_bits(normal_scores(99), 3.0, 30.0) is None
