"""`memscrub policy check`: what a gate would refuse, and what somebody should look at, without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from memscrub.errors import PolicyError
from memscrub.jobs.policy_check import check_policy

POLICY = """\
schema = 1
name = "check"
[protected]
files = ["protected.jsonl"]
[class.c]
max_verbatim_tokens = 16
[class.d]
max_near_verbatim = 0.6
[report]
key = "report.key"
"""
WAIVER = '[[waiver]]\nid = "a"\nexpires = 2026-06-30\nreason = "licensed"\n'
DAY = date(2026, 6, 20)
TEXTS = [
    {"id": "a", "class": "c", "text": "A text of so many words that it is long enough to be judged by anybody. " * 3},
    {"id": "b", "class": "c", "text": "A text of so many words that it is long enough to be judged by anybody. " * 3},
    {"id": "short", "class": "c", "text": "Too short to judge."},
]


def lay_out(folder: Path, policy: str = POLICY) -> Path:
    (folder / "protected.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    (folder / "report.key").write_text("sixteen bytes or more of a key\n")
    (folder / "policy.toml").write_text(policy)
    return folder / "policy.toml"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys\nfrom memscrub.cli.app import main\ntry:\n    main()\n"
        "except SystemExit as end:\n    assert 'torch' not in sys.modules\n    raise"
    )
    command = [sys.executable, "-c", program, "policy", "check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_sound_policy_is_counted_and_what_is_odd_in_it_named(tmp_path: Path) -> None:
    found = check_policy(lay_out(tmp_path, POLICY + WAIVER), day=DAY)
    assert found.texts == {"c": 2, "d": 0} and found.duplicates == ("b",) and found.short == ("short",)
    assert [waiver.id for waiver in found.waivers] == ["a"]
    said = " ".join(found.remarks)
    assert "class d has no texts" in said and "1 text ('b') dropped as duplicates" in said
    assert "1 text ('short') perhaps too short" in said and "the waiver of 'a' expires in 10 days" in said


def test_a_policy_without_a_key_for_trust_or_with_too_few_texts_for_its_rate_says_so(tmp_path: Path) -> None:
    few = POLICY.replace("[class.d]", "max_violation_rate = 0.01\n[class.d]").replace(
        '[report]\nkey = "report.key"\n', ""
    )
    said = " ".join(check_policy(lay_out(tmp_path, few), day=DAY).remarks)
    assert "class c has 2 texts, and max_violation_rate cannot hold with fewer than 299" in said
    assert "no [report] key: a gate cannot trust signed measures" in said
    (tmp_path / "policy.toml").write_text(POLICY.replace("report.key", "elsewhere.key"))
    assert "elsewhere.key is not here" in " ".join(check_policy(tmp_path / "policy.toml", day=DAY).remarks)


@pytest.mark.parametrize(
    ("characters", "run", "said"), [(56, 8, True), (60, 8, False), (60, 16, True), (80, 16, False)]
)
def test_controls_that_may_be_too_short_for_the_limits_they_are_to_set_are_a_remark(
    tmp_path: Path, characters: int, run: int, said: bool
) -> None:
    policy = POLICY.replace('files = ["protected.jsonl"]', 'files = ["protected.jsonl"]\ncontrols = ["control.jsonl"]')
    path = lay_out(
        tmp_path, policy.replace("max_verbatim_tokens = 16", f"max_verbatim_tokens = {run}\nlike_controls = true")
    )
    entries = [{"id": str(count), "class": "c", "text": "x" * count} for count in (5, characters)]
    (tmp_path / "control.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    remarks = check_policy(path, day=DAY).remarks
    assert ("all control texts of class c are perhaps too short for like_controls" in remarks) is said


def test_an_expired_waiver_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = lay_out(tmp_path, POLICY + WAIVER)
    assert check_policy(path, day=date(2026, 6, 30)).waivers
    with pytest.raises(PolicyError, match=r"policy\.toml:13: the waiver of 'a' expired on 2026-06-30; renew it"):
        check_policy(path, day=date(2026, 7, 1))


def test_the_command_looks_at_every_file_without_torch_and_shows_no_text(tmp_path: Path) -> None:
    good = lay_out(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text(POLICY.replace("protected.jsonl", "protectet.jsonl"))
    other = tmp_path / "other.toml"
    other.write_text(POLICY + WAIVER.replace('"a"', '"shorty"'))
    done = run(bad, good, other)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "ok, 2 protected texts (c 2, d 0), 0 controls" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 2 and "did you mean 'protected.jsonl'?" in errors[0] and "did you mean 'short'?" in errors[1]
    assert "long enough" not in done.stdout + done.stderr
    assert run(good).returncode == 0 and run(good, "-q").stdout == ""
    assert run(tmp_path / "nowhere.toml").returncode == 2 and run().returncode == 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"protected.jsonl": '{"id": "a", "class": "c", "text": 3}'}, "protected.jsonl:1: text must be a string"),
        ({"protected.jsonl": ""}, "protected.jsonl:1: the file holds no text"),
        ({"report.key": "short"}, "report.key: the report key is shorter than 16 bytes"),
        ({"policy.toml": POLICY.replace("0.6", "0.6\nlike_controls = true")}, "no control text of that class"),
    ],
)
def test_a_bad_list_or_key_is_one_sentence_and_exit_2(tmp_path: Path, change: dict[str, str], sentence: str) -> None:
    path = lay_out(tmp_path)
    for name, content in change.items():
        (tmp_path / name).write_text(content)
    done = run(path)
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1
