"""Sign a checkpoint directory and verify it offline; knows digests and statements, not models or policies.

Three files are added to a directory, and only they are outside the signature:

    model.sig                    OpenSSF model-signing bundle over every other file, the report included
    memscrub-report.dsse.json    in-toto test-result about the checkpoint and its report, on every run
    memscrub-summary.dsse.json   in-toto simple verification result, only on a pass

The order is: write `memscrub-report.json`, `sign_directory`, `sign_report`. `verify_directory` needs the
directory and the public key. Nothing in a payload is looked at before its signature was checked.

A signature file has one spelling (`signature_files`): not even a blank in it can change unnoticed.

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
from memscrub.proof.keys import generate_keypair, key_id_of, load_private_key, load_public_key
from memscrub.proof.provenance import Provenance, contradiction, read_provenance
from memscrub.proof.signature_files import MAX_REPORT, Signer, Verifier, parsed, read_object
from memscrub.proof.statements import (
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
    policies_in,
    root_digest,
    statement_bytes,
    summary_result,
    test_result,
)
from memscrub.storage.files import cache_link_roots, digest_names, list_files, write_json

__all__ = [
    "Signer",
    "Statement",
    "Verification",
    "Verifier",
    "generate_keypair",
    "sign_directory",
    "sign_report",
    "verify_directory",
]


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
    `FAILED`, and None where the directory holds no report. `provenance` is what it was made from, None where no
    statement says so. With Sigstore, `key_id` is the identity that signed.
    """

    root_digest: str
    key_id: str
    files: Mapping[str, str]
    statements: tuple[Statement, ...]
    result: str | None
    provenance: Provenance | None = None


def sign_directory(
    directory: str | Path,
    private_key: str | Path | Signer,
    *,
    password: str | None = None,
    known: Mapping[str, str] | None = None,
) -> str:
    """Sign every file of `directory` into `model.sig` and return the root digest.

    `known` are SHA-256 of files that were read back from the directory already; the others are read now. A file that
    changed since then does not verify.

    Raises:
        UsageError: the key cannot be used; the directory is empty, is none, or holds links or special files.
        OutputError: `model.sig` cannot be written.
        IncompleteError: a file cannot be read, or the disk is full.
    """
    signer = _signer(private_key, password)
    root = _directory(directory)
    names = [name for name in list_files(root, error=UsageError) if name not in UNSIGNED_FILES]
    if not names:
        raise UsageError(f"{directory} holds no files to sign.")
    ordered, had = sorted(names, key=PurePosixPath), known or {}
    read = digest_names(root, [name for name in ordered if name not in had])
    digests = {name: had[name] if name in had else read[name] for name in ordered}
    payload = model_statement(_model_name(root), digests)
    write_json(root / SIGNATURE, signer.bundle(payload, PAYLOAD_TYPE))
    return root_digest(digests)


