"""Gradients of an earlier round that later rounds use again, where the edit changes little between them; knows neither
what a round does with them nor when the edit is done.

A round needs the gaps at the weights as they are, which one forward pass gives. Their gradients change slowly once the
steps are small, and take a backward pass, twice as long: with those of a round before, the rounds still converge to
where every gap holds (the chord method). Demands that are unmet get new ones, which keeps them converging as fast.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from memscrub.edit.breakpoints import Demand
from memscrub.edit.editable import EditableModel
from memscrub.edit.linearise import Gaps, Linearisation, linearise
from memscrub.edit.solver import Linearised

# So many rounds use those of an earlier one.
ROUNDS = 3


@dataclass
class KeptGradients:
    """The constraints of the last round that took gradients; whether each point's gradient is its `own`, so that it
    may be used for that point in another round; and the rounds that have used them since."""

    found: Linearisation | None = field(default=None, repr=False)
    own: bool = False
    used: int = 0

    @property
    def serve(self) -> bool:
        """Whether another round may use them."""
        return self.found is not None and self.own and self.used < ROUNDS

    def constraints(
        self,
        editable: EditableModel,
        demands: Sequence[Demand],
        at: Gaps,
        anew: Collection[int],
        *,
        batch_tokens: int,
    ) -> list[Linearised]:
        """Per site, the constraints at these break points, in order: of the demands `anew`, and of points that were
        none yet, measured at the current weights."""
        assert self.found is not None
        if at is not self.found.at:
            self.used += 1
            new = self._measured(editable, demands, at, anew, batch_tokens)
            self.found = _merged(self.found, new, at)
        return self.found.sites

    def _measured(
        self, editable: EditableModel, demands: Sequence[Demand], at: Gaps, anew: Collection[int], batch_tokens: int
    ) -> Linearisation:
        assert self.found is not None
        have = {point for point in self.found.at.points if point[0] not in anew}
        wanted: dict[int, dict[int, float]] = {}
        for point, margin in zip(at.points, at.margins.tolist(), strict=True):
            if point not in have:
                wanted.setdefault(point[0], {})[point[1]] = margin
        indices = list(wanted)
        found = linearise(
            editable,
            editable.sites,
            [demands[index] for index in indices],
            lambda number, state: wanted[indices[number]],
            own_path=True,
            batch_tokens=batch_tokens,
        )
        points = [(indices[number], token) for number, token in found.at.points]
        return Linearisation(Gaps(points, found.at.gaps, found.at.margins), found.sites)


def _merged(old: Linearisation, new: Linearisation, at: Gaps) -> Linearisation:
    """The constraints at these points, each from `new` where it is there."""
    rows = {point: row for row, point in enumerate([*old.at.points, *new.at.points])}
    chosen = torch.tensor([rows[point] for point in at.points], dtype=torch.long, device=at.gaps.device)
    if not new.sites:
        return Linearisation(at, [Linearised(own.activations[chosen], own.gradients[chosen]) for own in old.sites])
    sites = [
        Linearised(
            torch.cat([own.activations, more.activations])[chosen], torch.cat([own.gradients, more.gradients])[chosen]
        )
        for own, more in zip(old.sites, new.sites, strict=True)
    ]
    return Linearisation(at, sites)
