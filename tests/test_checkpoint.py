"""Opening checkpoints: what is found, what is refused, and that malformed bytes raise one kind of error."""

from __future__ import annotations

import json
import os
import shlex
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_checkpoint
from safetensors.torch import load_file, save_file

from memscrub.errors import CheckpointError
from memscrub.storage.checkpoint import (
    INDEX,
    SINGLE,
    TensorInfo,
    digest_files,
    open_checkpoint,
    read_tensor,
    tree_digest,
)
from memscrub.storage.files import is_safe_name, sha256_file, strict_json
from memscrub.storage.safetensors_header import parse_header, read_header

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "half": torch.randn(4, 6, generator=generator).to(torch.float16),
        "brain": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "single": torch.randn(2, 3, 4, generator=generator),
        "ids": torch.arange(7),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }


def single(root: Path, config: Mapping[str, Any] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({"model_type": "llama"} | dict(config or {})))
    save_file(values(), root / SINGLE, metadata={"format": "pt"})
    return root


def sharded(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text('{"model_type": "llama"}')
    every = values()
    save_file({name: every[name] for name in ("half", "ids", "empty")}, root / A)
    save_file({name: every[name] for name in ("brain", "single", "scalar")}, root / B)
    index = {name: A if name in ("half", "ids", "empty") else B for name in every}
    write_index(root, index)
    return root


def write_index(root: Path, weight_map: Any) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_shard(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize("build", [single, sharded])
def test_every_tensor_reads_back_as_it_was_saved(tmp_path: Path, build: Any) -> None:
    ckpt = open_checkpoint(build(tmp_path / "m"))
    assert set(ckpt.tensors) == set(ckpt.weight_map) == set(values())
    for name, value in values().items():
        stored = read_tensor(ckpt, name)
        assert stored.dtype == value.dtype and torch.equal(stored, value)


@pytest.mark.parametrize("build", [single, sharded])
def test_tensor_info_names_the_exact_bytes(tmp_path: Path, build: Any) -> None:
    ckpt = open_checkpoint(build(tmp_path / "m"))
    for name, info in ckpt.tensors.items():
        raw = (ckpt.path / info.shard).read_bytes()[info.begin : info.end]
        assert raw == bytes(values()[name].reshape(-1).view(torch.uint8).numpy())
        assert info.shape == tuple(values()[name].shape)


def test_files_are_sorted_and_leave_version_control_out(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    for name in (".git/objects/x", ".cache/huggingface/y", "sub/tokenizer.json", ".gitattributes"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    files = open_checkpoint(root).files
    assert files == (".gitattributes", "config.json", SINGLE, "sub/tokenizer.json")


def test_opening_changes_nothing(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    before = {p: (p.stat().st_mtime_ns, sha256_file(p)) for p in root.iterdir()}
    tensor = read_tensor(open_checkpoint(root), "half")
    tensor.zero_()
    assert {p: (p.stat().st_mtime_ns, sha256_file(p)) for p in root.iterdir()} == before


def cache_snapshot(tmp_path: Path, shared: bool) -> Path:
    """The layout of the Hugging Face cache: links in snapshots/, content in blobs/ or in the shared store."""
    real = sharded(tmp_path / "real")
    cache = tmp_path / "hub"
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    if shared:
        (cache / "blobs" / "aa").mkdir(parents=True)
        (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    for number, file in enumerate(sorted(real.iterdir())):
        blob = repository / "blobs" / f"b{number}"
        if shared and file.suffix == ".safetensors":
            store = cache / "blobs" / "aa" / f"s{number}"
            file.rename(store)
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_cache_snapshot_opens_through_its_links(tmp_path: Path, shared: bool) -> None:
    ckpt = open_checkpoint(cache_snapshot(tmp_path, shared))
    assert torch.equal(read_tensor(ckpt, "half"), values()["half"])
    assert set(digest_files(ckpt)) == {"config.json", A, B, INDEX}


def test_an_unmarked_directory_named_blobs_beside_the_repositories_is_not_trusted(tmp_path: Path) -> None:
    snapshot = cache_snapshot(tmp_path, shared=True)
    (tmp_path / "hub" / "blobs" / ".huggingface-shared-blobs").unlink()
    with pytest.raises(CheckpointError, match="leads out"):
        open_checkpoint(snapshot)


def test_digest_does_not_depend_on_workers_or_order(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    one, four = digest_files(root, workers=1), digest_files(open_checkpoint(root), workers=4)
    assert one == four and one[A] == sha256_file(root / A)
    assert tree_digest(one) == tree_digest(dict(reversed(one.items())))
    assert tree_digest(one) != tree_digest(one | {A: "0" * 64})


def test_a_local_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("owner/name").path == (tmp_path / "owner" / "name").resolve()


@pytest.mark.parametrize("source", ["", "missing", "/nowhere/at/all", "a b/c", "x\0y", "owner/name/more"])
def test_a_path_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError):
        open_checkpoint(source)


def refuse(root: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_checkpoint(root)
    assert str(caught.value).count(". ") <= 1


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    refuse(single(tmp_path / "m") / SINGLE, "not a directory")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "config.json cannot be used"),
        ("[1]", "not a JSON object"),
        ('{"a":1,"a":2}', "twice"),
        ("é", "JSON"),
    ],
)
def test_a_broken_config_is_refused(tmp_path: Path, text: str, match: str) -> None:
    root = single(tmp_path / "m")
    (root / "config.json").write_text(text)
    refuse(root, match)


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    (root / A).unlink()
    refuse(root, f"{A}, which is missing")
    (root / INDEX).unlink()
    refuse(root, "neither model.safetensors nor")
    (root / "config.json").unlink()
    refuse(root, "has no config.json")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("pytorch_model.bin", "pickled.*save_pretrained"),
        ("consolidated.00.pth", "pickled"),
        ("m.gguf", "GGUF"),
        ("tf_model.h5", "TensorFlow or Flax.*transformers 4"),
        ("flax_model.msgpack", "TensorFlow or Flax.*from_flax"),
    ],
)
def test_weights_in_other_formats_are_refused_with_advice(tmp_path: Path, name: str, match: str) -> None:
    root = single(tmp_path / "m")
    (root / SINGLE).rename(root / name)
    refuse(root, match)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "sharded"])
