"""Does mining find every planted text of a training corpus, and no text that was never trained on? Prints both counts.

    python benchmarks/mine_recall.py CKPT FOLDER [--documents 160]

FOLDER holds corpus.jsonl.gz (documents whose `source` begins with "planted/" hold one protected text each),
protected.jsonl and control.jsonl. The corpus mined is: all planted documents, so many other ones, and every control
twice, alone and behind 200 characters of a document as planted texts stand. A planted text is found when an entry
begins inside it; an entry that begins inside a control is a false positive.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from memscrub.mining.mine import mine

PLACE = re.compile(r":(\d+) \(character (\d+)\)$")
LEAD = 200


@dataclass(frozen=True)
class Document:
    """A document, and where in it the text that counts begins and ends (None: an ordinary one)."""

    text: str
    known: str | None
    planted: bool

    def holds(self, character: int) -> bool:
        """Whether an entry that begins there begins in the text that counts, or with the blank line before it."""
        if self.known is None:
            return False
        begin = self.text.rindex(self.known)
        return begin - 5 <= character < begin + len(self.known)


def main() -> None:
    """Mine and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=160)
    options = parser.parse_args()
    documents = corpus(options.folder, options.documents)
    with tempfile.TemporaryDirectory() as place:
        file, out = Path(place) / "corpus.jsonl", Path(place) / "mined.jsonl"
        file.write_text("".join(json.dumps({"text": each.text}) + "\n" for each in documents), encoding="utf-8")
        done = mine(options.checkpoint, [file], out)
        sources = [json.loads(line) for line in (Path(place) / "mined.sources.jsonl").read_text().splitlines()]
    hits = begun(sources, documents)
    planted = [i for i, each in enumerate(documents) if each.planted]
    controls = [i for i, each in enumerate(documents) if each.known is not None and not each.planted]
    print(f"{len(documents)} documents, {torch.get_num_threads()} threads; run over 16; {len(sources)} entries")
    for name, count in asdict(done.funnel).items():
        print(f"  {name}: {count}")
    print(f"planted texts found: {len(hits & set(planted))} of {len(planted)}")
    print(f"false positives: {len(hits & set(controls))} of {len(controls)} placements of control texts")


def corpus(folder: Path, count: int) -> list[Document]:
    """The documents to mine, shuffled."""
    with gzip.open(folder / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = {row["id"]: row["text"] for row in read(folder / "protected.jsonl")}
    others = [row["text"] for row in rows if not row["source"].startswith("planted/")]
    found = [Document(text, None, False) for text in others[:count]]
    for row in rows:
        if row["source"].startswith("planted/"):
            found.append(Document(row["text"], texts[row["source"].removeprefix("planted/")], True))
    for index, row in enumerate(read(folder / "control.jsonl")):
        lead = others[index % len(others)][:LEAD] + "\n\n"
        found += [Document(row["text"], row["text"], False), Document(lead + row["text"], row["text"], False)]
    random.Random(0).shuffle(found)
    return found


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a list."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def begun(sources: Sequence[dict[str, list[str]]], documents: Sequence[Document]) -> set[int]:
    """Documents in whose text that counts an entry begins, in one of its places."""
    found = set()
    for source in sources:
        for place in source["places"]:
            if (at := PLACE.search(place)) is not None:
                number = int(at[1]) - 1
                if documents[number].holds(int(at[2])):
                    found.add(number)
    return found


if __name__ == "__main__":
    main()
