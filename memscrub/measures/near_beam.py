"""How likely sampling gives a text away nearly verbatim: sure bounds by constrained beam search; knows no limits.

Decoding-constrained beam search, after Cooper et al. 2026 (arXiv 2603.24917): continuations are followed only through
tokens that the sampling can draw, with the probability it draws them, and only while they can still end within the
allowed distance. What the search finds are distinct continuations, so their probabilities add up to a lower bound.
Ours in detail: the distance is carried along as a band of the edit-distance table; a continuation that ends within
the distance whatever follows counts at once, with all that may follow; what is dropped for want of beams is added up
too, for an upper bound; and beams are filled slot by slot (Lemons et al. 2022, "Beam search: faster and monotonic"),
so that a wider search keeps every beam of a narrower one and its bounds are never worse.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from memscrub.errors import NumericalError, UsageError
from memscrub.measures.continuation import Opening
from memscrub.measures.extraction import IMPOSSIBLE, Sampling, nucleus
from memscrub.models.model import LoadedModel

# So many of (usually) 50 tokens may differ; so many beams cost about as much as that many samples.
DISTANCE, WIDTH = 5, 20
_FAR = 2**15  # more than any distance


@dataclass(frozen=True)
class NearMass:
    """Natural logarithms of a lower and an upper bound on the probability; `IMPOSSIBLE` stands for zero.

    They are equal where the search dropped nothing.
    """

    lower: float
    upper: float


@dataclass(frozen=True)
class _Beam:
    """A continuation that may still end near. `row` is where the last forward pass has it, `band` its distances to
    the truth's beginnings, `true` that it is the truth so far.
    """

    row: int
    token: int = field(repr=False)
    log_p: float
    band: Tensor = field(repr=False)
    true: bool


@dataclass
class _Search:
    """One opening's search: its slots (None where empty), and the log-probabilities of what was found and dropped."""

    truth: Tensor = field(repr=False)
    slots: list[_Beam | None] = field(repr=False)
    near: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)


