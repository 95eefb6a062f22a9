"""The commands `init --from-corpus` and `scan --also/--format` as a user types them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from command_line import run

from memscrub.errors import UsageError
from memscrub.storage.output_file import check_apart

ADDRESS = "jane.doe42@gmail.com"


def test_init_from_a_corpus_proposes_marked_secrets_and_shows_counts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "mails.txt"
    corpus.write_text(f"Please write to our colleague in the archive at {ADDRESS} before Friday.\n")
    assert run(monkeypatch, "init", tmp_path / "start", "--from-corpus", corpus, "--kind", "email") == 0
    shown = capsys.readouterr()
    assert "1 email" in shown.err and ADDRESS not in shown.err + shown.out
    (line,) = (tmp_path / "start" / "protected.jsonl").read_text().splitlines()
    entry = json.loads(line)
    ((begin, end),) = entry["secret"]
    assert entry["text"][begin:end] == ADDRESS and entry["class"] == "pii"
    assert stat.S_IMODE((tmp_path / "start" / "protected.jsonl").stat().st_mode) == 0o600


def test_init_finds_nothing_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "plain.txt"
    corpus.write_text("Nothing in here is about anybody.\n")
    assert run(monkeypatch, "init", tmp_path / "start", "--from-corpus", corpus) == 2
    assert "no personal data" in capsys.readouterr().err and not (tmp_path / "start").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--also", "membersh"), "is not known; use membership"),
        (("--format", "hf"), "belong together"),
        (("--split", "train"), "name it with --format and --list"),
    ],
)
def test_scan_refuses_options_that_make_no_sense_in_one_sentence(
    options: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "scan", tmp_path, "--policy", tmp_path / "policy.toml", *options) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert sentence in shown and shown.count("memscrub:") == 1


def test_kinds_without_a_corpus_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "init", tmp_path / "start", "--kind", "email") == 2
    assert "--from-corpus" in capsys.readouterr().err


def test_a_name_that_no_disk_takes_is_one_sentence_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "scan", tmp_path, "--policy", tmp_path / "p.toml", "--report", "a" * 300) == 2
    assert capsys.readouterr().err.count("memscrub:") == 1


@pytest.mark.parametrize("command", ["scan", "gate", "fix", "apply"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_report_does_not_replace_a_file_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, cached: bool
) -> None:
    root = config = tmp_path / "ckpt"
    if cached:  # the files of a snapshot are links to blobs
        root, config = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
        config.mkdir(parents=True)
    root.mkdir(parents=True)
    config /= "config.json"
    config.write_text("{}")
    named: list[str | Path] = [root, tmp_path / "p.safetensors"] if command == "apply" else [root]
    more: list[str | Path] = ["--out", tmp_path / "out"] if command in ("fix", "apply") else []
    assert run(monkeypatch, command, *named, "--policy", tmp_path / "p.toml", "--report", config, *more) == 2
    assert "which is never written" in capsys.readouterr().err and config.read_text() == "{}"


LISTED = """schema = 1
name = "n"
[protected]
files = ["list.txt"]
[class.c]
max_verbatim_tokens = 6
[report]
key = "report.key"
"""
ONE_FILE = {
    "report and journal": ("scan ckpt --policy p.toml --report r --journal r", "--journal", "the file of --report"),
    "report and page": ("scan ckpt --policy p.toml --report r --html ./r", "--html", "the file of --report"),
    "through a link": ("scan ckpt --policy p.toml --report target --log link", "--log", "the file of --report"),
    "its own journal": ("scan ckpt --policy p.toml --report r --log r.journal", "--log", "the file of --journal"),
    "policy": ("scan ckpt --policy p.toml --report p.toml", "--report", "the policy"),
    "list": ("scan ckpt --policy p.toml --html list.txt", "--html", "'list.txt' of the policy"),
    "report key": ("gate ckpt --policy p.toml --log report.key", "--log", "'report.key' of the policy"),
    "key": ("gate ckpt --policy p.toml --key k.pem --report k.pem", "--report", "the key"),
    "baseline": ("gate ckpt --policy p.toml --baseline b.json --report b.json", "--report", "the baseline"),
    "statistics": ("fix ckpt --policy p.toml --out o --stats s --report s", "--stats", "the file of --report"),
    "patch": ("fix ckpt --policy p.toml --out o --patch s --html s", "--patch", "the file of --html"),
    "journal": ("fix ckpt --policy p.toml --out o --log o.journal", "--log", "the journal of --out"),
    "patch that is applied": ("apply ckpt b.json --policy p.toml --out o --report b.json", "--report", "the patch"),
    "mined list": ("mine ckpt --corpus list.txt --out m.jsonl --log m.jsonl", "--log", "the list"),
    "its sources": ("mine ckpt --corpus list.txt --out m.jsonl --log m.sources.jsonl", "--log", "the list's sources"),
    "corpus": ("mine ckpt --corpus list.txt --out m.jsonl --log list.txt", "--log", "list.txt of the corpus"),
    "tables of a bench": ("bench ckpt --policy p.toml --json t --markdown t", "--markdown", "the file of --json"),
    "stored report": ("report b.json --policy p.toml --junit p.toml", "--junit", "the policy"),
}


@pytest.mark.parametrize("case", sorted(ONE_FILE))
def test_no_output_replaces_another_one_or_what_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line, option, what = ONE_FILE[case]
    monkeypatch.chdir(tmp_path)
    for name in ("list.txt", "k.pem", "b.json"):
        (tmp_path / name).write_text("what was there\n")
    (tmp_path / "report.key").write_text("a key of sixteen bytes or more\n")
    (tmp_path / "p.toml").write_text(LISTED)
    (tmp_path / "link").symlink_to("target")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert run(monkeypatch, *line.split()) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{option} names" in said and f"which is {what}" in said and said.count("memscrub:") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_device_may_take_several_outputs(tmp_path: Path) -> None:
    check_apart({"--report": Path("/dev/null"), "--log": Path("/dev/null")}, {})
    with pytest.raises(UsageError, match="--log names"):
        check_apart({"--report": tmp_path / "r", "--html": None, "--log": tmp_path / "r"}, {})


def test_a_seed_that_torch_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "scan", tmp_path, "--policy", tmp_path / "p.toml", "--seed", str(2**63)) == 2


def test_a_lack_of_memory_in_torch_is_exit_3_not_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starved(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("memscrub.jobs.scanning.open_inputs", starved)
    assert run(monkeypatch, "scan", tmp_path, "--policy", tmp_path / "p.toml") == 3
    assert "out of memory" in capsys.readouterr().err


def test_a_tolerance_without_a_baseline_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "gate", tmp_path, "--policy", tmp_path / "p.toml", "--tolerance", "0.5") == 2
    assert "name one with --baseline" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fix", "bench", "demo", "apply"])
def test_the_help_of_an_edit_offers_no_spreading(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert "--device" in (said := capsys.readouterr().out)
    assert "spread" not in said
