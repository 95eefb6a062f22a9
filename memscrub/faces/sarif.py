"""A report as SARIF 2.1.0, within what GitHub code scanning takes: an alert at each text's line in its list.

Rules are the policy's limits, with ids that stay. An alert is the same in the next run when rule, class and text are:
its fingerprint does not depend on what was measured, nor on the line. Knows the report, not how anything was measured.
Strings must be printable (`escaping.printable`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from memscrub.faces.escaping import clipped, sarif
from memscrub.faces.findings import RULES, Entry, Level, entries
from memscrub.faces.places import place_of
from memscrub.reports.report import Report

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
# "SARIF results exceed limit" in GitHub's documentation: more than the first are refused, 5,000 are shown, by
# severity; and a file of more than 10 MB after gzip is refused.
MAX_RESULTS = 25_000
SHOWN = 5_000
MAX_GZIPPED = 10_000_000
_NAME = 255


def render(
    report: Report, *, policy: Path | None = None, max_results: int = MAX_RESULTS, max_gzipped: int = MAX_GZIPPED
) -> bytes:
    """The whole report in one run; what is above a limit is left out, the least severe first, with a note.

    `policy`: where the policy lies now, for the paths of lists; None: where the report says.
    """
    found = entries(report)
    kept = found[:max_results]
    while True:
        data = _as_bytes(_run(report, kept, len(found) - len(kept), policy))
        if not kept or len(gzip.compress(data, mtime=0)) <= max_gzipped:
            return data
        kept = kept[: len(kept) // 2]


def render_error(message: str) -> bytes:
    """A run without a report: no results, and a notification that says why."""
    invocation = {"executionSuccessful": False, "toolExecutionNotifications": [_notification("error", message)]}
    return _as_bytes({"tool": {"driver": _driver(None)}, "invocations": [invocation], "results": []})


def fingerprint(entry: Entry) -> str:
    """What makes an entry the same in the next run, in hex."""
    named = "\0".join((entry.rule.id, entry.class_name or "", entry.text or ""))
    return hashlib.sha256(named.encode("utf-8")).hexdigest()


def _run(report: Report, kept: Sequence[Entry], left_out: int, policy: Path | None) -> dict[str, Any]:
    invocation: dict[str, Any] = {"executionSuccessful": True, "exitCode": report.verdict.exit_code}
    if left_out:
        message = f"{left_out} more results were left out to stay within the limits of code scanning; see the report."
        invocation["toolExecutionNotifications"] = [_notification("warning", message)]
    return {
        "tool": {"driver": _driver(report)},
        "automationDetails": {"id": f"memscrub/{report.kind}/{report.policy.name}/"},
        "invocations": [invocation],
        "columnKind": "unicodeCodePoints",
        "results": [_result(entry, report, policy) for entry in kept],
        "properties": {
            "verdict": report.verdict.outcome.value,
            "policySha256": report.policy.sha256,
            "inputSha256": report.input.sha256,
            "created": report.created,
        },
    }


def _driver(report: Report | None) -> dict[str, Any]:
    version = {} if report is None else {"version": report.environment.memscrub}
    return {"name": "memscrub", **version, "rules": [_rule(name) for name in RULES]}


def _rule(name: str) -> dict[str, Any]:
    rule = RULES[name]
    level = Level.NOTE if name == "inconclusive" else Level.ERROR
    quality = rule.id.startswith("memscrub/locality.")
    severity = (
        {"problem.severity": "error"} if quality else {"security-severity": "2.0" if level is Level.NOTE else "8.0"}
    )
    return {
        "id": rule.id,
        "name": clipped(rule.id.partition("/")[2], _NAME),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.help},
        "help": {"text": rule.help},
        "defaultConfiguration": {"level": level.value},
        "properties": {
            "tags": ["memorization", "locality"] if quality else ["memorization", "privacy", "security"],
            "precision": "very-high",
            **severity,
        },
    }


def _result(entry: Entry, report: Report, policy: Path | None) -> dict[str, Any]:
    place = place_of(entry, report, policy)
    uri = ("file://" if place.path.startswith("/") else "") + quote(place.path)
    mark = fingerprint(entry)
    return {
        "ruleId": entry.rule.id,
        "ruleIndex": [rule.id for rule in RULES.values()].index(entry.rule.id),
        "level": entry.level.value,
        "message": {"text": sarif(entry.sentence)},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": uri},
                    "region": {"startLine": place.line, "startColumn": 1, "endLine": place.line, "endColumn": 2},
                }
            }
        ],
        # GitHub looks at primaryLocationLineHash alone.
        "partialFingerprints": {"primaryLocationLineHash": f"{mark[:16]}:1", "memscrub/v1": mark},
        **({} if entry.excused is None else {"suppressions": [_suppression(entry.excused)]}),
        "properties": {} if entry.class_name is None else {"class": entry.class_name},
    }


def _suppression(excused: str) -> dict[str, Any]:
    return {"kind": "external", "status": "accepted", "justification": excused}


def _notification(level: str, message: str) -> dict[str, Any]:
    return {"level": level, "message": {"text": sarif(message)}}


def _as_bytes(run: dict[str, Any]) -> bytes:
    whole = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
