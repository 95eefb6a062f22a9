"""Proposals for a protected list: stretches of a corpus around personal data that presidio-analyzer finds, with the
data marked as secrets. Knows documents and the list's format; no policy, no model and no tokens.

Nothing is looked up in a network: checks that could ask one use what came with the library. The library's own log
is silent meanwhile, because it repeats what it could not parse.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from memscrub.errors import UsageError
from memscrub.policy.mistakes import did_you_mean
from memscrub.texts.protected import Document

# What presidio calls each kind. The last two come from a spaCy model, where one is installed.
KINDS: Mapping[str, str] = {
    "email": "EMAIL_ADDRESS", "phone": "PHONE_NUMBER", "card": "CREDIT_CARD", "iban": "IBAN_CODE", "ssn": "US_SSN",
    "ip": "IP_ADDRESS", "url": "URL", "person": "PERSON", "place": "LOCATION",
}  # fmt: skip
OF_A_MODEL = ("person", "place")
# Web addresses and places are mostly public.
DEFAULT_KINDS = ("email", "phone", "card", "iban", "ssn", "ip", "person")
# A number that looks like a telephone number scores 0.4, or 0.75 where a word like "phone" is near.
THRESHOLD = 0.4
# Characters before and behind a finding that an entry takes along, and its length where findings are close together.
BEFORE, BEHIND, LONGEST = 200, 40, 1000
# The same secret is proposed in so many surroundings at most: a signature below a thousand e-mails is one finding.
SURROUNDINGS = 3
# Documents are analysed in pieces of so many characters; a finding longer than the overlap may be cut.
PIECE, OVERLAP = 20_000, 300


@dataclass(frozen=True, slots=True)
class Finding:
    """Personal data of one kind (a key of `KINDS`) in characters `[start, end)` of a text, and how sure that is."""

    kind: str
    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class Entry:
    """A proposed protected text: characters of a document, the findings in it as offsets into `text`."""

    text: str = field(repr=False)
    findings: tuple[Finding, ...]
    source: str

    @property
    def secrets(self) -> tuple[str, ...]:
        """What is marked, with white space and case folded: equal for the same data written alike."""
        return tuple("".join(self.text[each.start : each.end].split()).casefold() for each in self.findings)


@dataclass(frozen=True, slots=True)
class Proposals:
    """What a corpus was found to hold. `counts` are findings by kind, those in dropped entries included.

    `dropped`: entries left out because an equal one, or the same data in enough other surroundings, is there.
    """

    entries: tuple[Entry, ...] = field(repr=False)
    counts: Mapping[str, int]
    documents: int
    dropped: int

    def to_jsonl(self, class_name: str = "pii") -> str:
        """The entries as lines of a protected list of this class."""
        lines = []
        for number, entry in enumerate(self.entries, 1):
            secret = [[each.start, each.end] for each in entry.findings]
            row = {"id": f"found-{number}", "class": class_name, "text": entry.text, "secret": secret}
            lines.append(json.dumps({**row, "source": entry.source}, ensure_ascii=False) + "\n")
        return "".join(lines)


@dataclass(frozen=True, slots=True)
class Finder:
    """Presidio's recognizers, ready: `kinds` are looked for, names and places by spaCy's `model` where there is one."""

    kinds: tuple[str, ...]
    model: str | None
    _analyse: Callable[[str], list[Any]] = field(repr=False)

    def find(self, text: str, threshold: float = THRESHOLD) -> tuple[Finding, ...]:
        """The findings of at least this score (0 to 1), in order, none overlapping another."""
        names = {entity: kind for kind, entity in KINDS.items()}
        found = []
        with _silent():
            for begin in range(0, max(1, len(text) - OVERLAP), PIECE - OVERLAP):
                for each in self._analyse(text[begin : begin + PIECE]):
                    if each.score >= threshold:
                        start, end = _stripped(text, begin + each.start, begin + each.end)
                        found.append(Finding(names[each.entity_type], start, end, float(each.score)))
        return merged(found)


def open_finder(kinds: Sequence[str] | None = None, *, model: str | None = None) -> Finder:
    """Load presidio-analyzer for English text with these kinds (keys of `KINDS`), `DEFAULT_KINDS` by default.

    `model` is a spaCy model's name or folder; None is the first English one installed, if any. Raises UsageError
    where the extra is missing, a kind is unknown, or a kind needs a model and there is none.
    """
    for kind in kinds or ():
        if kind not in KINDS:
            hint = did_you_mean(kind, tuple(KINDS), f"known are {', '.join(KINDS)}.")
            raise UsageError(f"'{kind}' is no kind of personal data that can be looked for; {hint}")
    try:
        presidio = importlib.import_module("presidio_analyzer")
        spacy = importlib.import_module("spacy")
    except ImportError:
        raise UsageError("looking for personal data needs an extra; run pip install 'memscrub[pii]'.") from None
    if model is None:
        model = next((name for name in sorted(spacy.util.get_installed_models()) if name.startswith("en_")), None)
    if model is None and (missing := [kind for kind in kinds or () if kind in OF_A_MODEL]):
        raise UsageError(f"'{missing[0]}' is found by a spaCy model; run python -m spacy download en_core_web_sm.")
    wanted = [kind for kind in KINDS if kind in (kinds or DEFAULT_KINDS) and (model or kind not in OF_A_MODEL)]
    with _silent():
        engine = _with_model(model) if model is not None else _without_model(spacy)
        recognizers = _recognizers(wanted)
        registry = presidio.RecognizerRegistry(recognizers=recognizers, supported_languages=["en"])
        analyzer = presidio.AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])
    entities = [KINDS[kind] for kind in wanted]

    def analyse(text: str) -> list[Any]:
        artifacts = None if model is not None else _words(engine, text)
        found: list[Any] = analyzer.analyze(text, "en", entities=entities, nlp_artifacts=artifacts)
        return found

    return Finder(tuple(wanted), model, analyse)


def propose(documents: Iterable[Document], finder: Finder, *, threshold: float = THRESHOLD) -> Proposals:
    """Entries for a protected list from all findings of the documents, in order, near-duplicates dropped."""
    entries: list[Entry] = []
    counts: Counter[str] = Counter()
    surroundings: Counter[str] = Counter()
    seen: set[str] = set()
    read = dropped = 0
    for document in documents:
        read += 1
        findings = finder.find(document.text, threshold)
        counts.update(each.kind for each in findings)
        for entry in stretches(document.text, findings, f"{Path(document.file).name}:{document.line}"):
            secrets = set(entry.secrets)
            if entry.text in seen or all(surroundings[secret] >= SURROUNDINGS for secret in secrets):
                dropped += 1
                continue
            seen.add(entry.text)
            surroundings.update(secrets)
            entries.append(entry)
    return Proposals(tuple(entries), {kind: counts[kind] for kind in finder.kinds}, read, dropped)


def merged(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Overlapping findings as one that covers them all, of the surest one's kind (of equals, the longer one's)."""
    joined: list[list[Finding]] = []
    for each in sorted(findings, key=lambda finding: (finding.start, finding.end)):
        if joined and each.start < max(other.end for other in joined[-1]):
            joined[-1].append(each)
        else:
            joined.append([each])
    surest = (max(group, key=lambda each: (each.score, each.end - each.start)) for group in joined)
    return tuple(
        replace(best, start=group[0].start, end=max(each.end for each in group))
        for best, group in zip(surest, joined, strict=True)
    )


