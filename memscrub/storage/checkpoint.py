"""Open a checkpoint and say exactly which bytes are which tensor; knows no architecture and computes nothing.

    ckpt = open_checkpoint("models/my-model")          # or a cache snapshot, or "owner/name@revision"
    ckpt.tensors["model.layers.0.mlp.down_proj.weight"]  # -> TensorInfo(shard, dtype, shape, begin, end)

Everything in a checkpoint is data from a stranger: no pickle is loaded, no code in it is run, and no path in
it is joined before it was found among the files that are really there.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memscrub.errors import CheckpointError
from memscrub.storage.files import (
    MAX_JSON,
    cache_link_roots,
    digest_names,
    is_safe_name,
    list_files,
    strict_json,
    tree_digest,
)
from memscrub.storage.hub import download, parse_hub_id
from memscrub.storage.quantized import refuse_quantized
from memscrub.storage.safetensors_header import TensorInfo, read_header
from memscrub.storage.untrusted_config import refuse_detours

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorInfo", "digest_files", "open_checkpoint", "read_tensor", "tree_digest"]

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SKIPPED_DIRECTORIES = frozenset({".git", ".cache"})
"""Version control and download bookkeeping, not the checkpoint; `.git` may hold all weights a second time."""

_FROM = "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
_CONVERT = f'python -c "{_FROM}[c.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2]) for c in (M, T)]"'


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose weights were checked to be well-formed safetensors; read-only.

    `files` are the POSIX names of all regular files, sorted, without `.git` and `.cache`. `weight_map` names
    the shard of each tensor, `tensors` its exact bytes. Tied weights that are not stored have no entry.
    """

    path: Path
    files: tuple[str, ...]
    weight_map: Mapping[str, str]
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def shards(self) -> tuple[str, ...]:
        """The files that hold the weights, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def open_checkpoint(source: str | Path, *, quantized: bool = False) -> Checkpoint:
    """Open a local directory, a Hugging Face cache snapshot, or a hub id `owner/name[@revision]`.

    A hub id is looked up only where no such path exists; only safetensors, JSON and tokenizer files are
    fetched. Messages name the file at fault and what to do about it. `quantized` opens quantized weights too,
    which only `dequantize` can use.

    Raises:
        CheckpointError: not found, not safetensors, quantized, malformed, or with links that lead out of it.
        IncompleteError: the hub did not answer.
    """
    root = _locate(source)
    links = (root, *cache_link_roots(root))
    files = list_files(root, error=CheckpointError, link_roots=links, skip=SKIPPED_DIRECTORIES)
    config = _read_config(root, files, str(source))
    refuse_detours(config, files)
    if not quantized:
        refuse_quantized(config, shlex.quote(str(source)))
    shards, index = _find_shards(root, files)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(root / shard, shard).items():
            if name in tensors:
                raise CheckpointError(f"Tensor {name!r} is in both {tensors[name].shard} and {shard}; save it again.")
            tensors[name] = info
    if index is not None:
        _check_index(index, tensors)
    if not tensors:
        raise CheckpointError(f"{root} holds no tensors; save the checkpoint again.")
    if not quantized:
        _refuse_narrow(tensors)
    return Checkpoint(root, files, {name: info.shard for name, info in tensors.items()}, config, tensors)


def _locate(source: str | Path) -> Path:
    """The resolved local directory of `source`, downloading it where it names a model on the hub."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return path.resolve(strict=True)
        exists = path.is_symlink() or path.exists()
    except (OSError, ValueError, RuntimeError) as problem:
        raise CheckpointError(f"{source} cannot be opened: {problem}.") from problem
    if exists:
        raise CheckpointError(f"{source} is not a directory; name the directory that holds {CONFIG}.")
    hub = parse_hub_id(str(source))
    if hub is None:
        raise CheckpointError(f"{source} does not exist; name a checkpoint directory or a hub id owner/name.")
    return download(*hub, single=SINGLE, index=INDEX)


