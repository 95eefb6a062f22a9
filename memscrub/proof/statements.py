"""Write and check in-toto statements about a checkpoint; knows their form, not who signed them.

Nothing here is safe to call on a payload whose signature was not checked before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from memscrub.errors import SignatureInvalidError
from memscrub.proof.provenance import Provenance

SIGNATURE = "model.sig"
REPORT = "memscrub-report.json"
REPORT_ENVELOPE = "memscrub-report.dsse.json"
SUMMARY_ENVELOPE = "memscrub-summary.dsse.json"
UNSIGNED_FILES = (REPORT_ENVELOPE, SUMMARY_ENVELOPE, SIGNATURE)
"""The only files a signed directory may hold that `model.sig` does not cover; each has its own signature."""

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MODEL_PREDICATE = "https://model_signing/signature/v1.0"
TEST_RESULT_PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
SUMMARY_PREDICATE = "https://in-toto.io/attestation/svr/v0.2"
VERIFIER_ID = "urn:memscrub:verifier:v1"
# What a summary asserts of a directory.
PROPERTY = "MEMSCRUB_POLICY_MET"


def root_digest(manifest: Mapping[str, str]) -> str:
    """The format's digest of a whole model: SHA-256 over the raw digests in the order of the manifest."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in manifest.values())).hexdigest()


def model_statement(name: str, digests: Mapping[str, str]) -> bytes:
    """The OpenSSF model-signing v1.0 statement about files and their SHA-256."""
    predicate = {
        "serialization": {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": list(UNSIGNED_FILES),
        },
        "resources": [{"name": n, "algorithm": "sha256", "digest": d} for n, d in digests.items()],
    }
    return statement_bytes({name: root_digest(digests)}, MODEL_PREDICATE, predicate)


def test_result(
    passed: bool,
    policy_digests: Mapping[str, str],
    passed_tests: Sequence[str],
    failed_tests: Sequence[str],
    provenance: Provenance | None = None,
) -> dict[str, Any]:
    """The predicate of https://in-toto.io/attestation/test-result/v0.1."""
    made_from = [] if provenance is None else provenance.descriptors()
    return {
        "result": "PASSED" if passed else "FAILED",
        "configuration": [*_descriptors(policy_digests), *made_from],
        "passedTests": list(passed_tests),
        "failedTests": list(failed_tests),
    }


def summary_result(policy_digests: Mapping[str, str], time_created: str | None) -> dict[str, Any]:
    """The predicate of https://in-toto.io/attestation/svr/v0.2; created now unless a time is given."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "verifier": {"id": VERIFIER_ID, "policies": _descriptors(policy_digests)},
        "timeCreated": time_created or now,
        "properties": [PROPERTY],
    }


def _descriptors(digests: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())]


def policies_in(configuration: Any) -> dict[str, str]:
    """The policies, name to SHA-256, of a statement's `configuration`: its entries without a `uri`."""
    entries = [e for e in configuration if isinstance(e, dict)] if isinstance(configuration, list) else []
    digests: dict[str, Any] = {str(e.get("name")): e.get("digest") for e in entries if "uri" not in e}
    return {name: str(digest["sha256"]) for name, digest in digests.items() if _has_sha256(digest)}


def _has_sha256(digest: Any) -> bool:
    return isinstance(digest, dict) and set(digest) == {"sha256"} and _is_digest(digest["sha256"])


def statement_bytes(subjects: Mapping[str, str], predicate_type: str, predicate: Mapping[str, Any]) -> bytes:
    """The bytes of an in-toto Statement v1, checked by the reference implementation."""
    from google.protobuf import json_format  # type: ignore[import-untyped]
    from in_toto_attestation.v1.resource_descriptor import (  # type: ignore[import-untyped]
        ResourceDescriptor,
    )
    from in_toto_attestation.v1.statement import (  # type: ignore[import-untyped]
        Statement as InTotoStatement,
    )

    descriptors = [ResourceDescriptor(name=n, digest={"sha256": d}).pb for n, d in subjects.items()]
    statement = InTotoStatement(descriptors, predicate_type, dict(predicate))
    statement.validate()
    return str(json_format.MessageToJson(statement.pb, indent=None)).encode()


def check_statement(
    statement: Mapping[str, Any], file: str, predicate_type: str
) -> tuple[dict[str, str], Mapping[str, Any]]:
    """Subjects (name to SHA-256) and predicate of a statement that is of the expected type.

    Raises:
        SignatureInvalidError: it is of another type or malformed; `file` is named.
    """
    if statement.get("_type") != STATEMENT_TYPE or statement.get("predicateType") != predicate_type:
        raise SignatureInvalidError(f"{file} holds a statement of another type than {predicate_type}.")
    subjects: dict[str, str] = {}
    entries, predicate = statement.get("subject"), statement.get("predicate")
    for entry in entries if isinstance(entries, list) else []:
        digest = entry.get("digest") if isinstance(entry, dict) else None
        if not isinstance(digest, dict) or not _has_sha256(digest):
            raise SignatureInvalidError(f"{file} holds a subject without a SHA-256 digest.")
        name = entry.get("name")
        if not isinstance(name, str) or name in subjects:
            raise SignatureInvalidError(f"{file} holds subjects without names of their own.")
        subjects[name] = digest["sha256"]
    if not subjects or not isinstance(predicate, dict):
        raise SignatureInvalidError(f"{file} holds a statement about nothing.")
    return subjects, predicate


def parse_manifest(predicate: Mapping[str, Any]) -> dict[str, str]:
    """File names and SHA-256 of a model-signing predicate, in its order.

    Raises:
        SignatureInvalidError: it is malformed, or of a kind that does not list digests of whole files.
    """
    serialization, resources = predicate.get("serialization"), predicate.get("resources")
    if not isinstance(serialization, dict) or not isinstance(resources, list):
        raise SignatureInvalidError(f"{SIGNATURE} lists no files.")
    if serialization.get("method") != "files" or serialization.get("hash_type") != "sha256":
        raise SignatureInvalidError(f"{SIGNATURE} does not list SHA-256 digests of whole files; sign it again.")
    manifest: dict[str, str] = {}
    for entry in resources:
        if not isinstance(entry, dict) or set(entry) != {"name", "algorithm", "digest"}:
            raise SignatureInvalidError(f"{SIGNATURE} has a malformed list of files.")
        name, digest = entry["name"], entry["digest"]
        if entry["algorithm"] != "sha256" or not isinstance(name, str) or not _is_digest(digest):
            raise SignatureInvalidError(f"{SIGNATURE} has a malformed list of files.")
        if name in manifest or name in UNSIGNED_FILES:
            raise SignatureInvalidError(f"{SIGNATURE} lists {name} where it must not.")
        manifest[name] = digest
    return manifest


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")
