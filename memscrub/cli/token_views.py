"""Token strips for the page: reads a report's checkpoints again and marks the tokens of the texts worth a look.

Knows checkpoints, the policy's lists and the report, no markup. Strips are made for one page and kept nowhere else: a
report ships beside the weights, where probabilities of single tokens would help to guess a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from memscrub.errors import UsageError
from memscrub.faces.html_rows import STANDINGS, standing
from memscrub.faces.html_tokens import TokenView, strip
from memscrub.jobs.foreign_lists import ForeignSource
from memscrub.jobs.records import adapter_record
from memscrub.jobs.scanning import Inputs, open_inputs
from memscrub.measures.extraction import scored
from memscrub.measures.measure import Progress, sampling_of, silent
from memscrub.models.tokens import TokenText, decoded
from memscrub.policy.document import Policy, load_policy
from memscrub.reports.judgement import Status
from memscrub.reports.report import CheckpointRecord, Report, TextRecord
from memscrub.storage.checkpoint import digest_files, open_checkpoint

# So many texts get strips, those that need a look first.
TEXTS = 500


def token_views(
    report: Report,
    policy: str | Path | Policy,
    *,
    reveal: bool = False,
    texts: int = TEXTS,
    foreign: ForeignSource | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> dict[str, TokenView]:
    """Strips by text id for at most `texts` texts, those that break limits first, then those that did.

    The checkpoints are those that the report names, read from disk; a fix that was withheld has strips of the original
    only. With `reveal` the strips carry the tokens themselves. `foreign` is the list that was measured in place of the
    policy's. Raises UsageError where policy, list or checkpoint are not those of the report.
    """
    rules = policy if isinstance(policy, Policy) else load_policy(policy)
    if rules.digest != report.policy.sha256:
        raise UsageError(f"{rules.path}: the report was made with another policy; give the one that it was made with.")
    wanted = {text.id: text for text in sorted(report.texts, key=_need)[:texts]}
    found = _marked(report, report.input, rules, wanted, foreign, device, progress, reveal=reveal)
    if report.output is not None and _is_there(report.output):
        after = _marked(report, report.output, rules, wanted, foreign, device, progress)
        found = {id: replace(view, after=after[id].before) for id, view in found.items()}
    return found


def _is_there(record: CheckpointRecord) -> bool:
    """Whether a written checkpoint lies where the report says; one that was withheld does not."""
    path = Path(record.path)
    return path.is_dir() and record.files.items() <= digest_files(open_checkpoint(path)).items()


def _need(text: TextRecord) -> tuple[int, int]:
    """What orders texts for those who look: where they stand now, then where they stood."""
    return STANDINGS.index(standing(text)), int(text.before_judgement.status is not Status.VIOLATED)


def _marked(
    report: Report,
    record: CheckpointRecord,
    policy: Policy,
    wanted: Mapping[str, TextRecord],
    foreign: ForeignSource | None,
    device: str,
    progress: Progress,
    *,
    reveal: bool = False,
) -> dict[str, TokenView]:
    """The wanted texts' strips under one checkpoint, as `before`."""
    made = report.environment
    inputs = open_inputs(
        record.path,
        policy,
        device=device,
        dtype=made.dtype,
        seed=made.seed,
        foreign=foreign,
        adapter=None if report.adapter is None else report.adapter.path,
    )
    # A written directory has its report and signatures beside the files that the report could name.
    if not record.files.items() <= digest_files(inputs.ckpt).items():
        raise UsageError(f"{record.path}: this is not the checkpoint that the report is about; its files differ.")
    added, stated = inputs.adapter, report.adapter
    if added is not None and stated is not None and not stated.files.items() <= adapter_record(added).files.items():
        raise UsageError(f"{stated.path}: this is not the adapter that the report is about; its files differ.")
    texts = [text for text in inputs.texts if text.id in wanted]
    first = policy.probe.min_prefix_tokens
    judged = {text.id: max(0, len(text.tokens) - text.first_judged(first)) for text in texts}
    if judged != {id: text.latest.tokens for id, text in wanted.items()}:
        raise UsageError(f"{policy.path}: its protected texts are not those that the report is about.")
    stream = scored(
        inputs.loaded,
        texts,
        lambda text: sampling_of(policy.classes[text.class_name]),
        batch_tokens=policy.probe.batch_tokens,
        progress=lambda done: progress("token strips", done, len(texts)),
    )
    return {
        text.id: _view(inputs, text, scores.gap.tolist(), scores.log_p.tolist(), reveal=reveal)
        for text, scores in stream
    }


def _view(inputs: Inputs, text: TokenText, gaps: list[float], log_p: list[float], *, reveal: bool) -> TokenView:
    first = max(1, text.start)
    return TokenView(
        first=first,
        before=strip(gaps[first - 1 :], log_p[first - 1 :]),
        judged=text.first_judged(inputs.policy.probe.min_prefix_tokens) - first,
        secrets=text.secrets,
        tokens=tuple(decoded(inputs.loaded, [token]) for token in text.tokens[first:]) if reveal else None,
    )
