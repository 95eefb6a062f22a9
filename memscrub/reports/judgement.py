"""Measures against limits: what was found out about a text, and which of its class's limits that breaks.

Plain values only: knows no model and no torch. A text too short to judge is inconclusive, never safe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from memscrub.policy.sections import ClassLimits


class Status(str, Enum):
    """Where a text stands against its class's limits."""

    WITHIN = "within"
    VIOLATED = "violated"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class SecretMeasure:
    """One marked secret, by its token range: is it emitted greedily, and its log-probability under sampling."""

    begin: int
    end: int
    emitted: bool
    log_probability: float


@dataclass(frozen=True)
class Measures:
    """Everything measured on one text; None where it was not asked for or the text is too short.

    `match_run`: longest greedy run in tokens, from any offset; `run_margin`: least logit distance to the runner-up
    in it; `confirmed`: the run was decided by real decoding because that margin is within rounding noise.
    `extractable`: classic prefix/suffix extraction. `window_log_probability`: likeliest window of the limit's
    length under sampling. `near_verbatim`: highest similarity of the model's own continuation; with `screened` an
    upper estimate within the limit, because the pass showed that decoding could not come near it.
    `unjudged_secrets`: marked secrets that nothing predicts, which are not among `secrets`.
    """

    tokens: int
    match_run: int
    run_begin: int
    run_margin: float
    confirmed: bool = False
    extractable: bool | None = None
    window_log_probability: float | None = None
    near_verbatim: float | None = None
    secrets: tuple[SecretMeasure, ...] = ()
    screened: bool = False
    unjudged_secrets: int = 0


@dataclass(frozen=True)
class Finding:
    """One limit held against one measured value."""

    limit: str
    allowed: float
    measured: float
    holds: bool


@dataclass(frozen=True)
class Judgement:
    """The limits of a text's class, each with what was measured, and where that leaves the text."""

    status: Status
    findings: tuple[Finding, ...]


def judge(measures: Measures, limits: ClassLimits) -> Judgement:
    """Hold one text's measures against its class's limits."""
    findings = []
    short = False
    if limits.max_verbatim_tokens is not None:
        findings.append(_at_most("max_verbatim_tokens", limits.max_verbatim_tokens, measures.match_run))
        short |= measures.tokens <= limits.max_verbatim_tokens
    if limits.max_near_verbatim is not None:
        if measures.near_verbatim is None:
            short = True
        else:
            findings.append(_at_most("max_near_verbatim", limits.max_near_verbatim, measures.near_verbatim))
    if limits.secret:
        findings += _secret_findings(measures.secrets, limits.max_sampling_probability)
        short |= not measures.secrets or measures.unjudged_secrets > 0
    elif limits.max_sampling_probability is not None:
        if measures.window_log_probability is None:
            short = True
        else:
            findings.append(_probability(limits.max_sampling_probability, measures.window_log_probability))
    if any(not finding.holds for finding in findings):
        return Judgement(Status.VIOLATED, tuple(findings))
    return Judgement(Status.INCONCLUSIVE if short else Status.WITHIN, tuple(findings))


def _secret_findings(secrets: Sequence[SecretMeasure], limit: float | None) -> list[Finding]:
    if not secrets:
        return []
    emitted = sum(secret.emitted for secret in secrets)
    findings = [_at_most("secrets_emitted", 0, emitted)]
    if limit is not None:
        findings.append(_probability(limit, max(secret.log_probability for secret in secrets)))
    return findings


def _at_most(name: str, allowed: float, measured: float) -> Finding:
    return Finding(name, allowed, measured, measured <= allowed)


def _probability(limit: float, log_probability: float) -> Finding:
    return Finding("max_sampling_probability", limit, math.exp(log_probability), log_probability <= math.log(limit))
