"""No byte of a signed directory changes unnoticed: a sample of what benchmarks/flips.py does with every byte."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from memscrub.errors import MemscrubError, SignatureInvalidError
from memscrub.proof.provenance import provenance_of
from memscrub.proof.signing import generate_keypair, sign_directory, sign_report, verify_directory
from memscrub.proof.statements import REPORT_ENVELOPE, SIGNATURE, SUMMARY_ENVELOPE
from memscrub.reports.report import REPORT_NAME, load_report
from memscrub.storage.patch import open_patch

OLD = Path(__file__).resolve().parent.parent / "fixtures" / "reports" / "0.1.0"
SIGNATURES = (SIGNATURE, REPORT_ENVELOPE, SUMMARY_ENVELOPE)
P256 = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


@pytest.fixture(scope="module", params=["ec-p256", "ed25519"])
def signed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, a real fix of a tiny checkpoint, signed by `key.pem` as today's version signs."""
    folder: Path = tmp_path_factory.mktemp("flips")
    generate_keypair(folder / "key.pem", folder / "key.pub", kind=request.param)
    root = Path(shutil.copytree(OLD / "passed", folder / "model"))
    for name in SIGNATURES:
        (root / name).unlink()
    report = load_report(root / REPORT_NAME)
    made_from = provenance_of(report, None)
    sign_directory(root, folder / "key.pem")
    sign_report(
        root / REPORT_NAME, folder / "key.pem", passed=True, policy_digests={"policy.toml": report.policy.sha256},
        provenance=made_from,
    )  # fmt: skip
    assert verify_directory(root, folder / "key.pub").provenance == made_from
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "model").iterdir())


def is_found(folder: Path) -> bool:
    """Whether verifying ends with exit code 5; any other error fails the test."""
    try:
        verify_directory(folder / "model", folder / "key.pub", workers=1)
    except SignatureInvalidError as problem:
        assert "\n" not in str(problem)
        return True
    return False


def flips(data: bytes, count: int, seed: str) -> Iterator[bytes]:
    draw = random.Random(seed)
    for _ in range(count):
        position, change = draw.randrange(len(data)), draw.choice([1 << draw.randrange(8), draw.randrange(1, 256)])
        yield data[:position] + bytes([data[position] ^ change]) + data[position + 1 :]


def spellings(data: bytes) -> Iterator[bytes]:
    """What a reader of JSON would not notice, or hardly."""
    for blank in (b" ", b"\n", b"\t", b"\r"):
        yield data + blank
        yield blank + data
        yield data.replace(b",", b"," + blank, 1)
        yield data.replace(b":", blank + b":", 1)
    value = json.loads(data)
    yield json.dumps(value).encode()
    yield json.dumps(value, indent=2).encode()
    yield b"\xef\xbb\xbf" + data
    yield data.replace(b"application/", b"application\\/", 1)
    yield data.replace(b"payload", b"p\\u0061yload", 1)
    yield data.replace(b"==", b"=", 1) if b"==" in data else data.replace(b'"}', b'="}', 1)
    yield data[:-1] + b',"x":1}'
    yield b'{"payloadType":"application/vnd.in-toto+json",' + data[1:]


def test_sampled_flips_of_every_file_are_found(signed: Path) -> None:
    for name in names(signed):
        path = signed / "model" / name
        data = path.read_bytes()
        for content in flips(data, 160 if name in SIGNATURES else 60, name):
            path.write_bytes(content)
            assert is_found(signed), name
        path.write_bytes(data)
    assert not is_found(signed)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_file_has_one_spelling(signed: Path, name: str) -> None:
    path = signed / "model" / name
    data = path.read_bytes()
    for content in spellings(data):
        assert content != data
        path.write_bytes(content)
        assert is_found(signed), content[:200]
    path.write_bytes(data)
    assert not is_found(signed)


def test_lost_and_added_bytes_and_exchanged_files_are_found(signed: Path) -> None:
    root = signed / "model"
    originals = {name: (root / name).read_bytes() for name in names(signed)}
    for name, data in originals.items():
        for content in (b"", data[:-1], data[1:], data[: len(data) // 2], data + b"\0", data + b"\n", data * 2):
            (root / name).write_bytes(content)
            assert is_found(signed), name
        for other in originals.values():
            (root / name).write_bytes(other)
            assert other == data or is_found(signed), name
        (root / name).write_bytes(data)
    assert not is_found(signed)


def test_flips_end_the_command_with_5_and_one_sentence(
    signed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names(signed):
        path = signed / "model" / name
        data = path.read_bytes()
        (content,) = flips(data, 1, name)
        path.write_bytes(content)
        code = run(monkeypatch, "verify", path.parent, "--key", signed / "key.pub")
        path.write_bytes(data)
        shown = capsys.readouterr()
        assert code == 5 and shown.out == "" and shown.err.count("memscrub: ") == 1, name


def test_flips_of_the_patch_are_refused_by_whoever_opens_it(tmp_path: Path) -> None:
    data = (OLD / "patch.safetensors").read_bytes()
    path = tmp_path / "patch"
    for content in flips(data, 400, "patch"):
        path.write_bytes(content)
        with pytest.raises(MemscrubError):
            open_patch(path)


def test_the_other_form_of_an_ecdsa_signature_states_nothing_else(signed: Path) -> None:
    """Whoever has (r, s) can write (r, n - s): two changed fields of one valid signature over the same statement.

    The curve's mathematics allows it, older signatures and other tools use both forms, and nothing that was signed
    changes, so it is accepted. Ed25519 has one form only.
    """
    path = signed / "model" / SIGNATURE
    data = path.read_bytes()
    bundle = json.loads(data)
    entry = bundle["dsseEnvelope"]["signatures"][0]
    before = verify_directory(signed / "model", signed / "key.pub")
    signature = base64.b64decode(entry["sig"])
    if len(signature) == 64:
        order = 2**252 + 27742317777372353535851937790883648493
        shifted = int.from_bytes(signature[32:], "little") + order
        other = signature[:32] + shifted.to_bytes(32, "little")
    else:
        r, s = decode_dss_signature(signature)
        other = encode_dss_signature(r, P256 - s)
    entry["sig"] = base64.b64encode(other).decode()
    path.write_text(json.dumps(bundle, separators=(",", ":")))
    if len(signature) == 64:
        assert is_found(signed)
    else:
        assert verify_directory(signed / "model", signed / "key.pub") == before
    path.write_bytes(data)
