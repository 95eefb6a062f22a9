"""The gaps of protected tokens as linear functions of an edit: values, gradients and prices at the live weights.

One pass over the demands' sequences gives, at each break point, the gap between the token that must go and the
one that takes its place, and the gap's gradient at every site. Knows the model through `trace` only; chooses no
break point itself (`breakpoints`) and solves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from memscrub.edit.breakpoints import Demand, Prices, TextState
from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import EditableModel
from memscrub.edit.modes import Mode
from memscrub.edit.solver import Linearised
from memscrub.measures.extraction import Scores, score_logits
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.models.tokens import batches, pad
from memscrub.models.trace import OwnPath, Trace, traced

# Every break costs something whatever its price: this share of the median cost keeps their number down.
COUNT_WEIGHT = 0.3
# Codes for what takes the place of a token, where it is not one fixed token.
_NEXT_BEST, _NOTHING = -1, -2

Chooser = Callable[[int, TextState], Mapping[int, float]]


@dataclass(frozen=True)
class Linearisation:
    """Constraints at the current weights, gap <= -margin: per site, with their gaps and margins `[n]`, the demand of
    each, and how far each gives way (`solver`)."""

    sites: list[Linearised]
    gaps: Tensor
    margins: Tensor
    owners: list[int]
    yields: Tensor

    def reversed(self, yields: float) -> Linearisation:
        """Constraints gap >= margin instead, as ones on the negative gaps, which give way by so much."""
        sites = [Linearised(site.activations, -site.gradients) for site in self.sites]
        return replace(self, sites=sites, gaps=-self.gaps, yields=self.yields + yields)

    def __add__(self, other: Linearisation) -> Linearisation:
        return Linearisation(
            [_joined(one, another) for one, another in zip(self.sites, other.sites, strict=True)],
            torch.cat([self.gaps, other.gaps]),
            torch.cat([self.margins, other.margins]),
            self.owners + other.owners,
            torch.cat([self.yields, other.yields]),
        )


def linearise(
    editable: EditableModel,
    sites: Sequence[Site],
    demands: Sequence[Demand],
    choose: Chooser,
    *,
    own_path: bool,
    batch_tokens: int,
) -> Linearisation:
    """Linearise the gap at the break points `{token: margin}` that `choose` names for each demand's state."""
    activations: list[list[Tensor]] = [[] for _ in sites]
    gradients: list[list[Tensor]] = [[] for _ in sites]
    gaps, margins = [], []
    owners: list[int] = []
    path = OwnPath() if own_path else nullcontext()
    loaded = editable.loaded
    for batch, ids, trace, features in _passes(editable, sites, demands, batch_tokens, path):
        with torch.no_grad():
            states = _states(loaded.unembed(features), ids, [demands[index] for index in batch])
        chosen = [choose(index, state) for index, state in zip(batch, states, strict=True)]
        rows = torch.tensor([row for row, points in enumerate(chosen) for _ in points], dtype=torch.long)
        if not len(rows):
            continue
        tokens = torch.tensor([token for points in chosen for token in points], dtype=torch.long)
        pairs = [(index, token) for index, points in zip(batch, chosen, strict=True) for token in points]
        targets = torch.tensor([demands[index].tokens[token] for index, token in pairs])
        rivals = torch.tensor([_rival(demands[index], token) for index, token in pairs])
        # Break points are a tenth of all tokens: only their logits are differentiated.
        logits = loaded.unembed(features[rows, tokens - 1])
        gap = _gaps(logits, targets.to(logits.device), rivals.to(logits.device))
        places = (rows * trace.writes[0].shape[1] + tokens - 1).to(gap.device)
        for number, gradient in enumerate(trace.gradients(gap.sum())):
            site = sites[number]
            activations[number].append(site.inputs(trace.seen[number].at(places)).float())
            gradients[number].append(site.outputs(gradient[rows, tokens - 1]).float())
        gaps.append(gap.detach())
        margins += [margin for points in chosen for margin in points.values()]
        owners += [index for index, _ in pairs]
    device = loaded.device
    return Linearisation(
        [Linearised(torch.cat(a), torch.cat(g)) for a, g in zip(activations, gradients, strict=True) if a],
        torch.cat(gaps) if gaps else torch.empty(0, device=device),
        torch.tensor(margins, device=device),
        owners,
        torch.zeros(len(owners), device=device),
    )


