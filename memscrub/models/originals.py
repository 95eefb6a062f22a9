"""The original values of edited matrices, read from the checkpoint whenever they are asked for; holds none of them.

Knows which tensor of which file a site is, not what is done with its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from memscrub.models.disk_places import DiskPlace, place_on_disk
from memscrub.models.lean_weights import Reader
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.storage.checkpoint import Checkpoint, read_tensor


@dataclass(frozen=True)
class OriginalsOnDisk(Mapping[str, Tensor]):
    """Original values by `Site.tensor`, in their stored dtype; every look is a fresh copy from the file."""

    ckpt: Checkpoint = field(repr=False)
    places: Mapping[str, DiskPlace] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        return place.of(read_tensor(self.ckpt, place.tensor))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def with_sites(self, loaded: LoadedModel, sites: Iterable[Site]) -> OriginalsOnDisk:
        """The same with these sites' tensors too."""
        more = {site.tensor: place_on_disk(loaded, self.ckpt, site) for site in sites}
        return replace(self, places={**self.places, **more})

    def without(self, names: Iterable[str]) -> OriginalsOnDisk:
        """The same but for these tensors."""
        left = set(names)
        return replace(self, places={name: place for name, place in self.places.items() if name not in left})

    def readers(self) -> dict[str, Reader]:
        """For every tensor, how to read it."""
        return {name: partial(self.__getitem__, name) for name in self.places}
