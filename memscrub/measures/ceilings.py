"""Limits from control texts: nothing may come closer to a protected text than to one that was never trained on.

A class with `like_controls` is judged by what this checkpoint makes of the class's controls: the nearest
continuation and the likeliest window or secret among them are the most that a protected text may show. Its other
limits stay. Changes no limit of other classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from memscrub.errors import PolicyError
from memscrub.measures.continuation import MIN_SUFFIX
from memscrub.measures.measure import measure
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText
from memscrub.policy.document import Policy
from memscrub.policy.sections import ClassLimits, Probe
from memscrub.reports.control_limits import filled
from memscrub.reports.judgement import Measures


def with_ceilings(loaded: LoadedModel, policy: Policy, controls: Sequence[TokenText]) -> Policy:
    """The policy with the limits of `like_controls` classes filled in from the live model's controls.

    Raises PolicyError when such a class has no control texts, or none that shows how near, or how likely, a text may
    be: half of what the policy asks for would be left without a limit.
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
        if lacking := _lacking(policy.classes[name], policy.probe, own):
            raise PolicyError(f"{policy.path}: class {name} sets like_controls, but {lacking}.")
        found[name] = filled(policy.classes[name], own)
    return policy.model_copy(update={"classes": found})


def _lacking(limits: ClassLimits, probe: Probe, controls: Sequence[Measures]) -> str | None:
    """What keeps these controls from setting both limits, and what to do about it; None where nothing does."""
    short = "all control texts of that class are too short"
    if probe.near_verbatim_tokens < MIN_SUFFIX:
        return f"continuations are compared over {MIN_SUFFIX} tokens or more; raise near_verbatim_tokens in [probe]"
    if all(each.near_verbatim is None for each in controls):
        return f"{short} to be continued and compared over {MIN_SUFFIX} tokens; add longer ones"
    if limits.secret:
        marked = any(each.secrets for each in controls)
        return None if marked else "no control text of that class marks a secret that can be judged; add some that do"
    window = limits.max_verbatim_tokens
    if window is not None and all(each.window_log_probability is None for each in controls):
        return f"{short} to be sampled over {window} tokens (max_verbatim_tokens); add longer ones"
    return None