def test_the_line_that_converts_pickled_weights_works_as_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = tiny_checkpoint(tmp_path / "it's old", "llama", seed=0, dtype=torch.bfloat16)
    weights = load_file(source / SINGLE)
    (source / SINGLE).unlink()
    if name == "sharded":
        halves = {"a-1.bin": sorted(weights)[::2], "a-2.bin": sorted(weights)[1::2]}
        for file, names in halves.items():
            torch.save({each: weights[each] for each in names}, source / file)
        index = {"metadata": {}, "weight_map": {each: file for file, names in halves.items() for each in names}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, source / name)
    with pytest.raises(CheckpointError, match="never loads") as caught:
        open_checkpoint(source)
    command, option, code, *arguments = shlex.split(str(caught.value).partition("use NEW: ")[2])
    assert (command, option, arguments) == ("python", "-c", [str(source), "NEW"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [option, *arguments])
    exec(code, {})
    converted = open_checkpoint(tmp_path / "NEW")
    assert set(converted.tensors) == set(weights) and "tokenizer.json" in converted.files
    assert all(torch.equal(read_tensor(converted, each), weights[each]) for each in weights)


def test_an_adapter_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    refuse(tmp_path, "is an adapter and not a whole checkpoint; scan it with `memscrub scan org/base --adapter")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x; rm -rf /"}')
    refuse(tmp_path, "memscrub scan BASE --adapter")


def test_an_adapter_beside_the_weights_is_ambiguous(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    (root / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else"}')
    refuse(root, r"holds both config\.json and adapter_config\.json")


@pytest.mark.parametrize(("method", "shown"), [("gptq", "GPTQ"), ("awq", "AWQ"), ("bitsandbytes", "bitsandbytes")])
def test_quantized_weights_are_refused_with_advice(tmp_path: Path, method: str, shown: str) -> None:
    root = single(tmp_path / "m", {"quantization_config": {"quant_method": method}})
    refuse(root, rf"quantized \({shown}\), which memscrub does not read; fix the original")


def test_quantized_weights_that_can_be_written_in_full_are_refused_with_the_command(tmp_path: Path) -> None:
    root = single(tmp_path / "m", {"quantization_config": {"quant_method": "fp8"}})
    refuse(root, f"`memscrub dequantize {root} --out NEW`")
    assert open_checkpoint(root, quantized=True).tensors


def test_remote_code_is_ignored_and_not_refused(tmp_path: Path) -> None:
    root = single(tmp_path / "m", {"auto_map": {"AutoModel": "evil.Model"}})
    (root / "evil.py").write_text("raise SystemExit('ran')")
    assert open_checkpoint(root).config["auto_map"]


def test_two_sets_of_weights_are_ambiguous(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    single(root)
    refuse(root, "holds both")


def test_an_index_that_disagrees_with_the_shards_is_refused(tmp_path: Path) -> None:
    root = sharded(tmp_path / "m")
    index = {n: A if n in ("half", "ids", "empty") else B for n in values()}
    write_index(root, index | {"half": B})
    refuse(root, "but it is in")
    write_index(root, index | {"ghost": B})
    refuse(root, "does not hold")
    write_index(root, {n: f for n, f in index.items() if n != "half"})
    refuse(root, "does not name")
    save_file({"half": values()["half"], **{n: values()[n] for n in ("brain", "single", "scalar")}}, root / B)
    write_index(root, index)
    refuse(root, "in both")


@pytest.mark.parametrize("weight_map", [None, [], {"half": 3}, "x"])
def test_an_index_without_a_map_of_names_is_refused(tmp_path: Path, weight_map: Any) -> None:
    root = sharded(tmp_path / "m")
    write_index(root, weight_map)
    refuse(root, "no weight_map")


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"x":' * 50_000,
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[0],"data_offsets":[4,4]}}',
        b'{"a":NaN}',
        b'{"a":' + b"9" * 5000 + b"}",
        *(
            json.dumps(header).encode()
            for header in (
                {"a": 1},
                {"a": entry(dtype="F33")},
                {"a": entry(dtype=["F32"])},
                {"a": entry(shape=[-1])},
                {"a": entry(shape=[True])},
                {"a": entry(shape=[1.0])},
                {"a": entry(shape=[2])},
                {"a": entry(shape=[2**62] * 10)},
                {"a": entry(shape=[2**62] * 100_000)},
                {"a": entry(shape="1")},
                {"a": entry(offsets=[0])},
                {"a": entry(offsets=[4, 0])},
                {"a": entry(offsets=[4, 8])},
                {"a": entry(offsets=[0, 2**70])},
                {"a": entry(offsets=[-4, 0])},
                {"a": entry(extra=1)},
                {"a": entry(), "b": entry()},
                {"a": entry(), "b": entry(offsets=[4, 8])},
                {"a" * 2000: entry()},
                {"__metadata__": {"a": 1}, "a": entry()},
                {"__metadata__": [], "a": entry()},
            )
        ),
    ],
)
def test_a_lying_header_is_refused(tmp_path: Path, header: bytes) -> None:
    root = single(tmp_path / "m")
    (root / SINGLE).write_bytes(raw_shard(header, b"\0" * 4))
    refuse(root, SINGLE)


