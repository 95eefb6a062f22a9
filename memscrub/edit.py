"""The joint edit: all texts of a policy broken in one checkpoint, by damped re-solves of one closed form.

Each round runs the texts through the model as edited so far, asks `breakpoints` which tokens must still give
way, linearises their gaps, solves anew for the WHOLE edit (`solver`), and goes part of the way there. Solving
for the whole edit keeps it small; going part of the way keeps the linearisation true. What counts is measured
at weights rounded as they will be stored. Knows the model through `trace` only, no files and no retain text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from memscrub.breakpoints import Demand, Prices, TextState, extend, violations
from memscrub.disturbance import Metric
from memscrub.errors import NumericalError
from memscrub.extraction import NOISE, Scores, score_logits
from memscrub.model import LoadedModel, Site, as_columns
from memscrub.solver import Linearised, least_disturbing_edit
from memscrub.tokens import batches, pad
from memscrub.trace import OwnPath, Trace, traced

# Every break costs something whatever its price: this share of the median cost keeps their number down.
COUNT_WEIGHT = 0.3
# (share of the edit kept, share of the step taken) per round; see `step_of`.
KEPT = ((0.0, 0.5), (0.0, 0.5), (0.3, 1.0), (0.5, 1.0), (0.7, 1.0), (0.8, 1.0), (0.9, 1.0), (0.95, 1.0))
# The gradient of the sum of all gaps also counts what an edit at one token does to later gaps; that makes early,
# large steps cheaper. Late, small steps need each gap's own gradient, or a gap at an early token never closes.
OWN_PATH_FROM = 5


@dataclass(frozen=True)
class EditSettings:
    """How hard to try: logits by which another token must win, and rounds at most."""

    margin: float
    rounds: int
    batch_tokens: int = 2048


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
        """Make the live weights the originals plus these deltas `[d, f]`, rounded as they will be stored."""
        for site, delta, kept in zip(self.sites, deltas, self.deltas, strict=True):
            kept.copy_(delta)
            original = as_columns(self.originals[site.tensor], site.orientation)
            value = (original.float() + delta).to(self.stored[site.name])
            if not bool(torch.isfinite(value).all()):
                raise NumericalError(f"the edit of '{site.name}' is not finite; it was rolled back.")
            self.loaded.weight(site).copy_(value)

    def restore(self) -> None:
        """Put the original weights back, bit for bit."""
        for site, delta in zip(self.sites, self.deltas, strict=True):
            delta.zero_()
            self.loaded.parameter(site).copy_(self.originals[site.tensor])

    def change(self, site: Site) -> Tensor:
        """What the live weight differs from the original by, rounding included, `[d, f]` in float32."""
        original = as_columns(self.originals[site.tensor], site.orientation)
        return self.loaded.weight(site).float() - original.float()


@dataclass(frozen=True)
class EditOutcome:
    """How an edit ended: which demands are unmet (indices), how many points it broke, and its predicted cost."""

    unmet: tuple[int, ...]
    break_points: int
    active: int
    cost: float
    rounds: int


@dataclass
class _Round:
    """What one pass over the texts found: constraints at the current weights, and unmet demands."""

    sites: list[Linearised]
    gaps: Tensor
    margins: Tensor
    owners: list[int]  # the demand of each constraint
    unmet: tuple[int, ...]


@dataclass
class JointEdit:
    """One edit in the making: demands can be added, sites too, and each `run` goes on from where the last ended."""

    editable: EditableModel
    metrics: list[Metric]
    settings: EditSettings
    demands: list[Demand] = field(default_factory=list)
    prices: list[Prices] = field(default_factory=list)
    held: list[dict[int, float]] = field(default_factory=list)
    cost: float = 0.0
    active: int = 0
    steps: int = 0  # taken so far, over all runs: a later run goes on with small steps

    def demand(self, demands: Sequence[Demand]) -> None:
        """Add demands; their prices are taken at the weights as they are now."""
        self.prices += prices(self.editable, self.metrics, demands, self.settings)
        self.demands += demands
        self.held += [{} for _ in demands]

    def add_sites(self, sites: Sequence[Site], metrics: Sequence[Metric], stored: Mapping[str, torch.dtype]) -> None:
        """Let the next `run` edit these sites too."""
        self.editable.add(sites, stored)
        self.metrics += metrics

    def linearised(self, sites: Sequence[Site]) -> tuple[list[Linearised], list[int]]:
        """The constraints at the current weights, seen at these sites, and the demand each belongs to."""
        found = _linearise(self, sites)
        return found.sites, found.owners

    def run(self, progress: Callable[[int, int], None] = lambda done, unmet: None) -> EditOutcome:
        """Edit until every demand holds at the stored precision, or the rounds are used up.

        Leaves the cheapest state in which all demands hold, or the one with the fewest unmet. `progress` is told
        the round and the number of unmet demands. Raises NumericalError (weights restored) when the solve breaks
        down.
        """
        try:
            return self._run(progress)
        except (NumericalError, KeyboardInterrupt):
            self.editable.restore()
            raise

    def _run(self, progress: Callable[[int, int], None]) -> EditOutcome:
        best: tuple[tuple[int, float], EditOutcome, list[Tensor]] | None = None
        rounds = self.settings.rounds
        for number in range(rounds + 1):
            found = _linearise(self)
            key = (len(found.unmet), self.cost)
            if best is None or key < best[0]:
                points = sum(map(len, self.held))
                outcome = EditOutcome(found.unmet, points, self.active, self.cost, number)
                best = (key, outcome, [delta.clone() for delta in self.editable.deltas])
            progress(number, len(found.unmet))
            if number == rounds or not any(self.held) or _settled(best[1], self.steps):
                break
            self.cost, self.active = _step(self, found, *step_of(self.steps))
            self.steps += 1
        assert best is not None
        self.editable.apply(best[2])
        self.cost, self.active = best[1].cost, best[1].active
        return best[1]


def _settled(best: EditOutcome, steps: int) -> bool:
    """All demands hold, and the rounds that shrink the edit are over."""
    return not best.unmet and steps >= len(KEPT)


def step_of(number: int) -> tuple[float, float]:
    """How much of the edit a round keeps, and how far it goes towards its solution (a trust region).

    Early rounds solve for the whole edit anew and go half of the way, because the linearisation is far off. Later
    ones keep more and more of it and solve for the rest in full: the constraints hold to first order after every
    round, the edit still shrinks by what it does not keep, and steps become small enough to converge.
    """
    if number < len(KEPT):
        return KEPT[number]
    return 1.0, 1.0


def _step(edit: JointEdit, found: _Round, kept: float, share: float) -> tuple[float, int]:
    """Solve for the edit but `kept` of it, at the current linearisation, and go a `share` of the way there."""
    editable = edit.editable
    bounds = -(found.gaps + found.margins)
    for site, linear in zip(editable.sites, found.sites, strict=True):
        change = _restricted(editable.change(site), site)
        bounds += (1 - kept) * ((linear.gradients @ change) * linear.activations).sum(-1)
    solution = least_disturbing_edit(found.sites, edit.metrics, bounds)
    deltas = []
    for site, delta, left, right in zip(editable.sites, editable.deltas, solution.left, solution.right, strict=True):
        target = kept * delta
        if site.columns is None:
            target += left.T @ right
        else:
            target[:, list(site.columns)] += left.T @ right
        deltas.append(delta.lerp(target, share))
    editable.apply(deltas)
    return _cost(edit), solution.active


def _cost(edit: JointEdit) -> float:
    """The predicted disturbance 1/2 sum_l tr(F D C D^T) of the whole edit."""
    total = 0.0
    for site, delta, metric in zip(edit.editable.sites, edit.editable.deltas, edit.metrics, strict=True):
        half = metric.outputs.T @ _restricted(delta, site) @ metric.inputs
        total += 0.5 * float(half.square().sum())
    return total


def _restricted(matrix: Tensor, site: Site) -> Tensor:
    """The columns of `[d, f]` that the site may edit."""
    return matrix if site.columns is None else matrix[:, list(site.columns)]


def _activations(activations: Tensor, site: Site) -> Tensor:
    return activations if site.columns is None else activations[..., list(site.columns)]


def _linearise(edit: JointEdit, at: Sequence[Site] | None = None) -> _Round:
    """One pass over the texts: extend their break points and linearise the gap at each of them."""
    editable, demands, held, settings = edit.editable, edit.demands, edit.held, edit.settings
    sites = editable.sites if at is None else at
    activations: list[list[Tensor]] = [[] for _ in sites]
    gradients: list[list[Tensor]] = [[] for _ in sites]
    gaps, margins, unmet = [], [], []
    owners: list[int] = []
    path = OwnPath() if edit.steps >= OWN_PATH_FROM else nullcontext()
    for batch, trace, logits, states in _passes(editable, sites, demands, settings, path):
        for index, state in zip(batch, states, strict=True):
            if violations(demands[index], state, NOISE[editable.loaded.dtype]):
                unmet.append(index)
            held[index] = extend(
                demands[index],
                state,
                edit.prices[index],
                held[index],
                settings.margin,
                patient=edit.steps < len(KEPT) - 1,
                threshold=NOISE[editable.loaded.dtype],
            )
        rows = torch.tensor([row for row, index in enumerate(batch) for _ in held[index]], dtype=torch.long)
        tokens = torch.tensor([token for index in batch for token in held[index]], dtype=torch.long)
        if not len(rows):
            continue
        targets = torch.tensor([demands[index].tokens[token] for index in batch for token in held[index]])
        gap = _gaps(logits, rows, tokens - 1, targets)
        for site_index, gradient in enumerate(torch.autograd.grad(gap.sum(), trace.writes)):
            site = sites[site_index]
            inputs = _activations(trace.activations[site_index][rows, tokens - 1], site)
            activations[site_index].append(inputs.float())
            gradients[site_index].append(gradient[rows, tokens - 1].float())
        gaps.append(gap.detach())
        margins += [margin for index in batch for margin in held[index].values()]
        owners += [index for index in batch for _ in held[index]]
    device = editable.loaded.device
    return _Round(
        [Linearised(torch.cat(a), torch.cat(g)) for a, g in zip(activations, gradients, strict=True) if a],
        torch.cat(gaps) if gaps else torch.empty(0, device=device),
        torch.tensor(margins, device=device),
        owners,
        tuple(sorted(unmet)),
    )


def _passes(
    editable: EditableModel,
    sites: Sequence[Site],
    demands: Sequence[Demand],
    settings: EditSettings,
    path: AbstractContextManager[object],
) -> Iterator[tuple[list[int], Trace, Tensor, list[TextState]]]:
    """Forward passes over the demands' sequences, traced: batch of indices, trace, logits and the texts' states."""
    loaded = editable.loaded
    budget = loaded.batch_tokens(settings.batch_tokens, gradients=True)
    for batch in batches([len(demand.tokens) for demand in demands], budget):
        ids = pad([demands[index].tokens for index in batch]).to(loaded.device)
        with path, traced(loaded, sites) as trace:
            logits = loaded.logits(ids)
            detached = logits.detach()[:, :-1]
            states = []
            for row, index in enumerate(batch):
                (scores,) = score_logits(detached[row : row + 1], ids[row : row + 1, 1:], demands[index].sampling)
                states.append(_state(scores, len(demands[index].tokens)))
            yield batch, trace, logits, states


def _state(scores: Scores, length: int) -> TextState:
    gap, log_p, rest = ([0.0, *values[: length - 1].tolist()] for values in (scores.gap, scores.log_p, scores.rest))
    return TextState(gap, log_p, rest)


def _gaps(logits: Tensor, rows: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
    """Logit of each target minus the best other token's, differentiable, `[n]`."""
    chosen = logits[rows.to(logits.device), positions.to(logits.device)]
    targets = targets.to(logits.device)[:, None]
    best_other = chosen.detach().scatter(-1, targets, -torch.inf).argmax(-1, keepdim=True)
    return (chosen.gather(-1, targets) - chosen.gather(-1, best_other))[:, 0]


