"""What the stored tensors of a quantized checkpoint are in full: the formulas of each format, one tensor at a time.

Knows no files: a plan names, for each tensor to write, the stored ones that it is made of, its shape and the formula.

    fp8                 W = Q * S, with one scale for each block of `weight_block_size`, or one for all
                        (DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3)
    mxfp4               two E2M1 values a byte, low half first, times 2^(scale - 127) for each 32 of them
                        (OCP Microscaling Formats v1.0; blocks laid out as in gpt-oss)
    compressed-tensors  as the package of that name decompresses it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memscrub.errors import CheckpointError, UsageError
from memscrub.storage.checkpoint import TensorInfo
from memscrub.storage.quantized import method_of
from memscrub.storage.untrusted_config import soon_matched

if TYPE_CHECKING:
    from compressed_tensors.quantization import (  # type: ignore[import-untyped]
        QuantizationConfig,
        QuantizationScheme,
    )

Reader = Callable[[str], Tensor]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_NARROW = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32"})
# Scales of activations and of the cache: they change no weight, and a model in full precision has no use for them.
_FOR_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale"),
    *("output_zero_point", "k_scale", "v_scale", "q_scale"),
)
_UNUSABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class Full:
    """One tensor in full: `make` makes it of the stored tensors `sources`, the first of which it replaces."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    make: Callable[[Reader], Tensor]


@dataclass(frozen=True)
class Plan:
    """Which tensors are made anew, and which stored ones are dropped with nothing in their place."""

    full: tuple[Full, ...]
    dropped: tuple[str, ...]


def plan_of(quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Reader) -> Plan:
    """How to write the quantized tensors out in full.

    `read` gives a stored tensor by its name; planning reads only the few numbers that state a shape.

    Raises:
        CheckpointError: the tensors are not those of the stated format, or it has a part that is not supported.
        UsageError: the package that the format needs is not installed.
    """
    method = method_of(quantization)
    if method == "fp8":
        full = _plan_fp8(quantization, tensors)
    elif method == "mxfp4":
        full = _plan_mxfp4(tensors)
    else:
        full = _plan_compressed(quantization, tensors, read)
    used = {source for each in full for source in each.sources}
    rest = [name for name in tensors if name not in used]
    dropped = tuple(name for name in rest if name.rpartition(".")[2] in _FOR_ACTIVATIONS)
    for name in rest:
        left = name.rpartition(".")[2] in ("weight_g_idx", "weight_scale", "weight_zero_point", "weight_packed")
        if name not in dropped and (left or tensors[name].dtype in _NARROW):
            raise CheckpointError(
                f"The tensor {name!r} ({tensors[name].dtype}) is quantized in a way that config.json does not state or"
                " memscrub does not read; use the original that the checkpoint was made from."
            )
    if not full:
        raise CheckpointError(f"config.json says that the weights are quantized ({method}), but none of them is.")
    return Plan(tuple(full), dropped)


# --- fp8 ---


def _plan_fp8(quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[Full]:
    """Weights in F8 with a `weight_scale_inv` (or, for fused experts, `NAME_scale_inv`) beside them."""
    block = quantization.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise CheckpointError("The weight_block_size of config.json is not two sizes; download the checkpoint again.")
    plan = []
    for scale in sorted(name for name in tensors if name.endswith("_scale_inv")):
        name = scale.removesuffix("_scale_inv")
        if name not in tensors or not tensors[name].dtype.startswith("F8_E"):
            raise CheckpointError(f"The scale {scale!r} has no 8-bit weight beside it; download the checkpoint again.")
        if tensors[scale].dtype not in _FLOATS | {"F8_E8M0"}:  # bare exponents, for example, would be taken for factors
            raise CheckpointError(
                f"The scale {scale!r} is stored as {tensors[scale].dtype}, which memscrub does not read; use the"
                " original that the checkpoint was made from."
            )
        _check_grid(tensors[name], tensors[scale], block)
        plan.append(Full(name, tensors[name].shape, (name, scale), partial(_full_fp8, name, scale, block)))
    return plan


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)


