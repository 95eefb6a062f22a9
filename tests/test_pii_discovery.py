"""Proposing protected texts from a corpus: what is found is marked, with context, once, and no text is shown."""

from __future__ import annotations

import itertools
import json
import logging
import random
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import spacy
from hypothesis import given, settings
from hypothesis import strategies as st

from memscrub.errors import UsageError
from memscrub.policy.document import load_policy
from memscrub.policy.init_files import write_starter
from memscrub.texts.pii_discovery import (
    BEFORE,
    BEHIND,
    KINDS,
    LONGEST,
    OVERLAP,
    PIECE,
    SURROUNDINGS,
    Finder,
    Finding,
    Proposals,
    merged,
    open_finder,
    propose,
    stretches,
)
from memscrub.texts.protected import Document, iter_texts, load_protected

FILLER = "the boats go out before light and the bakery opens at five "
SECRETS = {
    "email": "ada.lovelace@analytical.org",
    "phone": "+1 202-555-0143",
    "card": "4111 1111 1111 1111",
    "iban": "DE89 3704 0044 0532 0130 00",
    "ssn": "536-90-4399",
    "ip": "192.168.2.17",
}


@pytest.fixture(scope="module")
def finder() -> Finder:
    return open_finder()


def found_in(finder: Finder, text: str, threshold: float = 0.4) -> list[tuple[str, str]]:
    return [(each.kind, text[each.start : each.end]) for each in finder.find(text, threshold)]


@pytest.mark.parametrize("kind", SECRETS)
def test_each_kind_is_found_and_nothing_else_is_marked(finder: Finder, kind: str) -> None:
    text = f"{FILLER}Please note {SECRETS[kind]} and go on. {FILLER}"
    assert found_in(finder, text) == [(kind, SECRETS[kind])]


@pytest.mark.parametrize(
    "text",
    [
        FILLER * 5,
        "card 4111 1111 1111 1112",  # the check digit is wrong
        "iban DE89 3704 0044 0532 0130 01",
        "mail someone@nowhere.invalid",  # no such domain
        "see http://example.com/page",  # addresses on the web are not asked for
    ],
)
def test_what_is_no_personal_data_is_not_found(finder: Finder, text: str) -> None:
    assert not [kind for kind, _ in found_in(finder, text, 0.5)]


def test_a_word_in_front_makes_a_number_surer(finder: Finder) -> None:
    number = SECRETS["phone"]
    (bare,), (named,) = (finder.find(f"Please note {number}."), finder.find(f"Telephone: {number}."))
    assert named.score > bare.score
    assert not finder.find(f"Please note {number}.", bare.score + 0.01)


def test_only_the_kinds_asked_for_are_found() -> None:
    text = f"Number {SECRETS['phone']}, card {SECRETS['card']}, page http://example.com/page today"
    assert found_in(open_finder(["url", "card"]), text) == [
        ("card", SECRETS["card"]),
        ("url", "http://example.com/page"),
    ]


