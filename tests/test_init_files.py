"""The starter files of `memscrub init`: they load, they are examples, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from memscrub.errors import OutputError, UsageError
from memscrub.policy.document import load_policy
from memscrub.policy.init_files import STARTERS, check_starter, write_starter
from memscrub.texts.protected import load_controls, load_protected, load_texts


@pytest.mark.parametrize("name", STARTERS)
def test_the_starter_loads_and_has_three_examples_with_marked_secrets(name: str, tmp_path: Path) -> None:
    written = write_starter(tmp_path / "new" / "folder", name)
    assert [path.name for path in written] == [f"{name}.toml", "protected.jsonl", "retain.txt"]
    policy = load_policy(written[0])
    protected = load_protected(policy)
    assert len(protected) == 3
    for text in protected:
        assert bool(text.secrets) == policy.classes[text.class_name].secret
    assert len(load_controls(policy)) == 0
    assert len(load_texts(policy.retain_paths)) >= 4


@pytest.mark.parametrize("existing", ["release-gate.toml", "protected.jsonl", "retain.txt"])
def test_nothing_is_written_where_a_file_exists(existing: str, tmp_path: Path) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(OutputError, match=f"{existing}: the file exists already"):
        write_starter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_text() == "mine"


def test_a_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "retain.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="exists already"):
        write_starter(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="choose another directory"):
        write_starter(tmp_path / "file")


def test_an_unknown_policy_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no policy 'pii-strikt' to start from; did you mean 'pii-strict'\?"):
        write_starter(tmp_path, "pii-strikt")
    with pytest.raises(UsageError, match="there are release-gate, pii-strict, copyright"):
        write_starter(tmp_path, "../../etc/passwd")
    assert not list(tmp_path.iterdir())


PROPOSED = json.dumps({"class": "pii", "text": "Call 202-555-0143.", "secret": [[5, 17]]}) + "\n"


@pytest.mark.parametrize("name", ["release-gate", "pii-strict"])
def test_proposed_texts_take_the_place_of_the_examples_and_only_their_owner_can_read_them(
    name: str, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        written = write_starter(tmp_path, name, proposed=PROPOSED, class_name="pii")
    finally:
        os.umask(before)
    (text,) = load_protected(load_policy(written[0]))
    assert (text.text, text.secrets) == ("Call 202-555-0143.", ((5, 17),))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes["protected.jsonl"] == 0o600
    assert modes["retain.txt"] == 0o666


def test_examples_are_nobodys_data_and_get_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        written = write_starter(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o644}


def test_a_policy_without_the_class_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'copyright' has no class 'pii'"):
        check_starter(tmp_path, "copyright", "pii")
    with pytest.raises(UsageError, match="'copyright' has no class 'pii'"):
        write_starter(tmp_path, "copyright", proposed=PROPOSED, class_name="pii")
    assert not list(tmp_path.iterdir())


def test_the_check_refuses_what_writing_would_refuse_and_writes_nothing(tmp_path: Path) -> None:
    check_starter(tmp_path / "new", "pii-strict", "pii")
    assert not (tmp_path / "new").exists()
    (tmp_path / "protected.jsonl").write_text("mine")
    with pytest.raises(OutputError, match=r"protected\.jsonl: the file exists already"):
        check_starter(tmp_path)
    with pytest.raises(UsageError, match="did you mean 'pii-strict'"):
        check_starter(tmp_path / "new", "pii-strikt")
