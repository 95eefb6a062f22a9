"""Who signs a fix, and what the signature states of it; knows reports and policies, not how a fix is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from memscrub.errors import UsageError
from memscrub.policy.document import Policy
from memscrub.proof.keys import PASSWORD_VARIABLE, PrivateKey, key_id_of, load_private_key
from memscrub.proof.provenance import provenance_of
from memscrub.proof.signing import Signer, sign_directory, sign_report
from memscrub.reports.report import REPORT_NAME, Report
from memscrub.reports.verdict import Outcome

SIGSTORE = Path("sigstore")
"""In place of a key: whoever runs this signs, as Sigstore knows them. A key file of that name needs its full path."""


@dataclass(frozen=True)
class Signing:
    """The private key that signs, and its passphrase where it has one; or `Path("sigstore")`.

    `trust_config` names the services of another Sigstore instance than the public one.
    """

    key: Path | str
    password: str | None = None
    trust_config: Path | None = None

    def signer(self) -> Signer:
        """The opened key or identity. Raises UsageError or IncompleteError where there is none to sign with."""
        if str(self.key) != str(SIGSTORE):
            if self.trust_config is not None:
                raise UsageError("--trust-config belongs to `--sign sigstore`; a key needs none.")
            return load_private_key(self.key, self.password)
        from memscrub.proof.sigstore_signing import SigstoreSigner

        return SigstoreSigner(self.trust_config)


def signer_for(policy: Policy, sign: Signing | None) -> Signer | None:
    """Who signs, the caller's choice before the policy's; opened now, so that a bad key fails early."""
    if sign is None and policy.sign.key is not None:
        named = SIGSTORE if policy.sign.key == str(SIGSTORE) else policy.resolve(policy.sign.key)
        sign = Signing(named, os.environ.get(PASSWORD_VARIABLE))
    signer = None if sign is None else sign.signer()
    if signer is not None and policy.sign.key_id is not None:
        pinned = key_id_of(policy.sign.key_id)
        if not isinstance(signer, PrivateKey) or signer.public.key_id != pinned:
            raise UsageError(f"{policy.path}: [sign] key_id asks for the key sha256:{pinned}; sign with that one.")
    return signer


def sign_fix(directory: Path, report: Report, policy: Policy, signer: Signer) -> None:
    """Sign the directory of a fix with its report in it, and state the verdict and what it was made from."""
    sign_directory(directory, signer, known=None if report.output is None else report.output.files)
    failed = [r.id for r in report.texts if r.after_judgement and r.after_judgement.status.value == "violated"]
    passed = report.verdict.outcome is Outcome.PASS
    sign_report(
        directory / REPORT_NAME,
        signer,
        passed=passed,
        policy_digests={policy.path.name: policy.digest},
        failed_tests=() if passed else failed,
        time_created=report.created,
        provenance=provenance_of(report, report.edit.patch_sha256 if report.edit else None),
    )
