"""Other values that a secret could have had, drawn from its own shape; knows characters, nothing of texts or models.

A shape is a row of slots, each with the strings that may stand there; the secret is one of its values. Digits give
way to digits, letters to letters of the same case, the words of a name or of an e-mail's local part to common names.
Separators stay. Checksums (Luhn, IBAN) are not kept: most candidates for a card number are no valid card numbers.
"""

from __future__ import annotations

import math
import random
import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from memscrub.errors import UsageError

Kind = Literal["digits", "hex", "email", "name", "mixed"]

# Candidates must be as plausible as the secret where the model knows nothing of it: against random letters any
# common name would look memorised. Given and family names of several languages, mixed, as forms are in practice.
NAME_LIST = """
Aaron Adam Ahmed Alan Albert Alex Alexander Ali Alice Amanda Amir Amy Ana Andrea Andreas Andrew Angela Anna Anne
Anthony Antonio Barbara Benjamin Brandon Brian Bruce Camille Carl Carlos Carol Catherine Charles Chen Chloe
Christian Christina Christopher Claire Claudia Daniel David Deborah Dennis Diana Diego Dmitri Donald Edward Elena
Elizabeth Emily Emma Eric Fatima Felix Fernando Francesca Francis Frank Gabriel George Giulia Grace Gregory Hannah
Hans Harold Hassan Heather Helen Henry Hugo Ibrahim Ingrid Irene Isabel Ivan Jack Jacob James Jane Jason Javier
Jeffrey Jennifer Jessica Joan Johan John Jonathan Jorge Jose Joseph Joshua Juan Judith Julia Karen Katherine Keith
Kenneth Kevin Larry Laura Lauren Leon Lily Linda Lisa Louis Lucas Lucia Luis Magda Manuel Marco Margaret Maria
Marie Mark Marta Martin Mary Matthew Maya Megan Michael Miguel Mohammed Monica Nadia Nancy Nathan Nicholas Nicole
Nina Noah Olga Oliver Olivia Omar Oscar Pablo Patricia Patrick Paul Pedro Peter Philip Rachel Raj Ralph Raymond
Rebecca Richard Robert Roger Rosa Ruth Ryan Samuel Sandra Sara Scott Sean Sofia Stefan Stephanie Steven Susan
Tatiana Teresa Thomas Timothy Victor Victoria Vincent Walter Wei William Yuki Yusuf Zoe
Abbott Allen Anderson Bailey Baker Bauer Becker Bell Bennett Brooks Brown Butler Campbell Carter Castro Clark Cohen
Collins Cook Cooper Costa Cox Cruz Davies Davis Diaz Dubois Edwards Evans Fischer Flores Foster Garcia Gomez
Gonzalez Gray Green Gupta Hall Harris Hernandez Hill Hoffmann Howard Hughes Ivanov Jackson Jensen Johnson Jones
Kaur Keller Kelly Khan Kim King Klein Kumar Larsen Lee Lewis Liu Long Lopez Martinez Meyer Miller Mitchell Moore
Morgan Morris Mueller Murphy Murray Nelson Nguyen Novak Olsen Ortiz Parker Patel Perez Peterson Phillips Popov
Price Ramirez Reed Reyes Rivera Roberts Robinson Rodriguez Rogers Romano Rossi Russell Sanchez Sato Schmidt
Schneider Schulz Silva Singh Smith Stewart Suzuki Tanaka Taylor Thompson Torres Tran Turner Wagner Walker Wang
Ward Watson Weber White Williams Wilson Wood Wright Wu Yang Young Zhang Zimmermann
"""
NAMES = tuple(NAME_LIST.split())
EMAIL = re.compile(r"(?P<local>[^@\s]+)(?P<domain>@[^@\s]+\.[^@\s]+)")
WORD = re.compile(r"[^\W\d_]+")
LEAST_HEX = 8  # shorter runs of hexadecimal characters are as likely a word and a number
LONGEST_PARTICLE = 3  # "van", "de": stays as it is in a name
LEAST_WORD = 3  # letters of an e-mail's local part that make a word; fewer are letters


@dataclass(frozen=True)
class Shape:
    """The values a secret could have had: one string of each slot, joined. Values differ where indices do."""

    kind: Kind
    slots: tuple[tuple[str, ...], ...] = field(repr=False)
    own: int = field(repr=False)  # the secret's index

    @property
    def size(self) -> int:
        """Number of values, the secret among them."""
        return math.prod(map(len, self.slots))

    @property
    def bits(self) -> float:
        """log2 of the number of values: the most that exposure can be."""
        return math.log2(self.size)

    def value(self, index: int) -> str:
        """The value with that index, from 0 to size - 1: the slots are the digits of a number in mixed base."""
        parts = []
        for slot in reversed(self.slots):
            index, place = divmod(index, len(slot))
            parts.append(slot[place])
        return "".join(reversed(parts))


@dataclass(frozen=True)
class Candidates:
    """Distinct values of a secret's shape, never the secret itself; `complete` when they are all there are."""

    kind: Kind
    space_bits: float
    values: tuple[str, ...] = field(repr=False)
    complete: bool


