"""The measures beyond the limits, asked for by the policy or the command line, on real small checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from models import random_text, tiny_checkpoint

from memscrub.errors import PolicyError
from memscrub.jobs.gating import gate
from memscrub.jobs.scanning import scan
from memscrub.policy.document import load_policy
from memscrub.reports.report import Report, load_report
from memscrub.reports.sentences import depth_sentences

KNOWN, UNKNOWN = random_text(1, 60), random_text(2, 60)
POLICY = """schema = 1
name = "deep"
[protected]
files = ["protected.jsonl"]
controls = ["control.jsonl"]
[class.c]
max_verbatim_tokens = 8
[class.s]
secret = true
[probe]
prefix_tokens = 8
suffix_tokens = 8
offsets = [0]
near_verbatim_prefix = 8
near_verbatim_tokens = 16
also = {also}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows one of two texts by heart."""
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "ckpt", "llama", 3, [KNOWN], 150)


def policy(folder: Path, also: list[str]) -> Path:
    """A policy on the known and the unknown text, the known one also with a secret, and one control."""
    secret = KNOWN.split()[30]
    begin = len(" ".join(KNOWN.split()[:30])) + 1
    rows = [
        {"id": "known", "text": KNOWN, "class": "c"},
        {"id": "unknown", "text": UNKNOWN, "class": "c"},
        {"id": "secret", "text": KNOWN, "class": "s", "secret": [[begin, begin + len(secret)]]},
    ]
    (folder / "protected.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "control.jsonl").write_text(json.dumps({"id": "control", "text": random_text(3, 60), "class": "c"}))
    (folder / "policy.toml").write_text(POLICY.format(also=json.dumps(also)))
    return folder / "policy.toml"


ALL = ["membership", "prefix-sweep", "exposure", "near-mass", "alignment"]


@pytest.fixture(scope="module")
def report(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A scan that was asked for everything."""
    return scan(checkpoint, policy(tmp_path_factory.mktemp("policy"), ALL), device="cpu")


def test_every_measure_tells_the_known_text_from_the_unknown_one(report: Report) -> None:
    assert report.depths is not None and report.depths.measures == tuple(ALL)
    known, unknown, secret = report.depths.texts
    assert known.negative_loss is not None and unknown.negative_loss is not None
    assert known.negative_loss > unknown.negative_loss
    assert known.shortest_opening == 8 and unknown.shortest_opening is None and unknown.shortest_prefix is None
    assert known.near_mass is not None and unknown.near_mass is not None
    assert math.exp(known.near_mass[0]) > 0.5 and math.exp(unknown.near_mass[0]) < 0.01
    assert known.alignment is not None and unknown.alignment is not None
    assert known.alignment.covered == 1 and known.alignment.common_tokens > unknown.alignment.common_tokens
    (exposure,) = secret.exposures
    assert exposure.rank == 1 and exposure.bits > 2 and not known.exposures


def test_separations_are_made_for_classes_with_controls_only(report: Report) -> None:
    assert report.depths is not None
    assert {each.class_name for each in report.depths.separations} == {"c"}


def test_a_report_with_every_measure_survives_its_file(report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(report.to_json())
    assert load_report(tmp_path / "report.json") == report


def test_every_measure_is_said_in_a_sentence_without_any_word_of_a_text(report: Report) -> None:
    said = "\n".join(depth_sentences(report))
    assert all(word in said for word in ("membership, c", "prefix sweep, c", "exposure, s", "near mass", "alignment"))
    assert not set(KNOWN.split()) & set(said.split())


def screening(folder: Path, screen: bool) -> Path:
    """The policy with a limit on continuations, screened or not."""
    path = policy(folder, [])
    limited = path.read_text().replace("max_verbatim_tokens = 8", "max_verbatim_tokens = 8\nmax_near_verbatim = 0.9")
    path.write_text(limited.replace("[probe]", f"[probe]\nscreen = {str(screen).lower()}"))
    return path


def test_only_a_scan_that_asks_for_it_screens_and_a_gate_never_does(checkpoint: Path, tmp_path: Path) -> None:
    asked = screening(tmp_path, True)
    assert any(text.before.screened for text in scan(checkpoint, asked, device="cpu").texts)
    assert not any(text.before.screened for text in gate(checkpoint, asked, device="cpu").report.texts)
    plain = screening(tmp_path, False)
    assert not any(text.before.screened for text in scan(checkpoint, plain, device="cpu").texts)


def test_nothing_more_is_measured_unless_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    assert scan(checkpoint, policy(tmp_path, []), device="cpu").depths is None


def test_the_verdict_is_the_same_with_and_without_them(checkpoint: Path, tmp_path: Path, report: Report) -> None:
    assert scan(checkpoint, policy(tmp_path, []), device="cpu").verdict == report.verdict


def test_a_caller_may_ask_for_measures_the_policy_does_not_name(checkpoint: Path, tmp_path: Path) -> None:
    found = scan(checkpoint, policy(tmp_path, []), device="cpu", also=("membership",))
    assert found.depths is not None and found.depths.measures == ("membership",)


def test_an_unknown_measure_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="also"):
        load_policy(policy(tmp_path, ["membershi"]))