def _check_grid(weight: TensorInfo, scale: TensorInfo, block: Sequence[int] | None) -> None:
    """One scale for each block, the last of which may be cut off; or one scale for all."""
    sizes = weight.shape[-2:]
    if all(size == 1 for size in scale.shape) and (block is None or not scale.shape):
        return
    grid = None if block is None or len(sizes) < 2 else tuple(-(-n // b) for n, b in zip(sizes, block, strict=True))
    if grid is None or scale.shape != (*weight.shape[:-2], *grid):
        raise CheckpointError(
            f"The scales of {weight.name!r} have shape {list(scale.shape)}, which does not fit the weight's"
            f" {list(weight.shape)} and config.json's weight_block_size; download the checkpoint again."
        )


def _full_fp8(name: str, scale: str, block: Sequence[int] | None, read: Reader) -> Tensor:
    return block_scaled(read(name), read(scale), block)


def block_scaled(weight: Tensor, scales: Tensor, block: Sequence[int] | None) -> Tensor:
    """`weight` `[..., d, f]` times its block's scale `[..., ceil(d / b0), ceil(f / b1)]`, or the one scale, float32."""
    values = weight.float()
    if scales.numel() == 1:
        return values.mul_(scales.float().reshape(()))
    assert block is not None
    rows, columns = weight.shape[-2:]
    each = scales.float().repeat_interleave(block[0], dim=-2)[..., :rows, :]
    return values.mul_(each.repeat_interleave(block[1], dim=-1)[..., :columns])


# --- mxfp4 ---


def _plan_mxfp4(tensors: Mapping[str, TensorInfo]) -> list[Full]:
    """Fused experts as `NAME_blocks` `[experts, f, groups, 16]` and `NAME_scales` `[experts, f, groups]`."""
    plan = []
    for blocks in sorted(name for name in tensors if name.endswith("_blocks")):
        name = blocks.removesuffix("_blocks")
        scales, shape = f"{name}_scales", tensors[blocks].shape
        known = scales in tensors and len(shape) == 4 and tensors[scales].shape == shape[:-1]
        if not known or {tensors[blocks].dtype, tensors[scales].dtype} != {"U8"}:
            raise CheckpointError(f"The blocks {blocks!r} have no scales that fit them; download the checkpoint again.")
        experts, outputs, groups, width = shape
        full = (experts, groups * width * 2, outputs)
        plan.append(Full(name, full, (blocks, scales), partial(_full_mxfp4, blocks, scales)))
    return plan


def _full_mxfp4(blocks: str, scales: str, read: Reader) -> Tensor:
    packed, exponents = read(blocks), read(scales)
    # One expert at a time: in between, a value takes eight times the bytes it is stored in.
    return torch.stack([unpacked_mxfp4(*pair).to(torch.bfloat16) for pair in zip(packed, exponents, strict=True)])


def unpacked_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """One expert's matrix `[groups * width * 2, f]`, float32: blocks `[f, groups, width]`, scales `[f, groups]`."""
    table = torch.tensor(_E2M1)
    values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2).T.contiguous()


# --- compressed-tensors ---


def _plan_compressed(quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], read: Reader) -> list[Full]:
    """Modules with `weight_packed`, or with a `weight` of few bits, and a `weight_scale`."""
    config = _compressed_config(quantization)
    plan = []
    for scale in sorted(name for name in tensors if name.endswith(".weight_scale")):
        module = scale.removesuffix(".weight_scale")
        scheme, form = _scheme_of(config, module)
        packed = f"{module}.weight_packed" in tensors
        root = f"{module}.weight_packed" if packed else f"{module}.weight"
        if root not in tensors or packed != (form == "pack-quantized"):
            raise CheckpointError(f"The scale {scale!r} has no weight that fits it; download the checkpoint again.")
        parts = [root, scale]
        parts += [f"{module}.{end}" for end in ("weight_zero_point", "weight_shape") if f"{module}.{end}" in tensors]
        shape = tensors[root].shape
        if packed:
            shape = _stated_shape(module, tensors, read)
        make = partial(_full_compressed, module, tuple(parts), scheme, form)
        plan.append(Full(f"{module}.weight", shape, tuple(parts), make))
    return plan


