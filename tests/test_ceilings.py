"""Limits taken from control texts: what they are, whom they concern, and that they are asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from models import opened, random_text, tiny_checkpoint, token_text

from memscrub.errors import PolicyError
from memscrub.measures.ceilings import with_ceilings
from memscrub.measures.measure import measure
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText
from memscrub.policy.document import Policy, parse_policy
from memscrub.reports.control_limits import NEVER

KNOWN = random_text(0, 40)
POLICY = """schema = 1
name = "n"
[protected]
files = ["p.txt"]
[class.c]
max_verbatim_tokens = 6
like_controls = true
[class.other]
max_verbatim_tokens = 6
[probe]
near_verbatim_prefix = 8
near_verbatim_tokens = 16
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path: Path = tmp_path_factory.mktemp("ceilings")
    return opened(tiny_checkpoint(path, "llama", seed=4, texts=[KNOWN], steps=60))


def policy(text: str = POLICY) -> Policy:
    return parse_policy(text.encode())


def controls(loaded: LoadedModel) -> list[TokenText]:
    return [token_text(loaded, random_text(seed, 40)) for seed in (1, 2, 3)]


def test_no_control_is_over_the_limits_it_sets_and_a_memorized_text_is(loaded: LoadedModel) -> None:
    found = with_ceilings(loaded, policy(), controls(loaded)).classes["c"]
    assert found.max_near_verbatim is not None
    assert found.max_sampling_probability is not None
    judged = policy().model_copy(update={"classes": {"c": found}})
    others = measure(loaded, judged, controls(loaded)).measures
    (known,) = measure(loaded, judged, [token_text(loaded, KNOWN)]).measures
    assert max(each.near_verbatim or 0.0 for each in others) == found.max_near_verbatim
    likely = max(each.window_log_probability or 0.0 for each in others)
    assert found.max_sampling_probability == pytest.approx(max(math.exp(likely), NEVER))
    assert (known.near_verbatim or 0.0) > found.max_near_verbatim
    assert (known.window_log_probability or 0.0) > math.log(found.max_sampling_probability)


def test_a_limit_that_the_policy_sets_is_never_loosened(loaded: LoadedModel) -> None:
    strict = POLICY.replace("like_controls = true", "like_controls = true\nmax_near_verbatim = 0.01")
    assert with_ceilings(loaded, policy(strict), controls(loaded)).classes["c"].max_near_verbatim == 0.01


def test_other_classes_and_policies_stay_as_they_are(loaded: LoadedModel) -> None:
    rules = policy()
    assert with_ceilings(loaded, rules, controls(loaded)).classes["other"] == rules.classes["other"]
    plain = policy(POLICY.replace("like_controls = true\n", ""))
    assert with_ceilings(loaded, plain, ()) is plain


def test_controls_too_short_to_show_anything_are_refused(loaded: LoadedModel) -> None:
    short = [token_text(loaded, random_text(seed, 5)) for seed in (1, 2)]
    with pytest.raises(PolicyError, match="control texts of that class are too short"):
        with_ceilings(loaded, policy(), short)
    assert with_ceilings(loaded, policy(), [*short, *controls(loaded)]).classes["c"].max_near_verbatim is not None


def test_controls_that_set_only_one_of_the_two_limits_are_refused(loaded: LoadedModel) -> None:
    def of(length: int, secrets: tuple[tuple[int, int], ...] = ()) -> list[TokenText]:
        return [replace(token_text(loaded, random_text(seed, length)), secrets=secrets) for seed in (1, 2)]

    # A window of 6 tokens is sampled, and half of the text leaves fewer than 8 to compare.
    with pytest.raises(PolicyError, match="too short to be continued and compared over 8 tokens"):
        with_ceilings(loaded, policy(), of(14))
    least = with_ceilings(loaded, policy(), of(15)).classes["c"]
    assert least.max_near_verbatim is not None and least.max_sampling_probability is not None
    long_run = POLICY.replace("max_verbatim_tokens = 6\nlike", "max_verbatim_tokens = 20\nlike")
    with pytest.raises(PolicyError, match="too short to be sampled over 20 tokens"):
        with_ceilings(loaded, policy(long_run), of(17))
    secret = POLICY.replace("like_controls = true", "like_controls = true\nsecret = true")
    with pytest.raises(PolicyError, match="no control text of that class marks a secret"):
        with_ceilings(loaded, policy(secret), of(40))
    assert with_ceilings(loaded, policy(secret), of(40, ((9, 12),))).classes["c"].max_sampling_probability is not None
    only_near = POLICY.replace("max_verbatim_tokens = 6\nlike", "max_near_verbatim = 0.9\nlike")
    near = with_ceilings(loaded, policy(only_near), of(40)).classes["c"]
    assert near.max_near_verbatim is not None and near.max_sampling_probability is None
    with pytest.raises(PolicyError, match=r"raise near_verbatim_tokens in \[probe\]"):
        with_ceilings(loaded, policy(POLICY.replace("near_verbatim_tokens = 16", "near_verbatim_tokens = 7")), of(40))


def test_a_class_without_controls_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(PolicyError, match="class c sets like_controls"):
        with_ceilings(loaded, policy(), ())
