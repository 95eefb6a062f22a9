"""Keys, signatures and statements: what a signed directory proves, and that others can check it too."""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from memscrub.errors import ExitCode, OutputError, SignatureInvalidError, UsageError
from memscrub.proof.keys import key_id_of, load_private_key, load_public_key
from memscrub.proof.provenance import Provenance, read_provenance
from memscrub.proof.signing import Verification, generate_keypair, sign_directory, sign_report, verify_directory
from memscrub.proof.statements import (
    REPORT,
    REPORT_ENVELOPE,
    SIGNATURE,
    SUMMARY_ENVELOPE,
    SUMMARY_PREDICATE,
    TEST_RESULT_PREDICATE,
)
from memscrub.storage.files import sha256_file

POLICY = {"pii-strict.toml": "ab" * 32}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "sub.txt", "sub/tokenizer.json", ".gitattributes"):
        (root / name).write_bytes(name.encode() * 100)
    (root / REPORT).write_text('{"verdict": "pass"}')
    return root


@pytest.fixture(params=["ec-p256", "ed25519"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    return make_keys(tmp_path, request.param)


def make_keys(root: Path, kind: Any = "ec-p256", name: str = "key", password: str | None = None) -> tuple[Path, Path]:
    private, public = root / f"{name}.pem", root / f"{name}.pub"
    generate_keypair(private, public, kind=kind, password=password)
    return private, public


def sign(root: Path, private: Path, *, passed: bool = True) -> str:
    digest = sign_directory(root, private)
    sign_report(root / REPORT, private, passed=passed, policy_digests=POLICY, passed_tests=["t1"],
                failed_tests=[] if passed else ["t2"])  # fmt: skip
    return digest


def test_a_signed_directory_verifies_with_the_public_key_alone(model: Path, keys: tuple[Path, Path]) -> None:
    digest = sign(model, keys[0])
    keys[0].unlink()
    result = verify_directory(model, keys[1])
    assert isinstance(result, Verification) and result.root_digest == digest and result.result == "PASSED"
    assert result.files == {
        name: sha256_file(model / name)
        for name in (
            "config.json",
            "model.safetensors",
            "sub.txt",
            "sub/tokenizer.json",
            ".gitattributes",
            REPORT,
        )
    }
    assert [s.predicate_type for s in result.statements] == [TEST_RESULT_PREDICATE, SUMMARY_PREDICATE]
    assert result.statements[0].predicate == {
        "result": "PASSED",
        "configuration": [{"name": "pii-strict.toml", "digest": {"sha256": "ab" * 32}}],
        "passedTests": ["t1"],
        "failedTests": [],
    }


def test_the_root_digest_does_not_depend_on_the_directory_name(model: Path, keys: tuple[Path, Path]) -> None:
    digest = sign(model, keys[0])
    moved = model.rename(model.with_name("renamed"))
    assert verify_directory(moved, keys[1]).root_digest == digest == sign_directory(moved, keys[0])


def test_a_failed_report_has_no_summary(model: Path, keys: tuple[Path, Path]) -> None:
    sign(model, keys[0])
    sign(model, keys[0], passed=False)
    result = verify_directory(model, keys[1])
    assert result.result == "FAILED" and [s.file for s in result.statements] == [REPORT_ENVELOPE]
    assert not (model / SUMMARY_ENVELOPE).exists()


def test_a_directory_without_a_report_verifies_without_statements(model: Path, keys: tuple[Path, Path]) -> None:
    (model / REPORT).unlink()
    sign_directory(model, keys[0])
    result = verify_directory(model, keys[1])
    assert result.statements == () and result.result is None


def test_the_summary_names_verifier_policy_time_and_properties(model: Path, keys: tuple[Path, Path]) -> None:
    sign_directory(model, keys[0])
    sign_report(model / REPORT, keys[0], passed=True, policy_digests=POLICY, time_created="2026-01-01T00:00:00Z")
    predicate = verify_directory(model, keys[1]).statements[1].predicate
    assert predicate["timeCreated"] == "2026-01-01T00:00:00Z"
    assert predicate["verifier"]["policies"][0]["digest"] == {"sha256": "ab" * 32}
    assert predicate["properties"] == ["MEMSCRUB_POLICY_MET"]


def test_the_reference_implementation_verifies_our_signature(model: Path, tmp_path: Path) -> None:
    import model_signing

    reference: Any = model_signing
    # The reference skips git's files whatever was signed; write_checkpoint leaves them out.
    (model / ".gitattributes").unlink()
    private, public = make_keys(tmp_path)
    sign(model, private)
    verifier = reference.verifying.Config().use_elliptic_key_verifier(public_key=public)
    verifier.verify(model, model / SIGNATURE)
    (model / "sub.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"sub\.txt"):
        verifier.verify(model, model / SIGNATURE)


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_we_verify_the_signature_of_the_reference_implementation(model: Path, tmp_path: Path, curve: Any) -> None:
    import model_signing

    reference: Any = model_signing
    (model / REPORT).unlink()
    key = ec.generate_private_key(curve())
    pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "k").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "k.pub").write_bytes(key.public_key().public_bytes(pem, form))
    hashing = reference.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    signer = reference.signing.Config().set_hashing_config(hashing)
    signer.use_elliptic_key_signer(private_key=tmp_path / "k").sign(model, model / SIGNATURE)
    theirs = verify_directory(model, tmp_path / "k.pub")
    assert sign_directory(model, tmp_path / "k") == theirs.root_digest
    assert verify_directory(model, tmp_path / "k.pub").files == theirs.files


def test_signing_and_verifying_use_no_network(
    model: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    sign(model, keys[0])
    assert verify_directory(model, keys[1]).result == "PASSED"


def test_verifying_imports_neither_torch_nor_sigstore(model: Path, keys: tuple[Path, Path]) -> None:
    sign(model, keys[0])
    code = (
        "import sys; from memscrub.proof.signing import verify_directory as v; v(sys.argv[1], sys.argv[2])\n"
        "print([m for m in ('torch', 'transformers', 'sigstore', 'model_signing') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code, model, keys[1]], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"


def test_a_cache_snapshot_of_a_signed_directory_verifies(model: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(model, keys[0])
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "r", tmp_path / "models--o--n" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in model.rglob("*") if p.is_file())):
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert verify_directory(snapshot, keys[1]).result == "PASSED"


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        private, public = make_keys(tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes(), public.read_bytes()
    for pair in ((private, tmp_path / "new.pub"), (tmp_path / "new.pem", public)):
        with pytest.raises(OutputError, match="exists already"):
            generate_keypair(*pair)
    assert (private.read_bytes(), public.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key.pem", "key.pub"]


def test_half_a_key_pair_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cannot be written"):
        generate_keypair(tmp_path / "key.pem", tmp_path / "missing" / "key.pub")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"kind": "rsa"}, {"password": ""}])
def test_unusable_key_options_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        generate_keypair(tmp_path / "a", tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["ec-p256", "ed25519"])
def test_a_password_is_needed_exactly_where_one_was_set(model: Path, tmp_path: Path, kind: str) -> None:
    locked, public = make_keys(tmp_path, kind, "locked", password="hunter2")
    plain, _ = make_keys(tmp_path, kind, "plain")
    sign_directory(model, locked, password="hunter2")
    (model / REPORT).unlink()
    sign_directory(model, locked, password="hunter2")
    assert verify_directory(model, public)
    for key, password, match in (
        (locked, None, "is encrypted; set MEMSCRUB_KEY_PASSWORD"),
        (locked, "no", f"passphrase of .*{locked.name} is wrong"),
        (locked, "", "is encrypted; set MEMSCRUB_KEY_PASSWORD"),
        (plain, "x", "not encrypted; unset MEMSCRUB_KEY_PASSWORD"),
    ):
        with pytest.raises(UsageError, match=match):
            sign_directory(model, key, password=password)


@pytest.mark.parametrize("password", ["x" * 1024, "\udcff"])
def test_a_passphrase_that_the_library_cannot_take_is_refused_and_not_shown(
    model: Path, tmp_path: Path, password: str
) -> None:
    generate_keypair(tmp_path / "good", tmp_path / "good.pub", password="good")
    for attempt in (
        lambda: generate_keypair(tmp_path / "key", tmp_path / "key.pub", password=password),
        lambda: sign_directory(model, tmp_path / "good", password=password),
    ):
        with pytest.raises(UsageError, match=r"^The passphrase is") as caught:
            attempt()
        assert password not in str(caught.value) and caught.value.__cause__ is None
    assert not (tmp_path / "key").exists()


def test_a_place_where_no_key_can_be_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    for private in (tmp_path / "circle", tmp_path / "missing" / "key"):
        with pytest.raises(OutputError):
            generate_keypair(private, tmp_path / "key.pub")
    assert not (tmp_path / "key.pub").exists()


def test_no_message_or_repr_shows_key_material(model: Path, tmp_path: Path) -> None:
    private, _ = make_keys(tmp_path)
    secret = "".join(private.read_text().splitlines()[1:-1])
    (tmp_path / "broken").write_text(private.read_text().replace("A", "!", 3))
    with pytest.raises(UsageError) as caught:
        sign_directory(model, tmp_path / "broken")
    shown = str(caught.value) + repr(load_private_key(private, None))
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert not any(secret[i : i + 12] in shown for i in range(0, len(secret) - 12, 4))


def test_unsupported_and_missing_keys_are_usage_errors(model: Path, tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    pem = serialization.Encoding.PEM
    (tmp_path / "rsa").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (tmp_path / "rsa.pub").write_bytes(
        key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    private, public = make_keys(tmp_path)
    sign(model, private)
    for path in (tmp_path / "rsa.pub", private, tmp_path / "missing", tmp_path, model / "config.json"):
        with pytest.raises(UsageError) as caught:
            verify_directory(model, path)
        assert caught.value.exit_code is ExitCode.USAGE
    for path in (tmp_path / "rsa", public, tmp_path / "missing"):
        with pytest.raises(UsageError):
            sign_directory(model, path)


def test_what_cannot_be_signed_is_refused(model: Path, tmp_path: Path) -> None:
    private, _ = make_keys(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing", private):
        with pytest.raises(UsageError):
            sign_directory(path, private)
    (model / "link").symlink_to(model / "config.json")
    with pytest.raises(UsageError, match="link"):
        sign_directory(model, private)
    assert not (model / SIGNATURE).exists()


def test_a_report_is_signed_only_where_the_signature_covers_it(model: Path, tmp_path: Path) -> None:
    private, _ = make_keys(tmp_path)
    other, _ = make_keys(tmp_path, name="other")
    report = model / REPORT

    def attempt(key: Path = private, path: Path = report, **options: Any) -> None:
        sign_report(path, key, passed=True, policy_digests=POLICY, **options)

    with pytest.raises(SignatureInvalidError, match="no signature"):
        attempt()
    sign_directory(model, private)
    with pytest.raises(SignatureInvalidError, match="another key"):
        attempt(other)
    with pytest.raises(UsageError, match="failed tests"):
        attempt(failed_tests=["t"])
    with pytest.raises(UsageError, match="not a file named"):
        attempt(path=model / "config.json")
    report.write_text('{"verdict": "forged"}')
    with pytest.raises(SignatureInvalidError, match="sign the directory again"):
        attempt()
    assert not (model / REPORT_ENVELOPE).exists() and not (model / SUMMARY_ENVELOPE).exists()


def test_our_bundle_has_the_form_of_the_format(model: Path, keys: tuple[Path, Path]) -> None:
    digest = sign_directory(model.rename(model.with_name("out.partial")), keys[0])
    bundle = json.loads((model.with_name("out.partial") / SIGNATURE).read_text())
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "out", "digest": {"sha256": digest}}]
    assert statement["predicate"]["serialization"]["hash_type"] == "sha256"


BASE = "cd" * 32
MADE_FROM = Provenance(
    base=BASE,
    protected="ef" * 32,
    patch="12" * 32,
    run={"seed": "9223372036854775807", "device": "cpu", "dtype": "float32"},
    packages={"memscrub": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
)
STATED = {
    "input": {"sha256": BASE},
    "policy": {"sha256": "ab" * 32},
    "protected": {"hmac_sha256": "ef" * 32},
    "edit": {"patch_sha256": "12" * 32},
    "environment": {
        "seed": 2**63 - 1, "device": "cpu", "dtype": "float32", "memscrub": "0.1.0", "torch": "2.13.0+cpu",
    },
}  # fmt: skip


def sign_made_from(root: Path, private: Path, report: dict[str, Any], made_from: Provenance = MADE_FROM) -> None:
    (root / REPORT).write_text(json.dumps(report))
    sign_directory(root, private)
    sign_report(root / REPORT, private, passed=True, policy_digests=POLICY, provenance=made_from)


def test_the_statement_binds_what_the_run_was_made_from(model: Path, keys: tuple[Path, Path]) -> None:
    sign_made_from(model, keys[0], STATED)
    found = verify_directory(model, keys[1])
    assert found.provenance == MADE_FROM
    configuration = found.statements[0].predicate["configuration"]
    assert {"name": "base", "uri": "urn:memscrub:base-checkpoint", "digest": {"sha256": BASE}} in configuration
    assert {"name": "torch", "uri": "pkg:pypi/torch@2.13.0%2Bcpu"} in configuration
    # in-toto asks of every descriptor that it has one of these.
    assert all({"uri", "digest", "content"} & entry.keys() for entry in configuration)


@pytest.mark.parametrize(
    ("section", "key", "fact"),
    [
        ("input", "sha256", "the base checkpoint"),
        ("policy", "sha256", "the policy"),
        ("protected", "hmac_sha256", "the protected list"),
        ("edit", "patch_sha256", "the patch"),
        ("environment", "seed", "the seed"),
        ("environment", "device", "the device"),
        ("environment", "dtype", "the dtype"),
        ("environment", "memscrub", "the version of memscrub"),
        ("environment", "torch", "the version of torch"),
    ],
)
@pytest.mark.parametrize("other", ["another", None, 0, ["a"]])
def test_a_report_and_a_statement_that_disagree_are_refused(
    model: Path, tmp_path: Path, section: str, key: str, fact: str, other: Any
) -> None:
    private, public = make_keys(tmp_path)
    sign_made_from(model, private, STATED | {section: {**STATED[section], key: other}})
    with pytest.raises(SignatureInvalidError, match=f"do not agree on {fact}") as caught:
        verify_directory(model, public)
    assert "another" not in str(caught.value)


@pytest.mark.parametrize("report", [{}, {name: None for name in STATED}, STATED | {"edit": [1]}])
def test_a_report_that_says_nothing_disagrees(model: Path, tmp_path: Path, report: dict[str, Any]) -> None:
    private, public = make_keys(tmp_path)
    sign_made_from(model, private, report)
    with pytest.raises(SignatureInvalidError, match="do not agree on"):
        verify_directory(model, public)


@pytest.mark.parametrize(
    "configuration",
    [
        None,
        {},
        ["x"],
        [{"uri": 7}],
        [{"uri": "urn:memscrub:base-checkpoint", "digest": {"sha256": "xy"}}],
        [{"uri": "urn:memscrub:base-checkpoint", "digest": {"sha512": BASE}}],
        [{"uri": "urn:memscrub:base-checkpoint", "digest": {"sha256": BASE}}],
        [{"uri": "urn:memscrub:base-checkpoint", "digest": {"sha256": BASE}}] * 2,
        [*MADE_FROM.descriptors(), {"uri": "pkg:pypi/torch@2.13.0%2Bcpu"}],
        [
            entry if entry["name"] != "run" else {**entry, "annotations": {"seed": 1}}
            for entry in MADE_FROM.descriptors()
        ],
    ],
)
def test_a_malformed_configuration_is_refused(configuration: Any) -> None:
    with pytest.raises(ValueError, match="configuration"):
        read_provenance(configuration)


def test_a_statement_of_before_it_named_a_base_is_read_as_naming_none() -> None:
    assert read_provenance([{"name": "policy.toml", "digest": {"sha256": BASE}}]) is None
    assert read_provenance(MADE_FROM.descriptors()) == MADE_FROM


def test_a_pinned_key_is_the_only_one_that_counts(model: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign(model, keys[0])
    own = load_public_key(keys[1]).key_id
    for spelling in (own, f"sha256:{own}", f" SHA256:{own.upper()}\n"):
        assert verify_directory(model, keys[1], key_id=spelling).key_id == own
    other = generate_keypair(tmp_path / "o.pem", tmp_path / "o.pub")
    with pytest.raises(SignatureInvalidError, match="is the one that counts"):
        verify_directory(model, keys[1], key_id=other)
    for bad in ("", "sha256:", own[:-1], f"md5:{own}", "g" * 64):
        with pytest.raises(UsageError, match="is no key id"):
            verify_directory(model, keys[1], key_id=bad)


def test_a_new_key_pair_tells_its_id_and_the_id_is_that_of_the_format(tmp_path: Path) -> None:
    import hashlib

    told = generate_keypair(tmp_path / "k.pem", tmp_path / "k.pub")
    assert (
        told
        == load_public_key(tmp_path / "k.pub").key_id
        == hashlib.sha256((tmp_path / "k.pub").read_bytes()).hexdigest()
    )
    assert key_id_of(f"sha256:{told}") == told


def test_a_report_on_very_many_texts_is_no_forgery(model: Path, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    (model / REPORT).write_text(json.dumps({"texts": "x" * (65 << 20)}))
    sign(model, private)
    assert verify_directory(model, public).result == "PASSED"
