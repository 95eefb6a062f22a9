"""The report: everything a run found out, as frozen values, and their JSON form; knows how nothing was measured.

A report carries ids of texts, counts and measures, never a text or its tokens. Its JSON form is versioned
(`SCHEMA`) and reading it back gives an equal report.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from memscrub.errors import UsageError
from memscrub.reports.json_values import plain, rebuilt
from memscrub.reports.judgement import Judgement, Measures
from memscrub.reports.locality_limits import Benign, Locality
from memscrub.reports.records import (
    BaselineRecord,
    BasisRecord,
    ClassRecord,
    DepthsRecord,
    ExcuseRecord,
    ExpertsRecord,
    TrustRecord,
    WaiverRecord,
)
from memscrub.reports.verdict import Verdict

SCHEMA = 1
MAX_BYTES = 1 << 28
"""Bytes of a report that are read, and so of one that is written: enough for some 100,000 texts."""
REPORT_NAME = "memscrub-report.json"


@dataclass(frozen=True)
class PolicyRecord:
    """Which policy the run followed.

    `sha256`: of the file's bytes. `file`: the policy file as the user named it, None in older reports.
    """

    name: str
    sha256: str
    file: str | None = None


@dataclass(frozen=True)
class ProtectedRecord:
    """Which list was protected: how many texts, and its digest under the user's key (None without a key).

    `foreign`: the list in another format that took the place of the policy's own, as its format and path; else None.
    """

    texts: int
    duplicates: int
    hmac_sha256: str | None
    foreign: str | None = None


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint by its files' digests and the one digest over them all."""

    path: str
    sha256: str
    files: dict[str, str]


@dataclass(frozen=True)
class Environment:
    """What the run was made with."""

    memscrub: str
    python: str
    torch: str
    transformers: str
    platform: str
    device: str
    dtype: str
    seed: int


@dataclass(frozen=True)
class TextRecord:
    """One protected or control text: where it stood before the edit and after (None where there was none).

    `samples_needed`: samples for a chance of 0.1, 0.5 and 0.9 that its likeliest window comes out; None without one.
    `unattributed`: limits it breaks by no more than some control text does, which is then no sign of memorization.
    `file` and `line`: where it stands in its list; the file as a path seen from the policy's folder, a row's number for
    a line in formats without lines. None in older reports. `excused`: broken limits that are not held against the run.
    """

    id: str
    class_name: str
    before: Measures
    before_judgement: Judgement
    after: Measures | None = None
    after_judgement: Judgement | None = None
    samples_needed: tuple[float, ...] | None = None
    unattributed: tuple[str, ...] = ()
    file: str | None = None
    line: int | None = None
    excused: tuple[ExcuseRecord, ...] = ()

    @property
    def latest(self) -> Measures:
        """The measures that count: after the edit where there was one."""
        return self.before if self.after is None else self.after

    @property
    def judgement(self) -> Judgement:
        """The judgement that counts: after the edit where there was one."""
        return self.before_judgement if self.after_judgement is None else self.after_judgement


@dataclass(frozen=True)
class LocalityRecord(Locality):
    """Distance of the written checkpoint from the original on retain text the solver never saw."""

    max_kl: float
    max_perplexity_ratio: float
    min_agreement: float
    max_worst_kl: float | None = None


@dataclass(frozen=True)
class NeighbourRecord:
    """Texts close to the protected ones: how many of their greedily known tokens are still known."""

    texts: int
    known_before: int
    still_known: int
    min_kept: float | None = None


@dataclass(frozen=True)
class BenignRecord(Benign):
    """Ordinary openings continued by both models: counts of prompts, and the policy's limit."""

    max_degenerate: float


@dataclass(frozen=True)
class ScoreRecord:
    """One figure of one utility task; None where the tool gave none."""

    task: str
    metric: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class UtilityRecord:
    """Utility tasks on the input and on the output, and the tool that ran them."""

    tool: str
    scores: tuple[ScoreRecord, ...]


