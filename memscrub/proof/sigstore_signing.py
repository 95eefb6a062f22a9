"""Sign and verify without a key of one's own, by an identity that Sigstore vouches for; knows not what is signed.

Signing needs the network: an identity provider, Sigstore's certificate authority and its public log, where the
identity stays readable for ever. Verifying needs none: the roots of trust come with the `sigstore` package (extra
`memscrub[sigstore]`) or from a file. Each signature file is a Sigstore bundle.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memscrub.errors import IncompleteError, SignatureInvalidError, UsageError

if TYPE_CHECKING:
    from sigstore.models import ClientTrustConfig
    from sigstore.oidc import IdentityToken

TOKEN_VARIABLE = "SIGSTORE_IDENTITY_TOKEN"
"""An identity token made elsewhere; without it, that of the CI job, else the browser's."""

_MISSING = "Sigstore's client is not installed; run `pip install 'memscrub[sigstore]'`, or sign and verify with a key."


@dataclass(frozen=True)
class SigstoreIdentity:
    """Whose signature is asked for: an identity (e-mail, or a workflow's URL) and who issued it (a URL).

    `trust_config` is a file with another Sigstore instance's roots of trust (a ClientTrustConfig as JSON).
    """

    identity: str
    issuer: str
    trust_config: Path | None = None

    @property
    def key_id(self) -> str:
        """The identity, where a key has its id."""
        return f"{self.identity} ({self.issuer})"

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.identity!r}"

    def open_bundle(self, bundle: Mapping[str, Any], file: str, payload_type: str) -> bytes:
        """The unread payload of a Sigstore bundle that this identity signed; `file` is for messages.

        Raises:
            SignatureInvalidError: it is no such bundle, or any of Sigstore's checks fails.
            UsageError: Sigstore's client is not installed, or the trust configuration cannot be used.
        """
        config = _trust_config(self.trust_config, offline=True)
        from sigstore.errors import Error
        from sigstore.models import Bundle
        from sigstore.verify import Verifier
        from sigstore.verify.policy import Identity

        material = bundle.get("verificationMaterial")
        if isinstance(material, dict) and "publicKey" in material:
            raise SignatureInvalidError(f"{file} was made with a key pair and not with Sigstore; verify it with --key.")
        try:
            opened = Bundle.from_json(json.dumps(bundle))
            policy = Identity(identity=self.identity, issuer=self.issuer)
            kind, payload = Verifier(trusted_root=config.trusted_root).verify_dsse(opened, policy)
        except (Error, ValueError, TypeError, KeyError) as problem:
            raise SignatureInvalidError(
                f"{file} carries no signature of {self.name} that Sigstore vouches for ({_brief(problem)})."
            ) from None
        if kind != payload_type:
            raise SignatureInvalidError(f"{file} holds a payload of another type than {payload_type}.")
        return payload

    def open_statement(self, envelope: Mapping[str, Any], file: str, payload_type: str) -> bytes:
        """As `open_bundle`: with Sigstore, statements are bundles too."""
        return self.open_bundle(envelope, file, payload_type)


