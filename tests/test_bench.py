"""The bench on tiny models: every row from and back to the same weights, one table, and files that leak nothing."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from models import changed, in_words, ordinary_rows, random_text, snapshot, tiny_checkpoint, write_list

import memscrub
from memscrub.bench import rows as bench_rows
from memscrub.bench import text_rows as bench_text_rows
from memscrub.bench.finetune import Method, Recipe
from memscrub.bench.heads import HeadEdit, by_ablation, by_closed_form
from memscrub.bench.plot import draw
from memscrub.bench.ruler import Ruler, measuring_policy, ruler
from memscrub.bench.run import Files, bench
from memscrub.bench.table import Bench, Figures, Row, best_of, grids, markdown
from memscrub.edit.editable import EditableModel
from memscrub.edit.per_text import suffix_begin
from memscrub.errors import NumericalError, OutputError, UsageError
from memscrub.jobs.editing import stored_dtypes
from memscrub.jobs.scanning import Inputs, open_inputs
from memscrub.models.site_finding import sites_of

TEXTS = tuple(random_text(seed, 40) for seed in range(4))
CONTROLS = tuple(random_text(seed, 40) for seed in range(10, 12))
POLICY = """\
schema = 1
name = "tiny"

[protected]
files = ["protected.jsonl"]
controls = ["control.jsonl"]

[class.c]
max_verbatim_tokens = 6

[probe]
prefix_tokens = 8
suffix_tokens = 16
near_verbatim_prefix = 8
near_verbatim_tokens = 12
offsets = [0, 8]

[locality]
retain = ["retain.txt"]
neighbours = ["neighbours.txt"]
max_tokens = 3000

