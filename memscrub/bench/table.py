"""What a bench found out, as frozen values, and their tables as plain strings, Markdown and JSON; measures nothing.

A bench carries names of methods, counts and measures, never a text, its id or its tokens. Its JSON form is
versioned (`SCHEMA`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from memscrub.reports.json_values import plain

SCHEMA = 1
# A log-probability this low says that a window cannot be sampled at all (`extraction.IMPOSSIBLE`).
NEVER = -1000.0
# Checkpoints of a method compete for the lowest KL when their share over the limit is this close to the least.
SLACK = 0.02
RULE = (
    "best of the grid: of a method's checkpoints whose share over the run limit is within 2 percentage points of"
    " the method's least, the one with the lowest KL"
)


@dataclass(frozen=True)
class Figures:
    """What one method left behind, all texts and the judge's text taken together; None: not applicable.

    Shares are of 1. `suppressed`: of the `came_out` texts whose exact suffix came out of the unedited model, those
    whose no longer does. `over_limit`: texts with a longer greedy run than allowed. `near_*`: similarity of the
    model's own continuation. `risk_*`: log-probability of the likeliest window. Locality as in `locality`.
    """

    texts: int
    came_out: int
    suppressed: float | None
    over_limit: float
    near_mean: float | None
    near_max: float | None
    risk_mean: float | None
    risk_max: float | None
    secrets: int
    secrets_emitted: int
    kl: float | None = None
    worst_kl: float | None = None
    start_kl: float | None = None
    agreement: float | None = None
    perplexity_ratio: float | None = None
    neighbours_kept: float | None = None


@dataclass(frozen=True)
class Row:
    """One method on all texts at once: its figures, or why there are none.

    `family` groups rows that compete for the same place (the fine-tuning checkpoints of one method). `seconds` is
    the method's own time, its statistics included, nothing that was measured afterwards. `remark`: what the method
    itself says it did not reach.
    """

    name: str
    kind: str  # "reference", "edit", "fine-tuning" or "control"
    figures: Figures | None
    seconds: float | None = None
    failed: str | None = None
    family: str | None = None
    remark: str | None = None


@dataclass(frozen=True)
class TextRow:
    """One method on one text at a time, each on a fresh model: means over the sampled texts, or why none."""

    name: str
    texts: int
    broken: float | None = None
    contained: float | None = None
    kl: float | None = None
    agreement: float | None = None
    seconds: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class CopyRow:
    """Texts of one range of copy fractions [low, high): how many the MLP edit missed and attention recovered."""

    low: float
    high: float
    texts: int
    missed: int
    ablation: int
    closed_form: int


@dataclass(frozen=True)
class Setting:
    """What a bench was made with."""

    command: str
    machine: str
    torch: str
    transformers: str
    memscrub: str
    threads: int
    device: str
    seed: int
    checkpoint: str
    checkpoint_sha256: str
    policy: str
    policy_sha256: str
    texts: int
    controls: int
    judge_tokens: int
    sites: str
    limits: dict[str, int]  # the run limit, and the width of the sampling window, of each class
    sample: int


@dataclass(frozen=True)
class Bench:
    """A whole bench, or as much of it as is done: `complete` is false until the last row."""

    schema: int
    kind: str
    created: str
    complete: bool
    setting: Setting
    rule: str
    grid: tuple[str, ...]
    rows: tuple[Row, ...]
    runs: tuple[Row, ...] = ()
    text_rows: tuple[TextRow, ...] = ()
    copying: tuple[CopyRow, ...] = ()

    def to_json(self) -> str:
        """The bench as indented JSON with a final newline."""
        return json.dumps(plain(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Grid:
    """A table of strings: a title, headers and cells; every row has as many cells as there are headers."""

    title: str
    headers: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def best_of(rows: Sequence[Row]) -> Row:
    """The best checkpoint of one method by `RULE`; where every one failed, the first failure."""
    measured = [(row, row.figures) for row in rows if row.figures is not None]
    if not measured:
        return rows[0]
    least = min(figures.over_limit for _, figures in measured)
    close = [(row, figures) for row, figures in measured if figures.over_limit <= least + SLACK + 1e-9]
    return min(close, key=lambda pair: pair[1].kl if pair[1].kl is not None else float("inf"))[0]


def families(runs: Sequence[Row]) -> dict[str, list[Row]]:
    """Fine-tuning checkpoints by method, in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in runs:
        groups.setdefault(row.family or row.name, []).append(row)
    return groups


def given_away(rows: Sequence[Row]) -> Grid:
    """The first half of the main table: what the texts give away."""
    headers = ("method", "gone", "over", "near", "max", "risk", "max", "secrets")
    return Grid("what still comes out", headers, tuple((row.name, *_given(row)) for row in rows))


def kept(rows: Sequence[Row]) -> Grid:
    """The second half of the main table: what everything else lost."""
    headers = ("method", "KL", "start KL", "agree", "ppl", "kept", "s")
    return Grid("what it cost", headers, tuple((row.name, *_kept(row)) for row in rows))


