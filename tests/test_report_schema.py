"""docs/report.schema.json: generated, up to date, and what every kind of report is valid against."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from command_line import run
from hypothesis import given, settings
from jsonschema import Draft202012Validator
from models import random_text, tiny_checkpoint
from test_report import REPORTS

from memscrub.reports import records as report_records
from memscrub.reports import report as report_module
from memscrub.reports import verdict
from memscrub.reports.json_values import plain
from memscrub.reports.report import Report
from memscrub.reports.schema import as_json, schema

PAGE = Path(__file__).parent.parent / "docs" / "report.schema.json"
FIXTURES = Path(__file__).parent / "fixtures" / "reports"
VALIDATOR = Draft202012Validator(schema())

POLICY = """\
schema = 1
name = "schema"
[protected]
files = ["protected.jsonl"]
controls = ["controls.jsonl"]
[class.c]
max_verbatim_tokens = 6
max_near_verbatim = 0.5
max_sampling_probability = 0.01
[class.pii]
secret = true
max_sampling_probability = 1e-3
[probe]
prefix_tokens = 6
suffix_tokens = 6
near_verbatim_prefix = 6
[locality]
retain = ["retain.txt"]
neighbours = ["neighbours.jsonl"]
max_kl = 5
max_worst_kl = 50
max_perplexity_ratio = 50
min_agreement = 0.01
min_neighbours_kept = 0.01
max_degenerate = 1
[fix]
rounds = 4
[report]
key = "report.key"
[[waiver]]
id = "second"
expires = {tomorrow}
reason = "licensed until then"
"""


def test_the_schema_in_the_docs_is_the_one_that_the_program_writes() -> None:
    assert PAGE.read_text("utf-8") == as_json(), "run: python -m memscrub.reports.schema docs/report.schema.json"
    Draft202012Validator.check_schema(schema())


def records() -> Iterator[type]:
    """Every dataclass that a report can hold, found from its annotations alone."""
    todo, seen = [Report], set()
    while todo:
        kind = todo.pop()
        if kind in seen:
            continue
        seen.add(kind)
        yield kind
        text = " ".join(map(str, get_type_hints(kind).values()))
        homes = [vars(module) for module in (report_module, report_records, verdict)]
        known = {name: each for home in homes for name, each in home.items() if dataclasses.is_dataclass(each)}
        todo += [each for name, each in known.items() if re.search(rf"\.{name}\b", text)]


@pytest.mark.parametrize("kind", list(records()), ids=lambda kind: kind.__name__)
def test_every_record_is_described_whole_and_closed(kind: type) -> None:
    told = schema() if kind is Report else schema()["$defs"][kind.__name__]
    assert list(told["properties"]) == [field.name for field in dataclasses.fields(kind)]
    assert told["additionalProperties"] is False and told["description"]
    assert set(told["required"]) == {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}


@settings(max_examples=60, deadline=None)
@given(report=REPORTS)
def test_whatever_a_report_holds_its_json_is_valid(report: Report) -> None:
    raw = plain(report)
    if raw["verdict"]["exit_code"] not in (0, 1, 4):
        raw["verdict"]["exit_code"] = 0
    VALIDATOR.validate(raw)


def reports_of_the_past() -> list[Path]:
    return [*FIXTURES.glob("*/*.json"), *FIXTURES.glob("*/*/memscrub-report.json")]


@pytest.mark.parametrize("path", reports_of_the_past(), ids=lambda path: "/".join(path.parts[-3:]))
def test_a_report_of_an_earlier_release_is_valid(path: Path) -> None:
    VALIDATOR.validate(json.loads(path.read_text("utf-8")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Real reports of every kind, with everything in them that can be asked for without further packages."""
    folder = tmp_path_factory.mktemp("schema")
    texts = [random_text(seed, 24) for seed in range(1, 4)]
    tiny_checkpoint(folder / "base", "llama", seed=1, texts=texts, steps=120)
    begin = texts[2].index(texts[2].split()[16])
    entries: list[dict[str, Any]] = [
        {"id": "first", "class": "c", "text": texts[0]},
        {"id": "second", "class": "c", "text": texts[1]},
        {"id": "secret", "class": "pii", "text": texts[2], "secret": [[begin, begin + 11]]},
        {"id": "short", "class": "c", "text": random_text(9, 3)},
    ]
    lists = {
        "protected.jsonl": entries,
        "controls.jsonl": [{"id": "control", "class": "c", "text": random_text(20, 24)}],
        "neighbours.jsonl": [{"text": " ".join(texts[0].split()[:12] + random_text(30, 20).split())}],
    }
    for name, rows in lists.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "retain.txt").write_text("\n\n".join(random_text(200 + number, 60) for number in range(8)) + "\n")
    (folder / "report.key").write_text("not a secret: this is a test\n")
    tomorrow = (datetime.now(timezone.utc) + timedelta(days=1)).date()
    (folder / "policy.toml").write_text(POLICY.format(tomorrow=tomorrow))
    also = [f"--also={name}" for name in ("membership", "prefix-sweep", "exposure", "near-mass", "alignment")]
    commands = {
        "scan": ["scan", "base", *also],
        "fix": ["fix", "base", "--out=out", "--keep-partial", "--patch=edit.safetensors"],
        "gate": ["gate", "out"],
        "baseline": ["gate", "base", "--baseline=scan.json"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, command in commands.items():
            assert run(patch, *command, "-p", "policy.toml", "-q", f"--report={name}.json") in (0, 1, 4), name
    return {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in commands}


def test_real_reports_of_every_command_are_valid(made: dict[str, Any]) -> None:
    for raw in made.values():
        VALIDATOR.validate(raw)


def test_they_hold_what_can_be_asked_for(made: dict[str, Any]) -> None:
    """Else the test above would say little."""
    scan, fix = made["scan"], made["fix"]
    assert set(scan["depths"]["measures"]) >= {"membership", "prefix-sweep", "exposure", "near-mass", "alignment"}
    assert scan["controls"] and scan["classes"] and scan["texts"][2]["before"]["secrets"]
    assert fix["edit"]["tensors"] and fix["edit"]["patch_sha256"] and fix["output"]["files"]
    assert fix["locality"] and fix["neighbours"] and fix["benign"]
    assert made["gate"]["kind"] == "gate" and made["baseline"]["baseline"]["sha256"]
    assert [each["id"] for each in made["baseline"]["waivers"]] == ["second"]
    excuses = {each["by"] for text in made["baseline"]["texts"] for each in text["excused"]}
    assert excuses == {"waiver", "baseline"}
    assert [(text["file"], text["line"]) for text in scan["texts"]] == [("protected.jsonl", n) for n in range(1, 5)]
    assert scan["policy"]["file"] == "policy.toml"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("surprise",), 1),
        (("texts", 0, "surprise"), 1),
        (("kind",), "look"),
        (("schema",), 2),
        (("texts", 0, "before", "match_run"), "9"),
        (("texts", 0, "before_judgement", "status"), "safe"),
        (("verdict", "exit_code"), 5),
        (("locality", "kl"), "0.1"),
        (("edit", "tensors", 0, "name"), None),
    ],
)
def test_what_is_no_report_is_not_valid(made: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    raw = json.loads(json.dumps(made["fix"]))
    place = raw
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert not VALIDATOR.is_valid(raw)
    assert VALIDATOR.is_valid(made["fix"])


def test_a_report_without_a_field_that_it_must_have_is_not_valid(made: dict[str, Any]) -> None:
    for name in schema()["required"]:
        raw = {key: value for key, value in made["scan"].items() if key != name}
        assert not VALIDATOR.is_valid(raw), name
