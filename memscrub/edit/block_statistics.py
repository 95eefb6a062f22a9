"""The retain statistics of `disturbance` for models that fill the memory: measured block by block, last block first.

One forward pass leaves every block's input on disk. Then each block is computed again by itself, from those inputs,
and differentiated by the gradient that the block after it left; its inputs are gone from the disk then. Only one
block's sums are in memory. Text whose inputs would take too much disk is read in portions, and the sums wait on disk.
The numbers are those of `disturbance.measure_disturbance`.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from memscrub.edit.disturbance import RIDGE, Metric, Moments, empty_moments, sample_labels
from memscrub.edit.portions import portions, tokens_at_once
from memscrub.edit.stored_metrics import StoredTriangle, store, store_triangle
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.models.tokens import batches
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
    at_once: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Metric]:
    """Both metrics of every site, kept in files in the new folder `folder`.

    The folder must stay while they are used. `beside` is how many bytes earlier statistics take, and `at_once` how many
    tokens a portion of the text has, instead of what `portions.tokens_at_once` says. Raises NumericalError as
    `measure_disturbance` does, IncompleteError when the disk is full.
    """
    with disk_errors(folder):
        folder.mkdir()
    if not sites:
        return []
    count, rows = max(1, sum(part.numel() for part in retain)), sum(map(len, retain))
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    ids = (part[chosen] for part in retain for chosen in batches([part.shape[1]] * len(part), budget))
    parts = portions(ids, tokens_at_once(loaded, sites, count, beside=beside) if at_once is None else at_once)
    generator = torch.Generator().manual_seed(seed)
    work = _Work(loaded, sites, folder)
    for number, part in enumerate(parts):
        with contextlib.closing(work.sums(part, generator, begun=number > 0)) as sums:
            for done, (layer, moments) in enumerate(sums, 1):
                if number + 1 < len(parts):
                    work.put_aside(layer, moments)
                else:
                    work.finish(layer, moments, count, ridge)
                progress(rows * (number * len(work.blocks) + done) // (len(parts) * len(work.blocks)))
    return [work.found[index] for index in range(len(sites))]


@dataclass(frozen=True)
class _Place:
    """Where in its file a tensor is, and what it was."""

    begin: int
    shape: torch.Size
    device: torch.device


class _Spool:
    """Tensors in a file without a name, gone with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with disk_errors(folder):
            self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when it was used up)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the room on disk back."""
        with disk_errors(self.folder):  # what could not be written is tried once more
            self.file.close()

    def put(self, value: Tensor, begin: int | None = None) -> _Place:
        """Write a tensor behind all others, or over what was as large."""
        with disk_errors(self.folder):
            begin = self.file.seek(0, 2) if begin is None else self.file.seek(begin)
            self.file.write(value.detach().float().contiguous().cpu().numpy().data)
            self.file.flush()
        return _Place(begin, value.shape, value.device)

    def get(self, place: _Place) -> Tensor:
        """Read a tensor."""
        values = torch.empty(place.shape)
        with disk_errors(self.folder):
            self.file.seek(place.begin)
            self.file.readinto(values.numpy().data.cast("B"))  # type: ignore[attr-defined]
        return values.to(place.device)


@dataclass
class _Pass:
    """One batch: what each block was called with, its input on disk; and the gradient at the output reached so far."""

    calls: list[tuple[_Place, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    gradient: _Place | None = None


@dataclass
class _Spools:
    """Files for the inputs of each block, and for the gradients: a block's replace those of the block after it."""

    inputs: list[_Spool]
    gradients: _Spool