def prices(
    editable: EditableModel, metrics: Sequence[Metric], demands: Sequence[Demand], settings: EditSettings
) -> list[Prices]:
    """What breaking each token would cost by itself: (gap + m)^2 / K_tt, from one pass at the current weights.

    Each token's price is that of its own path (`trace.OwnPath`). With the unseparated gradient of the sum instead,
    the chosen points cost several times more disturbance (docs/lab-notes.md).
    """
    found: dict[int, Prices] = {}
    for batch, trace, logits, states in _passes(editable, editable.sites, demands, settings, OwnPath()):
        ids = pad([demands[index].tokens for index in batch]).to(logits.device)
        targets = ids[:, 1:, None]
        others = logits.detach()[:, :-1].scatter(-1, targets, -torch.inf).argmax(-1, keepdim=True)
        gaps = logits[:, :-1].gather(-1, targets) - logits[:, :-1].gather(-1, others)
        kernel = torch.zeros(gaps.shape[:2], device=logits.device)
        for index, gradient in enumerate(torch.autograd.grad(gaps.sum(), trace.writes)):
            a = _activations(trace.activations[index][:, :-1], editable.sites[index]).float()
            g = gradient[:, :-1].float()
            flat_a, flat_g = a.flatten(0, 1), g.flatten(0, 1)
            own = (flat_a * metrics[index].solve_inputs(flat_a)).sum(-1) * (
                flat_g * metrics[index].solve_outputs(flat_g)
            ).sum(-1)
            kernel += own.view_as(kernel)
        for row, index in enumerate(batch):
            price = 1.0 / kernel[row, : len(demands[index].tokens) - 1].clamp(min=1e-30)
            found[index] = Prices(states[row].gap, [0.0, *price.tolist()])
    ordered = [found[index] for index in range(len(demands))]
    costs = [p.cost(token, settings.margin) for p in ordered for token in range(1, len(p.gap)) if p.gap[token] > 0]
    fixed = COUNT_WEIGHT * median(costs) if costs else 0.0
    return [replace(p, fixed=fixed) for p in ordered]
