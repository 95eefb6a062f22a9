"""Nothing that memscrub prints, logs or writes repeats a protected text or its tokens, in runs that work and that do
not; what `report` writes in any format included."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import command_line
import pytest
from leaks import leaks, readable
from models import WORDS, ids_of, random_text, tiny_checkpoint
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit

WORDY = random_text(101, 24)
SECRET = random_text(102, 24)
GLUED = "".join(random_text(103, 24).split())
PREFIXED = random_text(104, 24)
PREFIX = random_text(105, 8)
SHORT = "w07w19w02w14w05w16"
CONTROL = random_text(106, 24)
TEXTS = (WORDY, SECRET, GLUED, PREFIXED, PREFIX, SHORT, CONTROL)
IDS = [ids_of(" ".join(f"w{piece}" for piece in "".join(text.split()).split("w") if piece)) for text in TEXTS]

POLICY = """\
schema = 1
name = "leaks"
[protected]
files = ["protected.jsonl"]
controls = ["controls.jsonl"]
[class.c]
max_verbatim_tokens = 6
max_near_verbatim = 0.5
[class.pii]
secret = true
max_sampling_probability = 1e-3
[probe]
prefix_tokens = 6
suffix_tokens = 6
near_verbatim_prefix = 6
also = ["membership", "prefix-sweep", "exposure", "near-mass", "alignment"]
[locality]
retain = ["retain.txt"]
max_kl = 5
max_perplexity_ratio = 50
min_agreement = 0.01
max_degenerate = 1
[fix]
rounds = 4
[report]
key = "report.key"
"""


@dataclass
class World:
    """A folder with a checkpoint that knows the texts, and everything that any command said in it."""

    folder: Path
    said: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, *arguments: str) -> int:
        with _captured() as output, _journals_kept(self.folder), pytest.MonkeyPatch.context() as patch:
            code = command_line.run(patch, *arguments)
        self.said[name] = output()
        self.codes[name] = code
        return code

    def written(self) -> dict[str, str]:
        """Every file below the folder that a command made, but those that are copies of the checkpoint's own."""
        given = {path.read_bytes() for path in (self.folder / "base").iterdir()}
        made = [path for path in self.folder.rglob("*") if path.is_file() and path.parent.name != "base"]
        made = [path for path in made if path.name not in INPUTS and path.read_bytes() not in given]
        return {str(path.relative_to(self.folder)): readable(path) for path in made}


# What is made to hold texts: the page that shows them, the list that mine makes, and what it has found so far.
REVEALED, MINED = "revealed.html", ("mined.jsonl", "mined.jsonl.kept")
INPUTS = {
    "protected.jsonl",
    "controls.jsonl",
    "retain.txt",
    "corpus.txt",
    "policy.toml",
    "report.key",
    REVEALED,
    *MINED,
}


