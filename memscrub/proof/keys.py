"""Create, load and use signing keys; knows DSSE envelopes and bundles of them, but not what is signed in them.

No message of this module quotes a key file: an error that reached a log must not carry key material.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memscrub.errors import IncompleteError, OutputError, SignatureInvalidError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

PASSWORD_VARIABLE = "MEMSCRUB_KEY_PASSWORD"
"""Where a private key's passphrase comes from: never an argument, which other users of the machine could read."""

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"

# What OpenSSL takes, and with it the cryptography package.
_LONGEST_PASSPHRASE = 1023

_SUPPORTED = "memscrub signs with EC P-256, P-384, P-521 and Ed25519 keys"


@dataclass(frozen=True)
class PublicKey:
    """A verifying key; `key_id` is the SHA-256 of its PEM encoding, as in model-signing bundles."""

    path: Path
    key_id: str
    key: SSlibKey

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"the key {self.path.name}"

    def open_bundle(self, bundle: Mapping[str, Any], file: str, payload_type: str) -> bytes:
        """The unread payload of a bundle as `PrivateKey.bundle` makes it; `file` is for messages.

        Raises:
            SignatureInvalidError: it is malformed, or its signature is not this key's over this payload.
        """
        material = bundle.get("verificationMaterial")
        if set(bundle) != {"mediaType", "verificationMaterial", "dsseEnvelope"} or bundle["mediaType"] != BUNDLE_TYPE:
            raise SignatureInvalidError(f"{file} is not a model signature bundle.")
        if isinstance(material, dict) and "certificate" in material:
            raise SignatureInvalidError(f"{file} was made with Sigstore and no key; verify it with --sigstore.")
        if not isinstance(material, dict) or set(material) != {"publicKey", "tlogEntries"} or material["tlogEntries"]:
            raise SignatureInvalidError(f"{file} was not made with a key pair; verify it with model_signing.")
        if material["publicKey"] != {"hint": self.key_id}:
            raise SignatureInvalidError(f"{file} was made with another key than {self.path.name}.")
        return self._open(bundle["dsseEnvelope"], file, payload_type, key_id="")

    def open_statement(self, envelope: Mapping[str, Any], file: str, payload_type: str) -> bytes:
        """The unread payload of an envelope as `PrivateKey.statement` makes it; raises as `open_bundle`."""
        return self._open(envelope, file, payload_type, key_id=self.key_id)

    def _open(self, envelope: Any, file: str, payload_type: str, *, key_id: str) -> bytes:
        from securesystemslib.dsse import Envelope
        from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
        from securesystemslib.signer import Signature  # type: ignore[attr-defined]

        payload, signature = _parse_envelope(envelope, file, payload_type, key_id)
        opened = Envelope(payload, payload_type, {key_id: Signature(self.key.keyid, signature.hex())})
        try:
            opened.verify([self.key], threshold=1)
        except (VerificationError, UnverifiedSignatureError):
            message = f"The signature in {file} is not one of {self.name} over its content."
            raise SignatureInvalidError(message) from None
        return payload


@dataclass(frozen=True)
class PrivateKey:
    """A signing key with its public half."""

    public: PublicKey
    key: EllipticCurvePrivateKey | Ed25519PrivateKey

    def __repr__(self) -> str:
        return f"PrivateKey(key_id={self.public.key_id!r})"

    def bundle(self, payload: bytes, payload_type: str) -> dict[str, Any]:
        """An OpenSSF model-signing bundle signed with this key, as a JSON object."""
        return {
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": {"publicKey": {"hint": self.public.key_id}, "tlogEntries": []},
            "dsseEnvelope": self._envelope(payload, payload_type, key_id=""),
        }

    def statement(self, payload: bytes, payload_type: str) -> dict[str, Any]:
        """A DSSE envelope signed with this key, as a JSON object."""
        return self._envelope(payload, payload_type, key_id=self.public.key_id)

    def _envelope(self, payload: bytes, payload_type: str, *, key_id: str) -> dict[str, Any]:
        from securesystemslib.dsse import Envelope
        from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

        envelope = Envelope(payload, payload_type, {})
        signature = envelope.sign(CryptoSigner(self.key, self.public.key))
        signature.keyid = key_id
        result: dict[str, Any] = envelope.to_dict()
        return result


