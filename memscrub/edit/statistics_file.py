"""Retain statistics in a file, so that the next run on the same inputs need not measure them again; knows neither
how they are measured nor what they are used for.

One safetensors file. Its metadata name every input that determines the statistics: a file made from anything else
is refused, never used. Per site it holds the Cholesky factors of both metrics, f^2 + d^2 float32 numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from memscrub.edit.disturbance import Metric
from memscrub.errors import OutputError, UsageError
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.storage.files import replacing, strict_json, tree_digest
from memscrub.storage.writing import disk_errors

# Of this format and of what the numbers mean: to be raised whenever either changes.
FORMAT = "2"
# As safetensors has it: a longer header is none.
MAX_HEADER = 100_000_000


def statistics_key(
    loaded: LoadedModel,
    checkpoint: Mapping[str, str],
    retain: Sequence[Tensor],
    *,
    seed: int,
    ridge: float,
) -> dict[str, str]:
    """Everything that determines the statistics, by what a user calls it; `checkpoint` are its files' digests."""
    return {
        "checkpoint": tree_digest(checkpoint),
        "retain text": rows_digest(retain),
        "seed": str(seed),
        "ridge": repr(ridge),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "torch": version("torch"),
    }


def metrics_from(
    path: Path | None,
    key: Mapping[str, str],
    compute: Callable[[], list[Metric]],
    sites: Sequence[Site],
    *,
    device: torch.device | str | None = None,
) -> list[Metric]:
    """The metrics of these sites, in order: from the file where it has them all, else computed and added to it.

    Sites do not influence each other's metrics, so one file serves stages that edit different ones. Without a path
    they are only computed. What is read is put on `device`, or on the key's kind of device. Raises UsageError as
    `load_metrics` does.
    """
    if path is None:
        return compute()
    names = [site_name(site) for site in sites]
    stored = load_metrics(path, key) if path.exists() else {}
    if set(names) <= set(stored):
        where = torch.device(key.get("device", "cpu") if device is None else device)
        return [Metric(stored[name].inputs.to(where), stored[name].outputs.to(where)) for name in names]
    metrics = compute()
    save_metrics(path, key, {**stored, **dict(zip(names, metrics, strict=True))})
    return metrics


def check_place(path: Path, *, outside: Sequence[Path]) -> None:
    """Refuse a file that could not be written, or that lies in one of these directories, before an hour of work.

    Raises UsageError for a folder that does not exist, OutputError for a place that is not ours.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"{path}: the statistics cannot be kept there; name a file in a folder that exists.")
    for folder in outside:
        if path.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{path} lies in {folder}; keep the statistics file in another folder.")


def check_key(path: Path, key: Mapping[str, str]) -> None:
    """Refuse a file that was made from other inputs, by its header alone; one that does not exist yet is none.

    Raises UsageError as `load_metrics` does.
    """
    if path.exists():
        with disk_errors(path):
            _compare_keys(path, _metadata(path), key)


def save_metrics(path: Path, key: Mapping[str, str], metrics: Mapping[str, Metric]) -> None:
    """Write the file, under a temporary name first so that a failure leaves no half file.

    Raises IncompleteError when the disk is full, OutputError when the place is not ours to write.
    """
    tensors = {}
    for name, metric in metrics.items():
        tensors[f"{name}.inputs"] = _plain(metric.inputs)
        tensors[f"{name}.outputs"] = _plain(metric.outputs)
    metadata = {
        "memscrub_statistics": FORMAT,
        "key": json.dumps(dict(key), sort_keys=True),
        "sha256": _digest(tensors),
    }
    with disk_errors(path), replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{error}") from None
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def load_metrics(path: Path, key: Mapping[str, str]) -> dict[str, Metric]:
    """The metrics by name of their site, on the CPU.

    Raises UsageError when the file is damaged or no statistics file, and when it was made from other inputs than
    `key` says: the message names the first that differs.
    """
    with disk_errors(path):
        metadata = _metadata(path)
    _compare_keys(path, metadata, key)
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError):
        raise UsageError(_damaged(path)) from None
    if _digest(tensors) != metadata.get("sha256"):
        raise UsageError(_damaged(path))
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    if {f"{name}.{part}" for name in names for part in ("inputs", "outputs")} != set(tensors):
        raise UsageError(_damaged(path))
    return {name: Metric(tensors[f"{name}.inputs"], tensors[f"{name}.outputs"]) for name in names}


def site_name(site: Site) -> str:
    """A name for a site that tells its restrictions to columns and rows apart."""
    if site.columns is None and site.rows is None:
        return site.name
    part = f"{site.columns} {site.rows}"
    return f"{site.name}:{hashlib.sha256(part.encode()).hexdigest()[:16]}"


def _metadata(path: Path) -> dict[str, Any]:
    """The file's own words about itself, from the JSON header behind the 8 bytes of its length."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, MAX_HEADER))
    try:
        found = strict_json(header)["__metadata__"]
        key = strict_json(found["key"].encode())
        stated = found["memscrub_statistics"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(_damaged(path)) from None
    if not isinstance(key, dict):
        raise UsageError(_damaged(path))
    if stated != FORMAT:
        raise UsageError(
            f"{path}: these statistics are of format {str(stated)[:20]!r} and this memscrub writes {FORMAT!r};"
            " delete the file to make it anew."
        )
    return {"key": key, "sha256": found.get("sha256")}


def _compare_keys(path: Path, metadata: Mapping[str, Any], key: Mapping[str, str]) -> None:
    made = metadata["key"]
    for name in (*key, *(extra for extra in made if extra not in key)):
        was, now = made.get(name), key.get(name)
        if was == now:
            continue
        readable = all(isinstance(value, str) and len(value) < 40 for value in (was, now))
        shown = f" ({was} there, {now} here)" if readable else ""
        raise UsageError(
            f"{path}: these statistics were made with another {name}{shown}; name another file with --stats,"
            " or delete this one to make it anew."
        )


def _damaged(path: Path) -> str:
    return f"{path}: this is no statistics file of memscrub, or it is damaged; delete it or name another with --stats."


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().clone()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """One SHA-256 over names, shapes and values: a flipped bit must not become a wrong price."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(f"{name} {list(tensors[name].shape)} {tensors[name].dtype}\n".encode())
        whole.update(_bytes(tensors[name]))
    return whole.hexdigest()


def rows_digest(rows: Sequence[Tensor]) -> str:
    """SHA-256 of the token ids; ordinary text, so nothing is given away by it."""
    whole = hashlib.sha256()
    for part in rows:
        ids = part.to(device="cpu", dtype=torch.int64)
        whole.update(f"{list(ids.shape)}\n".encode())
        whole.update(_bytes(ids))
    return whole.hexdigest()