def stretches(text: str, findings: Sequence[Finding], source: str) -> Iterator[Entry]:
    """The findings of one text, which do not overlap, each with what stands around it; close ones share an entry."""
    groups: list[list[Finding]] = []
    for each in findings:
        near = groups and each.start - BEFORE <= groups[-1][-1].end
        if near and each.end - groups[-1][0].start + BEFORE + BEHIND <= LONGEST:
            groups[-1].append(each)
        else:
            groups.append([each])
    for group, following in pairwise([*groups, []]):
        first, last = group[0].start, group[-1].end
        begin = _word_start(text, max(0, first - BEFORE), first)
        end = _word_end(text, last, min(len(text), last + BEHIND, following[0].start if following else len(text)))
        kept = tuple(replace(each, start=each.start - begin, end=each.end - begin) for each in group)
        yield Entry(text[begin:end], kept, source)


def _word_start(text: str, begin: int, first: int) -> int:
    """The first beginning of a word from `begin` on, at most `first`."""
    if begin > 0 and not text[begin - 1].isspace():
        begin = next((i for i in range(begin, first) if text[i].isspace()), begin)
    return next((i for i in range(begin, first) if not text[i].isspace()), first)


def _word_end(text: str, last: int, end: int) -> int:
    """The last end of a word up to `end`, at least `last`."""
    if end < len(text) and not text[end].isspace():
        end = next((i for i in range(end, last, -1) if text[i - 1].isspace()), last)
    return next((i for i in range(end, last, -1) if not text[i - 1].isspace()), last)


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    inside = text[start:end]
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


@contextmanager
def _silent() -> Iterator[None]:
    log = logging.getLogger("presidio-analyzer")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _recognizers(kinds: Sequence[str]) -> list[Any]:
    known: Any = importlib.import_module("presidio_analyzer.predefined_recognizers")
    made: list[Any] = []
    for kind in kinds:
        if kind == "email":
            made.append(_email(known))
        elif kind not in OF_A_MODEL:
            made.append({
                "phone": known.PhoneRecognizer, "card": known.CreditCardRecognizer, "iban": known.IbanRecognizer,
                "ssn": known.UsSsnRecognizer, "ip": known.IpRecognizer, "url": known.UrlRecognizer,
            }[kind]())  # fmt: skip
    if entities := [KINDS[kind] for kind in kinds if kind in OF_A_MODEL]:
        made.append(known.SpacyRecognizer(supported_entities=entities))
    return made


def _email(known: Any) -> Any:
    """The recognizer with the list of domains that came with tldextract, which else fetches the newest."""
    extract = importlib.import_module("tldextract").TLDExtract(suffix_list_urls=(), cache_dir=None)
    recognizer = known.EmailRecognizer()
    recognizer.validate_result = lambda text: bool(extract(text).fqdn)
    return recognizer


def _with_model(model: str) -> Any:
    engine = importlib.import_module("presidio_analyzer.nlp_engine").SpacyNlpEngine(
        models=[{"lang_code": "en", "model_name": model}]
    )
    engine.load()
    return engine


def _without_model(spacy: Any) -> Any:
    """Words alone, for the context words that raise a score: no names, no places."""
    engine = importlib.import_module("presidio_analyzer.nlp_engine").SlimSpacyNlpEngine(auto_download=False)
    engine.nlp = {"en": spacy.blank("en")}
    return engine


def _words(engine: Any, text: str) -> Any:
    """What presidio compares context words with. A pipeline without a model has no lemmas: words as written do."""
    document = engine.nlp["en"](text)
    return importlib.import_module("presidio_analyzer.nlp_engine").NlpArtifacts(
        entities=[],
        tokens=document,
        tokens_indices=[token.idx for token in document],
        lemmas=[token.lower_ for token in document],
        nlp_engine=engine,
        language="en",
        scores=[],
    )