def prices(
    editable: EditableModel,
    metrics: Sequence[Metric],
    demands: Sequence[Demand],
    *,
    margin: float,
    batch_tokens: int,
) -> list[Prices]:
    """What breaking each token would cost by itself: (gap + m)^2 / K_tt, from one pass at the current weights.

    Each token's price is that of its own path (`trace.OwnPath`). With the unseparated gradient of the sum instead,
    the chosen points cost several times more disturbance (docs/lab-notes.md).
    """
    found: dict[int, Prices] = {}
    for batch, ids, trace, features in _passes(editable, editable.sites, demands, batch_tokens, OwnPath()):
        logits = editable.loaded.unembed(features)
        rivals = torch.full_like(ids[:, 1:], _NEXT_BEST, device="cpu")  # filled one by one
        for row, index in enumerate(batch):
            for token in range(1, len(demands[index].tokens)):
                rivals[row, token - 1] = _rival(demands[index], token)
        gaps = _gaps(logits[:, :-1], ids[:, 1:].to(logits.device), rivals.to(logits.device))
        kernel = torch.zeros(logits.shape[:2], device=logits.device).flatten()
        for number, gradient in enumerate(trace.gradients(gaps.sum())):
            site, metric, seen = editable.sites[number], metrics[number], trace.seen[number]
            came = slice(None) if seen.tokens is None else seen.tokens
            a = site.inputs(seen.values).float()
            g = site.outputs(gradient.flatten(0, 1)[came]).float()
            kernel[came] += metric.square_inputs(a) * metric.square_outputs(g)
        kernel = kernel.view(logits.shape[:2])[:, :-1]
        for row, index in enumerate(batch):
            length = len(demands[index].tokens) - 1
            price = 1.0 / kernel[row, :length].clamp(min=1e-30)
            found[index] = Prices([0.0, *gaps[row, :length].tolist()], [0.0, *price.tolist()])
    ordered = [found[index] for index in range(len(demands))]
    costs = [p.cost(token, margin) for p in ordered for token in range(1, len(p.gap)) if p.gap[token] > 0]
    fixed = COUNT_WEIGHT * median(costs) if costs else 0.0
    return [replace(p, fixed=fixed) for p in ordered]


def states_of(loaded: LoadedModel, demands: Sequence[Demand], *, batch_tokens: int) -> list[TextState]:
    """Each demand's state at the live weights, without gradients."""
    found: dict[int, TextState] = {}
    for batch in batches([len(demand.tokens) for demand in demands], loaded.batch_tokens(batch_tokens)):
        ids = pad([demands[index].tokens for index in batch]).to(loaded.device)
        with torch.inference_mode():
            logits = loaded.logits(ids)
        found |= dict(zip(batch, _states(logits, ids, [demands[index] for index in batch]), strict=True))
    return [found[index] for index in range(len(demands))]


def _joined(one: Linearised, other: Linearised) -> Linearised:
    return Linearised(torch.cat([one.activations, other.activations]), torch.cat([one.gradients, other.gradients]))


def _passes(
    editable: EditableModel,
    sites: Sequence[Site],
    demands: Sequence[Demand],
    batch_tokens: int,
    path: AbstractContextManager[object],
) -> Iterator[tuple[list[int], Tensor, Trace, Tensor]]:
    """Forward passes over the demands' sequences, traced: batch of indices, ids, trace and features of every token."""
    loaded = editable.loaded
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    _ = loaded.projects  # `features` asks for it, and finds it out by a pass that is not to be traced
    for batch in batches([len(demand.tokens) for demand in demands], budget):
        ids = pad([demands[index].tokens for index in batch]).to(loaded.device)
        with path, traced(loaded, sites) as trace:
            yield batch, ids, trace, loaded.features(ids)[0]


def _states(logits: Tensor, ids: Tensor, demands: Sequence[Demand]) -> list[TextState]:
    states = []
    for row, demand in enumerate(demands):
        (scores,) = score_logits(logits[row : row + 1, :-1], ids[row : row + 1, 1:], demand.sampling)
        states.append(_state(scores, len(demand.tokens)))
    return states


def _state(scores: Scores, length: int) -> TextState:
    gap, log_p, rest = ([0.0, *values[: length - 1].tolist()] for values in (scores.gap, scores.log_p, scores.rest))
    return TextState(gap, log_p, rest)


def _rival(demand: Demand, token: int) -> int:
    """The token that takes this one's place, or a code; a token cannot take its own place."""
    if demand.mode is Mode.SUPPRESS:
        return _NOTHING
    if demand.rival is None or demand.rival == demand.tokens[token]:
        return _NEXT_BEST
    return demand.rival


def _gaps(logits: Tensor, targets: Tensor, rivals: Tensor) -> Tensor:
    """Logit of each target minus its rival's, differentiable, `[...]` from logits `[..., vocabulary]`.

    Against nothing (`suppress`) the value is that against the best other token, but only the target is moved.
    """
    best_other = logits.detach().scatter(-1, targets[..., None], -torch.inf).argmax(-1)
    rival = torch.where(rivals >= 0, rivals, best_other)
    other = logits.gather(-1, rival[..., None])[..., 0]
    other = torch.where(rivals == _NOTHING, other.detach(), other)
    return logits.gather(-1, targets[..., None])[..., 0] - other
