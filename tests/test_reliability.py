"""Interrupted runs and what they go on from, signals, locks, and the log of a run."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ids_of, ordinary_text, random_text, tiny_checkpoint, write_list
from rich.console import Console
from typer import Exit
from typer.testing import CliRunner

import memscrub.measures.measure
from memscrub.cli import app as cli
from memscrub.cli.output import write_report
from memscrub.cli.progress import shown
from memscrub.edit.disturbance import Metric
from memscrub.edit.statistics_file import save_metrics
from memscrub.errors import ExitCode, IncompleteError, InterruptedRunError, OutputError, UsageError
from memscrub.jobs.records import check_room
from memscrub.jobs.scanning import open_inputs, scan
from memscrub.jobs.scrub import Signing, fix
from memscrub.journals.run_journal import RunJournal
from memscrub.journals.run_log import RunLog
from memscrub.measures.measure import silent
from memscrub.policy.document import load_policy
from memscrub.proof.keys import generate_keypair
from memscrub.reports.report import Report, load_report
from memscrub.storage.checkpoint import digest_files, open_checkpoint
from memscrub.storage.files import _ABANDONED_AFTER, replacing, sha256_file
from memscrub.storage.patch import open_patch
from memscrub.storage.patch_files import write_patch
from memscrub.texts.protected import load_protected

TEXTS = [random_text(100 + number, 32) for number in range(5)]
CONTROLS = [random_text(500 + number, 32) for number in range(2)]
POLICY = """schema = 1
name = "reliability"
[protected]
files = ["protected.jsonl"]
controls = ["control.jsonl"]
[class.copyright]
max_verbatim_tokens = 8
max_near_verbatim = 0.8
[probe]
prefix_tokens = 8
suffix_tokens = 8
near_verbatim_prefix = 12
near_verbatim_tokens = 16
batch_tokens = 128
[locality]
retain = ["retain.txt"]
max_kl = 0.5
max_worst_kl = 3.0
max_perplexity_ratio = 1.5
min_agreement = 0.6
max_tokens = 800
"""


def lay_out(folder: Path, checkpoint: Path) -> Path:
    (folder / "checkpoint").symlink_to(checkpoint)
    for name, prefix, texts in (("protected", "t", TEXTS), ("control", "c", CONTROLS)):
        write_list(folder / f"{name}.jsonl", texts, prefix, "copyright")
    (folder / "retain.txt").write_text("\n\n".join(ordinary_text(1000 + i, 90) for i in range(16)))
    (folder / "policy.toml").write_text(POLICY)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "ckpt", "llama", 0, TEXTS, 150)


@pytest.fixture
def ground(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    return lay_out(tmp_path, checkpoint)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Report, dict[str, str]]]:
    """The report and files of a fix that nobody interrupts."""
    folder = lay_out(tmp_path_factory.mktemp("whole"), checkpoint)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOURCE_DATE_EPOCH", "1700000000")
        done = fix(folder / "checkpoint", folder / "policy.toml", folder / "out", device="cpu")
    assert done.directory is not None
    assert sorted(each.name for each in folder.iterdir() if each.name.startswith("out")) == ["out"]
    yield done.report, digest_files(folder / "out")


class Stages:
    """A progress callback that remembers the stages and interrupts where it is told."""

    def __init__(self, stage: str | None = None, times: int = 1) -> None:
        self.stage, self.left, self.seen = stage, times, list[tuple[str, int, int]]()

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage.split(" (")[0], done, total))
        if self.stage is not None and stage.startswith(self.stage):
            self.left -= 1
            if not self.left:
                raise InterruptedRunError("nothing was written.")

    @property
    def names(self) -> set[str]:
        return {stage for stage, _, _ in self.seen}


def fixed(ground: Path, progress: Callable[[str, int, int], None] = silent, **more: Any) -> Any:
    said: list[str] = []
    done = fix(
        ground / "checkpoint",
        ground / "policy.toml",
        ground / "out",
        device="cpu",
        progress=progress,
        remark=said.append,
        **more,
    )
    return done, said


def interrupted(ground: Path, stage: str, times: int = 1, **more: Any) -> None:
    with pytest.raises(InterruptedRunError):
        fixed(ground, Stages(stage, times), **more)


def outputs(ground: Path) -> list[str]:
    return sorted(each.name for each in ground.iterdir() if each.name.startswith("out"))


def same(report: Report, other: Report) -> bool:
    """Equal but for the paths that were typed."""
    return re.sub(r'"/[^"]*/', '"', report.to_json()) == re.sub(r'"/[^"]*/', '"', other.to_json())


def weights(files: dict[str, str]) -> dict[str, str]:
    """All but the report, which names the paths that were typed."""
    return {name: digest for name, digest in files.items() if not name.startswith("memscrub-")}


# -- scan ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_scan_goes_on_and_reports_the_same(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A lot of one batch, so that five texts are several lots.
    monkeypatch.setattr(memscrub.measures.measure, "LOT_BATCHES", 1)
    expected = scan(ground / "checkpoint", ground / "policy.toml", device="cpu")
    journal, delivered = ground / "scan.journal", list[Report]()
    for stage, times in (("teacher-forced pass", 3), ("own continuations", 3)):
        with pytest.raises(InterruptedRunError):
            scan(
                ground / "checkpoint",
                ground / "policy.toml",
                device="cpu",
                journal=journal,
                progress=Stages(stage, times),
                deliver=delivered.append,
            )
        assert journal.is_file() and not delivered
        assert journal.stat().st_mode & 0o777 == 0o600
    kept, said, stages = journal.read_text(), list[str](), Stages()
    decoded: list[int] = []
    monkeypatch.setattr(
        "memscrub.measures.continuation._generate",
        lambda *given, real=memscrub.measures.continuation._generate: (decoded.append(1), real(*given))[1],  # type: ignore[attr-defined]
    )
    report = scan(
        ground / "checkpoint",
        ground / "policy.toml",
        device="cpu",
        journal=journal,
        progress=stages,
        deliver=lambda report: delivered.append(report) if journal.exists() else None,
        remark=said.append,
    )
    assert report == expected and delivered == [report]
    assert not journal.exists()
    assert "going on from" in said[0] and "5 texts measured" in said[0]
    passes = [done for stage, done, _ in stages.seen if stage == "teacher-forced pass"]
    assert passes == sorted(passes) and passes[-1] == 5  # progress starts where the run goes on, and is shown
    before = len(decoded)
    scan(ground / "checkpoint", ground / "policy.toml", device="cpu")
    assert 0 < before < len(decoded) - before
    no_text_in(kept)


def no_text_in(written: str) -> None:
    """Neither three words running of any text nor three of its token ids."""
    for text in (*TEXTS, *CONTROLS):
        words, ids = text.split(), ids_of(text)
        for i in range(len(words) - 2):
            assert " ".join(words[i : i + 3]) not in written
            assert ", ".join(map(str, ids[i : i + 3])) not in written
        assert not re.search(r"\bw\d\d\b", written)


def test_a_journal_of_other_inputs_is_not_used_and_says_what_differs(ground: Path) -> None:
    journal = ground / "scan.journal"

    def stopped(**more: Any) -> None:
        with pytest.raises(InterruptedRunError):
            scan(
                ground / "checkpoint", ground / "policy.toml", device="cpu", journal=journal,
                progress=Stages("own continuations"), **more,
            )  # fmt: skip

    def finished(**more: Any) -> list[str]:
        said: list[str] = []
        scan(
            ground / "checkpoint", ground / "policy.toml", device="cpu", journal=journal, remark=said.append, **more
        )  # fmt: skip
        return said

    stopped()
    assert "another seed" in finished(seed=1)[0]
    stopped()
    (ground / "policy.toml").write_text(POLICY.replace("0.8", "0.7"))
    assert "another policy" in finished()[0]
    stopped()
    digests = [load_protected(load_policy(ground / "policy.toml")).digest]
    assert not any(digest in journal.read_text() for digest in digests)
    with (ground / "protected.jsonl").open("a") as file:
        file.write(json.dumps({"id": "more", "text": random_text(7, 40)}) + "\n")
    (said,) = finished()
    assert "another protected list;" in said and "it is not used" in said
    assert finished() == []


@pytest.mark.parametrize("damage", [b"nonsense\n", b'{"stage": "texts", "noted": [0, {}]}\n', b"[" * 100_000 + b"\n"])
def test_a_damaged_journal_is_not_used_and_says_so(ground: Path, damage: bytes) -> None:
    journal = ground / "scan.journal"
    call: dict[str, Any] = {"device": "cpu", "journal": journal}
    with pytest.raises(InterruptedRunError):
        scan(ground / "checkpoint", ground / "policy.toml", progress=Stages("own continuations"), **call)
    with journal.open("ab") as file:
        file.write(damage)
    said: list[str] = []
    report = scan(ground / "checkpoint", ground / "policy.toml", remark=said.append, **call)
    assert "is damaged; it is not used" in said[0]
    assert report == scan(ground / "checkpoint", ground / "policy.toml", device="cpu")


def test_a_file_that_is_no_journal_is_left_alone(ground: Path) -> None:
    diary = ground / "diary"
    diary.write_text("somebody's diary\n")
    with pytest.raises(OutputError, match="no journal of memscrub"):
        scan(ground / "checkpoint", ground / "policy.toml", device="cpu", journal=diary)
    (ground / "link").symlink_to(diary)
    with pytest.raises(OutputError):
        scan(ground / "checkpoint", ground / "policy.toml", device="cpu", journal=ground / "link")
    assert diary.read_text() == "somebody's diary\n"
    with (ground / "endless").open("wb") as file:
        file.truncate(1 << 40)  # one line without an end; no bytes on disk
    with pytest.raises(OutputError, match="no journal of memscrub"):
        RunJournal(ground / "endless", "scan", {}, {}, inputs={}).__enter__()


# -- fix ----------------------------------------------------------------------------------------------------------


def test_a_fix_interrupted_before_it_wrote_keeps_measures_only(
    ground: Path, whole: tuple[Report, dict[str, str]]
) -> None:
    interrupted(ground, "edit rounds", 2)
    assert outputs(ground) == ["out.journal"]
    no_text_in((ground / "out.journal").read_text())
    stages = Stages()
    done, said = fixed(ground, stages)
    assert "5 texts measured" in said[0]
    assert outputs(ground) == ["out"]
    assert same(done.report, whole[0]) and weights(digest_files(ground / "out")) == weights(whole[1])
    assert "edit rounds" in stages.names


def test_a_fix_interrupted_after_it_wrote_does_not_edit_again(
    ground: Path, whole: tuple[Report, dict[str, str]]
) -> None:
    interrupted(ground, "benign prompts")
    assert outputs(ground) == ["out.journal", "out.lock", "out.partial"]
    stages = Stages()
    done, said = fixed(ground, stages)
    assert "the edit is made and written" in said[0]
    assert not {"edit rounds", "retain statistics"} & stages.names
    assert outputs(ground) == ["out"]
    assert same(done.report, whole[0]) and weights(digest_files(ground / "out")) == weights(whole[1])


@pytest.mark.parametrize("change", ["flip", "link"])
def test_a_written_directory_that_was_changed_meanwhile_is_not_used(
    ground: Path, whole: tuple[Report, dict[str, str]], change: str
) -> None:
    interrupted(ground, "benign prompts")
    file = ground / "out.partial" / "model.safetensors"
    data = bytearray(file.read_bytes())
    file.unlink()
    if change == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        (ground / "elsewhere").write_bytes(data)
        file.symlink_to(ground / "elsewhere")
    stages = Stages()
    done, _ = fixed(ground, stages)
    assert "edit rounds" in stages.names
    assert same(done.report, whole[0]) and weights(digest_files(ground / "out")) == weights(whole[1])


def test_a_fix_that_would_only_fail_again_leaves_nothing(ground: Path) -> None:
    def fail(stage: str, done: int, total: int) -> None:
        if stage == "benign prompts":
            raise UsageError("this will not work.")

    with pytest.raises(UsageError, match="will not work"):
        fixed(ground, fail)
    assert outputs(ground) == []


def test_a_patch_that_the_interrupted_run_left_is_replaced_and_another_is_not(ground: Path) -> None:
    patch, key = ground / "edit.patch", ground / "key.pem"
    generate_keypair(key, ground / "key.pub.pem")
    more: dict[str, Any] = {"patch": patch, "sign": Signing(key)}
    interrupted(ground, "benign prompts")
    shutil.copytree(ground / "out.partial", ground / "written")
    own = write_patch(open_checkpoint(ground / "checkpoint"), open_checkpoint(ground / "written"), patch)
    data = patch.read_bytes()  # as a kill between the patch and the renaming leaves it
    patch.write_bytes(data[:-1])
    with pytest.raises(OutputError, match="exists already"):
        fixed(ground, **more)
    assert patch.read_bytes() == data[:-1]
    interrupted(ground, "benign prompts")
    patch.write_bytes(data)
    done, _ = fixed(ground, **more)
    assert done.signed and done.report.edit.patch_sha256 == sha256_file(patch)
    assert [(t.name, t.sha256_after) for t in open_patch(patch).manifest.tensors] == [
        (t.name, t.sha256_after) for t in own.manifest.tensors
    ]


# -- signals ------------------------------------------------------------------------------------------------------

SLEEPER = """
import sys, time
from memscrub.cli import app as cli
app = cli._application()
@app.command()
def sleep(tidy: float = 0.0) -> None:
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidying", flush=True)
        time.sleep(tidy)
