"""A model that carries an edit: what is live is what would be read back from disk; restored bit for bit.

Knows the sites and their dtypes on disk, not why anything is edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.errors import NumericalError
from memscrub.model import LoadedModel
from memscrub.sites import Site, as_columns


@dataclass
class EditableModel:
    """A model whose sites carry an edit on top of their original weights; restores them bit for bit.

    `stored` is each site's dtype on disk: live weights are always what would be read back after writing.
    """

    loaded: LoadedModel
    sites: tuple[Site, ...]
    stored: Mapping[str, torch.dtype]  # by Site.name
    originals: dict[str, Tensor] = field(default_factory=dict, repr=False)
    deltas: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        first, self.sites, stored, self.stored = self.sites, (), self.stored, {}
        self.add(first, stored)

    def add(self, sites: Sequence[Site], stored: Mapping[str, torch.dtype]) -> None:
        """Make further sites editable; `stored` is each one's dtype on disk, by Site.name."""
        for site in sites:
            self.originals[site.tensor] = self.loaded.parameter(site).clone()
            self.deltas.append(torch.zeros_like(self.loaded.weight(site), dtype=torch.float32))
        self.sites = (*self.sites, *sites)
        self.stored = {**self.stored, **stored}

    def apply(self, deltas: Sequence[Tensor]) -> None:
        """Make the live weights the originals plus these deltas `[d, f]`, rounded as they will be stored.

        Raises NumericalError, with the weights as they were before, when a value is not finite or overflows the
        dtype on disk.
        """
        values = []
        for site, delta in zip(self.sites, deltas, strict=True):
            original = as_columns(self.originals[site.tensor], site.orientation)
            value = (original.float() + delta).to(self.stored[site.name])
            if not bool(torch.isfinite(value).all()):
                raise NumericalError(f"the edit of '{site.name}' is not finite; it was rolled back.")
            values.append(value)
        for site, delta, kept, value in zip(self.sites, deltas, self.deltas, values, strict=True):
            kept.copy_(delta)
            self.loaded.weight(site).copy_(value)

    def restore(self) -> None:
        """Put the original weights back, bit for bit."""
        for site, delta in zip(self.sites, self.deltas, strict=True):
            delta.zero_()
            self.loaded.parameter(site).copy_(self.originals[site.tensor])

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Inside, an error or an interrupt puts the original weights back before it goes on."""
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self.restore()

    def snapshot(self) -> list[Tensor]:
        """Copies of the deltas as they are, for `apply`."""
        return [delta.clone() for delta in self.deltas]

    def change(self, site: Site) -> Tensor:
        """What the live weight differs from the original by, rounding included, `[d, f]` in float32."""
        original = as_columns(self.originals[site.tensor], site.orientation)
        return self.loaded.weight(site).float() - original.float()
