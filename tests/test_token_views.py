"""Token strips and the map of an edit, against models that really memorized; and the pages that commands write."""

from __future__ import annotations

import json
import math
import re
import shutil
import stat
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from command_line import run

from memscrub.cli.token_views import token_views
from memscrub.edit.edit_map import relative_change
from memscrub.errors import UsageError
from memscrub.faces.html_tokens import MARGINS, PROBABILITIES, TokenView
from memscrub.jobs.scrub import fix
from memscrub.models.architecture import Orientation
from memscrub.reports.report import Report, TextRecord
from memscrub.storage.checkpoint import open_checkpoint, read_tensor
from tests.models import opened, ordinary_text, random_text, tiny_checkpoint, token_text

TEXTS = [random_text(seed, 40) for seed in (1, 2)]
UNKNOWN = random_text(9, 40)
POLICY = """
schema = 1
name = "small"
[protected]
files = ["protected.jsonl"]
[class.text]
max_verbatim_tokens = 6
[locality]
retain = ["retain.txt"]
max_kl = 5.0
max_perplexity_ratio = 9.0
min_agreement = 0.1
max_degenerate = 1.0
"""


@dataclass(frozen=True)
class World:
    """A folder with a policy, a checkpoint that memorized two of its three texts, and its fix."""

    folder: Path
    report: Report

    @property
    def policy(self) -> Path:
        return self.folder / "policy.toml"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "policy.toml").write_text(POLICY)
    lines = [{"id": f"t{index}", "class": "text", "text": text} for index, text in enumerate([*TEXTS, UNKNOWN])]
    (folder / "protected.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "retain.txt").write_text("\n\n".join(ordinary_text(seed, 90) for seed in range(40)))
    tiny_checkpoint(folder / "model", "gpt2", 0, TEXTS, 150)
    fixed = fix(folder / "model", folder / "policy.toml", folder / "out", keep_partial=True)
    assert fixed.directory is not None
    return World(folder, fixed.report)


def longest(view: TokenView, marks: str) -> tuple[int, int]:
    """Begin and length of the first longest run of tokens that come out, of those that are judged."""
    out = "".join("x" if letter.isupper() else "." for letter in marks[1::2])
    runs = list(re.finditer("x+", "." * view.judged + out[view.judged :]))
    best = max(runs, key=lambda run: len(run[0]), default=None)
    return (0, 0) if best is None else (view.first + best.start(), len(best[0]))


def stated(text: TextRecord, *, after: bool) -> tuple[int, int]:
    measures = text.after if after else text.before
    assert measures is not None
    return (measures.run_begin, measures.match_run) if measures.match_run else (0, 0)


def test_the_runs_in_the_strips_are_those_of_the_report_before_and_after(world: World) -> None:
    views = token_views(world.report, world.policy)
    assert views.keys() == {"t0", "t1", "t2"}
    for text in world.report.texts:
        view = views[text.id]
        assert longest(view, view.before) == stated(text, after=False)
        assert longest(view, view.after or "") == stated(text, after=True)
    assert stated(world.report.texts[0], after=False)[1] > 6 >= stated(world.report.texts[0], after=True)[1]


def test_each_mark_is_the_step_of_the_models_own_probability_and_margin(world: World) -> None:
    view = token_views(world.report, world.policy)["t0"]
    loaded = opened(world.folder / "model")
    tokens = token_text(loaded, TEXTS[0]).tokens
    with torch.no_grad():
        logits = loaded.model(torch.tensor([tokens])).logits[0]
    for index in range(len(view.before) // 2):
        token = view.first + index
        row, target = logits[token - 1], tokens[token]
        others = torch.cat([row[:target], row[target + 1 :]])
        gap = float(row[target] - others.max())
        top = row.topk(40).values
        p = float((row[target] - top.logsumexp(-1)).exp()) if row[target] >= top[-1] else 0.0
        digit, letter = int(view.before[2 * index]), view.before[2 * index + 1]
        step = ord(letter.lower()) - ord("a")
        assert PROBABILITIES[digit] - 1e-4 <= p <= ([*PROBABILITIES, math.inf][digit + 1]) + 1e-4
        assert MARGINS[step] - 1e-3 <= abs(gap) <= ([*MARGINS, math.inf][step + 1]) + 1e-3
        assert letter.isupper() == (gap > 0) or abs(gap) < 1e-3


def test_tokens_are_read_only_when_they_are_asked_for(world: World) -> None:
    assert all(view.tokens is None for view in token_views(world.report, world.policy).values())
    shown = token_views(world.report, world.policy, reveal=True)
    assert TEXTS[0].split()[1:] == " ".join(shown["t0"].tokens or ()).split()[-39:]
    assert TEXTS[0].split()[5] not in repr(shown["t0"])


def test_the_texts_that_need_a_look_come_first(world: World) -> None:
    assert token_views(world.report, world.policy, texts=2).keys() == {"t0", "t1"}


def test_another_policy_list_or_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(world.folder, folder)
    (folder / "policy.toml").write_text(POLICY.replace("= 6", "= 7"))
    with pytest.raises(UsageError, match="another policy"):
        token_views(world.report, folder / "policy.toml")
    (folder / "policy.toml").write_text(POLICY)
    (folder / "protected.jsonl").write_text(json.dumps({"id": "t0", "class": "text", "text": TEXTS[0][:60]}))
    with pytest.raises(UsageError, match="not those that the report is about"):
        token_views(world.report, folder / "policy.toml")
    moved = replace(world.report, input=replace(world.report.input, path=str(world.folder / "out")))
    with pytest.raises(UsageError, match="its files differ"):
        token_views(moved, world.policy)


def test_a_fix_that_was_withheld_has_strips_of_the_original_only(world: World, tmp_path: Path) -> None:
    assert world.report.output is not None
    gone = replace(world.report, output=replace(world.report.output, path=str(tmp_path / "never")))
    assert all(view.after is None for view in token_views(gone, world.policy).values())
    # What lies there now is an earlier result that the withheld one did not replace.
    other = replace(world.report, output=replace(world.report.output, path=str(world.folder / "model")))
    assert all(view.after is None for view in token_views(other, world.policy).values())


def test_the_map_of_an_edit_is_the_difference_of_the_two_checkpoints_on_disk(world: World) -> None:
    assert world.report.edit is not None and world.report.edit.tensors
    before, after = (open_checkpoint(world.folder / name) for name in ("model", "out"))
    for tensor in world.report.edit.tensors:
        old, new = read_tensor(before, tensor.name).double(), read_tensor(after, tensor.name).double()
        axis = 0 if tensor.orientation == "columns" else 1
        assert tensor.vectors == old.shape[1 - axis]
        bins = torch.arange(tensor.vectors) * len(tensor.change) // tensor.vectors
        for index, change in enumerate(tensor.change):
            chosen = (bins == index).nonzero()[:, 0]
            moved = (new - old).index_select(1 - axis, chosen).norm() / old.index_select(1 - axis, chosen).norm()
            assert change == pytest.approx(float(moved), rel=0.01)


def test_change_is_counted_per_output_vector_whichever_way_a_matrix_lies() -> None:
    torch.manual_seed(0)
    old = torch.randn(5, 30, 20)
    new = old.clone()
    new[3, :, 7] *= 1.5
    vectors, change = relative_change(old, new, Orientation.COLUMNS, bins=100)
    assert vectors == 100 and [i for i, value in enumerate(change) if value] == [67]
    assert change[67] == pytest.approx(0.5, rel=0.01)
    assert relative_change(old.transpose(1, 2), new.transpose(1, 2), Orientation.ROWS, bins=100) == (vectors, change)
    zero = torch.zeros(4, 4)
    assert relative_change(zero, torch.eye(4), Orientation.ROWS)[1] == (1.0, 1.0, 1.0, 1.0)


def test_commands_write_pages_with_strips_and_without_texts(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = ["--policy", world.policy, "-q"]
    for name, command in {
        "scan": ["scan", world.folder / "model", *policy],
        "report": ["report", world.folder / "out", "--strips", *policy],
    }.items():
        page = tmp_path / f"{name}.html"
        assert run(monkeypatch, *command, "--html", page) == (1 if name == "scan" else 0)
        html = page.read_text("utf-8")
        assert '"t0":{"first":' in html and "Tokens are masked" in html
        assert not any(" ".join(text.split()[at : at + 2]) in html for text in TEXTS for at in range(39))
    moved = tmp_path / "elsewhere"
    shutil.copytree(world.folder / "out", moved)
    stated = json.loads((moved / "memscrub-report.json").read_text("utf-8"))
    stated["output"]["path"] = "where/it/was"
    (moved / "memscrub-report.json").write_text(json.dumps(stated), encoding="utf-8")
    assert run(monkeypatch, "report", moved, "--strips", *policy, "--html", tmp_path / "moved.html") == 0
    assert '"after":"' in (tmp_path / "moved.html").read_text("utf-8")
    shown = tmp_path / "shown.html"
    assert run(monkeypatch, "report", world.folder / "out", "--html", shown, "--reveal", *policy) == 0
    assert "This page shows protected text" in shown.read_text("utf-8")
    assert stat.S_IMODE(shown.stat().st_mode) == 0o600
    assert TEXTS[0].split()[3] not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--reveal"], "name the page with --html"),
        (["--html", "model/page.html"], "more than may go with the weights"),
        (["--html", "nowhere/page.html"], "in a folder that exists"),
    ],
)
def test_a_page_that_cannot_or_must_not_be_written_is_refused_before_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    monkeypatch.chdir(world.folder)
    assert run(monkeypatch, "scan", "model", "--policy", "policy.toml", *options) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (world.folder / "model" / "page.html").exists()
