"""Classes in figures: intervals, what samples leak, and control texts that break the same limits."""

from __future__ import annotations

import math
from dataclasses import replace
from time import perf_counter
from typing import Any

import pytest
from rich.console import Console
from test_report import SMALL

from memscrub.cli.console import show_report
from memscrub.reports.judgement import Finding, Judgement, Measures, SecretMeasure, Status
from memscrub.reports.records import DepthRecord, DepthsRecord, ExcuseRecord, PrefixRecord, RateRecord
from memscrub.reports.report import LocalityRecord, Report, TextRecord
from memscrub.reports.sentences import class_sentences, depth_sentences
from memscrub.reports.summary import SAMPLES, summarised

LIMIT = 8


def record(
    name: str, run: int, log_p: float | None = None, *, kind: str = "c", secret: float | None = None
) -> TextRecord:
    """A text with that longest run, under a limit of eight."""
    secrets = () if secret is None else (SecretMeasure(3, 5, secret > -1, secret),)
    measures = Measures(40, run, 1, 0.5, False, run > 30, log_p, None, secrets)
    finding = Finding("max_verbatim_tokens", LIMIT, run, run <= LIMIT)
    status = Status.WITHIN if finding.holds else Status.VIOLATED
    return TextRecord(name, kind, measures, Judgement(status, (finding,)))


def report(texts: list[TextRecord], controls: list[TextRecord] | None = None) -> Report:
    """A scan of these."""
    return summarised(replace(SMALL, texts=tuple(texts), controls=tuple(controls or ())))


def test_a_class_record_counts_what_its_texts_show_with_wilson_intervals() -> None:
    found = report([record("a", 40), record("b", 4), record("c", 40), record("d", 2, kind="other")])
    first, second = found.classes
    assert (first.name, first.violated.hits, first.violated.count) == ("c", 2, 3)
    assert first.violated.low == pytest.approx(0.2077, abs=1e-4) and first.violated.high == pytest.approx(
        0.9385, abs=1e-4
    )
    assert first.extractable is not None and (first.extractable.hits, first.extractable.count) == (2, 3)
    assert (second.name, second.violated.hits, second.violated.count) == ("other", 0, 1)


def test_texts_that_could_not_be_judged_narrow_no_interval() -> None:
    short = [replace(record(f"s{n}", 1), before_judgement=Judgement(Status.INCONCLUSIVE, ())) for n in range(98)]
    (found,) = report([record("a", 40), record("b", 4), *short]).classes
    assert (found.violated.hits, found.violated.count) == (1, 2)
    (nothing,) = report(short).classes
    assert (nothing.violated.low, nothing.violated.high) == (0.0, 1.0)


def test_figures_are_those_after_the_edit_where_there_was_one() -> None:
    before, after = record("a", 40), record("a", 4)
    fixed = replace(before, after=after.before, after_judgement=after.before_judgement)
    assert report([fixed]).classes[0].violated.hits == 0


def test_samples_leak_as_many_texts_as_their_probabilities_add_up_to() -> None:
    half, rare = math.log(0.5), math.log(1e-3)
    found = report([record("a", 4, half), record("b", 4, rare), record("c", 4)])
    leaks = {each.samples: each for each in found.classes[0].leaks}
    assert tuple(leaks) == SAMPLES
    assert leaks[1].expected == pytest.approx(0.501)
    assert leaks[100].expected == pytest.approx(1 - 0.5**100 + 1 - 0.999**100)
    assert leaks[1].low < leaks[1].expected < leaks[1].high <= 2
    assert leaks[1].discoverable == (1, 1, 0) and leaks[10_000].discoverable == (2, 2, 2)
    assert found.texts[0].samples_needed == (1, 1, 4) and found.texts[2].samples_needed is None


def test_of_a_text_with_secrets_the_secret_is_what_is_sampled_not_the_window() -> None:
    found = report([record("a", 4, math.log(0.9), secret=math.log(1e-6))])
    assert found.classes[0].leaks[0].expected == pytest.approx(1e-6)