def _stated_shape(module: str, tensors: Mapping[str, TensorInfo], read: Reader) -> tuple[int, ...]:
    """What `weight_shape` says, where it fits the packed weight: a stated size must not decide what is allocated."""
    packed, name = tensors[f"{module}.weight_packed"].shape, f"{module}.weight_shape"
    if name in tensors and tensors[name].shape == (2,) and tensors[name].dtype in ("I64", "I32") and len(packed) == 2:
        rows, columns = (int(size) for size in read(name))
        if rows == packed[0] and 0 < columns <= packed[1] * 32:
            return rows, columns
    raise CheckpointError(f"The shape that is stored for '{module}' does not fit its weight; download it again.")


def _compressed_config(quantization: Mapping[str, Any]) -> QuantizationConfig:
    """The format's own reading of the quantization; what changes weights beyond it is refused."""
    try:
        from compressed_tensors.quantization import QuantizationConfig
    except ImportError:
        raise UsageError(
            "compressed-tensors checkpoints need the package compressed-tensors: pip install 'memscrub[quantized]'."
        ) from None
    for key in ("sparsity_config", "transform_config"):
        value = quantization.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise CheckpointError(
                f"The weights are compressed with a {key}, which memscrub does not read; use the original."
            )
    known = {key: value for key, value in quantization.items() if key in QuantizationConfig.model_fields}
    try:
        return QuantizationConfig.model_validate(known)
    except (ValueError, KeyError):  # pydantic's ValidationError is a ValueError; an unknown preset is a KeyError
        raise CheckpointError(
            "The quantization_config of config.json is not one that compressed-tensors reads; download it again."
        ) from None


def _scheme_of(config: QuantizationConfig, module: str) -> tuple[QuantizationScheme, str]:
    """The scheme that a module was quantized with, and the format it is stored in."""
    from compressed_tensors.compressors.format import infer_module_format  # type: ignore[import-untyped]
    from compressed_tensors.utils.match import match_name  # type: ignore[import-untyped]

    schemes = [scheme for scheme in config.config_groups.values() if not isinstance(scheme, list)]
    patterns = [target[3:] for scheme in schemes for target in scheme.targets if target.startswith("re:")]
    if not all(soon_matched(pattern, module) for pattern in patterns):
        raise CheckpointError(
            "The quantization_config of config.json names modules by a pattern that memscrub does not read; use the"
            " original."
        )
    named = [scheme for scheme in schemes if any(match_name(module, target) for target in scheme.targets)]
    # "Linear" and the like name a class, which every quantized module is of.
    general = [scheme for scheme in schemes if any(target.isidentifier() for target in scheme.targets)]
    found = named or general
    if len(found) != 1 or found[0].weights is None:
        raise CheckpointError(f"config.json does not say in one way how '{module}' is quantized; use the original.")
    scheme = found[0]
    form = scheme.format or config.format
    if form in ("mixed-precision", "fakequant", None):
        form = infer_module_format(torch.nn.Linear, scheme)
    form = str(getattr(form, "value", form))
    if form not in _FORMATS:
        raise CheckpointError(
            f"The weights are stored as {form[:40]}, which memscrub does not read; use their original."
        )
    return scheme, form


def _full_compressed(module: str, parts: Sequence[str], scheme: QuantizationScheme, form: str, read: Reader) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor  # type: ignore[import-untyped]

    state = {part.removeprefix(f"{module}."): read(part) for part in parts}
    try:
        full: Tensor = BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]
    except _UNUSABLE as problem:
        raise CheckpointError(
            f"'{module}' cannot be decompressed ({type(problem).__name__}); download the checkpoint again."
        ) from problem
    return full
