"""Checkpoints that are broken or lie, and places that cannot be written: one sentence, the right exit code, and
nothing lost and nothing half-written, through the command line as it is typed."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import run
from models import random_text, tiny_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from memscrub.storage.checkpoint import CONFIG, INDEX, SINGLE

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"
POLICY = """
schema = 1
name = "attack"
[protected]
files = ["protected.txt"]
[class.text]
max_verbatim_tokens = 12
[locality]
retain = ["retain.txt"]
"""
Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two shards, and beside it a policy that it keeps."""
    root = tmp_path_factory.mktemp("good")
    single = tiny_checkpoint(root / "single", "llama", seed=4)
    shutil.copytree(single, root / "ckpt")
    tensors = load_file(single / SINGLE)
    (root / "ckpt" / SINGLE).unlink()
    place = {name: (A, B)[number % 2] for number, name in enumerate(sorted(tensors))}
    for shard in (A, B):
        save_file({n: t for n, t in tensors.items() if place[n] == shard}, root / "ckpt" / shard, {"format": "pt"})
    (root / "ckpt" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (root / "policy.toml").write_text(POLICY)
    (root / "protected.txt").write_text(random_text(1, 40) + "\n")
    (root / "retain.txt").write_text("\n\n".join(random_text(seed, 80) for seed in range(2, 32)) + "\n")
    return root


def state(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a folder that a program could have changed: names, links, bytes, times.

    Without the journal of a `fix`, which is there for the next try to go on from.
    """
    found = {}
    for path in sorted(path for path in root.rglob("*") if path.name != "out.journal"):
        if path.is_symlink():
            found[str(path)] = ("link", os.readlink(path))
        elif path.is_file():
            found[str(path)] = ("file", path.read_bytes(), path.stat().st_mtime_ns)
        else:
            found[str(path)] = ("other", path.stat().st_mode)
    return found


# --- ways to damage a checkpoint ---


def header_of(path: Path) -> tuple[dict[str, object], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: object, body: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def truncate(root: Path) -> None:
    path = root / B
    path.write_bytes(path.read_bytes()[:-10])


def cut_in_the_header(root: Path) -> None:
    (root / A).write_bytes((root / A).read_bytes()[:100])


def lying(change: Mapping[str, object]) -> Damage:
    """The header says something about one tensor that its bytes are not."""

    def damage(root: Path) -> None:
        shard = json.loads((root / INDEX).read_text())["weight_map"][DOWN]
        header, body = header_of(root / shard)
        header[DOWN] = {**header[DOWN], **change}  # type: ignore[dict-item]
        write_header(root / shard, header, body)

    return damage


def duplicate_key(root: Path) -> None:
    header, body = header_of(root / A)
    name = next(name for name in header if name != "__metadata__")
    raw = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    write_header(root / A, raw.encode(), body)


def duplicate_tensor(root: Path) -> None:
    one, other = load_file(root / A), load_file(root / B)
    name = next(iter(one))
    save_file({**other, name: one[name]}, root / B)


def huge_header(root: Path) -> None:
    (root / A).write_bytes(struct.pack("<Q", 2**63) + (root / A).read_bytes()[8:])


def index(change: Callable[[dict[str, str]], object]) -> Damage:
    def damage(root: Path) -> None:
        whole = json.loads((root / INDEX).read_text())
        change(whole["weight_map"])
        (root / INDEX).write_text(json.dumps(whole))

    return damage


def outside(name: str) -> Damage:
    """The index leads to a shard that is there, but not in the checkpoint."""

    def damage(root: Path) -> None:
        (root / A).rename(root.parent / "stolen.safetensors")
        where = str(root.parent / "stolen.safetensors") if name == "absolute" else "../stolen.safetensors"
        index(lambda m: m.update({k: where for k, v in m.items() if v == A}))(root)

    return damage


def linked(target: str) -> Damage:
    def damage(root: Path) -> None:
        (root / A).unlink()
        (root / A).symlink_to(target)

    return damage


def linked_out(root: Path) -> None:
    (root / A).rename(root.parent / "elsewhere.safetensors")
    (root / A).symlink_to("../elsewhere.safetensors")


def values(name: str, value: float) -> Damage:
    def damage(root: Path) -> None:
        shard = json.loads((root / INDEX).read_text())["weight_map"][name]
        tensors: dict[str, Tensor] = load_file(root / shard)
        tensors[name].view(-1)[3] = value
        save_file(tensors, root / shard, {"format": "pt"})

    return damage


def empty(name: str) -> Damage:
    return lambda root: (root / name).write_bytes(b"") and None


def a_directory(name: str) -> Damage:
    def damage(root: Path) -> None:
        (root / name).unlink()
        (root / name).mkdir()

    return damage


def config(**change: object) -> Damage:
    def damage(root: Path) -> None:
        value = json.loads((root / CONFIG).read_text()) | change
        (root / CONFIG).write_text(json.dumps(value))

    return damage


def other_tokenizer(root: Path) -> None:
    """A tokenizer of a larger vocabulary, whose words are ids that the model has no vectors for."""
    value = json.loads((root / "tokenizer.json").read_text())
    words = value["model"]["vocab"]
    value["model"]["vocab"] = {word: number + (500 if word.startswith("w") else 0) for word, number in words.items()}
    (root / "tokenizer.json").write_text(json.dumps(value))


def no_tokenizer(root: Path) -> None:
    for path in root.glob("tokenizer*"):
        path.unlink()


def add_pipe(root: Path) -> None:
    os.mkfifo(root / "pipe")


def renamed_tensor(root: Path) -> None:
    for shard in (A, B):
        tensors = load_file(root / shard)
        if DOWN in tensors:
            tensors["model.layers.0.mlp.other.weight"] = tensors.pop(DOWN)
            save_file(tensors, root / shard)
            index(lambda m: m.update({"model.layers.0.mlp.other.weight": m.pop(DOWN)}))(root)
            return


USAGE, INCOMPLETE = 2, 3
DAMAGED: dict[str, tuple[Damage, int, str]] = {
    "a truncated shard": (truncate, USAGE, "header of model-00002-of-00002.safetensors is malformed: its tensors end"),
    "a shard cut in its header": (cut_in_the_header, USAGE, "bytes, but the file has 100"),
    "an empty shard": (empty(A), USAGE, "shorter than 8 bytes"),
    "a header of 2^63 bytes": (huge_header, USAGE, "more than the 16777216 that memscrub reads"),
    "a header with another dtype": (lying({"dtype": "F64"}), USAGE, "do not fit its dtype and shape"),
    "a header with a larger shape": (lying({"shape": [32, 4800]}), USAGE, "do not fit its dtype and shape"),
    "a header with offsets of another tensor": (lying({"data_offsets": [0, 6144]}), USAGE, "hole or overlaps"),
    "a header with another shape of that size": (
        lying({"shape": [48, 32]}),
        USAGE,
        f"'{DOWN}' has the shape [48, 32], which is not the shape config.json asks",
    ),
    "a tensor twice in a header": (duplicate_key, USAGE, "twice"),
    "a tensor in two shards": (duplicate_tensor, USAGE, "is in both"),
    "an index that names a missing file": (
        index(lambda m: m.update({DOWN: "model-00009-of-00002.safetensors"})),
        USAGE,
        "names model-00009-of-00002.safetensors, which is missing; download",
    ),
    "an index that leads up": (outside("../"), USAGE, "'../stolen.safetensors', which is no safetensors file of this"),
    "an index with an absolute path": (outside("absolute"), USAGE, "stolen.safetensors', which is no safetensors file"),
    "an index with a tensor that is nowhere": (index(lambda m: m.update(ghost=A)), USAGE, "does not hold"),
    "an index that leaves a tensor out": (index(lambda m: m.pop(DOWN)), USAGE, "does not name"),
    "an empty index": (empty(INDEX), USAGE, "index.json cannot be used: it is not JSON"),
    "an empty config": (empty(CONFIG), USAGE, "config.json cannot be used: it is not JSON"),
    "an empty tokenizer": (empty("tokenizer.json"), USAGE, "transformers cannot load this checkpoint"),
    "no tokenizer": (no_tokenizer, USAGE, "transformers cannot load this checkpoint"),
    "a link to itself": (linked(A), USAGE, "a link that leads nowhere or in a circle"),
    "links in a circle": (linked("circle/a"), USAGE, "a link that leads nowhere or in a circle"),
    "a dangling link": (linked("nowhere"), USAGE, "a link that leads nowhere or in a circle"),
    "a link out of the directory": (linked_out, USAGE, "a link that leads out of its directory"),
    "a folder in place of a shard": (a_directory(A), USAGE, f"names {A}, which is missing"),
    "a folder in place of the config": (a_directory(CONFIG), USAGE, "has no config.json"),
    "a pipe among the files": (add_pipe, USAGE, "neither a regular file"),
    "NaN in a matrix that is edited": (values(DOWN, float("nan")), INCOMPLETE, f"'{DOWN}' holds NaN"),
    "NaN in a norm that nothing edits": (values(NORM, float("nan")), INCOMPLETE, f"'{NORM}' holds NaN"),
    "infinity in the embedding": (values("model.embed_tokens.weight", float("inf")), INCOMPLETE, "or infinite values"),
    "more layers than are stored": (config(num_hidden_layers=3), USAGE, "is missing from the shards"),
    "another width than is stored": (config(hidden_size=64), USAGE, "shape config.json asks for"),
    "a vocabulary that is not stored": (config(vocab_size=80), USAGE, "shape config.json asks for"),
    "a tensor under another name": (renamed_tensor, USAGE, f"'{DOWN}' is missing from the shards"),
    "a tokenizer of a larger vocabulary": (
        other_tokenizer,
        USAGE,
        "but the model knows 64 tokens; check that the tokenizer",
    ),
    "an unknown family": (config(model_type="novel"), USAGE, "not in memscrub's architecture table"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_written(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, code, sentence = DAMAGED[case]
    root = tmp_path / "ckpt"
    shutil.copytree(good / "ckpt", root)
    if case == "links in a circle":
        (root.parent / "a").symlink_to("b")
        (root.parent / "b").symlink_to("a")
        linked("../a")(root)
    else:
        damage(root)
    before = state(tmp_path)
    for arguments in (("scan", "--report", tmp_path / "r.json"), ("fix", "--out", tmp_path / "out", "--overwrite")):
        command, *options = arguments
        assert run(monkeypatch, command, root, "--policy", good / "policy.toml", *options) == code
        shown = capsys.readouterr()
        message = shown.err[shown.err.index("memscrub:") :].strip()
        assert sentence in message, message
        assert "\n" not in message and "Traceback" not in shown.err and shown.out == ""
        assert state(tmp_path) == before


@pytest.mark.parametrize("name", [SINGLE, CONFIG])
def test_a_file_in_place_of_a_directory(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(monkeypatch, "scan", good / "single" / name, "--policy", good / "policy.toml") == USAGE
    assert "is not a directory; name the directory that holds config.json" in capsys.readouterr().err


def test_mining_with_another_models_tokenizer(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good / "ckpt", tmp_path / "ckpt")
    other_tokenizer(tmp_path / "ckpt")
    before = state(tmp_path)
    options = ("--corpus", good / "retain.txt", "--out", tmp_path / "mined.jsonl", "--run", "8", "--overlap", "16")
    assert run(monkeypatch, "mine", tmp_path / "ckpt", *options) == USAGE
    assert "but the model knows 64 tokens; check that the tokenizer" in capsys.readouterr().err
    assert state(tmp_path) == before


def test_the_checkpoint_undamaged_passes_so_that_each_refusal_above_is_the_damages(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(good)
    assert run(monkeypatch, "scan", good / "ckpt", "--policy", good / "policy.toml", "--quiet") == 0
    assert run(monkeypatch, "fix", good / "ckpt", "--policy", good / "policy.toml", "-o", tmp_path / "out", "-q") == 0
    assert (tmp_path / "out" / B).read_bytes() == (good / "ckpt" / B).read_bytes()
    assert state(good) == before


# --- places that cannot be written ---


def adapter(root: Path) -> Path:
    """A LoRA adapter of the checkpoint, as small as they come."""
    root.mkdir()
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
    (root / "adapter_config.json").write_text(json.dumps(settings))
    name = f"base_model.model.{DOWN.removesuffix('.weight')}"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, 48), f"{name}.lora_B.weight": torch.ones(32, 1)},
        root / "adapter_model.safetensors",
    )
    return root


def quantized(good: Path, root: Path) -> Path:
    """The checkpoint with one matrix in 8-bit floats."""
    shutil.copytree(good / "single", root)
    tensors = load_file(root / SINGLE)
    tensors[DOWN] = tensors[DOWN].to(torch.float8_e4m3fn)
    save_file({**tensors, f"{DOWN}_scale_inv": torch.ones(())}, root / SINGLE)
    config(quantization_config={"quant_method": "fp8"})(root)
    return root


def writers(good: Path, folder: Path, out: Path) -> dict[str, tuple[str | Path, ...]]:
    """The commands that write a checkpoint."""
    return {
        "fix": ("fix", good / "ckpt", "--policy", good / "policy.toml", "--out", out, "--quiet"),
        "merge": ("merge", good / "ckpt", "--adapter", adapter(folder / "adapter"), "--out", out),
        "dequantize": ("dequantize", quantized(good, folder / "quantized"), "--out", out),
    }


@contextmanager
def a_full_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: writes fail in the middle, as on a disk that fills up meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def permissions_bind() -> Iterator[None]:
    """Without the capabilities by which root writes where the mode forbids it; nothing changes for anybody else."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before, after = _Header(0x20080522, 0), (_Data * 2)(), (_Data * 2)()
    for data in (before, after):
        assert libc.capget(ctypes.byref(header), data) == 0
    after[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), after) == 0
    try:
        yield
    finally:
        assert libc.capset(ctypes.byref(header), before) == 0


@pytest.mark.parametrize("command", ["fix", "merge", "dequantize"])
def test_a_folder_that_is_read_only(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "other").write_text("somebody's")
    arguments = writers(good, tmp_path, folder / "out")[command]
    before = state(tmp_path), state(good)
    folder.chmod(0o555)
    try:
        with permissions_bind():
            assert run(monkeypatch, *arguments) == USAGE
    finally:
        folder.chmod(0o755)
    message = capsys.readouterr().err
    assert "cannot be written (Permission denied); choose another place." in message
    assert message.count("memscrub:") == 1 and "Traceback" not in message
    assert (state(tmp_path), state(good)) == before


@pytest.mark.parametrize("command", ["fix", "merge", "dequantize"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_in_the_middle(
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    overwrite: bool,
) -> None:
    out = tmp_path / "out"
    arguments = writers(good, tmp_path, out)[command]
    if overwrite:  # then the older result must survive
        shutil.copytree(good / "single", out)
        arguments = (*arguments, "--overwrite")
    before = state(tmp_path), state(good)
    with a_full_disk((good / "ckpt" / A).stat().st_size // 2):
        assert run(monkeypatch, *arguments) == INCOMPLETE
    message = capsys.readouterr().err
    assert "File too large" in message and message.count("memscrub:") == 1 and "Traceback" not in message
    assert (state(tmp_path), state(good)) == before
    assert run(monkeypatch, *arguments) == 0  # nothing is left that stands in the way of another try
    assert not list(tmp_path.glob("out.*")) and (out / CONFIG).is_file()
    assert state(good) == before[1]


@pytest.mark.parametrize("command", ["fix", "merge", "dequantize"])
def test_a_disk_that_is_too_small_from_the_start(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    arguments = writers(good, tmp_path, tmp_path / "out")[command]
    before = state(tmp_path), state(good)
    assert run(monkeypatch, *arguments) == INCOMPLETE
    assert "are free; free some space." in capsys.readouterr().err
    assert (state(tmp_path), state(good)) == before
