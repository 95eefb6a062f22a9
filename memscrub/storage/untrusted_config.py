"""What a checkpoint's configuration may not ask of transformers: code from the hub, or a model far larger than what is
stored; and one refusal for all that transformers raises at a malformed one. Knows no family and loads nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from memscrub.errors import CheckpointError

_COUNTED = re.compile(r"(layer|expert)s?$")
# Experts may share one tensor. More than this is in no published model, and each would cost memory before weights do.
_MOST = 4096
# Tied weights are stored once and counted twice; a few small tensors may be missing, which is found out later.
_TIMES, _SLACK = 4, 1 << 24
_RAISED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class Reading:
    """The context in which transformers reads the checkpoint at `path`; what it raises becomes one CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from huggingface_hub.errors import StrictDataclassError

        # The tokenizers library, which is written in Rust, raises `Exception` itself.
        if error is None or not (isinstance(error, (*_RAISED, StrictDataclassError)) or kind is Exception):
            return
        words = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{self.path}: transformers cannot load this checkpoint ({words[:300]}); check that config.json,"
            " the tokenizer files and the shards belong together."
        ) from error


def check_counts(config: Mapping[str, Any], tensors: int) -> None:
    """Refuse layers or experts without end, which transformers would begin to build before it looks for their weights.

    `tensors` is how many the checkpoint stores. Raises CheckpointError that names the entry of config.json.
    """
    pending: list[Any] = [config]
    while pending:
        for key, value in pending.pop().items():
            if isinstance(value, Mapping):
                pending.append(value)
            elif isinstance(value, int) and _COUNTED.search(key) and value > max(_MOST, tensors):
                raise CheckpointError(
                    f"config.json asks for more {key} than the {tensors} stored tensors can be; download it again."
                )


def check_size(sketch: Any, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse a model far larger than the stored tensors of these shapes: the rest would be made up in memory.

    `sketch` is the model without weights, on torch's device "meta". Raises CheckpointError.
    """
    parameters = sum(parameter.numel() for parameter in sketch.parameters())
    stored = sum(map(math.prod, shapes))
    if parameters > _TIMES * stored + _SLACK:
        raise CheckpointError(
            f"config.json describes a model of {parameters} parameters, but {stored} are stored; check that config.json"
            " and the shards belong together."
        )


def without_kernels(config: Any) -> Any:
    """The configuration without names of kernels: transformers would fetch them from the hub and run them."""
    known = {
        "_attn_implementation": ("eager", "sdpa"),
        "_experts_implementation": ("eager", "batched_mm", "grouped_mm"),
    }
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key, kinds in known.items():
            if getattr(part, key, None) not in (None, *kinds):
                setattr(part, key, None)
    return config
