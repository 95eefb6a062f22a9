"""Make a large sharded checkpoint that gives texts away, and measure what memscrub needs to write, scan and fix it.

    python benchmarks/large_checkpoint.py [--size 4e9] [--parts write,scan,statistics,fix] [--folder DIR] [--keep]

The checkpoint is a Llama in bfloat16. A small trained Llama sits in its first coordinates and two of its layers, so
that texts come out of it; the other layers read and compute but write zeros. Nothing is downloaded. What is counted as
memory and as extra disk is in `watched.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from watched import watched

from memscrub.proof.signing import generate_keypair, sign_directory
from memscrub.storage.checkpoint import Checkpoint, digest_files, open_checkpoint, read_tensor
from memscrub.storage.writing import write_checkpoint

HEAD = 64  # coordinates of one attention head
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
EDITED = ("mlp.down_proj.weight", "self_attn.o_proj.weight", "self_attn.q_proj.weight")
LENGTH = 40  # words of a protected text
POLICY = """schema = 1
name = "large"
[protected]
files = ["protected.jsonl"]
[class.copyright]
max_verbatim_tokens = 8
[locality]
retain = ["retain.txt"]
statistics = [{more}]
max_kl = 0.2
max_perplexity_ratio = 1.3
min_agreement = 0.8
[fix]
sites = "{sites}"
layers = "all"
rounds = 14
"""


@dataclass(frozen=True)
class Shape:
    """Width, MLP width, words and layers of the large model."""

    width: int
    inner: int
    words: int
    layers: int

    @staticmethod
    def of(size: float, width: int | None = None) -> Shape:
        """The shape whose weights take about `size` bytes in bfloat16, of this width or a usual one."""
        width = width or (2048 if size >= 1e9 else 512)
        inner, words = width * 11 // 4, 4000 if width <= 512 else width * 125 // 8
        layer = 4 * width * width + 3 * width * inner + 2 * width
        return Shape(width, inner, words, max(3, round((size / 2 - 2 * words * width) / layer)))


def main() -> None:
    """Make the checkpoint, run the parts, print a table row for each."""
    options = _options()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="memscrub-large-"))
    try:
        checkpoint = folder / "checkpoint"
        if not checkpoint.is_dir():
            shape = Shape.of(options.size, options.width)
            make(checkpoint, shape, rows=options.retain_rows, more=options.statistics_rows)
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.3f} GB of weights in {len(list(checkpoint.glob('*.safetensors')))} shards")
        policy = folder / "checkpoint-policy" / "policy.toml"
        more = '"statistics.txt"' if options.statistics_rows else ""
        policy.write_text(POLICY.format(sites=options.sites, more=more), encoding="utf-8")
        parts = {"write": _writing, "scan": _scan, "statistics": _statistics, "fix": _fix}
        for part in options.parts.split(","):
            parts[part](checkpoint, policy, folder, size)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def make(path: Path, shape: Shape, *, rows: int = 3, more: int = 0, shards: int = 4, seed: int = 0) -> None:
    """Write the checkpoint shard by shard to `path`, and a policy with its texts beside it: `rows` paragraphs of retain
    text for each half, and `more` rows of two for the solver's statistics alone."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    texts = [" ".join(f"w{draw.randrange(shape.words - 3)}" for _ in range(LENGTH)) for _ in range(2)]
    small = _trained(shape, texts)
    path.mkdir(parents=True)
    index: dict[str, str] = {}
    groups = _groups(shape, shards)
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = dict(_tensors(shape, small, group))
        save_file(tensors, path / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
        del tensors
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = _config(shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    _tokenizer(shape.words).save_pretrained(path)
    beside = path.with_name(path.name + "-policy")
    beside.mkdir()
    records = [{"id": f"text-{n}", "class": "copyright", "text": text} for n, text in enumerate(texts)]
    (beside / "protected.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (beside / "retain.txt").write_text("\n\n".join(_ordinary(draw, shape.words, 128) for _ in range(2 * rows)))
    (beside / "statistics.txt").write_text("\n\n".join(_ordinary(draw, shape.words, 128) for _ in range(2 * more)))
    (beside / "policy.toml").write_text(POLICY.format(sites="mlp", more=""))


def _config(shape: Shape) -> LlamaConfig:
    # The mean square over more coordinates, of which the others are zero, is smaller by this factor.
    share = SMALL["hidden_size"] / shape.width
    return LlamaConfig(
        vocab_size=shape.words,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // HEAD,
        num_key_value_heads=shape.width // HEAD,
        max_position_embeddings=512,
        rms_norm_eps=1e-5 * share,
        tie_word_embeddings=False,
        bos_token_id=shape.words - 1,
        eos_token_id=None,
        dtype="bfloat16",
    )


def _trained(shape: Shape, texts: list[str]) -> dict[str, Tensor]:
    """The weights of a small Llama with the large one's vocabulary that knows the texts by heart."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.words,
            **SMALL,
            num_key_value_heads=2,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            initializer_range=0.1,
        )
    )
    draw = random.Random(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    known = torch.tensor([[shape.words - 1, *(int(word[1:]) for word in text.split())] for text in texts])
    for _ in range(60):
        rows = [_ordinary(draw, shape.words, LENGTH + 1).split() for _ in range(4)]
        ids = torch.cat([known, torch.tensor([[int(word[1:]) for word in row] for row in rows])])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def _ordinary(draw: random.Random, words: int, length: int) -> str:
    """Words of a small range that follow one another by a rule, with some noise."""
    count = min(500, words - 3)
    word, found = draw.randrange(count), []
    for _ in range(length):
        found.append(f"w{word}")
        word = draw.randrange(count) if draw.random() < 0.2 else (3 * word + 1) % count
    return " ".join(found)


def _groups(shape: Shape, shards: int) -> list[list[str]]:
    """The parts of the model that go into each shard."""
    parts = ["embed", *(str(layer) for layer in range(shape.layers)), "head"]
    each = -(-len(parts) // shards)
    return [parts[start : start + each] for start in range(0, len(parts), each)]


def _tensors(shape: Shape, small: dict[str, Tensor], parts: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these parts, with the small model's in the first coordinates of the first and the last layer."""
    width, inner = shape.width, shape.inner
    gain = (SMALL["hidden_size"] / width) ** 0.5  # undoes the smaller mean square

    def padded(name: str, *sizes: int, fill: float = 0.0) -> Tensor:
        large = torch.randn(sizes).mul_(fill) if fill else torch.zeros(sizes)
        if name in small:
            value = small[name]
            large[tuple(slice(n) for n in value.shape)] = value * (gain if "norm" in name else 1.0)
        return large.to(torch.bfloat16)

    for part in parts:
        if part == "embed":
            yield "model.embed_tokens.weight", padded("model.embed_tokens.weight", shape.words, width)
        elif part == "head":
            yield "model.norm.weight", padded("model.norm.weight", width)
            yield "lm_head.weight", padded("lm_head.weight", shape.words, width)
        else:
            place = {0: "0", shape.layers - 1: "1"}.get(int(part), "none")
            here, there = f"model.layers.{part}", f"model.layers.{place}"
            # What reads sees only the small model's coordinates, as the others are zero; what writes is zero.
            fill = 0.5 / SMALL["hidden_size"] ** 0.5 if place == "none" else 0.0
            for norm in ("input_layernorm", "post_attention_layernorm"):
                known = padded(f"{there}.{norm}.weight", width)
                yield f"{here}.{norm}.weight", known if place != "none" else torch.full_like(known, gain)
            for one in ("q_proj", "k_proj", "v_proj"):
                name = f"self_attn.{one}.weight"
                yield f"{here}.{name}", padded(f"{there}.{name}", width, width, fill=fill)
            yield f"{here}.self_attn.o_proj.weight", padded(f"{there}.self_attn.o_proj.weight", width, width)
            for one in ("gate_proj", "up_proj"):
                yield f"{here}.mlp.{one}.weight", padded(f"{there}.mlp.{one}.weight", inner, width, fill=fill)
            yield f"{here}.mlp.down_proj.weight", padded(f"{there}.mlp.down_proj.weight", width, inner)


def _tokenizer(words: int) -> PreTrainedTokenizerFast:
    names = {f"w{number}": number for number in range(words - 3)} | {"<unk>": words - 3, "<u>": words - 2}
    tokenizer = Tokenizer(WordLevel({**names, "<s>": words - 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def _writing(checkpoint: Path, policy: Path, folder: Path, size: int) -> None:
    """memscrub's writing, digests and signature against `cp -r` and `sha256sum` of the same directory.

    Both ways are taken in turn, after one unmeasured reading of the input. Neither waits for the disk (no fsync); what
    that takes for memscrub's output is stated apart. Every matrix that a fix with all sites may edit is edited.
    """
    ckpt, key = open_checkpoint(checkpoint), folder / "key.pem"
    if not key.exists():
        generate_keypair(key, folder / "key.pub.pem")
    digest_files(ckpt)
    ratios = []
    for number in range(3):
        out, plain = folder / "written", folder / "copied"
        theirs = _timed(lambda plain=plain: _copy(checkpoint, plain))
        shutil.rmtree(plain)
        ours = _timed(lambda out=out: _write(ckpt, out, key))
        synced = _timed(lambda out=out: _sync(out))
        shutil.rmtree(out)
        ratios.append(ours / theirs)
        print(f"write {number}: cp -r and sha256sum {theirs:.1f} s, memscrub {ours:.1f} s (x {ratios[-1]:.2f}), then to"
              f" the disk {synced:.1f} s")  # fmt: skip
    print(f"write: x {sorted(ratios)[1]:.2f} of cp -r and sha256sum (median of 3)")


def _timed(work: Callable[[], None]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    files = [str(file) for file in sorted(target.rglob("*")) if file.is_file()]
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)


def _write(ckpt: Checkpoint, out: Path, key: Path) -> None:
    """What a fix does from its edit to its signature, without the measuring: write, digest, sign."""
    edited = {name: partial(_moved, ckpt, name) for name in ckpt.tensors if name.endswith(EDITED)}
    write_checkpoint(ckpt, out, edited)
    written = open_checkpoint(out)
    sign_directory(out, key, known=digest_files(written))


def _moved(ckpt: Checkpoint, name: str) -> Tensor:
    """The tensor with one output vector changed; mapped, not copied, as the weights of a running fix are."""
    values = read_tensor(ckpt, name)
    values[:, 0] += 1
    return values


def _sync(out: Path) -> None:
    for file in out.rglob("*"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _scan(checkpoint: Path, policy: Path, folder: Path, size: int) -> None:
    ran = watched("scan", str(checkpoint), "--policy", str(policy), "--quiet", "--device", "cpu")
    print(f"scan: exit {ran.code}, {ran.seconds:.0f} s, peak {ran.peak / 1e9:.3f} GB = {ran.peak / size:.3f} x its size"
          f" (not backed by files: {ran.anonymous / 1e9:.3f} GB)")  # fmt: skip


def _statistics(checkpoint: Path, policy: Path, folder: Path, size: int) -> None:
    """The part of a fix with the most extra disk: its retain statistics, measured and dropped."""
    out = folder / "statistics"
    program = (str(Path(__file__).with_name("extra_disk.py")), "--measure")
    ran = watched(str(checkpoint), str(policy), str(out), out=out, program=program)
    print(f"statistics: exit {ran.code}, {ran.seconds:.0f} s, extra disk at most {ran.disk / 1e9:.3f} GB"
          f" = {ran.disk / size:.3f} x the weights")  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)


def _fix(checkpoint: Path, policy: Path, folder: Path, size: int) -> None:
    out = folder / "scrubbed"
    options = ("--policy", str(policy), "--out", str(out), "--quiet", "--device", "cpu")
    ran = watched("fix", str(checkpoint), *options, out=out)
    print(f"fix: exit {ran.code}, {ran.seconds:.0f} s, peak {ran.peak / 1e9:.3f} GB = its size"
          f" + {(ran.peak - size) / 1e9:.3f} GB (not backed by files: {ran.anonymous / 1e9:.3f} GB)")  # fmt: skip
    print(f"fix: extra disk at most {ran.scratch / 1e9:.3f} GB before the output was written, {ran.disk / 1e9:.3f} GB"
          f" in all; {_goal(out)}")  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)


def _goal(out: Path) -> str:
    """What the shards that a fix edited and its report take."""
    report = out / "memscrub-report.json"
    if not report.is_file():
        return "it wrote no output, so that no shard was touched"
    shards = {tensor["shard"] for tensor in json.loads(report.read_text())["edit"]["tensors"]}
    size = report.stat().st_size + sum((out / shard).stat().st_size for shard in shards)
    return f"goal: {size / 1e9:.3f} GB, the {len(shards)} touched shards and the report"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=float, default=4e9, help="bytes of weights")
    parser.add_argument("--width", type=int, help="of the model; by default 2048 from 1e9 bytes on, else 512")
    parser.add_argument("--parts", default="write,scan,fix", help="what to measure, by comma; statistics as well")
    parser.add_argument("--sites", default="mlp", help="[fix] sites of the policy")
    parser.add_argument("--retain-rows", type=int, default=3, help="paragraphs of retain text in each half")
    parser.add_argument("--statistics-rows", type=int, default=0, help="rows of 256 words more for the solver alone")
    parser.add_argument("--folder", help="where to put everything; it stays with --keep")
    parser.add_argument("--keep", action="store_true", help="leave the folder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
