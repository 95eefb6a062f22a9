"""Weights that stay as they are stored while a model computes in float32; knows no texts and no edits.

A checkpoint in bfloat16 takes twice its size when it is loaded as float32. Here the large matrices stay in the
stored dtype, in the pages of the file they were mapped from. Each is widened when its module is called and dropped
again afterwards. Widening is exact, so results are those of a model loaded as float32, bit for bit. Only of matrices
over the whole vocabulary a slice at a time is widened, which may change the last bit of a logit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from memscrub.storage.checkpoint import Checkpoint

# Checkpoints whose weights take so many bytes are kept as they are stored.
LARGE = 1 << 30
# A linear output head of so many weights is widened in slices of `SLICE` weights.
SLICED, SLICE = 2**25, 2**22
# Smaller parameters (norms, biases) are widened once and for all.
LEAST = 2**16

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Reader = Callable[[], Tensor]


def lean_dtype(ckpt: Checkpoint, *, wanted: bool | None = None) -> torch.dtype | None:
    """The dtype in which a checkpoint's weights can stay; None where they are loaded as float32.

    All of its tensors must have that dtype: of a mixture some would be rounded. `wanted` None asks by size.
    """
    kinds = {info.dtype for info in ckpt.tensors.values()}
    size = sum(info.end - info.begin for info in ckpt.tensors.values())
    if wanted is False or (wanted is None and size < LARGE) or len(kinds) != 1:
        return None
    return _DTYPES.get(kinds.pop())


def widen_constants(model: Any) -> bool:
    """Give a model that was loaded in a narrow dtype its own constants (Gemma's scale) as float32.

    False where that cannot be done: then the model would not compute what the same one in float32 does.
    """
    for module in model.modules():
        for name, narrow in list(module._buffers.items()):
            if narrow is None or narrow.dtype not in (torch.float16, torch.bfloat16):
                continue
            module._buffers[name] = wide = narrow.float()
            if name not in module._non_persistent_buffers_set:
                continue  # from the checkpoint, where it is no wider
            wide.fill_(torch.nan)
            kept = dict(module._parameters)
            module._parameters.update({n: None if v is None else nn.Parameter(v.to("meta")) for n, v in kept.items()})
            try:
                model._init_weights(module)
            finally:
                module._parameters.update(kept)
            if not torch.equal(wide.to(narrow.dtype), narrow):
                return False
    return True


class LeanWeights:
    """Keeps the large parameters of `model` in their stored dtype and widens them to `dtype` call by call."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._instead: dict[int, Reader] = {}  # by identity of the parameter: where its values come from for now
        self._room: dict[tuple[int, int], Tensor] = {}
        self._served: set[int] = set()
        self._narrow: list[dict[str, nn.Parameter]] = []  # of each module under way, what its call put aside
        head = model.get_output_embeddings()  # type: ignore[operator]
        for module in model.modules():
            floats = {
                n: value for n, value in module._parameters.items() if value is not None and value.is_floating_point()
            }
            large = [name for name, value in floats.items() if value.numel() >= LEAST]
            for name, value in floats.items():
                if name not in large:
                    value.data = value.data.to(dtype)
            if type(module) is nn.Embedding:
                module.register_forward_hook(self._widen_output)  # rows are looked up first
            elif module is head and type(module) is nn.Linear and module.weight.numel() >= SLICED:
                module.forward = _Sliced(module, dtype)  # type: ignore[method-assign,assignment]
            elif large:
                self._served |= {id(module._parameters[name]) for name in large}
                module.register_forward_pre_hook(_Enter(self, large))
                module.register_forward_hook(self._leave, always_call=True)

    @contextlib.contextmanager
    def reading(self, model: nn.Module, readers: Mapping[str, Reader]) -> Iterator[None]:
        """Inside, these parameters (by name) have the values that are read when their module is called."""
        before = dict(self._instead)
        self._instead |= {id(model.get_parameter(name)): reader for name, reader in readers.items()}
        try:
            yield
        finally:
            self._instead = before

    def serves(self, model: nn.Module, name: str) -> bool:
        """Whether `reading` reaches the parameter of that name."""
        return not name.endswith("]") and id(model.get_parameter(name)) in self._served

    def enter(self, module: nn.Module, names: list[str]) -> None:
        """Put wide copies in the place of a module's large parameters."""
        aside: dict[str, nn.Parameter] = {}
        self._narrow.append(aside)
        for index, name in enumerate(names):
            kept: Any = module._parameters[name]
            reader = self._instead.get(id(kept))
            if reader is None and kept.dtype is self.dtype:
                continue
            aside[name] = kept
            value = kept.data if reader is None else reader().to(kept.device)
            wide: Any = self._wide(value, index)
            module._parameters[name] = wide

    def _wide(self, value: Tensor, index: int) -> Tensor:
        if torch.is_grad_enabled():  # the graph keeps it
            return value.to(self.dtype)
        # The same room for every module: fresh memory of this size costs more time than the widening itself.
        key = len(self._narrow), index
        room = self._room.get(key)
        if room is None or room.numel() < value.numel() or room.device != value.device:
            self._room.pop(key, None)
            with torch.inference_mode(False):  # else it could be used in inference mode only
                room = self._room[key] = torch.empty(value.numel(), dtype=self.dtype, device=value.device)
        return room[: value.numel()].view(value.shape).copy_(value)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(self._narrow.pop())

    def _widen_output(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(self.dtype)


class _Sliced:
    """The forward pass of a linear layer that widens some rows of its weight at a time."""

    def __init__(self, module: nn.Linear, dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype
        self.rows = max(1, SLICE // module.in_features)
        self.room: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        starts = range(0, self.module.out_features, self.rows)
        if torch.is_grad_enabled() and inputs.requires_grad:  # the graph keeps no slice
            parts = [
                checkpoint(self._slice, inputs, begin, use_reentrant=False, preserve_rng_state=False)
                for begin in starts
            ]
            return torch.cat(parts, dim=-1)
        if self.room is None or self.room.device != inputs.device:
            with torch.inference_mode(False):
                self.room = torch.empty(self.rows, self.module.in_features, dtype=self.dtype, device=inputs.device)
        output = inputs.new_empty(*inputs.shape[:-1], self.module.out_features)
        for begin in starts:
            output[..., begin : begin + self.rows] = self._slice(inputs, begin, self.room)
        return output

    def _slice(self, inputs: Tensor, begin: int, room: Tensor | None = None) -> Tensor:
        rows = slice(begin, begin + self.rows)
        weight = self.module.weight.data[rows]
        # One room for all slices: slices of their own would leave holes in the memory that nothing fills.
        wide = weight.to(self.dtype) if room is None else room[: len(weight)].copy_(weight)
        bias = None if self.module.bias is None else self.module.bias[rows].to(self.dtype)
        return nn.functional.linear(inputs, wide, bias)


class _Enter:
    """A pre-hook that remembers which parameters of its module are large."""

    def __init__(self, lean: LeanWeights, names: list[str]) -> None:
        self.lean = lean
        self.names = names

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.lean.enter(module, self.names)


@contextlib.contextmanager
def one_block_at_a_time(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside, gradients keep the input of each block only; what is inside is computed again when it is needed."""
    with contextlib.ExitStack() as undo:
        for block in blocks:
            whole = block.forward

            def forward(*inputs: Any, _whole: Callable[..., Any] = whole, **named: Any) -> Any:
                if not torch.is_grad_enabled():
                    return _whole(*inputs, **named)
                with set_checkpoint_early_stop(False):  # every hook must see its module end
                    return checkpoint(_whole, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

            block.forward = forward
            undo.callback(block.__dict__.pop, "forward", None)
        yield
