"""What a checkpoint gives away of a text, read off one teacher-forced pass; knows no limits and no verdicts.

With the true text before it, greedy decoding emits token t exactly when the argmax of p(. | x_<t) is x_t. By
induction the longest run of such positions is the longest piece that greedy decoding gives away from any
offset, so one forward pass replaces one generation per offset. Arithmetic is not exact: positions where the
target and the best other token are closer than the dtype's noise are counted both ways, and callers confirm
by real decoding (`continuation.greedy_matches`) where that decides a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.model import LoadedModel
from memscrub.tokens import TokenText, batches, pad

# "Cannot be sampled at all" (outside the top k): a finite stand-in, so that sums and JSON stay well-defined.
IMPOSSIBLE = -1000.0
# Logits of equal inputs differ by about this much between batch shapes; measured in benchmarks/noise.py.
NOISE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class Sampling:
    """How an adversary samples: from the `top_k` likeliest tokens at this temperature."""

    top_k: int = 40
    temperature: float = 1.0


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


def score(
    loaded: LoadedModel,
    texts: Sequence[TokenText],
    sampling: Callable[[TokenText], Sampling],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Scores]:
    """One teacher-forced pass over the texts, in their order; `progress` is told how many are done."""
    found: dict[int, Scores] = {}
    for batch in batches([len(text.tokens) for text in texts], loaded.batch_tokens(batch_tokens)):
        with torch.inference_mode():
            ids = pad([texts[i].tokens for i in batch]).to(loaded.device)
            # The last position predicts nothing known; it is scored against padding and cut off below, because
            # slicing it away here would copy all the logits.
            logits, targets = loaded.logits(ids), torch.nn.functional.pad(ids[:, 1:], (0, 1))
            for rows, kind in _by_sampling([sampling(texts[i]) for i in batch]):
                whole = len(rows) == len(batch)  # a copy of all logits only where kinds are mixed
                part = score_logits(logits if whole else logits[rows], targets if whole else targets[rows], kind)
                for row, scores in zip(rows, part, strict=True):
                    end = len(texts[batch[row]].tokens) - 1
                    found[batch[row]] = Scores(*(value[:end] for value in (scores.gap, scores.log_p, scores.rest)))
        progress(len(found))
    return [found[i] for i in range(len(texts))]


def score_logits(logits: Tensor, targets: Tensor, sampling: Sampling) -> Iterator[Scores]:
    """Scores per row from logits `[batch, length, vocabulary]` and the true next tokens `[batch, length]`."""
    vocabulary = logits.shape[-1]
    k = min(sampling.top_k, vocabulary)
    top, indices = largest(logits, min(max(k, 2), vocabulary))
    target = logits.gather(-1, targets[..., None])[..., 0]
    # Ties count for the adversary: the true token at the same logit as the best other is taken as emitted.
    # The best other token is the second best exactly when the true one is (or ties) the best.
    best_other = torch.where(target >= top[..., 0], top[..., 1 if vocabulary > 1 else 0], top[..., 0])
    scaled = top[..., :k] / sampling.temperature
    total = scaled.logsumexp(-1)
    if not bool(torch.isfinite(total).all()):  # NaN is never the best: everything would pass as safe
        raise NumericalError("the model's output is not finite; nothing can be measured on this checkpoint.")
    log_p = target / sampling.temperature - total
    log_p = torch.where(target >= top[..., k - 1], log_p, torch.full_like(log_p, IMPOSSIBLE))
    # The others' mass within the top k, relative to the best other: total = log(e^target + e^(best + rest)).
    gap = target - best_other
    others = scaled.masked_fill(indices[..., :k] == targets[..., None], -torch.inf).logsumexp(-1)
    rest = others - best_other / sampling.temperature
    for row in zip(gap.cpu(), log_p.cpu(), rest.clamp(min=0.0).cpu(), strict=True):
        yield Scores(*row)


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


def _by_sampling(kinds: Sequence[Sampling]) -> Iterator[tuple[list[int], Sampling]]:
    for kind in dict.fromkeys(kinds):
        yield [i for i, other in enumerate(kinds) if other == kind], kind


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
    best, current = Run(0, first, math.inf), Run(0, first, math.inf)
    for token in range(first, len(values) + 1):
        value = values[token - 1]
        if value > threshold:
            begin = current.begin if current.length else token
            current = Run(current.length + 1, begin, min(current.margin, abs(value)))
            if current.length > best.length:
                best = current
        else:
            current = Run(0, token + 1, math.inf)
    return best


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
