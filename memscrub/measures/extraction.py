"""What a checkpoint gives away of a text, read off one teacher-forced pass; knows no limits and no verdicts.

With the true text before it, greedy decoding emits token t exactly when the argmax of p(. | x_<t) is x_t. By
induction the longest run of such positions is the longest piece that greedy decoding gives away from any
offset, so one forward pass replaces one generation per offset. Arithmetic is not exact: positions where the
target and the best other token are closer than the dtype's noise are counted both ways, and callers confirm
by real decoding (`continuation.greedy_matches`) where that decides a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.measures.passes import streamed, teacher_forced
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText

# "Cannot be sampled at all" (outside the top k): a finite stand-in, so that sums and JSON stay well-defined.
IMPOSSIBLE = -1000.0
# Logits of equal inputs differ by less than this between batch shapes; tests/test_greedy_equivalence.py holds it.
NOISE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Sampling:
    """How an adversary samples: from the `top_k` likeliest tokens at this temperature, of these from the likeliest
    that together have the probability `top_p` (Holtzman et al. 2020), renormalised."""

    top_k: int = 40
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Scores:
    """One value per predicted token of a text: entry i is about token i + 1 of `tokens`.

    `gap`: logit of the true token minus the best other (greedy decoding emits the true one when positive).
    `log_p`: log-probability of the true token under the sampling, `IMPOSSIBLE` outside the top k.
    `rest`: log of the other tokens' mass relative to the best other one, at least 0.
    """

    gap: Tensor
    log_p: Tensor
    rest: Tensor


@dataclass(frozen=True)
class ScoreReader:
    """Reads the three values of `Scores` off logits, for the engine of `passes`."""

    sampling: Sampling

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gap, log_p and rest, each `[...]`, from logits `[..., vocabulary]` and true next tokens `[...]`.

        The gap is NaN where the logits are not finite.
        """
        vocabulary, temperature = logits.shape[-1], self.sampling.temperature
        k = min(self.sampling.top_k, vocabulary)
        top, indices = largest(logits, min(max(k, 2), vocabulary))
        target = logits.gather(-1, targets[..., None])[..., 0]
        # Ties count for the adversary: the true token at the same logit as the best other is taken as emitted.
        # The best other token is the second best exactly when the true one is (or ties) the best.
        best_other = torch.where(target >= top[..., 0], top[..., 1 if vocabulary > 1 else 0], top[..., 0])
        scaled = nucleus(top[..., :k] / temperature, self.sampling.top_p)
        total = scaled.logsumexp(-1)
        log_p = target / temperature - total
        least = top[..., k - 1]
        if self.sampling.top_p < 1:  # the last of the nucleus; a token as likely as it counts as inside
            least = top[..., :k].masked_fill(scaled == -torch.inf, torch.inf).amin(-1)
        log_p = torch.where(target >= least, log_p, IMPOSSIBLE)
        # The others' mass that can be drawn, relative to the best other: total = log(e^target + e^(best + rest)).
        gap = torch.where(torch.isfinite(total), target - best_other, torch.nan)
        others = scaled.masked_fill(indices[..., :k] == targets[..., None], -torch.inf).logsumexp(-1)
        return gap, log_p, (others - best_other / temperature).clamp(min=0.0)


def nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """Logits over temperature `[..., k]`, likeliest first, with -inf for what top-p sampling leaves out.

    Kept are the fewest likeliest that together reach `top_p`: always the first one.
    """
    if top_p >= 1:
        return scaled
    p = scaled.softmax(-1)
    return scaled.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)


def score(
    loaded: LoadedModel,
    texts: Sequence[TokenText],
    sampling: Callable[[TokenText], Sampling],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Scores]:
    """One teacher-forced pass over the texts, in their order; `progress` is told how many are done.

    Raises NumericalError where the model's output is not finite, IncompleteError where a text does not fit.
    """
    values = teacher_forced(
        loaded, texts, lambda text: ScoreReader(sampling(text)), batch_tokens=batch_tokens, progress=progress
    )
    if values:
        _refuse_nan(torch.cat([gap for gap, _, _ in values]))
    return [Scores(*each) for each in values]


