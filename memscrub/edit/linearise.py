"""The gaps of protected tokens as linear functions of an edit: values, gradients and prices at the live weights.

One pass over the demands' sequences gives, at each break point, the gap between the token that must go and the
one that takes its place, and the gap's gradient at every site. Knows the model through `trace` only; chooses no
break point itself (`breakpoints`) and solves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from memscrub.edit.breakpoints import Demand, Prices, TextState
from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import EditableModel
from memscrub.edit.modes import Mode
from memscrub.edit.solver import Linearised
from memscrub.measures.extraction import NOISE, Scores, score_logits
from memscrub.models.model import LoadedModel
from memscrub.models.own_path import At, Memory, OwnPath, Remembered
from memscrub.models.sites import Site
from memscrub.models.tokens import batches, pad
from memscrub.models.trace import Trace, traced

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
    editable: EditableModel, sites: Sequence[Site], demands: Sequence[Demand], choose: Chooser, *, batch_tokens: int
) -> Linearisation:
    """Linearise the gap at the break points `{token: margin}` that `choose` names for each demand's state.

    A gap's gradient is that of its own path (`own_path.OwnPath`): of the token's own place, as if what attention reads
    of earlier places were fixed.
    """

    def chosen(batch: Sequence[int], ids: Tensor, features: Tensor) -> list[Mapping[int, float]]:
        with torch.no_grad():
            states = _states(editable.loaded.unembed(features), ids, [demands[index] for index in batch])
        return [choose(index, state) for index, state in zip(batch, states, strict=True)]

    return _linearised(editable, sites, demands, chosen, batch_tokens)


def linearise_at(
    editable: EditableModel,
    sites: Sequence[Site],
    demands: Sequence[Demand],
    points: Sequence[Mapping[int, float]],
    *,
    batch_tokens: int,
) -> Linearisation:
    """The same at break points that are known beforehand, for which no state is looked up."""
    return _linearised(editable, sites, demands, lambda batch, *_: [points[index] for index in batch], batch_tokens)


def _linearised(
    editable: EditableModel,
    sites: Sequence[Site],
    demands: Sequence[Demand],
    choose: Callable[[Sequence[int], Tensor, Tensor], Sequence[Mapping[int, float]]],
    batch_tokens: int,
) -> Linearisation:
    activations: list[list[Tensor]] = [[] for _ in sites]
    gradients: list[list[Tensor]] = [[] for _ in sites]
    gaps, margins = [], []
    owners: list[int] = []
    device = editable.loaded.device
    for batch, ids, look in _looks(editable, sites, demands, batch_tokens):
        chosen = choose(batch, ids, look.features)
        if not any(chosen):
            continue
        pairs = [(index, token) for index, points in zip(batch, chosen, strict=True) for token in points]
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
    for batch, ids, trace, features in _passes(editable, editable.sites, demands, batch_tokens):
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


@dataclass(frozen=True)
class _Points:
    """The logits `[n, vocabulary]` that predict the break points of a batch, differentiable; the trace of the pass that
    they come from, and where in its flattened batch they stand."""

    logits: Tensor
    trace: Trace
    places: Tensor


@dataclass
class _Whole:
    """A look at a batch of texts by a pass that is differentiable at every token."""

    loaded: LoadedModel
    trace: Trace
    features: Tensor

    def at(self, chosen: Sequence[Sequence[int]]) -> _Points:
        # Break points are a tenth of all tokens: only their logits are differentiated.
        rows, before = _rows_and_columns(chosen, self.features.device)
        logits = self.loaded.unembed(self.features[rows, before])
        return _Points(logits, self.trace, rows * self.features.shape[1] + before)


@dataclass
class _Apart:
    """A look by a pass without gradients. The break points' own paths are computed again, by themselves.

    Where that gives other logits (`apart` is false then: a family whose places meet elsewhere than in attention), the
    whole pass is made again.
    """

    loaded: LoadedModel
    sites: Sequence[Site]
    ids: Tensor
    memory: Memory
    features: Tensor
    apart: bool = True

    def at(self, chosen: Sequence[Sequence[int]]) -> _Points:
        self.apart = bool(self.memory.calls)
        if self.apart:
            points, known = self._alone(chosen)
            self.apart = bool((points.logits.detach() - known).abs().max() <= NOISE[self.loaded.dtype])
            if self.apart:
                return points
        trace, features = _whole_pass(self.loaded, self.sites, self.ids)
        return _Whole(self.loaded, trace, features).at(chosen)

    def _alone(self, chosen: Sequence[Sequence[int]]) -> tuple[_Points, Tensor]:
        """The break points by themselves, each row's side by side; and the logits that the whole pass had for them."""
        rows, before = _rows_and_columns(chosen, self.ids.device)
        columns = torch.tensor([number for points in chosen for number in range(len(points))], device=self.ids.device)
        positions = self.ids.new_zeros(len(self.ids), max(map(len, chosen)))
        positions[rows, columns] = before
        with At(self.memory, positions), traced(self.loaded, self.sites) as trace:
            features = self.loaded.features(self.ids.gather(1, positions), positions=positions)[0]
            logits = self.loaded.unembed(features[rows, columns])
        with torch.no_grad():
            known = self.loaded.unembed(self.features[rows, before])
        return _Points(logits, trace, rows * positions.shape[1] + columns), known


def _rows_and_columns(chosen: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the break points, and the position that predicts each."""
    rows = [row for row, points in enumerate(chosen) for _ in points]
    before = [token - 1 for points in chosen for token in points]
    return torch.tensor(rows, device=device), torch.tensor(before, device=device)


def _looks(
    editable: EditableModel, sites: Sequence[Site], demands: Sequence[Demand], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, _Whole | _Apart]]:
    """Batches of indices and ids, each with a look at them. With lean weights every pass is a whole one, and so they
    are from the first batch on whose own paths cannot be computed apart."""
    loaded = editable.loaded
    apart = loaded.lean is None
    for batch, ids in _batches(loaded, demands, batch_tokens):
        if not apart:
            yield batch, ids, _Whole(loaded, *_whole_pass(loaded, sites, ids))
            continue
        memory = Memory()
        with torch.no_grad(), Remembered(memory):
            look = _Apart(loaded, sites, ids, memory, loaded.features(ids)[0])
        yield batch, ids, look
        apart = look.apart


def _passes(
    editable: EditableModel, sites: Sequence[Site], demands: Sequence[Demand], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Trace, Tensor]]:
    """Forward passes over the demands' sequences, traced: batch of indices, ids, trace and features of every token."""
    for batch, ids in _batches(editable.loaded, demands, batch_tokens):
        yield batch, ids, *_whole_pass(editable.loaded, sites, ids)


def _whole_pass(loaded: LoadedModel, sites: Sequence[Site], ids: Tensor) -> tuple[Trace, Tensor]:
    with OwnPath(), traced(loaded, sites) as trace:
        return trace, loaded.features(ids)[0]


def _batches(loaded: LoadedModel, demands: Sequence[Demand], batch_tokens: int) -> Iterator[tuple[list[int], Tensor]]:
    _ = loaded.projects  # `features` asks for it, and finds it out by a pass that is not to be traced
    for batch in batches([len(demand.tokens) for demand in demands], loaded.batch_tokens(batch_tokens, gradients=True)):
        yield batch, pad([demands[index].tokens for index in batch]).to(loaded.device)


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