cli._application = lambda: app
cli.main()
"""


def sleeper(*arguments: str, before: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    running = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, "sleep", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    return running


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_exit_3_and_one_sentence(blow: signal.Signals) -> None:
    running = sleeper(before=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # these tests may run under nohup
    running.send_signal(blow)
    out, said = running.communicate(timeout=60)
    assert (running.returncode, out) == (ExitCode.INCOMPLETE, "tidying\n")
    assert said == "memscrub: interrupted; nothing was written.\n"


def test_a_second_interrupt_ends_at_once_and_never_with_0() -> None:
    running = sleeper("--tidy", "60")
    running.send_signal(signal.SIGINT)
    assert running.stdout is not None and running.stdout.readline() == "tidying\n"
    began = time.monotonic()
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=30)
    assert running.returncode == ExitCode.INCOMPLETE and time.monotonic() - began < 20


def test_a_hang_up_is_ignored_where_it_was_ignored_and_a_lost_terminal_changes_no_exit_code() -> None:
    running = sleeper(before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # as under nohup
    running.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(timeout=0.5)
    assert running.stderr is not None
    running.stderr.close()
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == ExitCode.INCOMPLETE
    assert running.stdout is not None
    running.stdout.close()


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli._application(), [*map(str, arguments)])


def test_an_interrupted_command_says_that_it_can_go_on_and_how(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ground / "report.json"
    arguments = ["scan", ground / "checkpoint", "--policy", ground / "policy.toml", "--report", report]
    with monkeypatch.context() as patched:
        patched.setattr("memscrub.cli.progress._Lines.__call__", lambda self, *said: Stages("own")(*said))
        done = command(*arguments)
    assert isinstance(done.exception, InterruptedRunError) and done.exception.exit_code == 3
    kept = ground / "report.json.journal"
    assert str(done.exception) == (
        f"interrupted; what was done so far is in {kept}, and the same command goes on from there."
    )
    assert kept.is_file() and not report.exists()
    done = command(*arguments)
    assert done.exit_code == 1 and f"going on from {kept} (5 texts measured)" in done.stderr.replace("\n", "")
    assert report.is_file() and not kept.exists()


# -- files that two runs write ------------------------------------------------------------------------------------


def test_a_second_run_on_one_journal_is_refused(ground: Path) -> None:
    journal = ground / "scan.journal"

    def second(stage: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another run is writing it"):
            scan(ground / "checkpoint", ground / "policy.toml", device="cpu", journal=journal)

    scan(ground / "checkpoint", ground / "policy.toml", device="cpu", journal=journal, progress=second)
    assert not journal.exists()


def test_a_report_that_two_runs_write_is_always_one_of_them(
    tmp_path: Path, whole: tuple[Report, dict[str, str]]
) -> None:
    file, texts = tmp_path / "report.json", {whole[0].to_json(), whole[0].to_json().replace("reliability", "x")}
    reports = [_Text(text) for text in texts]
    write_report(reports[0], file)  # type: ignore[arg-type]
    writers = [
        threading.Thread(target=lambda each=each: [write_report(each, file) for _ in range(60)])  # type: ignore[misc]
        for each in reports
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert file.read_text() in texts
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "link.json").symlink_to(file)
    write_report(reports[1], tmp_path / "link.json")  # type: ignore[arg-type]
    assert (tmp_path / "link.json").is_symlink() and file.read_text() == reports[1].to_json()
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=(tmp_path / "pipe").read_text)
    reader.start()
    write_report(reports[0], tmp_path / "pipe")  # type: ignore[arg-type]
    reader.join()
    assert (tmp_path / "pipe").is_fifo()


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text

    def to_json(self) -> str:
        return self.text


def test_what_a_killed_run_was_writing_is_cleared_and_what_a_live_one_writes_is_not(tmp_path: Path) -> None:
    file, old = tmp_path / "report.json", time.time() - _ABANDONED_AFTER - 5
    left = tmp_path / ".report.json.abcd1234.partial"
    left.write_text("half")
    with replacing(file) as temporary:  # not old enough: its writer may be about to lock it
        temporary.write_text("{}")
    assert left.exists()
    os.utime(left, (old, old))
    with replacing(file) as held:
        os.utime(held, (old, old))
        with replacing(file) as temporary:
            temporary.write_text("{}")
        assert held.exists() and not left.exists()
        held.write_text("[]")
    assert file.read_text() == "[]" and list(tmp_path.iterdir()) == [file]


# -- the log ------------------------------------------------------------------------------------------------------


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_log_of_scan_fix_gate_and_mine_tells_what_happened_without_any_text(ground: Path) -> None:
    log, policy = ground / "log.jsonl", ["--policy", ground / "policy.toml", "--quiet", "--device", "cpu"]
    corpus = ground / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    mined = ["--corpus", corpus, "--out", ground / "mined.jsonl", "--run", "20", "--window", "94", "--overlap", "12"]
    assert command("scan", ground / "checkpoint", *policy, "--log", log).exit_code == 1
    assert command("fix", ground / "checkpoint", *policy, "--out", ground / "out", "--log", log).exit_code == 0
    assert command("gate", ground / "out", *policy, "--log", log).exit_code == 0
    assert command("mine", ground / "checkpoint", *mined, "--quiet", "--log", log).exit_code == 0
    again = command("fix", ground / "checkpoint", *policy, "--out", ground / "out", "--log", log)
    assert isinstance(again.exception, OutputError)
    found = events(log)
    runs: dict[str, list[dict[str, Any]]] = {}
    for event in found:
        runs.setdefault(event["run"], []).append(event)
        assert {"time", "run", "command", "event"} <= set(event)
    ends = [(run[0]["command"], run[0]["event"], run[-1]["event"], run[-1]["exit_code"]) for run in runs.values()]
    assert ends == [
        ("scan", "start", "end", 1),
        ("fix", "start", "end", 0),
        ("gate", "start", "end", 0),
        ("mine", "start", "end", 0),
        ("fix", "start", "end", 2),
    ]
    written = list(runs.values())
    verdict = next(event for event in written[1] if event["event"] == "verdict")
    assert verdict["outcome"] == "pass" and verdict["figures"]["texts"] == 5 and verdict["figures"]["kl"] < 0.5
    stages = {event["stage"] for event in written[1] if event["event"] == "stage"}
    assert {"teacher-forced pass", "own continuations", "retain statistics", "edit rounds"} <= stages
    assert next(event for event in written[3] if event["event"] == "mined")["figures"]["documents"] == 5
    assert "exists already" in next(event for event in written[4] if event["event"] == "error")["message"]
    assert log.stat().st_mode & 0o777 == 0o600
    no_text_in(log.read_text())


def test_the_log_keeps_the_kind_of_a_foreign_error_and_not_its_words(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with pytest.raises(RuntimeError), RunLog(log, "scan"):
        raise RuntimeError("a protected sentence")
    with pytest.raises(MemoryError), RunLog(log, "scan"):
        raise MemoryError
    assert [event.get("kind") or event.get("exit_code") for event in events(log) if event["event"] != "start"] == [
        "RuntimeError", 1, "MemoryError", 3,
    ]  # fmt: skip
    assert "sentence" not in log.read_text()


def test_a_log_that_cannot_be_written_is_known_before_any_work(ground: Path) -> None:
    for place in (ground / "none" / "log", ground):
        with pytest.raises(UsageError, match="log cannot be written"):
            RunLog(place, "scan")
    with pytest.raises(OutputError, match="lies in"):
        RunLog(ground / "checkpoint" / "log", "scan", outside=[ground / "checkpoint"])
    blobs, snapshot = ground / "models--a--b" / "blobs", ground / "models--a--b" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    with pytest.raises(OutputError, match="which is never written"):
        RunLog(blobs / "config", "scan", outside=[snapshot])
    full = Path("/dev/full")
    with pytest.raises(IncompleteError, match="No space is left"), RunLog(full, "scan"):
        pass


def test_stages_are_logged_when_they_begin_and_end_and_not_at_every_step(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with RunLog(log, "fix") as lines:
        for done in range(1, 101):
            lines.stage(f"edit rounds ({100 - done} demands unmet)", done, 100)
    stages = [(event["done"], event["note"]) for event in events(log) if event["event"] == "stage"]
    assert stages == [(1, "99 demands unmet"), (100, "0 demands unmet")]


def test_a_full_disk_at_the_end_does_not_hide_how_the_run_ended(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)

    def ended(error: BaseException | None) -> None:
        with RunLog(tmp_path / "log.jsonl", "scan") as lines:
            assert lines._file is not None
            os.dup2(full, lines._file)  # from here on there is no space
            if error is not None:
                raise error

    for error in (UsageError("too short."), RuntimeError("odd"), KeyboardInterrupt(), Exit(1), Exit(4)):
        with pytest.raises(type(error)) as caught:
            ended(error)
        assert caught.value is error
    for nothing in (None, Exit(0)):
        with pytest.raises(IncompleteError, match="No space is left"):
            ended(nothing)
    os.close(full)


@pytest.mark.parametrize("solver", ["joint", "per-text"])
def test_piped_every_stage_that_begins_is_said_to_be_done(ground: Path, solver: str) -> None:
    with (ground / "policy.toml").open("a") as file:
        file.write(f'[fix]\nsolver = "{solver}"\n')
    said = io.StringIO()
    with shown(Console(file=said)) as progress:
        fixed(ground, progress)
    lines = said.getvalue().splitlines()
    open_stages: list[str] = []
    for line in lines:
        name, _, words = line.partition(": ")
        if words.endswith(" to do"):
            assert name not in open_stages, lines
            open_stages.append(name)
        else:
            assert re.fullmatch(r"done in [0-9.]+ s", words), lines
            open_stages.remove(name)
    assert not open_stages, lines
    assert any(line.startswith({"joint": "edit rounds", "per-text": "edit passes"}[solver]) for line in lines)


@pytest.mark.parametrize("solver", ["joint", "per-text"])
def test_a_layer_that_is_not_there_is_known_before_anything_is_measured(ground: Path, solver: str) -> None:
    with (ground / "policy.toml").open("a") as file:
        file.write(f'[fix]\nsolver = "{solver}"\nlayers = [9]\n')
    stages = Stages()
    with pytest.raises(UsageError, match="names layer 9, but this model has layers 0 to 1"):
        fixed(ground, stages)
    assert not stages.seen


def test_statistics_of_other_inputs_are_known_before_anything_is_measured(ground: Path) -> None:
    stages, file = Stages(), ground / "stats.safetensors"
    save_metrics(file, {"checkpoint": "0" * 64}, {"a": Metric(torch.eye(2), torch.eye(2))})
    with pytest.raises(UsageError, match="made with another checkpoint; name another file with --stats"):
        fixed(ground, stages, statistics=file)
    file.write_bytes(b"no header")
    with pytest.raises(UsageError, match="no statistics file of memscrub"):
        fixed(ground, stages, statistics=file)
    assert not stages.seen


def test_another_statistics_file_does_not_cost_what_an_interrupted_run_has_measured(ground: Path) -> None:
    with pytest.raises(InterruptedRunError):
        fixed(ground, Stages("retain statistics"))
    kept, file = (ground / "out.journal").read_bytes(), ground / "stats.safetensors"
    save_metrics(file, {"checkpoint": "0" * 64}, {"a": Metric(torch.eye(2), torch.eye(2))})
    with pytest.raises(UsageError, match="made with another checkpoint"):
        fixed(ground, statistics=file)
    assert (ground / "out.journal").read_bytes() == kept


def test_more_texts_than_a_report_has_room_for_are_refused_before_they_are_measured(
    ground: Path, whole: tuple[Report, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, words = Stages(), "the report on 7 texts would be larger than 0 MiB.*split the lists"
    monkeypatch.setattr("memscrub.reports.report.MAX_BYTES", 3000)
    for run in (fixed, lambda ground, progress: scan(ground / "checkpoint", ground / "policy.toml", progress=progress)):
        with pytest.raises(UsageError, match=words):
            run(ground, stages)
    assert not stages.seen and not list(ground.glob("out*"))
    # None is refused that would fit, and few that would not are measured.
    inputs = open_inputs(ground / "checkpoint", ground / "policy.toml", device="cpu")
    monkeypatch.setattr("memscrub.reports.report.MAX_BYTES", 1 << 20)
    sizes = {True: whole[0], False: scan(ground / "checkpoint", ground / "policy.toml", device="cpu")}
    for edited, report in sizes.items():
        none = replace(report, texts=(), controls=())
        texts = len(report.to_json().encode()) - len(none.to_json().encode())
        monkeypatch.setattr("memscrub.reports.report.MAX_BYTES", texts)
        check_room(inputs.policy, inputs.texts, inputs.controls, edited=edited)
        monkeypatch.setattr("memscrub.reports.report.MAX_BYTES", texts // 2)
        with pytest.raises(UsageError, match="split the lists"):
            check_room(inputs.policy, inputs.texts, inputs.controls, edited=edited)
        monkeypatch.setattr("memscrub.reports.report.MAX_BYTES", 1 << 20)


def test_a_report_that_is_too_large_all_the_same_is_not_written(
    ground: Path, whole: tuple[Report, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ground / "report.json"
    monkeypatch.setattr("memscrub.reports.report.MAX_BYTES", len(whole[0].to_json().encode()))
    write_report(whole[0], file)
    assert load_report(file) == whole[0]
    monkeypatch.setattr("memscrub.reports.report.MAX_BYTES", file.stat().st_size - 1)
    file.unlink()
    with pytest.raises(UsageError, match="split the lists"):
        write_report(whole[0], file)
    assert not file.exists()
    with pytest.raises(UsageError, match="split the lists"):
        fixed(ground)
    assert not list(ground.glob("out*"))
