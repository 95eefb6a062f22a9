"""Turning a run's measures into the records of a report; measures nothing itself and writes nothing."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from memscrub.locality.utility import Score
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import TokenText
from memscrub.policy.document import Policy
from memscrub.policy.sections import Locality as LocalityLimits
from memscrub.reports.basis import report_key
from memscrub.reports.json_values import plain
from memscrub.reports.judgement import Judgement, Measures, Status, judge
from memscrub.reports.locality_limits import Benign, Locality
from memscrub.reports.report import (
    BenignRecord,
    CheckpointRecord,
    Environment,
    LocalityRecord,
    PolicyRecord,
    ProtectedRecord,
    ScoreRecord,
    TextRecord,
    UtilityRecord,
    check_size,
)
from memscrub.storage.adapters import Adapter
from memscrub.storage.checkpoint import Checkpoint, digest_files
from memscrub.storage.files import tree_digest
from memscrub.texts.protected import ProtectedList, list_digest


def checkpoint_record(source: str, ckpt: Checkpoint, files: Mapping[str, str] | None = None) -> CheckpointRecord:
    """The checkpoint as the user named it, with the digest of every file; `files` where they are known already."""
    digests = digest_files(ckpt) if files is None else dict(files)
    return CheckpointRecord(source, tree_digest(digests), digests)


def adapter_record(adapter: Adapter) -> CheckpointRecord:
    """The adapter that was added to the checkpoint in memory before anything was measured."""
    digests = digest_files(adapter.path)
    return CheckpointRecord(adapter.source, tree_digest(digests), digests)


def environment(loaded: LoadedModel, seed: int) -> Environment:
    """What this run is made with."""
    return Environment(
        memscrub=version("memscrub"),
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        platform=platform.platform(),
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        seed=seed,
    )


def policy_record(policy: Policy) -> PolicyRecord:
    """The policy by name and digest, and the file as it was named."""
    return PolicyRecord(policy.name, policy.digest, str(policy.path))


def protected_record(policy: Policy, texts: ProtectedList) -> ProtectedRecord:
    """The protected list by its size and, with the policy's key, by a digest nobody can guess texts against."""
    key = report_key(policy)
    return ProtectedRecord(len(texts), len(texts.duplicates), None if key is None else list_digest(texts.texts, key))


def text_records(
    policy: Policy,
    texts: Sequence[TokenText],
    before: Sequence[Measures],
    after: Sequence[Measures] | None = None,
) -> tuple[TextRecord, ...]:
    """Each text's measures, judged by its class's limits."""
    records = []
    for index, (text, measures) in enumerate(zip(texts, before, strict=True)):
        limits = policy.classes[text.class_name]
        place = None if text.file is None else Path(os.path.relpath(text.file, policy.base)).as_posix()
        record = TextRecord(text.id, text.class_name, measures, judge(measures, limits), file=place, line=text.line)
        if after is not None:
            now = after[index]
            record = replace(record, after=now, after_judgement=judge(now, limits))
        records.append(record)
    return tuple(records)


def check_room(
    policy: Policy, texts: Sequence[TokenText], controls: Sequence[TokenText], *, edited: bool = False
) -> None:
    """Refuse more texts than a report has room for, before they are measured; `edited`: they are measured twice.

    What is measured makes a record larger than it is reckoned here, so a report may still turn out too large when it
    is written; none is refused that would fit. Raises UsageError.
    """
    least = {name: _least_bytes(policy, name, edited=edited) for name in policy.classes}
    counts = Counter(text.class_name for text in (*texts, *controls))
    check_size(len(texts) + len(controls), sum(least[name] * count for name, count in counts.items()))


def _least_bytes(policy: Policy, class_name: str, *, edited: bool) -> int:
    """Bytes of the smallest record that a text of this class can have in a report."""
    found = judge(Measures(0, 0, 0, 0), policy.classes[class_name]).findings
    measures, judgement = Measures(0, 0, 0, 0, True, True, 0, 0, (), True, 0), Judgement(Status.WITHIN, found)
    record = TextRecord("", class_name, measures, judgement, samples_needed=(), file="", line=0)
    if edited:
        record = replace(record, after=measures, after_judgement=judgement)
    both = (len(json.dumps({"texts": [plain(record)] * count}, indent=2)) for count in (2, 1))
    return next(both) - next(both)


def locality_record(measured: Locality, limits: LocalityLimits) -> LocalityRecord:
    """Measured locality beside its limits."""
    return LocalityRecord(
        **vars(measured),
        max_kl=limits.max_kl,
        max_perplexity_ratio=limits.max_perplexity_ratio,
        min_agreement=limits.min_agreement,
        max_worst_kl=limits.max_worst_kl,
    )


def benign_record(measured: Benign | None, limits: LocalityLimits) -> BenignRecord | None:
    """What the models said after benign prompts, beside its limit."""
    return None if measured is None else BenignRecord(**vars(measured), max_degenerate=limits.max_degenerate)


def utility_record(tool: str, before: Sequence[Score], after: Sequence[Score]) -> UtilityRecord:
    """Every figure of either run, paired by task and metric."""
    was = {(score.task, score.metric): score.value for score in before}
    now = {(score.task, score.metric): score.value for score in after}
    return UtilityRecord(tool, tuple(ScoreRecord(*key, was.get(key), now.get(key)) for key in sorted({*was, *now})))
