"""`verify --base`: the edit that a report states is held against the two checkpoints, byte by byte."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from memscrub.errors import ExitCode, SignatureInvalidError, UsageError
from memscrub.proof.edit_ledger import check_edit
from memscrub.reports.report import REPORT_NAME, CheckpointRecord, EditRecord, Report, TensorRecord, load_report
from memscrub.storage import vector_changes
from memscrub.storage.checkpoint import INDEX, digest_files, open_checkpoint, read_tensor, tree_digest
from memscrub.storage.vector_changes import changes, ranges
from memscrub.storage.writing import TensorChange, tensor_digest, write_checkpoint

OLD = Path(__file__).parent / "fixtures" / "reports" / "0.1.0"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DOWN, UP, EXPERTS = "layers.0.down.weight", "layers.0.up.weight", "layers.1.experts.down"


def save_base(root: Path) -> Path:
    """Two shards: one with matrices that get edited, one that no edit touches."""
    root.mkdir()
    generator = torch.Generator().manual_seed(1)
    values = {
        DOWN: torch.randn(6, 8, generator=generator).to(torch.bfloat16),
        EXPERTS: torch.randn(3, 4, 5, generator=generator),
        "layers.0.bias": torch.randn(7, generator=generator),
    }
    save_file(values, root / SHARDS[0], {"format": "pt"})
    save_file({UP: torch.randn(4, 4, generator=generator)}, root / SHARDS[1], {"format": "pt"})
    place = {**dict.fromkeys(values, SHARDS[0]), UP: SHARDS[1]}
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (root / "config.json").write_text('{"model_type": "llama"}')
    (root / "tokenizer.json").write_text("{}\n")
    (root / "pytorch_model.bin").write_text("other weights")
    return root


def edited_values(root: Path) -> dict[str, Tensor]:
    ckpt = open_checkpoint(root)
    down, experts = read_tensor(ckpt, DOWN), read_tensor(ckpt, EXPERTS)
    down[:, 2] += 1  # one output vector, a column
    down[:, 5] += 1
    experts[1, 2] += 1  # one row of the second expert
    return {DOWN: down, EXPERTS: experts}


def record(change: TensorChange) -> TensorRecord:
    orientation = "columns" if change.name == DOWN else "rows"
    count = change.columns_changed if orientation == "columns" else change.rows_changed
    return TensorRecord(
        change.name, change.shard, count, change.elements_changed, change.sha256_before, change.sha256_after,
        orientation, change.rows, change.columns,
    )  # fmt: skip


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `fixed` with an edit of two tensors and the report that states it."""
    root = tmp_path_factory.mktemp("ledger")
    base = open_checkpoint(save_base(root / "base"))
    ledger = write_checkpoint(base, root / "fixed", edited_values(root / "base"))
    stated = load_report(OLD / "passed" / REPORT_NAME)
    assert stated.edit is not None
    edit = replace(stated.edit, tensors=tuple(map(record, ledger.changes)), left_out=ledger.left_out)
    before, after = digest_files(base), digest_files(root / "fixed")
    report = replace(
        stated,
        input=CheckpointRecord("base", tree_digest(before), before),
        output=CheckpointRecord("fixed", tree_digest(after), after),
        edit=edit,
    )
    (root / "fixed" / REPORT_NAME).write_text(report.to_json())
    return root


@pytest.fixture
def copy(workshop: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workshop, tmp_path / "copy"))


@pytest.mark.parametrize("place", [".cache", ".git", "more"])
def test_a_file_beside_the_checkpoint_is_found_wherever_it_hides(copy: Path, place: str) -> None:
    (copy / "fixed" / place).mkdir()
    shutil.copy(copy / "base" / "config.json", copy / "fixed" / place / "extra.safetensors")
    with pytest.raises(SignatureInvalidError, match=r"extra\.safetensors was added"):
        check_edit(copy / "fixed", copy / "base")


def restate(root: Path, change: Callable[[Report], Report]) -> None:
    file = root / "fixed" / REPORT_NAME
    file.write_text(change(load_report(file)).to_json())


def restate_output(root: Path) -> None:
    """The report as a dishonest signer would write it: digests of all files as they are now."""
    files = {n: d for n, d in digest_files(root / "fixed").items() if n != REPORT_NAME}
    restate(root, lambda report: replace(report, output=CheckpointRecord("fixed", tree_digest(files), files)))


def restate_edit(root: Path, change: Callable[[EditRecord], EditRecord]) -> None:
    restate(root, lambda report: replace(report, edit=change(report.edit)))  # type: ignore[arg-type]


def restate_tensor(root: Path, name: str, **values: Any) -> None:
    def change(edit: EditRecord) -> EditRecord:
        return replace(edit, tensors=tuple(replace(t, **values) if t.name == name else t for t in edit.tensors))

    restate_edit(root, change)


