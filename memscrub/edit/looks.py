"""Looks at texts: passes over batches of them, and what is differentiable at a few of their tokens.

For gradients of own paths (`own_path`) the texts pass without gradients and then the few tokens alone with them; for
others, and where that cannot be done, they pass with gradients at every token. What passes have below all sites is
computed once (`below`). Knows neither what must go nor what an edit is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.measures.extraction import NOISE
from memscrub.models.below import Below, Text
from memscrub.models.model import LoadedModel
from memscrub.models.own_path import At, OwnPath, Remembered
from memscrub.models.sites import Site
from memscrub.models.tokens import batches, pad
from memscrub.models.trace import Trace, traced


@dataclass(frozen=True)
class Batch:
    """Texts that pass together: which they are, and their ids `[batch, length]`, padded, on the device."""

    indices: list[int]
    texts: list[Text] = field(repr=False)
    ids: Tensor = field(repr=False)


@dataclass(frozen=True)
class Points:
    """The logits `[n, vocabulary]` that predict the break points of a batch, differentiable; the trace of the pass that
    they come from, and where in its flattened batch they stand."""

    logits: Tensor
    trace: Trace
    places: Tensor


@dataclass
class Whole:
    """A look at a batch of texts by a pass that is differentiable at every token."""

    loaded: LoadedModel
    trace: Trace
    features: Tensor

    def at(self, chosen: Sequence[Sequence[int]]) -> Points:
        """What predicts these tokens of each row; to be differentiated before the look ends."""
        # Break points are a tenth of all tokens: only their logits are differentiated.
        rows, before = _rows_and_columns(chosen, self.features.device)
        logits = self.loaded.unembed(self.features[rows, before])
        return Points(logits, self.trace, rows * self.features.shape[1] + before)


@dataclass
class Apart:
    """A look by a pass without gradients. The break points' own paths are computed again, by themselves.

    Where that gives other logits (`apart` is false then: a family whose places meet elsewhere than in attention), the
    whole pass is made again. `begun`: the pass began above the blocks below all sites, and so must the second.
    """

    below: Below
    sites: Sequence[Site]
    batch: Batch
    remembered: Remembered
    features: Tensor
    begun: bool
    apart: bool = True

    def at(self, chosen: Sequence[Sequence[int]]) -> Points:
        """What predicts these tokens of each row."""
        self.apart = bool(self.remembered.calls)
        if self.apart:
            points, known = self._alone(chosen)
            self.apart = bool((points.logits.detach() - known).abs().max() <= NOISE[self.below.loaded.dtype])
            if self.apart:
                return points
        with whole_pass(self.below, self.sites, self.batch) as (trace, features):
            return Whole(self.below.loaded, trace, features).at(chosen)

    def _alone(self, chosen: Sequence[Sequence[int]]) -> tuple[Points, Tensor]:
        """The break points by themselves, each row's side by side; and the logits that the whole pass had for them."""
        loaded, ids = self.below.loaded, self.batch.ids
        rows, before = _rows_and_columns(chosen, ids.device)
        columns = torch.tensor([number for points in chosen for number in range(len(points))], device=ids.device)
        positions = ids.new_zeros(len(ids), max(map(len, chosen)))
        positions[rows, columns] = before
        few = ids.gather(1, positions)
        with At(self.remembered, positions), traced(loaded, self.sites) as trace:
            if self.begun:
                features = self.below.features_at(few, self.batch.texts, positions)
            else:
                features = loaded.features(few, positions=positions)[0]
            logits = loaded.unembed(features[rows, columns])
        with torch.no_grad():
            known = loaded.unembed(self.features[rows, before])
        return Points(logits, trace, rows * positions.shape[1] + columns), known


def _rows_and_columns(chosen: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the break points, and the position that predicts each."""
    rows = [row for row, points in enumerate(chosen) for _ in points]
    before = [token - 1 for points in chosen for token in points]
    return torch.tensor(rows, device=device), torch.tensor(before, device=device)


def looks(
    below: Below, sites: Sequence[Site], texts: Sequence[Text], batch_tokens: int, *, own_path: bool
) -> Iterator[tuple[Batch, Whole | Apart]]:
    """Batches of the texts, each with a look at them, good until the next.

    Own paths are computed apart, but for lean weights, and from the first batch on where that cannot be done.
    """
    loaded = below.loaded
    if min((site.layer for site in sites), default=0) < below.first:
        below = Below(loaded, 0)
    apart = own_path and loaded.lean is None
    for batch in padded(below, texts, batch_tokens):
        if not apart:
            with whole_pass(below, sites, batch, own_path=own_path) as (trace, features):
                yield batch, Whole(loaded, trace, features)
            continue
        begun = below.knows(batch.texts)
        with torch.no_grad(), Remembered() as remembered:
            features = below.features(batch.ids, batch.texts)
        look = Apart(below, sites, batch, remembered, features, begun)
        yield batch, look
        apart = look.apart


@contextlib.contextmanager
def whole_pass(
    below: Below, sites: Sequence[Site], batch: Batch, *, own_path: bool = True
) -> Iterator[tuple[Trace, Tensor]]:
    """A pass that can be differentiated inside the context, where lean weights are read again for it."""
    with OwnPath() if own_path else contextlib.nullcontext(), traced(below.loaded, sites) as trace:
        yield trace, below.features(batch.ids, batch.texts)


def padded(below: Below, texts: Sequence[Text], batch_tokens: int) -> Iterator[Batch]:
    """The texts in batches."""
    loaded = below.loaded
    _ = loaded.projects, below.sound  # `features` asks for them, found out by passes that are not to be traced
    for indices in batches([len(text) for text in texts], loaded.batch_tokens(batch_tokens, gradients=True)):
        few = [texts[index] for index in indices]
        yield Batch(indices, few, pad(few).to(loaded.device))
