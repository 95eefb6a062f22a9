"""The measures of a signed report, judged by a policy instead of measured again; loads no model and no torch.

Whoever holds the signing key vouches for the report. What is checked here is that the report answers the question
asked now: that it measured exactly these files, exactly these texts, and with the settings of this policy. Limits are
free to differ: measures are held against those of the policy at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from memscrub.errors import IncompleteError, SignatureInvalidError, UntrustedMeasuresError
from memscrub.policy.document import Policy
from memscrub.policy.sections import ClassLimits
from memscrub.proof.signing import Verification
from memscrub.reports.basis import basis_of
from memscrub.reports.control_limits import filled
from memscrub.reports.judgement import judge
from memscrub.reports.records import TrustRecord
from memscrub.reports.report import (
    REPORT_NAME,
    SCHEMA,
    CheckpointRecord,
    PolicyRecord,
    ProtectedRecord,
    Report,
    TextRecord,
    parse_report,
)
from memscrub.reports.standing import judged, timestamp
from memscrub.reports.summary import rejudged
from memscrub.reports.verdict import decide
from memscrub.reports.waivers import check_waivers
from memscrub.storage.files import tree_digest
from memscrub.texts.protected import ProtectedList, load_controls, load_protected


def signed_report(directory: Path, verification: Verification) -> Report | None:
    """The report of a verified directory, from the very bytes that were signed; None where there is none.

    Raises SignatureInvalidError where the report is not what the signature covers.
    """
    path = directory / REPORT_NAME
    if not path.is_file():
        return None
    if REPORT_NAME not in verification.files:
        raise SignatureInvalidError(f"{path}: the signature does not cover the report.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IncompleteError(f"{path}: the report cannot be read ({error.strerror}).") from None
    if hashlib.sha256(data).hexdigest() != verification.files[REPORT_NAME]:
        raise SignatureInvalidError(f"{path} was changed after it was signed.")
    return parse_report(data, path)


def trusted_measures(
    directory: Path, stated: Report | None, policy: Policy, verification: Verification, *, dtype: str = "auto"
) -> Report:
    """A gate's report made of the measures in the signed one, held against `policy`; locality is left out.

    Raises UntrustedMeasuresError, with the reason, where these measures are not what `policy` asks for.
    """
    if stated is None:
        raise UntrustedMeasuresError("the directory holds no report.")
    protected, controls = load_protected(policy), load_controls(policy)
    check_waivers(policy, protected)
    if reason := _of_other_files(stated, verification) or _of_other_texts(stated, policy, protected, controls, dtype):
        raise UntrustedMeasuresError(reason)
    limits = _limits(policy, stated.controls)
    texts = tuple(_judged_again(record, limits) for record in stated.texts)
    report = Report(
        schema=SCHEMA,
        kind="gate",
        created=timestamp(),
        policy=PolicyRecord(policy.name, policy.digest, str(policy.path)),
        protected=ProtectedRecord(len(protected), len(protected.duplicates), stated.protected.hmac_sha256),
        input=CheckpointRecord(str(directory), tree_digest(dict(verification.files)), dict(verification.files)),
        output=None,
        environment=stated.environment,
        texts=texts,
        controls=tuple(_judged_again(record, limits) for record in stated.controls),
        locality=None,
        neighbours=None,
        edit=None,
        verdict=decide(judged(texts)),
        classes=stated.classes,
        depths=stated.depths,
        basis=stated.basis,
        trusted=TrustRecord(
            kind=stated.kind,
            created=stated.created,
            memscrub=stated.environment.memscrub,
            policy_sha256=stated.policy.sha256,
            report_sha256=verification.files[REPORT_NAME],
            key_id=verification.key_id,
        ),
    )
    return rejudged(report)


def _of_other_files(stated: Report, verification: Verification) -> str | None:
    """Why the report is not about exactly the files that are signed beside it."""
    measured = stated.output if stated.kind == "fix" else stated.input
    if stated.kind not in ("fix", "scan", "gate") or measured is None or stated.trusted is not None:
        return "its report is not that of a measurement."
    if stated.adapter is not None:
        return "its report was measured with an adapter in memory, which is not among the files."
    signed = {name: digest for name, digest in verification.files.items() if name != REPORT_NAME}
    return None if measured.files == signed else "its report is about other files than those that are signed."


def _of_other_texts(
    stated: Report, policy: Policy, protected: ProtectedList, controls: ProtectedList, dtype: str
) -> str | None:
    """Why the report does not measure what this policy asks for."""
    here, there = basis_of(policy, protected, controls), stated.basis
    if here.protected_hmac_sha256 is None:
        return f"{policy.path} names no [report] key, and without one nothing tells that the same list was measured."
    if there is None:
        return "its report does not state what was measured: it is of an earlier memscrub."
    if there.protected_hmac_sha256 is None:
        return "its report carries no digest of the list that was measured: the policy named no [report] key then."
    if here.protected_hmac_sha256 != there.protected_hmac_sha256:
        return "its report was made with another list of protected texts, or another [report] key."
    if here.controls_hmac_sha256 != there.controls_hmac_sha256:
        return "its report was made with another list of control texts."
    if here.settings_sha256 != there.settings_sha256:
        return (
            "its report was made with other settings of what is measured: [probe], or max_verbatim_tokens,"
            " max_near_verbatim (set or not), like_controls or the sampling of a class; or by a memscrub that defines"
            " measures otherwise."
        )
    if dtype not in ("auto", stated.environment.dtype):
        return f"its report was measured in {stated.environment.dtype}, and {dtype} is asked for."
    if any(record.latest.screened for record in stated.texts):
        return "its report holds estimates of a scan that was screened."
    if stated.kind == "fix" and any(record.after is None for record in (*stated.texts, *stated.controls)):
        return "its report lacks measures after the edit."
    for texts, records, what in ((protected, stated.texts, "texts"), (controls, stated.controls, "control texts")):
        if sorted((t.id, t.class_name) for t in texts) != sorted((r.id, r.class_name) for r in records):
            return f"its report lacks {what} of the list."
    return None


def _limits(policy: Policy, controls: Sequence[TextRecord]) -> dict[str, ClassLimits]:
    """The limits of every class; those of `like_controls` from what the report says of the controls."""
    return {
        name: filled(limits, [each.latest for each in controls if each.class_name == name])
        if limits.like_controls
        else limits
        for name, limits in policy.classes.items()
    }


def _judged_again(record: TextRecord, limits: Mapping[str, ClassLimits]) -> TextRecord:
    """What was measured last, as the gate's own measure of the text."""
    now = judge(record.latest, limits[record.class_name])
    return replace(record, before=record.latest, before_judgement=now, after=None, after_judgement=None, excused=())
