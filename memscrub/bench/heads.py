"""Breaking one text by its attention heads: those that write its first suffix token, ablated or edited in closed form.

Knows the model through `trace`, neither policies nor what an edit costs ordinary text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memscrub.edit.attention import SHARE, top_heads
from memscrub.edit.disturbance import Metric
from memscrub.edit.editable import EditableModel
from memscrub.edit.solver import Linearised, least_disturbing_edit
from memscrub.measures.extraction import NOISE
from memscrub.models.sites import Site
from memscrub.models.tokens import TokenText
from memscrub.models.trace import traced

# Heads are ablated in steps, until the token falls: these shares of all heads, the last is the fallback's.
SHARES = (SHARE / 8, SHARE / 4, SHARE / 2, SHARE)
# The closed form is solved anew at the edited weights at most this often.
ROUNDS = 6


@dataclass(frozen=True)
class HeadEdit:
    """Whole attention sites that may be edited, the metric of each, and the logits by which another token must win."""

    editable: EditableModel = field(repr=False)
    metrics: Sequence[Metric] = field(repr=False)
    margin: float


def by_ablation(heads: HeadEdit, text: TokenText, begin: int) -> None:
    """Zero the output columns of the heads that write token `begin` most, more of them until it falls."""
    editable = heads.editable
    _, constraints = _linearised(heads, text, begin)
    # Chosen before any is ablated: heads are ranked by what the unedited model writes.
    choices = [top_heads(editable.loaded, editable.sites, constraints, share=share) for share in SHARES]
    for chosen in ({site.name: site for site in choice} for choice in choices):
        deltas = []
        for site in editable.sites:
            delta = torch.zeros_like(editable.loaded.weight(site), dtype=torch.float32)
            if site.name in chosen:
                columns = list(chosen[site.name].columns or ())
                delta[:, columns] = -_original(editable, site)[:, columns]
            deltas.append(delta)
        editable.apply(deltas)
        if _linearised(heads, text, begin)[0] <= -NOISE[editable.loaded.dtype]:
            break


def by_closed_form(heads: HeadEdit, text: TokenText, begin: int) -> None:
    """The least disturbing edit of the top heads' output columns for which another token wins by the margin."""
    editable = heads.editable
    gap, constraints = _linearised(heads, text, begin)
    chosen = {site.name: site for site in top_heads(editable.loaded, editable.sites, constraints)}
    places = [number for number, site in enumerate(editable.sites) if site.name in chosen]
    columns = [list(chosen[editable.sites[number].name].columns or ()) for number in places]
    metrics = [restricted(heads.metrics[number], some) for number, some in zip(places, columns, strict=True)]
    for _ in range(ROUNDS):
        if gap <= -heads.margin:
            break
        linear = [
            Linearised(constraints[number].activations[:, some], constraints[number].gradients)
            for number, some in zip(places, columns, strict=True)
        ]
        bound = torch.tensor([-(gap + heads.margin)], device=editable.loaded.device)
        solution = least_disturbing_edit(linear, metrics, bound)
        deltas = [delta.clone() for delta in editable.deltas]
        for number, some, left, right in zip(places, columns, solution.left, solution.right, strict=True):
            deltas[number][:, some] += left.T @ right
        editable.apply(deltas)
        gap, constraints = _linearised(heads, text, begin)


def restricted(metric: Metric, columns: Sequence[int]) -> Metric:
    """The metric for an edit of these output vectors only."""
    rows = metric.inputs[list(columns)]
    return replace(metric, inputs=torch.linalg.cholesky(rows @ rows.T))


def _linearised(heads: HeadEdit, text: TokenText, begin: int) -> tuple[float, list[Linearised]]:
    """The gap of token `begin` to the best other at the live weights, and its linear form at each site."""
    editable = heads.editable
    ids = torch.tensor([text.tokens[: begin + 1]], device=editable.loaded.device)
    with traced(editable.loaded, editable.sites) as trace:
        logits = editable.loaded.logits(ids)[0, begin - 1]
        target = text.tokens[begin]
        others = logits.detach().clone()
        others[target] = -torch.inf
        gap = logits[target] - logits[int(others.argmax())]
        gradients = trace.gradients(gap)
    return float(gap.detach()), [
        Linearised(_at(activation, begin - 1), _at(gradient, begin - 1))
        for activation, gradient in zip(trace.activations, gradients, strict=True)
    ]


def _at(values: Tensor, position: int) -> Tensor:
    """One position of a single text `[1, length, n]`, as `[1, n]` float32."""
    return values.view(-1, values.shape[-1])[position : position + 1].float()


def _original(editable: EditableModel, site: Site) -> Tensor:
    return editable.loaded.weight(site).float() - editable.change(site)
