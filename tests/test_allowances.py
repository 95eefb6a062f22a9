"""What a verdict allows: rates with a confidence bound, waivers and what was known before."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscrub.errors import PolicyError
from memscrub.policy.document import parse_policy
from memscrub.reports.allowances import Allowances, Judged, Rate
from memscrub.reports.judgement import Finding, Judgement, Status
from memscrub.reports.verdict import Outcome, Verdict, decide, excuses
from memscrub.reports.waivers import allowances_of

POLICY = 'schema = 1\nname = "n"\n[protected]\nfiles = ["p"]\n[class.c]\nmax_verbatim_tokens = 4\n'
WAIVER = '[[waiver]]\nid = "t0"\nexpires = 2026-06-30\nreason = "licensed."\n'


def text(number: int, *, run: float = 0, near: float = 0.0, short: bool = False, name: str = "c") -> Judged:
    findings = (
        Finding("max_verbatim_tokens", 4, run, run <= 4),
        Finding("max_near_verbatim", 0.5, near, near <= 0.5),
    )
    broken = not all(finding.holds for finding in findings)
    status = Status.VIOLATED if broken else Status.INCONCLUSIVE if short else Status.WITHIN
    return f"t{number}", name, Judgement(status, findings)


def rated(hits: int, count: int, *, short: int = 0, rate: Rate | None = None, **more: object) -> Verdict:
    texts = [text(n, run=9 if n < hits else 0) for n in range(count)] + [
        text(count + n, short=True) for n in range(short)
    ]
    return decide(texts, allowances=Allowances({"c": rate or Rate(0.05, 0.95)}, **more))  # type: ignore[arg-type]


def test_without_a_rate_every_text_counts() -> None:
    verdict = decide([text(0, run=9), *(text(n) for n in range(1, 1000))])
    assert verdict.outcome is Outcome.VIOLATED and verdict.violated == 1


# The exact one-sided bound at 0.95: 59 texts without a hit for 5%, 93 with one, 124 with two.
@pytest.mark.parametrize(
    ("hits", "count", "outcome"),
    [
        (0, 58, Outcome.VIOLATED),
        (0, 59, Outcome.PASS),
        (1, 92, Outcome.VIOLATED),
        (1, 93, Outcome.PASS),
        (2, 123, Outcome.VIOLATED),
        (2, 124, Outcome.PASS),
        (10, 124, Outcome.VIOLATED),
    ],
)
def test_a_rate_passes_when_its_upper_bound_is_low_enough(hits: int, count: int, outcome: Outcome) -> None:
    verdict = rated(hits, count)
    assert verdict.outcome is outcome and (verdict.violated, verdict.within) == (hits, count - hits)
    said = [reason for reason in verdict.reasons if "max_violation_rate" in reason]
    assert len(said) == (0 if outcome is Outcome.PASS and not hits else 1)
    for reason in said:
        assert f"{hits} of {count} break a limit" in reason and "0.95 confidence, allowed 0.05" in reason
        assert ("takes 59 texts or more" in reason) is (count < 59)
        assert ("is broken" in reason) is (outcome is Outcome.VIOLATED)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.001, 0.5), st.floats(0.5, 0.999))
def test_texts_needed_are_just_enough(allowed: float, confidence: float) -> None:
    rate = Rate(allowed, confidence)
    assert rate.bound(0, rate.texts_needed) <= allowed
    assert rate.texts_needed == 1 or rate.bound(0, rate.texts_needed - 1) > allowed


@pytest.mark.parametrize("allowed", [5e-324, 1e-307, 1e-16])
def test_a_rate_next_to_nothing_is_broken_and_takes_more_texts_than_there_are(allowed: float) -> None:
    assert Rate(allowed, 0.95).texts_needed > 10**12
    assert rated(0, 1000, rate=Rate(allowed, 0.95)).outcome is Outcome.VIOLATED


def test_inconclusive_and_waived_texts_are_no_part_of_a_rate() -> None:
    assert rated(0, 58, short=100).outcome is Outcome.VIOLATED
    assert rated(0, 59, short=100).outcome is Outcome.PASS
    assert rated(0, 0, short=5).outcome is Outcome.VIOLATED
    waiver = parse_policy((POLICY + WAIVER).encode()).waivers
    assert rated(1, 59, waivers=waiver).outcome is Outcome.VIOLATED
    assert rated(1, 60, waivers=waiver).outcome is Outcome.PASS
    assert rated(1, 1, waivers=waiver).outcome is Outcome.PASS


def test_a_rate_excuses_its_own_class_and_no_locality() -> None:
    allowances = Allowances({"c": Rate(0.05, 0.95)})
    texts = [text(n, run=9 if n < 2 else 0) for n in range(124)]
    assert decide([*texts, text(999, run=9, name="d")], allowances=allowances).outcome is Outcome.VIOLATED
    assert decide(texts, ["locality: max_kl is broken."], allowances=allowances).outcome is Outcome.VIOLATED
    assert decide(texts, allowances=allowances, fixing=True).outcome is Outcome.PASS
    assert excuses(texts, allowances) == {f"t{n}": (("max_verbatim_tokens", "rate"),) for n in range(2)}


def waived(day: date, *texts: Judged, more: str = "") -> Verdict:
    return decide(texts, allowances=allowances_of(parse_policy((POLICY + WAIVER + more).encode()), day=day))


def test_a_waiver_counts_through_its_last_day() -> None:
    last = waived(date(2026, 6, 30), text(0, run=9))
    assert last.outcome is Outcome.PASS and (last.waived, last.violated, last.within) == (1, 0, 0)
    assert last.reasons == ("waived until 2026-06-30: 't0' (licensed).",)
    late = waived(date(2026, 7, 1), text(0, run=9))
    assert late.outcome is Outcome.VIOLATED and (late.waived, late.violated) == (0, 1)
    assert "expired on 2026-06-30 and does not count" in late.reasons[-1]


def test_a_waiver_of_one_limit_leaves_only_the_others_in_the_reasons() -> None:
    some = waived(date(2026, 1, 1), text(0, run=9, near=0.9), more='limit = "max_near_verbatim"\n')
    assert some.outcome is Outcome.VIOLATED and some.violated == 1
    assert "max_verbatim_tokens" in some.reasons[0] and "1 text breaks max_near" not in " ".join(some.reasons)
    one = waived(date(2026, 1, 1), text(0, near=0.9), more='limit = "max_near_verbatim"\n')
    assert one.outcome is Outcome.PASS and one.waived == 1


def test_a_waiver_of_a_secret_is_about_emitted_secrets() -> None:
    finding = Finding("secrets_emitted", 0, 1, False)
    judged = ("t0", "c", Judgement(Status.VIOLATED, (finding,)))
    assert waived(date(2026, 1, 1), judged, more='limit = "secret"\n').waived == 1
    assert waived(date(2026, 1, 1), judged, more='limit = "max_verbatim_tokens"\n').waived == 0


def test_every_text_is_counted_once() -> None:
    texts = [text(0, run=9), text(1, run=9), text(2, run=9), text(3), text(4, short=True), text(5, run=9, near=0.9)]
    excused = {("t1", "max_verbatim_tokens"): 9.0, ("t5", "max_verbatim_tokens"): 9.0}
    policy = parse_policy((POLICY + WAIVER).encode())
    verdict = decide(texts, allowances=allowances_of(policy, day=date(2026, 1, 1), known=excused))
    assert (verdict.within, verdict.violated, verdict.inconclusive, verdict.waived, verdict.known) == (1, 2, 1, 1, 1)
    assert "max_near_verbatim" in " ".join(verdict.reasons)
    assert decide(texts[:2], allowances=allowances_of(policy, day=date(2026, 1, 1), known=excused)).exit_code == 0


def test_what_is_known_excuses_no_more_than_it_was() -> None:
    for measured, outcome in ((9.0, Outcome.PASS), (9.1, Outcome.VIOLATED)):
        allowances = Allowances(known={("t0", "max_verbatim_tokens"): 9.0})
        assert decide([text(0, run=measured)], allowances=allowances).outcome is outcome


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("confidence = 0.9\n", "sets confidence without the rate it is about"),
        ("max_violation_rate = 1.0\n", "must be less than 1, not 1.0"),
        ("max_violation_rate = 0.1\nconfidence = 0.2\n", "must be at least 0.5, not 0.2"),
        (WAIVER.replace("2026-06-30", '"2026-06-30"'), "expires in [[waiver]] must be a date (no time, no quotes)"),
        (WAIVER.replace("2026-06-30", "2026-06-30T10:00:00"), "must be a date (no time, no quotes)"),
        (WAIVER.replace("licensed.", "a\\u001b[31mred"), "reason in [[waiver]] is empty or has an unusable value"),
        (WAIVER.replace("licensed.", " "), "reason in [[waiver]] is empty or has an unusable value"),
        (WAIVER + WAIVER, "[[waiver]] names 't0' twice with the same limit"),
        (WAIVER + 'limit = "max_near_verbatin"\n', "did you mean 'max_near_verbatim'?"),
        (WAIVER.replace("expires", "expire"), "unknown key 'expire' in [[waiver]]; did you mean 'expires'?"),
        (WAIVER.replace("[[waiver]]", "[waiver]"), "[[waiver]] must be a list, not a section"),
        (WAIVER.replace('reason = "licensed."\n', ""), "reason in [[waiver]] is missing"),
    ],
)
def test_a_mistake_in_a_rate_or_a_waiver_is_one_sentence_with_its_line(more: str, sentence: str) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_policy((POLICY + more).encode())
    assert sentence in str(refused.value) and str(refused.value).startswith("policy.toml:")
