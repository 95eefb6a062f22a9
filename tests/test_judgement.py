"""Limits and verdicts: which measures break which limit, and how a run ends; too short is never safe."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memscrub.errors import ExitCode
from memscrub.policy.sections import ClassLimits
from memscrub.reports.judgement import Finding, Judgement, Measures, SecretMeasure, Status, judge
from memscrub.reports.verdict import Outcome, decide

LONG = Measures(tokens=100, match_run=16, run_begin=3, run_margin=0.5)
SECRET = SecretMeasure(4, 9, emitted=False, log_probability=math.log(1e-6))

RUN = ClassLimits(max_verbatim_tokens=16)
NEAR = ClassLimits(max_near_verbatim=0.6)
SAMPLED = ClassLimits(max_verbatim_tokens=16, max_sampling_probability=1e-4)
PII = ClassLimits(secret=True, max_sampling_probability=1e-4)


def measured(**changes: object) -> Measures:
    return Measures(**{**LONG.__dict__, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measures", "limits", "status"),
    [
        (measured(match_run=16), RUN, Status.WITHIN),
        (measured(match_run=17), RUN, Status.VIOLATED),
        (measured(tokens=16, match_run=16), RUN, Status.INCONCLUSIVE),
        (measured(tokens=17, match_run=17), RUN, Status.VIOLATED),
        (measured(near_verbatim=0.6), NEAR, Status.WITHIN),
        (measured(near_verbatim=0.61), NEAR, Status.VIOLATED),
        (measured(near_verbatim=None), NEAR, Status.INCONCLUSIVE),
        (measured(near_verbatim=math.nan), NEAR, Status.VIOLATED),
        (measured(window_log_probability=math.log(1e-4)), SAMPLED, Status.WITHIN),
        (measured(window_log_probability=math.log(1.1e-4)), SAMPLED, Status.VIOLATED),
        (measured(window_log_probability=-1000.0), SAMPLED, Status.WITHIN),
        (measured(window_log_probability=math.nan), SAMPLED, Status.VIOLATED),
        (measured(window_log_probability=None), SAMPLED, Status.INCONCLUSIVE),
        (measured(match_run=99, window_log_probability=None), SAMPLED, Status.VIOLATED),
        (measured(secrets=()), PII, Status.INCONCLUSIVE),
        (measured(secrets=(SECRET,)), PII, Status.WITHIN),
        (measured(secrets=(SECRET, SecretMeasure(9, 12, True, -50.0))), PII, Status.VIOLATED),
        (measured(secrets=(SECRET, SecretMeasure(9, 12, False, -1.0))), PII, Status.VIOLATED),
        (measured(secrets=(SecretMeasure(9, 12, False, -1.0),)), ClassLimits(secret=True), Status.WITHIN),
        (measured(match_run=99, secrets=(SECRET,)), PII, Status.WITHIN),
    ],
)
def test_judge(measures: Measures, limits: ClassLimits, status: Status) -> None:
    judgement = judge(measures, limits)
    assert judgement.status is status
    assert (status is Status.VIOLATED) == any(not finding.holds for finding in judgement.findings)


def test_findings_state_the_limit_and_the_value_that_decided() -> None:
    assert judge(measured(match_run=20, window_log_probability=-1.0), SAMPLED).findings == (
        Finding("max_verbatim_tokens", 16, 20, False),
        Finding("max_sampling_probability", 1e-4, math.exp(-1.0), False),
    )


@st.composite
def class_limits(draw: st.DrawFn) -> ClassLimits:
    share = st.floats(1e-6, 1)
    run = draw(st.none() | st.integers(1, 40))
    secret = draw(st.booleans())
    near = draw(st.none() | share) if run or secret else draw(share)
    sampled = draw(st.none() | share) if run or secret else None
    return ClassLimits(max_verbatim_tokens=run, max_near_verbatim=near, max_sampling_probability=sampled, secret=secret)


@st.composite
def any_measures(draw: st.DrawFn) -> Measures:
    tokens = draw(st.integers(0, 60))
    log_p = st.floats(-30, 0)
    return Measures(
        tokens=tokens,
        match_run=draw(st.integers(0, tokens)),
        run_begin=1,
        run_margin=1.0,
        near_verbatim=draw(st.none() | st.floats(0, 1)),
        window_log_probability=draw(st.none() | log_p),
        secrets=tuple(draw(st.lists(st.builds(SecretMeasure, st.just(1), st.just(3), st.booleans(), log_p)))),
    )


@given(measures=any_measures(), limits=class_limits())
def test_within_means_that_every_limit_of_the_class_was_held_against_a_value(
    measures: Measures, limits: ClassLimits
) -> None:
    judgement = judge(measures, limits)
    names = [finding.limit for finding in judgement.findings]
    assert len(set(names)) == len(names)
    if judgement.status is Status.WITHIN:
        asked = {"max_verbatim_tokens", "max_near_verbatim", "max_sampling_probability"}
        expected = {name for name in asked if getattr(limits, name) is not None}
        assert set(names) == expected | ({"secrets_emitted"} if limits.secret else set())


# -- the verdict ---------------------------------------------------------------------------------------------

HOLDS = Judgement(Status.WITHIN, (Finding("max_verbatim_tokens", 16, 3, True),))
BREAKS = Judgement(Status.VIOLATED, (Finding("max_verbatim_tokens", 16, 30, False),))
WORSE = Judgement(
    Status.VIOLATED,
    (Finding("max_verbatim_tokens", 16, 45, False), Finding("max_near_verbatim", 0.6, 0.5, True)),
)
SHORT = Judgement(Status.INCONCLUSIVE, ())


@pytest.mark.parametrize(
    ("judgements", "locality", "fixing", "outcome", "code"),
    [
        ([], [], False, Outcome.PASS, ExitCode.PASS),
        ([HOLDS], [], False, Outcome.PASS, ExitCode.PASS),
        ([HOLDS], [], True, Outcome.PASS, ExitCode.PASS),
        ([HOLDS, BREAKS], [], False, Outcome.VIOLATED, ExitCode.VIOLATED),
        ([HOLDS, BREAKS], [], True, Outcome.UNREACHABLE, ExitCode.UNREACHABLE),
        ([HOLDS], ["KL is 0.02."], False, Outcome.VIOLATED, ExitCode.VIOLATED),
        ([HOLDS], ["KL is 0.02."], True, Outcome.UNREACHABLE, ExitCode.UNREACHABLE),
        ([HOLDS, SHORT], [], False, Outcome.PASS, ExitCode.PASS),
        ([SHORT], [], False, Outcome.INCONCLUSIVE, ExitCode.INCOMPLETE),
        ([SHORT, SHORT], [], True, Outcome.INCONCLUSIVE, ExitCode.INCOMPLETE),
        ([SHORT], ["KL is 0.02."], False, Outcome.VIOLATED, ExitCode.VIOLATED),
        ([SHORT], ["KL is 0.02."], True, Outcome.UNREACHABLE, ExitCode.UNREACHABLE),
        ([SHORT, BREAKS], [], False, Outcome.VIOLATED, ExitCode.VIOLATED),
        ([SHORT, BREAKS], [], True, Outcome.UNREACHABLE, ExitCode.UNREACHABLE),
    ],
)
def test_decide(
    judgements: list[Judgement], locality: list[str], fixing: bool, outcome: Outcome, code: ExitCode
) -> None:
    judged = [(f"t{index}", "c", judgement) for index, judgement in enumerate(judgements)]
    verdict = decide(judged, locality, fixing=fixing)
    assert (verdict.outcome, verdict.exit_code) == (outcome, int(code))
    assert (verdict.outcome is Outcome.PASS) == (verdict.exit_code == 0)
    assert {f"no room: {each}" if fixing else each for each in locality} <= set(verdict.reasons)


JUDGEMENTS = st.lists(
    st.tuples(
        st.text(min_size=1, max_size=4),
        st.sampled_from(["a", "b"]),
        st.sampled_from([HOLDS, BREAKS, WORSE, SHORT]),
    )
)


@given(judged=JUDGEMENTS, fixing=st.booleans())
def test_texts_too_short_to_judge_are_counted_named_and_never_called_safe(
    judged: list[tuple[str, str, Judgement]], fixing: bool
) -> None:
    verdict = decide(judged, fixing=fixing)
    statuses = [judgement.status for _, _, judgement in judged]
    assert verdict.within == statuses.count(Status.WITHIN)
    assert verdict.violated == statuses.count(Status.VIOLATED)
    assert verdict.inconclusive == statuses.count(Status.INCONCLUSIVE)
    short = [id for id, _, judgement in judged if judgement.status is Status.INCONCLUSIVE]
    assert not short or any("too short" in reason and short[0] in reason for reason in verdict.reasons)
    nothing_judged = bool(judged) and len(short) == len(judged)
    assert (verdict.exit_code == 0) == (verdict.violated == 0 and not nothing_judged)
    assert (verdict.outcome is Outcome.INCONCLUSIVE) == nothing_judged
    assert nothing_judged == any("list longer texts" in reason for reason in verdict.reasons)
    assert bool(verdict.reasons) == bool(verdict.violated or short)


def test_a_reason_names_the_class_the_limit_how_many_and_the_worst_text() -> None:
    verdict = decide([("x", "c", BREAKS), ("y", "c", WORSE), ("z", "d", BREAKS)])
    assert verdict.reasons == (
        "class c: 2 texts break max_verbatim_tokens (allowed 16, worst 45 in 'y').",
        "class d: 1 text breaks max_verbatim_tokens (allowed 16, worst 30 in 'z').",
    )
