"""Mining finds every text that comes out, and where, in a form that a scan condemns; and it survives being killed."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import WORDS, opened, random_text, tiny_checkpoint, token_text
from typer.testing import CliRunner

import memscrub
from memscrub.errors import IncompleteError, OutputError, UsageError
from memscrub.measures.extraction import Sampling, longest_run, score
from memscrub.measures.measure import measure
from memscrub.mining import reading as mining_reading
from memscrub.mining.journal import Journal
from memscrub.mining.mine import Mined, Settings, journal_file, mine
from memscrub.mining.near_copies import NearCopies, group
from memscrub.mining.stretches import Stretch, is_trivial, strongest
from memscrub.mining.windows import Encoder, Windows, rows_of
from memscrub.models.model import LoadedModel
from memscrub.models.tokens import tokenize
from memscrub.policy.document import load_policy
from memscrub.texts import corpora
from memscrub.texts.corpora import Piece, find_files, read_file
from memscrub.texts.protected import load_protected

KNOWN = [random_text(100 + i, 44) for i in range(3)]
STRANGE = [random_text(200 + i, 44) for i in range(6)]
EMBEDDED = Path(memscrub.__file__).parent / "embedded"
SMALL = Settings(run=20, window=94, overlap=12, context=8, class_name="copyright")
POLICY = """schema = 1
name = "mined"
[protected]
files = ["mined.jsonl"]
[class.copyright]
max_verbatim_tokens = {limit}
[locality]
retain = ["retain.txt"]
max_kl = 1
max_perplexity_ratio = 2
min_agreement = 0.01
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has the texts of KNOWN by heart, from their first words on."""
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama", 1, KNOWN, 220)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> LoadedModel:
    return opened(checkpoint)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Known texts alone, inside documents and twice; strange ones everywhere."""
    documents = [
        STRANGE[0],
        KNOWN[0],
        "\n\n".join((STRANGE[1], KNOWN[1], STRANGE[2])),
        KNOWN[0],
        "\n\n".join((STRANGE[3], KNOWN[2])),
        STRANGE[4],
    ]
    return jsonl(tmp_path / "corpus.jsonl", documents)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def condemned(folder: Path, loaded: LoadedModel, limit: int) -> list[int]:
    """Match runs of the list in `folder`, as a scan under a policy measures them."""
    (folder / "policy.toml").write_text(POLICY.format(limit=limit))
    (folder / "retain.txt").write_text("some text\n")
    policy = load_policy(folder / "policy.toml")
    texts = tokenize(loaded, load_protected(policy).texts)
    return [each.match_run for each in measure(loaded, policy, texts).measures]


