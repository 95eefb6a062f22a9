"""How much ordinary text the statistics of a large model are taken from at once, so that little of it lies on disk;
knows not what is measured.

For text that is read at once, each edited block's input lies on disk, 4 d bytes a token, and a gradient as large. Text
for which that is no more than the edited blocks' weights is read at once, since the statistics take the place of the
inputs one block after the other. More text is read in portions, and the sums over those before lie on disk besides, as
large as the statistics. The inputs then get what the sums leave of the weights' size, an eighth of it at least, because
every portion reads and writes all sums. Statistics that lie there from an earlier stage count too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site

LEAST = 8


def tokens_at_once(loaded: LoadedModel, sites: Sequence[Site], tokens: int, *, beside: int = 0) -> int:
    """How many of so many tokens to read at once; `beside` is how many bytes there are of earlier statistics."""
    blocks: Any = loaded.model.get_submodule(loaded.family.blocks)
    edited = blocks[min(site.layer for site in sites) :]
    weights = sum(parameter.nbytes for block in edited for parameter in block.parameters())
    rows, columns = loaded.weight(sites[0]).shape
    width = columns if sites[0].kind == "query" else rows
    each = 4 * width * (len(edited) + 1)
    if beside + tokens * each <= weights:
        return tokens
    room: int = max(weights - beside - statistics_size(loaded, sites), weights // LEAST) // each
    return room


def statistics_size(loaded: LoadedModel, sites: Sequence[Site]) -> int:
    """Bytes of the stored factors of all sites; the experts of one block share one of the two."""
    inputs, outputs = [], {}
    for site in sites:
        rows, columns = loaded.weight(site).shape
        inputs.append(columns if site.columns is None else len(site.columns))
        outputs[site.module, site.rows] = rows if site.rows is None else len(site.rows)
    return sum(2 * size * (size + 1) for size in (*inputs, *outputs.values()))


def portions(batches: Iterable[Tensor], tokens: int) -> list[list[Tensor]]:
    """The batches in order, cut into lists of at most so many tokens, or of one batch."""
    found: list[list[Tensor]] = []
    size = 0
    for batch in batches:
        if not found or size + batch.numel() > tokens:
            found.append([])
            size = 0
        found[-1].append(batch)
        size += batch.numel()
    return found
