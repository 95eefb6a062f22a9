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
from memscrub.records import broken_locality, judged
from memscrub.report import REPORT_NAME, LocalityRecord, Report, load_report
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
    locality, remarks = _signed_locality(Path(directory), verification, inputs.policy.locality)
    broken = broken_locality(locality) if locality is not None else []
    verdict = decide(judged(report.texts), broken)
    return Gated(replace(report, locality=locality, verdict=verdict), verification, tuple(remarks))


def _signed_locality(
    directory: Path, verification: Verification | None, limits: Locality
) -> tuple[LocalityRecord | None, Sequence[str]]:
    """The locality that the directory's own report states, held against this policy's limits."""
    path = directory / REPORT_NAME
    if not path.is_file():
        return None, ["no memscrub report in the directory: locality was not judged."]
    if verification is None:
        return None, ["no key given: signature not checked, and the report's locality not believed."]
    if REPORT_NAME not in verification.files:
        raise SignatureInvalidError(f"{path}: the signature does not cover the report.")
    stated = load_report(path).locality
    if stated is None:
        return None, ["the report states no locality: it was not judged."]
    current = replace(
        stated,
        max_kl=limits.max_kl,
        max_perplexity_ratio=limits.max_perplexity_ratio,
        min_agreement=limits.min_agreement,
    )
    return current, []
