"""Measuring a list of texts as its policy asks: one teacher-forced pass, then real decoding where that decides.

Knows the policy's classes and the measures, not what becomes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from rapidfuzz.distance import Levenshtein

from memscrub.measures.continuation import Continuation, Opening, continue_greedily, greedy_matches, openings
from memscrub.measures.extraction import (
    NOISE,
    Run,
    Sampling,
    Scores,
    discoverable,
    likeliest_window,
    longest_run,
    near_verbatim_bound,
    scored,
    span_emitted,
    span_log_p,
)
from memscrub.measures.passes import CPU_TOKENS, halving
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, decoded
from memscrub.policy.document import Policy
from memscrub.policy.sections import ClassLimits
from memscrub.reports.judgement import Measures, SecretMeasure
from memscrub.reports.remembered import Noted, Remembered

Progress = Callable[[str, int, int], None]
# So many openings are decoded before their continuations are let go.
OPENINGS = 4096
# So many full batches are passed at a time: what a crash costs at most, and little lost to the last, smaller batch.
LOT_BATCHES = 16


def silent(stage: str, done: int, total: int) -> None:
    """The progress report of a caller who wants none."""


@dataclass(frozen=True)
class Measured:
    """Measures of each text, in order, and the continuations that near-verbatim was judged by."""

    measures: tuple[Measures, ...]
    continuations: tuple[Continuation, ...]


@dataclass(frozen=True)
class _Asked:
    """Openings, by text and offset, that have to be decoded; and the upper estimates of the others, by text."""

    openings: list[tuple[int, int]] = field(default_factory=list)
    estimates: dict[int, float] = field(default_factory=dict)


def measure(
    loaded: LoadedModel,
    policy: Policy,
    texts: Sequence[TokenText],
    *,
    progress: Progress = silent,
    screen: bool = False,
    keep_continuations: bool = True,
    remembered: Remembered | None = None,
) -> Measured:
    """Measure every text by what its class's limits ask for, holding the scores of a bounded number of texts.

    With `screen`, a text's openings are decoded only where the pass shows that they could come near the limit; not
    so for classes with `like_controls`, whose limits are made of measured values. `keep_continuations=False`
    returns none of them and holds a bounded number; only then may there be something `remembered`, which is not
    measured again. The result is the same to the bit.
    """
    found, asked = [], _Asked()
    remembered = remembered or Remembered()
    for index, noted in enumerate(_passed(loaded, policy, texts, progress, screen, remembered)):
        found.append(noted.measures)
        asked.openings.extend((index, offset) for offset in noted.asked)
        if noted.estimate is not None:
            asked.estimates[index] = noted.estimate
    decoded, kept = _decode(loaded, policy, texts, asked.openings, progress, keep_continuations, remembered)
    for index, value in decoded.items():
        found[index] = replace(found[index], near_verbatim=value)
    for index, value in asked.estimates.items():
        # Also where another opening came nearer than the estimate: it stands for what was not decoded.
        found[index] = replace(found[index], near_verbatim=max(value, decoded.get(index, 0.0)), screened=True)
    return Measured(tuple(found), tuple(kept))


def _passed(
    loaded: LoadedModel,
    policy: Policy,
    texts: Sequence[TokenText],
    progress: Progress,
    screen: bool,
    remembered: Remembered,
) -> Iterator[Noted]:
    """What the teacher-forced pass says of each text, in order, lot by lot; lots that are remembered are left out."""
    begin = 0
    for lot in _lots(loaded, texts, policy.probe.batch_tokens):
        known = [remembered.texts.get(begin + place) for place in range(len(lot))]
        if None not in known:
            progress("teacher-forced pass", begin + len(lot), len(texts))
        stream = scored(
            loaded,
            lot if None in known else (),
            lambda text: sampling_of(policy.classes[text.class_name]),
            batch_tokens=policy.probe.batch_tokens,
            progress=lambda done, begin=begin: progress("teacher-forced pass", begin + done, len(texts)),  # type: ignore[misc]
        )
        for place, (text, scores) in enumerate(stream):
            noted = known[place]
            if noted is None:
                known[place] = noted = _note(loaded, policy, text, scores, screen)
                remembered.note(begin + place, noted)
        begin += len(lot)
        yield from (noted for noted in known if noted is not None)


def _lots(loaded: LoadedModel, texts: Sequence[TokenText], batch_tokens: int) -> Iterator[Sequence[TokenText]]:
    """The texts in order, cut into lots of `LOT_BATCHES` batches or a little more."""
    room = LOT_BATCHES * (min(batch_tokens, CPU_TOKENS) if loaded.device.type == "cpu" else batch_tokens)
    begin, held = 0, 0
    for index, text in enumerate(texts):
        held += len(text.tokens)
        if held >= room:
            yield texts[begin : index + 1]
            begin, held = index + 1, 0
    if begin < len(texts):
        yield texts[begin:]


def _note(loaded: LoadedModel, policy: Policy, text: TokenText, scores: Scores, screen: bool) -> Noted:
    """A text's measures, which of its openings have to be decoded, and what can be said of the others."""
    measures = _measure_one(loaded, policy, text, scores)
    limits = policy.classes[text.class_name]
    limit = limits.max_near_verbatim
    if limit is None:
        return Noted(measures)
    asked, estimate = [], None
    for opening in _openings(loaded, policy, 0, text, policy.probe.offsets):
        bound = _bound(loaded, text, scores, opening, limit) if screen and not limits.like_controls else None
        if bound is not None and bound <= limit:
            estimate = max(estimate or 0.0, bound)
        else:
            asked.append(opening.offset)
    return Noted(measures, tuple(asked), estimate)


