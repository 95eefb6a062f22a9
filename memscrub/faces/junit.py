"""A report as JUnit XML, for the test tabs of CI systems: a test case for each protected text and locality limit.

    failure   a limit is broken and decided the verdict
    skipped   the text is too short to judge, or its broken limits are excused
    error     the tool failed, and there is no report

Knows the report, not how anything was measured. Strings must be printable (`escaping.printable`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from junitparser import Attr, Error, Failure, IntAttr, JUnitXml, Skipped, TestCase, TestSuite

from memscrub.faces.findings import LOCALITY_LIMITS, Entry, Level, entries, of_text
from memscrub.faces.places import place_of
from memscrub.reports.report import Report
from memscrub.reports.summary import by_class
from memscrub.reports.verdict import Outcome

ORDINARY = "ordinary text"


class _Case(TestCase):
    """A test case that says where its text stands, as GitLab and pytest's own reports do."""

    file = Attr()
    line = IntAttr()


def render(report: Report, *, policy: Path | None = None) -> bytes:
    """The whole report; the suites are its classes, then the limits on ordinary text.

    `policy`: where the policy lies now, for the paths of lists; None: where the report says.
    """
    passed = report.verdict.outcome is Outcome.PASS
    suites = []
    for name, texts in by_class(report.texts).items():
        cases = []
        for text in texts:
            case = _Case(name=text.id, classname=name)
            if text.file is not None:
                place = place_of(text, report, policy)
                case.file, case.line = place.path, place.line
            cases.append(_with_result(case, list(of_text(text, passed=passed))))
        suites.append(_suite(name, report, cases))
    others = [entry for entry in entries(report) if entry.text is None]
    if report.locality is not None or others:
        suites.append(_suite(ORDINARY, report, _other_cases(report, others)))
    return _xml(f"memscrub {report.kind}", suites)


def render_error(message: str) -> bytes:
    """A run without a report, as one test case with an error."""
    case = TestCase(name="report", classname="memscrub")
    case.result = [Error(message, "memscrub/error")]
    suite = TestSuite("memscrub")
    suite.add_testcases([case])
    return _xml("memscrub", [suite])


def _other_cases(report: Report, found: Sequence[Entry]) -> list[TestCase]:
    """One case for each limit on ordinary text that was judged, and for what else is no single text's."""
    names = dict.fromkeys(f"memscrub/locality.{name}" for name in _judged(report))
    names |= dict.fromkeys(entry.rule.id for entry in found)
    return [
        _with_result(
            TestCase(name=name.removeprefix("memscrub/"), classname=ORDINARY), [e for e in found if e.rule.id == name]
        )
        for name in names
    ]


def _judged(report: Report) -> list[str]:
    stated: dict[str, float | None] = {}
    if (locality := report.locality) is not None:
        stated = dict.fromkeys(("max_kl", "max_perplexity_ratio", "min_agreement"), 0.0)
        stated["max_worst_kl"] = locality.max_worst_kl
    if (neighbours := report.neighbours) is not None:
        stated["min_neighbours_kept"] = neighbours.min_kept
    if (benign := report.benign) is not None:
        stated["max_degenerate"] = benign.max_degenerate
    return [name for name in LOCALITY_LIMITS if stated.get(name) is not None]


def _with_result(case: TestCase, found: Sequence[Entry]) -> TestCase:
    """One result at most: several would count as several tests in some readers."""
    failed = [entry for entry in found if entry.level is Level.ERROR]
    others = [entry for entry in found if entry.level is not Level.ERROR]
    if failed:
        result = Failure(_joined(failed), failed[0].rule.id)
        result.text = "\n".join(entry.sentence for entry in found)
        case.result = [result]
    elif others:
        case.result = [Skipped(_joined(others), others[0].rule.id)]
    return case


def _joined(found: Iterable[Entry]) -> str:
    return " ".join(entry.sentence for entry in found)


def _suite(name: str, report: Report, cases: Sequence[TestCase]) -> TestSuite:
    suite = TestSuite(name)
    suite.timestamp = report.created
    for key, value in _properties(report).items():
        suite.add_property(key, value)
    suite.add_testcases(list(cases))
    return suite


def _properties(report: Report) -> dict[str, str]:
    return {
        "verdict": report.verdict.outcome.value,
        "exit_code": str(report.verdict.exit_code),
        "policy": report.policy.name,
        "policy_sha256": report.policy.sha256,
        "input_sha256": report.input.sha256,
        **({} if report.output is None else {"output_sha256": report.output.sha256}),
        "memscrub": report.environment.memscrub,
    }


def _xml(name: str, suites: Iterable[TestSuite]) -> bytes:
    whole = JUnitXml(name)
    for suite in suites:
        whole.append(suite)  # type: ignore[no-untyped-call]
    whole.update_statistics()  # type: ignore[no-untyped-call]
    written = io.BytesIO()
    whole.write(written, pretty=True)
    return written.getvalue()