def read_object(root: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint or an adapter. Raises CheckpointError where there is none."""
    try:
        if (root / name).stat().st_size > MAX_JSON:  # a sparse file of any size is quickly made
            raise CheckpointError(f"{name} is larger than {MAX_JSON >> 20} MiB; download or save it again.")
        value = strict_json((root / name).read_bytes())
    except OSError as problem:
        raise CheckpointError(f"{name} cannot be read: {problem.strerror}.") from problem
    except ValueError as problem:
        raise CheckpointError(f"{name} cannot be used: {problem}; download or save it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object; download or save it again.")
    return value


def _read_config(root: Path, files: tuple[str, ...], source: str) -> dict[str, Any]:
    """The parsed config.json."""
    if any(name.endswith(".gguf") for name in files) and SINGLE not in files and INDEX not in files:
        raise CheckpointError(f"{root} holds GGUF weights; use the safetensors checkpoint they were made from.")
    if CONFIG in files:
        if ADAPTER in files:
            # With PEFT installed, transformers loads the base that the adapter names, from wherever that is.
            raise CheckpointError(
                f"{root} holds both {CONFIG} and {ADAPTER}, and readers differ in what they load; move the adapter to a"
                " directory of its own."
            )
        return read_object(root, CONFIG)
    if ADAPTER in files:
        raise _adapter_advice(root, shlex.quote(source))
    raise CheckpointError(f"{root} has no {CONFIG}; name the directory of a Hugging Face checkpoint.")


def _adapter_advice(root: Path, where: str) -> CheckpointError:
    """What to do with an adapter; the base it names is a stranger's text, shown only where it is a plain name."""
    base = read_object(root, ADAPTER).get("base_model_name_or_path")
    known = base if isinstance(base, str) and re.fullmatch(r"[\w./@-]{1,100}", base, re.ASCII) else "BASE"
    return CheckpointError(
        f"{where} is an adapter and not a whole checkpoint; scan it with `memscrub scan {known} --adapter {where}`, or"
        f" write the whole with `memscrub merge {known} --adapter {where} --out NEW` and use NEW."
    )


def _refuse_narrow(tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse weights of 8 bits or fewer, and weights that are no floats, which config.json does not call quantized.

    Without scales they mean nothing. Tensors that are no weights (masks, for example) may have any dtype.
    """
    for name, info in tensors.items():
        whole = name.endswith(".weight") and info.dtype not in ("F64", "F32", "F16", "BF16")
        if whole or info.dtype.startswith(("F8_", "F6_")) or info.dtype == "F4":
            raise CheckpointError(
                f"The tensor {name!r} is stored as {info.dtype}, but config.json names no quantization_config; download"
                " the checkpoint again, or use the original that it was made from."
            )


def _find_shards(root: Path, files: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The weight files, and the index that says which tensor is in which (None for a single file)."""
    if SINGLE in files and INDEX in files:
        # Readers differ in which one they load, so the one that was not fixed could be the one served.
        raise CheckpointError(f"{root} holds both {SINGLE} and {INDEX}; delete the one that is out of date.")
    if SINGLE in files:
        return (SINGLE,), None
    if INDEX not in files:
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in files):
            raise CheckpointError(
                f"{root} holds pickled weights only, which memscrub never loads; where you trust its source, convert it"
                f" with this and use NEW: {_CONVERT} {shlex.quote(str(root))} NEW"
            )
        if any(name.endswith((".h5", ".msgpack")) for name in files):
            raise CheckpointError(
                f"{root} holds TensorFlow or Flax weights only; load them with `from_tf=True` or `from_flax=True` in"
                " transformers 4, save them with `save_pretrained` and use the result."
            )
        raise CheckpointError(f"{root} has neither {SINGLE} nor {INDEX}; download the checkpoint again.")
    index = read_object(root, INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{INDEX} has no weight_map of tensor names to file names; save the checkpoint again.")
    present = set(files)
    for shard in sorted(set(index.values())):
        if not is_safe_name(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX} names {shard[:200]!r}, which is no safetensors file of this directory.")
        if shard not in present:
            raise CheckpointError(f"{INDEX} names {shard[:200]}, which is missing; download the checkpoint again.")
    return tuple(sorted(set(index.values()))), index


def _check_index(index: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, shard in index.items():
        if name not in tensors:
            raise CheckpointError(f"{INDEX} names tensor {name[:200]!r}, which {shard} does not hold; save it again.")
        if tensors[name].shard != shard:
            raise CheckpointError(f"{INDEX} says {name!r} is in {shard}, but it is in {tensors[name].shard}.")
    for name, info in tensors.items():
        if name not in index:
            raise CheckpointError(f"{info.shard} holds tensor {name!r}, which {INDEX} does not name; save it again.")


def digest_files(source: Checkpoint | str | Path, *, workers: int | None = None) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint or plain directory, by POSIX name, in parallel threads.

    Raises:
        CheckpointError: the directory cannot be listed, or holds links that lead out of it.
        IncompleteError: a file cannot be read to its end.
    """
    if isinstance(source, Checkpoint):
        return digest_names(source.path, source.files, workers=workers)
    root = Path(os.path.realpath(source))
    links = (root, *cache_link_roots(root))
    files = list_files(root, error=CheckpointError, link_roots=links, skip=SKIPPED_DIRECTORIES)
    return digest_names(root, files, workers=workers)


def read_tensor(ckpt: Checkpoint, name: str) -> torch.Tensor:
    """One stored tensor, in its stored dtype; a copy, so nothing refers to the file afterwards.

    Raises:
        CheckpointError: no such tensor, or its file changed since the checkpoint was opened.
    """
    from safetensors import SafetensorError, safe_open

    if name not in ckpt.tensors:
        raise CheckpointError(f"{ckpt.path} stores no tensor {name!r}.")
    shard = ckpt.weight_map[name]
    try:
        with safe_open(ckpt.path / shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name).clone()
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"{shard} cannot be read any more: {problem}.") from problem
    return tensor
