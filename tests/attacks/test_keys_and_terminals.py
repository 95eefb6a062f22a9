"""Secrets of whoever runs memscrub stay where they are, and names from strangers are no commands to a terminal."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from command_line import run

from memscrub.errors import LONGEST_MESSAGE, MemscrubError, UsageError, printable
from memscrub.policy.document import load_policy
from memscrub.proof.keys import generate_keypair, load_private_key
from memscrub.texts.list_formats import read_format
from memscrub.texts.protected import load_protected

PASSWORD = "Zebra-hunter2-Quilt"
EVIL = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202e\r"
POLICY = 'schema = 1\nname = "x"\n[protected]\nfiles = ["{}"]\n[class.a]\nmax_verbatim_tokens = 4\n'


def test_a_private_key_is_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        generate_keypair(tmp_path / "key.pem", tmp_path / "key.pub")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "key.pub").stat().st_mode) == 0o644


def test_a_key_is_not_written_through_a_link_that_was_laid_for_it(tmp_path: Path) -> None:
    (tmp_path / "key.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MemscrubError, match="exists already"):
        generate_keypair(tmp_path / "key.pem", tmp_path / "key.pub")
    assert not (tmp_path / "elsewhere").exists()


def test_the_password_of_a_key_is_in_no_file_and_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEMSCRUB_KEY_PASSWORD", PASSWORD)
    assert run(monkeypatch, "keygen", tmp_path / "key.pem", tmp_path / "key.pub") == 0
    assert b"ENCRYPTED" in (tmp_path / "key.pem").read_bytes()
    shown = capsys.readouterr()
    with pytest.raises(UsageError) as wrong:
        load_private_key(tmp_path / "key.pem", PASSWORD + "x")
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert PASSWORD not in shown.out + shown.err + str(wrong.value)
    assert PASSWORD.encode() not in files


@pytest.mark.parametrize("command", ["verify", "scan", "gate", "diff"])
def test_a_name_on_the_command_line_is_shown_and_not_obeyed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names come from shell globs over directories that others filled."""
    name = str(tmp_path / EVIL)
    rest = {"verify": ["--key", name], "diff": [name]}.get(command, ["--policy", name])
    assert run(monkeypatch, command, name, *rest) == 2
    shown = capsys.readouterr().err
    assert "\\x1b]0;owned" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


@pytest.mark.parametrize(
    "index",
    [{"a": f"{EVIL}.safetensors"}, {EVIL: "model.safetensors"}, {"a": f"../{EVIL}"}],
)
def test_a_name_in_a_checkpoint_is_shown_and_not_obeyed(
    index: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "ckpt" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three"}\n')
    (tmp_path / "policy.toml").write_text(POLICY.format("texts.jsonl"))
    assert run(monkeypatch, "scan", tmp_path / "ckpt", "--policy", tmp_path / "policy.toml") == 2
    shown = capsys.readouterr().err
    assert all(line.isprintable() for line in shown.split("\n"))


def test_the_name_of_a_file_in_a_list_of_others_is_no_command_in_an_id(tmp_path: Path) -> None:
    import numpy as np

    for part in ("prefix", "suffix"):
        np.save(tmp_path / f"{EVIL.strip()}_{part}.npy", np.arange(6).reshape(2, 3))
    found = read_format("lm-extraction", tmp_path, decode=lambda ids: "a text", class_name="a")
    assert all(text.id.isprintable() for text in found.texts)


def test_a_message_is_cut_in_its_middle_and_keeps_its_advice() -> None:
    message = str(UsageError("x" * 100_000 + "; do this."))
    assert len(message) < LONGEST_MESSAGE + 10
    assert message.endswith("; do this.")
    assert printable("caf\u00e9 \u540d") == "caf\u00e9 \u540d"


def test_a_policy_reads_the_files_it_names_wherever_they_are_and_shows_none(tmp_path: Path) -> None:
    """A policy is its user's own: it may name any file. What stands there is read as texts and never shown."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "outside.jsonl").write_text('{"text": "a private sentence"}\n')
    (tmp_path / "inner" / "policy.toml").write_text(POLICY.format("../outside.jsonl"))
    assert len(load_protected(load_policy(tmp_path / "inner" / "policy.toml"))) == 1
    (tmp_path / "outside.jsonl").write_text("a private sentence\n")
    with pytest.raises(MemscrubError) as refused:
        load_protected(load_policy(tmp_path / "inner" / "policy.toml"))
    assert "private" not in str(refused.value)