def refuse(root: Path, *words: str) -> None:
    with pytest.raises(SignatureInvalidError) as caught:
        check_edit(root / "fixed", root / "base")
    message = str(caught.value)
    assert caught.value.exit_code is ExitCode.SIGNATURE and all(word in message for word in words), message


def rewrite(root: Path, name: str, edit: Callable[[Tensor], None]) -> None:
    """Change one tensor of the fixed directory in its shard, header and all other bytes kept."""
    ckpt = open_checkpoint(root / "fixed")
    info, value = ckpt.tensors[name], read_tensor(ckpt, name)
    edit(value)
    with (ckpt.path / info.shard).open("r+b") as file:
        file.seek(info.begin)
        file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def test_an_edit_that_is_as_stated_is_confirmed_with_its_extent(workshop: Path) -> None:
    found = check_edit(workshop / "fixed", workshop / "base")
    assert (found.tensors, found.vectors, found.elements) == (2, 3, 17)
    assert found.base_sha256 == tree_digest(digest_files(workshop / "base"))


def test_a_report_states_which_rows_and_columns_hold_the_edit(workshop: Path) -> None:
    edit = load_report(workshop / "fixed" / REPORT_NAME).edit
    assert edit is not None
    stated = {tensor.name: (tensor.rows, tensor.columns) for tensor in edit.tensors}
    assert stated == {DOWN: ("0-5", "2,5"), EXPERTS: ("6", "5-9")}  # row 2 of expert 1 is row 4 + 2


@pytest.mark.parametrize("name", [UP, "layers.0.bias"])
def test_a_change_of_an_unplanned_tensor_names_it_even_if_all_digests_were_restated(copy: Path, name: str) -> None:
    rewrite(copy, name, lambda value: value.view(-1)[3:4].add_(1))
    refuse(copy, open_checkpoint(copy / "fixed").tensors[name].shard, "was changed after the report")
    restate_output(copy)
    refuse(copy, repr(name), "states no edit")


def test_a_second_edit_of_a_planned_tensor_names_it(copy: Path) -> None:
    rewrite(copy, DOWN, lambda value: value[3:4, 4:5].add_(1))
    restate_output(copy)
    refuse(copy, repr(DOWN), "another digest")


def test_an_unplanned_column_is_found_although_all_digests_and_counts_but_the_columns_were_restated(copy: Path) -> None:
    def swap(value: Tensor) -> None:
        base = read_tensor(open_checkpoint(copy / "base"), DOWN)
        value[:, 4], value[:, 5] = base[:, 4] + 1, base[:, 5]

    rewrite(copy, DOWN, swap)
    restate_output(copy)
    ckpt = open_checkpoint(copy / "fixed")
    restate_tensor(copy, DOWN, sha256_after=tensor_digest(ckpt, ckpt.tensors[DOWN]))
    refuse(copy, repr(DOWN), "other columns than stated")
    restate_tensor(copy, DOWN, columns="2,4")
    assert check_edit(copy / "fixed", copy / "base").vectors == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"elements_changed": 11}, "other elements"),
        ({"vectors_changed": 3}, "other output vectors"),
        ({"orientation": "rows"}, "other output vectors"),
        ({"orientation": "diagonals"}, "other output vectors"),
        ({"rows": "0-4"}, "other rows"),
        ({"columns": "2-5"}, "other columns"),
        ({"sha256_before": "0" * 64}, "another digest"),
        ({"sha256_after": "0" * 64}, "another digest"),
        ({"shard": SHARDS[1]}, "another digest"),
    ],
)
def test_an_untrue_statement_about_a_tensor_is_refused_and_the_tensor_named(
    copy: Path, values: dict[str, Any], words: str
) -> None:
    restate_tensor(copy, DOWN, **values)
    refuse(copy, repr(DOWN), words)


def test_an_edit_that_was_not_made_or_is_stated_twice_is_refused(copy: Path) -> None:
    (first, second) = load_report(copy / "fixed" / REPORT_NAME).edit.tensors  # type: ignore[union-attr]
    for tensors, words in (
        ((first, first, second), ["two edits of one tensor"]),
        ((first, second, replace(first, name="ghost")), ["'ghost'", "does not hold"]),
        ((first, second, replace(first, name=UP)), [repr(UP), "is the base's, although"]),
        ((first, second, replace(first, name="layers.0.bias")), ["'layers.0.bias'", "is the base's, although"]),
    ):
        restate_edit(copy, lambda edit, tensors=tensors: replace(edit, tensors=tensors))  # type: ignore[misc]
        refuse(copy, *words)


