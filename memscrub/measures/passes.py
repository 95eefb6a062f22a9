"""Teacher-forced passes over token texts: batches of like length, only wanted positions projected, any memory.

Knows how to run the model and hand its logits to a reader; knows neither what readers look for nor what a text is
protected for.

A *reader* gets the logits `[n, vocabulary]` (float32, on the model's device) of n positions and their true next
tokens `[n]`, and returns any number of tensors `[n, ...]`. Readers of one batch that are equal read together, so a
reader must be hashable: a frozen dataclass with `__call__`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from memscrub.errors import OUT_OF_MEMORY, IncompleteError
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import pad

Values = tuple[Tensor, ...]
Reader = Callable[[Tensor, Tensor], Values]
Result = TypeVar("Result")
# So many texts of a stream are sorted by length at a time; what is read ahead and held is no more.
LOOKAHEAD = 2048
# Larger batches leave a CPU's caches: they are slower there, not faster.
CPU_TOKENS = 1024


class Tokened(Protocol):
    """Anything that has token ids, first to last."""

    @property
    def tokens(self) -> Sequence[int]: ...


Text = TypeVar("Text", bound=Tokened)


def teacher_forced(
    loaded: LoadedModel,
    texts: Sequence[Text],
    reader_of: Callable[[Text], Reader],
    *,
    first_of: Callable[[Text], int] = lambda text: 1,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Values]:
    """What each text's reader says of it, in the texts' order: CPU tensors `[tokens - first]`, one value per
    predicted token from token index `first_of(text)` (at least 1) on.

    `batch_tokens` bounds a padded batch; a batch that does not fit the memory is halved, and so are those that
    follow. The same texts and budget give the same bits. `progress` is told how many texts are done. Raises
    IncompleteError when a single text does not fit.
    """
    jobs = [_Job(text.tokens, max(1, first_of(text)), reader_of(text)) for text in texts]
    found: dict[int, Values] = {}
    for batch, values in _batches(loaded, jobs, batch_tokens):
        found.update(zip(batch, values, strict=True))
        progress(len(found))
    return [found[i] for i in range(len(jobs))]


def streamed(
    loaded: LoadedModel,
    texts: Iterable[Text],
    reader_of: Callable[[Text], Reader],
    *,
    first_of: Callable[[Text], int] = lambda text: 1,
    batch_tokens: int = 8192,
    lookahead: int = LOOKAHEAD,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Text, Values]]:
    """`teacher_forced` over texts that need not fit the memory: each with its values, in order.

    No more than `lookahead` texts are held; what was yielded is not lost when a later text fails.
    """
    source, done = iter(texts), 0
    while chunk := list(islice(source, lookahead)):
        before = done
        values = teacher_forced(
            loaded,
            chunk,
            reader_of,
            first_of=first_of,
            batch_tokens=batch_tokens,
            progress=lambda inside, before=before: progress(before + inside),  # type: ignore[misc]
        )
        done += len(chunk)
        yield from zip(chunk, values, strict=True)


def shared_prefix_forced(
    loaded: LoadedModel,
    prefix: Sequence[int],
    continuations: Sequence[Sequence[int]],
    reader: Reader,
    *,
    batch_tokens: int = 8192,
) -> list[Values]:
    """What the reader says of continuations of one prefix, in order: CPU tensors `[len(continuation)]`, one value
    per token of the continuation. The prefix (at least one token) is computed once for all.

    Worth it where the prefix is at least as long as the continuations (benchmarks/scan_overhead.py).
    """
    with torch.inference_mode():
        ids = torch.tensor([list(prefix)], dtype=torch.long, device=loaded.device)
        features, past = loaded.features(ids, keep=True)
    shared = _Prefix(len(prefix), features[:, -1:], past)
    jobs = [_Job(tokens, 0, reader) for tokens in continuations]
    found: dict[int, Values] = {}
    for batch, values in _batches(loaded, jobs, batch_tokens, shared):
        found.update(zip(batch, values, strict=True))
    return [found[i] for i in range(len(jobs))]


def halving(call: Callable[[int], Result], budget: int) -> Result:
    """The result of `call(budget)`, with half the budget whenever it ran out of memory.

    Raises IncompleteError when a budget of one token does not fit either.
    """
    while True:
        try:
            return call(budget)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if budget <= 1:
                raise _too_large("one text") from None
        _release()
        budget //= 2


def out_of_memory(error: BaseException) -> bool:
    """Did this error come from a lack of memory, of whatever device?"""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@dataclass(frozen=True)
class _Job:
    """Token ids, the index of the first one that is asked about, and who reads."""

    tokens: Sequence[int] = field(repr=False)
    first: int
    reader: Reader


@dataclass(frozen=True)
class _Prefix:
    """A prefix that was computed: its length, the features of its last token `[1, 1, ...]` and the cache."""

    length: int
    last: Tensor = field(repr=False)
    past: Any = field(repr=False)


@dataclass(frozen=True)
class _Launched:
    """A batch that was handed to the device: its texts by group of equal readers, the number of values of each text,
    the groups' values, and the event (CUDA) after which they have arrived."""

    groups: list[list[int]]
    counts: list[list[int]]
    values: list[Values] = field(repr=False)
    arrived: Any

    def collect(self) -> tuple[list[int], list[Values]]:
        """The texts of the batch and the values of each."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found: list[Values] = []
        for counts, values in zip(self.counts, self.values, strict=True):
            # What arrived by an event lies in pinned memory, which is short.
            own = [value.cpu() if self.arrived is None else value.clone() for value in values]
            found += zip(*(torch.split(value, counts) for value in own), strict=True)
        return [index for group in self.groups for index in group], found


def _batches(
    loaded: LoadedModel, jobs: Sequence[_Job], batch_tokens: int, prefix: _Prefix | None = None
) -> Iterator[tuple[list[int], list[Values]]]:
    """Batches of jobs, longest first, each with its values; one is computed while the one before is collected."""
    before = 0 if prefix is None else prefix.length
    budget = batch_tokens if loaded.projects else loaded.batch_tokens(batch_tokens)
    if loaded.device.type == "cpu":
        budget = min(budget, CPU_TOKENS)
    order = sorted(range(len(jobs)), key=lambda i: (-len(jobs[i].tokens), i))
    waiting: _Launched | None = None
    begin = 0
    while begin < len(order):
        longest = max(1, before + len(jobs[order[begin]].tokens))
        batch = order[begin : begin + max(1, budget // longest)]
        launched = _attempt(loaded, jobs, batch, prefix)
        if launched is None and len(batch) > 1:
            budget = len(batch) // 2 * longest
            continue
        if waiting is not None:
            yield waiting.collect()
        if launched is None:
            raise _too_large(f"one text of {longest} tokens")
        waiting = launched
        begin += len(batch)
    if waiting is not None:
        yield waiting.collect()


def _attempt(
    loaded: LoadedModel, jobs: Sequence[_Job], batch: Sequence[int], prefix: _Prefix | None
) -> _Launched | None:
    """The batch, launched; None where the memory is too small for it."""
    try:
        with torch.inference_mode():
            return _launch(loaded, jobs, batch, prefix)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    # Only here, outside the handler, is nothing of the failed batch held by the traceback.
    _release()
    return None


def _launch(loaded: LoadedModel, jobs: Sequence[_Job], batch: Sequence[int], prefix: _Prefix | None) -> _Launched:
    by_reader: dict[Reader, list[int]] = {}
    for index in batch:
        by_reader.setdefault(jobs[index].reader, []).append(index)
    groups = list(by_reader.values())
    rows = [jobs[index] for group in groups for index in group]
    ids = pad([row.tokens for row in rows])
    shift = 1 if prefix is None else 0  # the token at column c + shift is predicted at column c
    columns, starts = torch.arange(ids.shape[1]), torch.tensor([[row.first - shift] for row in rows])
    ends = torch.tensor([[len(row.tokens) - shift] for row in rows])
    wanted = (columns >= starts) & (columns < ends)
    totals: list[int] = wanted.sum(1).tolist()
    counts = [[totals.pop(0) for _ in group] for group in groups]
    places, targets = wanted.flatten().nonzero()[:, 0], ids.roll(-shift, 1)[wanted]
    ids, places, targets = (_sent(value, loaded.device) for value in (ids, places, targets))
    features = _features(loaded, ids, prefix).flatten(0, 1)
    values, begin = [], 0
    for reader, own in zip(by_reader, counts, strict=True):
        end = begin + sum(own)
        values.append(_read(loaded, features, places[begin:end], targets[begin:end], reader))
        begin = end
    return _Launched(groups, counts, *_returning(values, loaded.device))


def _features(loaded: LoadedModel, ids: Tensor, prefix: _Prefix | None) -> Tensor:
    """Features that predict tokens, `[batch, length, ...]`: at each token, or one before where a prefix is given."""
    if prefix is None:
        return loaded.features(ids)[0]
    last = prefix.last.expand(len(ids), *prefix.last.shape[1:])
    if ids.shape[1] == 1:
        return last
    past = copy.deepcopy(prefix.past)  # the model writes into it
    past.batch_repeat_interleave(len(ids))
    return torch.cat([last, loaded.features(ids[:, :-1], past)[0]], dim=1)


def _read(loaded: LoadedModel, features: Tensor, places: Tensor, targets: Tensor, reader: Reader) -> Values:
    """The reader's values at these places, their logits held only so many positions at a time."""
    size = loaded.piece
    parts = [
        reader(loaded.unembed(features.index_select(0, places[i : i + size])), targets[i : i + size])
        for i in range(0, max(1, len(places)), size)
    ]
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, on its way there while the caller goes on."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _returning(values: list[Values], device: torch.device) -> tuple[list[Values], Any]:
    """Values on their way back, and the event after which they are there; None where they can be fetched at leisure."""
    if device.type != "cuda":
        return values, None
    copies = [
        tuple(torch.empty_like(v, device="cpu", pin_memory=True).copy_(v, non_blocking=True) for v in group)
        for group in values
    ]
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return copies, arrived


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _too_large(what: str) -> IncompleteError:
    return IncompleteError(
        f"the memory is too small for {what}; lower [probe] batch_tokens, use a smaller --dtype such as bfloat16,"
        " or run on a larger machine."
    )
