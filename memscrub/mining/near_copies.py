"""Which texts are near-copies of another, or lie in it, among very many; plain strings, knows no files and no models.

Fingerprints are chosen by winnowing (Schleimer, Wilkerson, Aiken, "Winnowing", SIGMOD 2003): of every `_WINDOW`
running hashes of `_GRAM` words the least, so two texts that share `_GRAM + _WINDOW - 1` words running share a
fingerprint. Texts are compared only where they share some, and only along the alignment that most of these agree on.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

from rapidfuzz.distance import Levenshtein

_GRAM = 4
_WINDOW = 4
# Fingerprints that this many different texts have in common are a template (a form, a licence's header): they tell
# nothing apart, and following them would make the work quadratic.
_COMMON = 8
_COMPARED = 4
_SPACE = re.compile(r"\s+")
# A script without spaces has no long words: each of its characters counts as one.
_WORD = re.compile(r"[!-~]+|\S")
_DIGITS = re.compile(r"\d+")
# What an alignment may be off by, in characters, beside the edits that the similarity allows: a few words.
_SLACK = 64


@dataclass(frozen=True, slots=True)
class _Text:
    normal: str = field(repr=False)
    digits: str = field(repr=False)
    fingerprints: tuple[tuple[int, int], ...] = field(repr=False)


class NearCopies:
    """An index of texts that answers: is this text, with at least this similarity, part of one that is here?

    Similarity is 1 - Levenshtein distance / length, of the text and the stretch of the other one it is laid against,
    case and white space aside. Two records of one form are two secrets: texts whose digits differ are never copies,
    nor is one with a word that the other lacks there, punctuation aside; its first and last word may be cut.
    """

    def __init__(self, similarity: float = 0.9) -> None:
        self._similarity = similarity
        self._texts: list[tuple[str, str]] = []
        self._numbers: dict[str, int] = {}
        self._places: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)

    def find(self, text: str) -> int | None:
        """The number of the text (as `add` gave it) that `text` copies or lies in; None without one."""
        return self._find(_prepared(text))

    def add(self, text: str) -> int:
        """Put a text into the index; its number, which counts from 0."""
        return self._add(_prepared(text))

    def find_or_add(self, text: str) -> tuple[int, bool]:
        """The number of the text that `text` copies or lies in, or else its own; and whether it was added."""
        asked = _prepared(text)
        found = self._find(asked)
        return (self._add(asked), True) if found is None else (found, False)

    def _add(self, new: _Text) -> int:
        number = len(self._texts)
        self._texts.append((new.normal, new.digits))
        self._numbers.setdefault(new.normal, number)
        for position, fingerprint in new.fingerprints:
            places = self._places[fingerprint]
            if len(places) < _COMMON:
                places.append((number, position))
        return number

    def _find(self, asked: _Text) -> int | None:
        if (same := self._numbers.get(asked.normal)) is not None:
            return same
        votes: Counter[int] = Counter()
        shifts: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for position, fingerprint in asked.fingerprints:
            for number, there in self._places.get(fingerprint, ()):
                votes[number] += 1
                shifts[number][there - position] += 1
        for number, _ in sorted(votes.items(), key=lambda item: (-item[1], item[0]))[:_COMPARED]:
            shift = min(shifts[number].items(), key=lambda item: (-item[1], item[0]))[0]
            if self._holds(self._texts[number], asked, shift):
                return number
        return None

    def _holds(self, other: tuple[str, str], asked: _Text, shift: int) -> bool:
        normal, digits = other
        if asked.digits not in digits:
            return False
        laid = normal[max(0, shift) : max(0, shift + len(asked.normal))]
        if Levenshtein.normalized_similarity(asked.normal, laid, score_cutoff=self._similarity) <= 0.0:
            return False
        slack = _SLACK + int((1 - self._similarity) * len(asked.normal))
        near = normal[max(0, shift - slack) : max(0, shift + len(asked.normal) + slack)]
        return _lacks_no_word(near, asked.normal)


def group(texts: Sequence[str], similarity: float = 0.9) -> list[int]:
    """For each text the index of the one that stands for it: itself, or a longer one it copies or lies in.

    Longer texts come first, of equally long ones the earlier.
    """
    index = NearCopies(similarity)
    kept: list[int] = []
    stands = list(range(len(texts)))
    for i in sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i)):
        number, new = index.find_or_add(texts[i])
        if new:
            kept.append(i)
        stands[i] = kept[number]
    return stands


def _lacks_no_word(there: str, asked: str) -> bool:
    """Whether every word of `asked` is one of `there`: its first may be the end of one, its last the beginning.

    Two neighbours written as one word, or one as two, are the same words: only punctuation or white space moved.
    """
    words, others = _words(asked), _words(there)
    known = {*others, *map("".join, pairwise(others))}
    last = len(words) - 1
    for i, word in enumerate(words):
        if word in known or "".join(words[max(0, i - 1) : i + 1]) in known or "".join(words[i : i + 2]) in known:
            continue
        if i == last and any((word in each) if i == 0 else each.startswith(word) for each in known):
            continue
        if i == 0 and any(each.endswith(word) for each in known):
            continue
        return False
    return True


def _words(text: str) -> list[str]:
    return "".join(map(_letter_or_space, text)).split()


@lru_cache(maxsize=4096)
def _letter_or_space(character: str) -> str:
    # Marks belong to the letters of many scripts.
    return character if unicodedata.category(character)[0] in "LMN" else " "


def _prepared(text: str) -> _Text:
    normal = _SPACE.sub(" ", text.casefold()).strip()
    return _Text(normal, "".join(_DIGITS.findall(normal)), tuple(_fingerprints(normal)))


def _fingerprints(text: str) -> list[tuple[int, int]]:
    """Position and hash of the chosen grams, in order; a text shorter than a gram has one over all its words."""
    words = [(match.start(), zlib.crc32(match.group().encode())) for match in _WORD.finditer(text)]
    if not words:
        return []
    values = [value for _, value in words]
    # Hashes of integers are the same in every process. Of equal ones the last is the least, so that a new one is
    # chosen as rarely as possible.
    grams = [(hash(tuple(values[i : i + _GRAM])), -words[i][0]) for i in range(max(1, len(words) - _GRAM + 1))]
    chosen: list[tuple[int, int]] = []
    for start in range(max(1, len(grams) - _WINDOW + 1)):
        least = min(grams[start : start + _WINDOW])
        if not chosen or chosen[-1] != least:
            chosen.append(least)
    return [(-place, value) for value, place in chosen]
