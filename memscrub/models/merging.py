"""Add a LoRA adapter to its base: in the loaded model, to scan it, or in a new checkpoint; measures nothing.

    merged = W + scale * B A                        (Hu et al., arXiv:2106.09685; transposed where W is stored [f, d])

The sum is made in float32 and rounded once to the dtype that the base stores the tensor in, in both cases: what is
scanned in memory is what `memscrub merge` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial as bound
from pathlib import Path

import torch
from torch import Tensor

from memscrub.errors import CheckpointError, NumericalError
from memscrub.models.architecture import Orientation, family_of
from memscrub.models.model import LoadedModel, choose_device, load_model
from memscrub.models.spreading import SPREAD, spread
from memscrub.storage.adapters import Adapter, Pair, stored_name
from memscrub.storage.checkpoint import Checkpoint, read_tensor
from memscrub.storage.writing import PartialDirectory, write_checkpoint


@dataclass(frozen=True)
class Merged:
    """What `merge` wrote."""

    directory: Path
    tensors: int
    left_out: tuple[str, ...]


def merge(ckpt: Checkpoint, adapter: Adapter, out: Path, *, overwrite: bool = False) -> Merged:
    """Write `ckpt` with `adapter` added to it as the new directory `out`, one tensor in memory at a time.

    Raises:
        CheckpointError: the adapter does not fit the base; nothing was written.
        NumericalError: a sum is not finite in the stored dtype; nothing was written.
        OutputError: `out` cannot be written.
        IncompleteError: the disk is full.
    """
    plan = _plan(ckpt, adapter)
    with PartialDirectory(out, overwrite=overwrite, inputs=[ckpt.path, adapter.path]) as partial:
        values: dict[str, Callable[[], Tensor]] = {
            name: bound(_merged, ckpt, adapter, name, pair) for name, pair in plan.items()
        }
        ledger = write_checkpoint(ckpt, partial.path, values)
        directory = partial.commit()
    return Merged(directory, len(plan), ledger.left_out)


def load_merged(
    ckpt: Checkpoint,
    adapter: Adapter | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    lean: bool | None = None,
    remark: Callable[[str], None] = lambda sentence: None,
) -> LoadedModel:
    """`load_model`, and `adapter` added to it where there is one, which `remark` is told.

    Raises what `load_model` and `merge_in_memory` raise.
    """
    if adapter is None:
        return load_model(ckpt, device=device, dtype=dtype, lean=lean)
    # The sum of a weight and an adapter is not of the stored dtype. A model is spread when all of it has been added.
    loaded = load_model(ckpt, device="cpu" if device == SPREAD else device, dtype=dtype, lean=False)
    merge_in_memory(loaded, ckpt, adapter)
    if device == SPREAD:
        loaded = replace(loaded, model=spread(loaded.model), device=choose_device("auto"))
    remark(f"the adapter {adapter.source} was added to {len(adapter.pairs)} tensors in memory.")
    return loaded


def merge_in_memory(loaded: LoadedModel, ckpt: Checkpoint, adapter: Adapter) -> None:
    """Add the adapter to a loaded model, rounded as it would be stored; the model stays changed.

    Raises CheckpointError when the adapter does not fit the base, or when the loaded model has its weights in another
    form than the shards (fused experts) or elsewhere than in memory, and NumericalError when a sum is not finite.
    """
    parameters = dict(loaded.model.named_parameters())
    plan = _plan(ckpt, adapter)
    for name, pair in plan.items():
        live = parameters.get(f"{pair.module}.weight")
        if live is None or tuple(live.shape) != ckpt.tensors[name].shape:
            raise CheckpointError(
                f"The loaded model has '{pair.module}' in another form than the shards; write the merged checkpoint"
                " with `memscrub merge` and use that."
            )
        if live.is_meta:  # what is written there would be lost without a word
            raise CheckpointError(
                f"The weights of '{pair.module}' are not in memory; write the merged checkpoint with `memscrub merge`"
                " and use that."
            )
    with torch.no_grad():
        for name, pair in plan.items():
            value = _merged(ckpt, adapter, name, pair)
            if not bool(torch.isfinite(value).all()):
                raise NumericalError(
                    f"{name} with the adapter added holds NaN or infinite values; use another adapter."
                )
            parameters[f"{pair.module}.weight"].copy_(value)


def _plan(ckpt: Checkpoint, adapter: Adapter) -> dict[str, Pair]:
    """The stored tensor that each pair is added to, checked to have its shape."""
    rows = family_of(ckpt.config).orientation is Orientation.ROWS
    named = f" ({adapter.base})" if adapter.base else ""
    plan: dict[str, Pair] = {}
    for pair in adapter.pairs:
        name = stored_name(ckpt, pair.module)
        if name in plan:
            raise CheckpointError(f"The adapter changes '{name}' under two names; save it again.")
        shape = (pair.b.shape[0], pair.a.shape[1])
        # Conv1D stores every matrix but the head as [f, d]; which, is the table's to say and not the shape's.
        stored = shape[::-1] if rows and not pair.module.endswith("lm_head") else shape
        info = ckpt.tensors[name]
        if info.shape != stored:
            raise CheckpointError(
                f"The adapter adds a matrix of shape {list(stored)} to '{name}', which has {list(info.shape)};"
                f" name the base that it was trained on{named}."
            )
        if info.dtype not in ("F64", "F32", "F16", "BF16"):
            raise CheckpointError(f"The adapter changes '{name}', which is stored as {info.dtype}, not as floats.")
        plan[name] = pair
    return plan


def _merged(ckpt: Checkpoint, adapter: Adapter, name: str, pair: Pair) -> Tensor:
    """The sum in the dtype that the base stores: one tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter.weights, framework="pt") as file:
            a, b = file.get_tensor(pair.a.name).float(), file.get_tensor(pair.b.name).float()
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{adapter.weights} cannot be read any more: {problem}.") from problem
    weight = read_tensor(ckpt, name)
    product = b @ a
    if family_of(ckpt.config).orientation is Orientation.ROWS and not pair.module.endswith("lm_head"):
        product = product.T
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged: Tensor = (wide + product * pair.scale).to(weight.dtype)
    return merged