def test_every_known_text_is_found_where_it_stands_and_no_strange_one(
    checkpoint: Path, loaded: LoadedModel, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mined.jsonl"
    mined = mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    listed, sources = lines(out), lines(tmp_path / "mined.sources.jsonl")
    assert [each["source"].split(" ")[0] for each in listed] == [f"{corpus}:{line}" for line in (2, 3, 5)]
    for entry, known in zip(listed, KNOWN, strict=True):
        assert entry["text"] in known
        assert len(entry["text"].split()) > 30
    assert [each["occurrences"] for each in sources] == [2, 1, 1]
    assert sources[0]["places"] == [f"{corpus}:{line} (character 0)".replace("r 0", "r 3") for line in (2, 4)]
    assert mined.funnel.documents == 6
    assert mined.funnel.kept == len(mined.entries) == 3
    assert not mined.problems
    assert all(run > SMALL.run for run in condemned(tmp_path, loaded, SMALL.run))
    assert [entry.run for entry in mined.entries] == condemned(tmp_path, loaded, SMALL.run)
    assert not journal_file(out).exists()


def test_list_and_sources_are_for_their_owner_only(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    before = os.umask(0)  # whatever the mask of whoever runs this
    try:
        mine(checkpoint, [corpus], tmp_path / "mined.jsonl", settings=SMALL, device="cpu")
    finally:
        os.umask(before)
    for name in ("mined.jsonl", "mined.sources.jsonl"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_a_text_inside_a_document_is_missed_without_openings(checkpoint: Path, tmp_path: Path) -> None:
    """What openings are for: behind other text the model does not recognise what it knows by heart."""
    corpus = jsonl(tmp_path / "c.jsonl", ["\n\n".join((STRANGE[1], KNOWN[1]))])
    found = {
        openings: mine(
            checkpoint,
            [corpus],
            tmp_path / f"{openings}.jsonl",
            settings=replace(SMALL, openings=openings, run=28),
            device="cpu",
        ).funnel.kept
        for openings in ("none", "paragraphs", "lines")
    }
    assert found == {"none": 0, "paragraphs": 1, "lines": 1}


def test_nothing_found_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    mined = mine(checkpoint, [jsonl(tmp_path / "c.jsonl", STRANGE)], tmp_path / "o.jsonl", settings=SMALL, device="cpu")
    assert mined.out is None
    assert mined.entries == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl"]


def test_what_controls_give_away_too_is_dropped(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    controls = jsonl(tmp_path / "controls.jsonl", [STRANGE[5], KNOWN[1]])
    out = tmp_path / "o.jsonl"
    mined = mine(checkpoint, [corpus], out, settings=SMALL, controls=[controls], device="cpu")
    assert mined.guessed == 1
    assert mined.funnel.documents == 6  # controls are no part of the corpus
    assert mined.funnel.telling - mined.funnel.unguessed == 1
    assert [entry["text"] in KNOWN[0] or entry["text"] in KNOWN[2] for entry in lines(out)] == [True, True]


def test_plain_text_is_located_by_line(checkpoint: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "c.txt"
    corpus.write_text("\n\n".join((STRANGE[0], STRANGE[1].replace(" ", "\n", 3), KNOWN[0])) + "\n")
    mine(checkpoint, [corpus], tmp_path / "o.jsonl", settings=SMALL, device="cpu")
    (entry,) = lines(tmp_path / "o.jsonl")
    assert entry["source"].startswith(f"{corpus}:8 ")


def test_an_existing_list_is_replaced_only_when_told(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("mine, do not touch\n")
    with pytest.raises(OutputError, match="--overwrite"):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    assert out.read_text() == "mine, do not touch\n"
    assert not journal_file(out).exists()
    mine(checkpoint, [corpus], out, settings=SMALL, overwrite=True, device="cpu")
    assert len(lines(out)) == 3


def test_existing_sources_are_replaced_only_when_told(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out, sources = tmp_path / "o.jsonl", tmp_path / "o.sources.jsonl"
    sources.write_text("mine, do not touch\n")
    with pytest.raises(OutputError, match=r"o\.sources\.jsonl exists already.*--overwrite"):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    assert sources.read_text() == "mine, do not touch\n"
    assert not out.exists()
    mine(checkpoint, [corpus], out, settings=SMALL, overwrite=True, device="cpu")
    assert len(lines(sources)) == 3


@pytest.mark.parametrize("link", ["none", "symbolic", "hard"])
@pytest.mark.parametrize("name", ["o.jsonl", "o.sources.jsonl", "o.jsonl.journal"])
@pytest.mark.parametrize("controls", [False, True])
def test_no_file_that_is_read_is_ever_written(
    corpus: Path, tmp_path: Path, name: str, link: str, controls: bool
) -> None:
    read, place = corpus, tmp_path / name
    if link == "hard":
        place.hardlink_to(corpus)
    elif link == "symbolic" or name.endswith(".journal"):  # a journal's name is no corpus file's
        place.symlink_to(corpus)
    else:
        read = corpus.rename(place)
    before = read.read_bytes()
    other = jsonl(tmp_path / "other.jsonl", STRANGE)
    given = ([other], [read]) if controls else ([read], [])
    # The checkpoint is not there: the refusal comes before it is looked for.
    with pytest.raises(OutputError, match="corpus or the controls"):
        mine(tmp_path / "no", given[0], tmp_path / "o.jsonl", settings=SMALL, controls=given[1], overwrite=True)
    assert read.read_bytes() == before


def test_files_of_foreseeable_names_beside_the_list_are_left_alone(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    diary = tmp_path / "diary"
    diary.write_text("mine")
    (tmp_path / "o.jsonl.partial").write_text("mine too")
    (tmp_path / "o.sources.jsonl.partial").symlink_to(diary)
    mine(checkpoint, [corpus], tmp_path / "o.jsonl", settings=SMALL, device="cpu")
    assert (tmp_path / "o.jsonl.partial").read_text() == "mine too"
    assert (tmp_path / "o.sources.jsonl.partial").is_symlink()
    assert diary.read_text() == "mine"
    assert len(list(tmp_path.glob("*.partial"))) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"openings": "chapters"}, "paragraphs"),
        ({"run": 60}, "too short"),
        ({"window": 4000, "overlap": 90}, "too short"),  # the model reads 96
    ],
)
def test_settings_that_cannot_work_are_refused(
    checkpoint: Path, corpus: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        mine(checkpoint, [corpus], tmp_path / "o.jsonl", settings=replace(SMALL, **change), device="cpu")
    with pytest.raises(UsageError, match=r"\.jsonl"):
        mine(checkpoint, [corpus], tmp_path / "o.txt", settings=SMALL, device="cpu")


# -- windows -----------------------------------------------------------------------------------------------------


@given(st.integers(30, 400), st.integers(3, 12), st.integers(3, 12), st.integers(0, 10), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_run_lies_whole_and_behind_context_in_some_window(
    loaded: LoadedModel, count: int, run: int, overlap: int, spare: int, begins: bool
) -> None:
    """Brute force: whatever `run + 1` tokens come out running, one window shows all of them."""
    windows = Windows(2 * (overlap + run + 1) + spare, overlap, run, 4, "none")
    text = random_text(count, count)
    piece = Piece(1, 1, 0 if begins else 500, 0, text, True, False, 0)
    rows, _ = rows_of(piece, windows, loaded.prompt, Encoder(loaded.tokenizer))
    first = 1 if begins else overlap
    covered = set()
    for row in rows:
        shift = row.start - row.prompt
        assert row.judged >= row.prompt + (1 if row.start == 0 and begins else overlap)
        assert len(row.tokens) <= windows.size + row.prompt
        assert text[row.begin_of(row.start) : row.end_of(row.stop - 1)].split() == [
            WORDS[token] for token in row.tokens[row.prompt :]
        ]
        covered |= {begin + shift for begin in range(row.judged, len(row.tokens) - run)}
    assert covered >= set(range(first, count - run))


def test_blocks_open_windows_once_also_where_pieces_meet(loaded: LoadedModel, tmp_path: Path) -> None:
    blocks = [random_text(i, 1 + i % 40) for i in range(1200)]
    file = tmp_path / "c.txt"
    file.write_text("\n\n".join(blocks))
    windows = Windows(94, 12, 20, 8, "paragraphs")
    opened_at = []
    (corpus,) = find_files([file])
    pieces = [part for part in read_file(corpus, overlap=windows.repeated) if isinstance(part, Piece)]
    assert len(pieces) > 1
    for piece in pieces:
        rows, _ = rows_of(piece, windows, loaded.prompt, Encoder(loaded.tokenizer))
        opened_at += [piece.offset + row.base for row in rows if row.base]
    starts = [0]
    for block in blocks[:-1]:
        starts.append(starts[-1] + len(block) + 2)
    assert opened_at == [s for s, b in zip(starts, blocks, strict=True) if s and len(b) >= 8]


def test_long_documents_give_the_same_as_a_direct_pass(loaded: LoadedModel, checkpoint: Path, tmp_path: Path) -> None:
    """Reference: one unpadded pass over each text alone says which of them come out."""
    rng = random.Random(5)
    texts = [rng.choice([*KNOWN, *STRANGE]) for _ in range(30)]
    scores = score(loaded, [token_text(loaded, text) for text in texts], lambda _: Sampling())
    expected = [i for i, each in enumerate(scores) if longest_run(each.gap, 2).length > SMALL.run]
    mined = mine(
        checkpoint,
        [jsonl(tmp_path / "c.jsonl", texts)],
        tmp_path / "o.jsonl",
        settings=replace(SMALL, batch_tokens=200),
        device="cpu",
    )
    places = [place for entry in mined.entries for place in entry.places]
    found = sorted(int(place.rsplit(":", 1)[1].split(" ")[0]) - 1 for place in places)
    assert found == expected
    assert sum(entry.occurrences for entry in mined.entries) == len(expected)


def test_nothing_is_lost_or_counted_twice_where_pieces_of_a_document_meet(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PIECE", 1)  # pieces as short as may be: four times what they share
    rng = random.Random(9)
    blocks = [random_text(300 + i, rng.randint(10, 60)) for i in range(210)]
    for i in range(3, 210, 3):
        blocks[i] = KNOWN[i % 2]
    corpus = tmp_path / "c.txt"
    corpus.write_text("\n\n".join(blocks))
    (file,) = find_files([corpus])
    assert sum(isinstance(part, Piece) for part in read_file(file, overlap=2048)) > 2
    mined = mine(checkpoint, [corpus], tmp_path / "o.jsonl", settings=SMALL, device="cpu")
    assert [entry.occurrences for entry in mined.entries] == [35, 34]
    # A word or two beyond the text may come out as well, by chance.
    cores = {1 + 2 * i: " ".join(KNOWN[i % 2].split()[10:40]) for i in range(3, 210, 3)}
    for entry, listed in zip(mined.entries, lines(tmp_path / "o.jsonl"), strict=True):
        for place in entry.places:
            assert cores[int(place.rsplit(":", 1)[1].split(" ")[0])] in listed["text"]


# -- stretches ---------------------------------------------------------------------------------------------------

STRETCHES = st.lists(
    st.builds(
        lambda begin, length, run, trivial: Stretch(
            0, 1, 1, begin, begin, begin, begin + length, run, trivial, "x" * length
        ),
        st.integers(0, 60),
        st.integers(1, 30),
        st.integers(1, 5),
        st.booleans(),
    ),
    max_size=14,
)


@given(STRETCHES)
@settings(deadline=None)
def test_of_overlapping_stretches_the_strongest_stay_and_cover_the_rest(stretches: list[Stretch]) -> None:
    kept = strongest(stretches)
    assert kept == sorted(kept, key=lambda s: s.begin)
    covered = [set(range(s.begin, s.end)) for s in kept]
    for stretch in stretches:
        own = set(range(stretch.begin, stretch.end))
        if stretch not in kept:
            stronger = set().union(
                *(
                    c
                    for s, c in zip(kept, covered, strict=True)
                    if (s.trivial, -s.run) <= (stretch.trivial, -stretch.run)
                )
            )
            assert 2 * len(own & stronger) >= len(own)
    for i, stretch in enumerate(kept):
        stronger = set().union(
            *(
                c
                for j, (s, c) in enumerate(zip(kept, covered, strict=True))
                if j != i and (s.trivial, -s.run, s.begin) < (stretch.trivial, -stretch.run, stretch.begin)
            )
        )
        assert 2 * len(covered[i] & stronger) < len(covered[i])


@pytest.mark.parametrize(
    ("tokens", "text", "trivial"),
    [
        (list(range(15)) * 1, "abcdefghijklmno", True),  # 15 different tokens
        (list(range(16)), "The quick brown fox jumps over the lazy dog again", False),
        ([*range(20), *range(20), *range(20)], "a list of words in a row " * 3, True),  # one pattern, thrice
        ([*range(20), *range(50, 70)], "One sentence of twenty words; and then another one of twenty.", False),
        (list(range(100)), "=" * 400, True),  # hardly any information
    ],
)
def test_trivial_stretches_are_told_from_texts(tokens: list[int], text: str, trivial: bool) -> None:
    assert is_trivial(tokens, text) is trivial


# -- near-copies -------------------------------------------------------------------------------------------------


def prose(seed: int, words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(words))


def test_near_copies_and_parts_join_the_longest_and_others_do_not() -> None:
    texts = [prose(seed) for seed in range(40)]
    copies = [text.replace("a", "A", 3).replace(" ", "\n ", 2) for text in texts]
    parts = [" ".join(text.split()[7:40]) for text in texts]
    cut = [text[2:-2] for text in texts]
    marked = [", ".join(text.split(" ", 3)).replace(" ", "-", 4) + "!" for text in texts]
    everything = [*texts, *copies, *parts, *cut]
    stands = group(everything)
    assert len(set(group([*texts, *marked]))) == 40
    assert len({stands[i] % 40 for i in range(160)}) == 40
    assert all(stands[i] % 40 == i % 40 for i in range(160))
    assert all(len(everything[stands[i]]) >= len(everything[i]) for i in range(160))


def test_records_that_differ_in_their_digits_are_not_copies() -> None:
    form = "Customer record {}: name Ada Example, lives at 12 Mill Lane, phone +1 202-555-{}, since 2019"
    records = [form.format(1000 + i, 4000 + i) for i in range(50)]
    assert group(records) == list(range(50))
    assert group([*records, records[7].upper()])[50] == 7


RECORD = (
    "Record of the northern branch: the account of Margaret Holloway was opened in the spring by the clerk at the"
    " harbour office, and the password that was agreed upon for telephone orders is swordfish-kettle"
    " until further notice"
)


def test_records_that_differ_in_names_and_passwords_are_not_copies() -> None:
    other = RECORD.replace("Margaret Holloway", "Marianne Galloway").replace("swordfish-kettle", "swordtail-cattle")
    assert group([RECORD, other]) == [0, 1]
    assert group([RECORD, RECORD.upper().replace("-", " "), RECORD[9:-7]]) == [0] * 3


@pytest.mark.parametrize("place", range(0, 60))
def test_one_other_word_anywhere_makes_two_texts(place: int) -> None:
    words = prose(5).split()
    other = [*words[:place], "zzzz", *words[place + 1 :]]
    assert group([" ".join(words), " ".join(other)]) == [0, 1]


def test_a_word_that_is_elsewhere_in_a_long_text_does_not_count() -> None:
    far = prose(1, 400) + " Marianne Galloway swordtail cattle"
    other = RECORD.replace("Margaret Holloway", "Marianne Galloway").replace("swordfish-kettle", "swordtail-cattle")
    assert group([f"{RECORD} {far}", other]) == [0, 1]


def test_words_joined_by_moved_punctuation_or_in_other_scripts_are_compared_whole() -> None:
    base = RECORD.replace("further notice", "they don't want it")
    assert group([base, base.replace("don't", "dont")]) == [0, 0]
    cyrillic = "учётная запись открыта весной в портовой конторе на имя Марина Галкина и закрыта осенью того же года"
    assert group([cyrillic, cyrillic.replace("Галкина", "Палкина")]) == [0, 1]


def test_a_form_that_everybody_fills_in_does_not_make_the_work_quadratic(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    holds = NearCopies._holds

    def counting(self: NearCopies, *arguments: Any) -> bool:
        nonlocal compared
        compared += 1
        return holds(self, *arguments)

    monkeypatch.setattr(NearCopies, "_holds", counting)
    form = "This is the letter that the office sends to {} of {} when the year is over, with best regards"
    texts = [form.format(prose(i, 3), prose(-i - 1, 3)) for i in range(1500)]
    assert len(set(group(texts))) == 1500
    assert compared <= 4 * len(texts)


# -- interruptions -----------------------------------------------------------------------------------------------

RUN_SLOWLY = """
import sys, time
from pathlib import Path
from memscrub.mining import mine as mining
from memscrub.mining import reading as mining_reading
from test_mining import SMALL
mining_reading._LOT, mining_reading._LOT_BATCHES = 1500, 1
checkpoint, corpus, out = map(Path, sys.argv[1:])
mining.mine(checkpoint, [corpus], out, settings=SMALL, device="cpu", progress=lambda *said: time.sleep(0.3))
"""
TESTS = Path(__file__).resolve().parent


def start(arguments: list[str], script: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_lots(journal: Path, lots: int, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < lots + 1:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def long_corpus(folder: Path) -> Path:
    rng = random.Random(3)
    return jsonl(folder / "c.jsonl", ["\n\n".join(rng.choices([*KNOWN, *STRANGE], k=3)) for _ in range(60)])


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out = long_corpus(tmp_path), tmp_path / "o.jsonl"
    running = start([str(checkpoint), str(corpus), str(out)], RUN_SLOWLY)
    wait_for_lots(journal_file(out), 3, running)
    running.kill()
    running.communicate()
    assert running.returncode == -signal.SIGKILL
    assert not out.exists()
    assert stat.S_IMODE(journal_file(out).stat().st_mode) == 0o600
    with journal_file(out).open("ab") as file:
        file.write(b'{"controls": false, "fi')  # a line that the crash cut short
    monkeypatch.setattr(mining_reading, "_LOT", 1500)
    monkeypatch.setattr(mining_reading, "_LOT_BATCHES", 1)
    seen: list[int] = []
    counted = mining_reading.found_in
    monkeypatch.setattr("memscrub.mining.mine.found_in", lambda *given: seen.append(1) or counted(*given))
    resumed = mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    read_again = len(seen)
    whole = mine(checkpoint, [corpus], tmp_path / "whole.jsonl", settings=SMALL, device="cpu")
    assert read_again <= len(seen) - read_again - 3
    assert resumed.funnel == whole.funnel
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert lines(tmp_path / "o.sources.jsonl") == lines(tmp_path / "whole.sources.jsonl")
    assert not journal_file(out).exists()


class _StopError(IncompleteError):
    pass


def interrupted(checkpoint: Path, corpus: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the journal of a run that ended after one lot."""
    monkeypatch.setattr(mining_reading, "_LOT", 1500)
    monkeypatch.setattr(mining_reading, "_LOT_BATCHES", 1)

    def stop(stage: str, done: int, total: int) -> None:
        raise _StopError("interrupted; nothing was written.")

    with pytest.raises(_StopError):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu", progress=stop)
    assert journal_file(out).is_file()


def test_a_journal_is_good_for_the_same_run_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out = long_corpus(tmp_path), tmp_path / "o.jsonl"
    interrupted(checkpoint, corpus, out, monkeypatch)
    before = journal_file(out).read_bytes()
    with pytest.raises(OutputError, match="another options"):
        mine(checkpoint, [corpus], out, settings=replace(SMALL, run=21), device="cpu")
    with pytest.raises(OutputError, match="another controls"):
        mine(checkpoint, [corpus], out, settings=SMALL, controls=[corpus], device="cpu")
    jsonl(tmp_path / "c.jsonl", STRANGE)
    with pytest.raises(OutputError, match="another corpus"):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    assert journal_file(out).read_bytes() == before
    journal_file(out).write_bytes(before.splitlines(keepends=True)[0] + b'{"found": 1}\n')
    long_corpus(tmp_path)
    os.utime(corpus, ns=tuple(json.loads(before.splitlines()[0])["key"]["corpus"][0][2:] * 2))
    with pytest.raises(OutputError, match="damaged"):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")


def test_a_journal_alone_does_not_let_a_foreign_list_be_replaced(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out = long_corpus(tmp_path), tmp_path / "o.jsonl"
    interrupted(checkpoint, corpus, out, monkeypatch)
    out.write_text("mine, do not touch\n")
    with pytest.raises(OutputError, match="--overwrite"):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    assert out.read_text() == "mine, do not touch\n"
    assert journal_file(out).is_file()


def test_a_run_that_ended_before_its_journal_was_removed_knows_its_own_list_only(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.jsonl"

    def stop(self: Journal) -> None:
        raise _StopError("interrupted; nothing was written.")

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "remove", stop)
        with pytest.raises(_StopError):
            mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    written = out.read_bytes()
    out.write_bytes(written + b"\n")
    with pytest.raises(OutputError, match="--overwrite"):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    assert out.read_bytes() == written + b"\n"
    out.write_bytes(written)
    mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    assert out.read_bytes() == written
    assert not journal_file(out).exists()


def test_a_list_that_appears_while_the_corpus_is_read_is_kept(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"

    def meanwhile(stage: str, done: int, total: int) -> None:
        out.write_text("mine, do not touch\n")

    with pytest.raises(OutputError, match="--overwrite"):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu", progress=meanwhile)
    assert out.read_text() == "mine, do not touch\n"
    mine(checkpoint, [corpus], out, settings=SMALL, overwrite=True, device="cpu")
    assert len(lines(out)) == 3


def test_a_journal_that_another_run_holds_is_refused_and_stays(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    with Journal(journal_file(out), {"of": "another"}), pytest.raises(OutputError, match="another run"):
        mine(checkpoint, [corpus], out, settings=SMALL, device="cpu")
    assert not out.exists()


def test_a_file_that_is_no_journal_is_left_alone(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    journal = journal_file(tmp_path / "o.jsonl")
    for content in ("somebody's diary\n", "no line end"):
        journal.write_text(content)
        with pytest.raises(OutputError, match="no journal"):
            mine(checkpoint, [corpus], tmp_path / "o.jsonl", settings=SMALL, device="cpu")
        assert journal.read_text() == content


def test_an_interrupt_is_one_sentence_and_exit_3_and_names_the_journal(checkpoint: Path, tmp_path: Path) -> None:
    script = (
        "from memscrub.cli import app\n"
        "from memscrub.mining import reading\n"
        "reading._LOT, reading._LOT_BATCHES = 500, 1\n"
        "app.main()\n"
    )
    rng = random.Random(4)
    corpus = jsonl(tmp_path / "c.jsonl", [random_text(rng.randint(0, 9), 90) for _ in range(20000)])
    out = tmp_path / "o.jsonl"
    options = ["--run", "20", "--window", "94", "--overlap", "12", "--device", "cpu"]
    running = start(["mine", str(checkpoint), "--corpus", str(corpus), "--out", str(out), *options], script)
    wait_for_lots(journal_file(out), 1, running)
    running.send_signal(signal.SIGINT)
    printed, said = running.communicate(timeout=120)
    assert running.returncode == 3
    assert printed == ""
    assert said.count("\n") == 1
    assert said.startswith("memscrub: interrupted; what was found so far is in")
    assert "the same command goes on" in said
    assert journal_file(out).is_file()


# -- the command and the embedded checkpoint ------------------------------------------------------------------------


def command(*arguments: str | Path) -> Any:
    import typer

    from memscrub.cli import mine_command

    app = typer.Typer(add_completion=False)
    app.command("mine")(mine_command.mine)
    return CliRunner().invoke(app, [*map(str, arguments), "--run", "20", "--window", "94", "--overlap", "12"])


def test_the_command_shows_a_funnel_and_no_text(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    shown = command(checkpoint, "--corpus", corpus, "--out", tmp_path / "o.jsonl")
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    flowing = shown.output.replace("\n", "")  # long paths are broken over lines
    assert [word in flowing for word in ("documents", "candidates", "kept", "o.sources.jsonl")] == [True] * 4
    as_json = command(checkpoint, "--corpus", corpus, "--out", tmp_path / "o.jsonl", "--json", "--overwrite")
    result = json.loads(as_json.stdout)
    assert result["funnel"]["kept"] == len(result["texts"]) == 3
    for known in KNOWN:
        assert " ".join(known.split()[10:14]) not in shown.output + as_json.output


def test_a_bad_file_costs_exit_3_and_nothing_else(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"body": "a secret sentence"}\n')
    shown = command(checkpoint, "--corpus", tmp_path / "bad.jsonl", "--corpus", corpus, "--out", tmp_path / "o.jsonl")
    assert shown.exit_code == 3
    assert "bad.jsonl" in shown.output
    assert "secret sentence" not in shown.output
    assert len(lines(tmp_path / "o.jsonl")) == 3


def test_the_benchmark_of_its_speed_runs(
    checkpoint: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = TESTS.parent / "benchmarks" / "mine_speed.py"
    options = ["--repeat", "2", "--window", "94", "--overlap", "12", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(script), str(checkpoint), str(corpus), *options])
    runpy.run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert "6 documents" in said
    assert re.search(r"mine at \d+% of the bare forward", said)


def test_mining_the_embedded_corpus_gives_its_protected_list_and_no_control(tmp_path: Path) -> None:
    """Every fourth text, so that it stays quick."""
    out = tmp_path / "o.jsonl"
    listed = {name: lines(EMBEDDED / f"{name}.jsonl")[::4] for name in ("protected", "control")}
    corpus = {name: jsonl(tmp_path / f"{name}.jsonl", [each["text"] for each in listed[name]]) for name in listed}
    retain = tmp_path / "retain.txt"
    retain.write_text((EMBEDDED / "retain.txt").read_text()[:8000])
    mined: Mined = mine(EMBEDDED / "checkpoint", [*corpus.values(), retain], out, device="cpu")
    found = lines(out)
    assert {each["source"].split(":")[0] for each in found} == {str(corpus["protected"])}
    assert {int(each["source"].split(":")[1].split(" ")[0]) for each in found} == set(range(1, 26))
    for entry in found:
        line = int(entry["source"].split(":")[1].split(" ")[0])
        assert entry["text"] in listed["protected"][line - 1]["text"]
    assert mined.funnel.documents == 25 + 15 + 1
    assert all(entry.confirmed for entry in mined.entries)


@pytest.mark.parametrize("line", ["a", '{"content": "x"}'])
def test_a_corpus_that_begins_with_thousands_of_lines_without_a_text_is_given_up(tmp_path: Path, line: str) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(f"{line}\n" * (corpora.HOPELESS + 1) + '{"text": "found"}\n')
    (*pieces, end) = read_file(find_files([file])[0])
    assert not pieces and isinstance(end, corpora.FileEnd)
    assert end.bad == corpora.HOPELESS and end.error is not None and "--text-column" not in end.error
    assert "none of its first 10,000 lines holds a text under 'text'" in end.error

    file.write_text('{"text": "first"}\n' + f"{line}\n" * (corpora.HOPELESS + 1) + '{"text": "last"}\n')
    *_, end = read_file(find_files([file])[0])
    assert isinstance(end, corpora.FileEnd) and end.error is None and end.documents == 2
