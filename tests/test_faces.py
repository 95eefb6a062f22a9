"""The faces of a report: each is valid in its format, agrees with the verdict, and obeys no hostile name."""

from __future__ import annotations

import gzip
import io
import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import command_line
import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft4Validator
from junitparser import Error, Failure, JUnitXml, Skipped
from markdown_it import MarkdownIt
from test_report import REPORTS, SMALL

from memscrub.errors import OutputError, UsageError
from memscrub.faces import junit, sarif
from memscrub.faces.escaping import command_data, command_property, markdown, printable
from memscrub.faces.findings import LOCALITY_LIMITS, RULES, Level, entries
from memscrub.faces.html_report import render as page_of
from memscrub.faces.html_rows import standing
from memscrub.faces.markdown import render
from memscrub.faces.model_card import BEGIN, END, refuse_signed, updated
from memscrub.faces.places import place_of
from memscrub.faces.step_summary import commands, summary
from memscrub.policy.sections import ClassLimits
from memscrub.reports.judgement import Finding, Judgement, Measures, SecretMeasure, Status, judge
from memscrub.reports.locality_limits import broken_benign, broken_distance, broken_neighbours, limit_of
from memscrub.reports.records import ExcuseRecord
from memscrub.reports.report import BenignRecord, LocalityRecord, PolicyRecord, Report, TextRecord, load_report
from memscrub.reports.standing import judged
from memscrub.reports.verdict import Outcome, Verdict, decide

FIXTURES = Path(__file__).parent / "fixtures" / "reports" / "0.1.0"
SARIF = Draft4Validator(json.loads((Path(__file__).parent / "schemas" / "sarif-2.1.0.json").read_text("utf-8")))
GOOD = LocalityRecord(100, 0.001, 0.01, 0.1, 0.99, 1.0, 0.01, 1.01, 0.95)
HOSTILE = (
    "plain",
    "<script>alert(1)</script>",
    'a"b&c]]>',
    "\x1b[31mred\x1b[0m\x07",
    "two\nlines\r\n::error::x",
    "|cell|",
    "[link](https://example.org) ![i](x)",
    "`code` **bold** _under_ ~~gone~~ $x$",
    "\u202ereversed\u200b",
    "\ud800half",
    "\ufffe\uffff\x85\x9b31m",
    "100% {0} %0A",
    "&lt;b&gt; &amp; &#42;",
    "x" * 200,
)


def text(
    id: str,
    status: Status = Status.VIOLATED,
    limit: str = "max_verbatim_tokens",
    measured: float = 9,
    *,
    kind: str = "c",
    allowed: float = 5,
    excused: Sequence[str] = (),
    line: int = 7,
) -> TextRecord:
    found = () if status is Status.INCONCLUSIVE else (Finding(limit, allowed, measured, status is Status.WITHIN),)
    return TextRecord(
        id,
        kind,
        Measures(12, 9, 2, 0.5, window_log_probability=-3.0),
        Judgement(status, found),
        file="lists/texts.jsonl",
        line=line,
        excused=tuple(ExcuseRecord(limit, by) for by in excused),
    )


def report(*texts: TextRecord, outcome: Outcome = Outcome.VIOLATED, **values: Any) -> Report:
    code = {Outcome.PASS: 0, Outcome.VIOLATED: 1, Outcome.UNREACHABLE: 4, Outcome.INCONCLUSIVE: 3}[outcome]
    known = {
        "policy": PolicyRecord("gate", "0" * 64, "policies/gate.toml"),
        "locality": None,
        "verdict": Verdict(outcome, code, ("a reason.",), 1, len(texts), 0),
    }
    return printable(replace(SMALL, texts=texts, **{**known, **values}))


MIXED = report(
    text("worst", measured=40),
    text("bad", measured=6),
    text("fine", Status.WITHIN, measured=1),
    text("short", Status.INCONCLUSIVE),
    text("waived", excused=["waiver"]),
    text("leaky", limit="secrets_emitted", measured=1, allowed=0, kind="pii"),
)


# -- what is held against a checkpoint --------------------------------------------------------------------------
def test_entries_come_by_level_then_the_worst_first() -> None:
    found = [(entry.level.value, entry.text) for entry in entries(MIXED)]
    assert found == [
        ("error", "leaky"),
        ("error", "worst"),
        ("error", "bad"),
        ("warning", "waived"),
        ("note", "short"),
    ]


