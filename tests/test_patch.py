"""The patch: applied it gives the scrubbed bytes, reverted the original ones, and it carries nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from models import in_words, ordinary_rows, random_text, tiny_checkpoint, write_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from memscrub.cli import patch_command
from memscrub.errors import CheckpointError, ExitCode, IncompleteError, MemscrubError, OutputError, UsageError
from memscrub.jobs.reapply import narrowed
from memscrub.jobs.scrub import fix
from memscrub.policy.document import parse_policy
from memscrub.reports.report import load_report
from memscrub.storage import patch_delta, patch_files
from memscrub.storage.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    digest_files,
    open_checkpoint,
    read_tensor,
    tree_digest,
)
from memscrub.storage.patch import open_patch
from memscrub.storage.patch_delta import _positions, _steps, change, difference
from memscrub.storage.patch_files import apply_patch, mismatch, revert_patch, write_patch
from memscrub.storage.safetensors_header import TensorInfo
from memscrub.storage.writing import write_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "I8": torch.int8}
SHAPES = [(), (7,), (1, 1), (4, 6), (6, 40), (40, 6), (3, 4, 5)]

app = typer.Typer()
for name in ("diff", "apply", "revert"):
    app.command(name)(getattr(patch_command, name))


def run(*arguments: object) -> str:
    """One command that must end with exit code 0; its standard output."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def save(root: Path, tensors: dict[str, Tensor], *, sharded: bool = False, metadata: str = "pt") -> Checkpoint:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text('{"model_type": "llama"}')
    (root / "tokenizer.json").write_text("{}\n")
    (root / "README.md").write_text("# a model\n")
    if sharded:
        place = {name: SHARDS[index % 2] for index, name in enumerate(tensors)}
        for shard in set(place.values()):
            part = {name: value for name, value in tensors.items() if place[name] == shard}
            save_file(part, root / shard, {"format": metadata})
        (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    else:
        save_file(tensors, root / SINGLE, {"format": metadata})
    return open_checkpoint(root)


def raw(value: Tensor) -> bytearray:
    return bytearray(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def info_of(value: Tensor) -> TensorInfo:
    dtype = next(name for name, kind in DTYPES.items() if kind is value.dtype)
    return TensorInfo("w", SINGLE, dtype, tuple(value.shape), 0, value.nbytes)


def random_values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit patterns at all: NaN, infinities and -0.0 among them."""
    width = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * width
    return torch.randint(256, (count,), generator=generator).to(torch.uint8).view(dtype).reshape(shape)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A tensor, and the same with some elements, rows or columns changed (or none, or all)."""
    shape, dtype = draw(st.sampled_from(SHAPES)), DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    old, new = (random_values(shape, dtype, generator) for _ in range(2))
    share, kind = draw(st.sampled_from([0.0, 0.02, 0.2, 0.7, 1.0])), draw(st.sampled_from(["any", "rows", "columns"]))
    size = {"any": shape, "rows": (*shape[:-1], 1), "columns": (*shape[:-2], 1, *shape[-1:])}[kind if shape else "any"]
    mask = torch.rand(size if len(shape) > 1 else shape, generator=generator) < share
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[old.element_size()]
    return old, torch.where(mask, new.view(bits), old.view(bits)).view(dtype)


@settings(max_examples=120, deadline=None)
@given(pairs())
def test_a_difference_undoes_itself_to_the_bit_and_counts_what_changed(pair: tuple[Tensor, Tensor]) -> None:
    old, new = map(raw, pair)
    if old == new:
        return
    info = info_of(pair[0])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patch_delta, "_BLOCK", 16)  # so that small tensors have several blocks
        delta = difference(bytearray(old), bytearray(new), info)
        parts = [bytearray(part.numpy().tobytes()) for part in delta.parts]
        there, back = bytearray(old), bytearray(new)
        change(there, info, delta.layout, delta.axis, parts)
        change(back, info, delta.layout, delta.axis, parts)
    assert parts == [bytearray(part.numpy().tobytes()) for part in difference(bytearray(old), new, info).parts]
    assert (there, back) == (new, old)
    width, shape = pair[0].element_size(), (1, 1, *pair[0].shape)
    elements = [old[i : i + width] != new[i : i + width] for i in range(0, len(old), width)]
    grid = torch.tensor(elements).view(-1, *shape[-2:])
    assert delta.elements_changed == sum(elements)
    assert delta.rows_changed == sum(bool(row.any()) for matrix in grid for row in matrix)
    assert delta.columns_changed == sum(bool(column.any()) for matrix in grid for column in matrix.T)
    differing = sum(a != b for a, b in zip(old, new, strict=True))
    assert sum(map(len, parts)) <= min(len(old) + grid.shape[0] * grid.shape[1], 2 * differing + len(old) // 255 + 1)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40, unique=True))
def test_ascending_positions_survive_as_bytes(positions: list[int]) -> None:
    ordered = torch.tensor(sorted(positions))
    assert torch.equal(_positions(_steps(ordered), 3001), ordered)
    with pytest.raises(ValueError, match="not in the tensor"):
        _positions(_steps(ordered), max(positions))


def test_the_layout_follows_what_changed() -> None:
    old = torch.zeros(50, 60)
    column, few, half = old.clone(), old.clone(), old.clone()
    column[:, 7] = torch.rand(50) + 0.1
    few[3, 4] = few[40, 50] = 1.0
    half.view(-1)[::2] = 1.0
    found = [difference(raw(old), raw(new), info_of(old)) for new in (column, few, half)]
    assert [delta.layout for delta in found] == ["vectors", "places", "mask"]
    assert found[0].axis == "columns" and found[0].columns_changed == 1
    whole = difference(raw(old), bytearray(b"\1" * 12000), info_of(old))
    assert whole.layout == "vectors" and sum(map(len, whole.parts)) == 12000 + 50


@settings(max_examples=12, deadline=None)
@given(st.lists(pairs(), min_size=1, max_size=4), st.booleans())
def test_apply_and_revert_are_exact_for_every_file(drawn: list[tuple[Tensor, Tensor]], sharded: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = save(root / "base", {f"t{i}": old for i, (old, _) in enumerate(drawn)}, sharded=sharded)
        scrubbed = save(root / "scrubbed", {f"t{i}": new for i, (_, new) in enumerate(drawn)}, sharded=sharded)
        before, after = digest_files(base), digest_files(scrubbed)
        summary = write_patch(base, scrubbed, root / "patch.safetensors")
        write_patch(base, scrubbed, root / "again.safetensors", base_files=before, scrubbed_files=after)
        assert (root / "patch.safetensors").read_bytes() == (root / "again.safetensors").read_bytes()
        assert summary.size == (root / "patch.safetensors").stat().st_size
        assert write_patch(base, scrubbed, None).size == summary.size
        patch = open_patch(root / "patch.safetensors")
        applied = apply_patch(base, patch, root / "applied")
        reverted = revert_patch(scrubbed, patch, root / "reverted")
        assert digest_files(root / "applied") == after == digest_files(scrubbed)
        assert digest_files(root / "reverted") == before == digest_files(base)
        assert applied.sha256 == patch.manifest.scrubbed_sha256 == tree_digest(after)
        assert reverted.sha256 == patch.manifest.base_sha256 == tree_digest(before)
        differing = {f"t{i}" for i, (old, new) in enumerate(drawn) if raw(old) != raw(new)}
        assert {tensor.name for tensor in patch.manifest.tensors} == differing


WEIGHTS = {"a": torch.arange(24.0).view(4, 6), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.ones(3, 3)}


def edited() -> dict[str, Tensor]:
    new = {name: value.clone() for name, value in WEIGHTS.items()}
    new["a"][:, 2] += 0.5
    return new


@pytest.fixture
def both(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    return save(tmp_path / "base", WEIGHTS, sharded=True), save(tmp_path / "scrubbed", edited(), sharded=True)


def test_any_reader_of_safetensors_can_look_into_a_patch(both: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    write_patch(*both, tmp_path / "p.safetensors", orientations={"a": "columns"}, policy_sha256="0" * 64)
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
        parts = {key: file.get_tensor(key) for key in keys}
    assert all(part.dtype is torch.uint8 for part in parts.values())
    manifest = json.loads(metadata["manifest"])
    (tensor,) = manifest["tensors"]
    assert (tensor["name"], tensor["shard"], tensor["dtype"], tensor["shape"]) == ("a", SHARDS[0], "F32", [4, 6])
    assert (tensor["orientation"], tensor["columns_changed"], tensor["elements_changed"]) == ("columns", 1, 4)
    assert manifest["policy_sha256"] == "0" * 64
    assert set(manifest["shards"]) == {SHARDS[0]}
    assert open_patch(tmp_path / "p.safetensors").manifest.tensors[0].vectors_changed == 1


def test_only_shards_that_differ_are_read_where_digests_are_known(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [digest_files(ckpt) for ckpt in both]
    read: set[str] = set()
    real = patch_files.read_range

    def watched(path: Path, begin: int, end: int) -> bytearray:
        read.add(path.name)
        return real(path, begin, end)

    monkeypatch.setattr(patch_files, "read_range", watched)
    write_patch(*both, tmp_path / "p.safetensors", base_files=files[0], scrubbed_files=files[1])
    assert read == {SHARDS[0]}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: save(root, {**edited(), "d": torch.ones(1)}, sharded=True), "'d' is only in"),
        (lambda root: save(root, {**edited(), "c": torch.ones(9)}, sharded=True), "'c' differs in dtype or shape"),
        (lambda root: save(root, {**edited(), "c": torch.ones(3, 3).half()}, sharded=True), "'c' differs in dtype"),
        (lambda root: save(root, edited(), sharded=True, metadata="tf"), "has other metadata"),
        (lambda root: (root / "config.json").write_text('{"model_type": "gpt2"}'), "config.json differs"),
        (lambda root: (root / "tokenizer.json").unlink(), "tokenizer.json is only in"),
        (lambda root: (root / "extra.json").write_text("{}"), "extra.json is only in"),
    ],
)
def test_a_difference_that_a_patch_cannot_carry_is_refused(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path, spoil: object, message: str
) -> None:
    spoil(tmp_path / "scrubbed")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message) as caught:
        write_patch(both[0], open_checkpoint(tmp_path / "scrubbed"), tmp_path / "p.safetensors")
    assert caught.value.exit_code is ExitCode.USAGE
    assert not list(tmp_path.glob("p.safetensors*"))


def test_another_layout_of_the_same_tensors_is_refused(tmp_path: Path) -> None:
    base, scrubbed = save(tmp_path / "base", WEIGHTS, sharded=True), save(tmp_path / "scrubbed", edited())
    with pytest.raises(CheckpointError, match="not at the same place"):
        write_patch(base, scrubbed, None)


def test_what_a_fix_adds_is_left_out_and_what_it_drops_is_named(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    root, scrubbed = tmp_path / "base", tmp_path / "scrubbed"
    (root / "pytorch_model.bin").write_text("old weights")
    (root / ".gitattributes").write_text("*.bin lfs")
    for name in ("memscrub-report.json", "model.sig", "memscrub-report.dsse.json", "MODEL_CARD.md"):
        (scrubbed / name).write_text("{}")
    (scrubbed / "README.md").write_text("# scrubbed\n")
    base, after = open_checkpoint(root), open_checkpoint(scrubbed)
    summary = write_patch(base, after, tmp_path / "p.safetensors")
    assert summary.manifest.left_out == (".gitattributes", "README.md", "pytorch_model.bin")
    assert set(summary.added) == {
        "memscrub-report.json", "model.sig", "memscrub-report.dsse.json", "MODEL_CARD.md", "README.md",
    }  # fmt: skip
    patch = open_patch(tmp_path / "p.safetensors")
    applied = apply_patch(base, patch, tmp_path / "applied")
    assert (tmp_path / "applied" / "README.md").read_text() == "# a model\n"
    assert applied.not_carried == (".gitattributes", "pytorch_model.bin") and applied.missing == ()
    reverted = revert_patch(after, patch, tmp_path / "reverted")
    assert reverted.missing == summary.manifest.left_out and reverted.sha256 != patch.manifest.base_sha256
    assert set(reverted.not_carried) == set(summary.added)
    left = {name: value for name, value in digest_files(base).items() if name not in reverted.missing}
    assert digest_files(tmp_path / "reverted") == left
    # What apply wrote has no README of its own to lose: there the revert is complete but for what was never copied.
    assert revert_patch(open_checkpoint(tmp_path / "applied"), patch, tmp_path / "r2").directory.is_dir()


def test_a_file_that_fix_never_copies_does_not_make_another_base(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    write_patch(*both, tmp_path / "p.safetensors")
    (tmp_path / "base" / ".gitattributes").write_text("new")
    assert mismatch(open_checkpoint(tmp_path / "base"), open_patch(tmp_path / "p.safetensors"), "before") is None
    (tmp_path / "base" / "chat_template.jinja").write_text("new")
    found = mismatch(open_checkpoint(tmp_path / "base"), open_patch(tmp_path / "p.safetensors"), "before")
    assert found == "chat_template.jinja was not there"


def test_another_base_is_refused_with_the_way_out_and_nothing_is_written(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path
) -> None:
    write_patch(*both, tmp_path / "p.safetensors")
    patch = open_patch(tmp_path / "p.safetensors")
    other = save(tmp_path / "other", {**WEIGHTS, "c": torch.zeros(3, 3)}, sharded=True)
    with pytest.raises(UsageError, match=f"{SHARDS[0]} has another digest; give --policy"):
        apply_patch(other, patch, tmp_path / "out")
    with pytest.raises(UsageError, match="does not lead to"):
        revert_patch(both[0], patch, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_output_in_the_way_is_replaced_only_when_asked(both: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    place = tmp_path / "p.safetensors"
    write_patch(*both, place)
    with pytest.raises(OutputError, match="exists already"):
        write_patch(*both, place)
    write_patch(*both, place, overwrite=True)
    patch, before = open_patch(place), digest_files(both[0])
    apply_patch(both[0], patch, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        apply_patch(both[0], patch, tmp_path / "out")
    apply_patch(both[0], patch, tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="overlaps"):
        apply_patch(both[0], patch, tmp_path / "base", overwrite=True)
    with pytest.raises(OutputError, match="overlaps"):  # the patch itself would be deleted
        apply_patch(both[0], patch, tmp_path, overwrite=True)
    assert digest_files(both[0]) == before


@pytest.mark.parametrize("inside", ["base", "scrubbed"])
def test_a_patch_may_not_lie_in_either_directory(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path, inside: str
) -> None:
    with pytest.raises(OutputError, match="gives the unedited weights back"):
        write_patch(*both, tmp_path / inside / "p.safetensors")
    with pytest.raises(OutputError, match="a folder that exists"):
        write_patch(*both, tmp_path / "nowhere" / "p.safetensors")


def test_a_full_disk_leaves_no_half_patch_and_no_half_directory(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_patch(*both, tmp_path / "p.safetensors")
    names = sorted(os.listdir(tmp_path))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IncompleteError, match="No space is left"):
        write_patch(*both, tmp_path / "q.safetensors")
    with pytest.raises(IncompleteError, match="No space is left"):
        apply_patch(both[0], open_patch(tmp_path / "p.safetensors"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == names


def test_a_patch_is_its_owners_alone_and_spares_a_file_beside_it(
    both: tuple[Checkpoint, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.partial").write_text("somebody else's")
    write_patch(*both, tmp_path / "p")
    names = sorted(os.listdir(tmp_path))
    assert (tmp_path / "p.partial").read_text() == "somebody else's"
    assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o600

    def refused(source: str, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OutputError, match="cannot be written"):
        write_patch(*both, tmp_path / "q")
    assert sorted(os.listdir(tmp_path)) == names


def test_a_snapshot_of_links_is_a_base_too(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--me--mine"
    snapshot = repository / "snapshots" / "0123"
    plain = save(tmp_path / "plain", WEIGHTS)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in plain.files:
        shutil.move(tmp_path / "plain" / name, repository / "blobs" / name)
        (snapshot / name).symlink_to(repository / "blobs" / name)
    write_patch(open_checkpoint(snapshot), save(tmp_path / "scrubbed", edited()), tmp_path / "p.safetensors")
    before = digest_files(snapshot)
    apply_patch(open_checkpoint(snapshot), open_patch(tmp_path / "p.safetensors"), tmp_path / "out")
    assert digest_files(tmp_path / "out") == digest_files(tmp_path / "scrubbed")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert digest_files(snapshot) == before


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    base = open_checkpoint(tiny_checkpoint(tmp_path / "base", "gpt2", 1))
    assert "lm_head.weight" not in base.tensors
    name = "transformer.wte.weight"
    write_checkpoint(base, tmp_path / "scrubbed", {name: read_tensor(base, name) * 1.01})
    write_patch(base, open_checkpoint(tmp_path / "scrubbed"), tmp_path / "p.safetensors")
    apply_patch(base, open_patch(tmp_path / "p.safetensors"), tmp_path / "out")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").tensors
    assert digest_files(tmp_path / "out") == digest_files(tmp_path / "scrubbed")


def test_the_commands_say_what_they_did(both: tuple[Checkpoint, Checkpoint], tmp_path: Path) -> None:
    base, scrubbed, patch = tmp_path / "base", tmp_path / "scrubbed", tmp_path / "p.safetensors"
    assert "a patch would have" in run("diff", base, scrubbed)
    assert not patch.exists()
    shown = run("diff", base, scrubbed, "--out", patch)
    assert "a  [4, 6] F32  1 output vectors, 4 elements" in shown and f"wrote {patch}" in shown
    stated = json.loads(run("diff", base, scrubbed, "--json"))
    assert stated["patch"] is None and stated["bytes"] == patch.stat().st_size
    assert stated["scrubbed_sha256"] in run("apply", base, patch, "--out", tmp_path / "applied")
    back = json.loads(run("revert", scrubbed, patch, "--out", tmp_path / "reverted", "--json"))
    assert back["sha256"] == stated["base_sha256"] and back["missing"] == []
    assert run("revert", tmp_path / "applied", patch, "--out", tmp_path / "r2", "--quiet") == ""
    with pytest.raises(UsageError, match="need --policy"):
        run("apply", base, patch, "--out", tmp_path / "x", "--sign", "key.pem")


POLICY = """\
schema = 1
name = "patched"
[protected]
files = ["protected.jsonl"]
[class.c]
max_verbatim_tokens = 14
[locality]
retain = ["retain.txt"]
max_kl = 0.1
max_perplexity_ratio = 50
min_agreement = 0.01
max_degenerate = 1
[fix]
rounds = 4
sites = "mlp"
layers = [1]
"""


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model that knows two texts, its fix in layer 1, and the patch between the two."""
    folder = tmp_path_factory.mktemp("fixed")
    texts = [random_text(seed, 24) for seed in range(2)]
    tiny_checkpoint(folder / "checkpoint", "llama", seed=3, texts=texts, steps=80)
    write_list(folder / "protected.jsonl", texts)
    (folder / "retain.txt").write_text("\n\n".join(in_words(ordinary_rows(7, 24, 90))) + "\n")
    (folder / "policy.toml").write_text(POLICY)
    done = fix(folder / "checkpoint", folder / "policy.toml", folder / "scrubbed", device="cpu")
    assert done.directory is not None, done.report.verdict.reasons
    run("diff", folder / "checkpoint", folder / "scrubbed", "--out", folder / "p.safetensors")
    yield folder


def test_a_real_fix_is_reverted_to_the_byte_and_named_by_its_policy(fixed: Path, tmp_path: Path) -> None:
    patch, report = open_patch(fixed / "p.safetensors"), load_report(fixed / "scrubbed" / "memscrub-report.json")
    assert report.output is not None
    assert patch.manifest.base_sha256 == report.input.sha256
    assert patch.manifest.scrubbed_sha256 == report.output.sha256
    assert patch.manifest.policy_sha256 == report.policy.sha256
    assert {t.name for t in patch.manifest.tensors} == {"model.layers.1.mlp.down_proj.weight"}
    run("revert", fixed / "scrubbed", fixed / "p.safetensors", "--out", tmp_path / "back")
    assert digest_files(tmp_path / "back") == digest_files(fixed / "checkpoint")


def test_a_descendant_is_solved_anew_where_the_patch_edited(fixed: Path, tmp_path: Path) -> None:
    shutil.copytree(fixed / "checkpoint", tmp_path / "base")
    ckpt = open_checkpoint(tmp_path / "base")
    name = "model.layers.0.mlp.down_proj.weight"
    write_checkpoint(ckpt, tmp_path / "child", {name: read_tensor(ckpt, name) * 1.001})
    wide = POLICY.replace('sites = "mlp"\nlayers = [1]\n', "")
    (fixed / "wide.toml").write_text(wide)
    arguments = ["--out", tmp_path / "out", "--policy", fixed / "wide.toml", "--device", "cpu", "--json"]
    done = CliRunner().invoke(
        app, ["apply", str(tmp_path / "child"), str(fixed / "p.safetensors"), *map(str, arguments)]
    )
    assert done.exit_code == 0, done.output
    assert "solving anew where the patch edited (sites mlp, layers 1)" in done.stderr
    report = load_report(tmp_path / "out" / "memscrub-report.json")
    assert json.loads(done.stdout)["output"]["sha256"] == report.output.sha256  # type: ignore[union-attr]
    assert report.verdict.exit_code == 0 and report.edit is not None
    assert {tensor.name for tensor in report.edit.tensors} == {"model.layers.1.mlp.down_proj.weight"}


def test_with_a_policy_the_same_base_is_still_patched_exactly(fixed: Path, tmp_path: Path) -> None:
    run("apply", fixed / "checkpoint", fixed / "p.safetensors", "-o", tmp_path / "out", "-p", fixed / "policy.toml")
    ours = {**digest_files(fixed / "scrubbed")}
    del ours["memscrub-report.json"]
    assert digest_files(tmp_path / "out") == ours


@pytest.mark.parametrize("option", ["--sign", "--report"])
@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_nothing_is_signed_or_reported_where_nothing_is_measured(
    fixed: Path, tmp_path: Path, option: str, quiet: list[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["apply", fixed / "checkpoint", fixed / "p.safetensors", "-o", out, "-p", fixed / "policy.toml"]
    with pytest.raises(UsageError, match="the patch's own base, where nothing is measured") as caught:
        run(*arguments, option, tmp_path / "file", *quiet)
    assert caught.value.exit_code is ExitCode.USAGE
    assert not list(tmp_path.iterdir())


def test_a_policy_that_is_not_there_is_refused_on_the_patchs_own_base_too(fixed: Path, tmp_path: Path) -> None:
    arguments = ["apply", fixed / "checkpoint", fixed / "p.safetensors", "-o", tmp_path / "out"]
    with pytest.raises(MemscrubError, match=r"nowhere\.toml") as caught:
        run(*arguments, "-p", tmp_path / "nowhere.toml", "--quiet")
    assert caught.value.exit_code is ExitCode.USAGE
    assert not list(tmp_path.iterdir())


def test_a_policy_is_narrowed_to_the_sites_of_the_patch_and_never_widened() -> None:
    policy, config = parse_policy(POLICY.replace('sites = "mlp"\nlayers = [1]\n', "").encode()), {"model_type": "llama"}
    mlp, attention = "model.layers.3.mlp.down_proj.weight", "model.layers.5.self_attn.o_proj.weight"
    found = narrowed(policy, [mlp, attention], config)
    assert found is not None and (found.fix.layers, found.fix.sites) == ((3, 5), "mlp+attention")
    assert found.digest == policy.digest and found.classes == policy.classes
    assert narrowed(policy, [mlp, "lm_head.weight"], config) is None
    assert narrowed(policy, [], config) is None
    strict = parse_policy(POLICY.replace("[1]", "[3]").encode())
    found = narrowed(strict, [mlp, attention], config)
    assert found is not None and (found.fix.layers, found.fix.sites) == ((3,), "mlp")
    assert narrowed(strict, [attention], config) is None
    gpt2 = narrowed(policy, ["h.0.mlp.c_proj.weight"], {"model_type": "gpt2"})
    assert gpt2 is not None and (gpt2.fix.layers, gpt2.fix.sites) == ((0,), "mlp")
