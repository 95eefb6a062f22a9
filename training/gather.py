"""Collect the shippable corpus sources from Debian and PyPI packages into `corpus/*.txt.xz`.

Run once by a maintainer, on Debian 12 with network; everybody else uses the files it wrote. Each output
is plain text with one paragraph per blank-line-separated block, named in `corpus/SOURCES.md`.
"""

from __future__ import annotations

import argparse
import lzma
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from html.parser import HTMLParser
from pathlib import Path

DEBIAN_PACKAGES = ("r-cran-janeaustenr", "golang-1.19-src", "sqlite3-doc")
BROTLI = "brotli==1.2.1"  # its source archive carries the public-domain books of the Canterbury corpus
LICENCES = (
    "Apache-2.0",
    "Artistic",
    "BSD",
    "CC0-1.0",
    "GFDL-1.2",
    "GFDL-1.3",
    "GPL-1",
    "GPL-2",
    "GPL-3",
    "LGPL-2",
    "LGPL-2.1",
    "LGPL-3",
    "MPL-1.1",
    "MPL-2.0",
)
AUSTEN = (
    "emma",
    "mansfield-park",
    "northanger-abbey",
    "persuasion",
    "pride-and-prejudice",
    "sense-and-sensibility",
)

# Pages of the SQLite manual that are indexes, change logs or copies of other pages.
SQLITE_SKIP = re.compile(r"changes|oldnews|news|crossref|keyword_index|requirements|syntaxdiagrams|capi3ref|.*index")
BLOCK_TAGS = frozenset(
    (
        "p",
        "li",
        "dd",
        "dt",
        "div",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "br",
        "tr",
        "td",
        "ul",
        "ol",
        "dl",
        "blockquote",
    )
)
SILENT_TAGS = frozenset(("script", "style", "pre", "svg", "table", "title"))
PUNCTUATION = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "\u2013": "-"})


class ProseParser(HTMLParser):
    """Collects the text of an HTML page as one string per block element."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self._words: list[str] = []
        self._silent = 0

    def flush(self) -> None:
        """End the current block."""
        self.blocks.append(" ".join("".join(self._words).split()))
        self._words = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SILENT_TAGS:
            self._silent += 1
        if tag in BLOCK_TAGS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in SILENT_TAGS:
            self._silent -= 1
        if tag in BLOCK_TAGS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if self._silent <= 0:
            self._words.append(data)


def plain(text: str) -> str:
    """Return `text` in ASCII."""
    return unicodedata.normalize("NFKD", text.translate(PUNCTUATION)).encode("ascii", "ignore").decode()


def unmarked(text: str) -> str:
    """Return the text of a plain-text book without its `_emphasis_` and `[_Fig._ 1.]` marks."""
    return text.replace("_", "")


def austen_novels(rdb: bytes) -> dict[str, str]:
    """Read the novels out of an R lazy-load database: zlib chunks, each one XDR character vector."""
    novels: dict[str, str] = {}
    position = 0
    for name in AUSTEN:
        chunk = zlib.decompressobj()
        raw = chunk.decompress(rdb[position + 4 :])
        position = len(rdb) - len(chunk.unused_data)
        at = raw.index(b"\x00\x00\x00\x10") + 4
        (count,) = struct.unpack_from(">I", raw, at)
        at += 4
        lines: list[str] = []
        for _ in range(count):
            (length,) = struct.unpack_from(">I", raw, at + 4)
            lines.append(raw[at + 8 : at + 8 + length].decode("utf-8"))
            at += 8 + length
        novels[f"austen-{name}"] = unmarked("\n".join(lines))
    return novels


def sqlite_manual(folder: Path) -> str:
    """Return the prose paragraphs of the SQLite manual, each once."""
    seen: dict[str, None] = {}
    for page in sorted([*folder.glob("*.html"), *folder.glob("c3ref/*.html")]):
        if SQLITE_SKIP.fullmatch(page.stem):
            continue
        parser = ProseParser()
        parser.feed(page.read_text("utf-8", errors="replace"))
        parser.flush()
        seen.update((block, None) for block in parser.blocks if len(block) >= 120)
    return "\n\n".join(seen)


def between(text: str, start: str, end: str) -> str:
    """Return the part of `text` from `start` up to `end`, which must both occur."""
    first = text.index(start)
    return text[first : text.index(end, first)]


def download(folder: Path) -> None:
    """Fetch and unpack the Debian packages and the brotli source archive into `folder`."""
    subprocess.run(["apt-get", "download", *DEBIAN_PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", BROTLI]
    subprocess.run(pip, cwd=folder, check=True)
    with tarfile.open(next(folder.glob("brotli-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")


def gather(folder: Path) -> dict[str, str]:
    """Return every source by name, cut to the text itself."""
    books = next(folder.glob("brotli-*/tests/testdata"))

    def book(name: str) -> str:
        return (books / name).read_text("latin-1").replace("\r\n", "\n")

    opticks = (folder / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt").read_text("utf-8")
    rdb = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    return {
        **austen_novels(rdb),
        "carroll-alice": between(book("alice29.txt"), "Alice was beginning", "THE END"),
        "milton-paradise-lost": between(book("plrabn12.txt"), "Of Man's first disobedience", "[The End]"),
        "shakespeare-as-you-like-it": book("asyoulik.txt"),
        "newton-opticks": unmarked(opticks[opticks.index("SIR ISAAC NEWTON'S ADVERTISEMENTS") :]),
        "sqlite-manual": sqlite_manual(folder / "usr/share/doc/sqlite3"),
    }


def main() -> None:
    """Write the compressed sources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "corpus")
    out: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        download(Path(name))
        sources = {title: plain(text) for title, text in gather(Path(name)).items()}
    for licence in LICENCES:  # verbatim: their own terms forbid changed copies
        sources[f"licence-{licence.lower()}"] = Path("/usr/share/common-licenses", licence).read_text("utf-8")
    for title, text in sources.items():
        packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
        (out / f"{title}.txt.xz").write_bytes(packed)
        print(f"{title:32} {len(text):9,} characters {len(packed):9,} bytes")


if __name__ == "__main__":
    main()
