"""The inputs of a model's blocks on disk, for a portion of text, from a forward pass until each block was
differentiated; knows no sites and no statistics.

The blocks form segments. The forward pass leaves the input of each segment's first block; the others' are there once
their segment is reached, last segment first: its blocks compute once more, from that input. Where every block is a
segment of its own, nothing is computed again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memscrub.edit.disturbance import sampled_gradient
from memscrub.edit.spools import Place, Spool
from memscrub.models.model import LoadedModel


@dataclass
class Batch:
    """What each block was called with besides its input; where in each of their files its inputs are, and where the
    gradient is, if it is one of those that gradients are taken of."""

    place: Place
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    gradient: Place | None


class BlockInputs:
    """A file for the inputs of each block, and one for the gradients at the output of the block reached."""

    def __init__(
        self, loaded: LoadedModel, blocks: Sequence[nn.Module], segments: Sequence[range], folder: Path
    ) -> None:
        self.loaded, self.blocks = loaded, blocks
        self.segments = {segment[-1]: segment for segment in segments}
        self.first = {segment[0] for segment in segments}
        self.batches: list[Batch] = []
        with contextlib.ExitStack() as files:
            self.inputs = [files.enter_context(Spool(folder)) for _ in blocks]
            self.gradients = files.enter_context(Spool(folder))
            self._files = files.pop_all()

    def __enter__(self) -> BlockInputs:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def forward(self, ids: Tensor, generator: torch.Generator, *, graded: bool = True) -> None:
        """Run a batch: what the segments begin with; if `graded`, the gradient of sampled labels at the last output."""
        places: list[Place] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        leaf: list[Tensor] = []

        def record(number: int, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            first, rest, others = _hidden(inputs, named)
            calls.append((rest, others))
            if number in self.first:
                places.append(self.inputs[number].put(first))

        def begin(_: nn.Module, inputs: Any, output: Any) -> Any:
            leaf.append(hidden_of(output).detach().requires_grad_())
            return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

        ids = ids.to(self.loaded.device)
        if not graded:
            _ = self.loaded.projects  # `features` asks for it, and finds it out by a pass that is not to be recorded
        handles = [
            block.register_forward_pre_hook(partial(record, number), with_kwargs=True)
            for number, block in enumerate(self.blocks)
        ]
        handles.append(self.blocks[-1].register_forward_hook(begin))
        try:
            with torch.set_grad_enabled(graded):
                if graded:
                    logits = self.loaded.logits(ids)
                    leaf = list(torch.autograd.grad(logits, leaf, sampled_gradient(logits.detach(), generator)))
                else:
                    self.loaded.features(ids)
        finally:
            for handle in handles:
                handle.remove()
        # All files of inputs hold tensors of the same shapes in the same order.
        self.batches.append(Batch(places[0], calls, self.gradients.put(leaf[0]) if graded else None))

    def reached(self, number: int) -> Iterator[tuple[Batch, Tensor, Tensor | None]]:
        """Every batch with a block's input and the gradient at its output, if any; the block is the next of the sweep
        from the last to the first."""
        if number in self.segments:
            self._fill(self.segments[number])
        for batch in self.batches:
            gradient = None if batch.gradient is None else self.gradients.get(batch.gradient)
            yield batch, self.inputs[number].get(batch.place), gradient

    def release(self, number: int) -> None:
        """Give back the room of what is not needed once a block was differentiated."""
        self.inputs[number].release()
        if not number:
            self.gradients.release()

    def call(self, number: int, batch: Batch, hidden: Tensor) -> Tensor:
        """What a block makes of its input, called as it was in the forward pass."""
        rest, named = batch.calls[number]
        return hidden_of(self.blocks[number](hidden, *rest, **named))

    def _fill(self, segment: range) -> None:
        """Put the inputs of a segment's blocks behind the first there, bit for bit those of the forward pass."""
        for batch in self.batches if len(segment) > 1 else ():
            hidden = self.inputs[segment[0]].get(batch.place)
            for number in segment[1:]:
                # Gradients are allowed as they were in the forward pass, since kernels may be chosen by that.
                with torch.set_grad_enabled(batch.gradient is not None):
                    hidden = self.call(number - 1, batch, hidden)
                self.inputs[number].put(hidden)


def hidden_of(output: Any) -> Tensor:
    """The hidden states among what a block returned."""
    chosen: Tensor = output[0] if isinstance(output, tuple) else output
    return chosen


def _hidden(inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block's input, and its other arguments."""
    if inputs:
        return inputs[0], inputs[1:], named
    return named["hidden_states"], (), {name: value for name, value in named.items() if name != "hidden_states"}