@contextlib.contextmanager
def _journals_kept(folder: Path) -> Iterator[None]:
    """A second name for every journal, which a run deletes when it ends well and leaves when it is killed."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            for journal in folder.glob("*.journal"):
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    os.link(journal, journal.with_suffix(".kept"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def _captured() -> Iterator[Callable[[], str]]:
    """Everything that goes to standard output and error, also past Python's own streams (logs, C)."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        sys.stdout.flush(), sys.stderr.flush()
        kept = [(number, os.dup(number)) for number in (1, 2)]
        streams = sys.stdout, sys.stderr
        for number, _ in kept:
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w", encoding="utf-8")

        def said() -> str:
            return text

        try:
            yield said
        finally:
            sys.stdout.close()
            sys.stdout, sys.stderr = streams
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            text = file.read()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("leaks")
    spaced = [WORDY, SECRET, " ".join(f"w{piece}" for piece in GLUED.split("w")[1:]), PREFIXED]
    tiny_checkpoint(folder / "base", "llama", seed=3, texts=spaced, steps=120)
    _let_words_touch(folder / "base" / "tokenizer.json")
    begin = SECRET.index(SECRET.split()[18])
    entries = [
        {"id": "wordy", "class": "c", "text": WORDY},
        {"id": "secret", "class": "pii", "text": SECRET, "secret": [[begin, begin + 15]]},
        {"id": "glued", "class": "c", "text": GLUED},
        {"id": "prefixed", "class": "c", "text": PREFIXED, "prefix": PREFIX + " "},
        {"id": "short", "class": "c", "text": SHORT},
        {"id": "again", "class": "c", "text": WORDY},
    ]
    (folder / "protected.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "controls.jsonl").write_text(json.dumps({"id": "control", "class": "c", "text": CONTROL}) + "\n")
    (folder / "retain.txt").write_text("\n\n".join(random_text(200 + number, 60) for number in range(8)) + "\n")
    (folder / "corpus.txt").write_text(f"{WORDY}\n\n{GLUED}\n")
    (folder / "policy.toml").write_text(POLICY)
    (folder / "report.key").write_text("not a secret: this is a test\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        patch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
        yield World(folder)


def _let_words_touch(path: Path) -> None:
    """Words are told apart where no space is between them: a text without any has the same tokens."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(r"w\d\d"), "isolated")])
    tokenizer.save(str(path))


@pytest.fixture(scope="module")
def used(world: World) -> World:
    """The world after every command that is shown texts did its work, and `report` wrote its formats."""
    run, policy = world.run, ("-p", "policy.toml")
    assert run("policy check", "policy", "check", "policy.toml") == 0
    scan = ("--report", "scan.json", "--html", "page.html", "--log", "scan.log")
    assert run("scan", "scan", "base", *policy, *scan) == 1
    run("scan json", "scan", "base", *policy, "--json")
    assert run("keygen", "keygen", "key.pem", "key.pub") == 0
    fix = ("-o", "out", "--keep-partial", "--sign", "key.pem", "--patch", "edit.safetensors")
    fix += ("--stats", "stats.safetensors", "--report", "fix.json", "--log", "fix.log")
    assert run("fix", "fix", "base", *policy, *fix) in (0, 4)
    assert run("fix again", "fix", "base", *policy, "-o", "out") == 2  # exists
    gate = ("--report", "gate.json", "--log", "gate.log")
    assert run("gate", "gate", "out", *policy, "--key", "key.pub", *gate) in (0, 1)
    run("gate anew", "gate", "out", *policy, "--key", "key.pub", "--remeasure", "--html", "gate.html")
    assert run("gate with baseline", "gate", "base", *policy, "--baseline", "scan.json") == 0
    assert run("verify", "verify", "out", "--key", "key.pub", "--base", "base") == 0
    assert run("diff", "diff", "base", "out") == 0
    assert run("revert", "revert", "out", "edit.safetensors", "-o", "reverted") == 0
    mined = ("--corpus", "corpus.txt", "-o", "mined.jsonl", "--run", "8", "--window", "64", "--overlap", "16")
    assert run("mine", "mine", "base", *mined, "--log", "mine.log") == 0
    for name in ("scan.json", "fix.json", "gate.json", "out"):
        faces = [f"--{face}={name}.{face}" for face in ("junit", "sarif", "markdown", "model-card", "html")]
        assert run(f"report {name}", "report", name, "--github", *policy, *faces) == 0
    assert run("strips", "report", "fix.json", *policy, "--html", "strips.html", "--strips") == 0
    assert run("reveal", "report", "scan.json", *policy, "--html", REVEALED, "--reveal") == 0
    return world


@pytest.mark.parametrize("name", [REVEALED, *MINED])
def test_what_is_made_to_hold_texts_is_for_its_owner_alone(used: World, name: str) -> None:
    assert leaks((used.folder / name).read_text("utf-8"), [WORDY])
    assert stat.S_IMODE((used.folder / name).stat().st_mode) == 0o600


def test_the_runs_say_what_they_found(used: World) -> None:
    """Else the next tests would look into empty files."""
    assert "POLICY VIOLATED" in used.said["scan"] and "'wordy'" in used.said["scan"]
    texts = {text["id"]: text for text in json.loads((used.folder / "scan.json").read_text())["texts"]}
    assert set(texts) == {"wordy", "secret", "glued", "prefixed", "short"}
    assert {text["before_judgement"]["status"] for text in texts.values()} == {"violated", "inconclusive"}
    assert texts["glued"]["before"]["match_run"] > 6  # its tokens are those of its words
    written = used.written()
    assert {"fix.json", "out/memscrub-report.json", "edit.safetensors", "stats.safetensors"} <= set(written)
    assert {"scan.json.kept", "out.kept"} <= set(written)  # journals
    assert {"scan.log", "fix.log", "gate.log", "mine.log", "page.html", "gate.html", "strips.html"} <= set(written)
    assert {f"out.{face}" for face in ("junit", "sarif", "markdown", "model-card", "html")} <= set(written)
    assert all(len(text) > 100 for name, text in written.items() if not name.startswith(("out/", "key", "mined")))
    assert "::error file=protected.jsonl,line=1," in used.said["report scan.json"]


def test_nothing_said_or_written_repeats_a_text_or_its_tokens(used: World) -> None:
    for name, text in {**used.said, **used.written()}.items():
        assert leaks(text, TEXTS, IDS) == [], name


def test_the_search_finds_a_text_wherever_it_is_planted(used: World) -> None:
    """The same search on the same outputs, with a piece of each text put into one of them."""
    report, said = used.written()["scan.json"], used.said["report scan.json"]
    for text, ids in zip(TEXTS, IDS, strict=True):
        piece = " ".join(text.split()[2:6]) if " " in text else text[1:18]
        assert leaks(report.replace('"id": "wordy"', f'"id": "{piece}"'), [text])
        assert leaks(f"{said}\n{piece[:7]}\n{piece[7:]}", [text]) or " " in text  # folded by a terminal
        assert leaks(said + piece.replace(" ", "\n"), [text])
        assert leaks(report + "".join(f"\\u{ord(c):04x}" for c in piece), [text])
        assert leaks(report + "".join(f"&#{ord(c)};" for c in piece), [text])
        assert leaks(report + json.dumps(piece.split(), indent=2), [text])  # token by token
        assert leaks(report + json.dumps(ids[1:5], indent=2), [], [ids])
        assert leaks(report + str(tuple(ids[1:5])), [], [ids])
        assert not leaks(report + str(ids[1:4]), [], [ids])


# -- bad input: the message names file and line, and nothing that stands there -------------------------------------
def entry(**values: object) -> str:
    return json.dumps({"id": "a", "class": "c", "text": WORDY, **values})


BAD_LISTS = {
    "not JSON": ("list.jsonl", f'{{"id": "a", "class": "c", "text": "{WORDY}"', 1),
    "a text alone": ("list.jsonl", f"{entry()}\n{GLUED}", 2),
    "the same id": ("list.jsonl", f"{entry()}\n{entry(text=GLUED)}", 2),
    "a key twice": ("list.jsonl", f'{{"id": "a", "class": "c", "text": "{WORDY}", "text": "{SECRET}"}}', 1),
    "a text as key": ("list.jsonl", json.dumps({"id": "a", "class": "c", WORDY: 1, "text": SECRET}), 1),
    "a glued text as key": ("list.jsonl", json.dumps({"id": "a", "class": "c", GLUED: 1, "text": SECRET}), 1),
    "the wrong key": ("list.jsonl", json.dumps({"id": "a", "class": "c", "txt": WORDY}), 1),
    "a text as class": ("list.jsonl", entry(**{"class": WORDY}), 1),
    "a glued text as class": ("list.jsonl", entry(**{"class": GLUED}), 1),
    "a list of texts": ("list.jsonl", json.dumps([WORDY, GLUED]), 1),
    "a list as text": ("list.jsonl", entry(text=[WORDY]), 1),
    "a long id": ("list.jsonl", entry(id=WORDY * 9), 1),
    "an id of two lines": ("list.jsonl", entry(id=f"{WORDY}\n{GLUED}"), 1),
    "a secret out of range": ("list.jsonl", entry(secret=[[5, 9000]]), 1),
    "secrets that overlap": ("list.jsonl", entry(secret=[[5, 9], [7, 12]]), 1),
    "a secret that is text": ("list.jsonl", entry(secret=[WORDY]), 1),
    "no marked secret": ("list.jsonl", entry(**{"class": "pii"}), 1),
    "too long": ("list.jsonl", f"{entry()}\n{entry(id='b', text=' '.join([WORDY] * 9))}", 2),
    "half a character": ("list.jsonl", entry(text=WORDY + "\ud800"), 1),
    "a NUL": ("list.jsonl", entry(text=f"{WORDY}\0{GLUED}"), 1),
    "cells without quotes": ("list.csv", f"id,class,text\na,c,{','.join(WORDY.split())}\n", 2),
    "a header of text": ("list.csv", f"{','.join(WORDY.split())}\na,c,{GLUED}\n", 1),
    "an open quote": ("list.csv", f'id,class,text\na,c,"{WORDY}', 2),
    "a secret that is no JSON": ("list.csv", f'id,class,text,secret\na,c,"{WORDY}",{GLUED}\n', 2),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_bad_list_is_refused_by_file_and_line_alone(world: World, case: str) -> None:
    name, content, line = BAD_LISTS[case]
    (world.folder / "bad").mkdir(exist_ok=True)
    (world.folder / "bad" / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    policy = POLICY.replace("protected.jsonl", name).replace("controls.jsonl", "../controls.jsonl")
    policy = policy.replace("retain.txt", "../retain.txt").replace("report.key", "../report.key")
    (world.folder / "bad" / "policy.toml").write_text(policy)
    assert world.run(case, "scan", "base", "-p", "bad/policy.toml", "--log", "bad/log") == 2
    (world.folder / "bad" / name).unlink()  # what no command made is not for the search, in whatever order tests run
    said = " ".join(world.said[case].split())
    assert f"bad/{name}:{line}:" in said and said.count("memscrub:") == 1
    assert leaks(world.said[case] + (world.folder / "bad" / "log").read_text("utf-8"), TEXTS, IDS) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("latin.jsonl", entry().encode() + b"\xff\n"),
        ("cut.jsonl.gz", gzip.compress((entry() * 50).encode())[:-9]),
        ("wrong.parquet", WORDY.encode()),
        ("wrong.docx", WORDY.encode()),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_not_shown(world: World, name: str, content: bytes) -> None:
    (world.folder / name).write_bytes(content)
    (world.folder / "unread.toml").write_text(POLICY.replace("protected.jsonl", name))
    assert world.run(name, "scan", "base", "-p", "unread.toml") == 2
    assert name in world.said[name]
    assert leaks(world.said[name], TEXTS, IDS) == []


@pytest.mark.parametrize(
    "broken",
    [
        POLICY + f"\n{WORDY}\n",
        POLICY + f'\n[class.d]\nmax_verbatim_tokens = "{WORDY}"\n',
        POLICY.replace('name = "leaks"', f'name = "{WORDY}'),
        POLICY.replace("rounds = 4", f'mode = "{GLUED}"'),
    ],
    ids=["a text on a line", "a text for a number", "an open quote", "a text for a word"],
)
def test_a_policy_with_a_text_in_it_is_refused_without_it(world: World, broken: str) -> None:
    (world.folder / "broken.toml").write_text(broken)
    assert world.run("broken", "scan", "base", "-p", "broken.toml") == 2
    assert "broken.toml:" in world.said["broken"]
    assert leaks(world.said["broken"], TEXTS, IDS) == []


def test_a_list_in_another_format_that_is_none_is_refused_without_its_texts(world: World) -> None:
    (world.folder / "foreign.jsonl").write_text(f"{json.dumps({'text': WORDY})}\n{WORDY}\n")
    for format in ("hf", "mempi", "lm-extraction"):
        name = f"foreign {format}"
        arguments = ("--format", format, "--list", "foreign.jsonl", "--list-class", "c")
        assert world.run(name, "scan", "base", "-p", "policy.toml", *arguments) == 2
        assert leaks(world.said[name], TEXTS, IDS) == []


def test_the_vocabulary_of_these_texts_is_the_model_s() -> None:
    assert all(0 <= number < len(WORDS) for row in IDS for number in row)