@settings(max_examples=60, deadline=None)
@given(report=REPORTS)
def test_there_is_an_error_exactly_when_the_verdict_is_no_pass(report: Report) -> None:
    found = any(entry.level is Level.ERROR for entry in entries(printable(report)))
    assert found == (report.verdict.outcome is not Outcome.PASS)


def test_every_limit_of_a_text_has_a_rule_of_its_own() -> None:
    given_away = Measures(9, 9, 1, 1.0, near_verbatim=1.0, window_log_probability=-0.1)
    limits = ClassLimits(max_verbatim_tokens=1, max_near_verbatim=0.1, max_sampling_probability=0.001)
    secret = replace(given_away, secrets=(SecretMeasure(1, 2, True, -0.1),))
    secrets = ClassLimits(secret=True, max_sampling_probability=0.001)
    names = {
        f.limit for measures, of in ((given_away, limits), (secret, secrets)) for f in judge(measures, of).findings
    }
    assert len(names) == 4 and names <= set(RULES)


def test_every_sentence_about_locality_belongs_to_the_rule_of_its_limit() -> None:
    bad = LocalityRecord(100, 9.0, 9.0, 9.0, 0.5, 9.0, 0.01, 1.01, 0.95, max_worst_kl=0.1)
    lenient = replace(bad, max_kl=99.0, max_worst_kl=None, max_perplexity_ratio=99.0, min_agreement=0.0)
    said = [*broken_distance(bad, bad), *broken_neighbours(10, 1, 0.9), *broken_benign(99, 0, 50, 50, 0.1, "x")]
    assert [limit_of(sentence) for sentence in said] == list(LOCALITY_LIMITS)
    assert [limit_of(sentence) for sentence in broken_distance(lenient, lenient)] == [
        "max_perplexity_ratio",
        "min_agreement",
    ]


def test_a_limit_from_a_later_version_is_still_an_error() -> None:
    (entry,) = entries(report(text("t", limit="max_future")))
    assert entry.rule.id == "memscrub/other" and entry.level is Level.ERROR and "max_future" in entry.sentence


