"""Limits from control texts: nothing may come closer to a protected text than to one that was never trained on.

A class with `like_controls` is judged by what this checkpoint makes of the class's controls: the nearest
continuation and the likeliest window or secret among them are the most that a protected text may show. Its other
limits stay. Changes no limit of other classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from memscrub.errors import PolicyError
from memscrub.judgement import Measures
from memscrub.measure import measure
from memscrub.model import LoadedModel
from memscrub.policy import Policy
from memscrub.policy_sections import ClassLimits
from memscrub.tokens import TokenText

# Less likely than this is as good as never; solving for less would spend room on nothing.
NEVER = 1e-6


def with_ceilings(loaded: LoadedModel, policy: Policy, controls: Sequence[TokenText]) -> Policy:
    """The policy with the limits of `like_controls` classes filled in from the live model's controls.

    Raises PolicyError when such a class has no control texts.
    """
    asked = {name for name, limits in policy.classes.items() if limits.like_controls}
    if not asked:
        return policy
    texts = [text for text in controls if text.class_name in asked]
    if missing := sorted(asked - {text.class_name for text in texts}):
        raise PolicyError(
            f"{policy.path}: class {missing[0]} sets like_controls, but there is no control text of that class;"
            " name a list of them in [protected] controls."
        )
    open_ended = {
        name: limits.model_copy(update={"max_near_verbatim": 1.0}) if name in asked else limits
        for name, limits in policy.classes.items()
    }
    measures = measure(loaded, policy.model_copy(update={"classes": open_ended}), texts).measures
    found = dict(policy.classes)
    for name in asked:
        own = [each for text, each in zip(texts, measures, strict=True) if text.class_name == name]
        found[name] = _filled(policy.classes[name], own)
    return policy.model_copy(update={"classes": found})


def _filled(limits: ClassLimits, controls: Sequence[Measures]) -> ClassLimits:
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
