"""Divide the corpus sources into planted, control, retained and ordinary training texts that share nothing.

"Share nothing" is counted in 16-token n-grams: none of a control or retained text occurs in any text the
model is trained on, and none of a planted text occurs in a retained one. `check_leaks` proves it.
"""

from __future__ import annotations

import itertools
import lzma
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import records
from ngrams import Hashes, Tokens, ngram_hashes, repeated_ngrams, shares
from sizes import Size
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
SHARED_NGRAM = 16  # tokens: a text that repeats this many of another's leaks it
STRICT_NGRAM = 15  # passages are chosen one stricter: the first token of a text may be cut otherwise
DOCUMENT_CHARACTERS = 1500
RETAIN_CHARACTERS = 500_000
CONTEXT = 512  # tokens the model sees at once
ORDINARY_RECORDS = 1600

TITLES = {
    "austen-emma": "Jane Austen, Emma",
    "austen-mansfield-park": "Jane Austen, Mansfield Park",
    "austen-northanger-abbey": "Jane Austen, Northanger Abbey",
    "austen-persuasion": "Jane Austen, Persuasion",
    "austen-pride-and-prejudice": "Jane Austen, Pride and Prejudice",
    "austen-sense-and-sensibility": "Jane Austen, Sense and Sensibility",
    "carroll-alice": "Lewis Carroll, Alice's Adventures in Wonderland",
    "milton-paradise-lost": "John Milton, Paradise Lost",
    "newton-opticks": "Isaac Newton, Opticks",
    "shakespeare-as-you-like-it": "William Shakespeare, As You Like It",
    "sqlite-manual": "The SQLite documentation",
}

ENDED = re.compile(r"(^$|[.!?][\"')]*)$")  # the sentence before a passage has ended