def candidates(secret: str, count: int, generator: random.Random, *, given: str = "") -> Candidates:
    """`count` other values of the secret's shape, or all of them where there are no more.

    None at all where no character can vary. `given` is the text before the secret, see `shape_of`. Raises UsageError
    for a count below one.
    """
    if count < 1:
        raise UsageError("the number of candidates must be at least 1.")
    shape = shape_of(secret, given)
    size = shape.size
    complete = size - 1 <= count
    if complete:
        chosen = [index for index in range(size) if index != shape.own]
    else:
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            index = generator.randrange(size)
            if index != shape.own:
                drawn[index] = None
        chosen = list(drawn)
    return Candidates(shape.kind, shape.bits, tuple(map(shape.value, chosen)), complete)


def shape_of(secret: str, given: str = "") -> Shape:
    """The shape of a secret, by its characters alone; the first of hex, e-mail, digits, name and mixed that fits.

    Words of names and e-mails that the text before the secret, `given`, holds too stay as they are: who types it
    gives them away himself, and a model that only copies would seem to know them.

    An e-mail keeps its domain. A domain is shared by many and often public, and most random ones do not exist: a
    model that knows nothing of the person would still prefer the true one, and exposure would be overstated.
    """
    email = EMAIL.fullmatch(secret)
    if _is_hex(secret):
        digits = "0123456789ABCDEF" if secret == secret.upper() else "0123456789abcdef"
        return _shape("hex", secret, [_hex_slot(char, digits) for char in secret])
    if email:
        slots = _with_names(email["local"], _local_slots, given)
        return _shape("email", secret, [*slots, (email["domain"],)])
    if not any(map(str.isalpha, secret)):
        return _shape("digits", secret, list(map(_letter_slot, secret)))
    if _is_name(secret):
        return _shape("name", secret, _with_names(secret, _name_slots, given))
    return _shape("mixed", secret, list(map(_letter_slot, secret)))


def _shape(kind: Kind, secret: str, slots: list[tuple[str, ...]]) -> Shape:
    """The shape with the secret's index: in every slot exactly one string continues the secret unambiguously."""
    own, rest = 0, secret
    for slot in slots:
        # Words of a slot may begin one another ("Ana", "Anastasia"): the longest that fits is the secret's own.
        mine = max((part for part in slot if rest.startswith(part)), key=len)
        own, rest = own * len(slot) + slot.index(mine), rest[len(mine) :]
    return Shape(kind, tuple(slots), own)


def _is_hex(secret: str) -> bool:
    found = [char for char in secret if char.isalnum()]
    letters = "".join(char for char in found if char.isalpha())
    return (
        len(found) >= LEAST_HEX
        and all(char in string.hexdigits for char in found)
        and 0 < len(letters) < len(found)
        and (letters.islower() or letters.isupper())
        and "@" not in secret
    )


def _hex_slot(char: str, digits: str) -> tuple[str, ...]:
    return tuple(digits) if char in digits else (char,)


def _is_latin(char: str) -> bool:
    return char.isalpha() and "LATIN" in unicodedata.name(char, "").split()


def _is_name(secret: str) -> bool:
    words = WORD.findall(secret)
    if not all(_is_latin(char) or char in " .'\u2019-" for char in secret):
        return False  # the list of names is written in Latin letters
    capitalised = [word for word in words if word[0].isupper()]
    particles = all(word.islower() and len(word) <= LONGEST_PARTICLE for word in words if word not in capitalised)
    shouted = all(word.isupper() for word in words)
    # One word in capitals is as likely a code; two are a name on a form.
    return particles and any(len(word) > 1 for word in capitalised) and (not shouted or len(words) > 1)


def _name_slots(word: str) -> list[tuple[str, ...]]:
    if not word[0].isupper():
        return [(word,)]
    return [_names_like(word)] if len(word) > 1 else [_letter_slot(word)]


def _local_slots(word: str) -> list[tuple[str, ...]]:
    regular = word.islower() or word.isupper() or word == word.capitalize()
    if len(word) >= LEAST_WORD and regular:
        return [_names_like(word)]
    return list(map(_letter_slot, word))


@cache
def _names_like(word: str) -> tuple[str, ...]:
    """Common names in the word's case, and the word itself."""
    cased = str.upper if word.isupper() else str.lower if word.islower() else str
    return tuple(dict.fromkeys([*map(cased, NAMES), word]))


def _with_names(text: str, slots_of_word: Callable[[str], list[tuple[str, ...]]], given: str) -> list[tuple[str, ...]]:
    """Slots of a text whose words vary as words, but for those that were given."""
    known = {word for word in WORD.findall(given.casefold()) if len(word) >= LEAST_WORD}
    slots: list[tuple[str, ...]] = []
    for piece in re.findall(rf"{WORD.pattern}|[\W\d_]", text):
        if piece.casefold() in known:
            slots.append((piece,))
        else:
            slots += slots_of_word(piece) if WORD.fullmatch(piece) else [_letter_slot(piece)]
    return slots


@cache
def _letter_slot(char: str) -> tuple[str, ...]:
    """Characters that may stand for this one: digits for a digit, letters of the same case for a letter, else itself.

    Latin letters, accented ones too, give way to plain ones; letters of other scripts to those of the same category
    among the 128 code points they are numbered with.
    """
    category = unicodedata.category(char)
    if category != "Nd" and not category.startswith("L"):
        return (char,)
    if _is_latin(char):
        others = string.ascii_uppercase if char.isupper() else string.ascii_lowercase
    else:
        row = ord(char) // 128 * 128
        near = map(chr, range(row, row + 128))
        others = "".join(each for each in near if unicodedata.category(each) == category)
    return tuple(dict.fromkeys([*others, char]))
