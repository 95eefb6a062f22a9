"""Reading activations and gradients at the sites during a forward pass, and swapping weights for a moment; the
hooks and weights are always put back. Knows nothing of texts or edits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memscrub.models.experts import Seen, seen_by
from memscrub.models.lean_weights import one_block_at_a_time
from memscrub.models.model import LoadedModel
from memscrub.models.originals import OriginalsOnDisk
from memscrub.models.sites import Site


@dataclass
class Trace:
    """What one forward pass left at each site: `seen[i]`, the activations into site i, and `writes[i]`
    `[batch, length, d]`, what the site wrote (part of the autograd graph, to differentiate by). The experts of one
    block share one write, the sum of what they wrote."""

    seen: list[Seen]
    writes: list[Tensor]
    passed: bool = False  # from then on blocks that are computed again for their gradients leave no trace

    @property
    def activations(self) -> list[Tensor]:
        """The activations into every site, `[batch, length, f]`; zero where a token did not come."""
        pairs = zip(self.seen, self.writes, strict=True)
        return [seen.dense(write[..., 0].numel()).view(*write.shape[:2], -1) for seen, write in pairs]

    def gradients(self, value: Tensor) -> list[Tensor]:
        """The gradient of a scalar at every site's write, `[batch, length, d]`; shared where the write is."""
        return self.gradients_of(value)[0]

    def gradients_of(
        self, value: Tensor, outer: Tensor | None = None, also: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`gradients` of a tensor, weighted with the gradient `outer` at it; and those at further tensors."""
        self.passed = True
        once = {id(write): write for write in self.writes}
        found = torch.autograd.grad(value, [*once.values(), *also], outer)
        own = dict(zip(once, found, strict=False))
        return [own[id(write)] for write in self.writes], list(found[len(once) :])


@contextlib.contextmanager
def traced(
    loaded: LoadedModel, sites: Sequence[Site], *, shape: Sequence[int] = (), sparing: bool = True
) -> Iterator[Trace]:
    """Record every site during forward passes run inside the context, with gradients enabled.

    `shape` is that of the ids where blocks are called by themselves. With `sparing`, gradients of a model with lean
    weights are taken one block at a time. The graph starts at the first site's write: no parameter needs a gradient,
    so nothing before it is kept.
    """
    trace = Trace([Seen(torch.empty(0))] * len(sites), [torch.empty(0)] * len(sites))
    current = list(shape)  # batch and length of the pass under way

    def remember(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        current[:] = inputs[0].shape

    handles = [loaded.model.get_input_embeddings().register_forward_pre_hook(remember)]  # type: ignore[operator]
    blocks: Any = loaded.model.get_submodule(loaded.family.blocks)
    lean = sparing and loaded.lean is not None
    try:
        for name, indices in by_module(sites).items():
            module = loaded.model.get_submodule(name)
            hook = _Hook(loaded, trace, [(index, sites[index].expert) for index in indices], current)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        with torch.enable_grad(), one_block_at_a_time(blocks) if lean else contextlib.nullcontext():
            yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def weights_swapped(loaded: LoadedModel, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other values in some parameters (by `Site.tensor`); the live ones come back bit for bit.

    Values on disk are read when they are needed, one module at a time.
    """
    if isinstance(weights, OriginalsOnDisk) and loaded.lean is not None:
        served = {name: read for name, read in weights.readers().items() if loaded.lean.serves(loaded.model, name)}
        with loaded.lean.reading(loaded.model, served), weights_swapped(loaded, dict(weights.without(served))):
            yield
        return
    live: dict[str, Tensor] = {}
    try:
        for name, value in weights.items():
            if name.endswith("]"):  # one expert's part of a parameter: its values are exchanged, not the tensor
                part = loaded.tensor(name)
                live[name] = part.clone()
                part.copy_(value)
                continue
            parameter = loaded.model.get_parameter(name)
            live[name] = parameter.data
            parameter.data = value.to(device=parameter.device, dtype=parameter.dtype)
        yield
    finally:
        for name, value in live.items():
            if name.endswith("]"):
                loaded.tensor(name).copy_(value)
            else:
                loaded.model.get_parameter(name).data = value


def by_module(sites: Sequence[Site]) -> dict[str, list[int]]:
    """The indices of the sites of each module, in order."""
    found: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        found.setdefault(site.module, []).append(index)
    return found


class _Hook:
    """A forward hook that records the sites of one module and makes their write differentiable."""

    def __init__(
        self, loaded: LoadedModel, trace: Trace, places: Sequence[tuple[int, int | None]], shape: list[int]
    ) -> None:
        self.loaded = loaded
        self.trace = trace
        self.places = places  # index of a site, and which expert's it is
        self.shape = shape

    def __call__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        # OPT flattens batch and length; Falcon adds to what the module returns in place, so it gets a copy.
        flat = output if output.requires_grad else output.detach().requires_grad_()
        experts = [expert for _, expert in self.places if expert is not None]
        row = self.loaded.family.experts
        if experts and row is not None:
            seen = seen_by(module, row, experts, inputs, named)
        else:
            seen = [Seen(inputs[0].detach().flatten(0, -2))] * len(self.places)
        if experts and row is not None and row.weighs_inputs:
            write, flat = self._summed_later(flat)
        else:
            write = flat.view(*self.shape, -1)
            flat = write.view(output.shape)
        if not self.trace.passed:
            for (index, _), each in zip(self.places, seen, strict=True):
                self.trace.seen[index], self.trace.writes[index] = each, write
        return flat.clone()

    def _summed_later(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The write of experts whose outputs `[experts * tokens, d]` the block adds up itself, and those outputs."""
        copies = flat.view(-1, self.shape[0] * self.shape[1], flat.shape[-1])
        write = copies.detach().sum(0).view(*self.shape, -1).requires_grad_()
        # Adds nothing, but what happens to the sum happens to it.
        first = copies[:1] + (write - write.detach()).view(1, -1, flat.shape[-1])
        return write, torch.cat([first, copies[1:]]).view(flat.shape)
