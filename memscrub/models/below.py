"""Hidden states of texts below the lowest edited block: no edit changes them, so they are computed once, and later
passes over the same texts begin with them.

A model whose blocks hand on more than hidden states always passes whole; a pass over a few tokens tells. Knows neither
what is edited above nor why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from memscrub.models.model import SAME_LOGITS, LoadedModel

# States of all texts together take so many bytes at most; texts beyond that pass whole.
MOST_BYTES = 2**30

Text: TypeAlias = tuple[int, ...]


@dataclass
class Below:
    """What texts have come to before block `first`, the lowest that is edited; nothing is kept where that is 0."""

    loaded: LoadedModel
    first: int
    room: int = MOST_BYTES
    _states: dict[Text, Tensor] = field(default_factory=dict, repr=False)
    _handed: tuple[Any, ...] | None = field(default=None, repr=False)  # what blocks return behind hidden states

    def knows(self, texts: Sequence[Text]) -> bool:
        """Whether a pass over these texts can begin above."""
        return all(text in self._states for text in texts)

    def features(self, ids: Tensor, texts: Sequence[Text], again: Collection[Text] | None = None) -> Tensor:
        """`LoadedModel.features` of texts, given padded on the device as well, `[batch, length]`; those in
        `again` leave their states, all by default."""
        if self.knows(texts):
            return self.features_at(ids, texts, None)
        if not self.sound:
            return self.loaded.features(ids)[0]
        with self._learning(texts, texts if again is None else again):
            return self.loaded.features(ids)[0]

    def logits(self, ids: Tensor) -> Tensor:
        """`LoadedModel.logits` of texts of one length, on the device, `[batch, length]`."""
        return self.loaded.unembed(self.features(ids, texts_of(ids)))

    def features_at(self, ids: Tensor, texts: Sequence[Text], positions: Tensor | None) -> Tensor:
        """The same of texts that are known, by a pass of the ids at `positions` `[batch, n]` (None: at all)."""
        states = pad_sequence([self._states[text] for text in texts], batch_first=True)
        if positions is not None:
            states = states.gather(1, positions[..., None].expand(-1, -1, states.shape[-1]))
        with self._given(states):
            return self.loaded.features(ids, positions=positions)[0]

    @cached_property
    def sound(self) -> bool:
        """Whether a pass that begins above comes to what a whole pass does; found out on a few tokens."""
        if not self.first:
            return False
        count = min(8, self.loaded.max_positions)
        probe = tuple((token * 7919 + 1) % self.loaded.vocabulary for token in range(count))
        ids = torch.tensor([probe], device=self.loaded.device)
        with torch.no_grad():
            with self._learning([probe], [probe]):
                whole = self.loaded.features(ids)[0]
            if not self.knows([probe]):
                return False
            begun = self.features_at(ids, [probe], None)
        forgotten = self._states.pop(probe)
        self.room += _size(forgotten)
        return bool((whole - begun).abs().max() <= SAME_LOGITS[self.loaded.dtype] * whole.abs().max())

    @property
    def _blocks(self) -> list[nn.Module]:
        every: Any = self.loaded.model.get_submodule(self.loaded.family.blocks)
        return list(every)[: self.first]

    @contextlib.contextmanager
    def _learning(self, texts: Sequence[Text], again: Collection[Text]) -> Iterator[None]:
        """Inside, one pass over these texts leaves the states of those in `again`."""

        def learn(module: nn.Module, inputs: Any, output: Any) -> None:
            states, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            if states.ndim != 3 or len(states) != len(texts):
                return
            # Attention's weights, which no block above reads.
            self._handed = rest and tuple(None if isinstance(each, Tensor) else each for each in rest)
            with torch.inference_mode(False):  # to be differentiated above one day
                for text, state in zip(texts, states, strict=True):
                    if text in again:
                        self._keep(text, state[: len(text)].detach().clone())

        handle = self._blocks[-1].register_forward_hook(learn)
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, text: Text, state: Tensor) -> None:
        if text not in self._states and _size(state) <= self.room:
            self._states[text] = state
            self.room -= _size(state)

    @contextlib.contextmanager
    def _given(self, states: Tensor) -> Iterator[None]:
        """Inside, the blocks below compute nothing and hand on these states."""

        def forward(*inputs: Any, **named: Any) -> Any:
            return states if self._handed is None else (states, *self._handed)

        with contextlib.ExitStack() as undo:
            for block in self._blocks:
                undo.callback(_put_back, block, vars(block).get("forward"))
                block.forward = forward
            yield


def texts_of(ids: Tensor) -> list[Text]:
    """Texts of one length `[batch, length]`."""
    return [tuple(text) for text in ids.tolist()]


def _size(state: Tensor) -> int:
    return state.numel() * state.element_size()


def _put_back(block: nn.Module, forward: Any) -> None:
    del block.forward
    if forward is not None:  # one of the module's own, as `spreading` leaves it
        block.forward = forward
