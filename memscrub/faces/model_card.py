"""A report as a section of a model card (README.md with metadata), between markers; knows text, writes no file.

The metadata on top of an existing card stays as it is, to the byte; what stands outside the markers too.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError  # type: ignore[import-untyped]

from memscrub.errors import OutputError, UsageError
from memscrub.faces.markdown import foot, head
from memscrub.proof.statements import SIGNATURE
from memscrub.reports.report import Report

BEGIN = "<!-- memscrub: begin (written by `memscrub report --model-card`) -->"
END = "<!-- memscrub: end -->"
_NEW = "---\ntags:\n- memscrub\n---\n"


def updated(card: str, report: Report, path: Path) -> str:
    """The card with the report's section renewed, or added at its end; an empty card becomes one with metadata.

    Raises UsageError when the card's metadata is no YAML mapping, or its markers do not come as one pair.
    """
    end_of_line = "\r\n" if "\r\n" in card else "\n"
    section = end_of_line.join([BEGIN, "", *_section(report), END])
    top, body = _parts(card, path)
    counts = body.count(BEGIN), body.count(END)
    if counts == (0, 0):
        gap = "" if not body.strip() else end_of_line if body.endswith("\n") else 2 * end_of_line
        return f"{top or _NEW}{body}{gap}{section}{end_of_line}" if card.strip() else f"{_NEW}\n{section}\n"
    before, _, rest = body.partition(BEGIN)
    _, found, after = rest.partition(END)
    if counts != (1, 1) or not found:
        raise UsageError(
            f"{path}: memscrub's markers do not come as one pair there; delete them and what stands between them."
        )
    return f"{top}{before}{section}{after}"


def refuse_signed(path: Path) -> None:
    """Raise OutputError when `path` lies in a signed directory, whose signature a change would break."""
    for folder in Path(path.absolute()).resolve().parents:
        if (folder / SIGNATURE).is_file():
            raise OutputError(
                f"{path} lies in {folder}, which is signed: a change would break its signature; name a file outside it."
            )


def _section(report: Report) -> list[str]:
    return [*head(report), *foot(report)]


def _parts(card: str, path: Path) -> tuple[str, str]:
    """The metadata block and the text behind it, read as huggingface_hub reads them."""
    if not card.lstrip().startswith("---"):
        return "", card
    try:
        body: str = ModelCard(card, ignore_metadata_errors=True).text
    except (YAMLError, ValueError, TypeError) as error:
        kind = type(error).__name__
        raise UsageError(f"{path}: the metadata on top of the card is not valid ({kind}); correct it first.") from None
    return card[: len(card) - len(body)], body
