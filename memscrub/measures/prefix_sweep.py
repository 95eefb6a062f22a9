"""The shortest prefix after which greedy decoding gives a text's suffix away; knows no limits and no intervals.

A prefix of L tokens stands alone: behind the prompt, nothing of the text before it. That is what an adversary with L
tokens can do, and the difference from the match run, which gives all of the true text before every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from memscrub.measures.continuation import greedy_matches
from memscrub.measures.extraction import NOISE, Sampling, score
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText

LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 200)
SUFFIX = 50
Variant = Literal["before_suffix", "from_start"]


@dataclass(frozen=True)
class Sweep:
    """Of one text: the prefix lengths that fit, which of them extract the suffix, and how many were decided by real
    decoding because a gap was within rounding of zero. Nothing fits a text shorter than prefix and suffix together.
    """

    lengths: tuple[int, ...]
    extracted: tuple[bool, ...]
    confirmed: int = 0

    @property
    def shortest(self) -> int | None:
        """The shortest prefix tried that extracts; longer ones need not. None when none does."""
        return next((length for length, out in zip(self.lengths, self.extracted, strict=True) if out), None)


@dataclass(frozen=True)
class Rate:
    """Of the texts that a prefix of this length fits: how many it extracts (`extracted` of `texts`)."""

    prefix: int
    extracted: int
    texts: int


@dataclass(frozen=True)
class _Probe:
    """One question to the model: given `row.tokens[:begin]`, are the tokens from `begin` on emitted?"""

    text: int
    length: int
    row: TokenText
    begin: int


def sweep_prefixes(
    loaded: LoadedModel,
    texts: Sequence[TokenText],
    *,
    lengths: Sequence[int] = LENGTHS,
    suffix: int = SUFFIX,
    variant: Variant = "before_suffix",
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Sweep]:
    """Which prefix lengths extract `suffix` tokens of each text, exactly and greedily; in the texts' order.

    "before_suffix", the standard form (Carlini et al. 2023, arXiv 2202.07646: a string is extractable with k tokens
    of context): the suffix is the text's last tokens, whatever the prefix, which grows to its left. One forward pass
    over each text and length; without the entry's own `prefix`. "from_start": the prefix is the text's first tokens
    (the entry's own `prefix` before them), the suffix the next ones, so it differs with the length. What is given is
    then always the text itself from its beginning, and one pass over the text answers for all lengths.

    `progress` is told how many forward rows are done.
    """
    wanted = sorted(set(lengths))
    rows = _rows_before_suffix if variant == "before_suffix" else _rows_from_start
    probes = [probe for i, text in enumerate(texts) for probe in rows(loaded, i, text, wanted, suffix)]
    distinct = {id(probe.row): probe.row for probe in probes}
    scores = score(
        loaded, list(distinct.values()), lambda _: Sampling(top_k=1), batch_tokens=batch_tokens, progress=progress
    )
    gaps = dict(zip(distinct, (each.gap for each in scores), strict=True))
    found: list[dict[int, bool]] = [{} for _ in texts]
    confirmed = [0] * len(texts)
    noise = NOISE[loaded.dtype]
    for probe in probes:
        least = float(gaps[id(probe.row)][probe.begin - 1 : probe.begin - 1 + suffix].min())
        out = least > 0
        if abs(least) <= noise:
            out = greedy_matches(loaded, probe.row, probe.begin, suffix) == suffix
            confirmed[probe.text] += 1
        found[probe.text][probe.length] = out
    return [Sweep(tuple(each), tuple(each.values()), count) for each, count in zip(found, confirmed, strict=True)]


def rates(sweeps: Sequence[Sweep]) -> list[Rate]:
    """Extracted texts by prefix length, over the texts that the length fits: the k and n of an interval.

    Different lengths fit different texts.
    """
    tried: dict[int, list[bool]] = {}
    for sweep in sweeps:
        for length, out in zip(sweep.lengths, sweep.extracted, strict=True):
            tried.setdefault(length, []).append(out)
    return [Rate(length, sum(outs), len(outs)) for length, outs in sorted(tried.items())]


def _rows_before_suffix(
    loaded: LoadedModel, index: int, text: TokenText, lengths: Sequence[int], suffix: int
) -> list[_Probe]:
    body, prompt = text.tokens[text.start :], loaded.prompt
    probes = []
    for length in lengths:
        if _fits(text, length, suffix):
            tokens = prompt + body[len(body) - suffix - length :]
            row = TokenText(text.id, text.class_name, tokens, len(prompt))
            probes.append(_Probe(index, length, row, len(prompt) + length))
    return probes


def _rows_from_start(
    loaded: LoadedModel, index: int, text: TokenText, lengths: Sequence[int], suffix: int
) -> list[_Probe]:
    fitting = [length for length in lengths if _fits(text, length, suffix)]
    if not fitting:
        return []
    # What stands behind the last suffix changes no gap before it.
    tokens = text.tokens[: text.start + fitting[-1] + suffix]
    row = TokenText(text.id, text.class_name, tokens, text.start)
    return [_Probe(index, length, row, text.start + length) for length in fitting]


def _fits(text: TokenText, length: int, suffix: int) -> bool:
    return length >= 1 and suffix >= 1 and length + suffix <= text.length
