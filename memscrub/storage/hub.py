"""Fetch a checkpoint from the Hugging Face hub, or find it in the cache; does not know what is in the files.

Two fetches: first everything small, then exactly the weight files that the index names, so that pickles, other
formats and second copies of the weights are never downloaded. `huggingface_hub` checks sizes, resumes what was
interrupted, and keeps what it fetched; with HF_HUB_OFFLINE=1 it looks in its cache only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from memscrub.errors import CheckpointError, IncompleteError
from memscrub.storage.files import MAX_JSON, is_safe_name, strict_json

if TYPE_CHECKING:
    from collections.abc import Sequence

_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*")
_IGNORED = ("*.bin", "*.pt", "*.py", "original/*", "onnx/*")


def parse_hub_id(source: str) -> tuple[str, str | None] | None:
    """`owner/name` and the revision of `owner/name[@revision]`; None for anything else."""
    match = _HUB_ID.fullmatch(source)
    return None if match is None else (match["id"], match["revision"])


def download(repo_id: str, revision: str | None, *, single: str, index: str) -> Path:
    """The cache snapshot of a hub model, resolved; its weights are the file `single`, or what `index` names.

    Raises:
        CheckpointError: no such model or revision, no access, or not in the cache and offline.
        IncompleteError: the hub or the way to it failed; another try may succeed.
    """
    wanted = f"{repo_id}@{revision}" if revision else repo_id
    first = _fetch(repo_id, revision, _SMALL_FILES, wanted)
    # The commit and not the branch again: a push between the two fetches must not mix two versions.
    commit = first.name if first.parent.name == "snapshots" else revision
    return _fetch(repo_id, commit, (*_SMALL_FILES, single, *_indexed(first / index)), wanted)


def _indexed(path: Path) -> tuple[str, ...]:
    """The files that an index names, as far as it can be read; whoever opens the checkpoint checks the rest."""
    try:
        if path.stat().st_size > MAX_JSON:
            return ()
        weight_map = strict_json(path.read_bytes())["weight_map"]
        names = {name for name in weight_map.values() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ()
    # A pattern in place of a name would fetch more than the index lists.
    return tuple(sorted(name for name in names if is_safe_name(name) and not set(name) & set("*?[]")))


def _fetch(repo_id: str, revision: str | None, patterns: Sequence[str], wanted: str) -> Path:
    """One snapshot, from the network or from what is already in the cache; `wanted` is its name in messages."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # as before transformers is imported
    from huggingface_hub import errors, snapshot_download  # only where a hub id is given: half a second to import

    # The hub raises the error of whichever HTTP client it was built on, and re-exports it under this name.
    http_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        snapshot = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo_id} is gated on the hub; accept its terms there and log in with `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{repo_id} has no revision '{revision}' on the hub; name a branch, tag or commit."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise CheckpointError(
            f"{wanted} is neither a local directory nor a model on the hub; check the name or,"
            " if the model is private, log in with `hf auth login`."
        ) from None
    except (http_error, errors.XetDownloadError, OSError, ValueError) as problem:
        raise _failed(wanted, problem) from problem
    return Path(snapshot).resolve(strict=True)


def _failed(wanted: str, problem: Exception) -> CheckpointError | IncompleteError:
    """Neither fetched nor complete in the cache: what was in the way, and whether another try can help."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return CheckpointError(
            f"{wanted} is not complete in the local cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or"
            " download the model elsewhere and name its directory."
        )
    # What the cache lacks is said last; the reason why it was asked is the cause.
    cause = problem.__cause__ if isinstance(problem, FileNotFoundError) and problem.__cause__ else problem
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return CheckpointError(f"The hub refuses access to {wanted} ({status}); log in with `hf auth login`.")
    what = type(cause).__name__ if status is None else f"status {status}"
    return IncompleteError(
        f"{wanted} could not be fetched from the hub ({what}); check the network and the disk and run again, which goes"
        " on where this stopped, or download the model elsewhere and name its directory."
    )