@dataclass(frozen=True)
class TensorRecord:
    """One edited tensor, as written.

    `rows` and `columns` say which of its rows and columns hold the changed elements, as `0-3,7`, numbered through
    over leading axes; `orientation` which of the two are output vectors. None in reports of before they were stated.
    `vectors`: how many output vectors the tensor holds. `change`: for bins of neighbouring output vectors in order, the
    norm of the difference over the norm of the original; empty where it was not taken.
    """

    name: str
    shard: str
    vectors_changed: int
    elements_changed: int
    sha256_before: str
    sha256_after: str
    orientation: str | None = None  # "rows" or "columns"
    rows: str | None = None
    columns: str | None = None
    vectors: int | None = None
    change: tuple[float, ...] = ()


@dataclass(frozen=True)
class EditRecord:
    """How the edit was made and what it touched."""

    mode: str
    solver: str
    sites: str
    stages: tuple[str, ...]
    break_points: int
    active_constraints: int
    rounds: int
    predicted_kl: float
    statistics_tokens: int
    retain_blocks_dropped: int
    tensors: tuple[TensorRecord, ...] = ()
    left_out: tuple[str, ...] = ()
    experts: tuple[ExpertsRecord, ...] = ()
    patch_sha256: str | None = None  # of the patch file, where one was written


@dataclass(frozen=True)
class Report:
    """A whole run, from its inputs to its verdict."""

    schema: int
    kind: str  # "scan", "fix" or "gate"
    created: str  # UTC, ISO 8601
    policy: PolicyRecord
    protected: ProtectedRecord
    input: CheckpointRecord
    output: CheckpointRecord | None
    environment: Environment
    texts: tuple[TextRecord, ...]
    controls: tuple[TextRecord, ...]
    locality: LocalityRecord | None
    neighbours: NeighbourRecord | None
    edit: EditRecord | None
    verdict: Verdict
    benign: BenignRecord | None = None
    utility: UtilityRecord | None = None
    classes: tuple[ClassRecord, ...] = ()
    depths: DepthsRecord | None = None
    basis: BasisRecord | None = None
    trusted: TrustRecord | None = None
    waivers: tuple[WaiverRecord, ...] = ()
    baseline: BaselineRecord | None = None
    adapter: CheckpointRecord | None = None  # what was added to the input in memory before it was measured

    def to_json(self) -> str:
        """The report as indented JSON with a final newline; equal reports give equal text.

        Raises UsageError where it is larger than what is read back.
        """
        text = json.dumps(plain(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        # A path that is not UTF-8 has halves of surrogate pairs in it, which no file could hold as they are.
        text = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04x}", text)
        if 4 * len(text) > MAX_BYTES:  # a character takes four bytes at most
            check_size(len(self.texts) + len(self.controls), len(text.encode("utf-8")))
        return text


def check_size(texts: int, size: int) -> None:
    """Raise UsageError where the report on so many texts has more bytes than are read back."""
    if size > MAX_BYTES:
        raise UsageError(
            f"the report on {texts} texts would be larger than {MAX_BYTES >> 20} MiB, which nothing of memscrub reads"
            " back; split the lists and run on one part at a time."
        )


def load_report(path: Path) -> Report:
    """Read a report back. Raises UsageError when the file is no report of a schema this version knows."""
    return parse_report(report_bytes(path), path)


def report_bytes(path: Path) -> bytes:
    """The bytes of a report's file. Raises UsageError where it cannot be read, or is larger than any report."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: larger than {MAX_BYTES >> 20} MiB, so not a report of memscrub.")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: the report cannot be read ({error.strerror}); name a JSON report.") from None


def parse_report(data: bytes, path: Path) -> Report:
    """The report in these bytes; `path` is what messages name. Raises UsageError as `load_report` does."""
    try:
        raw = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: this is not a JSON report; name the file that --report wrote.") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise UsageError(f"{path}: this is not a memscrub report of schema {SCHEMA}.")
    try:
        report = rebuilt(Report, raw)
        _check_lengths(report)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
        raise UsageError(f"{path}: the report lacks or misstates a field of schema {SCHEMA}.") from None
    assert isinstance(report, Report)
    return report


def _check_lengths(report: Report) -> None:
    """Raise ValueError where a list that stands for so many figures has another length."""
    if any(text.samples_needed is not None and len(text.samples_needed) != 3 for text in report.texts):
        raise ValueError("samples_needed")
    depths = () if report.depths is None else report.depths.texts
    if any(depth.near_mass is not None and len(depth.near_mass) != 2 for depth in depths):
        raise ValueError("near_mass")
