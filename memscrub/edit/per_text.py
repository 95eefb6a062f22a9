"""The per-text solver: one text after the other, by a closed form on a few located neurons; no gradients.

In the manner of Output Vector Editing (arXiv 2606.18767), reconstructed from public summaries; its tables are not
claimed. Locate the neurons that write a protected token (`locate`), then change each one's output vector as little
as possible so that what it writes speaks for another token (`output_vectors`); activations stay as they are.
Knows no retain text: what an edit costs ordinary text is for the caller to measure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memscrub.edit.breakpoints import Demand, Prices, TextState, extend, violations
from memscrub.edit.editable import EditableModel
from memscrub.edit.locate import Locator, Neuron, Observation
from memscrub.edit.modes import MARKER, Mode, fixed_distractor
from memscrub.edit.output_vectors import Changes, kept_on_error, live_vectors, outbid, put_back, write_vectors
from memscrub.errors import UsageError
from memscrub.measures.extraction import NOISE, Scores, longest_run, score_logits
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText, batches, pad

# Which of several tokens are broken is decided as if each had to fall this many logits behind.
AIM = 1.0


@dataclass(frozen=True)
class PerTextSettings:
    """How a text is edited.

    `neurons` located per token, of those that rank it among the first (or last) `rank`; `margin` in units of what
    an output vector says to a token. `positions`: "first" edits at the first suffix token only, as the paper does;
    "breaks" at as many tokens as it takes for no greedy run of more than `allowed_run` to be left in the suffix,
    whatever true text is typed before it. The suffix begins behind `prefix_tokens` of the text. Every further pass
    looks at `neurons` more.
    """

    neurons: int = 5
    rank: int = 50
    margin: float = 1.0
    positions: Literal["first", "breaks"] = "first"
    prefix_tokens: int = 32
    allowed_run: int = 0
    passes: int = 1
    marker: str = MARKER
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        counts, amounts = (self.neurons, self.rank, self.passes), (self.margin, self.prefix_tokens, self.allowed_run)
        if min(counts) < 1 or not min(amounts) >= 0:
            raise UsageError(
                "the per-text solver needs at least 1 neuron, rank and pass, and a margin, prefix and allowed run"
                " of at least 0."
            )


@dataclass(frozen=True)
class Break:
    """One edited place: the token's index in its text, and the neurons located for it, best first."""

    token: int
    neurons: tuple[Neuron, ...]


@dataclass(frozen=True)
class PerTextOutcome:
    """What the edit of one text came to, measured on the model as it was left.

    `broken`: greedy decoding no longer emits the whole suffix. `longest_run`: the longest piece of the suffix
    that it still emits with the true text before it.
    """

    broken: bool
    longest_run: int
    breaks: tuple[Break, ...]

    def holds(self, settings: PerTextSettings) -> bool:
        """Whether the edit did what the settings ask for."""
        return self.broken if settings.positions == "first" else self.longest_run <= settings.allowed_run


@dataclass(frozen=True)
class SequenceOutcome:
    """What the edits of many texts came to: the demands that do not hold (indices), places edited, passes made."""

    unmet: tuple[int, ...]
    breaks: int
    passes: int


def edit_text(
    editable: EditableModel, text: TokenText, mode: Mode, settings: PerTextSettings, locator: Locator | None = None
) -> PerTextOutcome:
    """Edit one text on the model as it is now; edits made before stay, `editable.restore()` takes back all.

    Calls that follow one another may share a `locator` of the same sites; one that outlives a `restore()` must be
    told what was edited (`Locator.forget`). Raises UsageError (`suffix_begin`, `fixed_distractor`, `Locator`),
    ArchitectureError (`readout`) and NumericalError; the model is then as it was.
    """
    begin = suffix_begin(text, settings)
    fixed_distractor(editable.loaded.tokenizer, mode, settings.marker)
    locator = locator or Locator(editable.loaded, editable.sites, settings.rank)
    breaks: list[Break] = []
    with kept_on_error(editable, locator):
        for number in range(1, settings.passes + 1):
            seen = locator.observe(text.tokens)
            points = suffix_points(editable.loaded, seen, text, begin, settings)
            found = find_breaks(locator, seen, text.tokens, points, settings.neurons * number)
            if not found:
                break
            write_vectors(editable, outbidding(editable, locator, seen, text.tokens, found, mode, settings), locator)
            breaks += found
        return measured(editable.loaded, text, begin, breaks)


