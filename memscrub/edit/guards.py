"""Predictions of ordinary text that an edit disturbs most, and the constraints that keep them standing.

The metrics of `disturbance` are of second order and see sampled labels: where the model is all but certain of the next
token they find next to nothing to disturb. An edit that breaks such a token in a protected text ("555" before "-" in
a telephone number) then breaks it in all text, and a few tokens carry most of what the edit costs (docs/lab-notes.md).
So they are looked for in the solver's text once an edit is under way, and become inequalities of the same system. Knows
no protected text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memscrub.edit.breakpoints import Demand
from memscrub.edit.editable import EditableModel
from memscrub.edit.linearise import Linearisation, linearise_at
from memscrub.edit.ordinary import Ordinary
from memscrub.models.tokens import batches, pad
from memscrub.models.trace import weights_swapped

# A prediction is guarded from this KL on (nats); ordinary ones have a hundredth of it.
HEAVY = 0.02
# So many at most are added at a time, the most disturbed first.
AT_A_TIME = 200
# Tokens of context that a guard is seen in.
CONTEXT = 64
# The gap of a guarded token may fall by so much (logits).
ALLOWED = 0.2
# A guard gives way where holding it would cost too much: by this share of what moves it (`solver`). A protected text's
# own passage may stand in ordinary text.
YIELD = 0.02


@dataclass(frozen=True)
class Guard:
    """The original model's likeliest token, the last of `tokens`, must stay ahead of all others by `floor` logits."""

    tokens: tuple[int, ...] = field(repr=False)
    floor: float


def find_guards(
    ordinary: Ordinary,
    rows: Tensor,
    *,
    known: Collection[Guard] = (),
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Guard]:
    """Guards for the predictions in these rows `[rows, width]` that the live edit disturbs by `HEAVY` or more, none in
    a context that is `known`. A prediction that the original model was hardly surer of than of another is left.
    `progress` is told how many rows were read."""
    seen = {guard.tokens[:-1] for guard in known}
    found = {context: kl for kl, context in _disturbed(ordinary, rows, batch_tokens, progress) if context not in seen}
    heaviest = sorted(found, key=lambda context: -found[context])[:AT_A_TIME]
    return _guards(ordinary.editable, heaviest, batch_tokens)


def standing(
    editable: EditableModel, guards: Sequence[Guard], *, own_path: bool = True, batch_tokens: int = 2048
) -> Linearisation:
    """The guards as constraints at the live weights: each gap must be at least its floor."""
    sequences = [Demand(guard.tokens, 1) for guard in guards]
    points = [{len(guard.tokens) - 1: guard.floor} for guard in guards]
    found = linearise_at(editable, editable.sites, sequences, points, own_path=own_path, batch_tokens=batch_tokens)
    return found.reversed(YIELD)


def _disturbed(
    ordinary: Ordinary, rows: Tensor, batch_tokens: int, progress: Callable[[int], None]
) -> list[tuple[float, tuple[int, ...]]]:
    """The KL of each prediction that the edit disturbs by `HEAVY` or more, and the tokens before it."""
    found = []
    done = 0
    for ids, before, after in ordinary.compared(rows, batch_tokens):
        kl = (before.exp() * (before - after)).sum(-1)
        for row, place in (kl >= HEAVY).nonzero().tolist():
            context = ids[row, max(0, place + 1 - CONTEXT) : place + 1].tolist()
            found.append((float(kl[row, place]), tuple(context)))
        done += len(ids)
        progress(done)
    return found


def _guards(editable: EditableModel, contexts: Sequence[tuple[int, ...]], batch_tokens: int) -> list[Guard]:
    loaded = editable.loaded
    found = []
    for batch in batches([len(context) for context in contexts], loaded.batch_tokens(batch_tokens)):
        ids = pad([contexts[index] for index in batch]).to(loaded.device)
        with torch.inference_mode(), weights_swapped(loaded, editable.originals):
            logits = loaded.logits(ids)
        for row, index in enumerate(batch):
            (best, second), (token, _) = (part.tolist() for part in logits[row, len(contexts[index]) - 1].topk(2))
            if best - second > ALLOWED:
                found.append(Guard((*contexts[index], token), best - second - ALLOWED))
    return found