def one_at_a_time(rows: Sequence[TextRow]) -> Grid:
    """The per-text part."""
    headers = ("method", "texts", "broken", "none over", "KL", "agree", "s/text")
    cells = []
    for row in rows:
        if row.failed is not None:
            cells.append((row.name, str(row.texts), row.failed, *[""] * 4))
        else:
            values = (_share(row.broken), _share(row.contained), _kl(row.kl), _three(row.agreement))
            cells.append((row.name, str(row.texts), *values, _seconds(row.seconds)))
    return Grid("one text at a time, each on a fresh model", headers, tuple(cells))


def copying(rows: Sequence[CopyRow]) -> Grid:
    """What attention recovers, by copy fraction."""
    headers = ("copy fraction", "texts", "missed by MLP edits", "heads ablated", "heads edited")
    cells = [
        (
            f"{row.low:.2f} to {row.high:.2f}" if row.low < row.high else "all",
            str(row.texts),
            str(row.missed),
            _part(row.ablation, row.missed),
            _part(row.closed_form, row.missed),
        )
        for row in rows
    ]
    return Grid("recovered by the attention fallback", headers, tuple(cells))


def grids(bench: Bench) -> tuple[Grid, ...]:
    """The tables for a terminal: none wider than it has to be, none empty."""
    found = [given_away(bench.rows), kept(bench.rows)]
    if bench.text_rows:
        found.append(one_at_a_time(bench.text_rows))
    if bench.copying:
        found.append(copying(bench.copying))
    return tuple(found)


def notes(bench: Bench) -> tuple[str, ...]:
    """How to read the columns, a sentence each."""
    limits = ", ".join(f"{name} {width}" for name, width in bench.setting.limits.items())
    return (
        "gone: texts whose exact suffix came out before and does not now; over: texts with a greedy run over the"
        f" limit ({limits}).",
        "near, max: similarity of the model's own continuation; risk, max: log-probability of sampling the"
        " likeliest window of the limit's length (each text counts as at least -60 in the mean).",
        "agree: same likeliest token; ppl: perplexity ratio; kept: neighbours' known tokens still known; s: the"
        f" method alone. Fine-tuning rows: {bench.rule}.",
        *(f"{row.name}: {row.remark}" for row in bench.rows if row.remark is not None),
    )


def markdown(bench: Bench) -> str:
    """The whole bench as Markdown: how it was made, the tables, and every fine-tuning checkpoint."""
    setting = bench.setting
    lines = [
        f"## Bench of `{setting.checkpoint}`",
        "",
        f"{setting.texts} protected texts, {setting.controls} controls, policy `{setting.policy}`, sites"
        f" {setting.sites}, seed {setting.seed}; locality on {setting.judge_tokens} unseen tokens."
        + ("" if bench.complete else " **Unfinished.**"),
        "",
        f"Made {bench.created} on {setting.machine}; device {setting.device}, {setting.threads} threads; torch"
        f" {setting.torch}, transformers {setting.transformers}, memscrub {setting.memscrub}, with",
        "",
        "```",
        setting.command,
        "```",
        "",
        *_markdown(_joined(bench.rows, "All texts in one checkpoint")),
        *(f"- {note}" for note in notes(bench)),
        "",
    ]
    if bench.text_rows:
        lines += _markdown(one_at_a_time(bench.text_rows))
        lines += [f"Mean over {setting.sample} texts that come out verbatim, drawn with the seed.", ""]
    if bench.copying:
        lines += _markdown(copying(bench.copying))
    if bench.grid:
        lines += ["### The fine-tuning grid", "", *(f"- {line}" for line in bench.grid), ""]
    if bench.runs:
        lines += _markdown(_joined(bench.runs, "Every fine-tuning checkpoint"))
    return "\n".join(lines).rstrip("\n") + "\n"


def _joined(rows: Sequence[Row], title: str) -> Grid:
    headers = (*given_away([]).headers, *kept([]).headers[1:])
    return Grid(title, headers, tuple((row.name, *_given(row), *_kept(row)) for row in rows))


def _markdown(grid: Grid) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join(["---", *["---:"] * (len(grid.headers) - 1)]) + "|"
    return [f"### {grid.title.capitalize()}", "", line(grid.headers), rule, *map(line, grid.cells), ""]


def _given(row: Row) -> tuple[str, ...]:
    found = row.figures
    if found is None:
        return (row.failed or "-", *[""] * 6)
    secrets = f"{found.secrets_emitted}/{found.secrets}" if found.secrets else "-"
    shares = (_share(found.suppressed), _share(found.over_limit))
    near = (_two(found.near_mean), _two(found.near_max))
    return (*shares, *near, _risk(found.risk_mean), _risk(found.risk_max), secrets)


def _kept(row: Row) -> tuple[str, ...]:
    found = row.figures
    if found is None:
        return (row.failed or "-", "", "", "", "", _seconds(row.seconds))
    kls = (_kl(found.kl), _kl(found.start_kl))
    ratio = "-" if found.perplexity_ratio is None else f"{found.perplexity_ratio:.4f}"
    return (*kls, _three(found.agreement), ratio, _share(found.neighbours_kept), _seconds(row.seconds))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _kl(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}" if value < 0.01 else f"{value:.3g}"


def _risk(value: float | None) -> str:
    return "-" if value is None else "never" if value <= NEVER else f"{value:.1f}"


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _three(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _part(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else "-"
