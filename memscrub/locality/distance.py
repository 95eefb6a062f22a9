"""How far an edit moved the model on ordinary text: KL divergence, perplexity, greedy agreement; does not know what
becomes of an edit that moves it too far.

Retain text is split once into a solver half (statistics may be taken from it) and a judge half (only measured
on); the two never mix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, batches, blocks, prompted
from memscrub.models.trace import weights_swapped
from memscrub.reports.locality_limits import Locality, StreamDistance
from memscrub.texts.protected import Document

# A retain text that shares this many tokens running with a protected one would ask to keep what must go.
OVERLAP = 16
# "The start of a text" is this many tokens.
START = 64

# Batches of ids `[rows, width]`, with the log-probabilities `[rows, width, vocabulary]` at every position in the
# original and in the edited model.
Compared: TypeAlias = Iterator[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class RetainHalves:
    """Blocks of retain text `[rows, width]`: one half to solve with, one to judge by; and what was left out.

    `statistics` is more text to solve with, of other documents; an edit is never measured on it.
    """

    solver: Tensor
    judge: Tensor
    dropped: int  # blocks left out because they contain protected text
    statistics: Tensor


def split_retain(
    loaded: LoadedModel,
    retain: Sequence[Document],
    statistics: Sequence[Document],
    texts: Sequence[TokenText],
    *,
    max_tokens: int,
) -> RetainHalves:
    """The first half of every retain file solves, the second judges; `statistics` is text for solving only.

    Halves of files, not alternating texts: neighbouring paragraphs of one document would make the judge's half
    too easy. A document is in one half only; when a file is a single document it is cut in the middle. What judges is
    left out of `statistics`, should the same text be named there too.
    """
    solver, judge = [], []
    for _, group in groupby(retain, key=lambda document: document.file):
        first, second = _halve(list(group))
        solver += first
        judge += second
    seen = {document.text for document in solver}
    judge = [document for document in judge if document.text not in seen]
    held_out = {document.text for document in judge} | {(document.file, document.line) for document in judge}
    statistics = [each for each in statistics if not held_out & {each.text, (each.file, each.line)}]
    protected = _ngrams(texts)
    kept_judge, dropped_judge = _without_overlap(blocks(loaded, judge, limit=max_tokens), protected)
    own = blocks(loaded, solver, limit=max_tokens)
    kept, dropped = _without_overlap(own, protected)
    more = blocks(loaded, statistics, limit=max_tokens - own.numel()) if statistics else own[:0]
    if more.shape[1] != own.shape[1]:  # a scrap of text that does not fill one row
        more = own[:0]
    further, dropped_further = _without_overlap(more, protected)
    return RetainHalves(kept, kept_judge, dropped + dropped_judge + dropped_further, further)


def compare(
    loaded: LoadedModel, originals: Mapping[str, Tensor], retain: Tensor, *, batch_tokens: int = 8192
) -> Locality:
    """Compare the live model with itself under the `originals` of its edited parameters, on retain blocks.

    Both passes run in the same batches, so an unedited model compares as exactly zero.
    Raises NumericalError when the edited model's output is not finite.
    """
    stream = compare_stream(both(loaded, originals, retain, batch_tokens=batch_tokens))
    start, starts = 0.0, 0
    beginnings = prompted(loaded, retain)[:, : START + 1]
    for _, before, after in both(loaded, originals, beginnings, batch_tokens=batch_tokens):
        each = _kl(before, after)[:, :-1]
        start += float(each.double().sum())
        starts += each.numel()
    _check_finite(start)
    return Locality(**vars(stream), start_kl=max(0.0, start / starts))


def compare_stream(compared: Compared) -> StreamDistance:
    """How far the model was moved on these rows as a running stream. Raises NumericalError as `compare` does."""
    kl, nll, agree, worst, count = 0.0, 0.0, 0, 0.0, 0
    for ids, *pair in compared:
        targets = ids[:, 1:, None]
        before, after = (each[:, :-1] for each in pair)
        each = _kl(before, after)
        kl += float(each.double().sum())
        worst = max(worst, float(each.mean(-1).max()))
        agree += int((before.argmax(-1) == after.argmax(-1)).sum())
        nll += float((before.gather(-1, targets) - after.gather(-1, targets)).double().sum())
        count += each.numel()
    _check_finite(kl + nll)
    return StreamDistance(
        tokens=count,
        kl=max(0.0, kl / count),
        worst_kl=max(0.0, worst),
        agreement=agree / count,
        perplexity_ratio=math.exp(min(nll / count, 700.0)),
    )


def both(loaded: LoadedModel, originals: Mapping[str, Tensor], rows: Tensor, *, batch_tokens: int = 8192) -> Compared:
    """Batches of ids with the log-probabilities of the original and of the edited model."""
    for batch in batches([rows.shape[1]] * len(rows), loaded.batch_tokens(batch_tokens, gradients=True)):
        ids = rows[batch].to(loaded.device)
        with torch.inference_mode():
            with weights_swapped(loaded, originals):
                before = loaded.logits(ids).log_softmax(-1)
            after = loaded.logits(ids).log_softmax(-1)
            yield ids, before, after


def _kl(before: Tensor, after: Tensor) -> Tensor:
    return (before.exp() * (before - after)).sum(-1)


def _check_finite(total: float) -> None:
    if not math.isfinite(total):
        raise NumericalError("the edited model's output is not finite on retain text; the edit was rolled back.")


def _halve(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    if len(documents) == 1:
        (only,) = documents
        middle = len(only.text) // 2
        return (
            [Document(only.text[:middle], only.file, only.line)],
            [Document(only.text[middle:], only.file, only.line)],
        )
    total, seen = sum(len(document.text) for document in documents), 0
    for index, document in enumerate(documents):
        seen += len(document.text)
        if seen * 2 >= total:
            cut = min(index + 1, len(documents) - 1)
            return documents[:cut], documents[cut:]
    raise AssertionError("the halves of a list of documents add up to the whole")


def _ngrams(texts: Iterable[TokenText]) -> set[tuple[int, ...]]:
    bodies = (text.tokens[text.start :] for text in texts)
    return {body[i : i + OVERLAP] for body in bodies for i in range(len(body) - OVERLAP + 1)}


def _without_overlap(retain: Tensor, protected: set[tuple[int, ...]]) -> tuple[Tensor, int]:
    keep = [
        index
        for index, row in enumerate(map(tuple, retain.tolist()))
        if not any(row[i : i + OVERLAP] in protected for i in range(len(row) - OVERLAP + 1))
    ]
    return retain[keep], len(retain) - len(keep)
