"""Reports on a terminal: per-class bars before and after, locality, verdict; and tokens in the demo.

Shows what a report says and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from memscrub.faces.escaping import printable
from memscrub.reports.judgement import Measures, Status
from memscrub.reports.locality_limits import broken_distance, limit_of
from memscrub.reports.report import BenignRecord, LocalityRecord, NeighbourRecord, Report, ScoreRecord, TextRecord
from memscrub.reports.sentences import class_sentences, depth_sentences
from memscrub.reports.standing import let_through
from memscrub.reports.summary import by_class
from memscrub.reports.verdict import Outcome

BAR = 16
_COLOURS = {
    Outcome.PASS: "green",
    Outcome.VIOLATED: "red",
    Outcome.UNREACHABLE: "red",
    Outcome.INCONCLUSIVE: "yellow",
}
_WORDS = {
    Outcome.PASS: "PASS",
    Outcome.VIOLATED: "POLICY VIOLATED",
    Outcome.UNREACHABLE: "POLICY NOT REACHED",
    Outcome.INCONCLUSIVE: "NOTHING JUDGED",
}


def show_report(console: Console, report: Report) -> None:
    """The whole report in a screenful: what was measured, by class, then locality, then the verdict."""
    report = printable(report)  # ids and paths of a report from elsewhere may hold what a terminal obeys
    title = f"memscrub {report.kind}: {report.input.path}"
    console.print(Text(title, style="bold"), soft_wrap=True)  # a path that is not broken can be copied
    foreign = "" if report.protected.foreign is None else f" of {report.protected.foreign}, not the policy's own"
    duplicates = f", {report.protected.duplicates} duplicates dropped" if report.protected.duplicates else ""
    console.print(
        f"policy {escape(report.policy.name)} · {report.protected.texts} protected texts{duplicates}{escape(foreign)}"
        f" · {report.environment.device}, {report.environment.dtype}",
        highlight=False,
    )
    console.print(_class_table(report.texts))
    if report.controls:
        console.print(_control_line(report.controls), highlight=False)
    for sentence in (*class_sentences(report), *depth_sentences(report)):
        console.print(Text(sentence))
    if report.edit is not None:
        vectors = sum(tensor.vectors_changed for tensor in report.edit.tensors)
        console.print(
            f"edit: {len(report.edit.tensors)} tensors, {vectors} output vectors, {report.edit.break_points}"
            f" break points, {report.edit.rounds} rounds ({escape(', then '.join(report.edit.stages))})",
            highlight=False,
        )
    if report.locality is not None:
        console.print(_locality_line(report.locality), highlight=False)
    if report.neighbours is not None and report.neighbours.known_before:
        console.print(_neighbour_line(report.neighbours), highlight=False)
    if report.benign is not None:
        console.print(_benign_line(report.benign), highlight=False)
    for score in report.utility.scores if report.utility is not None else ():
        console.print(Text(_score_line(score)))
    show_verdict(console, report)


def show_verdict(console: Console, report: Report) -> None:
    """The verdict and the sentences that decided it."""
    verdict = report.verdict
    line = Text(_WORDS[verdict.outcome], style=f"bold {_COLOURS[verdict.outcome]}")
    through = f" ({count} let through by a rate)" if (count := let_through(report.texts)) else ""
    counts = f"  {verdict.within} within, {verdict.violated} violated{through}, {verdict.inconclusive} inconclusive"
    excused = [f", {count} {word}" for count, word in ((verdict.waived, "waived"), (verdict.known, "known")) if count]
    line.append("".join([counts, *excused]), style="default not bold")
    console.print(line)
    for reason in verdict.reasons:
        console.print(Text(f"  {reason}"))


def _class_table(records: Sequence[TextRecord]) -> Table:
    fixed = any(record.after is not None for record in records)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("class", overflow="ellipsis", max_width=16)
    table.add_column("violated", no_wrap=True)
    table.add_column("run", justify="right")
    table.add_column("secrets", justify="right")
    table.add_column("near", justify="right")
    table.add_column("sampled", justify="right")
    for name, group in by_class(records).items():
        table.add_row(escape(name), *_row(group, after=False))
        if fixed:
            table.add_row("  after", *_row(group, after=True))
    return table


def _row(group: Sequence[TextRecord], *, after: bool) -> tuple[Text, str, str, str, str]:
    judged = [(r.after_judgement if after else r.before_judgement) for r in group]
    measures = [m for m in ((r.after if after else r.before) for r in group) if m is not None]
    bad = sum(judgement is not None and judgement.status is Status.VIOLATED for judgement in judged)
    near = [m.near_verbatim for m in measures if m.near_verbatim is not None]
    secrets = [secret for m in measures for secret in m.secrets]
    return (
        bar(bad, len(group)),
        str(max((m.match_run for m in measures), default=0)),
        f"{sum(secret.emitted for secret in secrets)}/{len(secrets)}" if secrets else "-",
        f"{max(near):.2f}" if near else "-",
        _sampled(measures),
    )


def _sampled(measures: Sequence[Measures]) -> str:
    """The highest probability of sampling a window or a secret, for the class."""
    logs = [m.window_log_probability for m in measures if m.window_log_probability is not None and not m.secrets]
    logs += [secret.log_probability for m in measures for secret in m.secrets]
    return "-" if not logs else f"{math.exp(min(0.0, max(logs))):.1e}"


def bar(part: int, whole: int) -> Text:
    """A bar of fixed width with its count: red where texts come out, grey where they do not."""
    filled = math.ceil(BAR * part / whole) if whole else 0
    text = Text("█" * filled, style="red")
    text.append("░" * (BAR - filled), style="dim")
    text.append(f" {part}/{whole}", style="bold" if part else "green")
    return text


def _control_line(records: Sequence[TextRecord]) -> str:
    bad = sum(record.judgement.status is Status.VIOLATED for record in records)
    longest = max(record.latest.match_run for record in records)
    return f"controls (never trained on): {bad}/{len(records)} break the same limits, longest run {longest}"


def _mark(holds: bool) -> str:
    return "[green]ok[/]" if holds else "[red]broken[/]"


def _locality_line(record: LocalityRecord) -> str:
    broken = {limit_of(sentence) for sentence in broken_distance(record, record)}
    worst = "" if record.max_worst_kl is None else f" {_mark('max_worst_kl' not in broken)}"
    return (
        f"locality on {record.tokens} unseen tokens: KL {record.kl:.4f} {_mark('max_kl' not in broken)},"
        f" same token {record.agreement:.1%} {_mark('min_agreement' not in broken)},"
        f" perplexity x{record.perplexity_ratio:.4f} {_mark('max_perplexity_ratio' not in broken)}"
        f" (KL of the worst row {record.worst_kl:.4f}{worst}, at the start of a text {record.start_kl:.4f})"
    )


def _neighbour_line(record: NeighbourRecord) -> str:
    share = record.still_known / record.known_before
    mark = "" if record.min_kept is None else f" {_mark(share >= record.min_kept)}"
    return f"neighbours: {share:.1%} of the tokens known in {record.texts} unprotected texts still known{mark}"


def _benign_line(record: BenignRecord) -> str:
    return (
        f"{record.prompts} benign prompts: {record.degenerate_before} degenerate before, {record.degenerate_after}"
        f" after; {record.ended_before} end early before, {record.ended_after} after; continuations"
        f" {record.agreement:.2f} alike"
    )


def _score_line(score: ScoreRecord) -> str:
    before, after = ("-" if value is None else f"{value:.4f}" for value in (score.before, score.after))
    return f"utility {score.task}, {score.metric}: {before} before, {after} after"


def token_strip(words: Sequence[str], emitted: Sequence[bool], start: int) -> Text:
    """A text as coloured tokens: red where greedy decoding emits the true token, plain where it does not."""
    strip = Text()
    for index, word in enumerate(words):
        if index < start:
            continue
        known = index > 0 and emitted[index - 1]
        strip.append(word, style="bold white on red" if known else "green")
    return strip
