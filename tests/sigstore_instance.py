"""A whole Sigstore instance on this machine, for tests: certificate authority, certificate log and signature log.

It issues real certificates with real timestamps from a real (one-entry) log over HTTP, so that sigstore's client runs
as it does against the public instance. Only the identity provider is missing: the tests make their own tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ISSUER = "https://issuer.test"
_ISSUER_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_SCT_EXTENSION = x509.ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_SHA256 = ec.ECDSA(hashes.SHA256())


def token(identity: str, *, seconds: int = 600) -> str:
    """An identity token as a provider would give it; the instance below believes anybody."""
    now = int(time.time())
    claims = {"iss": ISSUER, "sub": identity, "aud": "sigstore", "iat": now, "exp": now + seconds}
    return jwt.encode(claims, "any key will do, nobody checks it", algorithm="HS256")


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.DER, form)


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class Instance:
    """The keys of all parts, and what its log holds. `refuse` makes it answer every request with that status."""

    url: str = ""
    refuse: int | None = None
    ca_key: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    ct_key: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    log_key: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    entries: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test CA")])
        ca = _builder(name, name, self.ca_key.public_key(), timedelta(days=1))
        ca = ca.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        ca = ca.add_extension(_usage(authority=True), critical=True)
        own = x509.SubjectKeyIdentifier.from_public_key(self.ca_key.public_key())
        self.ca = ca.add_extension(own, critical=False).sign(self.ca_key, hashes.SHA256())

    def certificate(self, public_key: Any, identity: str, issuer: str) -> x509.Certificate:
        """What the authority issues: the identity, the issuer, and the certificate log's promise (RFC 6962)."""
        san = x509.RFC822Name(identity) if "@" in identity else x509.UniformResourceIdentifier(identity)
        leaf = _builder(x509.Name([]), self.ca.subject, public_key, timedelta(minutes=10))
        for extension, critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(authority=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False),
            (x509.SubjectAlternativeName([san]), True),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca_key.public_key()), False),
            (x509.UnrecognizedExtension(_ISSUER_EXTENSION, issuer.encode()), False),
        ):
            leaf = leaf.add_extension(extension, critical)
        unlogged = leaf.sign(self.ca_key, hashes.SHA256()).tbs_certificate_bytes
        moment = int(time.time() * 1000)
        signed = struct.pack("!BBQH", 0, 0, moment, 1) + hashlib.sha256(_der(self.ca_key)).digest()
        signed += len(unlogged).to_bytes(3, "big") + unlogged + struct.pack("!H", 0)
        signature = self.ct_key.sign(signed, _SHA256)
        promise = b"\0" + hashlib.sha256(_der(self.ct_key)).digest() + struct.pack("!QH", moment, 0)
        promise += struct.pack("!BBH", 4, 3, len(signature)) + signature
        listed = struct.pack("!HH", len(promise) + 2, len(promise)) + promise
        octets = b"\x04" + (bytes([len(listed)]) if len(listed) < 128 else b"\x81" + bytes([len(listed)])) + listed
        leaf = leaf.add_extension(x509.UnrecognizedExtension(_SCT_EXTENSION, octets), critical=False)
        return leaf.sign(self.ca_key, hashes.SHA256())

    def entry(self, envelope: dict[str, Any], text: str, verifier: str) -> dict[str, Any]:
        """What the log answers to a new envelope: its entry in a tree of one leaf, with proof and promise."""
        body = _canonical({
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": _hash(text.encode()),
                "payloadHash": _hash(base64.b64decode(envelope["payload"])),
                "signatures": [{"signature": s["sig"], "verifier": verifier} for s in envelope["signatures"]],
            },
        })  # fmt: skip
        self.entries.append(body)
        log_id, moment = hashlib.sha256(_der(self.log_key)).digest(), int(time.time())
        root = hashlib.sha256(b"\0" + body).digest()
        note = f"log.test\n1\n{_b64(root)}\n"
        signature = _b64(log_id[:4] + self.log_key.sign(note.encode(), _SHA256))
        promise = {"body": _b64(body), "integratedTime": moment, "logID": log_id.hex(), "logIndex": 0}
        proof = {
            "checkpoint": f"{note}\n\u2014 log.test {signature}\n",
            "hashes": [],
            "logIndex": 0,
            "rootHash": root.hex(),
            "treeSize": 1,
        }
        stamp = _b64(self.log_key.sign(_canonical(promise), _SHA256))
        return {root.hex(): promise | {"verification": {"inclusionProof": proof, "signedEntryTimestamp": stamp}}}

    def trust_config(self, path: Path) -> Path:
        """The file with this instance's roots of trust and services, as Sigstore's client reads it."""
        start = {"start": "2020-01-01T00:00:00Z"}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            details = {"rawBytes": _b64(_der(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": start}
            log_id = {"keyId": _b64(hashlib.sha256(_der(key)).digest())}
            return {"baseUrl": self.url, "hashAlgorithm": "SHA2_256", "publicKey": details, "logId": log_id}

        authority = {
            "subject": {"commonName": "Test CA", "organization": "test"},
            "uri": self.url,
            "certChain": {"certificates": [{"rawBytes": _b64(self.ca.public_bytes(serialization.Encoding.DER))}]},
            "validFor": start,
        }
        service = [{"url": self.url, "majorApiVersion": 1, "validFor": start, "operator": "test"}]
        value = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [log(self.log_key)],
                "ctlogs": [log(self.ct_key)],
                "certificateAuthorities": [authority],
                "timestampAuthorities": [],
            },
            "signing_config": {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": service,
                "oidcUrls": service,
                "rekorTlogUrls": service,
                "tsaUrls": [],
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            },
        }
        path.write_text(json.dumps(value))
        return path


@contextmanager
def running() -> Iterator[Instance]:
    """An instance that answers on a port of this machine until the end of the block."""
    instance = Instance()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if instance.refuse is not None:
                return self._answer(instance.refuse, {"code": instance.refuse, "message": "not today"})
            if self.path == "/api/v2/signingCert":
                claims = jwt.decode(self.headers["Authorization"].split()[1], options={"verify_signature": False})
                csr = x509.load_pem_x509_csr(base64.b64decode(request["certificateSigningRequest"]))
                leaf = instance.certificate(csr.public_key(), claims["sub"], claims["iss"])
                chain = [c.public_bytes(serialization.Encoding.PEM).decode() for c in (leaf, instance.ca)]
                return self._answer(200, {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}})
            content = request["spec"]["proposedContent"]
            text, (verifier,) = content["envelope"], content["verifiers"]
            self._answer(201, instance.entry(json.loads(text), text, verifier))

        def _answer(self, status: int, value: dict[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    instance.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield instance
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, life: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + life)


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _hash(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}
