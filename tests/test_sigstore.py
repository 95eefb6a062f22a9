"""Keyless signing, against a whole Sigstore instance on this machine: real certificates, a real log, no mock."""

from __future__ import annotations

import io
import json
import random
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import pytest
from sigstore_instance import ISSUER, Instance, running, token

from memscrub.errors import IncompleteError, MemscrubError, SignatureInvalidError, UsageError
from memscrub.proof.attest import SIGSTORE, Signing
from memscrub.proof.keys import generate_keypair
from memscrub.proof.signing import sign_directory, sign_report, verify_directory
from memscrub.proof.sigstore_signing import TOKEN_VARIABLE, SigstoreIdentity, SigstoreSigner
from memscrub.proof.statements import REPORT, REPORT_ENVELOPE, SIGNATURE, SUMMARY_ENVELOPE, UNSIGNED_FILES

OLD = Path(__file__).parent / "fixtures" / "reports" / "0.1.0"
JANE = "jane@example.com"
WORKFLOW = "https://github.com/example/models/.github/workflows/release.yml@refs/heads/main"


@pytest.fixture(scope="module")
def instance() -> Iterator[Instance]:
    with running() as started:
        yield started


@pytest.fixture(scope="module")
def trust(instance: Instance, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return instance.trust_config(tmp_path_factory.mktemp("trust") / "trust.json")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a CI job nor a terminal nor a token."""
    for name in (TOKEN_VARIABLE, "GITHUB_ACTIONS", "GITLAB_CI", "CI", "BUILDKITE", "CIRCLECI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())


@pytest.fixture
def jane(nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token(JANE))


def signed(root: Path, trust: Path) -> Path:
    """A copy of a small fixed directory, signed by whoever the token names."""
    shutil.copytree(OLD / "passed", root)
    for name in UNSIGNED_FILES:
        (root / name).unlink()
    signer = SigstoreSigner(trust)
    sign_directory(root, signer)
    sign_report(root / REPORT, signer, passed=True, policy_digests={"policy.toml": "0" * 64})
    return root


def refuse(root: Path, signed_by: Any, match: str) -> None:
    with pytest.raises(SignatureInvalidError, match=match) as caught:
        verify_directory(root, signed_by)
    assert "\n" not in str(caught.value)


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("who", [JANE, WORKFLOW])
def test_a_directory_verifies_by_the_identity_that_signed_it_without_a_network(
    trust: Path, tmp_path: Path, nobody: None, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token(who))
    root = signed(tmp_path / "m", trust)
    forbid_network(monkeypatch)
    found = verify_directory(root, SigstoreIdentity(who, ISSUER, trust))
    assert found.result == "PASSED" and found.key_id == f"{who} ({ISSUER})" and len(found.statements) == 2


def test_the_reference_implementation_verifies_it(trust: Path, tmp_path: Path, jane: None) -> None:
    import model_signing

    reference: Any = model_signing
    root = signed(tmp_path / "m", trust)
    verifier = reference.verifying.Config().use_sigstore_verifier(identity=JANE, oidc_issuer=ISSUER, trust_config=trust)
    verifier.verify(root, root / SIGNATURE)


def test_each_signature_is_in_the_log_and_none_of_them_holds_the_statement(
    instance: Instance, trust: Path, tmp_path: Path, jane: None
) -> None:
    before = len(instance.entries)
    signed(tmp_path / "m", trust)
    logged = instance.entries[before:]
    assert len(logged) == 3 and not any(b"resources" in entry or b"policy" in entry for entry in logged)


def test_another_identity_issuer_or_instance_is_refused(trust: Path, tmp_path: Path, jane: None) -> None:
    root = signed(tmp_path / "m", trust)
    refuse(root, SigstoreIdentity("joe@example.com", ISSUER, trust), "no signature of 'joe@example.com'")
    refuse(root, SigstoreIdentity(JANE, "https://accounts.example.com", trust), "vouches for")
    other = Instance(url="http://127.0.0.1:9").trust_config(tmp_path / "other.json")
    refuse(root, SigstoreIdentity(JANE, ISSUER, other), "vouches for")
    refuse(root, SigstoreIdentity(JANE, ISSUER), "vouches for")  # the public instance knows nothing of this one


def test_keys_and_identities_are_told_apart(trust: Path, tmp_path: Path, jane: None) -> None:
    refuse(OLD / "passed", SigstoreIdentity(JANE, ISSUER, trust), "made with a key pair and not with Sigstore")
    refuse(signed(tmp_path / "m", trust), OLD / "ec.pub", "made with Sigstore and no key; verify it with --sigstore")


def test_signatures_of_two_people_do_not_make_one_directory(
    trust: Path, tmp_path: Path, jane: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = signed(tmp_path / "m", trust)
    monkeypatch.setenv(TOKEN_VARIABLE, token("joe@example.com"))
    other = signed(tmp_path / "o", trust)
    shutil.copy(other / REPORT_ENVELOPE, root / REPORT_ENVELOPE)
    refuse(root, SigstoreIdentity(JANE, ISSUER, trust), REPORT_ENVELOPE)


def test_no_changed_byte_changes_what_was_signed(trust: Path, tmp_path: Path, jane: None) -> None:
    """A bundle has parts that Sigstore does not authenticate; a change of them may pass, but proves the same."""
    root = signed(tmp_path / "m", trust)
    jane_herself = SigstoreIdentity(JANE, ISSUER, trust)
    proved = verify_directory(root, jane_herself)
    draw = random.Random(0)
    found = 0
    for name in (SIGNATURE, REPORT_ENVELOPE, SUMMARY_ENVELOPE):
        path = root / name
        data = path.read_bytes()
        for _ in range(60):
            position = draw.randrange(len(data))
            path.write_bytes(data[:position] + bytes([data[position] ^ draw.randrange(1, 256)]) + data[position + 1 :])
            try:
                assert verify_directory(root, jane_herself) == proved
            except SignatureInvalidError as problem:
                assert "\n" not in str(problem)
                found += 1
        path.write_bytes(data)
    assert found >= 170


def test_without_a_network_signing_ends_at_once_with_one_sentence(
    tmp_path: Path, jane: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    forbid_network(monkeypatch)
    with pytest.raises(IncompleteError, match=r"^Sigstore cannot be reached \(.*\); check the network, or sign with"):
        SigstoreSigner()


def test_a_service_that_refuses_is_one_sentence_and_nothing_is_left(
    instance: Instance, trust: Path, tmp_path: Path, jane: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "refuse", 503)
    with pytest.raises(IncompleteError, match=r"^Sigstore did not sign \(.*\); sign with a key, or again\.$"):
        signed(tmp_path / "m", trust)
    assert not (tmp_path / "m" / SIGNATURE).exists()


@pytest.mark.parametrize("bad", ["not a token", token(JANE, seconds=-60)])
def test_a_token_that_is_none_or_too_old_ends_it_before_any_work(
    trust: Path, nobody: None, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, bad)
    with pytest.raises(UsageError, match=f"{TOKEN_VARIABLE} is no valid token .*; get a new one") as caught:
        Signing(SIGSTORE, trust_config=trust).signer()
    assert bad not in str(caught.value)


def test_without_an_identity_it_ends_before_any_work(trust: Path, nobody: None) -> None:
    with pytest.raises(UsageError, match=f"no identity to sign with.*{TOKEN_VARIABLE}"):
        Signing(SIGSTORE, trust_config=trust).signer()


def test_without_the_extra_the_sentence_names_it(trust: Path, jane: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sigstore.errors", None)
    with pytest.raises(UsageError, match=r"pip install 'memscrub\[sigstore\]'"):
        SigstoreSigner(trust)
    with pytest.raises(UsageError, match=r"pip install 'memscrub\[sigstore\]'"):
        verify_directory(OLD / "passed", SigstoreIdentity(JANE, ISSUER, trust))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"mediaType": 1}', "\x00"])
def test_a_file_that_is_no_trust_configuration_is_refused(tmp_path: Path, jane: None, content: str) -> None:
    (tmp_path / "trust.json").write_text(content)
    for make in (lambda: SigstoreSigner(tmp_path / "trust.json"), lambda: SigstoreSigner(tmp_path / "missing")):
        with pytest.raises(UsageError, match="trust configuration"):
            make()


@pytest.mark.parametrize(
    "bundle",
    [{}, {"verificationMaterial": {"certificate": {"rawBytes": "AAAA"}}}, {"mediaType": None, "dsseEnvelope": []}],
)
def test_a_malformed_bundle_is_refused(trust: Path, tmp_path: Path, bundle: dict[str, Any]) -> None:
    root = Path(shutil.copytree(OLD / "passed", tmp_path / "m"))
    (root / SIGNATURE).write_text(json.dumps(bundle, separators=(",", ":")))
    refuse(root, SigstoreIdentity(JANE, ISSUER, trust), f"{SIGNATURE} carries no signature")


def test_a_fix_is_signed_and_verified_from_the_command_line(
    trust: Path, tmp_path: Path, jane: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(OLD, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    run = partial(command_line.run, monkeypatch)
    options = ["--trust-config", str(trust)]
    assert run("fix", "base", "-p", "policy.toml", "-o", "mine", "--sign", "sigstore", "--device", "cpu", *options) == 0
    by_jane = ["--sigstore", "--identity", JANE, "--issuer", ISSUER, *options]
    assert run("verify", "mine", "--base", "base", *by_jane) == 0
    shown = capsys.readouterr().out
    assert f"{JANE} ({ISSUER})" in shown and "edit good" in shown
    assert run("verify", "mine", *by_jane, "--key", "ec.pub") == 2
    assert run("verify", "mine", "--sigstore", "--identity", JANE) == 2
    assert run("fix", "base", "-p", "policy.toml", "-o", "no", "--sign", "mine.pem", *options) == 2
    assert not Path("no").exists()


def test_a_policy_that_pins_a_key_is_not_signed_by_an_identity(trust: Path, tmp_path: Path, jane: None) -> None:
    from memscrub.policy.document import load_policy
    from memscrub.proof.attest import signer_for

    shutil.copytree(OLD, tmp_path / "w")
    pinned = generate_keypair(tmp_path / "k.pem", tmp_path / "k.pub")
    with (tmp_path / "w" / "policy.toml").open("a") as file:
        file.write(f'[sign]\nkey_id = "sha256:{pinned}"\n')
    policy = load_policy(tmp_path / "w" / "policy.toml")
    with pytest.raises(MemscrubError, match="key_id asks for the key"):
        signer_for(policy, Signing(SIGSTORE, trust_config=trust))
    assert signer_for(policy, Signing(tmp_path / "k.pem")) is not None


def test_a_policy_may_ask_for_an_identity_in_place_of_a_key(tmp_path: Path, jane: None) -> None:
    from memscrub.policy.document import load_policy
    from memscrub.proof.attest import signer_for

    shutil.copytree(OLD, tmp_path / "w")
    with (tmp_path / "w" / "policy.toml").open("a") as file:
        file.write('[sign]\nkey = "sigstore"\n')
    policy = load_policy(tmp_path / "w" / "policy.toml")
    with pytest.MonkeyPatch.context() as patched:
        for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
            patched.setenv(name, str(tmp_path))
        forbid_network(patched)
        with pytest.raises(IncompleteError, match="Sigstore cannot be reached"):
            signer_for(policy, None)
