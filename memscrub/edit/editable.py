"""A model that carries an edit: what is live is what would be read back from disk; restored bit for bit.

Knows the sites and their dtypes on disk, not why anything is edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from memscrub.edit.disturbance import Metric
from memscrub.edit.low_rank import LowRank
from memscrub.errors import NumericalError
from memscrub.models.below import Below
from memscrub.models.model import LoadedModel
from memscrub.models.originals import OriginalsOnDisk
from memscrub.models.sites import Site, as_columns

Delta: TypeAlias = Tensor | LowRank


@dataclass
class EditableModel:
    """A model whose sites carry an edit on top of their original weights; restores them bit for bit.

    `stored` is each site's dtype on disk: live weights are always what would be read back after writing. With
    `disk`, originals are read from there whenever they are needed and edits are kept as `LowRank`: nothing of the
    size of the weights is held besides the weights. The edit as asked for, before rounding, is `deltas` without
    and `factors` with `disk`.
    """

    loaded: LoadedModel
    sites: tuple[Site, ...]
    stored: Mapping[str, torch.dtype]  # by Site.name
    originals: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    deltas: list[Tensor] = field(default_factory=list, repr=False)
    factors: list[LowRank] = field(default_factory=list, repr=False)
    disk: OriginalsOnDisk | None = field(default=None, repr=False)
    below: Below = field(init=False, repr=False)  # what texts come to before the lowest site

    def __post_init__(self) -> None:
        first, self.sites, stored, self.stored = self.sites, (), self.stored, {}
        self.add(first, stored)

    def add(self, sites: Sequence[Site], stored: Mapping[str, torch.dtype]) -> None:
        """Make further sites editable; `stored` is each one's dtype on disk, by Site.name."""
        if self.disk is None:
            copies = {site.tensor: self.loaded.parameter(site).clone() for site in sites}
            self.originals = {**self.originals, **copies}
            self.deltas += [torch.zeros_like(self.loaded.weight(site), dtype=torch.float32) for site in sites]
        else:
            self.originals = self.disk = self.disk.with_sites(self.loaded, sites)
            self.factors += [LowRank.zero(*_part_shape(self.loaded, site), self.loaded.device) for site in sites]
        self.sites = (*self.sites, *sites)
        self.stored = {**self.stored, **stored}
        self.below = Below(self.loaded, min((site.layer for site in self.sites), default=0))

    def apply(self, deltas: Sequence[Delta]) -> None:
        """Make the live weights the originals plus these deltas `[d, f]`, rounded as they will be stored.

        Raises NumericalError, with the weights as they were before, when a value is not finite or overflows the
        dtype on disk.
        """
        if self.disk is not None:
            self._apply_one_by_one([delta for delta in deltas if isinstance(delta, LowRank)])
            return
        dense = [delta for delta in deltas if isinstance(delta, Tensor)]
        values = [self._value(site, delta) for site, delta in zip(self.sites, dense, strict=True)]
        for site, delta, kept, value in zip(self.sites, dense, self.deltas, values, strict=True):
            kept.copy_(delta)
            self.loaded.weight(site).copy_(value)

    def _apply_one_by_one(self, deltas: list[LowRank]) -> None:
        """`apply` with one new matrix in memory at a time; a failure puts those before it back."""
        for done, (site, delta) in enumerate(zip(self.sites, deltas, strict=True)):
            try:
                value = self._value(site, delta)
            except NumericalError:
                for before, kept in zip(self.sites[:done], self.factors[:done], strict=True):
                    self.loaded.weight(before).copy_(self._value(before, kept))
                raise
            self.loaded.weight(site).copy_(value)
        self.factors = deltas

    def _value(self, site: Site, delta: Delta) -> Tensor:
        """The original with this edit `[d, f]`, rounded as it will be stored. Raises NumericalError."""
        original = self._original(site)
        dense = site.whole(delta.dense(), original) if isinstance(delta, LowRank) else delta
        value = (original + dense).to(self.stored[site.name])
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(f"the edit of '{site.name}' is not finite; it was rolled back.")
        return value

    def _original(self, site: Site) -> Tensor:
        values = self.originals[site.tensor].to(self.loaded.device)
        return as_columns(values, site.orientation).float()

    def restore(self) -> None:
        """Put the original weights back, bit for bit."""
        for delta in self.deltas:
            delta.zero_()
        self.factors = [delta.zeroed() for delta in self.factors]
        for site in self.sites:
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

    def snapshot(self) -> list[Delta]:
        """Copies of the deltas as they are, for `apply`."""
        return [delta.clone() for delta in self.deltas] if self.disk is None else list(self.factors)

    def stepped(self, index: int, left: Tensor, right: Tensor, *, kept: float, share: float) -> Delta:
        """Site `index`'s edit a `share` of the way to `kept` of it plus left^T right, on its editable part."""
        if self.disk is not None:
            return self.factors[index].stepped(left, right, kept=kept, share=share)
        delta = self.deltas[index]
        return delta.lerp(kept * delta + self.sites[index].whole(left.T @ right, delta), share)

    def price(self, index: int, metric: Metric) -> float:
        """The predicted disturbance of site `index`'s edit."""
        if self.disk is not None:
            return self.factors[index].price(metric)
        return metric.price(self.sites[index].part(self.deltas[index]))

    def change(self, site: Site) -> Tensor:
        """What the live weight differs from the original by, rounding included, `[d, f]` in float32."""
        return self.loaded.weight(site).float() - self._original(site)


def _part_shape(loaded: LoadedModel, site: Site) -> tuple[int, int]:
    """Rows and columns of the part of a site that may be edited."""
    rows, columns = loaded.weight(site).shape
    return len(site.rows or range(rows)), len(site.columns or range(columns))
