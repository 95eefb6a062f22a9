"""Where the matrix of a site is in a checkpoint's files, which may name and split it otherwise than memory does.

Knows names, not values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from memscrub.errors import ArchitectureError
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class DiskPlace:
    """Where a matrix is in the checkpoint's files: the tensor, and which part of one that holds all experts'."""

    tensor: str
    expert: int | None = None

    def of(self, values: Tensor) -> Tensor:
        """The matrix in the tensor's values."""
        return values if self.expert is None else values[self.expert]


def place_on_disk(loaded: LoadedModel, ckpt: Checkpoint, site: Site) -> DiskPlace:
    """Where a site's matrix is in the checkpoint's files.

    Raises ArchitectureError when no file holds it or more than one place could be meant.
    """
    experts = loaded.family.experts
    if site.expert is None or experts is None:
        return DiskPlace(name_on_disk(loaded, ckpt, site.tensor))
    block = f"{loaded.family.blocks}.{site.layer}"
    found = []
    for ending in experts.stored:
        own = "{expert}" in ending
        names = _stored_names(loaded, ckpt, f"{block}.{ending.format(expert=site.expert)}")
        found += [DiskPlace(name, None if own else site.expert) for name in names]
    if len(found) != 1:
        raise _not_one(ckpt, site.tensor, len(found))
    return found[0]


def name_on_disk(loaded: LoadedModel, ckpt: Checkpoint, tensor: str) -> str:
    """The name a parameter has in the checkpoint's files, which may lack the model's outer prefix.

    Raises ArchitectureError when no file holds it or more than one name could be meant.
    """
    found = _stored_names(loaded, ckpt, tensor)
    if len(found) != 1:
        raise _not_one(ckpt, tensor, len(found))
    return found[0]


def _stored_names(loaded: LoadedModel, ckpt: Checkpoint, tensor: str) -> list[str]:
    prefix = str(getattr(loaded.model, "base_model_prefix", "")) + "."
    candidates = {tensor, tensor.removeprefix(prefix), prefix + tensor}
    return sorted(name for name in candidates if name in ckpt.tensors)


def _not_one(ckpt: Checkpoint, tensor: str, count: int) -> ArchitectureError:
    return ArchitectureError(
        f"{ckpt.path}: the tensor '{tensor}' was found under {count} names in the shards;"
        " memscrub edits only tensors it can name exactly."
    )
