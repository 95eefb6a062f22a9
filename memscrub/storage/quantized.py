"""What the `quantization_config` of a checkpoint means to memscrub: refused, or `memscrub dequantize` first.

Names and advice only; knows no tensors and computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memscrub.errors import CheckpointError

SUPPORTED = ("fp8", "mxfp4", "compressed-tensors")
"""The values of `quant_method` whose weights `memscrub dequantize` can write out in full."""

_NAMES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM fp8",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp8": "mxfp8",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization that a `config.json` states, under its present or its former name; None without one.

    Raises CheckpointError where the entry is no JSON object.
    """
    for key in ("quantization_config", "compression_config"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(f"The {key} of config.json is not a JSON object; download the checkpoint again.")
        return value
    return None


def method_of(quantization: Mapping[str, Any]) -> str:
    """The `quant_method` in lower case, at most 40 characters; "an unnamed method" where none is given."""
    method = quantization.get("quant_method")
    if not isinstance(method, str) or not method.isprintable() or not method:
        return "an unnamed method"
    # compressed-tensors wrote itself with an underscore in some versions.
    return "compressed-tensors" if method == "compressed_tensors" else method.lower()[:40]


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for quantized weights, with the way out; `where` is the checkpoint as the user named it.

    Measuring them would need the kernels they were made for, and an edit would be rounded away.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return
    method = method_of(quantization)
    if method in SUPPORTED:
        raise CheckpointError(
            f"The weights are quantized ({method}); write them out in full with `memscrub dequantize {where} --out NEW`"
            " and use NEW, or use the original that they were made from."
        )
    raise CheckpointError(
        f"The weights are quantized ({_NAMES.get(method, method)}), which memscrub does not read; fix the original that"
        " they were made from and quantize the result."
    )
