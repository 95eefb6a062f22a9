"""What the blocks of a model returned in one pass, so that later passes on the same ids can begin further up; knows
neither edits nor texts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from memscrub.models.model import LoadedModel


@contextlib.contextmanager
def outputs_kept(loaded: LoadedModel) -> Iterator[list[Any]]:
    """Inside, a forward pass leaves here what every block returned, in order; 4 d bytes for each token and block.

    Nothing is copied: no family's block writes into what goes into it, which the tests hold every family to.
    """
    kept: list[Any] = []

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output)

    handles = [block.register_forward_hook(keep) for block in _blocks(loaded)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def beginning_at(loaded: LoadedModel, layer: int, kept: Sequence[Any]) -> Iterator[None]:
    """Inside, the blocks before `layer` return at once what they returned when `kept` was made.

    Logits are then, bit for bit, those of a pass on the same ids with the weights of that time in these blocks.
    """
    with contextlib.ExitStack() as undo:
        for block, output in zip(_blocks(loaded)[:layer], kept, strict=False):

            def forward(*inputs: Any, _output: Any = output, **named: Any) -> Any:
                return _output

            block.forward = forward
            undo.callback(block.__dict__.pop, "forward", None)
        yield


def _blocks(loaded: LoadedModel) -> Any:
    return loaded.model.get_submodule(loaded.family.blocks)
