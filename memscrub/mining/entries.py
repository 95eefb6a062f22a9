"""From stretches that a model gives away to a protected list: near-copies grouped, entries tried in the form in which
they are written; knows the formats, not how the stretches were found.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from memscrub.mining.near_copies import NearCopies, group
from memscrub.mining.stretches import Stretch, strongest
from memscrub.storage.files import replacing
from memscrub.storage.partial import disk_errors
from memscrub.texts.corpora import CorpusFile
from memscrub.texts.normal_form import nfc

# Longest emitted run of each text behind its prompt and prefix, as (prefix, text) pairs; None where it is too long.
Runs = Callable[[Sequence[tuple[str, str]]], list["int | None"]]
PLACES = 16
"""Places of an entry that are written down; `occurrences` counts all."""


@dataclass(frozen=True)
class Entry:
    """A text for the protected list. `run`: the longest piece that comes out of it, written as it is.

    `confirmed`: that is over the limit. `occurrences`: places of the corpus where it, or a near-copy, came out.
    """

    id: str
    class_name: str
    text: str = field(repr=False)
    prefix: str = field(repr=False)
    run: int
    confirmed: bool
    occurrences: int
    places: tuple[str, ...]

    def list_line(self) -> dict[str, Any]:
        """The keys of a protected list."""
        values = {"id": self.id, "class": self.class_name, "text": self.text, "source": self.places[0]}
        return {**values, "prefix": self.prefix} if self.prefix else values

    def source_line(self) -> dict[str, Any]:
        """What a protected list has no keys for; holds no text."""
        return {
            "id": self.id,
            "class": self.class_name,
            "run": self.run,
            "confirmed": self.confirmed,
            "occurrences": self.occurrences,
            "places": list(self.places),
        }


@dataclass(frozen=True)
class Sifted:
    """What is left of the stretches: those that stand for a group each, with the whole group, and counts on the way.

    `merged_away`: what pieces of one document had in common; `telling`: stretches then; `in_controls`: of these,
    given away of control texts too; `guessed`: stretches that come out of the control texts.
    """

    groups: tuple[tuple[Stretch, ...], ...] = field(repr=False)
    merged_away: int
    telling: int
    in_controls: int
    guessed: int


def sift(stretches: Sequence[Stretch], controls: int, similarity: float) -> Sifted:
    """Merge what pieces of one document have in common, drop what controls give away too, group near-copies.

    Of the files the first `controls` hold control texts. In a group the first stretch is the longest.
    """
    given = [stretch for stretch in stretches if stretch.file >= controls]
    found = _merged(given)
    boilerplate = NearCopies(similarity)
    guessed = _merged([stretch for stretch in stretches if stretch.file < controls])
    for stretch in guessed:
        boilerplate.add(stretch.given_away)
    own = [stretch for stretch in found if boilerplate.find(stretch.given_away) is None] if guessed else found
    members: defaultdict[int, list[Stretch]] = defaultdict(list)
    for i, stands in enumerate(group([stretch.given_away for stretch in own], similarity)):
        members[stands].append(own[i])
    groups = tuple((own[i], *(s for s in members[i] if s is not own[i])) for i in sorted(members))
    return Sifted(groups, len(given) - len(found), len(found), len(found) - len(own), len(guessed))


def _merged(stretches: Sequence[Stretch]) -> list[Stretch]:
    ordered = sorted(stretches, key=lambda s: (s.file, s.document))
    documents = groupby(ordered, key=lambda s: (s.file, s.document))
    return [stretch for _, of_document in documents for stretch in strongest(of_document)]


def entries(
    sifted: Sifted, files: Sequence[CorpusFile], runs: Runs, *, class_name: str, limit: int
) -> tuple[Entry, ...]:
    """The groups as entries of a list, in order of place, each in a form in which it comes out.

    First the stretch behind its lead alone is tried; where that does not call it up, all that the model had read
    before it when it came out goes before it as `prefix`.
    """
    made = []
    for number, stretches in enumerate(sifted.groups, 1):
        first = stretches[0]
        places = sorted(stretches, key=lambda s: (s.file, s.document, s.begin))
        lead, context = first.text[first.lead - first.context :], first.text[: first.lead - first.context]
        made.append(
            Entry(
                id=f"mined-{number:05d}",
                class_name=class_name,
                # White space alone is no prefix that a list may hold.
                text=lead if context.strip() else context + lead,
                prefix=context if context.strip() else "",
                run=0,
                confirmed=False,
                occurrences=len(stretches),
                places=tuple(_place(files, stretch) for stretch in places[:PLACES]),
            )
        )
    alone = [replace(entry, prefix="") for entry in made]
    tried = _tried(alone, runs, limit)
    again = [i for i, entry in enumerate(tried) if not entry.confirmed and made[i].prefix]
    for i, entry in zip(again, _tried([made[i] for i in again], runs, limit), strict=True):
        tried[i] = max(tried[i], entry, key=lambda each: each.run)
    return tuple(tried)


def _tried(made: Sequence[Entry], runs: Runs, limit: int) -> list[Entry]:
    """The entries with their runs; one that the model cannot read whole loses its prefix, or its beginning."""
    found = list(made)
    waiting = list(range(len(found)))
    while waiting:
        results = runs([(found[i].prefix, found[i].text) for i in waiting])
        for i, run in zip(waiting, results, strict=True):
            if run is not None:
                found[i] = replace(found[i], run=run, confirmed=run > limit)
            elif found[i].prefix:
                found[i] = replace(found[i], prefix="")
            else:
                found[i] = replace(found[i], text=found[i].text[len(found[i].text) // 8 + 1 :])
        waiting = [i for i, run in zip(waiting, results, strict=True) if run is None]
    return found


def _place(files: Sequence[CorpusFile], stretch: Stretch) -> str:
    # A file name need not be Unicode; a list must.
    name = os.fsencode(files[stretch.file].path).decode("utf-8", errors="replace")
    return nfc(f"{name}:{stretch.line} (character {stretch.begin})")


def list_files(out: Path, made: Sequence[Entry]) -> dict[Path, bytes]:
    """What is to be written where: to a file beside `out` what a list has no keys for, and last the list to `out`."""
    return {
        sources_file(out): _as_lines([entry.source_line() for entry in made]),
        out: _as_lines([entry.list_line() for entry in made]),
    }


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write the files in their order, each complete or not at all.

    They hold or point to texts that must not get out: only their owner may read them.
    """
    for path, content in contents.items():
        with disk_errors(path), replacing(path, private=True) as temporary, temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def sources_file(out: Path) -> Path:
    """Where sources, counts and runs of a list's entries are written."""
    return out.with_name(out.name.removesuffix(".jsonl") + ".sources.jsonl")


def _as_lines(lines: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