def near_verbatim_mass(
    loaded: LoadedModel,
    starts: Sequence[Opening],
    sampling: Sampling,
    *,
    distance: int = DISTANCE,
    width: int = WIDTH,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] = lambda done: None,
) -> list[NearMass]:
    """Bounds on the probability of a continuation within `distance` token edits of the truth, in the openings' order.

    The event: after `given`, exactly as many tokens as the truth has are sampled, an end token does not stop it, and
    their Levenshtein distance from the truth is at most `distance`. The lower bound is at least the truth's own
    probability and never falls with `width`; the upper bound never rises with it. Cost: at most `width` times the
    truth's length tokens per opening, with a cache. Raises UsageError for a negative distance or no beam, and
    NumericalError where the model's output is not finite.
    """
    if distance < 0 or width < 1:
        raise UsageError("the distance must be at least 0 and the number of beams at least 1.")
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, start in enumerate(starts):
        groups[len(start.given), len(start.truth)].append(index)
    found: dict[int, NearMass] = {}
    for (given, length), members in sorted(groups.items()):
        size = max(1, batch_tokens // (width * (given + length)))
        for chunk in (members[i : i + size] for i in range(0, len(members), size)):
            searches = _search(loaded, [starts[i] for i in chunk], sampling, distance, width)
            found.update({index: _bounds(search) for index, search in zip(chunk, searches, strict=True)})
            progress(len(found))
    return [found[i] for i in range(len(starts))]


def _bounds(search: _Search) -> NearMass:
    def log_sum(parts: list[float]) -> float:
        # Rounding may carry a sum of probabilities a little above one.
        total = float(torch.tensor(parts, dtype=torch.float64).logsumexp(0)) if parts else IMPOSSIBLE
        return min(max(total, IMPOSSIBLE), 0.0)

    return NearMass(log_sum(search.near), log_sum(search.near + search.dropped))


@torch.inference_mode()
def _search(
    loaded: LoadedModel, starts: Sequence[Opening], sampling: Sampling, distance: int, width: int
) -> list[_Search]:
    """The searches of openings of equal lengths, all their beams in one batch."""
    length = len(starts[0].truth)
    model: Any = loaded.model
    empty = first_band(length, distance)
    searches = [
        _Search(torch.tensor(start.truth), [_Beam(row, 0, 0.0, empty, True)]) for row, start in enumerate(starts)
    ]
    ids = torch.tensor([start.given for start in starts], dtype=torch.long, device=loaded.device)
    cache: Any = None
    for step in range(length):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        log_p, tokens = drawable(output.logits[:, -1].float(), sampling)
        for search in searches:
            _advance(search, log_p, tokens, step, distance, width)
        beams = [beam for search in searches for beam in search.slots if beam is not None]
        if not beams:
            break
        cache.batch_select_indices(torch.tensor([beam.row for beam in beams], device=loaded.device))
        ids = torch.tensor([[beam.token] for beam in beams], dtype=torch.long, device=loaded.device)
        _renumber(searches)
    return searches


def _renumber(searches: Sequence[_Search]) -> None:
    """The beams' rows in the next forward pass: one after the other."""
    row = 0
    for search in searches:
        for slot, beam in enumerate(search.slots):
            if beam is not None:
                search.slots[slot] = replace(beam, row=row)
                row += 1


def drawable(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[rows, k]` of the tokens that the sampling can draw, likeliest first, and the tokens."""
    values, tokens = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1)
    log_p = nucleus(values.double() / sampling.temperature, sampling.top_p).log_softmax(-1)
    if not bool(torch.isfinite(log_p[:, 0]).all()):
        raise NumericalError("the model's output is not finite; nothing can be measured on this checkpoint.")
    return log_p.cpu(), tokens.cpu()


def _advance(search: _Search, log_p: Tensor, tokens: Tensor, step: int, distance: int, width: int) -> None:
    """One token further: children that end near anyway are counted, the best of the others fill the slots.

    Slot i is filled with the best child of slots 0 to i that no slot before it took. What is in it does not depend
    on slots behind it, so the first slots of a wider search are those of a narrower one.
    """
    beams = [beam for beam in search.slots if beam is not None]
    if not beams:
        return
    rows = [beam.row for beam in beams]
    bands = next_bands(torch.stack([beam.band for beam in beams]), tokens[rows], search.truth, step, distance)
    alive, safe = reach(bands, step + 1, len(search.truth), distance)
    totals = log_p[rows] + torch.tensor([beam.log_p for beam in beams], dtype=torch.float64)[:, None]
    search.near += totals[safe].tolist()
    going, numbers, names = (alive & ~safe).tolist(), totals.tolist(), tokens[rows].tolist()
    target = int(search.truth[step])
    slots: list[_Beam | None] = []
    pool: list[tuple[bool, float, int, int]] = []
    place = -1
    for slot in range(width):
        if slot < len(search.slots) and search.slots[slot] is not None:
            place += 1
            for child, token in enumerate(names[place]):
                if going[place][child]:
                    # The truth goes first, however unlikely: the bound is then never below its probability.
                    false = not (beams[place].true and token == target)
                    heapq.heappush(pool, (false, -numbers[place][child], place, child))
        if pool:
            false, loss, parent, child = heapq.heappop(pool)
            slots.append(_Beam(rows[parent], names[parent][child], -loss, bands[parent, child], not false))
        else:
            slots.append(None)
    search.slots = slots
    search.dropped += [-loss for _, loss, _, _ in pool]


def first_band(length: int, distance: int) -> Tensor:
    """The band `[2 * distance + 1]` of the empty continuation; entry b is about the truth's first b - distance
    tokens, and far where there are no such."""
    places = torch.arange(-distance, distance + 1)
    return torch.where((places >= 0) & (places <= length), places, _FAR)


def next_bands(bands: Tensor, tokens: Tensor, truth: Tensor, step: int, distance: int) -> Tensor:
    """The bands `[beams, k, 2 * distance + 1]` of continuations one token longer.

    `bands` `[beams, 2 * distance + 1]`: entry b is the Levenshtein distance of the beam's `step` tokens from the
    truth's first step + b - distance, exact where it is at most `distance`. `tokens` `[beams, k]` come next.
    """
    span = bands.shape[-1]
    far = torch.full(tokens.shape, _FAR)
    rows: list[Tensor] = []
    for b in range(span):
        end = step + 1 + b - distance  # so many tokens of the truth
        best = far
        if 0 <= end <= len(truth):
            if b + 1 < span:
                best = torch.minimum(best, bands[:, b + 1, None] + 1)
            if end >= 1:
                best = torch.minimum(best, bands[:, b, None] + (tokens != truth[end - 1]))
            if rows:
                best = torch.minimum(best, rows[-1] + 1)
        rows.append(best)
    return torch.stack(rows, dim=-1)


def reach(bands: Tensor, step: int, length: int, distance: int) -> tuple[Tensor, Tensor]:
    """Of continuations of `step` tokens: can they, and must they, end within `distance` of the truth's `length`?

    `bands` `[..., 2 * distance + 1]`; two masks `[...]`. What follows costs at least the difference of the two
    remainders' lengths, and at most the longer of the two.
    """
    ahead = torch.arange(-distance, distance + 1)  # how much further than the continuation the truth's beginning is
    least = bands + ahead.abs()
    most = bands + torch.maximum(torch.tensor(length - step), length - step - ahead)
    return least.amin(-1) <= distance, most.amin(-1) <= distance
