"""The retain statistics of `disturbance` for models that fill the memory: measured block by block, last block first.

One forward pass leaves every block's input on disk. Then each block is computed again by itself, from those inputs,
and differentiated by the gradient that the block after it left. Only one block's sums are in memory, and a block is
differentiated once for all the text. The numbers are those of `disturbance.measure_disturbance`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from memscrub.edit.disturbance import RIDGE, Metric, Moments, empty_moments, sample_labels
from memscrub.edit.stored_metrics import store
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
    progress: Callable[[int], None] = lambda done: None,
) -> list[Metric]:
    """Both metrics of every site, kept in files in the new folder `folder`.

    The folder must stay while they are used. Raises NumericalError as `measure_disturbance` does, IncompleteError
    when the disk is full.
    """
    with disk_errors(folder):
        folder.mkdir()
    blocks: Any = loaded.model.get_submodule(loaded.family.blocks)
    count, rows = max(1, sum(part.numel() for part in retain)), sum(map(len, retain))
    found: dict[int, Metric] = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        passes = _forward(loaded, blocks, retain, _Spool(file, folder), seed=seed, batch_tokens=batch_tokens)
        lowest = min((site.layer for site in sites), default=len(blocks))
        for layer in range(len(blocks) - 1, lowest - 1, -1):
            own = [index for index, site in enumerate(sites) if site.layer == layer]
            here = [sites[index] for index in own]
            moments = _backward(loaded, blocks[layer], here, passes, layer)
            for index, site, each in zip(own, here, moments, strict=True):
                found[index] = store(each.metric(site, count, ridge), folder / str(index))
            progress(rows * (len(blocks) - layer) // (len(blocks) - lowest))
    return [found[index] for index in range(len(sites))]


@dataclass
class _Spool:
    """Tensors in a file without a name; `put` returns where one is, for `get`."""

    file: IO[bytes]
    folder: Path

    def put(self, value: Tensor) -> tuple[int, torch.Size, torch.device]:
        with disk_errors(self.folder):
            begin = self.file.seek(0, 2)
            self.file.write(value.detach().float().contiguous().cpu().numpy().data)
        return begin, value.shape, value.device

    def get(self, place: tuple[int, torch.Size, torch.device]) -> Tensor:
        begin, shape, device = place
        values = np.empty(shape, dtype=np.float32)
        with disk_errors(self.folder):
            self.file.seek(begin)
            self.file.readinto(values.data.cast("B"))  # type: ignore[attr-defined]
        return torch.from_numpy(values).to(device)


@dataclass
class _Pass:
    """One batch: what every block was called with, its input on disk, and the gradient at the output reached so far."""

    spool: _Spool
    calls: list[tuple[tuple[int, torch.Size, torch.device], tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list
    )
    gradient: tuple[int, torch.Size, torch.device] | None = None


def _forward(
    loaded: LoadedModel,
    blocks: Sequence[nn.Module],
    retain: Sequence[Tensor],
    spool: _Spool,
    *,
    seed: int,
    batch_tokens: int,
) -> list[_Pass]:
    """Run all the text once: block inputs, and the gradient of the sampled labels at the last block's output."""
    generator = torch.Generator().manual_seed(seed)
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    passes = []
    for ids in (part[rows] for part in retain for rows in batches([part.shape[1]] * len(part), budget)):
        now = _Pass(spool)
        leaf: list[Tensor] = []

        def record(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], now: _Pass = now) -> None:
            first, rest, others = _hidden(inputs, named)
            now.calls.append((spool.put(first), rest, others))

        def begin(_: nn.Module, inputs: Any, output: Any, leaf: list[Tensor] = leaf) -> Any:
            leaf.append(_first(output).detach().requires_grad_())
            return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

        handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
        handles.append(blocks[-1].register_forward_hook(begin))
        try:
            with torch.enable_grad():
                log_p = loaded.logits(ids.to(loaded.device)).log_softmax(-1)
                labels = sample_labels(log_p.detach(), generator)
                (gradient,) = torch.autograd.grad(log_p.gather(-1, labels).sum(), leaf)
        finally:
            for handle in handles:
                handle.remove()
        now.gradient = spool.put(gradient)
        passes.append(now)
    return passes


def _backward(
    loaded: LoadedModel, block: nn.Module, sites: Sequence[Site], passes: Sequence[_Pass], layer: int
) -> list[Moments]:
    """Differentiate one block for all the text: its sites' sums; the gradient at its input takes the place of that
    at its output."""
    moments: list[Moments] = []
    for each in passes:
        place, rest, named = each.calls[layer]
        hidden = each.spool.get(place).requires_grad_()
        with traced(loaded, sites, shape=hidden.shape[:2], sparing=False) as trace:
            output = _first(block(hidden, *rest, **named))
            assert each.gradient is not None
            gradients, (own,) = trace.gradients_of(output, each.spool.get(each.gradient), [hidden])
        if not moments:
            moments = empty_moments(sites, trace.seen, gradients)
        for site, one, seen, gradient in zip(sites, moments, trace.seen, gradients, strict=True):
            one.add(site.inputs(seen.values), site.outputs(gradient).flatten(0, 1))
        each.gradient = each.spool.put(own)
    return moments


def _hidden(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's input, and its other arguments."""
    if inputs:
        return inputs[0], inputs[1:], named
    return named["hidden_states"], (), {name: value for name, value in named.items() if name != "hidden_states"}


def _first(output: Any) -> Tensor:
    chosen: Tensor = output[0] if isinstance(output, tuple) else output
    return chosen
