"""Reports: reading one back gives an equal one, and what is no report is refused with one kind of error."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memscrub.errors import ExitCode, UsageError
from memscrub.reports.judgement import Finding, Judgement, Measures, SecretMeasure, Status
from memscrub.reports.report import (
    SCHEMA,
    BenignRecord,
    CheckpointRecord,
    EditRecord,
    Environment,
    LocalityRecord,
    NeighbourRecord,
    PolicyRecord,
    ProtectedRecord,
    Report,
    ScoreRecord,
    TensorRecord,
    TextRecord,
    UtilityRecord,
    load_report,
)
from memscrub.reports.standing import timestamp
from memscrub.reports.verdict import Outcome, Verdict

WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 10**6)

MEASURES = st.builds(
    Measures,
    tokens=COUNT,
    match_run=COUNT,
    run_begin=COUNT,
    run_margin=NUMBER | st.just(math.inf),
    confirmed=st.booleans(),
    extractable=st.none() | st.booleans(),
    window_log_probability=st.none() | NUMBER,
    near_verbatim=st.none() | NUMBER,
    secrets=st.lists(st.builds(SecretMeasure, COUNT, COUNT, st.booleans(), NUMBER), max_size=2).map(tuple),
)
FINDINGS = st.lists(st.builds(Finding, WORD, NUMBER | COUNT, NUMBER | COUNT, st.booleans()), max_size=2)
JUDGEMENT = st.builds(Judgement, st.sampled_from(Status), FINDINGS.map(tuple))
TEXTS = st.lists(
    st.builds(TextRecord, WORD, WORD, MEASURES, JUDGEMENT, st.none() | MEASURES, st.none() | JUDGEMENT),
    max_size=2,
).map(tuple)
CHECKPOINT = st.builds(CheckpointRecord, WORD, WORD, st.dictionaries(WORD, WORD, max_size=2))
WORDS = st.lists(WORD, max_size=2).map(tuple)
EDIT = st.builds(
    EditRecord,
    mode=WORD,
    solver=WORD,
    sites=WORD,
    stages=WORDS,
    break_points=COUNT,
    active_constraints=COUNT,
    rounds=COUNT,
    predicted_kl=NUMBER,
    statistics_tokens=COUNT,
    retain_blocks_dropped=COUNT,
    tensors=st.lists(st.builds(TensorRecord, WORD, WORD, COUNT, COUNT, WORD, WORD), max_size=2).map(tuple),
    left_out=WORDS,
)
REPORTS = st.builds(
    Report,
    schema=st.just(SCHEMA),
    kind=st.sampled_from(["scan", "fix", "gate"]),
    created=WORD,
    policy=st.builds(PolicyRecord, WORD, WORD),
    protected=st.builds(ProtectedRecord, COUNT, COUNT, st.none() | WORD),
    input=CHECKPOINT,
    output=st.none() | CHECKPOINT,
    environment=st.builds(Environment, WORD, WORD, WORD, WORD, WORD, WORD, WORD, COUNT),
    texts=TEXTS,
    controls=TEXTS,
    locality=st.none() | st.builds(LocalityRecord, COUNT, *[NUMBER] * 8, st.none() | NUMBER),
    neighbours=st.none() | st.builds(NeighbourRecord, COUNT, COUNT, COUNT, st.none() | NUMBER),
    edit=st.none() | EDIT,
    verdict=st.builds(Verdict, st.sampled_from(Outcome), st.integers(0, 5), WORDS, COUNT, COUNT, COUNT),
    benign=st.none() | st.builds(BenignRecord, *[COUNT] * 8, *[NUMBER] * 3),
    utility=st.none()
    | st.builds(
        UtilityRecord,
        WORD,
        st.lists(st.builds(ScoreRecord, WORD, WORD, st.none() | NUMBER, st.none() | NUMBER), max_size=2).map(tuple),
    ),
)

SMALL = Report(
    schema=SCHEMA,
    kind="scan",
    created="2026-01-01T00:00:00+00:00",
    policy=PolicyRecord("p", "0" * 64),
    protected=ProtectedRecord(1, 0, None),
    input=CheckpointRecord("model", "0" * 64, {"config.json": "0" * 64}),
    output=None,
    environment=Environment("0", "3", "2", "5", "linux", "cpu", "float32", 0),
    texts=(
        TextRecord(
            "t",
            "c",
            Measures(10, 0, 1, math.inf),
            Judgement(Status.WITHIN, (Finding("max_verbatim_tokens", 4, 0, True),)),
        ),
    ),
    controls=(),
    locality=LocalityRecord(10, *[0.5] * 8),
    neighbours=None,
    edit=None,
    verdict=Verdict(Outcome.PASS, 0, ("fine.",), 1, 0, 0),
)


@settings(max_examples=60, deadline=None)
@given(report=REPORTS)
def test_reading_a_report_back_gives_an_equal_report_and_equal_text(
    tmp_path_factory: pytest.TempPathFactory, report: Report
) -> None:
    path = tmp_path_factory.getbasetemp() / "report.json"
    path.write_text(report.to_json(), encoding="utf-8")
    again = load_report(path)
    assert again == report
    if not any(type(f.allowed) is int or type(f.measured) is int for f in findings(report)):
        assert again.to_json() == report.to_json()


def findings(report: Report) -> list[Finding]:
    judgements = [j for t in (*report.texts, *report.controls) for j in (t.before_judgement, t.after_judgement)]
    return [finding for judgement in judgements if judgement for finding in judgement.findings]


def test_a_report_is_plain_json_without_infinities_that_ends_in_a_newline() -> None:
    text = SMALL.to_json()
    assert text.endswith("}\n")
    raw = json.loads(text, parse_constant=pytest.fail)
    assert raw["texts"][0]["before"]["run_margin"] is None
    assert raw["texts"][0]["before_judgement"]["status"] == "within"
    assert raw["verdict"]["outcome"] == "pass"


def changed(path: str, value: Any) -> str:
    """The small report with the value at this dotted path replaced, or removed by `...`."""
    raw = json.loads(SMALL.to_json())
    *parents, last = path.split(".")
    place = raw
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(raw)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        '"report"',
        "[" * 100_000,
        "9" * 5000,
        changed("schema", ...),
        changed("schema", 2),
        changed("schema", "1"),
        changed("schema", True),
        changed("schema", 1.0),
        changed("verdict", ...),
        changed("verdict", None),
        changed("verdict.outcome", "fine"),
        changed("verdict.exit_code", "0"),
        changed("verdict.exit_code", 0.0),
        changed("verdict.exit_code", False),
        changed("verdict.reasons", "fine."),
        changed("verdict.reasons", {"fine.": 1}),
        changed("verdict.reasons", [1]),
        changed("texts", None),
        changed("texts", [None]),
        changed("texts.0.before", []),
        changed("texts.0.before.confirmed", 1),
        changed("texts.0.before_judgement.status", ["within"]),
        changed("input.files", ["config.json"]),
        changed("input.files", {"config.json": 1}),
        changed("locality.kl", "0.1"),
        changed("locality.kl", True),
        changed("locality.kl", math.nan),
        changed("locality.kl", math.inf),
        changed("locality.kl", 10**400),
        changed("environment.seed", 1.5),
        changed("verdict.within", 10**400),
        changed("neighbours", {"texts": 1, "known_before": 1, "still_known": 10**400}),
    ],
    ids=lambda text: f"{text[:12]}" if len(text) < 12 else None,
)
def test_what_is_no_report_is_a_usage_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"report\.json") as caught:
        load_report(path)
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.__cause__ is None


def test_a_file_that_is_missing_a_folder_or_not_utf8_is_a_usage_error(tmp_path: Path) -> None:
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.json", tmp_path, binary):
        with pytest.raises(UsageError):
            load_report(path)


def test_the_small_report_itself_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(SMALL.to_json(), encoding="utf-8")
    assert load_report(path) == SMALL


def test_a_path_that_is_no_utf8_is_written_and_read_back(tmp_path: Path) -> None:
    odd = replace(SMALL, policy=PolicyRecord("p", "0" * 64, os.fsdecode(b"\xff/policy.toml")))
    path = tmp_path / "report.json"
    path.write_text(odd.to_json(), encoding="utf-8")
    assert load_report(path) == odd


@pytest.mark.parametrize("epoch", ["\u00b2", "9" * 20, "253402300800", "-5", "today", ""])
def test_a_source_date_that_is_none_is_not_taken(monkeypatch: pytest.MonkeyPatch, epoch: str) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert datetime.now(timezone.utc) - datetime.fromisoformat(timestamp()) < timedelta(minutes=1)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert timestamp() == "1970-01-02T00:00:00+00:00"


def test_a_report_from_before_a_field_was_added_is_read_with_its_default(tmp_path: Path) -> None:
    raw = json.loads(SMALL.to_json())
    del raw["benign"], raw["utility"], raw["locality"]["max_worst_kl"]
    raw["neighbours"] = {"texts": 1, "known_before": 2, "still_known": 2}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    assert load_report(path) == replace(SMALL, neighbours=NeighbourRecord(1, 2, 2))
