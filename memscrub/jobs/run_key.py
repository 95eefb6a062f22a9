"""What determines the result of a run, as digests, by what a user calls it; knows no journal and no file.

Digests of protected lists are apart: whoever can guess a list can confirm the guess with one, so a journal hides them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText
from memscrub.policy.document import Policy
from memscrub.reports.basis import MEASURES
from memscrub.storage.files import tree_digest


def key_of(loaded: LoadedModel, policy: Policy, checkpoint: Mapping[str, str], seed: int) -> dict[str, str]:
    """All but the lists; `checkpoint` are its files' digests."""
    return {
        "version of memscrub": f"{version('memscrub')} {MEASURES}",
        "checkpoint": tree_digest(checkpoint),
        "policy": hashlib.sha256(f"{policy.digest} {policy!r}".encode()).hexdigest(),
        "seed": str(seed),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def lists_key(texts: Sequence[TokenText], controls: Sequence[TokenText]) -> dict[str, str]:
    """The digests of the lists, to be hidden."""
    return {"protected list": _digest(texts), "list of controls": _digest(controls)}


def _digest(texts: Sequence[TokenText]) -> str:
    whole = hashlib.sha256()
    for text in texts:
        whole.update(repr((text.id, text.class_name, text.tokens, text.start, text.secrets)).encode())
    return whole.hexdigest()