# -- strings ----------------------------------------------------------------------------------------------------
@given(st.text())
def test_printable_text_has_no_character_that_a_terminal_obeys(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and printable(shown) == shown
    shown.encode("utf-8")


def test_a_report_of_printable_strings_is_itself() -> None:
    assert printable(MIXED) is MIXED
    assert printable(text("\x1b[2J")).id == "\\x1b[2J"
    assert printable(Status.WITHIN) is Status.WITHIN


def shown_by_markdown(source: str) -> str:
    """The characters that a reader sees; fails on markup, HTML or a link."""
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(f"A {source} Z")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    children = tokens[1].children or []
    # An empty comment stands behind each @, so that GitHub finds neither people nor addresses.
    assert all(child.content == "<!-- -->" for child in children if child.type == "html_inline")
    assert {child.type for child in children} <= {"text", "text_special", "html_inline"}
    return "".join(child.content for child in children if child.type != "html_inline")


@pytest.mark.parametrize("name", ["# PASS", "- x", "+ x", "1. y", "12) y", "    code", "===", "---", "WWW.x y@z.org"])
def test_a_name_that_begins_a_line_of_markdown_is_no_markup_either(name: str) -> None:
    parsed = MarkdownIt("commonmark", {"html": True}).parse(f"- {markdown(name)}\n")
    (inline,) = [token for token in parsed if token.type == "inline"]
    assert [token.type for token in parsed if token.nesting == 1] == [
        "bullet_list_open",
        "list_item_open",
        "paragraph_open",
    ]
    assert "".join(child.content for child in inline.children or [] if child.type != "html_inline") == name


def test_nobody_is_mentioned_in_markdown() -> None:
    assert "@org" not in markdown("ask @org/team") and "@b.example" not in markdown("a@b.example")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_in_markdown_as_the_characters_it_has(name: str) -> None:
    assert shown_by_markdown(markdown(printable(name))) == f"A {printable(name)} Z"


@given(st.text(st.characters(exclude_categories=["C", "Z"])))
def test_any_printable_text_is_shown_in_markdown_as_it_is(name: str) -> None:
    assert shown_by_markdown(markdown(printable(name))) == f"A {printable(name)} Z"


def test_workflow_commands_escape_what_ends_a_message_or_a_property() -> None:
    assert command_data("50% a\r\nb: c, d") == "50%25 a%0D%0Ab: c, d"
    assert command_property("50% a\nb: c, d") == "50%25 a%0Ab%3A c%2C d"


# -- JUnit ------------------------------------------------------------------------------------------------------
def results(data: bytes) -> dict[str, Any]:
    """Each case's result by name, as junitparser reads the file back."""
    return {case.name: (case.result or [None])[0] for suite in JUnitXml.fromstring(data) for case in suite}


def test_junit_has_a_case_per_text_that_fails_where_the_verdict_does() -> None:
    data = junit.render(MIXED)
    found = results(data)
    assert {name for name, result in found.items() if isinstance(result, Failure)} == {"worst", "bad", "leaky"}
    assert {name for name, result in found.items() if isinstance(result, Skipped)} == {"short", "waived"}
    assert found["fine"] is None and found["worst"].type == "memscrub/max_verbatim_tokens"
    assert "waived by the policy" in found["waived"].message and "too short" in found["short"].message
    whole = JUnitXml.fromstring(data)
    assert (whole.tests, whole.failures, whole.skipped, whole.errors) == (6, 3, 2, 0)
    suites = {suite.name: suite for suite in whole}
    assert set(suites) == {"c", "pii"}
    assert all(case.classname == name for name, suite in suites.items() for case in suite)
    properties = {each.name: each.value for each in suites["c"].properties()}
    assert properties["verdict"] == "violated" and properties["policy_sha256"] == "0" * 64
    case = ElementTree.fromstring(data).find(".//testcase[@name='bad']")
    assert case is not None and (case.get("file"), case.get("line")) == ("policies/lists/texts.jsonl", "7")


def test_junit_judges_ordinary_text_limit_by_limit() -> None:
    broken = replace(GOOD, kl=0.5, max_worst_kl=1.0)
    benign = BenignRecord(20, 0, 0, 0, 0, 0, 0, 0, 0.0, 1.0, 0.1)
    found = results(junit.render(report(text("t", Status.WITHIN), locality=broken, benign=benign)))
    assert isinstance(found["locality.max_kl"], Failure) and "missed by" in found["locality.max_kl"].message
    fine = {
        "locality.max_worst_kl",
        "locality.max_perplexity_ratio",
        "locality.min_agreement",
        "locality.max_degenerate",
    }
    assert fine == {name for name in found if name.startswith("locality.") and found[name] is None}


def test_a_verdict_that_no_text_stands_for_is_a_failure_too() -> None:
    found = results(junit.render(report(text("t", Status.WITHIN))))
    assert isinstance(found["verdict"], Failure) and found["verdict"].message == "a reason."


def test_junit_of_a_pass_has_no_failure_whatever_is_excused() -> None:
    passed = report(text("a", excused=["rate"]), text("b"), locality=GOOD, outcome=Outcome.PASS)
    whole = JUnitXml.fromstring(junit.render(passed))
    assert (whole.failures, whole.errors, whole.skipped) == (0, 0, 2)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_gives_valid_xml(name: str) -> None:
    root = ElementTree.fromstring(junit.render(report(text(name, kind=name))))
    cases = root.findall(".//testcase")
    assert [case.get("name") for case in cases] == [printable(name)]
    assert [suite.get("name") for suite in root] == [printable(name)]


@settings(max_examples=40, deadline=None)
@given(report=REPORTS)
def test_any_report_gives_files_that_their_readers_accept(report: Report) -> None:
    shown = printable(report)
    whole = JUnitXml.fromstring(junit.render(shown))
    assert (whole.failures == 0) == (report.verdict.outcome is Outcome.PASS)
    SARIF.validate(json.loads(sarif.render(shown)))
    assert len(summary(shown).encode("utf-8")) <= 1 << 20
    assert all(line.startswith("::") and "\n" not in line for line in commands(shown))
    render(shown).encode("utf-8")


def test_a_tool_error_is_an_error_and_no_failure() -> None:
    (suite,) = JUnitXml.fromstring(junit.render_error("policy.toml:3: no such class."))
    ((result,),) = [case.result for case in suite]
    assert isinstance(result, Error) and result.message == "policy.toml:3: no such class."
    raw = json.loads(sarif.render_error("policy.toml:3: no such [class]."))
    SARIF.validate(raw)
    (invocation,) = raw["runs"][0]["invocations"]
    assert invocation["executionSuccessful"] is False and raw["runs"][0]["results"] == []
    assert "no such \\[class\\]" in invocation["toolExecutionNotifications"][0]["message"]["text"]


# -- nothing judged, and what a rate lets through -----------------------------------------------------------------
def test_a_list_of_which_nothing_could_be_judged_is_no_pass_in_any_face() -> None:
    short = [text(name, Status.INCONCLUSIVE) for name in ("a", "b")]
    shown = replace(report(*short, outcome=Outcome.INCONCLUSIVE), verdict=decide(judged(short)))
    (error, *notes) = entries(shown)
    assert (error.level, error.rule.id) == (Level.ERROR, "memscrub/verdict") and len(notes) == 2
    assert "list longer texts" in error.sentence and "'a'" in error.sentence
    assert "NOTHING JUDGED" in render(shown) and "NOTHING JUDGED" in summary(shown)
    assert isinstance(results(junit.render(shown))["verdict"], Failure)
    assert run_of(shown)["invocations"][0]["exitCode"] == 3
    assert any(line.startswith("::error ") and "list longer texts" in line for line in commands(shown))
    page = page_of(shown)
    assert ">Nothing judged" in page.replace("\n", "").replace("    ", "") and "Within the policy" not in page
    assert "2 of 2 protected texts could not be judged." in page


def test_a_text_is_not_only_called_short_where_a_secret_could_not_be_judged() -> None:
    short = text("a", Status.INCONCLUSIVE)
    unjudged = replace(short, before=replace(short.before, unjudged_secrets=1))
    said = [entries(report(each, outcome=Outcome.PASS))[0].sentence for each in (short, unjudged)]
    assert said[0] == "'a' is too short to judge (12 tokens)."
    assert said[1].startswith(said[0][:-1]) and "nothing stands before a secret" in said[1]


def test_a_stored_report_keeps_the_outcome_that_it_states(tmp_path: Path) -> None:
    """Releases before let a list pass of which nothing could be judged."""
    passed = report(text("a", Status.INCONCLUSIVE), outcome=Outcome.PASS)
    found = load_report(stored(tmp_path, passed))
    assert found.verdict == passed.verdict and found.verdict.outcome is Outcome.PASS
    assert "PASS" in render(found) and all(entry.level is Level.NOTE for entry in entries(found))


def test_the_faces_say_how_many_violated_texts_a_rate_lets_through() -> None:
    texts = [text("a", excused=["rate"]), text("b", excused=["rate"]), text("w", excused=["waiver"])]
    shown = report(*texts, outcome=Outcome.PASS, verdict=Verdict(Outcome.PASS, 0, (), 0, 2, 0, 1))
    written = render(shown)
    assert "2 violated (2 let through by a rate), 0 inconclusive, 1 waived" in written
    rows = [line for line in written.splitlines() if "breaks max" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| let through", "| let through", "| excused"]
    page = page_of(shown)
    assert "2 of 3 protected texts break a limit of the policy, 2 of them let through by a rate." in page
    assert "<b>2</b> break a limit, 2 of them let through by a rate; 1 more excused" in page
    assert [standing(each) for each in texts] == ["violated", "violated", "excused"]


# -- SARIF ------------------------------------------------------------------------------------------------------
def run_of(shown: Report, **options: Any) -> dict[str, Any]:
    raw = json.loads(sarif.render(shown, **options))
    SARIF.validate(raw)
    (run,) = raw["runs"]
    return run  # type: ignore[no-any-return]


def test_rule_ids_are_a_promise() -> None:
    assert [rule.id for rule in RULES.values()] == [
        "memscrub/max_verbatim_tokens",
        "memscrub/max_near_verbatim",
        "memscrub/max_sampling_probability",
        "memscrub/secrets_emitted",
        "memscrub/locality.max_kl",
        "memscrub/locality.max_worst_kl",
        "memscrub/locality.max_perplexity_ratio",
        "memscrub/locality.min_agreement",
        "memscrub/locality.min_neighbours_kept",
        "memscrub/locality.max_degenerate",
        "memscrub/verdict",
        "memscrub/other",
        "memscrub/inconclusive",
    ]
    for rule in run_of(MIXED)["tool"]["driver"]["rules"]:
        assert len(rule["name"]) <= 255 and len(rule["fullDescription"]["text"]) <= 1024
        assert len(rule["properties"]["tags"]) <= 10


def test_sarif_points_at_the_line_of_the_list_worst_first() -> None:
    run = run_of(MIXED)
    assert [result["level"] for result in run["results"]] == ["error"] * 3 + ["warning", "note"]
    first = run["results"][1]["locations"][0]["physicalLocation"]
    assert first["artifactLocation"]["uri"] == "policies/lists/texts.jsonl" and first["region"]["startLine"] == 7
    rules = run["tool"]["driver"]["rules"]
    assert all(rules[result["ruleIndex"]]["id"] == result["ruleId"] for result in run["results"])
    assert [result["suppressions"][0]["kind"] for result in run["results"] if "suppressions" in result] == ["external"]


def test_a_fingerprint_is_that_of_rule_class_and_text_alone() -> None:
    def mark(of: TextRecord) -> dict[str, str]:
        (result,) = run_of(report(of))["results"]
        return result["partialFingerprints"]  # type: ignore[no-any-return]

    known = mark(text("t"))
    assert mark(text("t", measured=33, allowed=2, line=90)) == known
    others = [mark(text("u")), mark(text("t", kind="d")), mark(text("t", limit="max_near_verbatim"))]
    assert len({json.dumps(each) for each in [known, *others]}) == 4
    # Alerts that are known to GitHub must stay known: this value never changes.
    assert known["primaryLocationLineHash"] == "55c89ad10b4227d1:1"


def test_sarif_stays_within_the_limits_of_code_scanning_and_says_so() -> None:
    many = report(*(text(f"t{number}", measured=number) for number in range(6, 400)))
    cut = run_of(many, max_results=50)
    assert len(cut["results"]) == 50 and "'t399'" in cut["results"][0]["message"]["text"]
    (note,) = cut["invocations"][0]["toolExecutionNotifications"]
    assert note["message"]["text"].startswith("344 more results")
    data = sarif.render(many, max_gzipped=5_000)
    assert len(gzip.compress(data, mtime=0)) <= 5_000
    assert 0 < len(json.loads(data)["runs"][0]["results"]) < 394
    assert "toolExecutionNotifications" not in run_of(many)["invocations"][0]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_no_link_and_no_placeholder_in_sarif(name: str) -> None:
    (result,) = run_of(report(text(name)))["results"]
    message = result["message"]["text"]
    plain = message.replace("\\[", "[").replace("\\]", "]").replace("{{", "{").replace("}}", "}").replace("\\\\", "\\")
    assert plain.startswith(f"'{printable(name)}' breaks max_verbatim_tokens") and len(message) <= 2048
    assert "[link]" not in message and "{0}" not in message.replace("{{0}}", "")


def test_lists_are_looked_for_from_the_policy_that_is_named_else_from_the_one_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (entry,) = entries(MIXED_ONE)
    assert place_of(entry, MIXED_ONE).path == "policies/lists/texts.jsonl"
    assert place_of(entry, MIXED_ONE, tmp_path / "elsewhere" / "p.toml").path == "elsewhere/lists/texts.jsonl"
    assert place_of(entry, MIXED_ONE, Path("/outside/p.toml")).path == "/outside/lists/texts.jsonl"
    nowhere = replace(entry, file=None, line=None)
    assert place_of(nowhere, MIXED_ONE).path == "policies/gate.toml"
    old = replace(MIXED_ONE, policy=PolicyRecord("gate", "0" * 64))
    assert place_of(nowhere, old).path == place_of(entry, old).path == "memscrub-report.json"
    (result,) = run_of(MIXED_ONE, policy=Path("/a b/p.toml"))["results"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert uri == "file:///a%20b/lists/texts.jsonl"


MIXED_ONE = report(text("one"))


# -- GitHub Actions ---------------------------------------------------------------------------------------------
def test_annotations_are_at_most_ten_of_a_kind_the_worst_first() -> None:
    lines = commands(report(*(text(f"t{number}", measured=number) for number in range(6, 40))))
    assert len(lines) == 10 and lines[-1] == (
        "::error title=memscrub::25 more of this kind; the step's summary and the report list them."
    )
    assert lines[0] == (
        "::error file=policies/lists/texts.jsonl,line=7,title=Protected text comes out word for word"
        "::'t39' breaks max_verbatim_tokens: allowed 5, measured 39."
    )
    kinds = [line.split()[0] for line in commands(MIXED)]
    assert kinds == ["::error"] * 3 + ["::warning", "::notice"]


def test_the_summary_leaves_out_the_least_severe_rows_to_stay_within_its_room() -> None:
    many = report(*(text(f"t{number:03}", measured=number) for number in range(6, 400)))
    whole, cut = summary(many), summary(many, room=6_000)
    assert "rows are left out" not in whole and "'t006'" in whole
    assert len(cut.encode("utf-8")) <= 6_000 and "'t399'" in cut and "'t006'" not in cut
    left = int(cut.split(" more rows are left out")[0].rsplit("\n", 1)[-1])
    assert left + cut.count("| broken |") == 394
    assert summary(many, room=100) == ""


def test_a_summary_of_ten_thousand_texts_is_within_one_mebibyte() -> None:
    record = text("x" * 200)
    huge = replace(MIXED, texts=(record,) * 10_000, classes=())
    assert 1_000_000 < len(summary(huge).encode("utf-8")) <= 1 << 20


# -- model card -------------------------------------------------------------------------------------------------
CARD = "---\nlicense: mit   # ours\ntags: [a]\n---\n\n# Model\n\nWords.\n"


def test_a_section_is_added_once_and_replaced_later(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    card = updated(CARD, MIXED, path)
    assert card.startswith(CARD) and card.count(BEGIN) == card.count(END) == 1
    assert updated(card, MIXED, path) == card
    after = card + "\nMore words.\n"
    other = updated(after, report(text("other"), outcome=Outcome.PASS), path)
    assert other.startswith(CARD) and other.endswith(END + "\n\nMore words.\n") and other != after
    assert "PASS" in other and updated(other, MIXED, path) == after
    path.write_text(card, encoding="utf-8")
    assert ModelCard.load(path).data.to_dict() == {"license": "mit", "tags": ["a"]}


def test_a_card_that_does_not_exist_is_one_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(updated("", MIXED, path), encoding="utf-8")
    assert ModelCard.load(path).data.tags == ["memscrub"]


def test_line_ends_and_a_card_without_metadata_stay_as_they_are() -> None:
    windows = CARD.replace("\n", "\r\n")
    card = updated(windows, MIXED, Path("README.md"))
    assert card.startswith(windows) and "\n" not in card.replace("\r\n", "")
    assert updated("# Only words", MIXED, Path("README.md")).startswith(
        f"---\ntags:\n- memscrub\n---\n# Only words\n\n{BEGIN}"
    )


@pytest.mark.parametrize("card", [f"{CARD}{BEGIN}\n", f"{CARD}{END}\n{BEGIN}\n", f"{CARD}{BEGIN}{END}{BEGIN}{END}"])
def test_markers_that_are_no_pair_are_refused(card: str) -> None:
    with pytest.raises(UsageError, match=r"README\.md: memscrub's markers"):
        updated(card, MIXED, Path("README.md"))


@pytest.mark.parametrize("top", ["a: [", "- a list", "just words"])
def test_metadata_that_is_no_mapping_is_refused(top: str) -> None:
    with pytest.raises(UsageError, match=r"README\.md: the metadata"):
        updated(f"---\n{top}\n---\n\n# Model\n", MIXED, Path("README.md"))


def test_names_of_texts_cannot_end_the_section() -> None:
    hostile = report(text("t"), verdict=Verdict(Outcome.VIOLATED, 1, (f"worst in '{END}'.",), 0, 1, 0))
    card = updated(CARD, hostile, Path("README.md"))
    assert card.count(END) == 1 and updated(card, hostile, Path("README.md")) == card


def test_a_card_in_a_signed_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    refuse_signed(tmp_path / "sub" / "README.md")
    (tmp_path / "model.sig").write_text("{}")
    for path in (tmp_path / "README.md", tmp_path / "sub" / "README.md"):
        with pytest.raises(OutputError, match="is signed"):
            refuse_signed(path)


# -- the command ------------------------------------------------------------------------------------------------
Run = Any


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`memscrub report ARGUMENTS`: exit code, standard output, standard error."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        code = command_line.run(monkeypatch, "report", *arguments)
        said = capsys.readouterr()
        return code, said.out, " ".join(said.err.split())

    return command


def stored(folder: Path, shown: Report = MIXED) -> Path:
    path = folder / "report.json"
    path.write_text(shown.to_json(), encoding="utf-8")
    return path


def test_a_report_is_shown_again_and_ends_with_its_verdict_s_code_on_request(run: Run, tmp_path: Path) -> None:
    path = stored(tmp_path)
    code, out, err = run(path)
    assert code == 0 and "POLICY VIOLATED" in out and err == ""
    assert run(path, "--exit-code", "-q") == (1, "", "")
    passed = report(text("t", Status.WITHIN), outcome=Outcome.PASS)
    assert run(stored(tmp_path, passed), "--exit-code", "-q") == (0, "", "")
    for folder, expected in (("passed", 0), ("failed", 4)):
        assert run(FIXTURES / folder, "--exit-code", "-q")[0] == expected
    lying = replace(passed, verdict=replace(passed.verdict, exit_code=1))
    code, _, err = run(stored(tmp_path, lying), "--exit-code")
    assert code == 2 and "contradicts itself" in err


def test_a_directory_s_report_is_believed_with_its_key_only(run: Run, tmp_path: Path) -> None:
    code, out, err = run(FIXTURES / "passed")
    assert code == 0 and "PASS" in out and "signature not checked" in err
    code, out, err = run(FIXTURES / "passed", "--key", FIXTURES / "ec.pub")
    assert code == 0 and "PASS" in out and err == ""
    files = {option: tmp_path / option[2:] for option in ("--junit", "--sarif")}
    code, out, err = run(
        FIXTURES / "passed", "--key", FIXTURES / "ed25519.pub", *(f"{k}={v}" for k, v in files.items())
    )
    assert code == 5 and out == "" and "another key" in err
    assert isinstance(results(files["--junit"].read_bytes())["report"], Error)
    raw = json.loads(files["--sarif"].read_text("utf-8"))
    assert raw["runs"][0]["invocations"][0]["executionSuccessful"] is False
    assert run(stored(tmp_path), "--key", FIXTURES / "ec.pub")[0] == 2


def test_without_a_report_the_files_for_ci_say_so(run: Run, tmp_path: Path) -> None:
    code, _, err = run(tmp_path / "none.json", "--junit", tmp_path / "j.xml")
    assert code == 2 and "cannot be read" in err
    result = results((tmp_path / "j.xml").read_bytes())["report"]
    assert isinstance(result, Error) and "none.json" in result.message


def test_every_face_is_written_and_reads_back(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = tmp_path / "steps.md"
    steps.write_text("# before\n")
    options = {"--junit": "j.xml", "--sarif": "s.sarif", "--markdown": "m.md", "--model-card": "README.md"}
    files = {option: tmp_path / name for option, name in options.items()}
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(steps))
    code, out, _ = run(stored(tmp_path), "--github", *(f"{option}={file}" for option, file in files.items()))
    assert code == 0
    assert len(results(files["--junit"].read_bytes())) == 6
    SARIF.validate(json.loads(files["--sarif"].read_text("utf-8")))
    assert "| broken | c |" in files["--markdown"].read_text("utf-8")
    assert BEGIN in files["--model-card"].read_text("utf-8")
    assert steps.read_text("utf-8").startswith("# before\n## memscrub scan: POLICY VIOLATED")
    begin, *shown, end = [line for line in out.splitlines() if not line.startswith(("::error", "::warn", "::notice"))]
    token = begin.removeprefix("::stop-commands::")
    assert len(token) == 32 and end == f"::{token}::" and any("POLICY VIOLATED" in line for line in shown)
    assert sum(line.startswith("::error ") for line in out.splitlines()) == 3


def test_a_full_summary_is_left_as_it_is_and_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = tmp_path / "steps.md"
    steps.write_text("x" * ((1 << 20) - 10))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(steps))
    code, _, err = run(stored(tmp_path), "--step-summary")
    assert code == 0 and "summary is full" in err and steps.stat().st_size == (1 << 20) - 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--github"], "GITHUB_STEP_SUMMARY is not set"),
        (["--step-summary"], "GITHUB_STEP_SUMMARY is not set"),
        (["--junit", "report.json"], "which is the report itself"),
        (["--junit", "x", "--sarif", "x"], "which is the file of --junit"),
        (["--junit", "nowhere/x"], "cannot be written there"),
        (["--reveal"], "--html"),
        (["--html", "x.html", "--reveal"], "name their policy with --policy"),
        (["--model-card", "link.md"], "is a link"),
        (["--model-card", "latin.md"], "not valid UTF-8"),
    ],
)
def test_options_that_make_no_sense_are_one_sentence_and_exit_2(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    stored(tmp_path)
    (tmp_path / "link.md").symlink_to(tmp_path / "target.md")
    (tmp_path / "latin.md").write_bytes(b"\xff")
    code, out, err = run("report.json", *arguments)
    assert (code, out) == (2, "") and sentence in err and err.count("memscrub:") == 1
    assert not (tmp_path / "target.md").exists() and (tmp_path / "latin.md").read_bytes() == b"\xff"


def test_no_file_is_written_into_a_signed_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.sig").write_text("{}")
    for option in ("--junit", "--sarif", "--markdown", "--model-card", "--html"):
        code, _, err = run(FIXTURES / "scan.json", option, tmp_path / "file")
        assert code == 2 and not (tmp_path / "file").exists() and err.count("memscrub:") == 1


def test_no_page_is_written_into_the_directory_that_it_is_about(run: Run, tmp_path: Path) -> None:
    (tmp_path / "memscrub-report.json").write_text(MIXED.to_json(), encoding="utf-8")
    code, _, err = run(tmp_path, "--html", tmp_path / "page.html")
    assert code == 2 and not (tmp_path / "page.html").exists() and err.count("memscrub:") == 1


def test_nothing_in_a_report_from_elsewhere_is_obeyed(run: Run, tmp_path: Path) -> None:
    raw = json.loads(stored(tmp_path).read_text("utf-8"))
    raw["verdict"]["reasons"] = ["\u001b]0;title\u0007\u009b2J\u202e"]
    raw["policy"]["name"] = raw["input"]["path"] = raw["texts"][0]["class_name"] = "\u001b[2J[bold]\u0085"
    path = tmp_path / "hostile.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert load_report(path).policy.name.startswith("\x1b")
    files = [tmp_path / name for name in ("junit", "sarif", "markdown", "model-card")]
    code, out, _ = run(path, *(f"--{file.name}={file}" for file in files))
    assert code == 0 and "\\x1b[2J[bold]\\x85" in out
    ElementTree.fromstring(files[0].read_bytes())
    SARIF.validate(json.loads(files[1].read_text("utf-8")))
    for written in (out, *(file.read_text("utf-8") for file in files)):
        assert all(character.isprintable() for line in written.replace("\t", "").split("\n") for character in line)


def test_a_real_report_gives_every_face(tmp_path: Path) -> None:
    for name in ("scan.json", "gate.json", "failed/memscrub-report.json", "passed/memscrub-report.json"):
        shown = printable(load_report(FIXTURES / name))
        whole = JUnitXml.fromfile(io.BytesIO(junit.render(shown)))
        assert (whole.failures == 0) == (shown.verdict.outcome is Outcome.PASS)
        run_of(shown)
        assert shown.verdict.reasons == () or "- " in render(shown)


def test_figures_that_cannot_be_end_no_face_with_a_traceback(run: Run, tmp_path: Path) -> None:
    """A report from elsewhere may state anything that has the right type."""
    raw = json.loads((FIXTURES / "scan.json").read_text("utf-8"))
    raw["texts"][0]["before"] |= {"window_log_probability": 1e300, "tokens": -1}
    raw["depths"] = {"measures": ["near-mass", "of the future"], "separations": [], "prefixes": [], "texts": []}
    raw["depths"]["texts"] = [{"id": "t0", "class_name": "c", "near_mass": [1e300, 1e300]}]
    benign = dict.fromkeys(("degenerate_before", "degenerate_after", "newly_degenerate", "ended_before"), 10**12)
    raw["benign"] = benign | dict.fromkeys(("prompts", "ended_after", "newly_ended", "empty_after"), -1)
    raw["benign"] |= dict.fromkeys(("repeated_rise", "agreement", "max_degenerate"), -1e308)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    faces = [f"--{face}={tmp_path / face}" for face in ("junit", "sarif", "markdown", "model-card", "html")]
    assert run(path, *faces)[0] == 0
    for where, value in (("samples_needed", [1.0]), ("samples_needed", [])):
        raw["texts"][0][where] = value
        path.write_text(json.dumps(raw), encoding="utf-8")
        assert run(path)[0] == 2


def test_the_commands_in_the_docs_run_as_they_stand(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "reports.md").read_text("utf-8")
    block = page.partition("<!-- tested -->")[2].split("```")[1].removeprefix("bash")
    commands = [shlex.split(line) for line in block.splitlines() if line and not line.startswith("#")]
    monkeypatch.chdir(tmp_path)
    shutil.copy(FIXTURES / "scan.json", "before.json")
    shutil.copytree(FIXTURES / "passed", "scrubbed")
    shutil.copy(FIXTURES / "ec.pub", "key.pub.pem")
    assert len(commands) == 4
    for program, command, *arguments in commands:
        assert (program, command) == ("memscrub", "report")
        assert run(*arguments)[0] == 0
    assert {"junit.xml", "memscrub.sarif", "before.md", "README.md"} <= {path.name for path in tmp_path.iterdir()}
