"""Measuring a list of texts as its policy asks: one teacher-forced pass, then real decoding where that decides.

Knows the policy's classes and the measures, not what becomes of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from memscrub.continuation import Continuation, continue_greedily, greedy_matches, openings
from memscrub.extraction import (
    NOISE,
    Run,
    Sampling,
    Scores,
    discoverable,
    likeliest_window,
    longest_run,
    score,
    span_emitted,
    span_log_p,
)
from memscrub.judgement import Measures, SecretMeasure
from memscrub.model import LoadedModel
from memscrub.policy import Policy
from memscrub.policy_sections import ClassLimits
from memscrub.tokens import TokenText

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The progress report of a caller who wants none."""


@dataclass(frozen=True)
class Measured:
    """Measures of each text, in order, and the continuations that near-verbatim was judged by."""

    measures: tuple[Measures, ...]
    continuations: tuple[Continuation, ...]


def measure(
    loaded: LoadedModel, policy: Policy, texts: Sequence[TokenText], *, progress: Progress = silent
) -> Measured:
    """Measure every text by what its class's limits ask for."""
    probe = policy.probe
    scores = score(
        loaded,
        texts,
        lambda text: sampling_of(policy.classes[text.class_name]),
        batch_tokens=probe.batch_tokens,
        progress=lambda done: progress("teacher-forced pass", done, len(texts)),
    )
    found = [_measure_one(loaded, policy, text, each) for text, each in zip(texts, scores, strict=True)]
    asked = [i for i, text in enumerate(texts) if policy.classes[text.class_name].max_near_verbatim is not None]
    starts = openings(
        [texts[i] for i in asked],
        loaded.prompt,
        probe.offsets,
        probe.near_verbatim_prefix,
        probe.near_verbatim_tokens,
    )
    said = continue_greedily(
        loaded,
        starts,
        batch_tokens=probe.batch_tokens,
        progress=lambda done: progress("own continuations", done, len(starts)),
    )
    said = [replace(each, opening=replace(each.opening, text=asked[each.opening.text])) for each in said]
    best: dict[int, float] = defaultdict(lambda: 0.0)
    for each in said:
        best[each.opening.text] = max(best[each.opening.text], each.similarity)
    for index, value in best.items():
        found[index] = replace(found[index], near_verbatim=value)
    return Measured(tuple(found), tuple(said))


def sampling_of(limits: ClassLimits) -> Sampling:
    """How an adversary samples texts of this class."""
    return Sampling(limits.top_k, limits.temperature)


def _measure_one(loaded: LoadedModel, policy: Policy, text: TokenText, scores: Scores) -> Measures:
    limits, probe = policy.classes[text.class_name], policy.probe
    first = text.first_judged(probe.min_prefix_tokens)
    noise = NOISE[loaded.dtype]
    run = longest_run(scores.gap, first)
    confirmed = False
    if limits.max_verbatim_tokens is not None and limits.max_verbatim_tokens >= _certain(scores, first, noise):
        gap, decoded = scores.gap.clone(), []
        while (doubtful := longest_run(gap, first, -noise)).length > limits.max_verbatim_tokens:
            decoded.append(_decode_run(loaded, text, doubtful))
            gap[doubtful.begin - 1 : doubtful.begin - 1 + doubtful.length] = -torch.inf
        if decoded:
            run, confirmed = max(decoded, key=lambda each: each.length), True
    width = limits.max_verbatim_tokens
    return Measures(
        tokens=len(text.tokens) - first,
        match_run=run.length,
        run_begin=run.begin,
        run_margin=run.margin,
        confirmed=confirmed,
        extractable=discoverable(scores.gap, text.start, probe.prefix_tokens, probe.suffix_tokens),
        window_log_probability=None if width is None else likeliest_window(scores.log_p, first, width),
        secrets=tuple(
            # A secret within rounding noise of being emitted counts as emitted.
            SecretMeasure(*span, span_emitted(scores.gap, span, -noise), span_log_p(scores.log_p, span))
            for span in text.secrets
        ),
    )


def _certain(scores: Scores, first: int, noise: float) -> int:
    """Length of the longest run that no rounding could break."""
    return longest_run(scores.gap, first, noise).length


def _decode_run(loaded: LoadedModel, text: TokenText, run: Run) -> Run:
    """The longest piece of a doubtful run that real decoding emits, restarted behind each break."""
    best, begin, end = Run(0, run.begin, run.margin), run.begin, run.begin + run.length
    while end - begin > best.length:
        emitted = greedy_matches(loaded, text, begin, end - begin)
        if emitted > best.length:
            best = Run(emitted, begin, run.margin)
        begin += emitted + 1
    return best
