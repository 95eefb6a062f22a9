"""The joint edit: all texts of a policy broken in one checkpoint, by damped re-solves of one closed form.

Each round runs the texts through the model as edited so far, asks `breakpoints` which tokens must still give
way, linearises their gaps (`linearise`) and those of guarded ordinary text (`guards`), solves anew for the WHOLE edit
(`solver`), and goes part of the way there. Solving for the whole edit keeps it small; going part of the way keeps the
linearisation true. What counts is measured at weights rounded as they will be stored. Knows no files and no retain
text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from memscrub.edit.breakpoints import Demand, Prices, TextState, extend, violations
from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import Delta, EditableModel
from memscrub.edit.guards import Guard, standing
from memscrub.edit.linearise import Linearisation, linearise, linearise_at, prices
from memscrub.edit.solver import Linearised, Solution, least_disturbing_edit
from memscrub.errors import NumericalError
from memscrub.measures.extraction import NOISE
from memscrub.models.sites import Site

# (share of the edit kept, share of the step taken) per round; see `step_of`.
KEPT = ((0.0, 0.5), (0.0, 0.5), (0.3, 1.0), (0.5, 1.0), (0.75, 1.0), (0.9, 1.0), (0.95, 1.0))
# The gradient of the sum of all gaps also counts what an edit at one token does to later gaps: where all layers are
# edited that makes early, large steps cheaper. Late, small steps need each gap's own gradient, or a gap at an early
# token never closes. In the upper half alone own gradients do from the start.
OWN_PATH_FROM = 4


@dataclass(frozen=True)
class EditSettings:
    """How hard to try: logits by which another token must win, and rounds at most per run."""

    margin: float
    rounds: int
    batch_tokens: int = 2048


@dataclass(frozen=True)
class EditOutcome:
    """How an edit ended: which demands are unmet (indices), how many points it broke, and its predicted cost.

    `active`: constraints that pressed in the last solve; `condition`: the condition number of their kernel.
    `diverged`: a solve broke down and the best state before it was put back.
    """

    unmet: tuple[int, ...]
    break_points: int
    active: int
    cost: float
    rounds: int
    condition: float = 1.0
    diverged: bool = False


@dataclass(frozen=True)
class _Best:
    """The best state so far: fewest unmet demands, of equals the least predicted disturbance."""

    key: tuple[int, float]
    outcome: EditOutcome
    deltas: list[Delta]


@dataclass
class JointEdit:
    """One edit in the making: demands can be added, sites too, and each `run` goes on from where the last ended."""

    editable: EditableModel
    metrics: list[Metric]
    settings: EditSettings
    demands: list[Demand] = field(default_factory=list)
    prices: list[Prices] = field(default_factory=list)
    held: list[dict[int, float]] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    steps: int = 0  # taken so far, over all runs: a later run goes on with small steps
    last: Solution | None = None

    def demand(self, demands: Sequence[Demand], held: Sequence[Mapping[int, float]] | None = None) -> None:
        """Add demands, with the break points they hold from the start; priced at the weights as they are now."""
        margin, batch_tokens = self.settings.margin, self.settings.batch_tokens
        self.prices += prices(self.editable, self.metrics, demands, margin=margin, batch_tokens=batch_tokens)
        self.demands += demands
        self.held += [dict(points) for points in held] if held is not None else [{} for _ in demands]

    def replace(self, index: int, demand: Demand) -> None:
        """Put another demand in the place of this one; its break points are chosen anew."""
        margin, batch_tokens = self.settings.margin, self.settings.batch_tokens
        (self.prices[index],) = prices(self.editable, self.metrics, [demand], margin=margin, batch_tokens=batch_tokens)
        self.demands[index], self.held[index] = demand, {}

    def add_sites(self, sites: Sequence[Site], metrics: Sequence[Metric], stored: Mapping[str, torch.dtype]) -> None:
        """Let the next `run` edit these sites too."""
        self.editable.add(sites, stored)
        self.metrics += metrics

    def linearised(self, sites: Sequence[Site]) -> tuple[list[Linearised], list[int]]:
        """The constraints at the current weights, seen at these sites, and the demand each belongs to."""
        batch_tokens = self.settings.batch_tokens
        found = linearise_at(self.editable, sites, self.demands, self.held, batch_tokens=batch_tokens)
        return found.sites, found.owners

    def cost(self) -> float:
        """The predicted disturbance 1/2 sum_l tr(F D C D^T) of the whole edit."""
        return sum(self.editable.price(index, metric) for index, metric in enumerate(self.metrics))

    def rehearse(self, rounds: int) -> None:
        """Take so many rounds without keeping the best state. Only the very first chooses break points: rounds that
        find out what sites cost need no others.

        Raises NumericalError, with the weights as they were at first, when a solve breaks down.
        """
        with self.editable.restored_on_error():
            for _ in range(rounds):
                found = self._held_linearised() if self.steps else self._look()[0]
                if not any(self.held):
                    return
                self._step(found, *step_of(self.steps))
                self.steps += 1

    def run(self, progress: Callable[[int, int], None] = lambda done, unmet: None) -> EditOutcome:
        """Edit until every demand holds at the stored precision, or the rounds are used up.

        Leaves the cheapest state in which all demands hold, or the one with the fewest unmet. `progress` is told
        the round and the number of unmet demands. A solve that breaks down ends the run, and the best state before
        it stays; NumericalError (weights restored) when there is none.
        """
        with self.editable.restored_on_error():
            return self._run(progress)

    def _run(self, progress: Callable[[int, int], None]) -> EditOutcome:
        best: _Best | None = None
        diverged = False
        for number in range(self.settings.rounds + 1):
            try:
                found, unmet = self._look()
                best = self._better(best, unmet, number)
                progress(number, len(unmet))
                if number == self.settings.rounds or not any(self.held) or self._settled(best):
                    break
                self._step(found, *step_of(self.steps))
            except NumericalError:
                if best is None:
                    raise
                diverged = True
                break
            self.steps += 1
        assert best is not None
        self.editable.apply(best.deltas)
        return replace(best.outcome, diverged=diverged)

    def _better(self, best: _Best | None, unmet: tuple[int, ...], number: int) -> _Best:
        key = (len(unmet), self.cost())
        if not math.isfinite(key[1]):
            raise NumericalError("the edit's predicted disturbance is not finite; the edit was rolled back.")
        if best is not None and key >= best.key:
            return best
        active, condition = (0, 1.0) if self.last is None else (self.last.active, self.last.condition)
        points = sum(map(len, self.held))
        return _Best(key, EditOutcome(unmet, points, active, key[1], number, condition), self.editable.snapshot())

    def _settled(self, best: _Best) -> bool:
        """All demands hold, and the rounds that shrink the edit are over."""
        return not best.outcome.unmet and self.steps >= len(KEPT)

    def _look(self) -> tuple[Linearisation, tuple[int, ...]]:
        """One pass over the texts: extend their break points, linearise there, and say which demands are unmet."""
        unmet = []
        noise = NOISE[self.editable.loaded.dtype]
        patient = self.steps < len(KEPT) - 1

        def choose(index: int, state: TextState) -> Mapping[int, float]:
            demand = self.demands[index]
            if violations(demand, state, noise):
                unmet.append(index)
            self.held[index] = extend(
                demand,
                state,
                self.prices[index],
                self.held[index],
                self.settings.margin,
                patient=patient,
                threshold=noise,
            )
            return self.held[index]

        editable, batch_tokens = self.editable, self.settings.batch_tokens
        found = linearise(
            editable, editable.sites, self.demands, choose, own_path=self._own_path, batch_tokens=batch_tokens
        )
        return self._with_guards(found), tuple(sorted(unmet))

    def _held_linearised(self) -> Linearisation:
        """The constraints of the break points that are held, and of the guards."""
        editable, batch_tokens = self.editable, self.settings.batch_tokens
        return self._with_guards(
            linearise_at(
                editable,
                editable.sites,
                self.demands,
                self.held,
                own_path=self._own_path,
                batch_tokens=batch_tokens,
            )
        )

    def _with_guards(self, found: Linearisation) -> Linearisation:
        if not self.guards or not found.sites:
            return found
        return found + standing(
            self.editable, self.guards, own_path=self._own_path, batch_tokens=self.settings.batch_tokens
        )

    @property
    def _own_path(self) -> bool:
        return self.steps >= OWN_PATH_FROM or self.editable.below.first > 0

    def _step(self, found: Linearisation, kept: float, share: float) -> None:
        """Solve for the edit but `kept` of it, at the current linearisation, and go a `share` of the way there."""
        editable = self.editable
        bounds = -(found.gaps + found.margins)
        for site, linear in zip(editable.sites, found.sites, strict=True):
            change = site.part(editable.change(site))
            bounds = bounds + (1 - kept) * ((linear.gradients @ change) * linear.activations).sum(-1)
        self.last = least_disturbing_edit(found.sites, self.metrics, bounds, found.yields)
        pairs = zip(self.last.left, self.last.right, strict=True)
        editable.apply(
            [editable.stepped(n, left, right, kept=kept, share=share) for n, (left, right) in enumerate(pairs)]
        )


def step_of(number: int) -> tuple[float, float]:
    """How much of the edit a round keeps, and how far it goes towards its solution (a trust region).

    Early rounds solve for the whole edit anew and go half of the way, because the linearisation is far off. Later
    ones keep more and more of it and solve for the rest in full: the constraints hold to first order after every
    round, the edit still shrinks by what it does not keep, and steps become small enough to converge.
    """
    if number < len(KEPT):
        return KEPT[number]
    return 1.0, 1.0
