"""Layouts that checkpoints come in: whatever the shards, dtypes and extra files, a fix changes what it names only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import in_words, ordinary_rows, random_text, tiny_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from memscrub.jobs.scrub import fix
from memscrub.reports.verdict import Outcome
from memscrub.storage.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint, read_tensor
from memscrub.storage.writing import write_checkpoint

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
EXTRAS = {
    "tokenizer.model": b"\x00pieces",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"temperature": 0.6}\n',
    "README.md": b"# a model\r\n",
    "modeling_custom.py": b"raise SystemExit('never run')\n",
    "assets/figure.png": b"\x89PNG",
    "additional_chat_templates/tool.jinja": b"",
}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def lay_out(
    root: Path, tensors: dict[str, Tensor], shards: dict[str, str], metadata: dict[str, str] | None
) -> Checkpoint:
    """The tensors in the named shards, with an index where there is more than the usual single file."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").exists() or (root / "config.json").write_text('{"model_type": "llama"}')
    for name, data in EXTRAS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    for shard in set(shards.values()):
        (root / shard).parent.mkdir(exist_ok=True)
        save_file({n: t for n, t in tensors.items() if shards[n] == shard}, root / shard, metadata)
    if set(shards.values()) != {SINGLE}:
        (root / INDEX).write_text(json.dumps({"weight_map": shards, "metadata": {"total_size": 7}}, indent=1))
    return open_checkpoint(root)


names = st.lists(
    st.from_regex(r"[a-z]{1,3}(\.[0-9])?\.(weight|mask)", fullmatch=True), min_size=1, max_size=6, unique=True
)
shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple)
files = st.sampled_from(
    [SINGLE, "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "part/c.safetensors"]
)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), order=names, metadata=st.none() | st.just({"format": "pt", "note": "kept"}))
def test_no_plan_of_edits_changes_a_byte_outside_its_tensors_in_any_layout(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, order: list[str], metadata: dict[str, str] | None
) -> None:
    base = tmp_path_factory.mktemp("layout")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tensors, shards = {}, {}
    for name in order:
        # Weights are floats, or they are refused; what else lies in a checkpoint may have any dtype.
        others = () if name.endswith(".weight") else (torch.int64, torch.uint8)
        kind = data.draw(st.sampled_from((*FLOATS, *others)))
        tensors[name] = (torch.randn(data.draw(shapes), generator=generator) * 9).to(kind)
        shards[name] = data.draw(files)
    if SINGLE in shards.values():  # one file of that name and others beside it is no layout
        shards = dict.fromkeys(order, SINGLE)
    ckpt = lay_out(base / "in", tensors, shards, metadata)
    floats = [name for name in order if tensors[name].is_floating_point()]
    plan = data.draw(st.sets(st.sampled_from(floats))) if floats else set()
    before = contents(ckpt.path)
    edited = {name: read_tensor(ckpt, name) * 2 + 1 for name in plan}
    write_checkpoint(ckpt, base / "out", edited)
    out = open_checkpoint(base / "out")
    after = contents(out.path)

    assert contents(ckpt.path) == before and after.keys() == before.keys()
    touched = {shards[name] for name in plan}
    assert all(after[name] == before[name] for name in before if name not in touched)
    for shard in touched:
        restored = bytearray(after[shard])
        for name in plan:
            info = ckpt.tensors[name]
            if info.shard == shard:
                restored[info.begin : info.end] = before[shard][info.begin : info.end]
        assert bytes(restored) == before[shard]
        with safe_open(out.path / shard, framework="pt") as file:
            assert file.metadata() == metadata
            for name in file.keys():  # noqa: SIM118 - not a dict
                expected = edited[name].to(tensors[name].dtype) if name in plan else tensors[name]
                assert torch.equal(file.get_tensor(name), expected)
    shutil.rmtree(base)


POLICY = """
schema = 1
name = "layout"
[protected]
files = ["texts.txt"]
[class.text]
max_verbatim_tokens = 12
[locality]
retain = ["retain.txt"]
max_kl = 0.5
max_perplexity_ratio = 2.0
min_agreement = 0.5
"""


@pytest.fixture(scope="module")
def memorized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with tied embeddings that has memorized two texts, and the policy that protects them."""
    folder = tmp_path_factory.mktemp("memorized")
    texts = [random_text(seed, 36) for seed in (1, 2)]
    tiny_checkpoint(folder / "plain", "gpt2", seed=6, texts=texts, steps=120)
    (folder / "texts.txt").write_text("\n\n".join(texts) + "\n")
    (folder / "retain.txt").write_text("\n\n".join(in_words(ordinary_rows(7, 24, 90))) + "\n")
    (folder / "policy.toml").write_text(POLICY)
    return folder


@pytest.mark.parametrize(("dtypes", "parts"), [("float32", 3), ("bfloat16", 1), ("float16", 3), ("mixed", 3)])
def test_a_fix_keeps_dtypes_shards_tied_weights_and_every_other_file(
    memorized: Path, tmp_path: Path, dtypes: str, parts: int
) -> None:
    tensors = load_file(memorized / "plain" / SINGLE)
    for number, name in enumerate(sorted(tensors)):
        kind = ("float32", "bfloat16", "float16")[number % 3] if dtypes == "mixed" else dtypes
        tensors[name] = tensors[name].to(getattr(torch, kind))
    whole = {name: SINGLE for name in tensors}
    spread = {name: f"model-0000{number % 3 + 1}-of-00003.safetensors" for number, name in enumerate(sorted(tensors))}
    source = tmp_path / "in"
    shutil.copytree(memorized / "plain", source)
    (source / SINGLE).unlink()
    ckpt = lay_out(source, tensors, whole if parts == 1 else spread, {"format": "pt"})
    before = contents(source)
    fixed = fix(source, memorized / "policy.toml", tmp_path / "out", device="cpu")
    assert fixed.report.verdict.outcome is Outcome.PASS and contents(source) == before

    out = open_checkpoint(tmp_path / "out")
    assert {name: (i.dtype, i.shape, i.shard) for name, i in out.tensors.items()} == {
        name: (i.dtype, i.shape, i.shard) for name, i in ckpt.tensors.items()
    }
    assert "lm_head.weight" not in out.tensors
    named = {tensor.name for tensor in fixed.report.edit.tensors} if fixed.report.edit else set()
    changed = {name for name in ckpt.tensors if not torch.equal(read_tensor(out, name), read_tensor(ckpt, name))}
    assert changed == named and changed and all("c_proj" in name or "c_attn" in name for name in changed)
    after = contents(out.path)
    weights = {*ckpt.shards}
    assert {name: after[name] for name in before if name not in weights} == {
        name: data for name, data in before.items() if name not in weights
    }
    model = AutoModelForCausalLM.from_pretrained(out.path)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(out.path).bos_token == "<s>"