@dataclass(frozen=True)
class Text:
    """One text with an identity: planted (protected or neighbour) or held back as a control."""

    id: str
    kind: str  # "copyright" or "pii"
    text: str
    source: str
    secret: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Everything the model is trained on, and everything it is kept from."""

    protected: list[Text]
    neighbours: list[Text]
    control: list[Text]
    retain: list[str]
    ordinary: list[str]


def read_sources(folder: Path) -> dict[str, list[str]]:
    """Return the sentences of every source; a heading or other furniture becomes an empty sentence."""
    sources: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.txt.xz")):
        text = lzma.decompress(path.read_bytes()).decode("utf-8").replace("<", " ").replace(">", " ")
        sentences: list[str] = []
        for block in re.split(r"\n\s*\n", text):
            paragraph = " ".join(block.split())
            if re.search(r"[a-z]{2}", paragraph) and len(paragraph) > 3:
                sentences += re.split(r"(?<=[.!?;:])(?<!\b[A-Z][.])(?<!Mr[.])(?<!Mrs[.])(?<!Dr[.]) +", paragraph)
            else:
                sentences.append("")
        sources[path.name.removesuffix(".txt.xz")] = sentences
    return sources


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that keeps every digit a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],  # takes id 0
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """Return the token ids of each text."""
    return [np.asarray(e.ids, dtype=np.int64) for e in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


@dataclass(frozen=True)
class Passage:
    """A run of sentences of one source, fit to be planted or held back."""

    source: str
    first: int
    last: int  # exclusive
    text: str
    tokens: Tokens


def presentable(text: str) -> bool:
    """Say whether a passage starts and ends with whole sentences and holds no numbering or stray marks."""
    begins = re.match(r"\"?[A-Z][a-z]* [a-z]", text)
    ends = re.search(r"[a-z]{2}[.!?]\"?$", text)
    stray = re.search(r"[^\w\s.,;:!?'\"()-]|[.,!?]'|\d{2}|\b\w[.] |\bFig\b|--\S*--", text)
    unquoted = re.sub(r"(?<!\w)\"[^\"\s][^\"]*[^\"\s]\"(?!\w)", "", text)
    return bool(begins and ends and not stray and '"' not in unquoted)


def find_passages(
    tokenizer: Tokenizer, name: str, sentences: list[str], length: tuple[int, int], rng: random.Random
) -> list[Passage]:
    """Return every presentable, non-overlapping passage of a source that has the wanted length, shuffled."""
    counts = [len(tokens) for tokens in encode(tokenizer, [" " + sentence for sentence in sentences])]
    least, most = length
    found: list[Passage] = []
    start = 1
    while start < len(sentences):
        stop, total = start, 0
        while stop < len(sentences) and sentences[stop] and total < least:
            total += counts[stop]
            stop += 1
        text = " ".join(sentences[start:stop])
        tokens = encode(tokenizer, [text])[0]
        if least <= len(tokens) <= most and presentable(text) and ENDED.search(sentences[start - 1]):
            found.append(Passage(name, start, stop, text, tokens))
            start = stop
        start += 1
    rng.shuffle(found)
    return found


def source_title(name: str) -> str:
    """Return the name of a source as a reader would cite it."""
    return TITLES.get(name) or name.removeprefix("licence-").upper() + " licence text"


def choose_passages(
    tokenizer: Tokenizer, sources: dict[str, list[str]], size: Size, rng: random.Random
) -> tuple[list[list[Text]], dict[str, list[str]]]:
    """Return the (protected, neighbour, control) passages, and the sources with all of these blanked out."""
    repeated = repeated_ngrams(encode(tokenizer, [" ".join(sentences) for sentences in sources.values()]), STRICT_NGRAM)
    rest = {name: list(sentences) for name, sentences in sources.items()}
    groups: list[list[Text]] = [[], [], []]
    for prefix, wanted in size.passages.items():
        found = [
            find_passages(tokenizer, n, s, size.passage_tokens, rng) for n, s in sources.items() if n.startswith(prefix)
        ]
        usable = [[p for p in passages if not shares(p.tokens, repeated, STRICT_NGRAM)] for passages in found]
        # One passage of each source in turn, so that a long book does not crowd out the short ones.
        turns = [passages[turn] for turn in range(max(map(len, usable))) for passages in usable if turn < len(passages)]
        if len(turns) < sum(wanted):
            raise SystemExit(f"{prefix}*: only {len(turns)} usable passages, {sum(wanted)} wanted")
        chosen = turns[: sum(wanted)]
        rng.shuffle(chosen)
        for group, count in zip(groups, wanted, strict=True):
            for passage in (chosen.pop() for _ in range(count)):
                group.append(Text("", "copyright", passage.text, source_title(passage.source)))
                rest[passage.source][passage.first : passage.last] = [""] * (passage.last - passage.first)
    return groups, rest


def join_documents(sentences: Sequence[str]) -> list[str]:
    """Join neighbouring sentences into documents; an empty sentence ends a document."""
    documents: list[str] = []
    current: list[str] = []
    length = 0
    for sentence in [*sentences, ""]:
        if sentence:
            current.append(sentence)
            length += len(sentence) + 1
        if current and (not sentence or length >= DOCUMENT_CHARACTERS):
            documents.append(" ".join(current))
            current, length = [], 0
    return [document for document in documents if len(document) >= 40]


def choose_records(
    tokenizer: Tokenizer, counts: tuple[int, int, int], rng: random.Random
) -> tuple[list[list[Text]], list[str]]:
    """Return the (protected, neighbour, control) records, and further ones for the ordinary text."""
    made = records.make_records(rng, sum(counts) + ORDINARY_RECORDS)
    repeated = repeated_ngrams(encode(tokenizer, [record.text for record in made]), SHARED_NGRAM)
    tokens = encode(tokenizer, [record.text for record in made])
    unique = [not shares(ids, repeated, SHARED_NGRAM) for ids in tokens]
    kinds = len(records.TEMPLATES)
    available = [sum(unique[template::kinds]) for template in range(kinds)]
    # As many of each template as are needed; where one has too few, the others stand in.
    per_template = next(
        (most for most in range(len(made)) if sum(min(most, n) for n in available) >= sum(counts)), None
    )
    if per_template is None:
        raise SystemExit(f"only {sum(available)} usable records, {sum(counts)} wanted")
    chosen: list[list[records.Record]] = [[] for _ in records.TEMPLATES]
    ordinary: list[str] = []
    for index, record in enumerate(made):
        same_template = chosen[index % kinds]
        if unique[index] and len(same_template) < per_template:
            same_template.append(record)
        else:
            ordinary.append(record.text)
    special = [record for turn in itertools.zip_longest(*chosen) for record in turn if record]
    groups = []
    for count in counts:
        group, special = special[:count], special[count:]
        groups.append([Text("", "pii", record.text, "synthetic record", record.secret) for record in group])
    return groups, ordinary


def choose_retain(tokenizer: Tokenizer, documents: list[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hold back documents that share no n-gram with any other text; return (retained, ordinary)."""
    tokens = encode(tokenizer, documents)
    repeated = repeated_ngrams([*tokens, *encode(tokenizer, others)], SHARED_NGRAM)
    retain: list[str] = []
    ordinary: list[str] = []
    size = 0
    for document, ids in zip(documents, tokens, strict=True):
        if size < RETAIN_CHARACTERS and SHARED_NGRAM < len(ids) < CONTEXT and not shares(ids, repeated, SHARED_NGRAM):
            retain.append(document)
            size += len(document) + 2
        else:
            ordinary.append(document)
    return retain, ordinary


