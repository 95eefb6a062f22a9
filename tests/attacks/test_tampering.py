"""An attacker who can write the directory but has no key: every change is refused, and the file named."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from memscrub.errors import CheckpointError, ExitCode, SignatureInvalidError
from memscrub.proof.signing import generate_keypair, sign_directory, sign_report, verify_directory
from memscrub.proof.statements import REPORT, REPORT_ENVELOPE, SIGNATURE, SUMMARY_ENVELOPE
from memscrub.storage.checkpoint import INDEX, SINGLE, open_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def build(root: Path, seed: float = 1.0) -> Path:
    root.mkdir(parents=True)
    (root / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.full((2, 3), seed)}, root / SHARDS[0])
    save_file({"b": torch.full((4,), seed)}, root / SHARDS[1])
    (root / INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}))
    (root / REPORT).write_text(json.dumps({"verdict": "pass", "value": seed}))
    return root


def sign(root: Path, private: Path, *, passed: bool = True) -> None:
    sign_directory(root, private)
    sign_report(root / REPORT, private, passed=passed, policy_digests={"p.toml": "0" * 64}, time_created="now")


@pytest.fixture(scope="session", params=["ec-p256", "ed25519"])
def workshop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of the signer and of a stranger, and three directories signed by the signer."""
    root: Path = tmp_path_factory.mktemp("workshop")
    for who in ("signer", "stranger"):
        generate_keypair(root / f"{who}.pem", root / f"{who}.pub", kind=request.param)
    sign(build(root / "model"), root / "signer.pem")
    sign(build(root / "other", seed=2.0), root / "signer.pem")
    sign(build(root / "failed"), root / "signer.pem", passed=False)
    return root


@pytest.fixture
def model(workshop: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workshop / "model", tmp_path / "model"))


def refuse(root: Path, workshop: Path, match: str, key: str = "signer.pub") -> None:
    with pytest.raises(SignatureInvalidError, match=match) as caught:
        verify_directory(root, workshop / key)
    assert caught.value.exit_code is ExitCode.SIGNATURE
    assert "\n" not in str(caught.value)


def write(path: Path, value: Any) -> None:
    """Spelled as signatures are, so that what is refused is the content."""
    path.write_text(json.dumps(value, separators=(",", ":")))


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


def test_the_untouched_copy_verifies(model: Path, workshop: Path) -> None:
    assert verify_directory(model, workshop / "signer.pub").result == "PASSED"


@pytest.mark.parametrize("name", [*SHARDS, REPORT, "config.json", INDEX])
@pytest.mark.parametrize("position", [0, 8, -1])
def test_a_changed_byte_is_found_and_its_file_named(model: Path, workshop: Path, name: str, position: int) -> None:
    flip(model / name, position)
    refuse(model, workshop, f"{name} was changed")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_single_bit_of_the_directory_can_change_unnoticed(
    workshop: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.getbasetemp() / "bits"
    shutil.copytree(workshop / "model", root, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(sorted(p.name for p in root.iterdir())))
    size = (root / name).stat().st_size
    flip(root / name, data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7)))
    refuse(root, workshop, r"\w")


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from([SIGNATURE, REPORT_ENVELOPE, SUMMARY_ENVELOPE]), data=st.binary(max_size=300))
def test_garbage_instead_of_a_signature_is_refused_and_nothing_else(
    workshop: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: bytes
) -> None:
    root = tmp_path_factory.getbasetemp() / "garbage"
    shutil.copytree(workshop / "model", root, dirs_exist_ok=True)
    (root / name).write_bytes(data)
    refuse(root, workshop, name)


