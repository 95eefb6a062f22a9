"""The gaps of protected tokens as linear functions of an edit: values, gradients and prices at the live weights.

One pass over the demands' sequences gives, at each break point, the gap between the token that must go and the
one that takes its place, and the gap's gradient at every site. Knows the model through `trace` only; chooses no
break point itself (`breakpoints`) and solves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
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
class Gaps:
    """Break points at the current weights: each one's demand and token, and `[n]` gaps and margins."""

    points: list[tuple[int, int]]
    gaps: Tensor = field(repr=False)
    margins: Tensor = field(repr=False)


@dataclass(frozen=True)
class Linearisation:
    """The constraints at break points: their gaps, and per site what those depend on."""

    at: Gaps
    sites: list[Linearised]


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
    found: list[Gaps] = []
    path = OwnPath() if own_path else nullcontext()
    for batch, trace, logits, states in _passes(editable, sites, demands, batch_tokens, path):
        at, rows, positions = _chosen(batch, demands, states, logits, choose)
        if not at.points:
            continue
        places = (rows * trace.writes[0].shape[1] + positions).to(logits.device)
        for number, gradient in enumerate(trace.gradients(at.gaps.sum())):
            site = sites[number]
            activations[number].append(site.inputs(trace.seen[number].at(places)).float())
            gradients[number].append(site.outputs(gradient[rows, positions]).float())
        found.append(replace(at, gaps=at.gaps.detach()))
    pairs = zip(activations, gradients, strict=True)
    return Linearisation(
        _joined(found, editable.loaded), [Linearised(torch.cat(a), torch.cat(g)) for a, g in pairs if a]
    )


def gaps_at(loaded: LoadedModel, demands: Sequence[Demand], choose: Chooser, *, batch_tokens: int) -> Gaps:
    """The gaps alone at the break points that `choose` names, without gradients."""
    found = []
    for batch in batches([len(demand.tokens) for demand in demands], loaded.batch_tokens(batch_tokens)):
        ids = pad([demands[index].tokens for index in batch]).to(loaded.device)
        with torch.inference_mode():
            logits = loaded.logits(ids)
            states = _states(logits, ids, [demands[index] for index in batch])
            found.append(_chosen(batch, demands, states, logits, choose)[0])
    return _joined(found, loaded)


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
    for batch, trace, logits, _ in _passes(editable, editable.sites, demands, batch_tokens, OwnPath()):
        ids = pad([demands[index].tokens for index in batch])
        rivals = torch.full_like(ids[:, 1:], _NEXT_BEST)
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


def _passes(
    editable: EditableModel,
    sites: Sequence[Site],
    demands: Sequence[Demand],
    batch_tokens: int,
    path: AbstractContextManager[object],
) -> Iterator[tuple[list[int], Trace, Tensor, list[TextState]]]:
    """Forward passes over the demands' sequences, traced: batch of indices, trace, logits and the texts' states."""
    loaded = editable.loaded
    budget = loaded.batch_tokens(batch_tokens, gradients=True)
    for batch in batches([len(demand.tokens) for demand in demands], budget):
        ids = pad([demands[index].tokens for index in batch]).to(loaded.device)
        with path, traced(loaded, sites) as trace:
            logits = loaded.logits(ids)
            yield batch, trace, logits, _states(logits.detach(), ids, [demands[index] for index in batch])


def _states(logits: Tensor, ids: Tensor, demands: Sequence[Demand]) -> list[TextState]:
    states = []
    for row, demand in enumerate(demands):
        (scores,) = score_logits(logits[row : row + 1, :-1], ids[row : row + 1, 1:], demand.sampling)
        states.append(_state(scores, len(demand.tokens)))
    return states


def _state(scores: Scores, length: int) -> TextState:
    gap, log_p, rest = ([0.0, *values[: length - 1].tolist()] for values in (scores.gap, scores.log_p, scores.rest))
    return TextState(gap, log_p, rest)


def _chosen(
    batch: Sequence[int], demands: Sequence[Demand], states: Sequence[TextState], logits: Tensor, choose: Chooser
) -> tuple[Gaps, Tensor, Tensor]:
    """The break points of a batch, differentiable; the row of each and the position that predicts its token."""
    chosen = [choose(index, state) for index, state in zip(batch, states, strict=True)]
    rows = torch.tensor([row for row, points in enumerate(chosen) for _ in points], dtype=torch.long)
    points = [(index, token) for index, margins in zip(batch, chosen, strict=True) for token in margins]
    positions = torch.tensor([token - 1 for _, token in points], dtype=torch.long)
    targets = torch.tensor([demands[index].tokens[token] for index, token in points], dtype=torch.long)
    rivals = torch.tensor([_rival(demands[index], token) for index, token in points], dtype=torch.long)
    gaps = _gaps(logits[rows, positions], targets.to(logits.device), rivals.to(logits.device))
    margins = torch.tensor([margin for each in chosen for margin in each.values()], device=logits.device)
    return Gaps(points, gaps, margins), rows, positions


def _joined(found: Sequence[Gaps], loaded: LoadedModel) -> Gaps:
    if not found:
        return Gaps([], torch.empty(0, device=loaded.device), torch.empty(0, device=loaded.device))
    return Gaps(
        [point for each in found for point in each.points],
        torch.cat([each.gaps for each in found]),
        torch.cat([each.margins for each in found]),
    )


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
