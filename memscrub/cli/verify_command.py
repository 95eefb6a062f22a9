"""The commands `memscrub verify` and `memscrub keygen`: parse, call, say what was found; a part of the command line.

Heavy modules are imported inside them, so that `memscrub --help` does not load torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memscrub.cli.options import Directory, PublicKey, Quiet
from memscrub.errors import SignatureInvalidError, UsageError

if TYPE_CHECKING:
    from memscrub.proof.provenance import Provenance
    from memscrub.proof.signing import Verification, Verifier

KeyId = Annotated[
    str | None,
    typer.Option("--key-id", metavar="ID", help="The key must have this id (sha256:...), as `keygen` shows it."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="CKPT", help="The checkpoint before the edit: only what the report states differs."),
]
Patch = Annotated[Path | None, typer.Option("--patch", help="This file must be the patch that the statement names.")]
Sigstore = Annotated[bool, typer.Option("--sigstore", help="Verify a signature of Sigstore instead of a key's.")]
Identity = Annotated[
    str | None, typer.Option("--identity", help="With --sigstore: who must have signed, an e-mail or a workflow's URL.")
]
Issuer = Annotated[
    str | None, typer.Option("--issuer", help="With --sigstore: the URL of who vouched for that identity.")
]
TrustConfig = Annotated[
    Path | None, typer.Option("--trust-config", help="With --sigstore: roots of trust of another instance (JSON).")
]
Unsigned = Annotated[bool, typer.Option("--unsigned", help="With --base and no key: check the edit, no signature.")]
Encrypt = Annotated[bool, typer.Option("--encrypt", help="Ask for a passphrase, where MEMSCRUB_KEY_PASSWORD has none.")]


def verify(
    directory: Directory,
    key: PublicKey = None,
    key_id: KeyId = None,
    base: Base = None,
    patch: Patch = None,
    sigstore: Sigstore = False,
    identity: Identity = None,
    issuer: Issuer = None,
    trust_config: TrustConfig = None,
    unsigned: Unsigned = False,
    quiet: Quiet = False,
) -> None:
    """Check signature, digests and file list, offline. With --base also the edit itself. Exit 0: good, 5: not."""
    from memscrub.proof.signing import verify_directory

    signed_by = _signed_by(key, sigstore, identity, issuer, trust_config)
    if (signed_by is None) != unsigned:
        raise UsageError("name the public key with --key or the signer with --sigstore, or say --unsigned with --base.")
    if unsigned and (base is None or key_id is not None or patch is not None):
        raise UsageError("--unsigned checks the edit against --base and nothing that only a signature can vouch for.")
    if sigstore and key_id is not None:
        raise UsageError("--key-id is for keys; with --sigstore, --identity and --issuer say who must have signed.")
    found = None if signed_by is None else verify_directory(directory, signed_by, key_id=key_id)
    if found is not None and patch is not None:
        _check_patch(patch, found.provenance)
    if not quiet and found is not None:
        _show(found)
    if base is not None:
        from memscrub.proof.edit_ledger import check_edit

        edit = check_edit(directory, base, files=None if found is None else found.files)
        if not quiet:
            if found is None:
                typer.echo("signature not checked (--unsigned): anybody may have written this directory")
            typer.echo("edit good: from the base differs what the report states, and nothing else:")
            typer.echo(f"{edit.tensors} tensors, {edit.vectors} output vectors, {edit.elements} elements")


def _signed_by(
    key: Path | None, sigstore: bool, identity: str | None, issuer: str | None, trust_config: Path | None
) -> Path | Verifier | None:
    """Whose signature is asked for; None where none of the options says so."""
    if not sigstore:
        if identity is not None or issuer is not None or trust_config is not None:
            raise UsageError("--identity, --issuer and --trust-config belong to --sigstore; give that too.")
        return key
    if key is not None:
        raise UsageError("--key and --sigstore exclude each other: a signature is a key's or Sigstore's.")
    if identity is None or issuer is None:
        raise UsageError("--sigstore needs --identity and --issuer: who must have signed, and who vouched for that.")
    from memscrub.proof.sigstore_signing import SigstoreIdentity

    return SigstoreIdentity(identity, issuer, trust_config)


def _check_patch(patch: Path, provenance: Provenance | None) -> None:
    from memscrub.storage.files import sha256_file

    if provenance is None or provenance.patch is None:
        raise SignatureInvalidError(f"The signed statement names no patch, so {patch} is not vouched for.")
    if not patch.is_file():
        raise UsageError(f"{patch} is not a file; name the patch that `memscrub fix --patch` wrote.")
    if sha256_file(patch) != provenance.patch:
        raise SignatureInvalidError(f"{patch} is not the patch that the signed statement names.")


def _show(found: Verification) -> None:
    """What the signature proves, in lines of 80 columns."""
    from memscrub.proof.statements import policies_in

    typer.echo(f"signature good: {len(found.files)} files, signed result: {found.result or 'no report'}")
    typer.echo(f"key      {found.key_id}" if " " in found.key_id else f"key      sha256:{found.key_id}")
    typer.echo(f"model    sha256:{found.root_digest}")
    made = found.provenance
    if made is None:
        return
    typer.echo(f"base     sha256:{made.base}")
    for digest in policies_in(found.statements[0].predicate.get("configuration")).values():
        typer.echo(f"policy   sha256:{digest}")
    if made.protected is not None:
        typer.echo(f"list     hmac:{made.protected}")
    if made.patch is not None:
        typer.echo(f"patch    sha256:{made.patch}")
    run = made.run
    typer.echo(f"run      seed {run.get('seed')}, device {run.get('device')}, {run.get('dtype')}")
    versions = {"python": run.get("python"), **made.packages}
    shown = [f"{name} {versions[name]}" for name in ("memscrub", "python", "torch", "transformers") if name in versions]
    typer.echo(f"with     {', '.join(shown)}")


def keygen(
    private: Annotated[Path, typer.Argument(help="File for the private key.")] = Path("key.pem"),
    public: Annotated[Path, typer.Argument(help="File for the public key.")] = Path("key.pub.pem"),
    kind: Annotated[str, typer.Option("--kind", help="ec-p256 or ed25519.")] = "ec-p256",
    encrypt: Encrypt = False,
) -> None:
    """Make a key pair for signing. --encrypt or MEMSCRUB_KEY_PASSWORD protects the private key."""
    from memscrub.proof.keys import PASSWORD_VARIABLE, generate_keypair

    if kind not in ("ec-p256", "ed25519"):
        raise UsageError(f"the kind of key '{kind}' is not known; use ec-p256 or ed25519.")
    password = os.environ.get(PASSWORD_VARIABLE)
    if encrypt and password is None:
        if not sys.stdin.isatty():
            raise UsageError(f"--encrypt asks for a passphrase on a terminal; here, set {PASSWORD_VARIABLE} instead.")
        password = typer.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    chosen = "ec-p256" if kind == "ec-p256" else "ed25519"
    key_id = generate_keypair(private, public, kind=chosen, password=password)  # type: ignore[arg-type]
    secret = "encrypted" if password is not None else "keep it secret"
    typer.echo(f"wrote {private} ({secret}) and {public} (hand it to whoever verifies)")
    typer.echo(f"key id   sha256:{key_id}")