def edit_texts(
    editable: EditableModel,
    demands: Sequence[Demand],
    modes: Sequence[Mode],
    settings: PerTextSettings,
    progress: Callable[[int, int], None] = lambda number, unmet: None,
) -> SequenceOutcome:
    """Edit many texts one after the other in one model, each in its mode, until every demand holds.

    What is broken is what the demands ask for; the settings' positions, prefix and allowed run are not looked at.
    Edits interfere, so the texts whose demands do not hold are gone through up to `passes` times, and the model is
    left in the state with the fewest unmet. `progress` is told the pass and that number. Raises as `edit_text`.
    """
    locator = Locator(editable.loaded, editable.sites, settings.rank)
    for _, mode in zip(demands, modes, strict=True):
        fixed_distractor(editable.loaded.tokenizer, mode, settings.marker)
    best: tuple[SequenceOutcome, list[Tensor]] | None = None
    breaks = 0
    with kept_on_error(editable, locator):
        for number in range(settings.passes + 1):
            unmet = unmet_demands(editable.loaded, demands, settings.batch_tokens)
            if best is None or len(unmet) < len(best[0].unmet):
                best = SequenceOutcome(unmet, breaks, number), [delta.clone() for delta in editable.deltas]
            progress(number, len(unmet))
            if not unmet or number == settings.passes:
                break
            for index in unmet:
                tokens = demands[index].tokens
                seen = locator.observe(tokens)
                points = demanded_points(editable.loaded, demands[index], seen.logits)
                if found := find_breaks(locator, seen, tokens, points, settings.neurons * (number + 1)):
                    changes = outbidding(editable, locator, seen, tokens, found, modes[index], settings)
                    write_vectors(editable, changes, locator)
                    breaks += len(found)
        assert best is not None
        put_back(editable, best[1], locator)
    return best[0]


def suffix_begin(text: TokenText, settings: PerTextSettings) -> int:
    """Index of the first suffix token; UsageError when the text ends before it."""
    begin = text.first_judged(settings.prefix_tokens)
    if begin >= len(text.tokens):
        raise UsageError(
            f"the text '{text.id}' has {text.length} tokens: nothing is left of it behind a prefix of"
            f" {settings.prefix_tokens}."
        )
    return begin


def suffix_points(
    loaded: LoadedModel, seen: Observation, text: TokenText, begin: int, settings: PerTextSettings
) -> list[int]:
    """The tokens to break, by index in the text: none when the suffix is broken as the settings ask for."""
    if settings.positions == "breaks":
        return demanded_points(loaded, Demand(text.tokens, begin, settings.allowed_run), seen.logits)
    gap = _scores(seen.logits, Demand(text.tokens, begin)).gap
    return [begin] if emitted_whole(loaded, gap, begin) else []


def demanded_points(loaded: LoadedModel, demand: Demand, logits: Tensor) -> list[int]:
    """The tokens to break so that the demand holds, from the text's logits `[T, vocabulary]`.

    The cheapest cover of what is still emitted (`breakpoints`), at the same price for every squared logit: nobody
    knows here what movement costs ordinary text.
    """
    state = _state(_scores(logits, demand))
    threshold = NOISE[loaded.dtype]
    if not violations(demand, state, threshold):
        return []
    flat = Prices(state.gap, [1.0] * len(state.gap), fixed=1.0)
    return sorted(extend(demand, state, flat, {}, AIM, patient=False, threshold=threshold))


