"""The attention fallback: which heads write the tokens that MLP edits did not reach.

Each head's contribution to a gap is g^T W_o[:, head] a[head], the same linear form as for MLP neurons; the
closed form then edits these heads' columns of the output projection (`solver` serves both). Knows no texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memscrub.edit.solver import Linearised
from memscrub.models.model import LoadedModel
from memscrub.models.site_finding import head_count
from memscrub.models.sites import Site

# Heads joined to the edit: this share of all heads, those that contribute most.
SHARE = 0.25


def top_heads(
    loaded: LoadedModel, sites: Sequence[Site], constraints: Sequence[Linearised], *, share: float = SHARE
) -> tuple[Site, ...]:
    """The attention sites restricted to the columns of the heads that raise the constraints' gaps most.

    Sites without a chosen head are left out. Heads are ranked over all layers together.
    """
    heads = head_count(loaded)
    ranked: list[tuple[float, int, int]] = []
    for index, (site, linear) in enumerate(zip(sites, constraints, strict=True)):
        contribution = (linear.gradients @ loaded.weight(site).float()) * linear.activations
        size = contribution.shape[1] // heads
        by_head = contribution.clamp(min=0).sum(0)[: size * heads].view(heads, size).sum(1)
        ranked += [(value, index, head) for head, value in enumerate(by_head.tolist())]
    ranked.sort(key=lambda entry: (-entry[0], entry[1], entry[2]))
    chosen: dict[int, list[int]] = {}
    for _, index, head in ranked[: max(1, round(share * len(ranked)))]:
        chosen.setdefault(index, []).append(head)
    restricted = []
    for index in sorted(chosen):
        size = constraints[index].activations.shape[1] // heads
        columns = tuple(head * size + i for head in sorted(chosen[index]) for i in range(size))
        restricted.append(replace(sites[index], columns=columns))
    return tuple(restricted)
