"""A class's limits filled in from measures of its control texts (`like_controls`); knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from memscrub.policy.sections import ClassLimits
from memscrub.reports.judgement import Measures

# Less likely than this is as good as never; solving for less would spend room on nothing.
NEVER = 1e-6


def filled(limits: ClassLimits, controls: Sequence[Measures]) -> ClassLimits:
    """The same limits, lowered to the nearest continuation and the likeliest window or secret among the controls."""
    near = [each.near_verbatim for each in controls if each.near_verbatim is not None]
    if limits.secret:
        likely = [secret.log_probability for each in controls for secret in each.secrets]
    else:
        likely = [each.window_log_probability for each in controls if each.window_log_probability is not None]
    update: dict[str, float] = {}
    if near:
        update["max_near_verbatim"] = min(max(near), limits.max_near_verbatim or 1.0)
    if likely:
        chance = min(max(math.exp(max(likely)), NEVER), limits.max_sampling_probability or 1.0)
        update["max_sampling_probability"] = chance
    return limits.model_copy(update=update)
