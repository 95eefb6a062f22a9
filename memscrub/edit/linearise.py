"""The gaps of protected tokens as linear functions of an edit: values, gradients and prices at the live weights.

One pass over the demands' sequences gives, at each break point, the gap between the token that must go and the
one that takes its place, and the gap's gradient at every site. Knows the model through `looks` only; chooses no
break point itself (`breakpoints`) and solves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from memscrub.edit.breakpoints import Demand, Prices, TextState
from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import EditableModel
from memscrub.edit.looks import looks, padded, whole_pass
from memscrub.edit.modes import Mode
from memscrub.edit.solver import Linearised
from memscrub.measures.extraction import Scores, score_logits
from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site
from memscrub.models.tokens import batches, pad
from memscrub.models.trace import Trace

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
    own_path: bool = True,
    batch_tokens: int,
) -> Linearisation:
    """Linearise the gap at the break points `{token: margin}` that `choose` names for each demand's state.

    With `own_path` a gap's gradient is that of the token's own place, as if what attention reads of earlier places were
    fixed (`own_path.OwnPath`); without, what the sum of the sequence's gaps has there.
    """

    def chosen(batch: Sequence[int], ids: Tensor, features: Tensor) -> list[Mapping[int, float]]:
        with torch.no_grad():
            states = _states(editable.loaded.unembed(features), ids, [demands[index] for index in batch])
        return [choose(index, state) for index, state in zip(batch, states, strict=True)]

    return _linearised(editable, sites, demands, chosen, batch_tokens, own_path=own_path)


def linearise_at(
    editable: EditableModel,
    sites: Sequence[Site],
    demands: Sequence[Demand],
    points: Sequence[Mapping[int, float]],
    *,
    own_path: bool = True,
    batch_tokens: int,
) -> Linearisation:
    """The same at break points that are known beforehand, for which no state is looked up."""

    def chosen(batch: Sequence[int], ids: Tensor, features: Tensor) -> list[Mapping[int, float]]:
        return [points[index] for index in batch]

    return _linearised(editable, sites, demands, chosen, batch_tokens, own_path=own_path)


def _linearised(
    editable: EditableModel,
    sites: Sequence[Site],
    demands: Sequence[Demand],
    choose: Callable[[Sequence[int], Tensor, Tensor], Sequence[Mapping[int, float]]],
    batch_tokens: int,
    *,
    own_path: bool,
) -> Linearisation:
    activations: list[list[Tensor]] = [[] for _ in sites]
    gradients: list[list[Tensor]] = [[] for _ in sites]
    gaps, margins = [], []
    owners: list[int] = []
    device = editable.loaded.device
    texts = [demand.tokens for demand in demands]
    for batch, look in looks(editable.below, sites, texts, batch_tokens, own_path=own_path):
        chosen = choose(batch.indices, batch.ids, look.features)
        if not any(chosen):
            continue
        pairs = [(index, token) for index, points in zip(batch.indices, chosen, strict=True) for token in points]
        found = look.at([list(points) for points in chosen])
        targets = torch.tensor([demands[index].tokens[token] for index, token in pairs], device=device)
        rivals = torch.tensor([_rival(demands[index], token) for index, token in pairs], device=device)
        gap = _gaps(found.logits, targets, rivals)
        for number, gradient in enumerate(found.trace.gradients(gap.sum())):
            site, seen = sites[number], found.trace.seen[number]
            activations[number].append(site.inputs(seen.at(found.places)).float())
            gradients[number].append(site.outputs(gradient.flatten(0, 1)[found.places]).float())
        gaps.append(gap.detach())
        margins += [margin for points in chosen for margin in points.values()]
        owners += [index for index, _ in pairs]
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

    Each token's price is that of its own path (`own_path.OwnPath`). With the unseparated gradient of the sum instead,
    the chosen points cost several times more disturbance (docs/lab-notes.md).
    """
    found: dict[int, Prices] = {}
    for batch in padded(editable.below, [demand.tokens for demand in demands], batch_tokens):
        with whole_pass(editable.below, editable.sites, batch) as (trace, features):
            few = [demands[index] for index in batch.indices]
            gaps, kernel = _priced(editable, metrics, few, batch.ids, trace, features)
        for row, index in enumerate(batch.indices):
            length = len(demands[index].tokens) - 1
            price = 1.0 / kernel[row, :length].clamp(min=1e-30)
            found[index] = Prices([0.0, *gaps[row, :length].tolist()], [0.0, *price.tolist()])
    ordered = [found[index] for index in range(len(demands))]
    costs = [p.cost(token, margin) for p in ordered for token in range(1, len(p.gap)) if p.gap[token] > 0]
    fixed = COUNT_WEIGHT * median(costs) if costs else 0.0
    return [replace(p, fixed=fixed) for p in ordered]


def _priced(
    editable: EditableModel,
    metrics: Sequence[Metric],
    demands: Sequence[Demand],
    ids: Tensor,
    trace: Trace,
    features: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gap of every token of a batch but the first, and K_tt of its constraint, `[batch, length - 1]`."""
    # Slices of features and not of logits, and one gather: each makes zeros as large as the logits for its gradient.
    logits = editable.loaded.unembed(features[:, :-1].flatten(0, 1))
    rivals = torch.full_like(ids[:, 1:], _NEXT_BEST, device="cpu")  # filled one by one
    for row, demand in enumerate(demands):
        for token in range(1, len(demand.tokens)):
            rivals[row, token - 1] = _rival(demand, token)
    gaps = _gaps(logits, ids[:, 1:].flatten(), rivals.flatten().to(logits.device))
    kernel = torch.zeros(features.shape[:2], device=features.device).flatten()
    for number, gradient in enumerate(trace.gradients(gaps.sum())):
        site, metric, seen = editable.sites[number], metrics[number], trace.seen[number]
        came = slice(None) if seen.tokens is None else seen.tokens
        a = site.inputs(seen.values).float()
        g = site.outputs(gradient.flatten(0, 1)[came]).float()
        kernel[came] += metric.square_inputs(a) * metric.square_outputs(g)
    return gaps.view(rivals.shape), kernel.view(features.shape[:2])[:, :-1]


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
    target, other = logits.gather(-1, torch.stack([targets, rival], -1)).unbind(-1)
    return target - torch.where(rivals == _NOTHING, other.detach(), other)
