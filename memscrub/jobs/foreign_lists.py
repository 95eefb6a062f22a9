"""A list of protected texts in another tool's format, opened with the checkpoint's tokenizer and put under a class.

Knows the policy's classes and the tokenizer, not the formats themselves (`list_formats`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from memscrub.errors import UsageError
from memscrub.models.model import LoadedModel
from memscrub.policy.document import Policy
from memscrub.storage.untrusted_config import Encoding
from memscrub.texts.list_formats import read_format
from memscrub.texts.protected import ProtectedList, as_list


@dataclass(frozen=True)
class ForeignSource:
    """Where a list lies, in which format, whose limits apply, and where in it the texts are."""

    format: str
    path: Path
    class_name: str | None = None
    split: str | None = None
    text_column: str = "text"
    prefix_column: str | None = None
    suffix_column: str | None = None


def class_for(policy: Policy, name: str | None) -> str:
    """The class whose limits a list of texts without classes is held to.

    Raises UsageError where the policy leaves that open, has no such class, or asks for marked secrets in it.
    """
    if name is None:
        if len(policy.classes) > 1:
            raise UsageError(
                f"{policy.path} has the classes {', '.join(policy.classes)}; say with --list-class whose limits apply."
            )
        (name,) = policy.classes
    if name not in policy.classes:
        raise UsageError(f"{policy.path} has no class '{name}'; it has {', '.join(policy.classes)}.")
    if policy.classes[name].secret:
        raise UsageError(
            f"class '{name}' has secret = true, but lists in other formats mark no secrets; choose another class."
        )
    return name


def read_foreign(loaded: LoadedModel, policy: Policy, source: ForeignSource) -> tuple[ProtectedList, tuple[str, ...]]:
    """The texts of a foreign list, and remarks for the user on how they were read.

    Raises UsageError for an unknown format or class, ProtectedTextError for a file that is not of the format,
    CheckpointError where the tokenizer fails.
    """

    def decode(ids: Sequence[int]) -> str:
        with Encoding():
            return str(
                loaded.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            )

    def encode(text: str) -> Sequence[int]:
        with Encoding():
            ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    found = read_format(
        source.format,
        source.path,
        decode=decode,
        encode=encode,
        vocabulary=loaded.vocabulary,
        class_name=class_for(policy, source.class_name),
        text_column=source.text_column,
        prefix_column=source.prefix_column,
        suffix_column=source.suffix_column,
        split=source.split,
    )
    return as_list(found.texts), found.remarks