@pytest.mark.parametrize("name", ["evil.py", "sub/evil.bin", ".hidden", "model.sig.bak", "memscrub-x.dsse.json"])
def test_an_added_file_is_refused(model: Path, workshop: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("x")
    refuse(model, workshop, f"{name} was added")


@pytest.mark.parametrize("name", [*SHARDS, REPORT, "config.json"])
def test_a_removed_file_is_refused(model: Path, workshop: Path, name: str) -> None:
    (model / name).unlink()
    refuse(model, workshop, f"{name} was signed but is missing")


def test_a_renamed_file_is_refused(model: Path, workshop: Path) -> None:
    (model / SHARDS[0]).rename(model / "model-00003.safetensors")
    refuse(model, workshop, f"{SHARDS[0]} was signed but is missing")


def test_two_exchanged_files_are_refused(model: Path, workshop: Path) -> None:
    (model / SHARDS[0]).rename(model / "x")
    (model / SHARDS[1]).rename(model / SHARDS[0])
    (model / "x").rename(model / SHARDS[1])
    refuse(model, workshop, "was changed")


def test_an_unsigned_directory_is_refused(model: Path, workshop: Path) -> None:
    (model / SIGNATURE).unlink()
    refuse(model, workshop, "carries no signature")


def test_another_key_is_refused(model: Path, workshop: Path) -> None:
    refuse(model, workshop, "another key", key="stranger.pub")


def test_a_strangers_signature_with_the_signers_key_id_is_refused(model: Path, workshop: Path) -> None:
    hint = json.loads((model / SIGNATURE).read_text())["verificationMaterial"]
    (model / REPORT).unlink()
    (model / REPORT_ENVELOPE).unlink()
    (model / SUMMARY_ENVELOPE).unlink()
    sign_directory(model, workshop / "stranger.pem")
    bundle = json.loads((model / SIGNATURE).read_text())
    write(model / SIGNATURE, bundle | {"verificationMaterial": hint})
    refuse(model, workshop, "not one of the key")


@pytest.mark.parametrize("names", [[SIGNATURE], [REPORT_ENVELOPE], [SUMMARY_ENVELOPE], [SIGNATURE, REPORT_ENVELOPE]])
def test_signatures_of_another_directory_are_refused(model: Path, workshop: Path, names: list[str]) -> None:
    for name in names:
        shutil.copy(workshop / "other" / name, model / name)
    refuse(model, workshop, "was changed" if SIGNATURE in names else "speaks of another")


def test_statements_cannot_stand_in_for_each_other(model: Path, workshop: Path) -> None:
    shutil.copy(model / SUMMARY_ENVELOPE, model / REPORT_ENVELOPE)
    refuse(model, workshop, f"{REPORT_ENVELOPE} holds a statement of another type")
    envelope = json.loads((workshop / "model" / SIGNATURE).read_text())["dsseEnvelope"]
    write(model / REPORT_ENVELOPE, envelope)
    refuse(model, workshop, f"{REPORT_ENVELOPE} was signed with another key")


def test_statements_cannot_be_withheld_or_added(model: Path, workshop: Path, tmp_path: Path) -> None:
    (model / SUMMARY_ENVELOPE).unlink()
    refuse(model, workshop, f"{SUMMARY_ENVELOPE} is missing")
    (model / REPORT_ENVELOPE).unlink()
    refuse(model, workshop, f"{REPORT_ENVELOPE} is missing")
    failed = Path(shutil.copytree(workshop / "failed", tmp_path / "failed"))
    assert verify_directory(failed, workshop / "signer.pub").result == "FAILED"
    shutil.copy(workshop / "model" / SUMMARY_ENVELOPE, failed / SUMMARY_ENVELOPE)
    refuse(failed, workshop, f"{SUMMARY_ENVELOPE} is there, although")


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e | {"payloadType": "application/json"},
        lambda e: e | {"signatures": []},
        lambda e: e | {"signatures": e["signatures"] * 2},
        lambda e: e | {"signatures": None},
        lambda e: e | {"signatures": [{"keyid": e["signatures"][0]["keyid"], "sig": ""}]},
        lambda e: e | {"signatures": [e["signatures"][0] | {"keyid": "0" * 64}]},
        lambda e: e | {"signatures": [e["signatures"][0] | {"extra": 1}]},
        lambda e: e | {"payload": e["payload"] + "\n"},
        lambda e: e | {"payload": " " + e["payload"]},
        lambda e: e | {"payload": 7},
        lambda e: e | {"payload": base64.b64encode(base64.b64decode(e["payload"]) + b" ").decode()},
        lambda e: e | {"extra": 1},
        lambda e: {},
        lambda e: [e],
    ],
)
@pytest.mark.parametrize("name", [SIGNATURE, REPORT_ENVELOPE])
def test_a_malformed_envelope_is_refused(model: Path, workshop: Path, name: str, change: Change) -> None:
    value = json.loads((model / name).read_text())
    if name == SIGNATURE:
        value["dsseEnvelope"] = change(value["dsseEnvelope"])
    else:
        value = change(value)
    write(model / name, value)
    refuse(model, workshop, name)


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b | {"mediaType": "application/vnd.dev.sigstore.bundle.v0.1+json"},
        lambda b: b | {"extra": 1},
        lambda b: b | {"verificationMaterial": {"publicKey": {"hint": None}, "tlogEntries": []}},
        lambda b: b | {"verificationMaterial": {"publicKey": {}, "tlogEntries": []}},
        lambda b: b | {"verificationMaterial": {"certificate": {}, "tlogEntries": []}},
        lambda b: b | {"verificationMaterial": b["verificationMaterial"] | {"tlogEntries": [1]}},
        lambda b: {k: v for k, v in b.items() if k != "dsseEnvelope"},
        lambda b: None,
    ],
)
def test_a_malformed_bundle_is_refused(model: Path, workshop: Path, change: Change) -> None:
    write(model / SIGNATURE, change(json.loads((model / SIGNATURE).read_text())))
    refuse(model, workshop, SIGNATURE)


