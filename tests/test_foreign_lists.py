"""A list in another tool's format takes the place of the policy's, under the limits of one class."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from models import random_text, tiny_checkpoint

from memscrub.errors import ProtectedTextError, UsageError
from memscrub.jobs.foreign_lists import ForeignSource, class_for
from memscrub.jobs.scanning import scan
from memscrub.policy.document import load_policy
from memscrub.reports.judgement import Status

KNOWN, UNKNOWN = random_text(1, 40), random_text(2, 40)
POLICY = """schema = 1
name = "foreign"
[protected]
files = ["protected.jsonl"]
[class.c]
max_verbatim_tokens = 8
"""
MORE = """[class.s]
secret = true
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows one of two texts by heart."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "ckpt", "llama", 3, [KNOWN], 120)


def policy(folder: Path, more: str = "") -> Path:
    """A policy whose own list holds another text than the foreign one."""
    (folder / "protected.jsonl").write_text(json.dumps({"id": "own", "text": random_text(5, 40), "class": "c"}))
    (folder / "policy.toml").write_text(POLICY + more)
    return folder / "policy.toml"


def dataset(folder: Path) -> Path:
    """A parquet file as hubs have them, with two texts."""
    pyarrow.parquet.write_table(pyarrow.table({"text": [KNOWN, UNKNOWN]}), folder / "train.parquet")
    return folder / "train.parquet"


def test_the_foreign_list_is_measured_in_place_of_the_policys(checkpoint: Path, tmp_path: Path) -> None:
    said: list[str] = []
    source = ForeignSource("hf", dataset(tmp_path))
    found = scan(checkpoint, policy(tmp_path), device="cpu", foreign=source, remark=said.append)
    assert [text.judgement.status for text in found.texts] == [Status.VIOLATED, Status.WITHIN]
    assert found.protected.foreign == f"hf: {source.path}"
    assert found.protected.texts == 2 and "own" not in {text.id for text in found.texts}
    assert not set(KNOWN.split()) & set(" ".join(said).split())


def test_a_file_of_another_kind_is_refused_by_name_without_its_text(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(KNOWN)
    source = ForeignSource("mempi", tmp_path / "list.jsonl")
    with pytest.raises(ProtectedTextError, match=r"list\.jsonl") as caught:
        scan(checkpoint, policy(tmp_path), device="cpu", foreign=source)
    assert not set(KNOWN.split()) & set(str(caught.value).split())


def test_the_class_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    rules = load_policy(policy(tmp_path, MORE))
    with pytest.raises(UsageError, match="--list-class"):
        class_for(rules, None)
    assert class_for(rules, "c") == "c"


def test_a_class_that_wants_marked_secrets_or_is_unknown_is_refused(tmp_path: Path) -> None:
    rules = load_policy(policy(tmp_path, MORE))
    with pytest.raises(UsageError, match="secret = true"):
        class_for(rules, "s")
    with pytest.raises(UsageError, match="no class 'x'"):
        class_for(rules, "x")
