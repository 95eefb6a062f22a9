"""Gradients of positions along their own path: as if what attention reads of earlier positions were fixed.

A position's own path needs nothing of other positions but their keys and values. So it can be computed again at a few
positions alone, next to what a pass over whole texts left (`Remembered`, `At`): the pass over all of them then needs no
gradients. Knows no texts and no edits; families without scaled-dot-product attention in transformers have no own path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ATTENTION = torch.nn.functional.scaled_dot_product_attention


class _Attending(TorchFunctionMode, ABC):
    """Inside this context every attention of the model is left to `attend`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is _ATTENTION and len(args) >= 3:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @abstractmethod
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> Tensor:
        """One attention `[batch, heads, length, width]`, arguments and result as torch's."""


class OwnPath(_Attending):
    """Inside this context gradients do not flow to earlier positions through attention's keys and values.

    The gradient of a sum over all positions then holds, at each position, that position's own share: one
    backward pass where exact shares would need one per position. Families without scaled-dot-product attention
    in transformers get the unseparated sum.
    """

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> Tensor:
        return _ATTENTION(queries, keys.detach(), values.detach(), *rest, **more)


@dataclass
class _Call:
    """What one attention of a pass over whole texts was given besides its queries."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None
    causal: bool
    more: dict[str, Any]


class Remembered(_Attending):
    """Inside this context every attention leaves its keys, values and mask in `calls`, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> Tensor:
        named = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)), **more}
        mask, causal = named.pop("attn_mask", None), bool(named.pop("is_causal", False))
        self.calls.append(_Call(keys, values, mask, causal, named))
        return _ATTENTION(queries, keys, values, *rest, **more)


class At(_Attending):
    """Inside this context the model is given only the tokens at `positions` `[batch, n]` of texts that were
    remembered, and their queries meet the keys and values of the whole texts. Good for one pass."""

    def __init__(self, remembered: Remembered, positions: Tensor) -> None:
        super().__init__()
        self.calls = iter(remembered.calls)
        self.positions = positions
        self.masks: dict[int | None, Tensor | None] = {}

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> Tensor:
        call = next(self.calls, None)
        if call is None:  # more attentions than in the pass over whole texts
            return _ATTENTION(queries, keys, values, *rest, **more)
        return _ATTENTION(queries, call.keys, call.values, attn_mask=self._mask(call), **call.more)

    def _mask(self, call: _Call) -> Tensor | None:
        """The rows of the mask that belong to the positions, `[batch, 1 or heads, n, length]`; alike in many blocks."""
        key = None if call.mask is None else id(call.mask)
        if key not in self.masks:
            self.masks[key] = self._rows(call)
        return self.masks[key]

    def _rows(self, call: _Call) -> Tensor | None:
        length = call.keys.shape[-2]
        if call.mask is None:
            if not call.causal:
                return None
            return (torch.arange(length, device=call.keys.device) <= self.positions[..., None])[:, None]
        batch, count = self.positions.shape
        mask = call.mask.expand(batch, -1, -1, -1)
        wanted = self.positions[:, None, :, None].expand(batch, mask.shape[1], count, mask.shape[3])
        return mask.gather(2, wanted)