@pytest.mark.parametrize("name", [SIGNATURE, REPORT_ENVELOPE, SUMMARY_ENVELOPE])
def test_a_key_given_twice_is_ambiguous_and_refused(model: Path, workshop: Path, name: str) -> None:
    text = (model / name).read_text()
    (model / name).write_text(
        '{"payloadType":"x",' * (name != SIGNATURE) + '{"mediaType":"x",' * (name == SIGNATURE) + text[1:]
    )
    refuse(model, workshop, f"{name} cannot be used: a key appears twice")


def test_a_signed_but_ambiguous_report_is_refused(workshop: Path, tmp_path: Path) -> None:
    root = build(tmp_path / "m")
    (root / REPORT).write_text('{"verdict": "fail", "verdict": "pass"}')
    sign(root, workshop / "signer.pem")
    refuse(root, workshop, f"{REPORT} cannot be used: a key appears twice")


def test_deeply_nested_json_is_refused(model: Path, workshop: Path) -> None:
    (model / SIGNATURE).write_text("[" * 200_000)
    refuse(model, workshop, "nested too deeply")


def test_an_oversized_signature_is_refused_unread(model: Path, workshop: Path) -> None:
    with (model / REPORT_ENVELOPE).open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    refuse(model, workshop, "too large")


@pytest.mark.parametrize("name", [SIGNATURE, SHARDS[0], REPORT_ENVELOPE, "extra"])
@pytest.mark.parametrize("target", ["same content", "inside", "nowhere", "circle", "directory"])
def test_a_link_in_the_directory_is_refused(
    model: Path, workshop: Path, tmp_path: Path, name: str, target: str
) -> None:
    place = {
        "same content": workshop / "model" / (name if name != "extra" else SHARDS[0]),
        "inside": model / "config.json",
        "nowhere": tmp_path / "nowhere",
        "circle": model / name,
        "directory": tmp_path,
    }[target]
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(place)
    refuse(model, workshop, f"{name} is a link")


def test_a_pipe_is_refused_without_waiting_for_it(model: Path, workshop: Path) -> None:
    (model / SIGNATURE).unlink()
    os.mkfifo(model / SIGNATURE)
    refuse(model, workshop, "neither a regular file")


