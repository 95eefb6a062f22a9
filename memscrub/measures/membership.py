"""Was the model trained on a text? Signals of it, from the probabilities of the text's tokens; knows no limits.

Weaker than extraction, and no proof of it: a signal says that the model knows a text better than it should, not that
the text can be got out. Signals have no scale of their own; they mean something against texts never trained on
(`separations`). Probabilities here are the model's own, without temperature or top-k.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.maths.intervals import RESAMPLES, Interval, auc, bootstrap_auc
from memscrub.measures.passes import teacher_forced
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, decoded

# Min-K%++ looks at the least expected fifth of the tokens, as its authors do.
LOWEST_SHARE = 0.2
# Numbers in one temporary: on a CPU it stays in the cache, on a GPU a chunk is worth a kernel's launch.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**26
# A token is never so unlikely; keeps 0 * log 0 at 0.
_LEAST = -1e4
# A smaller deviation is rounding of float32: all tokens are equally likely, or one is certain.
_LEAST_DEVIATION = 1e-4


@dataclass(frozen=True)
class Signals:
    """How well the model knows a text; in each, the larger value speaks for membership.

    `negative_loss`: mean log-probability per token, nats (Yeom et al. 2018). `negative_zlib_ratio`: sum of the
    log-probabilities over the bytes of the text compressed by zlib, nats per byte (Carlini et al. 2021, there the
    mean). `min_k_plus_plus`: mean of the lowest fifth of (log p - mean) / deviation, where mean and deviation are
    those of log p over the vocabulary (Zhang et al., arXiv 2404.02936).
    """

    negative_loss: float
    negative_zlib_ratio: float
    min_k_plus_plus: float


@dataclass(frozen=True)
class Separation:
    """How well one signal tells protected from control texts: AUC (0.5: not at all) and its bootstrap interval."""

    signal: str
    auc: float
    interval: Interval


def signals(
    loaded: LoadedModel,
    texts: Sequence[TokenText],
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Signals | None]:
    """The signals of every text, in their order, by one teacher-forced pass; None where no token can be predicted.

    The text's own tokens count; prompt and prefix are given. `progress` is told how many texts are done.
    """
    values = teacher_forced(
        loaded,
        texts,
        lambda _: token_statistics,
        first_of=_first,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return [_of_text(loaded, text, *each) for text, each in zip(texts, values, strict=True)]


def _first(text: TokenText) -> int:
    """Nothing predicts the very first token."""
    return max(text.start, 1)


def _of_text(loaded: LoadedModel, text: TokenText, log_p: Tensor, mean: Tensor, deviation: Tensor) -> Signals | None:
    if not len(log_p):
        return None
    characters = decoded(loaded, text.tokens[text.start :])
    return signals_of(log_p, mean, deviation, characters)


def signals_of(log_p: Tensor, mean: Tensor, deviation: Tensor, text: str, share: float = LOWEST_SHARE) -> Signals:
    """The signals of one text from `token_statistics` of its n >= 1 tokens, each `[n]`, and its characters.

    Raises NumericalError when one of them is not finite.
    """
    log_p, mean, deviation = (value.double().cpu() for value in (log_p, mean, deviation))
    if not bool(torch.isfinite(log_p + mean + deviation).all()):
        raise NumericalError("the model's output is not finite; no membership signal can be computed from it.")
    normal = (log_p - mean) / deviation.clamp(min=_LEAST_DEVIATION)
    count = max(1, int(share * len(normal)))
    return Signals(
        negative_loss=float(log_p.mean()),
        negative_zlib_ratio=float(log_p.sum()) / len(zlib.compress(text.encode())),
        min_k_plus_plus=float(normal.sort().values[:count].mean()),
    )


def token_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per token: log p of the target, and mean and standard deviation of log p under p over the vocabulary.

    `logits` `[n, V]` float32, `targets` `[n]`; each result `[n]`, nats. The mean is the negative entropy. Rows go in
    chunks of at most half of them, two temporaries each: never more than one `[n, V]` beside the logits, and for many
    rows far less.
    """
    rows, vocabulary = logits.shape
    most = (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // max(1, vocabulary)
    size = max(1, min(rows // 2, most))
    # At least one chunk, so that no rows give no values.
    chunks = [slice(begin, begin + size) for begin in range(0, max(1, rows), size)]
    parts = [_chunk_statistics(logits[chunk], targets[chunk]) for chunk in chunks]
    log_p, mean, deviation = (torch.cat(values) for values in zip(*parts, strict=True))
    return log_p, mean, deviation


def _chunk_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_all = logits.log_softmax(-1)
    log_p = log_all.gather(-1, targets[:, None])[:, 0]
    p = log_all.exp()
    log_all.clamp_(min=_LEAST)
    # In place, p computed twice: that is faster than a third temporary, and than a product by matmul more exact.
    mean = p.mul_(log_all).sum(-1)
    torch.exp(log_all, out=p)
    # About the mean, not the mean of squares less its square: of a peaked distribution that would leave rounding.
    return log_p, mean, log_all.sub_(mean[:, None]).square_().mul_(p).sum(-1).sqrt()


def separations(
    members: Sequence[Signals], controls: Sequence[Signals], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Separation, ...]:
    """Every signal's AUC for protected texts against texts never trained on, with its bootstrap interval.

    Says something about membership only where the lists differ in nothing else: texts of another time or kind are
    told apart without any model (Duan et al., arXiv 2402.07841). Raises UsageError where one list is empty.
    """
    found = []
    for name in (each.name for each in fields(Signals)):
        inside, outside = ([float(getattr(one, name)) for one in side] for side in (members, controls))
        interval = bootstrap_auc(inside, outside, seed=seed, resamples=resamples)
        found.append(Separation(name, auc(inside, outside), interval))
    return tuple(found)