def test_findings_in_a_long_document_keep_their_place(finder: Finder) -> None:
    """Across every cut between pieces, with a finding right on it, and in the middle of a piece."""
    step = PIECE - OVERLAP
    places = [100, step - 10, PIECE - 10, PIECE + 50, step + PIECE // 2, 2 * step + 7, 3 * step]
    text = list((FILLER * (4 * PIECE // len(FILLER)))[: 3 * PIECE])
    for number, place in enumerate(places):
        mail = f" user{number}@analytical.org "
        text[place : place + len(mail)] = mail
    whole = "".join(text)
    expected = [f"user{number}@analytical.org" for number in range(len(places))]
    assert [found for _, found in found_in(finder, whole)] == expected


def test_the_entries_are_a_protected_list_with_the_data_marked(finder: Finder, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"{FILLER * 20}{name}: {secret}. {FILLER * 20}" for name, secret in SECRETS.items()))
    proposals = propose(iter_texts([corpus]), finder)
    assert proposals.counts == dict.fromkeys(SECRETS, 1)
    assert (proposals.documents, proposals.dropped) == (len(SECRETS), 0)
    policy = write_starter(tmp_path / "out", "pii-strict", proposed=proposals.to_jsonl(), class_name="pii")[0]
    texts = load_protected(load_policy(policy)).texts
    marked = [text.text[start:end] for text in texts for start, end in text.secrets]
    assert marked == list(SECRETS.values())
    for text, document in zip(texts, iter_texts([corpus]), strict=True):
        assert text.text in document.text
        (begin, end), whole = text.secrets[0], len(text.text)
        assert BEFORE - 20 <= begin <= BEFORE  # up to a word less
        assert whole - end <= BEHIND
        assert text.text == text.text.strip()
        assert text.source == f"corpus.txt:{document.line}"


def test_equal_entries_and_too_many_surroundings_of_one_secret_are_dropped(finder: Finder) -> None:
    mail = SECRETS["email"]
    same = [Document(f"Write to {mail} now", "a.txt", line) for line in range(3)]
    others = [Document(f"{number} letters went to {mail.upper()} once", "a.txt", number) for number in range(10)]
    proposals = propose(same + others, finder)
    assert len(proposals.entries) == SURROUNDINGS
    assert (proposals.counts["email"], proposals.dropped) == (13, 13 - SURROUNDINGS)


def test_neither_reprs_nor_the_library_s_log_show_a_text(finder: Finder, caplog: pytest.LogCaptureFixture) -> None:
    document = Document(f"Write to {SECRETS['email']}, account DE89 37O4 ÀÀÀÀ {SECRETS['iban']}", "a.txt", 1)
    with caplog.at_level(logging.DEBUG):
        proposals = propose([document], finder)
    shown = repr(proposals) + repr(proposals.entries[0]) + repr(finder) + repr(document) + caplog.text
    for secret in SECRETS.values():
        assert secret not in shown
    assert not logging.getLogger("presidio-analyzer").disabled


def test_nothing_is_looked_up_in_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    text = " ".join(SECRETS.values())
    assert ("email", SECRETS["email"]) in found_in(open_finder(), text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spaCy pipeline that knows one name and one place."""
    pipeline = spacy.blank("en")
    ruler: Any = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([
        {"label": "PERSON", "pattern": "Ada Lovelace"},
        {"label": "GPE", "pattern": "Ockham"},
    ])  # fmt: skip
    path = tmp_path_factory.mktemp("spacy") / "en_names"
    pipeline.to_disk(path)
    return path


TEXT = f"Then Ada Lovelace went to Ockham and wrote to {SECRETS['email']} from there."


def test_with_a_model_names_are_found_and_places_where_asked_for(model: Path) -> None:
    by_default = open_finder(model=str(model))
    assert found_in(by_default, TEXT) == [("person", "Ada Lovelace"), ("email", SECRETS["email"])]
    asked = open_finder(["place"], model=str(model))
    assert found_in(asked, TEXT) == [("place", "Ockham")]


def test_a_model_that_is_installed_is_used_by_itself(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)  # spaCy takes a name for a folder too
    monkeypatch.setattr(spacy.util, "get_installed_models", lambda: ["de_other", "en_names"])
    found = open_finder()
    assert found.model == "en_names"
    assert ("person", "Ada Lovelace") in found_in(found, TEXT)


def test_names_without_a_model_are_refused_if_asked_for_and_left_out_if_not(
    finder: Finder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spacy.util, "get_installed_models", list)
    assert "person" not in open_finder().kinds
    with pytest.raises(UsageError, match="'person' is found by a spaCy model; run python -m spacy download"):
        open_finder(["email", "person"])


def test_an_unknown_kind_is_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"'emial' is no kind.*did you mean 'email'\?"):
        open_finder(["emial"])


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(UsageError, match=r"run pip install 'memscrub\[pii\]'"):
        open_finder()


# -- merging and cutting out, against what they are by definition


def findings(length: int) -> st.SearchStrategy[list[Finding]]:
    spans = st.tuples(st.integers(0, length - 2), st.integers(1, 30)).map(
        lambda pair: (pair[0], min(length, pair[0] + pair[1]))
    )
    each = st.builds(
        lambda span, kind, score: Finding(kind, *span, score),
        spans,
        st.sampled_from(sorted(KINDS)),
        st.sampled_from([0.4, 0.6, 1.0]),
    )
    return st.lists(each, max_size=12)


@settings(max_examples=200, deadline=None)
@given(findings(400))
def test_merging_covers_the_same_characters_and_overlaps_nowhere(found: list[Finding]) -> None:
    joined = merged(found)
    covered = {i for each in joined for i in range(each.start, each.end)}
    assert covered == {i for each in found for i in range(each.start, each.end)}
    assert all(a.end <= b.start for a, b in itertools.pairwise(joined))
    for each in joined:
        inside = [other for other in found if each.start <= other.start and other.end <= each.end]
        assert (each.start, each.end) == (min(o.start for o in inside), max(o.end for o in inside))
        assert each.score == max(other.score for other in inside)
        assert each.kind in {other.kind for other in inside if other.score == each.score}
    spans = [(each.start, each.end, each.score) for each in joined]
    assert [(each.start, each.end, each.score) for each in merged(found[::-1])] == spans


@settings(max_examples=200, deadline=None)
@given(findings(3000), st.integers(0, 10_000))
def test_every_finding_is_in_one_entry_with_its_own_characters(found: list[Finding], seed: int) -> None:
    text = "".join(random.Random(seed).choices("abcdefgh \n", k=3000))
    joined = [each for each in merged(found) if text[each.start : each.end].strip()]
    entries = list(stretches(text, joined, "a:1"))
    marked = [entry.text[each.start : each.end] for entry in entries for each in entry.findings]
    assert marked == [text[each.start : each.end] for each in joined]
    for entry in entries:
        assert entry.text in text
        first, last = entry.findings[0], entry.findings[-1]
        assert first.start <= BEFORE and len(entry.text) - last.end <= BEHIND
        assert len(entry.text) <= LONGEST or len(entry.findings) == 1
    rows = [json.loads(line) for line in propose_rows(entries)]
    assert [row["secret"] for row in rows] == [[[f.start, f.end] for f in entry.findings] for entry in entries]


def propose_rows(entries: list[Any]) -> list[str]:
    return Proposals(tuple(entries), {}, 1, 0).to_jsonl().splitlines()
