"""What a checkpoint's configuration may not ask of transformers: code from the hub, other files than those that were
looked at, or a model far larger than what is stored; and one refusal for all that transformers raises at a malformed
one. Knows no family and loads nothing.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from types import TracebackType
from typing import Any

from memscrub.errors import OUT_OF_MEMORY, CheckpointError, IncompleteError

_COUNTED = re.compile(r"(layer|expert)s?$")
# Experts may share one tensor. More than this is in no published model, and each would cost memory before weights do.
_MOST = 4096
# Tied weights are stored once and counted twice; a few small tensors may be missing, which is found out later.
_TIMES, _SLACK = 4, 1 << 24
_RAISED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip

# Where a file of this form lies, transformers loads all safetensors files of the directory and looks at no index.
_RANK = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


class Reading:
    """The context in which transformers reads the checkpoint at `path`; what it raises becomes one CheckpointError.

    Raises IncompleteError where memory was short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError

        known = (*_RAISED, StrictDataclassError, SafetensorError)
        if error is None or not (isinstance(error, known) or _is_of_tokenizers(kind)):
            return
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
            raise IncompleteError(f"{self.path}: out of memory while it was loaded; use a larger machine.") from error
        words = shorten(str(error)[:3000], 300, placeholder=" ...") or type(error).__name__
        raise CheckpointError(
            f"{self.path}: transformers cannot load this checkpoint ({words}); check that config.json,"
            " the tokenizer files and the shards belong together."
        ) from error


class Encoding:
    """The context in which a checkpoint's tokenizer is given a text or its tokens; failures are the tokenizer's fault.

    Raises CheckpointError without a word of the library's, which may be words of the text.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and _is_of_tokenizers(kind):
            raise CheckpointError(
                "The checkpoint's tokenizer.json is broken: the tokenizers library fails at a text; download it again."
            ) from None


def _is_of_tokenizers(kind: type[BaseException] | None) -> bool:
    # The tokenizers library, which is written in Rust, raises `Exception` itself; where it breaks down, a class of
    # PyO3's that cannot be imported and is no Exception.
    return kind is Exception or (kind is not None and kind.__name__ == "PanicException")


def refuse_detours(config: Mapping[str, Any], files: Iterable[str]) -> None:
    """Refuse what leads transformers, and few other readers, to other weights or another configuration.

    What is measured would not be what is served. Raises CheckpointError that names the entry or the file.
    """
    for key in ("configuration_files", "transformers_weights"):
        if key in config:
            raise CheckpointError(
                f"config.json names other files to read in its place or beside it ({key}), and readers differ in what"
                " they load; delete the entry, or save the checkpoint again with `save_pretrained`."
            )
    for name in files:
        if _RANK.fullmatch(name):
            raise CheckpointError(
                f"{name} is a part of a training checkpoint, which transformers loads instead of the weights; move such"
                " files to another directory."
            )


def refuse_tokenizer_detours(settings: Mapping[str, Any]) -> None:
    """The same for `tokenizer_config.json`."""
    if "fast_tokenizer_files" in settings:
        raise CheckpointError(
            "tokenizer_config.json names other files to read in place of tokenizer.json (fast_tokenizer_files); delete"
            " the entry."
        )


def soon_matched(pattern: str, name: str) -> bool:
    """Whether a stranger's regular expression is sound, and held against this name soon, whatever comes of it."""
    if len(name) > 200 or not re.fullmatch(r"[\w.\\|()?:^$*+\[\]-]{1,300}", pattern, re.ASCII):
        return False
    # Repetitions of a group take time without end, and each other one multiplies it by the length of the name.
    if re.search(r"\)[*+?]", pattern) or len(re.findall(r"(?<!\()[*+?]\??", pattern)) > 3:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # a set in a set, which later Pythons may read otherwise
            re.compile(pattern)
    except (re.error, RecursionError, FutureWarning):
        return False
    return True


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
