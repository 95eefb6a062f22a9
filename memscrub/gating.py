"""The gate: may this directory be released under this policy? Checks the signature, then measures the bytes again.

Locality cannot be measured without the original checkpoint: it is taken from the directory's report, and only
believed when the report's signature was verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from memscrub.errors import SignatureInvalidError
from memscrub.measure import Progress, silent
from memscrub.policy import Policy
from memscrub.policy_sections import Locality
from memscrub.records import Ordinary, broken_locality, judged
from memscrub.report import REPORT_NAME, Report, load_report
from memscrub.scanning import open_inputs, scan_inputs
from memscrub.signing import Verification, verify_directory
from memscrub.verdict import decide


@dataclass(frozen=True)
class Gated:
    """What the gate found: its report, the verified signature (None when no key was given), and remarks."""

    report: Report
    verification: Verification | None
    remarks: tuple[str, ...]


def gate(
    directory: str | Path,
    policy: str | Path | Policy,
    *,
    key: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Gated:
    """Measure `directory` against `policy`; with `key`, verify its signature first.

    Raises SignatureInvalidError when a signature does not hold, UsageError and IncompleteError as `scan` does.
    """
    verification = None if key is None else verify_directory(directory, key)
    inputs = open_inputs(directory, policy, device=device, dtype=dtype, seed=seed)
    report = scan_inputs(inputs, progress=progress, kind="gate")
    ordinary, remarks = _signed_ordinary(Path(directory), verification, inputs.policy.locality)
    verdict = decide(judged(report.texts), broken_locality(ordinary))
    report = replace(
        report,
        locality=ordinary.locality,
        neighbours=ordinary.neighbours,
        benign=ordinary.benign,
        verdict=verdict,
    )
    return Gated(report, verification, tuple(remarks))


def _signed_ordinary(
    directory: Path, verification: Verification | None, limits: Locality
) -> tuple[Ordinary, Sequence[str]]:
    """What the directory's own report states of ordinary text, held against this policy's limits."""
    nothing = Ordinary(None, None, None)
    path = directory / REPORT_NAME
    if not path.is_file():
        return nothing, ["no memscrub report in the directory: locality was not judged."]
    if verification is None:
        return nothing, ["no key given: signature not checked, and the report's locality not believed."]
    if REPORT_NAME not in verification.files:
        raise SignatureInvalidError(f"{path}: the signature does not cover the report.")
    stated = load_report(path)
    ordinary = Ordinary(stated.locality, stated.neighbours, stated.benign).under(limits)
    remarks = []
    if ordinary.locality is None:
        remarks.append("the report states no locality: it was not judged.")
    if ordinary.neighbours is None and limits.min_neighbours_kept is not None:
        remarks.append("the report states nothing on neighbours: min_neighbours_kept was not judged.")
    if ordinary.benign is None and ordinary.locality is not None:
        remarks.append("the report states nothing on benign prompts: max_degenerate was not judged.")
    return ordinary, remarks
