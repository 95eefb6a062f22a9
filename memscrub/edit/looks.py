"""Looks at texts: passes over batches of them, and what is differentiable at a few of their tokens.

A look with gradients of own paths passes over the texts without gradients and again over the few tokens alone
(`own_path`); any other is a whole pass with gradients. Knows neither what must go nor what an edit is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memscrub.measures.extraction import NOISE
from memscrub.models.model import LoadedModel
from memscrub.models.own_path import At, OwnPath, Remembered
from memscrub.models.sites import Site
from memscrub.models.tokens import batches, pad
from memscrub.models.trace import Trace, traced


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
    whole pass is made again.
    """

    loaded: LoadedModel
    sites: Sequence[Site]
    ids: Tensor
    remembered: Remembered
    features: Tensor
    apart: bool = True

    def at(self, chosen: Sequence[Sequence[int]]) -> Points:
        """What predicts these tokens of each row."""
        self.apart = bool(self.remembered.calls)
        if self.apart:
            points, known = self._alone(chosen)
            self.apart = bool((points.logits.detach() - known).abs().max() <= NOISE[self.loaded.dtype])
            if self.apart:
                return points
        with whole_pass(self.loaded, self.sites, self.ids) as (trace, features):
            return Whole(self.loaded, trace, features).at(chosen)

    def _alone(self, chosen: Sequence[Sequence[int]]) -> tuple[Points, Tensor]:
        """The break points by themselves, each row's side by side; and the logits that the whole pass had for them."""
        rows, before = _rows_and_columns(chosen, self.ids.device)
        columns = torch.tensor([number for points in chosen for number in range(len(points))], device=self.ids.device)
        positions = self.ids.new_zeros(len(self.ids), max(map(len, chosen)))
        positions[rows, columns] = before
        with At(self.remembered, positions), traced(self.loaded, self.sites) as trace:
            features = self.loaded.features(self.ids.gather(1, positions), positions=positions)[0]
            logits = self.loaded.unembed(features[rows, columns])
        with torch.no_grad():
            known = self.loaded.unembed(self.features[rows, before])
        return Points(logits, trace, rows * positions.shape[1] + columns), known


def _rows_and_columns(chosen: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the break points, and the position that predicts each."""
    rows = [row for row, points in enumerate(chosen) for _ in points]
    before = [token - 1 for points in chosen for token in points]
    return torch.tensor(rows, device=device), torch.tensor(before, device=device)


def looks(
    loaded: LoadedModel, sites: Sequence[Site], texts: Sequence[Sequence[int]], batch_tokens: int, *, own_path: bool
) -> Iterator[tuple[list[int], Tensor, Whole | Apart]]:
    """Batches of the texts' indices and ids, each with a look at them, good until the next.

    Own paths are computed apart, but for lean weights and from the first batch on where that cannot be done.
    """
    apart = own_path and loaded.lean is None
    for batch, ids in padded(loaded, texts, batch_tokens):
        if not apart:
            with whole_pass(loaded, sites, ids, own_path=own_path) as (trace, features):
                yield batch, ids, Whole(loaded, trace, features)
            continue
        with torch.no_grad(), Remembered() as remembered:
            features = loaded.features(ids)[0]
        look = Apart(loaded, sites, ids, remembered, features)
        yield batch, ids, look
        apart = look.apart


@contextlib.contextmanager
def whole_pass(
    loaded: LoadedModel, sites: Sequence[Site], ids: Tensor, *, own_path: bool = True
) -> Iterator[tuple[Trace, Tensor]]:
    """A pass that can be differentiated inside the context, where lean weights are read again for it."""
    with OwnPath() if own_path else contextlib.nullcontext(), traced(loaded, sites) as trace:
        yield trace, loaded.features(ids)[0]


def padded(
    loaded: LoadedModel, texts: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of the texts' indices with their ids `[batch, length]`, padded, on the device."""
    _ = loaded.projects  # `features` asks for it, and finds it out by a pass that is not to be traced
    for batch in batches([len(text) for text in texts], loaded.batch_tokens(batch_tokens, gradients=True)):
        yield batch, pad([texts[index] for index in batch]).to(loaded.device)
