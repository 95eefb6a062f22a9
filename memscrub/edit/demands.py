"""From a policy's limits to demands on token sequences; the one place where both are known. Pure functions."""

from __future__ import annotations

import math

from rapidfuzz.distance import Levenshtein

from memscrub.edit.breakpoints import Demand
from memscrub.edit.modes import Mode
from memscrub.measures.continuation import Continuation
from memscrub.measures.extraction import Sampling
from memscrub.models.tokens import TokenText
from memscrub.policy.sections import ClassLimits, Probe

# In a continuation that is too close to the true text, this many agreeing tokens running are left alone (if there
# are more).
AGREEING = 3


def demand_of(
    text: TokenText, limits: ClassLimits, probe: Probe, mode: Mode = Mode.NEXT_BEST, rival: int | None = None
) -> Demand:
    """What a text's class asks of its token sequence; `rival` takes broken tokens' places where the mode fixes it."""
    limit = None if limits.max_sampling_probability is None else math.log(limits.max_sampling_probability)
    first = text.first_judged(probe.min_prefix_tokens)
    width = limits.max_verbatim_tokens
    return Demand(
        tokens=text.tokens,
        first=first,
        # Without a limit on runs, near-verbatim still asks that the text not come out whole.
        allowed_run=width,
        window=None if limits.secret or limit is None or width is None else (width, limit),
        spans=tuple((max(begin, 1), end, limit) for begin, end in text.secrets) if limits.secret else (),
        sampling=Sampling(limits.top_k, limits.temperature, limits.top_p),
        mode=mode,
        rival=rival,
    )


def continuation_demand(said: Continuation, own: Demand) -> Demand:
    """Break the agreement of a continuation with the true text, in the context the model made for itself.

    The sequence is the opening followed by what the model said; judged are the stretches that agree. Where none is
    longer than `AGREEING`, the longest must get shorter. What takes the place of broken tokens is what does in the
    text's `own` demand.
    """
    begin = len(said.opening.given)
    blocks = Levenshtein.opcodes(list(said.opening.truth), list(said.tokens))
    stretches = tuple(
        (begin + op.dest_start, begin + op.dest_end)
        for op in blocks
        if op.tag == "equal" and op.dest_end > op.dest_start
    )
    return Demand(
        tokens=said.opening.given + said.tokens,
        first=begin,
        allowed_run=min(AGREEING, max((end - start for start, end in stretches), default=1) - 1),
        judged=stretches,
        mode=own.mode,
        rival=own.rival,
    )
