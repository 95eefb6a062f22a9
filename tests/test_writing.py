"""Writing an edited checkpoint: only the planned bytes change, and an output is absent or complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from memscrub.errors import (
    CheckpointError,
    ExitCode,
    IncompleteError,
    NumericalError,
    OutputError,
    UsageError,
)
from memscrub.storage.checkpoint import INDEX, SINGLE, Checkpoint, digest_files, open_checkpoint, read_tensor
from memscrub.storage.writing import PartialDirectory, changed_tensors, disk_errors, write_checkpoint

NAMES = ("double", "single", "half", "brain", "experts", "bias")
DTYPES = {
    "double": torch.float64,
    "single": torch.float32,
    "half": torch.float16,
    "brain": torch.bfloat16,
    "experts": torch.bfloat16,
    "bias": torch.float32,
}
SHAPES = {
    "double": (3, 4),
    "single": (4, 3),
    "half": (5, 2),
    "brain": (2, 5),
    "experts": (2, 3, 4),
    "bias": (6,),
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def build(root: Path, *, sharded: bool = True) -> Checkpoint:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text('{"model_type": "llama"}')
    (root / "tokenizer.json").write_text("{}\n")
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(SHAPES[n], generator=generator).to(DTYPES[n]) for n in NAMES}
    tensors["half"][0, 0] = -0.0
    tensors["ids"] = torch.arange(3)
    if sharded:
        place = {name: SHARDS[i % 2] for i, name in enumerate(tensors)}
        for shard in SHARDS:
            save_file({n: t for n, t in tensors.items() if place[n] == shard}, root / shard, {"format": "pt"})
        (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    else:
        save_file(tensors, root / SINGLE, {"format": "pt", "note": "kept"})
    return open_checkpoint(root)


@pytest.fixture
def ckpt(tmp_path: Path) -> Checkpoint:
    return build(tmp_path / "in")


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_an_empty_plan_copies_every_byte(ckpt: Checkpoint, tmp_path: Path) -> None:
    ledger = write_checkpoint(ckpt, tmp_path / "out", {})
    assert contents(tmp_path / "out") == contents(ckpt.path)
    assert ledger.copied == ckpt.files and ledger.rewritten == () and ledger.changes == ()
    assert ledger.bytes_written == sum(len(data) for data in contents(ckpt.path).values())


@settings(max_examples=25, deadline=None)
@given(
    plan=st.dictionaries(
        st.sampled_from(NAMES),
        st.tuples(st.integers(0, 1000), st.sampled_from([torch.float64, torch.float32]), st.booleans()),
    ),
    sharded=st.booleans(),
)
def test_edit_never_touches_unplanned_tensors_and_reverting_restores_every_byte(
    tmp_path_factory: pytest.TempPathFactory, plan: dict[str, tuple[int, torch.dtype, bool]], sharded: bool
) -> None:
    base = tmp_path_factory.mktemp("plan")
    ckpt = build(base / "in", sharded=sharded)
    before = contents(ckpt.path)
    edited: dict[str, Callable[[], torch.Tensor] | torch.Tensor] = {}
    for name, (seed, dtype, lazy) in plan.items():
        wide = torch.float64 if name == "double" else dtype
        value = read_tensor(ckpt, name).to(wide)
        value.view(-1)[seed % value.numel()] += 1.0
        edited[name] = value.clone if lazy else value
    ledger = write_checkpoint(ckpt, base / "out", edited)
    out = open_checkpoint(base / "out")

    assert contents(ckpt.path) == before
    for name, info in ckpt.tensors.items():
        assert out.tensors[name] == info
        if name not in plan:
            assert torch.equal(read_tensor(out, name), read_tensor(ckpt, name))
    outside = {name: bytearray(data) for name, data in contents(out.path).items()}
    for name in plan:
        info = ckpt.tensors[name]
        outside[info.shard][info.begin : info.end] = before[info.shard][info.begin : info.end]
    assert outside == before
    assert {c.name for c in changed_tensors(ckpt, out)} == set(plan)
    assert sorted(ledger.changes, key=lambda c: c.name) == changed_tensors(ckpt, out)
    assert all((c.elements_changed, c.rows_changed, c.columns_changed) == (1, 1, 1) for c in ledger.changes)

    write_checkpoint(out, base / "back", {name: read_tensor(ckpt, name) for name in plan})
    assert contents(base / "back") == before
    shutil.rmtree(base)


def test_values_are_stored_in_the_original_dtype(ckpt: Checkpoint, tmp_path: Path) -> None:
    wanted = {
        n: torch.linspace(-3, 3, torch.Size(SHAPES[n]).numel(), dtype=torch.float64).view(SHAPES[n]) for n in NAMES
    }
    write_checkpoint(ckpt, tmp_path / "out", wanted)
    out = open_checkpoint(tmp_path / "out")
    for name in NAMES:
        stored = read_tensor(out, name)
        assert stored.dtype == DTYPES[name] and torch.equal(stored, wanted[name].to(DTYPES[name]))


def test_untouched_columns_survive_the_way_through_float32(ckpt: Checkpoint, tmp_path: Path) -> None:
    value = read_tensor(ckpt, "half").float()
    value[:, 1] += 0.5
    change = write_checkpoint(ckpt, tmp_path / "out", {"half": value}).changes[0]
    assert (change.elements_changed, change.rows_changed, change.columns_changed) == (5, 5, 1)
    assert torch.signbit(read_tensor(open_checkpoint(tmp_path / "out"), "half")[0, 0])


def test_counts_of_experts_are_per_expert(ckpt: Checkpoint, tmp_path: Path) -> None:
    value = read_tensor(ckpt, "experts")
    value[0, :, 1] += 1
    value[1, 2, :] += 1
    change = write_checkpoint(
        ckpt, tmp_path / "out", {"experts": value.transpose(1, 2).contiguous().transpose(1, 2)}
    ).changes[0]
    assert (change.elements_changed, change.rows_changed, change.columns_changed) == (7, 4, 5)


def test_a_zero_of_the_other_sign_counts_as_a_change(ckpt: Checkpoint, tmp_path: Path) -> None:
    value = read_tensor(ckpt, "half")
    value[0, 0] = 0.0
    assert write_checkpoint(ckpt, tmp_path / "out", {"half": value}).changes[0].elements_changed == 1


@pytest.mark.parametrize(
    ("edited", "error", "match"),
    [
        ({"missing": torch.zeros(1)}, UsageError, "stores no tensor 'missing'"),
        ({"half": torch.zeros(2, 5)}, UsageError, "shape"),
        ({"half": torch.zeros(5, 2, dtype=torch.int32)}, UsageError, "not floats"),
        ({"ids": torch.zeros(3)}, UsageError, "stored as I64"),
        ({"half": torch.full((5, 2), float("nan"))}, NumericalError, "NaN or infinity"),
        ({"half": torch.full((5, 2), float("-inf"))}, NumericalError, "NaN or infinity"),
        ({"half": torch.full((5, 2), 1e6)}, NumericalError, "too large for F16"),
        (
            {"brain": torch.zeros(2, 5), "single": lambda: torch.full((4, 3), 1e300, dtype=torch.float64)},
            NumericalError,
            "too large for F32",
        ),
    ],
)
def test_values_that_cannot_be_stored_are_refused_before_anything_is_written(
    ckpt: Checkpoint, tmp_path: Path, edited: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        write_checkpoint(ckpt, tmp_path / "out", edited)
    assert not (tmp_path / "out").exists()


def test_values_that_change_between_check_and_write_are_refused(ckpt: Checkpoint, tmp_path: Path) -> None:
    calls = iter(range(9))
    with pytest.raises(IncompleteError, match="changed while"):
        write_checkpoint(ckpt, tmp_path / "out", {"half": lambda: torch.full((5, 2), float(next(calls)))})


def test_output_must_not_overlap_the_input(ckpt: Checkpoint, tmp_path: Path) -> None:
    before = contents(ckpt.path)
    (tmp_path / "link").symlink_to(ckpt.path)
    for out in (ckpt.path, ckpt.path / "new", ckpt.path.parent, tmp_path / "link" / "new"):
        with pytest.raises(OutputError, match="overlaps the input"):
            write_checkpoint(ckpt, out, {})
        with pytest.raises(OutputError, match="overlaps the input"):
            PartialDirectory(out, overwrite=True, inputs=[ckpt.path])
    assert contents(ckpt.path) == before


def test_existing_files_are_never_overwritten_or_written_through(ckpt: Checkpoint, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    (out / "config.json").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="exists already"):
        write_checkpoint(ckpt, out, {})
    assert not elsewhere.exists()


def test_links_are_copied_as_files_and_blobs_stay_untouched(tmp_path: Path) -> None:
    build(tmp_path / "real")
    snapshot = tmp_path / "hub" / "models--o--n" / "snapshots" / "r"
    snapshot.mkdir(parents=True)
    shutil.move(tmp_path / "real", snapshot.parent.parent / "blobs")
    for blob in (snapshot.parent.parent / "blobs").iterdir():
        blob.chmod(0o444)
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    before = contents(snapshot.parent.parent / "blobs")
    ckpt = open_checkpoint(snapshot)
    write_checkpoint(ckpt, tmp_path / "out", {"half": torch.zeros(5, 2)})
    for path in (tmp_path / "out").iterdir():
        assert path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    assert contents(snapshot.parent.parent / "blobs") == before
    with pytest.raises(OutputError, match="overlaps"):
        write_checkpoint(ckpt, snapshot.parent.parent / "new", {})


def test_old_artefacts_and_second_copies_of_the_weights_are_left_out(ckpt: Checkpoint, tmp_path: Path) -> None:
    extra = ("memscrub-report.json", "model.sig", "memscrub-report.dsse.json", "memscrub-patch.safetensors")
    weights = (
        *("pytorch_model.bin", "original/consolidated.00.pth", "consolidated.safetensors", "m.Q4.gguf"),
        *("onnx/model.onnx_data", "onnx/model.onnx_data_1", "onnx/model.onnx.data", "dcp/__0_0.distcp", "model.tar.gz"),
        *("tf/variables/variables.data-00000-of-00001", "model.safetensors.bak", "m.gguf.part1of2", "weights.npy"),
    )
    others = ("README.md", "README.pt.md", "pytorch_model.bin.index.json", "vocab.txt.gz")
    for name in (*extra, *weights, ".gitattributes", ".git/HEAD", ".cache/huggingface/x", *others):
        (ckpt.path / name).parent.mkdir(parents=True, exist_ok=True)
        (ckpt.path / name).write_bytes(b"x")
    again = open_checkpoint(ckpt.path)
    ledger = write_checkpoint(again, tmp_path / "out", {})
    assert set(ledger.left_out) == {*extra, *weights, ".gitattributes"}
    assert set(contents(tmp_path / "out")) == {*ckpt.files, *others}


def test_changed_tensors_refuses_checkpoints_of_another_layout(ckpt: Checkpoint, tmp_path: Path) -> None:
    other = build(tmp_path / "other")
    save_file({"half": torch.zeros(5, 2)}, tmp_path / "other" / SHARDS[0])
    with pytest.raises(CheckpointError):
        open_checkpoint(other.path)
    (other.path / INDEX).unlink()
    (other.path / SHARDS[0]).rename(other.path / SINGLE)
    with pytest.raises(CheckpointError, match="not comparable"):
        changed_tensors(ckpt, open_checkpoint(other.path))


def test_sharding_does_not_matter_for_the_comparison(ckpt: Checkpoint, tmp_path: Path) -> None:
    assert changed_tensors(ckpt, build(tmp_path / "other", sharded=False)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_real_sharded_model_loads_after_the_edit_and_stays_tied(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in", max_shard_size="20KB")
    ckpt = open_checkpoint(tmp_path / "in")
    assert len(ckpt.shards) > 1 and "lm_head.weight" not in ckpt.tensors
    name = "model.layers.1.mlp.down_proj.weight"
    value = read_tensor(ckpt, name).float()
    value[:, 7] = 0
    ledger = write_checkpoint(ckpt, tmp_path / "out", {name: value})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.state_dict()[name], read_tensor(open_checkpoint(tmp_path / "out"), name))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (ledger.changes[0].rows_changed, ledger.changes[0].columns_changed) == (32, 1)
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").tensors


# --- PartialDirectory ---


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_the_output_appears_only_on_commit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with PartialDirectory(out) as partial:
        (partial.path / "sub").mkdir()
        (partial.path / "sub" / "a").write_text("a")
        assert not out.exists() and names(tmp_path) == ["out.lock", "out.partial"]
        assert partial.commit() == out
        assert contents(out) == {"sub/a": b"a"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_without_commit_nothing_stays(tmp_path: Path, failure: type[BaseException] | None) -> None:
    def run() -> None:
        with PartialDirectory(tmp_path / "out") as partial:
            (partial.path / "a").write_text("a")
            if failure:
                raise failure

    if failure:
        with pytest.raises(failure):
            run()
    else:
        run()
    assert names(tmp_path) == []


def test_a_kept_partial_directory_can_be_resumed_from_its_journal(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PartialDirectory(tmp_path / "out") as partial:
        partial.keep = True
        (partial.path / "journal").write_text("done: 3")
        (partial.path / "model.safetensors").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out.lock", "out.partial"]
    with PartialDirectory(tmp_path / "out", resume=lambda path: ["journal"]) as partial:
        assert contents(partial.path) == {"journal": b"done: 3"}
    assert names(tmp_path) == []


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already") as caught, PartialDirectory(tmp_path / "out"):
        pass
    assert caught.value.exit_code is ExitCode.USAGE and names(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"), PartialDirectory(tmp_path / "out") as partial:
        (tmp_path / "out").mkdir()
        partial.commit()
    assert names(tmp_path) == ["out"]


def test_overwriting_replaces_the_old_output_only_at_the_end(tmp_path: Path) -> None:
    build(tmp_path / "out")
    with PartialDirectory(tmp_path / "out", overwrite=True) as partial:
        (partial.path / "config.json").write_text("new")
        assert open_checkpoint(tmp_path / "out").tensors
        partial.commit()
    assert contents(tmp_path / "out") == {"config.json": b"new"} and names(tmp_path) == ["out"]


def test_overwriting_restores_the_old_output_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "out")
    before, rename = contents(tmp_path / "out"), os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(IncompleteError), PartialDirectory(tmp_path / "out", overwrite=True) as partial:
        partial.commit()
    assert contents(tmp_path / "out") == before and names(tmp_path) == ["out"]


def test_an_interrupt_in_the_first_rename_of_an_exchange_does_not_lose_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "out")
    before, rename = contents(tmp_path / "out"), os.rename

    def interrupted(source: Path, target: Path) -> None:
        rename(source, target)
        if str(target).endswith(".replaced"):
            raise KeyboardInterrupt  # as a signal does that arrives meanwhile

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), PartialDirectory(tmp_path / "out", overwrite=True) as partial:
        partial.commit()
    assert contents(tmp_path / "out") == before and names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_somebody_else_is_not_taken_for_a_replaced_output(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.tex").write_text("x")
    with (
        pytest.raises(OutputError, match=r"out\.replaced is in the way"),
        PartialDirectory(tmp_path / "out", overwrite=overwrite) as partial,
    ):
        partial.commit()
    assert contents(tmp_path) == {"out.replaced/thesis.tex": b"x"} and names(tmp_path) == ["out.replaced"]


@pytest.mark.parametrize("locked", [False, True])
def test_an_input_that_has_the_name_of_a_replaced_output_is_not_touched(tmp_path: Path, locked: bool) -> None:
    ckpt = build(tmp_path / "out.replaced")
    before = digest_files(ckpt)
    if locked:  # by a run that died
        (tmp_path / "out.lock").touch()
    with (
        pytest.raises(OutputError, match="overlaps"),
        PartialDirectory(tmp_path / "out", inputs=[ckpt.path]) as partial,
    ):
        partial.commit()
    assert digest_files(tmp_path / "out.replaced") == before


def test_a_folder_where_the_lock_should_be_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out.lock").mkdir()
    with pytest.raises(OutputError, match="cannot be used"), PartialDirectory(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out.lock"]


@pytest.mark.parametrize("kind", ["file", "link", "documents"])
def test_overwriting_refuses_what_is_not_a_checkpoint(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("x")
    elif kind == "link":
        build(tmp_path / "real")
        out.symlink_to(tmp_path / "real")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("x")
    before = names(tmp_path)
    with pytest.raises(OutputError), PartialDirectory(out, overwrite=True):
        pass
    assert names(tmp_path) == before


@pytest.mark.parametrize("out", ["/", ".", ".."])
def test_a_place_that_is_no_new_directory_is_refused(out: str) -> None:
    with pytest.raises(OutputError):
        PartialDirectory(out, overwrite=True)


def test_a_partial_directory_that_no_run_left_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    for _ in range(2):
        with (
            pytest.raises(OutputError, match="no run of memscrub left it"),
            PartialDirectory(tmp_path / "out"),
        ):
            pass
        assert contents(tmp_path) == {"out.partial/mine": b"x"}


def test_a_lock_file_of_somebody_else_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "poetry.lock").write_text("content-hash = 1")
    with pytest.raises(OutputError, match="not a lock of memscrub"), PartialDirectory(tmp_path / "poetry"):
        pass
    assert contents(tmp_path) == {"poetry.lock": b"content-hash = 1"}


def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    with PartialDirectory(tmp_path / "out") as first:
        (first.path / "a").write_text("a")
        with pytest.raises(OutputError, match="Another run") as caught, PartialDirectory(tmp_path / "out"):
            pass
        assert caught.value.exit_code is ExitCode.USAGE
        assert contents(first.path) == {"a": b"a"}
        first.commit()
    assert contents(tmp_path / "out") == {"a": b"a"}


def test_a_killed_run_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    code = (
        "import sys, time; from memscrub.storage.partial import PartialDirectory\n"
        "with PartialDirectory(sys.argv[1]) as p:\n"
        "    (p.path / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    root = Path(__file__).resolve().parent.parent
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    with pytest.raises(OutputError, match="Another run"), PartialDirectory(tmp_path / "out"):
        pass
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert names(tmp_path) == ["out.lock", "out.partial"]
    with PartialDirectory(tmp_path / "out") as partial:
        assert contents(partial.path) == {}
        partial.commit()
    assert names(tmp_path) == ["out"]


def test_a_crash_between_the_two_renames_of_an_exchange_is_undone(tmp_path: Path) -> None:
    build(tmp_path / "out.replaced")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.lock").touch()
    with pytest.raises(OutputError, match="exists already"), PartialDirectory(tmp_path / "out"):
        pass
    assert open_checkpoint(tmp_path / "out").tensors


@pytest.mark.parametrize(
    ("code", "error", "match"),
    [
        (errno.ENOSPC, IncompleteError, "No space is left"),
        (errno.EDQUOT, IncompleteError, "No space is left"),
        (errno.EIO, IncompleteError, "could not be read or written"),
        (errno.EROFS, OutputError, "choose another place"),
        (errno.EACCES, OutputError, "choose another place"),
    ],
)
def test_disk_failures_become_one_sentence(code: int, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught, disk_errors(Path("/x/out")):
        raise OSError(code, os.strerror(code), "/x/out/file")
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_while_copying_leaves_no_output(
    ckpt: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, before, left = os.copy_file_range, digest_files(ckpt), [2]

    def filling(source: int, target: int, count: int, at: int, to: int) -> int:
        if left[0] == 0:
            copy(source, target, min(count, 4), at, to)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return copy(source, target, count, at, to)

    monkeypatch.setattr(os, "copy_file_range", filling)
    with pytest.raises(IncompleteError, match="No space"), PartialDirectory(tmp_path / "out") as partial:
        write_checkpoint(ckpt, partial.path, {})
    assert names(tmp_path) == ["in"] and digest_files(ckpt) == before


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_a_file_system_that_cannot_copy_by_itself_gives_the_same_bytes(
    ckpt: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    calls = []

    def unable(*arguments: int) -> int:
        calls.append(arguments)
        if code is not None:
            raise OSError(code, os.strerror(code))
        return 0

    monkeypatch.setattr(os, "copy_file_range", unable)
    write_checkpoint(ckpt, tmp_path / "out", {})
    assert calls and contents(tmp_path / "out") == contents(ckpt.path)


def test_too_little_space_is_noticed_before_the_first_byte(
    ckpt: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(IncompleteError, match="free some space"):
        write_checkpoint(ckpt, tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def test_a_failed_sync_keeps_the_output_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(IncompleteError, match="No space"), PartialDirectory(tmp_path / "out") as partial:
        (partial.path / "a").write_text("a")
        partial.commit()
    assert names(tmp_path) == []


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """As nobody where the tests run as root, who may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(0)


def test_a_place_without_permission_is_refused() -> None:
    # Not in tmp_path: nobody but its owner may even look into that.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o555)
        try:
            with (
                without_privileges(),
                pytest.raises(OutputError, match="choose another place"),
                PartialDirectory(place / "out"),
            ):
                pass
        finally:
            place.chmod(0o700)


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError), PartialDirectory(tmp_path / "file" / "out"):
        pass