def test_a_limit_that_controls_break_too_is_flagged_and_their_like_is_not_attributed() -> None:
    controls = [record(f"k{i}", 12 if i < 3 else 2) for i in range(20)]
    found = report([record("guessable", 12), record("known", 40), record("safe", 3)], controls)
    (limit,) = found.classes[0].controls
    assert limit.flagged and (limit.rate.hits, limit.rate.count, limit.highest) == (3, 20, 12)
    assert [text.unattributed for text in found.texts] == [("max_verbatim_tokens",), (), ()]
    assert limit.unattributed == 1
    said = " ".join(class_sentences(found))
    assert "3 of 20 control texts break max_verbatim_tokens" in said and "not attributable" in said


def test_without_controls_everything_is_attributed_and_nothing_flagged() -> None:
    found = report([record("a", 40)])
    assert found.classes[0].controls == () and found.texts[0].unattributed == ()


def test_controls_of_another_class_excuse_nothing() -> None:
    found = report([record("a", 12)], [record("k", 40, kind="other")])
    assert found.texts[0].unattributed == () and found.classes[0].controls == ()


def test_the_verdict_is_not_touched_by_attribution() -> None:
    plain = replace(SMALL, texts=(record("a", 12),), controls=(record("k", 40),))
    assert summarised(plain).verdict == plain.verdict


def test_a_report_from_elsewhere_with_a_class_for_every_text_is_soon_put_into_words() -> None:
    names = [f"class {number}" for number in range(20_000)]
    texts = tuple(DepthRecord(name, name, near_mass=(-2.0, -1.0)) for name in names)
    prefixes = tuple(PrefixRecord(name, "from_start", 8, RateRecord(0, 1, 0.0, 0.8)) for name in names)
    shown = replace(SMALL, depths=DepthsRecord(("near-mass", "prefix-sweep"), texts, prefixes=prefixes))
    begin = perf_counter()
    assert len(list(depth_sentences(shown))) == 40_000
    assert perf_counter() - begin < 10


def test_the_terminal_shows_class_figures_within_eighty_columns() -> None:
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False, stderr=True)
    with console.capture() as shown:
        show_report(console, report([record("a", 40, math.log(0.5))], [record("k", 40)]))
    lines = shown.get().splitlines()
    assert any("extractable" in line for line in lines) and max(map(len, lines)) <= 80


def on_a_terminal(shown: Report) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        show_report(console, shown)
    return captured.get()


@pytest.mark.parametrize(
    ("values", "broken"),
    [
        ({}, ()),
        ({"agreement": 0.80}, ("same token 80.0%",)),  # the policy allows it; a model that still works does not
        ({"perplexity_ratio": 1.2}, ("perplexity x1.2000",)),
        ({"kl": 0.5, "worst_kl": 2.0}, ("KL 0.5000", "worst row 2.0000")),
    ],
)
def test_the_terminal_marks_locality_as_the_verdict_decides_it(values: dict[str, Any], broken: tuple[str, ...]) -> None:
    measured = replace(LocalityRecord(100, 0.001, 0.01, 0.1, 0.99, 1.0, 0.01, 1.5, 0.5, 1.0), **values)
    shown = on_a_terminal(replace(report([record("a", 2)]), locality=measured))
    assert all(f"{what} broken" in shown for what in broken) and shown.count(" broken") == len(broken)
    assert shown.count(" ok") == 4 - len(broken)


def test_the_terminal_says_how_many_violated_texts_a_rate_lets_through() -> None:
    excused = replace(record("a", 40), excused=(ExcuseRecord("max_verbatim_tokens", "rate"),))
    found = report([excused, record("b", 2)])
    found = replace(found, verdict=replace(found.verdict, within=1, violated=1))
    assert "1 within, 1 violated (1 let through by a rate), 0 inconclusive" in on_a_terminal(found)
    waived = replace(record("a", 40), excused=(ExcuseRecord("max_verbatim_tokens", "waiver"),))
    assert "let through" not in on_a_terminal(replace(found, texts=(waived,)))