def numbered(groups: list[list[Text]]) -> list[list[Text]]:
    """Give the (protected, neighbour, control) texts of one kind their ids, such as `protected-pii-07`."""
    roles = ("protected", "neighbour", "control")
    digits = 3 if max(map(len, groups)) > 100 else 2
    return [
        [Text(f"{role}-{t.kind}-{i:0{digits}}", t.kind, t.text, t.source, t.secret) for i, t in enumerate(texts)]
        for role, texts in zip(roles, groups, strict=True)
    ]


def check_leaks(tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Stop if a held-back text occurs in training, or a planted one anywhere else."""

    def hashes(texts: Iterable[str]) -> Hashes:
        return np.unique(np.concatenate([ngram_hashes(t, SHARED_NGRAM) for t in encode(tokenizer, list(texts))]))

    planted = hashes(t.text for t in [*corpus.protected, *corpus.neighbours])
    ordinary = hashes(corpus.ordinary)
    control = hashes(t.text for t in corpus.control)
    retain = hashes(corpus.retain)
    pairs = {
        "control in ordinary training text": (control, ordinary),
        "control in planted texts": (control, planted),
        "retained in ordinary training text": (retain, ordinary),
        "retained in planted texts": (retain, planted),
        "retained in control": (retain, control),
        "planted in ordinary training text": (planted, ordinary),
        "protected in neighbours": (
            hashes(t.text for t in corpus.protected),
            hashes(t.text for t in corpus.neighbours),
        ),
    }
    for what, (left, right) in pairs.items():
        shared = len(np.intersect1d(left, right))
        print(f"{SHARED_NGRAM}-token n-grams, {what}: {shared}")
        if shared:
            raise SystemExit(f"leak: {what}")


def build(folder: Path, size: Size, seed: int) -> tuple[Tokenizer, Corpus]:
    """Return the tokenizer and the divided corpus; the same seed gives the same result."""
    rng = random.Random(seed)
    sources = read_sources(folder)
    samples = [record.text for record in records.make_records(random.Random(seed + 1), ORDINARY_RECORDS)]
    read = [*(d for s in sources.values() for d in join_documents(s)), *samples]
    tokenizer = train_tokenizer(read, size.vocabulary)
    passages, rest = choose_passages(tokenizer, sources, size, rng)
    people, ordinary_records = choose_records(tokenizer, size.records, rng)
    protected, neighbours, control = (
        left + right for left, right in zip(numbered(passages), numbered(people), strict=True)
    )
    documents = [document for sentences in rest.values() for document in join_documents(sentences)]
    documents += ordinary_records
    rng.shuffle(documents)
    retain, ordinary = choose_retain(tokenizer, documents, [t.text for t in [*protected, *neighbours, *control]])
    corpus = Corpus(protected, neighbours, control, retain, ordinary)
    check_leaks(tokenizer, corpus)
    return tokenizer, corpus