def _bound(loaded: LoadedModel, text: TokenText, scores: Scores, opening: Opening, limit: float) -> float:
    """How near an opening's continuation comes to the true one, at most (`near_verbatim_bound`).

    Numbers and tables look alike in characters whatever they say: chance is the likeness of the true text to itself
    turned by half, and looked at only where it decides.
    """
    noise, length = NOISE[loaded.dtype], len(opening.truth)
    before = len(loaded.prompt) if opening.offset else text.start
    begin = text.start + opening.offset + len(opening.given) - before
    bound = near_verbatim_bound(scores.gap, begin, length, noise, 0.0)
    if bound > limit:
        return bound
    truth = decoded(loaded, opening.truth)
    half = len(truth) // 2
    chance = Levenshtein.normalized_similarity(truth, truth[half:] + truth[:half])
    return near_verbatim_bound(scores.gap, begin, length, noise, chance)


def _openings(
    loaded: LoadedModel, policy: Policy, index: int, text: TokenText, offsets: Sequence[int]
) -> list[Opening]:
    probe = policy.probe
    found = openings([text], loaded.prompt, offsets, probe.near_verbatim_prefix, probe.near_verbatim_tokens)
    return [replace(each, text=index) for each in found]


def _decode(
    loaded: LoadedModel,
    policy: Policy,
    texts: Sequence[TokenText],
    asked: Sequence[tuple[int, int]],
    progress: Progress,
    keep: bool,
    remembered: Remembered,
) -> tuple[dict[int, float], list[Continuation]]:
    """Each text's highest similarity over these openings, by real decoding, and the continuations if `keep`."""
    kept: list[Continuation] = []

    def hear(said: Sequence[Continuation]) -> None:
        remembered.heard({_name(each.opening): each.similarity for each in said})

    for begin in range(0, len(asked), OPENINGS):
        starts = [
            start
            for index, offset in asked[begin : begin + OPENINGS]
            for start in _openings(loaded, policy, index, texts[index], (offset,))
        ]

        def decode(budget: int, starts: list[Opening] = starts, begin: int = begin) -> list[Continuation]:
            return continue_greedily(
                loaded,
                starts,
                batch_tokens=budget,
                progress=lambda done: progress("own continuations", begin + done, len(asked)),
                known=() if keep else {i for i, start in enumerate(starts) if _name(start) in remembered.similar},
                heard=hear,
            )

        said = halving(decode, policy.probe.batch_tokens)
        if keep:
            kept += said
    best: dict[int, float] = {}
    for opening in asked:
        best[opening[0]] = max(best.get(opening[0], 0.0), remembered.similar[opening])
    return best, kept


def _name(opening: Opening) -> tuple[int, int]:
    """The text and offset by which an opening is known."""
    return opening.text, opening.offset


def sampling_of(limits: ClassLimits) -> Sampling:
    """How an adversary samples texts of this class."""
    return Sampling(limits.top_k, limits.temperature, limits.top_p)


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
        if decoded:  # what is left of `gap` was in no doubt, and may hold a longer run than what was decoded
            run, confirmed = max(*decoded, longest_run(gap, first), key=lambda each: each.length), True
    width = limits.max_verbatim_tokens
    return Measures(
        tokens=max(0, len(text.tokens) - first),
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
        unjudged_secrets=text.unjudged,
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
