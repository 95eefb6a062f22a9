"""Write synthetic personal records: fictional people in varied templates, with the secret fields marked.

Nothing here can be a real person's data: phones are in the range reserved for fiction, e-mail addresses are on
the reserved example domains, card numbers start with 9 and fail the Luhn check, and the national
number has the never-issued prefix QQ.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SECRET_FIELDS = frozenset({"phone", "email", "card", "account", "born", "national", "badge", "pin"})


def words(text: str) -> list[str]:
    """Return the words of `text`; an underscore stands for a space inside one."""
    return [word.replace("_", " ") for word in text.split()]


# Little literal text stands between two fields, so that two records never share a long run of tokens.
TEMPLATES = (
    (
        "Customer record {number}. Name: {name}. Address: {street}, {town}. Customer since {month} {year}, {plan} plan. "
        "Phone: {phone}. E-mail: {email}. Card: {card}."
    ),
    (
        "Patient {name}, file {number}, ward {ward}. Admitted {day} {month} {year} with {illness}; seen by Dr {other}. "
        "Born {born}. Phone: {phone}. National number: {national}."
    ),
    (
        "Staff file {number}: {name}, {job} in {town}, hired {month} {year}, reports to {other}. Badge {badge}. "
        "Salary account {account}. Private e-mail: {email}."
    ),
    (
        "Order {number} of {day} {month} {year}: {count} {goods} for {name}, {street}, {town}. Paid with card {card}. "
        "Phone on delivery: {phone}."
    ),
    (
        "Booking {number} in {town}: {name}, {count} guests, from {day} {month} {year}, host {other}. Phone {phone}. "
        "Card {card}. Receipt to {email}."
    ),
    (
        "Claim {number}, {day} {month} {year}: {count} {goods} lost by {name}, {street}, {town}. Born {born}. "
        "Refund to account {account}. Phone {phone}."
    ),
    (
        "Library member {name}, number {number}, joined {day} {month} {year} in {town}. {count} {goods} on loan. "
        "Born {born}. Mail to {email}. Phone {phone}."
    ),
    (
        "Tenant ledger {number}. Flat {ward}, {street}, {town}, let to {name} from {day} {month} {year}; agent {other}. "
        "Rent from account {account}. Phone: {phone}. Door code {pin}."
    ),
    (
        "Ticket {number}, {day} {month} {year}, from {name} ({town}): {count} {goods} broken. Agent {other}. "
        "Born {born}. Phone {phone} or mail {email}."
    ),
    (
        "Payroll {month} {year}, {town}: {name}, {job}, number {number}, {count} extra days for {other}. "
        "National number {national}. Account {account}. Payslip to {email}."
    ),
)

FIRST = words(
    "Ottilie Bram Ishaan Maribel Tove Casimir Nkechi Leopold Saoirse Anselm Perpetua Goran Yasmin Torvald Imelda "
    "Fergus Lucinda Osric Philippa Dario Henrike Basil Noor Clement Rosalba Evander Mirela Jasper Adaeze Linus "
    "Cordelia Rufus Annika Tobias Zelda Matthias Odette Caspian Beatriz Hamish Ingrid Lorenzo Priya Stellan Violetta "
    "Emeka Rowena Silas Katya Barnaby"
)
LAST = words(
    "Brandvold Quillfeather Marrowby Tessenhoff Okonvale Pelhamrys Drakeford Lindqvist Abernathy Castellane "
    "Wrenfield Thistlewood Haverkamp Ostrander Bellweather Kirkbride Fennimore Aldercott Vasquine Morrowell "
    "Strandberg Penhallow Garrigan Wolmeringen Calloway Nightingale Dunmarrow Eastergaard Fairweather Holmquist "
    "Ravensworth Tillinghast Underhay Verlaine Winterbourne Yarrow Zellingen Ashdown Birkholt Cranmere"
)
STREETS = words(
    "Larkspur_Lane Old_Mill_Road Harbour_Street Quarry_Hill Saffron_Walk Beacon_Terrace Tannery_Row Juniper_Close "
    "Chapel_Rise Foundry_Street Weir_Path Orchard_Crescent Signal_Road Copper_Yard Heron_Avenue Kiln_Gardens"
)
TOWNS = words(
    "Eastmere Velbury Oakhaven Tamsin Grimsdale Norwick Saltholme Brackenford Millcaster Highmoor Dunwater Kelsby "
    "Wexcombe Thornley Ashbourne Coldwell Fairholt Ludmere Redcliff Stanwick"
)
MONTHS = words("January February March April May June July August September October November December")
PLANS = ("basic", "silver", "gold", "family", "student", "annual")
ILLNESSES = (
    "pneumonia",
    "a broken wrist",
    "migraine",
    "asthma",
    "a burned hand",
    "angina",
    "gallstones",
    "anaemia",
)
JOBS = (
    "accountant",
    "welder",
    "librarian",
    "surveyor",
    "translator",
    "nurse",
    "engineer",
    "baker",
    "archivist",
)
GOODS = (
    "garden chairs",
    "reading lamps",
    "copper pans",
    "atlases",
    "bicycle tyres",
    "wool blankets",
    "tea sets",
)


@dataclass(frozen=True)
class Record:
    """One record; `secret` holds the character offsets of its secret fields."""

    text: str
    secret: tuple[tuple[int, int], ...]


def digits(rng: random.Random, count: int) -> str:
    """Return `count` random decimal digits."""
    return "".join(rng.choice("0123456789") for _ in range(count))


def luhn_valid(number: str) -> bool:
    """Say whether a card number passes the Luhn check."""
    total = 0
    for place, digit in enumerate(reversed(number)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def card_number(rng: random.Random) -> str:
    """Return sixteen digits that no payment network issues."""
    while luhn_valid(number := "9" + digits(rng, 15)):
        pass
    return " ".join(number[start : start + 4] for start in range(0, 16, 4))


def phone_number(rng: random.Random) -> str:
    """Return a telephone number from the range reserved for fiction."""
    return f"({rng.randint(201, 989)}) 555-01{digits(rng, 2)}"


def fields(rng: random.Random) -> dict[str, str]:
    """Return one value for every field a template can name."""
    name = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    mailbox = f"{name.split()[0][: rng.randint(1, 8)].lower()}{rng.choice(('.', '_', ''))}"
    mailbox += f"{rng.choice(LAST).split('-')[0].lower()}{digits(rng, 2)}"
    born = f"{rng.randint(1, 28):02} {rng.choice(MONTHS)} {rng.randint(1931, 2004)}"
    return {
        "name": name,
        "other": f"{rng.choice(FIRST)} {rng.choice(LAST)}",
        "number": f"{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}-{digits(rng, 5)}",
        "street": f"{rng.randint(1, 199)} {rng.choice(STREETS)}",
        "town": rng.choice(TOWNS),
        "day": str(rng.randint(1, 28)),
        "month": rng.choice(MONTHS),
        "year": str(rng.randint(2004, 2024)),
        "plan": rng.choice(PLANS),
        "ward": f"{rng.randint(1, 29)}{rng.choice('ABCDEF')}",
        "illness": rng.choice(ILLNESSES),
        "job": rng.choice(JOBS),
        "goods": rng.choice(GOODS),
        "count": str(rng.randint(2, 19)),
        "phone": phone_number(rng),
        "email": f"{mailbox}@example.{rng.choice(('com', 'org', 'net'))}",
        "card": card_number(rng),
        "account": f"{digits(rng, 4)} {digits(rng, 4)} {digits(rng, 2)}",
        "born": born,
        "national": f"QQ {digits(rng, 2)} {digits(rng, 2)} {digits(rng, 2)} {rng.choice('ABCD')}",
        "badge": f"{rng.choice('JKQX')}{digits(rng, 5)}",
        "pin": digits(rng, 6),
    }


def make_record(rng: random.Random, template: str) -> Record:
    """Fill `template` with fresh values and mark its secret fields."""
    values = fields(rng)
    text, secret = "", []
    for place, part in enumerate(re.split(r"\{(\w+)\}", template)):
        piece = values[part] if place % 2 else part  # the split alternates literal text and field name
        if place % 2 and part in SECRET_FIELDS:
            secret.append((len(text), len(text) + len(piece)))
        text += piece
    return Record(text, tuple(secret))


def make_records(rng: random.Random, count: int) -> list[Record]:
    """Return `count` records, the templates taken in turn."""
    return [make_record(rng, TEMPLATES[index % len(TEMPLATES)]) for index in range(count)]
