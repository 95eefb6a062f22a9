"""Reports for tests of their faces: a fix with as many texts as wanted, all values made from the text's number."""

from __future__ import annotations

import math
from dataclasses import replace

from memscrub.reports.judgement import ClassLimits, Measures, SecretMeasure, judge
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
    TensorRecord,
    TextRecord,
)
from memscrub.reports.standing import judged
from memscrub.reports.summary import summarised
from memscrub.reports.verdict import decide

LIMITS = {
    "books": ClassLimits(max_verbatim_tokens=16, max_near_verbatim=0.6),
    "people": ClassLimits(secret=True, max_sampling_probability=0.01),
}


def text(number: int, *, id: str | None = None) -> TextRecord:
    """Every third text is of the second class; every seventh still breaks a limit after the edit."""
    kind = "people" if number % 3 == 2 else "books"
    left = number % 7 == 3
    before = _measures(kind, 40 + number % 50, 1.0, -0.05)
    after = _measures(kind, 30 if left else number % 17, 0.9 if left else 0.3, -0.1 if left else -9.0 - number % 5)
    return TextRecord(
        id or f"text-{number}",
        kind,
        before,
        judge(before, LIMITS[kind]),
        after,
        judge(after, LIMITS[kind]),
        file="lists/protected.jsonl",
        line=number + 1,
    )


def _measures(kind: str, run: int, near: float, log_p: float) -> Measures:
    if kind == "people":
        secret = SecretMeasure(5, 9, log_p > -1, log_p)
        return Measures(60, run, 3, 0.4, secrets=(secret,))
    return Measures(95, run, 2, 1.25 if run else math.inf, False, run > 64, log_p * 3, near)


def fixed(texts: int, *, edit: bool = True) -> Report:
    """The report of a fix; without `edit`, that of a scan with the same measures before it."""
    records = tuple(map(text, range(texts)))
    if not edit:
        records = tuple(replace(record, after=None, after_judgement=None) for record in records)
    files = {"config.json": "c" * 64, "model.safetensors": "d" * 64}
    report = Report(
        schema=SCHEMA,
        kind="fix" if edit else "scan",
        created="2026-03-02T09:05:00+00:00",
        policy=PolicyRecord("release", "a" * 64, "policy.toml"),
        protected=ProtectedRecord(texts, 0, None),
        input=CheckpointRecord("models/original", "b" * 64, files),
        output=CheckpointRecord("models/it's scrubbed", "e" * 64, files) if edit else None,
        environment=Environment("0.1.0", "3.11", "2.13", "5.23", "Linux", "cpu", "float32", 0),
        texts=records,
        controls=(),
        locality=LocalityRecord(20_000, 0.002, 0.009, 0.02, 0.97, 1.004, 0.01, 1.02, 0.95) if edit else None,
        neighbours=NeighbourRecord(12, 900, 890) if edit else None,
        edit=_edit() if edit else None,
        verdict=decide(judged(records), fixing=edit),
        benign=BenignRecord(32, 0, 0, 0, 1, 1, 0, 0, 0.0, 0.8, 0.05) if edit else None,
    )
    return summarised(report)


def _edit() -> EditRecord:
    tensors = tuple(
        TensorRecord(
            f"model.layers.{layer}.{name}.weight", "model.safetensors", 64, 64 * 16, "1" * 64, "2" * 64, "columns",
            "0-15", "0-63", 64, tuple(round(0.001 * (layer + 1) * (bin % 8), 4) for bin in range(64)),
        )
        for layer in range(4) for name in ("mlp.down_proj", "self_attn.o_proj")
    )  # fmt: skip
    return EditRecord("next-best", "joint", "mlp+attention", ("mlp+attention",), 90, 80, 7, 0.001, 4096, 0, tensors)
