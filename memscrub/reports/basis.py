"""What a report's measures rest on beside the weights, as digests: the settings that decide what is measured, and the
lists under the policy's report key. Knows the policy and its texts, not how anything is measured.

Two reports with one basis measured the same things. Limits that measures are only held against are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from memscrub.errors import UsageError
from memscrub.policy.document import Policy
from memscrub.reports.records import BasisRecord
from memscrub.texts.protected import ProtectedList, list_digest

# To be raised when the definition of a measure changes: what was measured before is then no longer the same thing.
# 2: secrets that nothing predicts are counted, not passed over; a run that was in no doubt counts beside those that
# were decoded; `screened` is said of every text with an opening that was not decoded.
MEASURES = 2
_LONGEST_KEY = 1 << 20
_PROBE = (
    "prefix_tokens",
    "suffix_tokens",
    "near_verbatim_prefix",
    "near_verbatim_tokens",
    "offsets",
    "min_prefix_tokens",
)
# `max_verbatim_tokens` is a limit and a setting: it is the width of the sampled window, and runs are confirmed by
# decoding only where they could pass it.
_CLASS = ("max_verbatim_tokens", "like_controls", "top_k", "top_p", "temperature")


def basis_of(policy: Policy, protected: ProtectedList, controls: ProtectedList) -> BasisRecord:
    """The basis of measures under this policy with these lists. Raises UsageError where the report key is unusable."""
    key = report_key(policy)
    return BasisRecord(
        settings_sha256=settings_digest(policy),
        protected_hmac_sha256=None if key is None else list_digest(protected.texts, key),
        controls_hmac_sha256=None if key is None else list_digest(controls.texts, key),
    )


def settings_digest(policy: Policy) -> str:
    """SHA-256 over the settings that decide what is measured, in hex."""
    classes = {
        name: {**{key: getattr(limits, key) for key in _CLASS}, "near_verbatim": limits.max_near_verbatim is not None}
        for name, limits in policy.classes.items()
    }
    settings = {"measures": MEASURES, "probe": {key: getattr(policy.probe, key) for key in _PROBE}, "classes": classes}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode("ascii")).hexdigest()


def report_key(policy: Policy) -> bytes | None:
    """The secret that keys digests of lists in reports; None where the policy names none."""
    if policy.report.key is None:
        return None
    return _read_key(policy.resolve(policy.report.key))


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:  # not all of it: /dev/zero has no end
            data = file.read(_LONGEST_KEY + 1)
    except OSError as error:
        raise UsageError(f"{path}: the report key cannot be read ({error.strerror}); check the path.") from None
    if len(data) > _LONGEST_KEY:
        raise UsageError(f"{path}: larger than 1 MiB, so not a report key; make one with `openssl rand -hex 32`.")
    key = data.strip()
    if len(key) < 16:
        raise UsageError(f"{path}: the report key is shorter than 16 bytes; make one with `openssl rand -hex 32`.")
    return key
