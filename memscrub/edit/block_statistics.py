"""The retain statistics of `disturbance` for models that fill the memory: measured block by block, last block first.

One forward pass leaves inputs of blocks on disk. Then each block is computed again by itself, from its input, and
differentiated by the gradient that the block after it left; its inputs are gone from the disk then. Only one block's
sums are in memory. Text whose inputs would take too much disk is read in portions, and the sums wait on disk; where
these leave little room, only some blocks' inputs lie there, and the others' are computed when they are due. The
numbers are those of `disturbance.measure_disturbance`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memscrub.edit.block_inputs import BlockInputs
from memscrub.edit.disturbance import RIDGE, Metric, Moments, empty_moments, graded
from memscrub.edit.portions import Reading, portions, reading_of
from memscrub.edit.stored_metrics import StoredTriangle, store, store_triangle
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.models.trace import traced
from memscrub.storage.partial import disk_errors


def measure_by_block(
    loaded: LoadedModel,
    sites: Sequence[Site],
    retain: Sequence[Tensor],
    folder: Path,
    *,
    seed: int,
    ridge: float = RIDGE,
    batch_tokens: int = 2048,
    beside: int = 0,
    reading: Reading | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Metric]:
    """Both metrics of every site, kept in files in the new folder `folder`.

    The folder must stay while they are used. `beside` is how many bytes earlier statistics take, and `reading` how the
    text is read, instead of what `portions.reading_of` says. Raises NumericalError as `measure_disturbance` does,
    IncompleteError when the disk is full.
    """
    with disk_errors(folder):
        folder.mkdir()
    if not sites:
        return []
    count, rows = max(1, sum(part.numel() for part in retain)), sum(map(len, retain))
    reading = reading or reading_of(loaded, sites, count, beside=beside)
    pairs = list(graded(loaded, sites, retain, batch_tokens))
    parts, wanted = portions((ids for ids, _ in pairs), reading.tokens), iter([each for _, each in pairs])
    differentiated = sum(ids.numel() for ids, each in pairs if each)
    generator = torch.Generator().manual_seed(seed)
    work = _Work(loaded, sites, folder, reading.segments)
    for number, part in enumerate(parts):
        text = [(ids, next(wanted)) for ids in part]
        with contextlib.closing(work.sums(text, generator, begun=number > 0)) as sums:
            for done, (layer, moments) in enumerate(sums, 1):
                if number + 1 < len(parts):
                    work.put_aside(layer, moments)
                else:
                    work.finish(layer, moments, (count, differentiated), ridge)
                progress(rows * (number * len(work.blocks) + done) // (len(parts) * len(work.blocks)))
    return [work.found[index] for index in range(len(sites))]


class _Work:
    """The blocks of a model from the lowest edited one on, and what is on disk of the sites in them."""

    def __init__(self, loaded: LoadedModel, sites: Sequence[Site], folder: Path, segments: Sequence[range]) -> None:
        every: Any = loaded.model.get_submodule(loaded.family.blocks)
        self.loaded, self.sites, self.folder, self.segments = loaded, sites, folder, segments
        self.lowest = min(site.layer for site in sites)
        self.blocks: list[nn.Module] = list(every)[self.lowest :]
        self.found: dict[int, Metric] = {}

    def sums(
        self, text: Iterable[tuple[Tensor, bool]], generator: torch.Generator, *, begun: bool
    ) -> Generator[tuple[int, list[Moments]], None, None]:
        """Each layer, the last first, with the sums of its sites over this text, and over that before if `begun`. The
        text is batches, and whether gradients are taken of them."""
        with BlockInputs(self.loaded, self.blocks, self.segments, self.folder) as inputs:
            for ids, wanted in text:
                inputs.forward(ids, generator, graded=wanted)
            for number in reversed(range(len(self.blocks))):
                moments = self._backward(number, inputs, begun=begun)
                inputs.release(number)
                yield self.lowest + number, moments

    def put_aside(self, layer: int, moments: Sequence[Moments]) -> None:
        """Store a block's sums until the next portion."""
        for matrix, path in self._files(layer, moments):
            store_triangle(matrix, path)

    def finish(self, layer: int, moments: Sequence[Moments], counts: tuple[int, int], ridge: float) -> None:
        """Store the metrics of a block's sites in the place of their sums, over so many tokens and gradients."""
        shared: dict[int, StoredTriangle] = {}
        for index, each in zip(self._indices(layer), moments, strict=True):
            inputs, outputs = self._paths(index)
            each.outputs.count = counts[1]  # with those of earlier portions
            metric = each.metric(self.sites[index], counts[0], ridge)
            metric = store(metric, inputs, shared.get(id(each.outputs), outputs))
            shared[id(each.outputs)] = metric.factors[1]
            self.found[index] = metric

    def _backward(self, number: int, inputs: BlockInputs, *, begun: bool) -> list[Moments]:
        """Differentiate one block for all the text: its sites' sums; the gradient at its input takes the place of
        that at its output."""
        layer = self.lowest + number
        sites = [self.sites[index] for index in self._indices(layer)]
        moments: list[Moments] = []
        for batch, given, outer in inputs.reached(number):
            gradients: list[Tensor] = []
            with traced(self.loaded, sites, shape=given.shape[:2], sparing=False) as trace:
                if outer is None:
                    with torch.no_grad():
                        inputs.call(number, batch, given)
                else:
                    hidden = given.requires_grad_()
                    gradients, (own,) = trace.gradients_of(inputs.call(number, batch, hidden), outer, [hidden])
            if not moments:
                moments = empty_moments(sites, trace.seen, trace.writes)
                if begun:
                    for matrix, path in self._files(layer, moments):
                        StoredTriangle(path, len(matrix), matrix.device).fill(matrix)
            for site, one, seen in zip(sites, moments, trace.seen, strict=True):
                one.add_inputs(site.inputs(seen.values))
            if batch.gradient is not None:
                for site, one, gradient in zip(sites, moments, gradients, strict=True):
                    one.add_outputs(site.outputs(gradient).flatten(0, 1))
                inputs.gradients.put(own, batch.gradient.begin)
        return moments

    def _indices(self, layer: int) -> list[int]:
        return [index for index, site in enumerate(self.sites) if site.layer == layer]

    def _paths(self, index: int) -> tuple[Path, Path]:
        return self.folder / f"{index}.inputs", self.folder / f"{index}.outputs"

    def _files(self, layer: int, moments: Sequence[Moments]) -> Iterator[tuple[Tensor, Path]]:
        """Every sum of a block, a shared one once, and its file."""
        for index, each in zip(self._indices(layer), moments, strict=True):
            inputs, outputs = self._paths(index)
            yield each.inputs, inputs
            if each.first:
                yield each.outputs.total, outputs