@pytest.mark.parametrize("length", [3, 8, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_or_the_limit_is_refused(tmp_path: Path, length: int) -> None:
    root = single(tmp_path / "m")
    (root / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}")
    refuse(root, SINGLE)


def test_a_shard_with_bytes_beyond_its_tensors_or_without_some_is_refused(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    whole = (root / SINGLE).read_bytes()
    for data in (whole + b"\0", whole[:-1], whole[:20], whole[:7], b""):
        (root / SINGLE).write_bytes(data)
        refuse(root, SINGLE)


@settings(max_examples=150, deadline=None)
@given(raw=st.binary(max_size=200), size=st.integers(0, 2**64))
def test_random_bytes_are_refused_as_a_header_and_nothing_else(raw: bytes, size: int) -> None:
    try:
        tensors = parse_header(raw, "x", file_size=size)
    except CheckpointError:
        return
    assert all(isinstance(info, TensorInfo) for info in tensors.values())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "F4"]) | _JSON, "shape": _JSON, "data_offsets": _JSON}
)


@settings(max_examples=150, deadline=None)
@given(header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), _ENTRY | _JSON, max_size=4))
def test_random_json_is_refused_as_a_header_and_nothing_else(header: dict[str, Any]) -> None:
    try:
        parse_header(json.dumps(header).encode(), "x", file_size=1000)
    except CheckpointError as error:
        assert "x is malformed" in str(error)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_shard_is_refused_or_means_the_same_to_the_library(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.getbasetemp() / "mutated"
    root.mkdir(exist_ok=True)
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, root / "good", {"k": "v"})
    good = bytearray((root / "good").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    (root / "bad").write_bytes(good)
    try:
        tensors = read_header(root / "bad", "bad")
    except CheckpointError:
        return
    theirs = load_file(root / "bad")
    assert {n: (i.shape, i.end - i.begin) for n, i in tensors.items()} == {
        n: (tuple(t.shape), t.numel() * t.element_size()) for n, t in theirs.items()
    }


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "..a", ".hidden"])
def test_plain_relative_names_are_safe(name: str) -> None:
    assert is_safe_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../b", "/a", "a//b", "./a", "a/", "a\\b", "C:a", "a\0"])
def test_names_that_can_lead_elsewhere_are_not_safe(name: str) -> None:
    assert not is_safe_name(name)


@pytest.mark.parametrize(
    "text", [b'{"a":1,"a":1}', b'{"b":{"a":1,"a":1}}', b"NaN", b"-Infinity", b"[1e999]", b"-1e999", b"\xff", b"", b"["]
)
def test_json_that_two_readers_could_take_differently_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"it is|twice|not a JSON|too large"):
        strict_json(text)


def test_special_files_are_refused_without_being_opened(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    os.mkfifo(root / "pipe")
    refuse(root, "pipe is neither a regular file")


def test_a_file_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    root = single(tmp_path / "m")
    (root / os.fsdecode(b"bad\xff")).write_text("x")
    refuse(root, "not UTF-8")