def test_a_signed_name_that_leads_out_is_never_opened(workshop: Path, tmp_path: Path) -> None:
    """Even the signer cannot make a verifier read outside: names are compared, not joined."""
    from memscrub.proof.keys import load_private_key
    from memscrub.proof.statements import PAYLOAD_TYPE, model_statement
    from memscrub.storage.files import sha256_file

    root = build(tmp_path / "m")
    sign_directory(root, workshop / "signer.pem")
    key = load_private_key(workshop / "signer.pem", None)
    for name in ("../outside", str(tmp_path / "outside")):
        (tmp_path / "outside").write_text("x")
        payload = model_statement("m", {name: sha256_file(tmp_path / "outside")})
        write(root / SIGNATURE, key.bundle(payload, PAYLOAD_TYPE))
        refuse(root, workshop, "was signed but is missing")


def test_a_signer_cannot_leave_files_out_of_the_signature(workshop: Path, tmp_path: Path) -> None:
    """The format lets the signer list ignored paths; a verifier that honoured them would verify nothing."""
    from memscrub.proof.keys import load_private_key
    from memscrub.proof.statements import MODEL_PREDICATE, PAYLOAD_TYPE, root_digest, statement_bytes

    root = build(tmp_path / "m")
    (root / REPORT).unlink()
    sign_directory(root, workshop / "signer.pem")
    files = {"config.json": verify_directory(root, workshop / "signer.pub").files["config.json"]}
    predicate = {
        "serialization": {"method": "files", "hash_type": "sha256", "ignore_paths": [*SHARDS, INDEX]},
        "resources": [{"name": n, "algorithm": "sha256", "digest": d} for n, d in files.items()],
    }
    payload = statement_bytes({"m": root_digest(files)}, MODEL_PREDICATE, predicate)
    write(root / SIGNATURE, load_private_key(workshop / "signer.pem", None).bundle(payload, PAYLOAD_TYPE))
    refuse(root, workshop, "was added after")


# --- hostile checkpoints ---


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/../../secret.safetensors",
        "..",
        "",
        "C:\\x.safetensors",
        "sub\\..\\x.safetensors",
        "model.bin",
        "config.json",
    ],
)
def test_an_index_that_leads_out_of_the_directory_is_refused(tmp_path: Path, shard: str) -> None:
    root = build(tmp_path / "m")
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (root / INDEX).write_text(json.dumps({"weight_map": {"a": shard, "b": SHARDS[1]}}))
    with pytest.raises(CheckpointError, match="no safetensors file of this directory"):
        open_checkpoint(root)


def test_an_index_with_an_absolute_path_to_its_own_shard_is_refused(tmp_path: Path) -> None:
    root = build(tmp_path / "m")
    (root / INDEX).write_text(json.dumps({"weight_map": {"a": str(root / SHARDS[0]), "b": SHARDS[1]}}))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        open_checkpoint(root)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "loop", "nowhere", "."])
def test_a_checkpoint_link_that_leads_out_or_nowhere_is_refused(tmp_path: Path, target: str) -> None:
    root = build(tmp_path / "m")
    (tmp_path / "secret").write_text("x")
    (root / "loop").symlink_to(target)
    with pytest.raises(CheckpointError, match="loop is"):
        open_checkpoint(root)


def test_cyclic_links_are_refused(tmp_path: Path) -> None:
    root = build(tmp_path / "m")
    (root / "x").symlink_to("y")
    (root / "y").symlink_to("x")
    (root / SINGLE).symlink_to(SINGLE)
    with pytest.raises(CheckpointError, match="in a circle"):
        open_checkpoint(root)


def test_a_snapshot_link_into_another_repository_is_refused(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "r"
    build(snapshot)
    blobs = tmp_path / "models--other--n" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "b").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../models--other--n/blobs/b")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link that leads out"):
        open_checkpoint(snapshot)


def test_a_truncated_shard_and_a_lying_header_are_refused(tmp_path: Path) -> None:
    root = build(tmp_path / "m")
    whole = (root / SHARDS[0]).read_bytes()
    lies = [(b"[2,3]", b"[3,3]"), (b"[0,24]", b"[8,32]"), (b'"F32"', b'"F64"')]
    for data in (whole[:-4], whole[:10], b"\xff" * 8 + whole[8:], *(whole.replace(*lie) for lie in lies)):
        assert data != whole
        (root / SHARDS[0]).write_bytes(data)
        with pytest.raises(CheckpointError, match=SHARDS[0]):
            open_checkpoint(root)