def sign_report(
    report: str | Path,
    private_key: str | Path | Signer,
    *,
    passed: bool,
    policy_digests: Mapping[str, str],
    passed_tests: Sequence[str] = (),
    failed_tests: Sequence[str] = (),
    time_created: str | None = None,
    password: str | None = None,
    provenance: Provenance | None = None,
) -> tuple[Path, ...]:
    """Sign the verdict of `report`, which `model.sig` beside it must cover already; return the envelopes.

    `policy_digests` maps the policy's file name to its SHA-256. The test-result envelope is always written,
    the summary only when `passed`; an older summary is deleted otherwise. Test ids are published: they must not
    contain protected text. `provenance` says what the run was made from, and must agree with the report.

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
    signer = _signer(private_key, password)
    manifest = _verified_manifest(root, signer.public, list_files(root, error=UsageError))
    digest = digest_names(root, [REPORT])[REPORT]
    if manifest.get(REPORT) != digest:
        raise SignatureInvalidError(f"{SIGNATURE} does not cover {REPORT} as it is; sign the directory again.")
    subjects = {_model_name(root): root_digest(manifest), REPORT: digest}
    result = test_result(passed, policy_digests, passed_tests, failed_tests, provenance)
    written = [root / REPORT_ENVELOPE]
    write_json(written[0], signer.statement(statement_bytes(subjects, TEST_RESULT_PREDICATE, result), PAYLOAD_TYPE))
    if not passed:
        (root / SUMMARY_ENVELOPE).unlink(missing_ok=True)
        return tuple(written)
    summary = summary_result(policy_digests, time_created)
    written.append(root / SUMMARY_ENVELOPE)
    write_json(written[1], signer.statement(statement_bytes(subjects, SUMMARY_PREDICATE, summary), PAYLOAD_TYPE))
    return tuple(written)


def verify_directory(
    directory: str | Path, public_key: str | Path | Verifier, *, key_id: str | None = None, workers: int | None = None
) -> Verification:
    """Check every signature and every byte of a signed directory, offline.

    `key_id` pins the key: the one in the file must have it, whoever put that file there.

    Raises:
        SignatureInvalidError: no signature, another key, a malformed file, or any file changed, added,
            removed or renamed; the message names the file.
        UsageError: the public key or the directory is missing or of an unsupported kind.
        IncompleteError: a file cannot be read.
    """
    key = load_public_key(public_key) if isinstance(public_key, str | Path) else public_key
    _check_pin(key.key_id, key_id)
    root = _directory(directory)
    present = list_files(root, error=SignatureInvalidError, link_roots=cache_link_roots(root))
    manifest = _verified_manifest(root, key, present)
    _compare_names(manifest, present)
    actual = digest_names(root, manifest, workers=workers)
    for name, digest in actual.items():
        if digest != manifest[name]:
            raise SignatureInvalidError(f"{name} was changed after it was signed.")
    statements, made_from = _verify_statements(root, key, manifest, present)
    result = str(statements[0].predicate["result"]) if statements else None
    return Verification(root_digest(manifest), key.key_id, dict(manifest), statements, result, made_from)


def _check_pin(key_id: str, pinned: str | None) -> None:
    """Raise SignatureInvalidError where a key is pinned, by its id with or without `sha256:`, and this is another."""
    if pinned is not None and key_id != key_id_of(pinned):
        wanted = key_id_of(pinned)
        raise SignatureInvalidError(f"The key is {key_id[:12]}..., but sha256:{wanted[:12]}... is the one that counts.")


def _signer(private_key: str | Path | Signer, password: str | None) -> Signer:
    return load_private_key(private_key, password) if isinstance(private_key, str | Path) else private_key


def _directory(directory: str | Path) -> Path:
    root = Path(os.path.realpath(directory))
    if not root.is_dir():
        raise UsageError(f"{directory} is not a directory; name one that `memscrub fix` wrote.")
    return root


def _model_name(root: Path) -> str:
    # Informative only, but a signature made in `DIR.partial/` should speak of `DIR`.
    return root.name.removesuffix(".partial")


def _verified_manifest(root: Path, key: Verifier, present: Sequence[str]) -> dict[str, str]:
    """The files and digests that `model.sig` vouches for, after its signature was checked."""
    if SIGNATURE not in present:
        raise SignatureInvalidError(f"{root} carries no signature: it has no {SIGNATURE}.")
    bundle = read_object(root, SIGNATURE, canonical=True)
    statement = parsed(key.open_bundle(bundle, SIGNATURE, PAYLOAD_TYPE), SIGNATURE)
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
    root: Path, key: Verifier, manifest: Mapping[str, str], present: Sequence[str]
) -> tuple[tuple[Statement, ...], Provenance | None]:
    """The statements about the report: none without one; test-result first, summary exactly on a pass."""
    envelopes = [name for name in (REPORT_ENVELOPE, SUMMARY_ENVELOPE) if name in present]
    if REPORT not in manifest:
        for name in envelopes:
            raise SignatureInvalidError(f"{name} speaks of a {REPORT} that is not there.")
        return (), None
    if REPORT_ENVELOPE not in present:
        raise SignatureInvalidError(f"{REPORT} carries no signed statement: {REPORT_ENVELOPE} is missing.")
    # A report that can be read in two ways is refused, signed or not.
    report = read_object(root, REPORT, limit=MAX_REPORT)
    result = _verify_statement(root, key, manifest, REPORT_ENVELOPE, TEST_RESULT_PREDICATE)
    verdict = result.predicate.get("result")
    if verdict not in ("PASSED", "FAILED"):
        raise SignatureInvalidError(f"{REPORT_ENVELOPE} states neither PASSED nor FAILED.")
    if (verdict == "PASSED") != (SUMMARY_ENVELOPE in present):
        state = "is missing, although" if verdict == "PASSED" else "is there, although"
        raise SignatureInvalidError(f"{SUMMARY_ENVELOPE} {state} {REPORT_ENVELOPE} states {verdict}.")
    made_from = _provenance(result, report)
    if verdict == "FAILED":
        return (result,), made_from
    return (result, _verify_statement(root, key, manifest, SUMMARY_ENVELOPE, SUMMARY_PREDICATE)), made_from


def _verify_statement(
    root: Path, key: Verifier, manifest: Mapping[str, str], file: str, predicate_type: str
) -> Statement:
    statement = parsed(key.open_statement(read_object(root, file, canonical=True), file, PAYLOAD_TYPE), file)
    subjects, predicate = check_statement(statement, file, predicate_type)
    report = subjects.pop(REPORT, None)
    if report != manifest[REPORT]:
        raise SignatureInvalidError(f"{file} speaks of another {REPORT} than the one that is there.")
    if list(subjects.values()) != [root_digest(manifest)]:
        raise SignatureInvalidError(f"{file} speaks of another checkpoint than the one that {SIGNATURE} covers.")
    return Statement(file, predicate_type, predicate)


def _provenance(result: Statement, report: Mapping[str, Any]) -> Provenance | None:
    """What the run was made from, and that the report says the same."""
    configuration = result.predicate.get("configuration")
    try:
        found = read_provenance(configuration)
    except ValueError as problem:
        raise SignatureInvalidError(f"The statement in {result.file} cannot be used: {problem}.") from None
    if found is None:
        return None
    if (fact := contradiction(found, policies_in(configuration), report)) is not None:
        raise SignatureInvalidError(f"{result.file} and {REPORT} do not agree on {fact}.")
    return found
