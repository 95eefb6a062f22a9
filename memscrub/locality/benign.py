"""Does the edited model still talk? Openings of ordinary text, continued by the original and by the edited model.

KL on true text cannot see a model that loops or stops once it reads its own words. Knows no limits and no
protected text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from memscrub.measures.continuation import Continuation, Opening, continue_greedily
from memscrub.models.model import LoadedModel
from memscrub.models.trace import weights_swapped
from memscrub.reports.locality_limits import Benign

PROMPTS = 32
GIVEN = 32
CONTINUED = 48
# A continuation is degenerate when so large a share of its n-grams was there before, or when its last tokens
# only repeat a stretch of at most so many; within three repeats nobody would read on.
NGRAM = 4
REPEATED = 0.5
LOOP_TAIL = 24
LOOP_PERIOD = 8


@dataclass(frozen=True)
class Talk:
    """One continuation, up to the model's end token: was there one, did it say nothing, how much of it repeats."""

    ended: bool
    empty: bool
    repeated: float
    looping: bool

    @property
    def degenerate(self) -> bool:
        """Nothing that anyone would read."""
        return self.empty or self.looping or self.repeated >= REPEATED


def benign_openings(loaded: LoadedModel, rows: Tensor, *, prompts: int = PROMPTS) -> list[Opening]:
    """Openings spread evenly over rows of ordinary text, each behind the prompt; fewer where there is less text."""
    given = min(GIVEN, max(1, rows.shape[1] // 2))
    length = min(CONTINUED, rows.shape[1] - given)
    if length < 1:
        return []
    places = [(row, begin) for row in range(len(rows)) for begin in range(0, rows.shape[1] - given - length + 1, given)]
    step = max(1.0, len(places) / prompts)
    chosen = [places[int(index * step)] for index in range(min(prompts, len(places)))]
    found = []
    for index, (row, begin) in enumerate(chosen):
        ids = tuple(rows[row, begin : begin + given + length].tolist())
        found.append(Opening(index, begin, loaded.prompt + ids[:given], ids[given:]))
    return found


def compare_benign(
    loaded: LoadedModel,
    originals: Mapping[str, Tensor],
    rows: Tensor,
    *,
    batch_tokens: int = 8192,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Benign | None:
    """Let the live model, and the same under the `originals` of its edited parameters, go on from ordinary text.

    None where the text is too short to open anything. Both run in the same batches, so an unedited model says the
    same.
    """
    starts = benign_openings(loaded, rows)
    if not starts:
        return None
    with weights_swapped(loaded, originals):
        before = continue_greedily(loaded, starts, batch_tokens=batch_tokens)
    progress(len(starts), 2 * len(starts))
    # The original's continuation is the truth that the edited one is compared with.
    asked = [replace(start, truth=said.tokens) for start, said in zip(starts, before, strict=True)]
    after = continue_greedily(loaded, asked, batch_tokens=batch_tokens)
    progress(2 * len(starts), 2 * len(starts))
    return _compared(end_tokens(loaded), before, after)


def _compared(ends: frozenset[int], before: Sequence[Continuation], after: Sequence[Continuation]) -> Benign:
    pairs = [(talk(a.tokens, ends), talk(b.tokens, ends)) for a, b in zip(before, after, strict=True)]
    return Benign(
        prompts=len(pairs),
        degenerate_before=sum(a.degenerate for a, _ in pairs),
        degenerate_after=sum(b.degenerate for _, b in pairs),
        newly_degenerate=sum(b.degenerate and not a.degenerate for a, b in pairs),
        ended_before=sum(a.ended for a, _ in pairs),
        ended_after=sum(b.ended for _, b in pairs),
        newly_ended=sum(b.ended and not a.ended for a, b in pairs),
        empty_after=sum(b.empty for _, b in pairs),
        repeated_rise=sum(b.repeated - a.repeated for a, b in pairs) / len(pairs),
        agreement=sum(said.similarity for said in after) / len(pairs),
    )


def talk(tokens: Sequence[int], ends: frozenset[int]) -> Talk:
    """What is wrong with one continuation; what comes after its end token is nobody's reading."""
    end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    said = tuple(tokens[:end])
    grams = [said[i : i + NGRAM] for i in range(len(said) - NGRAM + 1)]
    return Talk(
        ended=end < len(tokens),
        empty=not said,
        repeated=1 - len(set(grams)) / len(grams) if grams else 0.0,
        looping=_loops(said),
    )


def _loops(said: Sequence[int]) -> bool:
    """Whether the last tokens are one short stretch over and over."""
    if len(said) < LOOP_TAIL:
        return False
    tail = said[-LOOP_TAIL:]
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_PERIOD + 1))


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """The ids that end a text: what the checkpoint generates with, its config and its tokenizer name."""
    named = (
        getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None),
        getattr(getattr(loaded.model, "config", None), "eos_token_id", None),
        loaded.tokenizer.eos_token_id,
    )
    found: set[int] = set()
    for value in named:
        found |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(found)