def generate_keypair(
    private_path: str | Path,
    public_path: str | Path,
    *,
    kind: Literal["ec-p256", "ed25519"] = "ec-p256",
    password: str | None = None,
) -> str:
    """Write a new key pair as PEM files, the private one readable by its owner only; return the key id.

    EC P-256 signatures can also be verified by the model_signing command line; Ed25519 ones by memscrub only.

    Raises:
        UsageError: unknown kind, or an empty passphrase.
        OutputError: a file exists already (a key is never overwritten) or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    private, public = Path(private_path), Path(public_path)
    if kind not in ("ec-p256", "ed25519"):
        raise UsageError(f"{kind!r} is not a kind of key; use ec-p256 or ed25519.")
    if password == "":
        raise UsageError("The passphrase is empty; leave it out to store the key unencrypted.")
    phrase = None if password is None else _passphrase_bytes(password)
    # Path.resolve() raises RuntimeError for a circle of links.
    if os.path.realpath(private) == os.path.realpath(public):
        raise UsageError("The private and the public key need two different files.")
    for path in (private, public):
        if os.path.lexists(path):
            raise OutputError(f"{path} exists already; choose another name, keys are never overwritten.")
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec-p256" else ed25519.Ed25519PrivateKey.generate()
    encryption = serialization.NoEncryption() if phrase is None else serialization.BestAvailableEncryption(phrase)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _write_new(private, pem, 0o600)
    try:
        _write_new(public, public_pem, 0o644)
    except BaseException:  # half a pair is of no use, and would block the next attempt
        private.unlink(missing_ok=True)
        raise
    return hashlib.sha256(public_pem).hexdigest()


def load_private_key(path: str | Path, password: str | None) -> PrivateKey:
    """Load a PEM private key.

    Raises:
        UsageError: missing, unreadable, not a supported PEM key; a wrong, missing or unneeded passphrase.
    """
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = read_key(path)
    try:
        key = load_pem_private_key(pem, None if password is None else _passphrase_bytes(password))
    except TypeError:  # the library's way to say that a passphrase is missing, or given and not needed
        state = "is encrypted; set" if is_encrypted(pem) else "is not encrypted; unset"
        raise UsageError(f"The private key {path} {state} {PASSWORD_VARIABLE}.") from None
    except (ValueError, UnsupportedAlgorithm, InternalError):
        if password is not None and is_encrypted(pem):
            raise UsageError(f"The passphrase of {path} is wrong, or the file is damaged; try it again.") from None
        raise UsageError(f"{path} is not a PEM private key; {_SUPPORTED}.") from None
    if not isinstance(key, EllipticCurvePrivateKey | Ed25519PrivateKey):
        raise UsageError(f"{path} is of an unsupported kind; {_SUPPORTED}.")
    return PrivateKey(_public(key.public_key(), Path(path)), key)


def load_public_key(path: str | Path) -> PublicKey:
    """Load a PEM public key.

    Raises:
        UsageError: missing, unreadable, or not a supported PEM public key.
    """
    from cryptography.exceptions import InternalError, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(read_key(path))
    except (ValueError, UnsupportedAlgorithm, InternalError):
        raise UsageError(f"{path} is not a PEM public key; {_SUPPORTED}.") from None
    return _public(key, Path(path))


def is_encrypted(pem: bytes) -> bool:
    """Whether a PEM private key needs a passphrase."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in pem or b"Proc-Type: 4,ENCRYPTED" in pem


def key_id_of(text: str) -> str:
    """A key id as `PublicKey.key_id` has it, from one with or without `sha256:`. Raises UsageError for any other."""
    found = text.strip().lower().removeprefix("sha256:")
    if len(found) != 64 or set(found) - set("0123456789abcdef"):
        raise UsageError(f"{text[:80]!r} is no key id; give sha256: and 64 hex digits, as `memscrub keygen` shows it.")
    return found


def _passphrase_bytes(password: str) -> bytes:
    """A passphrase as the library takes it. Raises UsageError, without the passphrase, for one that it cannot take."""
    try:
        phrase = password.encode()
    except UnicodeEncodeError:
        raise UsageError("The passphrase is not UTF-8 text; choose another one.") from None
    if len(phrase) > _LONGEST_PASSPHRASE:
        raise UsageError(f"The passphrase is longer than {_LONGEST_PASSPHRASE} bytes; choose a shorter one.")
    return phrase


def _public(key: Any, path: Path) -> PublicKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

    curves = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
    is_curve = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, curves)
    if not is_curve and not isinstance(key, ed25519.Ed25519PublicKey):
        raise UsageError(f"{path} is of an unsupported kind; {_SUPPORTED}.")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    key_id = hashlib.sha256(pem).hexdigest()
    return PublicKey(path, key_id, SSlibKey.from_crypto(key, keyid=key_id))


def read_key(path: str | Path) -> bytes:
    """The bytes of a key's file, of an endless one the first. Raises UsageError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:  # not all of it: /dev/zero has no end
            return file.read(1 << 20)
    except OSError as problem:
        raise UsageError(f"The key {path} cannot be read: {problem.strerror}; check the path.") from None


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)  # the umask may have taken the public file's read bits away
            file.write(data)
    except FileExistsError:
        raise OutputError(f"{path} exists already; choose another name, keys are never overwritten.") from None
    except (PermissionError, FileNotFoundError, NotADirectoryError) as problem:
        raise OutputError(f"{path} cannot be written: {problem.strerror}.") from None
    except OSError as problem:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise IncompleteError(f"{path} cannot be written: {problem.strerror}.") from None


def _parse_envelope(envelope: Any, file: str, payload_type: str, key_id: str) -> tuple[bytes, bytes]:
    """Payload and signature bytes of an envelope of exactly the expected form, with one signature."""
    signatures = envelope.get("signatures") if isinstance(envelope, dict) else None
    if signatures is None or set(envelope) != {"payload", "payloadType", "signatures"}:
        raise SignatureInvalidError(f"{file} is not a signed envelope.")
    if envelope["payloadType"] != payload_type:
        raise SignatureInvalidError(f"{file} holds a payload of another type than {payload_type}.")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise SignatureInvalidError(f"{file} must hold exactly one signature.")
    if not isinstance(signatures[0], dict) or set(signatures[0]) != {"sig", "keyid"}:
        raise SignatureInvalidError(f"{file} holds a malformed signature.")
    if signatures[0]["keyid"] != key_id:
        raise SignatureInvalidError(f"{file} was signed with another key.")
    return _strict_base64(envelope["payload"], file), _strict_base64(signatures[0]["sig"], file)


def _strict_base64(text: Any, file: str) -> bytes:
    """Decode the one canonical spelling: base64 otherwise has several texts for the same bytes."""
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None or base64.b64encode(data).decode() != text:
        raise SignatureInvalidError(f"{file} is not properly base64-encoded.")
    return data