def test_a_forgotten_tensor_is_named(copy: Path) -> None:
    restate_edit(copy, lambda edit: replace(edit, tensors=edit.tensors[:1]))
    left = {DOWN, EXPERTS} - {load_report(copy / "fixed" / REPORT_NAME).edit.tensors[0].name}  # type: ignore[union-attr]
    refuse(copy, repr(left.pop()), "states no edit")


def test_another_base_is_refused_with_the_file_that_differs(copy: Path) -> None:
    with (copy / "base" / SHARDS[1]).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    refuse(copy, "not the checkpoint that was edited", SHARDS[1])


def test_another_base_is_refused_even_if_the_report_names_it_by_one_digest_only(copy: Path) -> None:
    restate(copy, lambda report: replace(report, input=replace(report.input, sha256="0" * 64)))
    refuse(copy, "contradicts itself")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"model_type": "llama", "x": 1}', "config.json differs"),
        ("tokenizer.json", "{} ", "tokenizer.json differs"),
        ("extra.py", "import os", "extra.py is not in the base"),
        ("pytorch_model.bin", "other weights", "although the report says that it was left out"),
        ("tokenizer.json", None, "tokenizer.json of the base is missing"),
    ],
)
def test_every_file_beside_the_weights_must_be_the_bases(copy: Path, name: str, text: str | None, words: str) -> None:
    if text is None:
        (copy / "fixed" / name).unlink()
    else:
        (copy / "fixed" / name).write_text(text)
    refuse(copy, name, "after the report was written")
    restate_output(copy)
    refuse(copy, words)


def test_a_header_that_says_something_else_is_refused(copy: Path) -> None:
    file = copy / "fixed" / SHARDS[0]
    data = file.read_bytes()
    assert data.count(b'"pt"') == 1
    file.write_bytes(data.replace(b'"pt"', b'"tp"'))
    restate_output(copy)
    refuse(copy, f"The header of {SHARDS[0]}")


def test_a_tensor_of_another_form_is_refused(copy: Path) -> None:
    save_file({UP: torch.zeros(2, 8)}, copy / "fixed" / SHARDS[1], {"format": "pt"})
    restate_output(copy)
    refuse(copy, repr(UP), "another dtype, shape or place")


def test_what_memscrub_adds_itself_is_no_fault(copy: Path) -> None:
    for name in ("model.sig", "memscrub-report.dsse.json", "memscrub-summary.dsse.json"):
        (copy / "fixed" / name).write_text("{}")
    assert check_edit(copy / "fixed", copy / "base").tensors == 2


def test_without_the_report_of_a_fix_there_is_nothing_to_check(copy: Path) -> None:
    with pytest.raises(UsageError, match="holds no memscrub-report"):
        check_edit(copy / "base", copy / "base")
    restate(copy, lambda report: replace(report, kind="gate"))
    with pytest.raises(UsageError, match="not that of a fix"):
        check_edit(copy / "fixed", copy / "base")


def test_checking_reads_in_small_pieces_and_loads_no_torch(workshop: Path) -> None:
    code = (
        "import sys; from memscrub.proof.edit_ledger import check_edit; check_edit(sys.argv[1], sys.argv[2])\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, workshop / "fixed", workshop / "base"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


SHAPES = [(), (0,), (1,), (7,), (1, 1), (5, 9), (9, 5), (3, 4, 5), (2, 3, 2, 4), (3, 0, 2)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rows_columns_and_elements_are_those_that_torch_finds(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    seed, share = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    old = torch.randint(0, 100, shape, generator=generator).to(dtype)
    mask = torch.rand(shape, generator=generator) < share
    new = torch.where(mask, old + 1, old)
    raw = [bytes(value.reshape(-1).view(torch.uint8).numpy()) for value in (old, new)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vector_changes, "BLOCK", data.draw(st.sampled_from([1, 16, 1 << 20])))
        one, other = (lambda begin, end, of=of: of[begin:end] for of in raw)
        found = changes(one, other, shape, old.element_size(), len(raw[0]))
    matrices = mask.reshape(-1, shape[-2] if len(shape) > 1 else 1, shape[-1] if shape else 1) if mask.numel() else None
    rows = [] if matrices is None else matrices.any(2).flatten().nonzero().flatten().tolist()
    columns = [] if matrices is None else matrices.any(1).flatten().nonzero().flatten().tolist()
    assert (found.elements, found.rows, found.columns) == (int(mask.sum()), ranges(rows), ranges(columns))
    assert (found.rows_changed, found.columns_changed) == (len(rows), len(columns))


def test_ranges_are_short_and_exact() -> None:
    assert [ranges(n) for n in ([], [4], [0, 1, 2], [0, 2, 3, 9])] == ["", "4", "0-2", "0,2-3,9"]
