"""Locality: its limits, judged by one function for the edit, the report and the gate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import WORDS, opened, ordinary_rows, tiny_checkpoint
from test_report import SMALL
from torch import Tensor

from memscrub.errors import NumericalError, PolicyError
from memscrub.jobs.gating import _signed_ordinary
from memscrub.jobs.ordinary_text import retain_halves
from memscrub.jobs.records import benign_record, locality_record
from memscrub.jobs.scanning import open_inputs
from memscrub.locality.distance import compare, split_retain
from memscrub.policy.document import parse_policy
from memscrub.policy.sections import Locality as Limits
from memscrub.proof.signing import Verification
from memscrub.reports.judgement import Finding, Judgement, Status
from memscrub.reports.locality_limits import Benign, Locality, broken_benign, broken_distance, broken_neighbours
from memscrub.reports.report import REPORT_NAME, NeighbourRecord
from memscrub.reports.standing import Ordinary, broken_locality
from memscrub.reports.verdict import Outcome, decide
from memscrub.texts.protected import Document

GOOD = Locality(tokens=1000, kl=0.001, worst_kl=0.02, start_kl=0.001, agreement=0.98, perplexity_ratio=1.001)
LIMITS = Limits(max_worst_kl=0.05, min_neighbours_kept=0.9, neighbours=("n.txt",))
TALK = Benign(32, 2, 2, 0, 1, 1, 0, 0, 0.0, 0.9)
ORDINARY = Ordinary(locality_record(GOOD, LIMITS), NeighbourRecord(3, 100, 95, 0.9), benign_record(TALK, LIMITS))


def test_what_is_within_every_limit_says_nothing() -> None:
    assert broken_distance(GOOD, LIMITS) == [] and broken_locality(ORDINARY) == []
    assert broken_locality(Ordinary(None, None, None)) == []


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("kl", 0.02, "max_kl"),
        ("worst_kl", 0.06, "max_worst_kl"),
        ("perplexity_ratio", 1.02, "max_perplexity_ratio"),
        ("agreement", 0.94, "min_agreement"),
        ("kl", math.nan, "max_kl"),
    ],
)
def test_a_broken_limit_is_named_with_how_far_it_is_missed(name: str, value: float, limit: str) -> None:
    measured = replace(GOOD, **{name: value})
    (sentence,) = broken_distance(measured, LIMITS)
    allowed = getattr(LIMITS, limit)
    assert f"{limit} is broken (allowed {allowed:g}, measured {value:.4g}, missed by " in sentence
    assert broken_locality(replace(ORDINARY, locality=locality_record(measured, LIMITS))) == [sentence]


def test_without_a_limit_the_worst_text_is_only_reported() -> None:
    record = locality_record(replace(GOOD, worst_kl=9.0), Limits())
    assert record.worst_kl == 9.0 and broken_locality(Ordinary(record, None, None)) == []


def test_a_catastrophe_is_refused_whatever_the_policy_allows() -> None:
    lax = Limits(max_kl=100, max_perplexity_ratio=50, min_agreement=0.01)
    assert broken_distance(replace(GOOD, kl=9.0, agreement=0.9, perplexity_ratio=1.1), lax) == []
    ratio, agreement = broken_distance(replace(GOOD, agreement=0.89, perplexity_ratio=1.11), lax)
    assert "perplexity" in ratio and "1.1," in ratio
    assert "agreement" in agreement and "0.9," in agreement


def test_neighbours_that_were_lost_break_their_limit_only_where_one_is_set() -> None:
    lost = replace(ORDINARY, neighbours=NeighbourRecord(3, 100, 89, 0.9))
    (sentence,) = broken_locality(lost)
    assert "min_neighbours_kept" in sentence and "0.89" in sentence
    assert broken_locality(replace(ORDINARY, neighbours=NeighbourRecord(3, 100, 0, None))) == []
    assert broken_neighbours(0, 0, 0.9) == []


def test_benign_prompts_count_only_beyond_the_limit_and_beyond_chance() -> None:
    def broken(before: int, after: int, newly: int) -> list[str]:
        return broken_benign(32, before, after, newly, 0.05, "degenerate")

    assert broken(0, 5, 5)
    assert "degenerate" in broken(0, 5, 5)[0]
    assert not broken(0, 4, 4)  # 1 in 16 by chance
    assert not broken(8, 10, 8)  # six were lost, eight gained
    assert broken_benign(1000, 0, 40, 40, 0.05, "x") == []  # certain, and within the limit
    assert broken_benign(0, 0, 0, 0, 0.05, "x") == []


def test_ends_and_loops_are_judged_each_by_itself() -> None:
    talk = replace(TALK, ended_before=0, ended_after=32, newly_ended=32)
    (sentence,) = broken_locality(replace(ORDINARY, benign=benign_record(talk, LIMITS)))
    assert "end early" in sentence and "max_degenerate" in sentence


def test_another_policys_limits_replace_the_stated_ones() -> None:
    strict = Limits(max_kl=1e-6, max_worst_kl=1e-6, min_neighbours_kept=1.0, neighbours=("n.txt",))
    assert len(broken_locality(ORDINARY.under(strict))) == 3
    assert broken_locality(ORDINARY.under(Limits())) == []
    assert Ordinary(None, None, None).under(strict) == Ordinary(None, None, None)


def test_a_fix_without_room_is_unreachable_and_says_which_limit_stopped_it() -> None:
    verdict = decide([], ["locality: max_kl is broken."], fixing=True)
    assert (verdict.outcome, verdict.exit_code) == (Outcome.UNREACHABLE, 4)
    assert verdict.reasons == ("no room: locality: max_kl is broken.",)
    gated = decide([], ["locality: max_kl is broken."])
    assert (gated.outcome, gated.reasons) == (Outcome.VIOLATED, ("locality: max_kl is broken.",))
    # A limit that stopped the edit does not matter once all texts hold.
    assert decide([], fixing=True, no_room=["locality: max_kl is broken."]).outcome is Outcome.PASS


def test_where_texts_are_left_over_the_limit_that_stopped_the_edit_is_named_once() -> None:
    left = ("t", "c", Judgement(Status.VIOLATED, (Finding("max_verbatim_tokens", 4, 9, False),)))
    stopped = "locality: max_kl is broken."
    verdict = decide([left], fixing=True, no_room=[stopped])
    assert verdict.exit_code == 4 and verdict.reasons[0] == f"no room: {stopped}"
    again = decide([left], [stopped], fixing=True, no_room=[stopped])
    assert again.reasons.count(f"no room: {stopped}") == 1


def test_the_gate_holds_the_signed_figures_against_its_own_policy(tmp_path: Path) -> None:
    verification = Verification("0", "key", {**SMALL.input.files, REPORT_NAME: "0"}, (), None)
    signed = replace(SMALL, locality=ORDINARY.locality, neighbours=ORDINARY.neighbours, benign=ORDINARY.benign)
    (tmp_path / REPORT_NAME).write_text(signed.to_json())
    stated, remarks = _signed_ordinary(tmp_path, signed, verification, LIMITS)
    assert stated == ORDINARY and remarks == []
    strict, _ = _signed_ordinary(tmp_path, signed, verification, Limits(max_worst_kl=0.01))
    assert "max_worst_kl" in broken_locality(strict)[0]
    nothing, remarks = _signed_ordinary(tmp_path, None, None, LIMITS)
    assert nothing == Ordinary(None, None, None) and "not believed" in remarks[0]
    carded = Verification("0", "key", {**verification.files, "README.md": "2" * 64}, (), None)
    assert _signed_ordinary(tmp_path, signed, carded, LIMITS) == (ORDINARY, [])
    others = Verification("0", "key", {"config.json": "1" * 64, REPORT_NAME: "0"}, (), None)
    nothing, remarks = _signed_ordinary(tmp_path, signed, others, LIMITS)
    assert nothing == Ordinary(None, None, None) and "about other files" in remarks[0]
    silent = replace(signed, neighbours=None, benign=None)
    _, remarks = _signed_ordinary(tmp_path, silent, verification, LIMITS)
    assert [word for word in ("neighbours", "benign") if not any(word in remark for remark in remarks)] == []


@pytest.mark.parametrize("whole", [False, True], ids=["paragraphs", "one document"])
def test_what_judges_is_no_statistics_of_the_solver_either(tmp_path: Path, whole: bool) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=1))
    rows = [" ".join(WORDS[token] for token in row) for row in ordinary_rows(7, 24, 60).tolist()]
    other = Document(" ".join(rows[:12]), "other.txt", 1)
    texts = [" ".join(rows)] if whole else rows
    retain = [Document(text, "retain.txt", line) for line, text in enumerate(texts)]
    halves = split_retain(loaded, retain, [*retain, other], (), max_tokens=10_000)

    def pieces(half: Tensor) -> set[tuple[int, ...]]:
        return {tuple(row[i : i + 20]) for row in half.tolist() for i in range(len(row) - 19)}

    assert len(halves.judge) and len(halves.statistics)
    assert not pieces(halves.judge) & pieces(torch.cat([halves.solver, halves.statistics]))


def test_ordinary_text_of_one_token_is_too_short_to_judge_by(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "base", "llama", seed=1)
    (tmp_path / "p.txt").write_text(" ".join(WORDS[:20]))
    (tmp_path / "retain.txt").write_text(f"{WORDS[5]}\n\n{WORDS[6]}\n")
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'schema = 1\nname = "n"\n[protected]\nfiles = ["p.txt"]\n[class.c]\nmax_verbatim_tokens = 4\n'
        '[locality]\nretain = ["retain.txt"]\n'
    )
    with pytest.raises(PolicyError, match="retain text is too short"):
        retain_halves(open_inputs(tmp_path / "base", policy, device="cpu"))


def test_a_start_of_texts_that_is_no_number_is_not_taken_for_no_distance(tmp_path: Path) -> None:
    loaded = opened(tiny_checkpoint(tmp_path, "llama", seed=1))
    (begin,) = loaded.prompt  # stands at the beginning of texts only, never in the running stream
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[begin] = math.nan
    with pytest.raises(NumericalError, match="not finite on retain text"):
        compare(loaded, {}, ordinary_rows(7, 2, 20))


def test_a_limit_on_neighbours_needs_neighbours() -> None:
    text = 'schema = 1\nname = "n"\n[protected]\nfiles = ["p"]\n[class.a]\nsecret = true\n[locality]\n'
    with pytest.raises(PolicyError, match=r"names no neighbours; add neighbours = "):
        parse_policy(f"{text}min_neighbours_kept = 0.9\n".encode())
    policy = parse_policy(f'{text}min_neighbours_kept = 0.9\nneighbours = ["n.txt"]\n'.encode())
    assert policy.locality.min_neighbours_kept == 0.9
    locality = parse_policy(text.encode()).locality
    assert (locality.max_worst_kl, locality.min_neighbours_kept, locality.max_degenerate) == (None, None, 0.05)


def test_the_sign_test_of_many_prompts_is_quick_and_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(newly: int, after: int) -> bool:
        return bool(broken_benign(10_000, 0, after, newly, 0.0, "degenerate"))

    exact = [broken(newly, 2 * newly - 900) for newly in range(450, 500)]
    monkeypatch.setattr("memscrub.reports.locality_limits._MANY", 100)
    assert [broken(newly, 2 * newly - 900) for newly in range(450, 500)] == exact
    assert 0 < sum(exact) < 50
    assert broken_benign(10**9, 0, 10**9, 10**9, 0.5, "degenerate")  # as a report from elsewhere may state
    assert broken_benign(10, 0, 9, 3, 0.5, "degenerate")  # more faults than were gained: counts that cannot be
