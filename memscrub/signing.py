"""Sign a checkpoint directory and verify it offline; knows digests and statements, not models or policies.

Three files are added to a directory, and only they are outside the signature:

    model.sig                    OpenSSF model-signing bundle over every other file, the report included
    memscrub-report.dsse.json    in-toto test-result about the checkpoint and its report, on every run
    memscrub-summary.dsse.json   in-toto simple verification result, only on a pass

The order is: write `memscrub-report.json`, `sign_directory`, `sign_report`. `verify_directory` needs the
directory and the public key. Nothing in a payload is looked at before its signature was checked.

The bundle is written here rather than by the model_signing package, because that signs with EC keys only and
imports the Sigstore client; `tests/test_signing.py` holds the two to each other in both directions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from memscrub.errors import SignatureInvalidError, UsageError
from memscrub.files import cache_link_roots, digest_names, list_files, strict_json, write_json
from memscrub.keys import PublicKey, generate_keypair, load_private_key, load_public_key
from memscrub.statements import (
    MODEL_PREDICATE,
    PAYLOAD_TYPE,
    REPORT,
    REPORT_ENVELOPE,
    SIGNATURE,
    SUMMARY_ENVELOPE,
    SUMMARY_PREDICATE,
    TEST_RESULT_PREDICATE,
    UNSIGNED_FILES,
    check_statement,
    model_statement,
    parse_manifest,
    root_digest,
    statement_bytes,
    summary_result,
    test_result,
)

__all__ = [
    "Statement",
    "Verification",
    "generate_keypair",
    "sign_directory",
    "sign_report",
    "verify_directory",
]

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"

_MAX_SIGNATURE_FILE = 64 << 20


@dataclass(frozen=True)
class Statement:
    """A verified claim: which file carried it, its predicate type, and its predicate."""

    file: str
    predicate_type: str
    predicate: Mapping[str, Any]


@dataclass(frozen=True)
class Verification:
    """What a verified directory proves: these files, with this root digest, were signed by this key.

    `files` maps each covered file to its SHA-256. `result` is the report's signed verdict, `PASSED` or
    `FAILED`, and None where the directory holds no report.
    """

    root_digest: str
    key_id: str
    files: Mapping[str, str]
    statements: tuple[Statement, ...]
    result: str | None


def sign_directory(
    directory: str | Path, private_key: str | Path, *, password: str | None = None, workers: int | None = None
) -> str:
    """Sign every file of `directory` into `model.sig` and return the root digest.

    Raises:
        UsageError: the key cannot be used; the directory is empty, is none, or holds links or special files.
        OutputError: `model.sig` cannot be written.
        IncompleteError: a file cannot be read, or the disk is full.
    """
    key = load_private_key(private_key, password)
    root = _directory(directory)
    names = [name for name in list_files(root, error=UsageError) if name not in UNSIGNED_FILES]
    if not names:
        raise UsageError(f"{directory} holds no files to sign.")
    digests = digest_names(root, sorted(names, key=PurePosixPath), workers=workers)
    payload = model_statement(_model_name(root), digests)
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key.public.key_id}, "tlogEntries": []},
        "dsseEnvelope": key.envelope(payload, PAYLOAD_TYPE, key_id=""),
    }
    write_json(root / SIGNATURE, bundle)
    return root_digest(digests)


def sign_report(
    report: str | Path,
    private_key: str | Path,
    *,
    passed: bool,
    policy_digests: Mapping[str, str],
    passed_tests: Sequence[str] = (),
    failed_tests: Sequence[str] = (),
    properties: Sequence[str] = ("MEMSCRUB_POLICY_MET",),
    time_created: str | None = None,
    password: str | None = None,
) -> tuple[Path, ...]:
    """Sign the verdict of `report`, which `model.sig` beside it must cover already; return the envelopes.

    `policy_digests` maps the policy's file name to its SHA-256. The test-result envelope is always written,
    the summary only when `passed`, with the `properties` it asserts; an older summary is deleted otherwise.
    Test ids and properties are published: they must not contain protected text.

    Raises:
        UsageError: the key cannot be used, the report is not in its place, or the verdict contradicts itself.
        SignatureInvalidError: `model.sig` is missing, by another key, or does not cover the report as it is.
        OutputError, IncompleteError: an envelope cannot be written.
    """
    if passed and failed_tests:
        raise UsageError("A report with failed tests cannot be signed as passed.")
    path = Path(report)
    root = _directory(path.parent)
    if path.name != REPORT or not path.is_file():
        raise UsageError(f"{report} is not a file named {REPORT} in the signed directory.")
    key = load_private_key(private_key, password)
    manifest = _verified_manifest(root, key.public, list_files(root, error=UsageError))
    digest = digest_names(root, [REPORT])[REPORT]
    if manifest.get(REPORT) != digest:
        raise SignatureInvalidError(f"{SIGNATURE} does not cover {REPORT} as it is; sign the directory again.")
    subjects = {_model_name(root): root_digest(manifest), REPORT: digest}
    result = test_result(passed, policy_digests, passed_tests, failed_tests)
    written = [root / REPORT_ENVELOPE]
    write_json(written[0], key.envelope(statement_bytes(subjects, TEST_RESULT_PREDICATE, result), PAYLOAD_TYPE))
    if not passed:
        (root / SUMMARY_ENVELOPE).unlink(missing_ok=True)
        return tuple(written)
    summary = summary_result(policy_digests, properties, time_created)
    written.append(root / SUMMARY_ENVELOPE)
    write_json(written[1], key.envelope(statement_bytes(subjects, SUMMARY_PREDICATE, summary), PAYLOAD_TYPE))
    return tuple(written)


def verify_directory(directory: str | Path, public_key: str | Path, *, workers: int | None = None) -> Verification:
    """Check every signature and every byte of a signed directory, offline.

    Raises:
        SignatureInvalidError: no signature, another key, a malformed file, or any file changed, added,
            removed or renamed; the message names the file.
        UsageError: the public key or the directory is missing or of an unsupported kind.
        IncompleteError: a file cannot be read.
    """
    key = load_public_key(public_key)
    root = _directory(directory)
    present = list_files(root, error=SignatureInvalidError, link_roots=cache_link_roots(root))
    manifest = _verified_manifest(root, key, present)
    _compare_names(manifest, present)
    actual = digest_names(root, manifest, workers=workers)
    for name, digest in actual.items():
        if digest != manifest[name]:
            raise SignatureInvalidError(f"{name} was changed after it was signed.")
    statements = _verify_statements(root, key, manifest, present)
    result = str(statements[0].predicate["result"]) if statements else None
    return Verification(root_digest(manifest), key.key_id, dict(manifest), statements, result)


def _directory(directory: str | Path) -> Path:
    root = Path(os.path.realpath(directory))
    if not root.is_dir():
        raise UsageError(f"{directory} is not a directory.")
    return root


def _model_name(root: Path) -> str:
    # Informative only, but a signature made in `DIR.partial/` should speak of `DIR`.
    return root.name.removesuffix(".partial")


def _verified_manifest(root: Path, key: PublicKey, present: Sequence[str]) -> dict[str, str]:
    """The files and digests that `model.sig` vouches for, after its signature was checked."""
    if SIGNATURE not in present:
        raise SignatureInvalidError(f"{root} carries no signature: it has no {SIGNATURE}.")
    bundle = _read_json(root, SIGNATURE)
    material = bundle.get("verificationMaterial")
    if set(bundle) != {"mediaType", "verificationMaterial", "dsseEnvelope"} or bundle["mediaType"] != BUNDLE_TYPE:
        raise SignatureInvalidError(f"{SIGNATURE} is not a model signature bundle.")
    if not isinstance(material, dict) or set(material) != {"publicKey", "tlogEntries"} or material["tlogEntries"]:
        raise SignatureInvalidError(f"{SIGNATURE} was not made with a key pair; verify it with model_signing.")
    if material["publicKey"] != {"hint": key.key_id}:
        raise SignatureInvalidError(f"{SIGNATURE} was made with another key than {key.path.name}.")
    statement = _open_envelope(bundle["dsseEnvelope"], SIGNATURE, key, key_id="")
    subjects, predicate = check_statement(statement, SIGNATURE, MODEL_PREDICATE)
    manifest = parse_manifest(predicate)
    if list(subjects.values()) != [root_digest(manifest)]:
        raise SignatureInvalidError(f"{SIGNATURE} contradicts itself: its root digest is not that of its files.")
    return manifest


def _compare_names(manifest: Mapping[str, str], present: Sequence[str]) -> None:
    for name in sorted(manifest.keys() - set(present)):
        raise SignatureInvalidError(f"{name} was signed but is missing.")
    for name in sorted(set(present) - manifest.keys() - set(UNSIGNED_FILES)):
        hint = "; delete what the download left" if name.startswith((".cache/", ".gitattributes")) else ""
        raise SignatureInvalidError(f"{name} was added after the directory was signed{hint}.")


def _verify_statements(
    root: Path, key: PublicKey, manifest: Mapping[str, str], present: Sequence[str]
) -> tuple[Statement, ...]:
    """The statements about the report: none without one; test-result first, summary exactly on a pass."""
    envelopes = [name for name in (REPORT_ENVELOPE, SUMMARY_ENVELOPE) if name in present]
    if REPORT not in manifest:
        for name in envelopes:
            raise SignatureInvalidError(f"{name} speaks of a {REPORT} that is not there.")
        return ()
    if REPORT_ENVELOPE not in present:
        raise SignatureInvalidError(f"{REPORT} carries no signed statement: {REPORT_ENVELOPE} is missing.")
    _read_json(root, REPORT)  # a report that can be read in two ways is refused, signed or not
    result = _verify_statement(root, key, manifest, REPORT_ENVELOPE, TEST_RESULT_PREDICATE)
    verdict = result.predicate.get("result")
    if verdict not in ("PASSED", "FAILED"):
        raise SignatureInvalidError(f"{REPORT_ENVELOPE} states neither PASSED nor FAILED.")
    if (verdict == "PASSED") != (SUMMARY_ENVELOPE in present):
        state = "is missing, although" if verdict == "PASSED" else "is there, although"
        raise SignatureInvalidError(f"{SUMMARY_ENVELOPE} {state} {REPORT_ENVELOPE} states {verdict}.")
    if verdict == "FAILED":
        return (result,)
    return result, _verify_statement(root, key, manifest, SUMMARY_ENVELOPE, SUMMARY_PREDICATE)


def _verify_statement(
    root: Path, key: PublicKey, manifest: Mapping[str, str], file: str, predicate_type: str
) -> Statement:
    statement = _open_envelope(_read_json(root, file), file, key, key_id=key.key_id)
    subjects, predicate = check_statement(statement, file, predicate_type)
    report = subjects.pop(REPORT, None)
    if report != manifest[REPORT]:
        raise SignatureInvalidError(f"{file} speaks of another {REPORT} than the one that is there.")
    if list(subjects.values()) != [root_digest(manifest)]:
        raise SignatureInvalidError(f"{file} speaks of another checkpoint than the one that {SIGNATURE} covers.")
    return Statement(file, predicate_type, predicate)


def _open_envelope(envelope: Any, file: str, key: PublicKey, *, key_id: str) -> dict[str, Any]:
    """The statement in a DSSE envelope, parsed only after `key` was found to have signed its bytes."""
    payload = key.open_envelope(envelope, file, PAYLOAD_TYPE, key_id=key_id)
    try:
        statement = strict_json(payload)
    except ValueError as problem:
        raise SignatureInvalidError(f"The statement in {file} cannot be used: {problem}.") from None
    if not isinstance(statement, dict):
        raise SignatureInvalidError(f"The statement in {file} is not a JSON object.")
    return statement


def _read_json(root: Path, name: str) -> dict[str, Any]:
    path = root / name
    try:
        if path.stat().st_size > _MAX_SIGNATURE_FILE:
            raise SignatureInvalidError(f"{name} is too large to be genuine.")
        value = strict_json(path.read_bytes())
    except OSError as problem:
        raise SignatureInvalidError(f"{name} cannot be read: {problem.strerror}.") from None
    except ValueError as problem:
        raise SignatureInvalidError(f"{name} cannot be used: {problem}.") from None
    if not isinstance(value, dict):
        raise SignatureInvalidError(f"{name} is not a JSON object.")
    return value