class _Work:
    """The blocks of a model from the lowest edited one on, and what is on disk of the sites in them."""

    def __init__(self, loaded: LoadedModel, sites: Sequence[Site], folder: Path) -> None:
        every: Any = loaded.model.get_submodule(loaded.family.blocks)
        self.loaded, self.sites, self.folder = loaded, sites, folder
        self.lowest = min(site.layer for site in sites)
        self.blocks: list[nn.Module] = list(every)[self.lowest :]
        self.found: dict[int, Metric] = {}

    def sums(
        self, text: Iterable[Tensor], generator: torch.Generator, *, begun: bool
    ) -> Generator[tuple[int, list[Moments]], None, None]:
        """Each layer, the last first, with the sums of its sites over this text, and over that before if `begun`."""
        with contextlib.ExitStack() as files:
            inputs = [files.enter_context(_Spool(self.folder)) for _ in self.blocks]
            spools = _Spools(inputs, files.enter_context(_Spool(self.folder)))
            passes = [_forward(self.loaded, self.blocks, ids, spools, generator) for ids in text]
            for number in reversed(range(len(self.blocks))):
                layer = self.lowest + number
                moments = self._backward(layer, passes, spools, begun=begun)
                inputs[number].release()
                if not number:
                    spools.gradients.release()
                yield layer, moments

    def put_aside(self, layer: int, moments: Sequence[Moments]) -> None:
        """Store a block's sums until the next portion."""
        for matrix, path in self._files(layer, moments):
            store_triangle(matrix, path)

    def finish(self, layer: int, moments: Sequence[Moments], count: int, ridge: float) -> None:
        """Store the metrics of a block's sites in the place of their sums, over `count` tokens."""
        shared: dict[int, StoredTriangle] = {}
        for index, each in zip(self._indices(layer), moments, strict=True):
            inputs, outputs = self._paths(index)
            metric = store(each.metric(self.sites[index], count, ridge), inputs, shared.get(id(each.outputs), outputs))
            shared[id(each.outputs)] = metric.factors[1]
            self.found[index] = metric

    def _backward(self, layer: int, passes: Sequence[_Pass], spools: _Spools, *, begun: bool) -> list[Moments]:
        """Differentiate one block for all the text: its sites' sums; the gradient at its input takes the place of
        that at its output."""
        block, spool = self.blocks[layer - self.lowest], spools.inputs[layer - self.lowest]
        sites = [self.sites[index] for index in self._indices(layer)]
        moments: list[Moments] = []
        for each in passes:
            place, rest, named = each.calls[layer - self.lowest]
            hidden = spool.get(place).requires_grad_()
            with traced(self.loaded, sites, shape=hidden.shape[:2], sparing=False) as trace:
                output = _first(block(hidden, *rest, **named))
                assert each.gradient is not None
                gradients, (own,) = trace.gradients_of(output, spools.gradients.get(each.gradient), [hidden])
            if not moments:
                moments = empty_moments(sites, trace.seen, gradients)
                if begun:
                    for matrix, path in self._files(layer, moments):
                        StoredTriangle(path, len(matrix), matrix.device).fill(matrix)
            for site, one, seen, gradient in zip(sites, moments, trace.seen, gradients, strict=True):
                one.add(site.inputs(seen.values), site.outputs(gradient).flatten(0, 1))
            each.gradient = spools.gradients.put(own, each.gradient.begin)
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


def _forward(
    loaded: LoadedModel, blocks: Sequence[nn.Module], ids: Tensor, spools: _Spools, generator: torch.Generator
) -> _Pass:
    """Run a batch: the inputs of these blocks, and the gradient of the sampled labels at the output of the last."""
    now = _Pass()
    leaf: list[Tensor] = []

    def record(spool: _Spool, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        first, rest, others = _hidden(inputs, named)
        now.calls.append((spool.put(first), rest, others))

    def begin(_: nn.Module, inputs: Any, output: Any) -> Any:
        leaf.append(_first(output).detach().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    pairs = zip(blocks, spools.inputs, strict=True)
    handles = [block.register_forward_pre_hook(partial(record, spool), with_kwargs=True) for block, spool in pairs]
    handles.append(blocks[-1].register_forward_hook(begin))
    try:
        with torch.enable_grad():
            log_p = loaded.logits(ids.to(loaded.device)).log_softmax(-1)
            labels = sample_labels(log_p.detach(), generator)
            (gradient,) = torch.autograd.grad(log_p.gather(-1, labels).sum(), leaf)
    finally:
        for handle in handles:
            handle.remove()
    now.gradient = spools.gradients.put(gradient)
    return now


def _hidden(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's input, and its other arguments."""
    if inputs:
        return inputs[0], inputs[1:], named
    return named["hidden_states"], (), {name: value for name, value in named.items() if name != "hidden_states"}


def _first(output: Any) -> Tensor:
    chosen: Tensor = output[0] if isinstance(output, tuple) else output
    return chosen
