"""What a run was made from, as a signed statement names it; knows in-toto descriptors, no signature and no file.

The `configuration` of a test-result statement lists, beside the policy, one resource descriptor for each input that
decides what comes out. All but the policy are known by their `uri`:

    urn:memscrub:base-checkpoint   digest of the checkpoint before the edit, over all its files (`files.tree_digest`)
    urn:memscrub:protected-list    HMAC-SHA-256 of the list under the owner's key; absent without a key
    urn:memscrub:patch             digest of the patch file; absent without `--patch`
    urn:memscrub:run:v1            seed, device, arithmetic, Python and platform, as annotations
    pkg:pypi/NAME@VERSION          the packages that computed it, memscrub first
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import quote, unquote

from memscrub.reports.report import Report

BASE = "urn:memscrub:base-checkpoint"
PROTECTED = "urn:memscrub:protected-list"
PATCH = "urn:memscrub:patch"
RUN = "urn:memscrub:run:v1"
_PACKAGE = "pkg:pypi/"

PACKAGES = (
    "memscrub", "torch", "transformers", "tokenizers", "safetensors", "numpy", "rapidfuzz", "huggingface_hub",
    "cryptography", "securesystemslib", "in-toto-attestation", "protobuf", "pydantic",
)  # fmt: skip
"""Whose versions a statement names: what reads, computes, writes and signs."""

_MEASURED = ("memscrub", "torch", "transformers")
"""Those of them that a report names too."""


@dataclass(frozen=True)
class Provenance:
    """What a result was made from: digests in lower-case hex, `run` and `packages` as names to values."""

    base: str
    protected: str | None = None
    patch: str | None = None
    run: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)

    def descriptors(self) -> list[dict[str, Any]]:
        """The entries of a test-result's `configuration`, without the policy's."""
        found: list[dict[str, Any]] = [{"name": "base", "uri": BASE, "digest": {"sha256": self.base}}]
        if self.protected is not None:
            found.append({"name": "protected", "uri": PROTECTED, "digest": {"hmac_sha256": self.protected}})
        if self.patch is not None:
            found.append({"name": "patch", "uri": PATCH, "digest": {"sha256": self.patch}})
        found.append({"name": "run", "uri": RUN, "annotations": dict(self.run)})
        packages = [{"name": name, "uri": f"{_PACKAGE}{name}@{quote(of)}"} for name, of in self.packages.items()]
        return found + packages


def provenance_of(report: Report, patch: str | None) -> Provenance:
    """The provenance of a run from its report, and the SHA-256 of its patch file where one was written."""
    made = report.environment
    run = {
        "seed": str(made.seed),  # as text: numbers in a statement are floats, which a seed may exceed
        "device": made.device,
        "dtype": made.dtype,
        "python": made.python,
        "platform": made.platform,
    }
    # What the report names is what measured, also where a resumed run is signed by another installation.
    packages = installed() | {name: getattr(made, name) for name in _MEASURED}
    return Provenance(report.input.sha256, report.protected.hmac_sha256, patch, run, packages)


def installed() -> dict[str, str]:
    """The versions of the packages named above that are installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def read_provenance(configuration: Any) -> Provenance | None:
    """The inverse of `descriptors`; None where a statement names no base: those before 0.1.0 was released.

    Raises:
        ValueError: an entry is malformed or there twice.
    """
    entries: dict[str, Mapping[str, Any]] = {}
    for entry in configuration if isinstance(configuration, list) else [None]:
        if not isinstance(entry, dict):
            raise ValueError("its configuration is no list of descriptors")
        uri = entry.get("uri")
        if uri is None:
            continue
        if not isinstance(uri, str) or uri in entries:
            raise ValueError("an entry of its configuration is there twice")
        entries[uri] = entry
    if BASE not in entries:
        return None
    packages = [uri.removeprefix(_PACKAGE).partition("@") for uri in entries if uri.startswith(_PACKAGE)]
    return Provenance(
        base=_digest(entries, BASE, "sha256") or "",
        protected=_digest(entries, PROTECTED, "hmac_sha256"),
        patch=_digest(entries, PATCH, "sha256"),
        run=_annotations(entries),
        packages={name: unquote(of) for name, _, of in packages},
    )


def contradiction(provenance: Provenance, policies: Mapping[str, str], report: Mapping[str, Any]) -> str | None:
    """Which fact a statement and the report beside it (as JSON) do not agree on; None where they agree."""

    def stated(section: str, key: str) -> Any:
        value = report.get(section)
        return value.get(key) if isinstance(value, dict) else None

    if stated("input", "sha256") != provenance.base:
        return "the base checkpoint"
    if stated("policy", "sha256") not in policies.values():
        return "the policy"
    if stated("protected", "hmac_sha256") != provenance.protected:
        return "the protected list"
    if stated("edit", "patch_sha256") != provenance.patch:
        return "the patch"
    for key, value in provenance.run.items():
        if str(stated("environment", key)) != value:
            return f"the {key}"
    for name in _MEASURED:
        if name in provenance.packages and stated("environment", name) != provenance.packages[name]:
            return f"the version of {name}"
    return None


def _digest(entries: Mapping[str, Mapping[str, Any]], uri: str, algorithm: str) -> str | None:
    if uri not in entries:
        return None
    digest = entries[uri].get("digest")
    value = digest.get(algorithm) if isinstance(digest, dict) and set(digest) == {algorithm} else None
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError(f"its configuration has no proper digest of {uri}")
    return value


def _annotations(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    values = entries.get(RUN, {}).get("annotations")
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError("its configuration does not say how it was run")
    return dict(values)