def scored(
    loaded: LoadedModel,
    texts: Iterable[TokenText],
    sampling: Callable[[TokenText], Sampling],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[TokenText, Scores]]:
    """`score` for a stream of texts, each with its scores, in order; holds a bounded number of them.

    Tokens before the text itself (`start`) are given and not scored: their gap is -inf, their log_p `IMPOSSIBLE`.
    """
    source = streamed(
        loaded,
        texts,
        lambda text: ScoreReader(sampling(text)),
        first_of=lambda text: text.start,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    for text, (gap, log_p, rest) in source:
        _refuse_nan(gap)
        if given := max(1, text.start) - 1:
            pad = torch.nn.functional.pad
            gap, log_p, rest = (
                pad(gap, (given, 0), value=-math.inf),
                pad(log_p, (given, 0), value=IMPOSSIBLE),
                pad(rest, (given, 0)),
            )
        yield text, Scores(gap, log_p, rest)


def score_logits(logits: Tensor, targets: Tensor, sampling: Sampling) -> Iterator[Scores]:
    """Scores per row from logits `[batch, length, vocabulary]` and the true next tokens `[batch, length]`."""
    gap, log_p, rest = (value.cpu() for value in ScoreReader(sampling)(logits, targets))
    _refuse_nan(gap)
    for row in zip(gap, log_p, rest, strict=True):
        yield Scores(*row)


def _refuse_nan(gap: Tensor) -> None:
    # NaN is never the best: everything would pass as safe.
    if bool(gap.isnan().any()):
        raise NumericalError("the model's output is not finite; nothing can be measured on this checkpoint.")


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the last dimension and their indices, like `Tensor.topk`, in half its time for small k.

    The vocabulary is cut into groups of eight; the k largest values lie in the k groups with the largest maxima,
    so only these (and the rest that fills no group) are sorted.
    """
    vocabulary, lead = logits.shape[-1], logits.shape[:-1]
    size = vocabulary // 8
    if size < 4 * k:
        values, indices = logits.topk(k, dim=-1)
        return values, indices
    groups = logits[..., : 8 * size].reshape(*lead, 8, size)
    chosen = groups.amax(-2).topk(k, dim=-1, sorted=False).indices
    inside = groups.gather(-1, chosen[..., None, :].expand(*lead, 8, k)).flatten(-2)
    values, places = torch.cat([inside, logits[..., 8 * size :]], dim=-1).topk(k, dim=-1)
    grouped = places // k * size + chosen.gather(-1, places % k)
    return values, torch.where(places < 8 * k, grouped, places - 8 * k + 8 * size)


@dataclass(frozen=True)
class Run:
    """The longest stretch of tokens that greedy decoding emits; `begin` indexes `tokens`.

    `margin` is the least distance of any of its positions from the runner-up, in logits.
    """

    length: int
    begin: int
    margin: float


def longest_run(gap: Tensor, first: int, threshold: float = 0.0) -> Run:
    """The longest run of positions with gap > threshold at or after token index `first`; the first of equals."""
    values = gap.tolist()
    best = best_begin = length = 0
    for token in range(first, len(values) + 1):
        length = length + 1 if values[token - 1] > threshold else 0
        if length > best:
            best, best_begin = length, token - length + 1
    if not best:
        return Run(0, first, math.inf)
    return Run(best, best_begin, min(map(abs, values[best_begin - 1 : best_begin - 1 + best])))


def likeliest_window(log_p: Tensor, first: int, width: int) -> float | None:
    """The highest log-probability of sampling `width` tokens running, at or after token index `first`.

    None when the text has no such window.
    """
    judged = log_p[first - 1 :].double()
    if len(judged) < width:
        return None
    sums = torch.cat([judged.new_zeros(1), judged.cumsum(0)])
    return max(float((sums[width:] - sums[:-width]).max()), IMPOSSIBLE)


def discoverable(gap: Tensor, start: int, prefix: int, suffix: int) -> bool | None:
    """The classic measure: given the first `prefix` tokens, is the next `suffix` emitted exactly, greedily?

    None when the text is shorter than both together.
    """
    begin, end = start + prefix, start + prefix + suffix
    if len(gap) + 1 < end or begin < 1:
        return None
    return bool((gap[begin - 1 : end - 1] > 0).all())


def span_emitted(gap: Tensor, span: tuple[int, int], threshold: float = 0.0) -> bool:
    """Does greedy decoding, given everything before the span, emit it whole?"""
    return bool((gap[max(span[0], 1) - 1 : span[1] - 1] > threshold).all())


def span_log_p(log_p: Tensor, span: tuple[int, int]) -> float:
    """Log-probability of sampling the whole span, given everything before it."""
    return max(float(log_p[max(span[0], 1) - 1 : span[1] - 1].double().sum()), IMPOSSIBLE)


def near_verbatim_bound(gap: Tensor, begin: int, length: int, noise: float, chance: float) -> float:
    """How similar the model's own continuation from token index `begin` is to the next `length` tokens, at most.

    An empirical bound, not a proven one (docs/measures.md says on what it was tried). Evidence e is the mean of two
    shares of these tokens: those emitted with the true text before them (within `noise` counts), and those emitted
    in runs of three or more, for a continuation that went astray finds back only where several in a row are known.
    The bound is e + 0.15 + 3.5 / length, or e + (1 - e) chance + 0.1 where that is more; `chance` is the similarity
    that texts of this kind have anyway.
    """
    emitted = (gap[begin - 1 : begin - 1 + length] > -noise).tolist()
    runs = [len(list(group)) for known, group in groupby(emitted) if known]
    evidence = (sum(runs) + sum(run for run in runs if run >= 3)) / (2 * length)
    return min(1.0, max(evidence + 0.15 + 3.5 / length, evidence + (1 - evidence) * chance + 0.1))
