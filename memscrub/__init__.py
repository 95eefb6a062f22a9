"""memscrub: measure, remove and prove the removal of protected texts from a language model's checkpoint.

    import memscrub

    report = memscrub.scan("checkpoint/", "policy.toml")        # what does it give away?
    print(report.verdict.outcome, report.verdict.reasons)

    fixed = memscrub.fix("checkpoint/", "policy.toml", "scrubbed/", sign=memscrub.Signing(Path("key.pem")))
    gated = memscrub.gate("scrubbed/", "policy.toml", key="pub.pem")
    memscrub.verify("scrubbed/", "pub.pem")                     # signature and digests, offline
    memscrub.check_edit("scrubbed/", "checkpoint/")             # nothing but the stated edit differs

These return the same frozen report objects that the command line prints. Nothing is imported before it is
used, so that `import memscrub` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memscrub.jobs.gating import Gated as Gated
    from memscrub.jobs.gating import gate as gate
    from memscrub.jobs.scanning import scan as scan
    from memscrub.jobs.scrub import Fixed as Fixed
    from memscrub.jobs.scrub import Signing as Signing
    from memscrub.jobs.scrub import fix as fix
    from memscrub.policy.document import Policy as Policy
    from memscrub.policy.document import load_policy as load_policy
    from memscrub.proof.edit_ledger import check_edit as check_edit
    from memscrub.proof.signing import verify_directory as verify
    from memscrub.reports.report import Report as Report
    from memscrub.reports.report import load_report as load_report

__version__ = version("memscrub")

_HOMES = {
    "Fixed": ("memscrub.jobs.scrub", "Fixed"),
    "Gated": ("memscrub.jobs.gating", "Gated"),
    "Policy": ("memscrub.policy.document", "Policy"),
    "Report": ("memscrub.reports.report", "Report"),
    "Signing": ("memscrub.jobs.scrub", "Signing"),
    "check_edit": ("memscrub.proof.edit_ledger", "check_edit"),
    "fix": ("memscrub.jobs.scrub", "fix"),
    "gate": ("memscrub.jobs.gating", "gate"),
    "load_policy": ("memscrub.policy.document", "load_policy"),
    "load_report": ("memscrub.reports.report", "load_report"),
    "scan": ("memscrub.jobs.scanning", "scan"),
    "verify": ("memscrub.proof.signing", "verify_directory"),
}

__all__ = [
    "Fixed",
    "Gated",
    "Policy",
    "Report",
    "Signing",
    "__version__",
    "check_edit",
    "fix",
    "gate",
    "load_policy",
    "load_report",
    "scan",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memscrub' has no attribute '{name}'")
    module, attribute = _HOMES[name]
    value = getattr(import_module(module), attribute)
    # Kept: the next access finds it without this function.
    globals()[name] = value
    return value