@dataclass
class SigstoreSigner:
    """Signs as whoever runs it. Made before the work begins, so that a lack of network or identity shows then.

    Raises:
        UsageError: Sigstore's client is not installed, or there is no way to an identity here.
        IncompleteError: Sigstore cannot be reached.
    """

    trust_config: Path | None = None
    _config: ClientTrustConfig = field(init=False, repr=False)
    _token: IdentityToken | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self._config = _trust_config(self.trust_config, offline=False)
        if os.environ.get(TOKEN_VARIABLE):
            self._identity()
        elif not self._ambient() and not sys.stderr.isatty():
            raise UsageError(
                "There is no identity to sign with: give the CI job one (GitHub: `id-token: write`), set"
                f" {TOKEN_VARIABLE}, or run on a terminal."
            )

    @property
    def public(self) -> SigstoreIdentity:
        """Whose signatures these are."""
        token = self._identity()
        return SigstoreIdentity(token.identity, token.federated_issuer, self.trust_config)

    def bundle(self, payload: bytes, payload_type: str) -> dict[str, Any]:
        """A Sigstore bundle over a statement, as a JSON object; entered in the public log."""
        from sigstore.dsse import Statement
        from sigstore.sign import SigningContext

        token, failures = self._identity(), _client_errors()
        try:
            with SigningContext.from_trust_config(self._config).signer(token) as signer:
                signed = signer.sign_dsse(Statement(payload))
        except failures as problem:
            raise IncompleteError(f"Sigstore did not sign ({_brief(problem)}); sign with a key, or again.") from None
        value: dict[str, Any] = json.loads(signed.to_json())
        return value

    def statement(self, payload: bytes, payload_type: str) -> dict[str, Any]:
        """As `bundle`."""
        return self.bundle(payload, payload_type)

    def _identity(self) -> IdentityToken:
        """The token that says who signs; asked for when it is needed, because it lives for minutes only."""
        from sigstore.oidc import IdentityToken, Issuer

        if self._token is not None and self._token.in_validity_period():
            return self._token
        failures, given = _client_errors(), os.environ.get(TOKEN_VARIABLE)
        try:
            raw = given or self._ambient()
            issuer = None if raw else Issuer(self._config.signing_config.get_oidc_url())
            self._token = IdentityToken(raw) if raw else issuer.identity_token()  # type: ignore[union-attr]
        except failures as problem:
            if given:
                raise UsageError(f"{TOKEN_VARIABLE} is no valid token ({_brief(problem)}); get a new one.") from None
            raise IncompleteError(f"Sigstore gave no identity to sign with ({_brief(problem)}); run again.") from None
        return self._token

    def _ambient(self) -> str | None:
        """The token of the CI job that this runs in; None anywhere else."""
        from sigstore.errors import Error
        from sigstore.oidc import detect_credential

        try:
            return detect_credential()
        except Error as problem:
            raise UsageError(f"The CI job has no identity to sign with ({_brief(problem)}); grant it one.") from None


def _trust_config(path: Path | None, *, offline: bool) -> ClientTrustConfig:
    """The roots of trust and the services: from a file, else those of the public instance."""
    try:
        from sigstore.errors import Error
        from sigstore.models import ClientTrustConfig
    except ImportError:
        raise UsageError(_MISSING) from None
    if not logging.getLogger("sigstore").handlers:  # it would warn of being offline
        logging.getLogger("sigstore").addHandler(logging.NullHandler())
    if path is None:
        try:
            return ClientTrustConfig.production(offline=offline)
        except (Error, OSError, ValueError) as problem:
            raise IncompleteError(
                f"Sigstore cannot be reached ({_brief(problem)}); check the network, or sign with a key instead."
            ) from None
    try:
        return ClientTrustConfig.from_json(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(f"The trust configuration {path} cannot be read: {problem.strerror}.") from None
    except (Error, ValueError):
        raise UsageError(f"{path} is not a trust configuration of Sigstore (ClientTrustConfig as JSON).") from None


def _client_errors() -> tuple[type[Exception], ...]:
    """What the client raises; not all of it has a base class in common."""
    import requests
    from sigstore._internal.fulcio import ExpiredCertificate
    from sigstore._internal.fulcio.client import FulcioClientError
    from sigstore._internal.rekor import RekorClientError
    from sigstore.errors import Error
    from sigstore.oidc import ExpiredIdentity, IssuerError

    services = (ExpiredCertificate, ExpiredIdentity, FulcioClientError, IssuerError, RekorClientError)
    return (Error, requests.RequestException, *services, ValueError, KeyError)


def _brief(problem: BaseException) -> str:
    """The first line of a foreign message, short enough for a sentence."""
    lines = str(problem).strip().splitlines()
    return (lines[0] if lines else type(problem).__name__)[:160].rstrip(".")
