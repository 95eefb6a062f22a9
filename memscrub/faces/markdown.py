"""A report as Markdown (GitHub's dialect): the verdict, classes before and after, ordinary text, how to check it.

Knows the report, not how anything was measured. Strings must be printable (`escaping.printable`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from memscrub.faces.escaping import markdown
from memscrub.faces.findings import LET_THROUGH, Entry, Level, entries
from memscrub.reports.judgement import Measures, Status
from memscrub.reports.report import Report, TextRecord
from memscrub.reports.sentences import class_sentences, depth_sentences
from memscrub.reports.standing import let_through
from memscrub.reports.summary import by_class, log_probability
from memscrub.reports.verdict import Outcome

VERDICTS = {
    Outcome.PASS: "PASS",
    Outcome.VIOLATED: "POLICY VIOLATED",
    Outcome.UNREACHABLE: "POLICY NOT REACHED",
    Outcome.INCONCLUSIVE: "NOTHING JUDGED",
}
_AGAIN = {
    False: "Measured again by `memscrub scan CKPT --policy POLICY`.",
    True: "Checked by `memscrub verify DIR --key PUBLIC_KEY`, measured again by `memscrub gate DIR --policy POLICY"
    " --key PUBLIC_KEY`.",
}
_MARKS = {Level.ERROR: "broken", Level.WARNING: "excused", Level.NOTE: "not judged"}


def render(report: Report) -> str:
    """The whole report with every entry it holds against its checkpoint."""
    return "\n".join([*head(report), *entry_table(entries(report)), *foot(report)]) + "\n"


def head(report: Report, level: int = 2) -> list[str]:
    """Verdict, reasons, classes and ordinary text; `level` is that of the heading."""
    verdict = report.verdict
    through = f" ({count} let through by a rate)" if (count := let_through(report.texts)) else ""
    violated = f"{verdict.violated} violated{through}"
    counts = [f"{verdict.within} within", violated, f"{verdict.inconclusive} inconclusive"]
    counts += [f"{verdict.waived} waived"] if verdict.waived else []
    counts += [f"{verdict.known} known from the baseline"] if verdict.known else []
    return [
        f"{'#' * level} memscrub {markdown(report.kind)}: {VERDICTS[verdict.outcome]}",
        "",
        f"Policy **{markdown(report.policy.name)}** on {markdown(report.input.path)}:"
        f" {report.protected.texts} protected texts, {', '.join(counts)}.",
        "",
        *_bullets(verdict.reasons),
        *_class_table(report),
        *_bullets((*class_sentences(report), *depth_sentences(report))),
        *_locality_table(report),
    ]


def foot(report: Report) -> list[str]:
    """What was edited, what the report speaks of, and how to check it."""
    lines = []
    if report.edit is not None:
        vectors = sum(tensor.vectors_changed for tensor in report.edit.tensors)
        sites = markdown(report.edit.sites)
        lines += [f"Edited: {vectors} output vectors in {len(report.edit.tensors)} tensors ({sites}).", ""]
    made = report.environment
    subject = report.output or report.input
    return [
        *lines,
        "| | |",
        "|---|---|",
        f"| checkpoint | sha256:{markdown(subject.sha256)} |",
        f"| policy | sha256:{markdown(report.policy.sha256)} |",
        f"| made | {markdown(report.created)}, memscrub {markdown(made.memscrub)}, torch {markdown(made.torch)},"
        f" transformers {markdown(made.transformers)}, {markdown(made.device)}, {markdown(made.dtype)} |",
        "",
        f"A pass says what the measures say, of the listed texts, on these bytes. {_AGAIN[report.output is not None]}",
        "",
    ]


def entry_table(found: Sequence[Entry]) -> list[str]:
    """One row for each entry, and an empty line; nothing where there is none."""
    return [*ENTRY_HEADER, *(entry_row(entry) for entry in found), ""] if found else []


ENTRY_HEADER = ("| | class | what | where |", "|---|---|---|---|")


def entry_row(entry: Entry) -> str:
    """An entry as a row below `ENTRY_HEADER`."""
    place = "" if entry.file is None else f"{entry.file}:{entry.line}"
    mark = "let through" if entry.excused == LET_THROUGH else _MARKS[entry.level]
    cells = (mark, entry.class_name or "", entry.sentence, place)
    return "| " + " | ".join(map(markdown, cells)) + " |"


def _bullets(sentences: Iterable[str]) -> list[str]:
    lines = [f"- {markdown(sentence)}" for sentence in sentences]
    return [*lines, ""] if lines else []


def _class_table(report: Report) -> list[str]:
    if not report.texts:
        return []
    lines = [
        "| class | | texts | violated | longest run | secrets emitted | most alike | likeliest sample |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, group in by_class(report.texts).items():
        lines += _class_rows(name, group)
    return [*lines, ""]


def _class_rows(name: str, group: Sequence[TextRecord]) -> Iterator[str]:
    before = [(text.before, text.before_judgement) for text in group]
    yield _class_row(name, "before" if group[0].after else "", before)
    after = [(text.after, text.after_judgement) for text in group if text.after and text.after_judgement]
    if after:
        yield _class_row("", "after", after)


def _class_row(name: str, when: str, group: Sequence[tuple[Measures, object]]) -> str:
    measures = [each for each, _ in group]
    violated = sum(getattr(judgement, "status", None) is Status.VIOLATED for _, judgement in group)
    secrets = [secret.emitted for each in measures for secret in each.secrets]
    near = [each.near_verbatim for each in measures if each.near_verbatim is not None]
    logs = [log for log in map(log_probability, measures) if log is not None]
    cells = (
        markdown(name),
        when,
        str(len(group)),
        f"**{violated}**" if violated else "0",
        str(max(each.match_run for each in measures)),
        f"{sum(secrets)}/{len(secrets)}" if secrets else "-",
        f"{max(near):.2f}" if near else "-",
        f"{math.exp(min(0.0, max(logs))):.1e}" if logs else "-",
    )
    return "| " + " | ".join(cells) + " |"


def _locality_table(report: Report) -> list[str]:
    rows = [*_distances(report)]
    if not rows:
        return []
    return ["| ordinary text | measured | limit |", "|---|---:|---:|", *rows, ""]


def _distances(report: Report) -> Iterator[str]:
    if (locality := report.locality) is not None:
        yield _row(f"KL divergence ({locality.tokens} tokens)", f"{locality.kl:.4f}", f"at most {locality.max_kl:g}")
        worst = "-" if locality.max_worst_kl is None else f"at most {locality.max_worst_kl:g}"
        yield _row("KL divergence of the worst row", f"{locality.worst_kl:.4f}", worst)
        allowed = f"at most {locality.max_perplexity_ratio:g}"
        yield _row("perplexity, after over before", f"{locality.perplexity_ratio:.4f}", allowed)
        yield _row("same likeliest token", f"{locality.agreement:.1%}", f"at least {locality.min_agreement:.1%}")
    if (known := report.neighbours) is not None and known.known_before:
        limit = "-" if known.min_kept is None else f"at least {known.min_kept:.1%}"
        share = known.still_known / known.known_before
        yield _row(f"known tokens kept in {known.texts} related texts", f"{share:.1%}", limit)
    if (benign := report.benign) is not None:
        said = f"{benign.degenerate_after + benign.ended_after} after, {benign.degenerate_before + benign.ended_before}"
        limit = f"rise of at most {benign.max_degenerate:.1%}"
        yield _row(f"of {benign.prompts} ordinary prompts, degenerate or ended early", f"{said} before", limit)
    for score in report.utility.scores if report.utility is not None else ():
        before, after = ("-" if value is None else f"{value:.4f}" for value in (score.before, score.after))
        yield _row(f"{markdown(score.task)}, {markdown(score.metric)}", f"{after} after, {before} before", "-")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