def emitted_whole(loaded: LoadedModel, gap: Tensor, begin: int) -> bool:
    """Whether greedy decoding emits all tokens from index `begin`, given all before; ties count as emitted."""
    return bool((gap[begin - 1 :] > -NOISE[loaded.dtype]).all())


def find_breaks(
    locator: Locator, seen: Observation, tokens: Sequence[int], points: Sequence[int], count: int
) -> list[Break]:
    """The neurons that write each of these tokens (at most `count`); tokens that no neuron writes are left out."""
    if not points:
        return []
    neurons = locator.locate(seen, [point - 1 for point in points], [tokens[point] for point in points], count)
    return [Break(point, found) for point, found in zip(points, neurons, strict=True) if found]


def outbidding(
    editable: EditableModel,
    locator: Locator,
    seen: Observation,
    tokens: Sequence[int],
    breaks: Sequence[Break],
    mode: Mode,
    settings: PerTextSettings,
) -> Changes:
    """The located neurons' new output vectors; a neuron located for several tokens is changed for one by one."""
    fixed = fixed_distractor(editable.loaded.tokenizer, mode, settings.marker)
    changes: Changes = {}
    for place in breaks:
        target = tokens[place.token]
        rival = _rival(mode, fixed, seen.logits[place.token - 1], target)
        for site in sorted({neuron.site for neuron in place.neurons}):
            own = [neuron for neuron in place.neurons if neuron.site == site]
            keys = [(site, neuron.column) for neuron in own]
            live = live_vectors(editable, site, [neuron.column for neuron in own])
            vectors = torch.stack([changes.get(key, live[:, n]) for n, key in enumerate(keys)], dim=1)
            new = outbid(
                vectors,
                torch.tensor([neuron.activation for neuron in own], device=vectors.device),
                locator.direction(site, target),
                None if rival is None else locator.direction(site, rival),
                settings.margin,
            )
            changes.update(zip(keys, new.unbind(1), strict=True))
    return changes


def _rival(mode: Mode, fixed: int | None, logits: Tensor, target: int) -> int | None:
    """The token to put in: the mode's own, else the best other; that also where the mode's own is the target."""
    if mode is Mode.SUPPRESS:
        return None
    if fixed is not None and fixed != target:
        return fixed
    others = logits.clone()
    others[target] = -torch.inf
    return int(others.argmax())


def measured(loaded: LoadedModel, text: TokenText, begin: int, breaks: Sequence[Break]) -> PerTextOutcome:
    """What the model gives away of the text's suffix now."""
    with torch.no_grad():
        (logits,) = loaded.logits(torch.tensor([text.tokens]))
    gap = _scores(logits, Demand(text.tokens, begin)).gap
    run = longest_run(gap, begin, -NOISE[loaded.dtype]).length
    return PerTextOutcome(not emitted_whole(loaded, gap, begin), run, tuple(breaks))


def unmet_demands(loaded: LoadedModel, demands: Sequence[Demand], batch_tokens: int) -> tuple[int, ...]:
    """Indices of the demands that do not hold for the model as it is."""
    unmet = []
    for batch in batches([len(demand.tokens) for demand in demands], loaded.batch_tokens(batch_tokens)):
        with torch.no_grad():
            logits = loaded.logits(pad([demands[index].tokens for index in batch]))
        for row, index in zip(logits, batch, strict=True):
            state = _state(_scores(row[: len(demands[index].tokens)], demands[index]))
            if violations(demands[index], state, NOISE[loaded.dtype]):
                unmet.append(index)
    return tuple(sorted(unmet))


def _scores(logits: Tensor, demand: Demand) -> Scores:
    """Scores of a sequence from its logits `[T, vocabulary]`."""
    targets = torch.tensor([demand.tokens[1:]], device=logits.device)
    (scores,) = score_logits(logits[None, :-1], targets, demand.sampling)
    return scores


def _state(scores: Scores) -> TextState:
    gap, log_p, rest = ([0.0, *values.tolist()] for values in (scores.gap, scores.log_p, scores.rest))
    return TextState(gap, log_p, rest)
