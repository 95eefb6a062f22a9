"""How much ordinary text the statistics of a large model are taken from at once, and how many blocks' inputs lie on
disk meanwhile, so that little does; knows not what is measured.

For text that is read at once, each edited block's input lies on disk, 4 d bytes a token, and a gradient as large. Text
for which that is no more than the edited blocks' weights is read at once, since the statistics take the place of the
inputs one block after the other. More text is read in portions, and the sums over those before lie on disk besides, as
large as the statistics. The inputs then get what the sums leave of the weights' size. Statistics that lie there from an
earlier stage count too.

Every portion reads and writes all sums, so that portions must not be too small. Where the sums leave less than an
eighth of the weights' size, inputs are kept for some blocks only and the blocks between compute once more, which costs
a forward pass: the same text then takes about sqrt(2 / blocks) of the room, and a sixth of that eighth will do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from memscrub.models.model import LoadedModel
from memscrub.models.sites import Site

LEAST, LEAST_AGAIN = 8, 48


@dataclass(frozen=True)
class Reading:
    """How many tokens a portion has, and the segments of blocks, the lowest first, whose first inputs are kept."""

    tokens: int
    segments: tuple[range, ...]

    @property
    def kept(self) -> int:
        """The most blocks whose inputs lie on disk at once: the first of each segment not yet done, and the others of
        the one under way."""
        return max(below + len(segment) for below, segment in enumerate(self.segments))


def reading_of(loaded: LoadedModel, sites: Sequence[Site], tokens: int, *, beside: int = 0) -> Reading:
    """How to read so many tokens; `beside` is how many bytes there are of earlier statistics."""
    blocks: Any = loaded.model.get_submodule(loaded.family.blocks)
    edited = blocks[min(site.layer for site in sites) :]
    weights = sum(parameter.nbytes for block in edited for parameter in block.parameters())
    rows, columns = loaded.weight(sites[0]).shape
    width = columns if sites[0].kind == "query" else rows

    def within(room: int, segments: tuple[range, ...]) -> Reading:
        kept = Reading(tokens, segments).kept + 1  # and the gradients
        return Reading(min(tokens, room // (4 * width * kept)), segments)

    alone = within(weights - beside, every_input(len(edited)))
    if alone.tokens == tokens:
        return alone
    left = weights - beside - statistics_size(loaded, sites)
    if left >= weights // LEAST:
        return within(left, alone.segments)
    return within(max(left, weights // LEAST_AGAIN), few_inputs(len(edited)))


def every_input(blocks: int) -> tuple[range, ...]:
    """Segments of one block each: nothing is computed again."""
    return tuple(range(number, number + 1) for number in range(blocks))


def few_inputs(blocks: int) -> tuple[range, ...]:
    """Segments of 1, 2, 3, ... blocks from the last block down, and what is left at the bottom.

    Each segment done leaves room for one block more in the next, so that m inputs on disk do for m (m + 1) / 2 blocks;
    with equal segments (m + 1)^2 / 4 is the most.
    """
    found: list[range] = []
    end = blocks
    while end:
        begin = max(0, end - len(found) - 1)
        found.insert(0, range(begin, end))
        end = begin
    return tuple(found)


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