[fix]
neurons = 4
rank = 20
rounds = 3
marker = "w07"
"""
RECIPES = (
    Recipe("npo small", Method.NPO, 1e-3, (2, 4), 1.0, batch_texts=2, batch_rows=2, warm_up=1),
    Recipe("masked small", Method.MASKED, 1e-3, (2,), 1.0, batch_texts=2, batch_rows=2, warm_up=1),
)
DIVERGING = Recipe("ascent wild", Method.ASCENT, 1e30, (3,), 0.0, batch_texts=2, batch_rows=2, warm_up=1)
NO_EOS = "this tokenizer has none"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in bfloat16 that knows its texts, with a policy and its files."""
    here = tmp_path_factory.mktemp("bench")
    tiny_checkpoint(here / "checkpoint", "llama", 1, texts=TEXTS, steps=80, dtype=torch.bfloat16)
    (here / "policy.toml").write_text(POLICY)
    for name, texts in (("protected", TEXTS), ("control", CONTROLS)):
        write_list(here / f"{name}.jsonl", texts, f"{name}-id-")
    rows = in_words(ordinary_rows(5, 60, 40))
    (here / "retain.txt").write_text("\n\n".join(rows) + "\n")
    (here / "neighbours.txt").write_text("\n\n".join(rows[:3]) + "\n")
    return here


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Inputs:
    return open_inputs(folder / "checkpoint", folder / "policy.toml", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rule(inputs: Inputs) -> Ruler:
    return ruler(inputs)


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    """JSON, Markdown and plot of one whole bench."""
    files = Files(folder / "bench.json", folder / "bench.md", folder / "bench.svg")
    bench(
        folder / "checkpoint",
        folder / "policy.toml",
        recipes=(*RECIPES, DIVERGING),
        sample=3,
        files=files,
        command="memscrub bench here",
        device="cpu",
    )
    return folder


def figures(over: float, kl: float) -> Figures:
    return Figures(10, 5, 1.0, over, 0.3, 0.5, -20.0, -9.0, 0, 0, kl, kl, kl, 0.97, 1.0, 0.9)


# -- a whole run ----------------------------------------------------------------------------------------------


def test_the_table_contains_every_method(results: Path) -> None:
    raw = json.loads((results / "bench.json").read_text())
    names = [row["name"] for row in raw["rows"]]
    expected = ["unedited", *(f"joint {mode}" for mode in bench_rows.MODES)]
    expected += ["joint next-best, mlp", "joint next-best, mlp+attention", "joint like controls"]
    expected += [bench_rows.SELDOM, bench_rows.NO_STARTS, "per-text next-best, at once"]
    assert names[: len(expected)] == expected
    assert [row["family"] for row in raw["rows"] if row["kind"] == "fine-tuning"] == [
        "npo",
        "masked-ascent",
        "gradient-ascent",
    ]
    assert names[-1] == "controls, unedited"
    assert [row["name"] for row in raw["text_rows"]] == list(bench_text_rows.names())
    assert [row["name"] for row in raw["runs"]][:3] == [
        "npo small, step 2",
        "npo small, step 4",
        "masked small, step 2",
    ]
    assert raw["schema"] == 1 and raw["complete"] and len(raw["grid"]) == 3
    assert raw["setting"]["command"] == "memscrub bench here"


def test_the_unedited_row_is_exact_and_edits_remove_what_came_out(results: Path) -> None:
    rows = {row["name"]: row for row in json.loads((results / "bench.json").read_text())["rows"]}
    before = rows["unedited"]["figures"]
    assert (before["kl"], before["agreement"], before["suppressed"], before["over_limit"]) == (0, 1, 0, 1)
    assert before["came_out"] == before["texts"] == len(TEXTS)
    after = rows["joint next-best"]["figures"]
    assert after["suppressed"] > 0 and after["kl"] > 0 and rows["joint next-best"]["seconds"] > 0
    for row in rows.values():
        if row["figures"] is not None:
            assert None not in (row["figures"]["near_mean"], row["figures"]["risk_max"])


def test_a_mode_the_tokenizer_has_no_token_for_and_a_diverged_recipe_are_reported(results: Path) -> None:
    raw = json.loads((results / "bench.json").read_text())
    (eos,) = [row for row in raw["text_rows"] if row["name"] == "eos"]
    assert NO_EOS in eos["failed"]
    (wild,) = [row for row in raw["runs"] if row["family"] == "gradient-ascent"]
    assert wild["figures"] is None and wild["failed"].startswith("diverged: ")
    assert "diverged" in (results / "bench.md").read_text()


def test_no_file_holds_a_text_its_id_or_its_tokens(results: Path, inputs: Inputs) -> None:
    for name in ("bench.json", "bench.md", "bench.svg"):
        content = (results / name).read_text()
        for text in (*TEXTS, *CONTROLS):
            assert " ".join(text.split()[:3]) not in content
        for text in (*inputs.texts, *inputs.controls):
            assert text.id not in content
            assert ", ".join(map(str, text.tokens[4:7])) not in content
    assert "tokens" not in json.loads((results / "bench.json").read_text())


def test_markdown_and_terminal_tables_are_rectangular(results: Path) -> None:
    lines = (results / "bench.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 20 and all(line.endswith("|") for line in tables)
    for index, line in enumerate(lines):
        if line.startswith("|---"):
            rows = list(takewhile(lambda row: row.startswith("|"), lines[index - 1 :]))
            assert len(rows) > 2 and len({row.count("|") for row in rows}) == 1
    assert "memscrub bench here" in lines and any("threads; torch" in line for line in lines)
    assert "<svg" in (results / "bench.svg").read_text()


# -- rows -----------------------------------------------------------------------------------------------------


def test_every_row_puts_the_weights_back_bit_for_bit(rule: Ruler) -> None:
    loaded = rule.inputs.loaded
    before = snapshot(loaded)
    for method in bench_rows.methods(rule.inputs):
        assert method.make(rule, lambda *_: None).name == method.name
        assert changed(loaded, before) == set(), method.name
    rows: list[Row] = []
    for recipe in (*RECIPES, DIVERGING):
        bench_rows.tuned(rule, recipe, rows.append)
        assert changed(loaded, before) == set(), recipe.name
    assert [row.figures is None for row in rows] == [False, False, False, True]
    here = bench_text_rows.bed(rule, 2)
    assert here is not None
    for name in ("next-best", "suppress", "zero-ablation", "random-neurons", "random-directions"):
        row, broken = bench_text_rows.simple(here, name)
        assert row.texts == len(broken) == 2 and row.kl is not None
        assert changed(loaded, before) == set(), name
    bench_text_rows.ensemble(here)
    assert changed(loaded, before) == set()
    rows_, copying = bench_text_rows.attention(here, [False, False])
    assert changed(loaded, before) == set()
    assert [row.texts for row in rows_] == [2, 2] and copying[-1].missed == 2


def test_rows_that_are_seldom_sampled_are_and_giving_up_the_starts_of_texts_harms_them(tmp_path: Path) -> None:
    embedded = Path(memscrub.__file__).parent / "embedded"
    lines = (embedded / "protected.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    (tmp_path / "protected.jsonl").write_text("\n".join(lines), encoding="utf-8")
    policy = POLICY.replace("retain.txt", str(embedded / "retain.txt")).replace('neighbours = ["neighbours.txt"]', "")
    policy = policy.replace("class.c", "class.copyright").replace('controls = ["control.jsonl"]', "")
    (tmp_path / "policy.toml").write_text(policy.replace("rounds = 3", "rounds = 12"), encoding="utf-8")
    rule = ruler(open_inputs(str(embedded / "checkpoint"), tmp_path / "policy.toml", dtype="float32"))
    names = ("joint eos", bench_rows.SELDOM, bench_rows.NO_STARTS)
    makes = {method.name: method.make for method in bench_rows.methods(rule.inputs)}
    found = [makes[name](rule, lambda *_: None).figures for name in names]
    eos, seldom, given_up = (each for each in found if each is not None)
    assert eos.over_limit == seldom.over_limit == given_up.over_limit == 0
    assert eos.risk_max is not None and seldom.risk_max is not None and given_up.risk_max is not None
    # Measured anew, at the rounded weights, with a little room for float32.
    assert seldom.risk_max < math.log(bench_rows.SELDOM_CHANCE) + 1e-2 < eos.risk_max
    assert given_up.risk_max < math.log(bench_rows.NO_STARTS_CHANCE) + 1e-2
    assert eos.start_kl is not None and seldom.start_kl is not None and given_up.start_kl is not None
    assert given_up.start_kl > 2 * eos.start_kl and given_up.start_kl > seldom.start_kl


@pytest.mark.parametrize("error", [NumericalError("the solve broke down."), UsageError("no such token.")])
def test_a_method_that_fails_says_so_in_its_row_and_leaves_nothing_behind(rule: Ruler, error: Exception) -> None:
    loaded = rule.inputs.loaded
    before = snapshot(loaded)

    def edit() -> None:
        next(loaded.model.parameters()).data.add_(1.0)
        raise error

    row = bench_rows.edited(rule, "broken", edit)
    assert row.figures is None and row.failed is not None and str(error) in row.failed
    assert changed(loaded, before) == set()


def test_an_interrupt_restores_the_weights_and_keeps_the_finished_rows(folder: Path, tmp_path: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "bench (joint next-best)":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(
            folder / "checkpoint",
            folder / "policy.toml",
            recipes=(),
            files=Files(tmp_path / "b.json", tmp_path / "b.md"),
            device="cpu",
            progress=progress,
        )
    raw = json.loads((tmp_path / "b.json").read_text())
    assert [row["name"] for row in raw["rows"]] == ["unedited", "controls, unedited"]
    assert raw["complete"] is False and "Unfinished" in (tmp_path / "b.md").read_text()


def test_only_chooses_rows_by_name(folder: Path) -> None:
    found = bench(
        folder / "checkpoint", folder / "policy.toml", recipes=RECIPES, only=["zero", "npo"], sample=1, device="cpu"
    )
    assert [row.name for row in found.rows][0::2] == ["unedited", "controls, unedited"]
    assert len(found.runs) == 2 and [row.name for row in found.text_rows] == ["zero-ablation"]


def test_the_heads_of_a_text_are_ablated_or_edited_only_in_attention(rule: Ruler) -> None:
    here = bench_text_rows.bed(rule, 1)
    assert here is not None
    inputs = rule.inputs
    sites = sites_of(inputs.loaded, kinds=("attention",))
    editable = EditableModel(inputs.loaded, sites, stored_dtypes(inputs, sites))
    heads = HeadEdit(editable, bench_text_rows.metrics(rule, editable), 0.5)
    before = snapshot(inputs.loaded)
    (text,) = here.texts
    for method in (by_ablation, by_closed_form):
        method(heads, text, suffix_begin(text, here.settings))
        touched = changed(inputs.loaded, before)
        assert touched and touched <= {site.tensor for site in sites}
        editable.restore()
    assert changed(inputs.loaded, before) == set()


# -- values ---------------------------------------------------------------------------------------------------


def test_best_of_the_grid_is_the_lowest_kl_among_those_close_to_the_least_over_the_limit() -> None:
    def row(name: str, over: float, kl: float) -> Row:
        return Row(name, "fine-tuning", figures(over, kl), 1.0, family="npo")

    failed = Row("failed", "fine-tuning", None, failed="diverged: x", family="npo")
    rows = [failed, row("far", 0.05, 0.0001), row("least", 0.01, 0.01), row("close", 0.03, 0.002)]
    assert best_of(rows).name == "close"
    assert best_of(rows[:1]).name == "failed"


def test_copy_fraction_by_hand() -> None:
    # Prefix 5 6 7 (the 1 before it is the prompt), suffix 7 1 5 9: 7 and 5 occur in it.
    assert bench_text_rows.copy_fraction((1, 5, 6, 7, 7, 1, 5, 9), 1, 4) == 0.5


def test_the_measuring_policy_measures_everything_and_leaves_the_editing_policy_alone(inputs: Inputs) -> None:
    classes = {"c": inputs.policy.classes["c"].model_copy(update={"max_verbatim_tokens": None})}
    policy = inputs.policy.model_copy(update={"classes": classes})
    measuring = measuring_policy(policy).classes["c"]
    assert (measuring.max_verbatim_tokens, measuring.max_near_verbatim) == (16, 1.0)
    assert policy.classes["c"].max_near_verbatim is None and measuring_policy(policy).path == policy.path


def test_a_bench_without_any_fine_tuning_or_per_text_row_renders_and_draws(results: Path, tmp_path: Path) -> None:
    found = bench(results / "checkpoint", results / "policy.toml", recipes=(), only=["unedited"], device="cpu")
    assert isinstance(found, Bench) and len(grids(found)) == 2 and "Every fine-tuning" not in markdown(found)
    draw(replace(found, rows=()), tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")


# -- the command line -----------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memscrub", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_prints_its_tables_within_80_columns_and_nothing_else_when_piped(
    folder: Path, tmp_path: Path
) -> None:
    paths = (folder / "checkpoint", "--policy", folder / "policy.toml", "--json", tmp_path / "b.json")
    done = run(*paths, "--skip-finetuning", "--only", "at once", "--threads", "1", "--sample", "1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "unedited" in done.stdout and "at once" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "--skip-finetuning" in json.loads((tmp_path / "b.json").read_text())["setting"]["command"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--only", "nothing-like-it"], "nothing-like-it"),
        (["--plot", "plot.pdf"], ".svg or .png"),
        (["--json", "nowhere/b.json"], "nowhere"),
        (["--sample", "0"], "--sample"),
    ],
)
def test_bad_input_gives_one_sentence_and_exit_2(folder: Path, options: list[str], word: str) -> None:
    done = run(folder / "checkpoint", "--policy", folder / "policy.toml", "--skip-finetuning", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert word in done.stderr and "Traceback" not in done.stderr


def test_a_signal_ends_with_exit_3_and_says_where_the_finished_rows_are(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    command = [sys.executable, "-m", "memscrub", "bench", folder / "checkpoint", "--policy", folder / "policy.toml"]
    process = subprocess.Popen([*map(str, command), "--json", str(out)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not out.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 3 and str(out) in said and "Traceback" not in said
    raw = json.loads(out.read_text())
    assert raw["rows"][0]["name"] == "unedited" and raw["complete"] is False


def test_files_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        bench("no-such-checkpoint", "no-such-policy", files=Files(json=tmp_path))
