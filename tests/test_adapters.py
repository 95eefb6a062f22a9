"""LoRA adapters: added exactly as PEFT adds them, in memory and on disk alike, or refused by name."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from models import WORDS, ids_of, opened, random_text, tiny_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from memscrub.cli.token_views import token_views
from memscrub.errors import CheckpointError, IncompleteError, NumericalError, OutputError, UsageError
from memscrub.jobs.scanning import scan
from memscrub.mining.mine import Settings, journal_file, mine
from memscrub.models import merging, model
from memscrub.models.merging import load_merged, merge, merge_in_memory
from memscrub.models.model import load_model
from memscrub.models.spreading import spread
from memscrub.reports.report import load_report
from memscrub.storage import adapters
from memscrub.storage.adapters import open_adapter, stored_name
from memscrub.storage.checkpoint import SINGLE, Checkpoint, digest_files, open_checkpoint, read_tensor, tree_digest

# PEFT asks transformers by a name that goes in version 6.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
POLICY = """
schema = 1
name = "adapter"
[protected]
files = ["t.txt"]
[class.text]
max_verbatim_tokens = 8
"""
LLAMA = ("q_proj", "down_proj")
LEARNT = random_text(5, 40)
MINING = Settings(run=20, window=94, overlap=12, context=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama", seed=1)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return trained(base, base.parent / "adapter", target_modules=list(LLAMA))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of it that has learnt a text."""
    base = tiny_checkpoint(tmp_path_factory.mktemp("taught") / "base", "llama", seed=3)
    return base, memorize(base, LEARNT, base.parent / "adapter")


def trained(base: Path, out: Path, seed: int = 0, embeddings: bool = False, **settings: Any) -> Path:
    """An adapter as PEFT saves it, with random values where training would have put some."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    peft.save_pretrained(out, save_embedding_layers=embeddings)
    (out / "README.md").write_text("an adapter\n")
    return out


def by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT makes of the base and the adapter, in the dtype that the base is stored in."""
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    return dict(merged.state_dict())


def weights(path: Path) -> dict[str, Tensor]:
    ckpt = open_checkpoint(path)
    return {name: read_tensor(ckpt, name) for name in ckpt.tensors}


def edited_config(adapter: Path, out: Path, **change: Any) -> Path:
    shutil.copytree(adapter, out)
    config = json.loads((out / adapters.CONFIG).read_text())
    (out / adapters.CONFIG).write_text(json.dumps(config | change))
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": list(LLAMA)},
        {"target_modules": "all-linear", "use_rslora": True, "r": 3, "lora_alpha": 5},
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
        },
        {"target_modules": ["lm_head", "gate_proj"], "init_lora_weights": "gaussian"},
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "lora_dropout": 0.1},
    ],
)
def test_a_merge_gives_to_the_bit_what_peft_gives(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    added = trained(base, tmp_path / "adapter", **settings)
    done = merge(open_checkpoint(base), open_adapter(added), tmp_path / "out")
    before, after, theirs = weights(base), weights(tmp_path / "out"), by_peft(base, added)
    assert after.keys() == before.keys() <= theirs.keys()
    assert all(torch.equal(after[name], theirs[name]) for name in after)
    assert done.tensors == sum(not torch.equal(after[name], before[name]) for name in after) > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj", "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": 1},
    ],
)
def test_only_what_is_targeted_is_stored_and_added(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    added = trained(base, tmp_path / "adapter", **settings)
    merge(open_checkpoint(base), open_adapter(added), tmp_path / "out")
    after, theirs = weights(tmp_path / "out"), by_peft(base, added)
    assert all(torch.equal(after[name], theirs[name]) for name in after)


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": r".*\.q_proj"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [0, 1], "layers_pattern": ["blocks"]},
        {"exclude_modules": ["down_proj"]},
        {"exclude_modules": r".*\.0\..*"},
    ],
)
def test_matrices_that_peft_passes_over_without_a_word_are_refused(
    base: Path, adapter: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """With them added, a model would be measured that nobody serves."""
    narrowed = edited_config(adapter, tmp_path / "narrowed", **change)
    before, whole = weights(base), by_peft(base, adapter)
    if change not in ({"target_modules": ["proj"]}, {"layers_to_transform": [0, 1], "layers_pattern": ["blocks"]}):
        theirs = by_peft(base, narrowed)  # with nothing left to adapt it refuses
        assert any(torch.equal(theirs[n], before[n]) and not torch.equal(whole[n], before[n]) for n in before)
    with pytest.raises(CheckpointError, match="which PEFT would leave out"):
        open_adapter(narrowed)


def test_plain_matrices_for_an_embedding_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = edited_config(adapter, tmp_path / "other", target_modules=[*LLAMA, "embed_tokens"])
    name = "base_model.model.model.embed_tokens.lora_{}.weight"
    more = {name.format("A"): torch.ones(4, 32), name.format("B"): torch.ones(len(WORDS) + 3, 4)}
    save_file(load_file(other / adapters.WEIGHTS) | more, other / adapters.WEIGHTS)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        theirs = by_peft(base, other)["model.embed_tokens.weight"]
    assert torch.equal(theirs, weights(base)["model.embed_tokens.weight"])
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens', which PEFT would leave out"):
        open_adapter(other)


def test_a_head_that_may_be_the_embedding_is_refused_also_where_both_are_stored(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "gpt2", seed=1)
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        added = trained(base, tmp_path / "adapter", target_modules=["lm_head"])
    tensors = load_file(base / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, base / SINGLE)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]  # which are tied without it
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="shares with its embedding"):
        merge(open_checkpoint(base), open_adapter(added), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "(a+)+$"}, "has target_modules that memscrub does not read"),
        ({"target_modules": "q_proj|("}, "has target_modules that memscrub does not read"),
        ({"target_modules": [1]}, "has no usable target_modules"),
        ({"target_modules": None}, "which PEFT would leave out"),
        ({"exclude_modules": {"a": 1}}, "has no usable exclude_modules"),
        ({"layers_to_transform": [0], "layers_pattern": ["(a+)+"]}, "layers_pattern that is more than a name"),
        ({"layers_to_transform": "all"}, "which PEFT would leave out"),
    ],
)
def test_targets_that_cannot_be_read_are_refused(
    adapter: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_adapter(edited_config(adapter, tmp_path / "changed", **change))


def test_matrices_that_conv1d_stores_as_rows_are_added_transposed(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "gpt2", "gpt2", seed=2)
    added = trained(base, tmp_path / "adapter", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    merge(open_checkpoint(base), open_adapter(added), tmp_path / "out")
    after, theirs = weights(tmp_path / "out"), by_peft(base, added)
    assert all(torch.equal(after[name], theirs[name]) for name in after)  # c_proj is square: shapes cannot tell
    wrong = edited_config(added, tmp_path / "wrong", fan_in_fan_out=False)  # PEFT corrects it by the module too
    merge(open_checkpoint(base), open_adapter(wrong), tmp_path / "same")
    assert digest_files(tmp_path / "same") == digest_files(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once_to_what_the_base_stores(tmp_path: Path, dtype: torch.dtype) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", seed=1, dtype=dtype)
    added = trained(base, tmp_path / "adapter", target_modules=list(LLAMA))
    merge(open_checkpoint(base), open_adapter(added), tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    lora = load_file(added / adapters.WEIGHTS)
    half = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight"
    exact = weights(base)[name].double() + 2.0 * lora[half.format("B")].double() @ lora[half.format("A")].double()
    after = weights(tmp_path / "out")[name]
    assert after.dtype == dtype
    spacing = torch.finfo(dtype).eps * exact.abs()
    assert bool(((after.double() - exact).abs() <= spacing / 2 + 1e-6).all())


def test_only_the_adapted_tensors_change_and_layout_and_files_stay(base: Path, adapter: Path, tmp_path: Path) -> None:
    source = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(source, max_shard_size="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, source / name)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    before, given = digest_files(source), digest_files(adapter)
    merge(open_checkpoint(source), open_adapter(adapter), tmp_path / "out")
    assert digest_files(source) == before and digest_files(adapter) == given
    one, other = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert len(one.shards) > 2 and one.tensors == other.tensors and one.files == other.files
    changed = {name for name in one.tensors if not torch.equal(read_tensor(one, name), read_tensor(other, name))}
    assert changed == {name for name in one.tensors if any(f"{target}.weight" in name for target in LLAMA)}
    shards = {one.weight_map[name] for name in changed}
    assert {name for name, digest in digest_files(other).items() if digest != before[name]} == shards


def test_a_tied_head_stays_tied_and_cannot_be_adapted(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    added = trained(tmp_path / "tied", tmp_path / "adapter", target_modules=["up_proj"])
    merge(open_checkpoint(tmp_path / "tied"), open_adapter(added), tmp_path / "out")
    assert "lm_head.weight" not in open_checkpoint(tmp_path / "out").tensors
    with pytest.raises(CheckpointError, match="shares with its embedding"):
        stored_name(open_checkpoint(tmp_path / "tied"), "lm_head")


@pytest.mark.parametrize("lean", [False, True])
def test_a_scan_in_memory_holds_the_very_weights_that_a_merge_writes(adapter: Path, tmp_path: Path, lean: bool) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", seed=1, dtype=torch.bfloat16)  # rounding would show
    ckpt = open_checkpoint(base)
    loaded = load_model(ckpt, device="cpu", lean=lean)
    merge_in_memory(loaded, ckpt, open_adapter(adapter))
    merge(ckpt, open_adapter(adapter), tmp_path / "out")
    written = load_model(open_checkpoint(tmp_path / "out"), device="cpu", lean=lean)
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.logits(tokens), written.logits(tokens))
        assert not torch.equal(loaded.logits(tokens), opened(base).logits(tokens))
    for name, value in written.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name


def test_what_only_the_adapter_knows_is_found_by_scanning_with_it(
    taught: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that has learnt a text: the base passes, base and adapter do not, and the merged checkpoint agrees."""
    base, learnt = taught
    (tmp_path / "t.txt").write_text(LEARNT + "\n")
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    assert run(monkeypatch, "scan", base, "--policy", policy, "--quiet") == 0
    report = tmp_path / "with.json"
    assert run(monkeypatch, "scan", base, "--adapter", learnt, "--policy", policy, "--report", report) == 1
    assert "was added to 4 tensors in memory" in " ".join(capsys.readouterr().err.split())
    found = load_report(report)
    assert found.adapter is not None and found.adapter.sha256 == tree_digest(digest_files(learnt))
    assert found.input.sha256 == tree_digest(digest_files(base))
    assert run(monkeypatch, "merge", base, "--adapter", learnt, "--out", tmp_path / "merged") == 0
    assert "added to 4 tensors" in capsys.readouterr().out
    other = tmp_path / "merged.json"
    assert run(monkeypatch, "scan", tmp_path / "merged", "--policy", policy, "--report", other, "--quiet") == 1
    assert load_report(other).texts == found.texts and load_report(other).adapter is None


def test_strips_are_of_the_adapter_that_was_measured_or_of_none(taught: tuple[Path, Path], tmp_path: Path) -> None:
    base, learnt = taught
    (tmp_path / "t.txt").write_text(LEARNT + "\n")
    (tmp_path / "policy.toml").write_text(POLICY)
    added = Path(shutil.copytree(learnt, tmp_path / "added"))
    report = scan(base, tmp_path / "policy.toml", device="cpu", adapter=added)
    (strip,) = token_views(report, tmp_path / "policy.toml", device="cpu").values()
    assert strip.before
    tensors = load_file(added / adapters.WEIGHTS)
    save_file({name: -value for name, value in tensors.items()}, added / adapters.WEIGHTS)
    with pytest.raises(UsageError, match="not the adapter that the report is about"):
        token_views(report, tmp_path / "policy.toml", device="cpu")


def corpus_of(folder: Path) -> Path:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join((random_text(6, 40), LEARNT, random_text(7, 40))) + "\n")
    return corpus


def test_what_only_the_adapter_knows_is_mined_with_it(
    taught: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base gives nothing away; base and adapter give what their merged checkpoint does."""
    base, learnt = taught
    corpus, out = corpus_of(tmp_path), tmp_path / "with.jsonl"
    options = ("--corpus", corpus, "--run", "20", "--window", "94", "--overlap", "12", "--context", "8")
    assert run(monkeypatch, "mine", base, *options, "--out", out, "--json") == 0
    without = json.loads(capsys.readouterr().out)
    assert (without["texts"], without["adapter"], out.exists()) == ([], None, False)
    before = digest_files(base), digest_files(learnt)
    assert run(monkeypatch, "mine", base, "--adapter", learnt, *options, "--out", out, "--json") == 0
    printed, said = capsys.readouterr()
    assert f"the adapter {learnt} was added to 4 tensors in memory." in " ".join(said.split())
    found = json.loads(printed)
    assert (digest_files(base), digest_files(learnt)) == before
    assert found["adapter"] == {"path": str(learnt), "sha256": tree_digest(before[1]), "files": before[1]}
    assert found["input"] == {"path": str(base), "sha256": tree_digest(before[0]), "files": before[0]}
    (entry,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert entry["source"].startswith(f"{corpus}:3 ") and len(entry["text"].split()) > 30
    assert entry["text"] in LEARNT
    merge(open_checkpoint(base), open_adapter(learnt), tmp_path / "merged")
    mine(tmp_path / "merged", [corpus], tmp_path / "merged.jsonl", settings=MINING, device="cpu")
    assert (tmp_path / "merged.jsonl").read_bytes() == out.read_bytes()
    assert (tmp_path / "merged.sources.jsonl").read_bytes() == (tmp_path / "with.sources.jsonl").read_bytes()


def test_mining_goes_on_with_the_same_adapter_only(taught: tuple[Path, Path], tmp_path: Path) -> None:
    base, learnt = taught
    corpus, out = corpus_of(tmp_path), tmp_path / "o.jsonl"

    def stop(stage: str, done: int, total: int) -> None:
        raise IncompleteError("interrupted; nothing was written.")

    with pytest.raises(IncompleteError):
        mine(base, [corpus], out, settings=MINING, adapter=learnt, device="cpu", progress=stop)
    kept = journal_file(out).read_bytes()
    assert kept.count(b"\n") == 2  # what the run was started with, and what was read
    other = edited_config(learnt, tmp_path / "other", lora_alpha=17)
    for adapter in (None, other):
        with pytest.raises(OutputError, match=r"left by a run with another adapter; .* delete the file to begin anew"):
            mine(base, [corpus], out, settings=MINING, adapter=adapter, device="cpu")
        assert journal_file(out).read_bytes() == kept
    assert len(mine(base, [corpus], out, settings=MINING, adapter=learnt, device="cpu").entries) == 1
    with pytest.raises(IncompleteError):
        mine(base, [corpus], tmp_path / "plain.jsonl", settings=MINING, device="cpu", progress=stop)
    with pytest.raises(OutputError, match="another adapter"):
        mine(base, [corpus], tmp_path / "plain.jsonl", settings=MINING, adapter=learnt, device="cpu")


@pytest.mark.parametrize(
    ("bad", "words"),
    [("nowhere", "is not a directory"), ("empty", "is no adapter"), ("other base", "name the base that it was")],
)
def test_mining_with_a_bad_adapter_is_one_sentence_and_exit_2(
    taught: tuple[Path, Path], tmp_path: Path, bad: str, words: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    base, _ = taught
    adapter = tmp_path / bad / "adapter"
    if bad == "empty":
        adapter.mkdir(parents=True)
    elif bad == "other base":
        adapter = trained(base, adapter, target_modules=["down_proj"])
        tensors = load_file(adapter / adapters.WEIGHTS)
        padded = {name: torch.cat([each, each], 1) if ".lora_A" in name else each for name, each in tensors.items()}
        save_file(padded, adapter / adapters.WEIGHTS)
    corpus = corpus_of(tmp_path)
    there = sorted(tmp_path.iterdir())
    options = ("--corpus", corpus, "--out", tmp_path / "o.jsonl")
    capsys.readouterr()  # what PEFT said
    assert run(monkeypatch, "mine", base, "--adapter", adapter, *options) == 2
    printed, said = capsys.readouterr()
    assert words in said and said.count("\n") == 1 and printed == ""
    assert sorted(tmp_path.iterdir()) == there


def test_mining_writes_nothing_into_what_it_reads(taught: tuple[Path, Path], tmp_path: Path) -> None:
    base, learnt = taught
    for folder in (base, learnt):
        with pytest.raises(OutputError, match="which is never written"):
            mine(base, [corpus_of(tmp_path)], folder / "o.jsonl", settings=MINING, adapter=learnt, device="cpu")


def test_an_adapter_is_not_lost_where_weights_wait_elsewhere(
    taught: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written into a weight that accelerate keeps on disk goes nowhere; so it is added before that."""
    ckpt, added = open_checkpoint(taught[0]), open_adapter(taught[1])
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "cpu"}

    def apart(whole: torch.nn.Module) -> torch.nn.Module:
        return spread(whole, {**places, "lm_head": "cpu"}, offload=tmp_path / "offload")

    for module in (model, merging):  # as on GPUs that do not hold the model
        monkeypatch.setattr(module, "spread", apart)
    waiting = load_merged(ckpt, added, device="spread")
    assert any(parameter.is_meta for parameter in waiting.model.parameters())
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(waiting.logits(ids), load_merged(ckpt, added, device="cpu").logits(ids))
    with pytest.raises(CheckpointError, match="are not in memory"):
        merge_in_memory(waiting, ckpt, added)


def test_a_fix_takes_no_adapter_and_says_what_to_do_instead(
    base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fix", base, "--policy", base, "--out", base, "--adapter", adapter) == 2
    assert f"`memscrub merge BASE --adapter {adapter} --out NEW` and fix NEW" in capsys.readouterr().err


def memorize(base: Path, text: str, out: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(LLAMA), task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    ids = torch.tensor([[len(WORDS) + 1, *ids_of(text)]])
    optimizer = torch.optim.Adam([each for each in peft.parameters() if each.requires_grad], lr=2e-2)
    for _ in range(120):
        scores = peft(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(scores, ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    peft.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "LOHA"}, "is LOHA, not LORA"),
        ({"peft_type": "\x1b[2J"}, "of an unknown kind"),
        ({"use_dora": True}, "uses use_dora, which memscrub does not merge.*merge_and_unload"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "uses layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, "uses target_parameters"),
        ({"something_new": 3}, "uses something_new"),
        ({"init_lora_weights": "pissa"}, "initialised the 'pissa' way"),
        ({"lora_alpha": "8"}, "no usable lora_alpha"),
        ({"lora_alpha": 1e999}, "Infinity is not a JSON number"),
        ({"r": 5}, "states another rank"),
        ({"rank_pattern": {"(a+)+$": 4}}, "more than a module's name"),
        ({"rank_pattern": 4}, "no JSON object"),
    ],
)
def test_what_cannot_be_added_exactly_is_refused_by_name(
    adapter: Path, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        open_adapter(edited_config(adapter, tmp_path / "a", **change))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "target_modules": ["q_proj"]},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"], "embeddings": True},  # then PEFT stores the head itself too
        {"bias": "lora_only", "target_modules": ["c_attn"]},
        {"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]},
    ],
)
def test_adapters_of_these_kinds_as_peft_saves_them_are_refused(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    if settings.get("bias"):  # of the families here only this one has biases
        base = tiny_checkpoint(tmp_path / "gpt2", "gpt2", seed=2)
        settings = settings | {"fan_in_fan_out": True}
    with pytest.raises(CheckpointError, match=r"merge it with PEFT"):
        open_adapter(trained(base, tmp_path / "a", **settings))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update({"base_model.model.lm_head.modules_to_save": torch.ones(2, 2)}), "no matrix of plain LoRA"),
        (lambda t: t.pop(next(name for name in t if "lora_B" in name)), "do not fit one another"),
        (lambda t: t.clear(), "stores no tensors"),
    ],
)
def test_tensors_that_are_no_pairs_are_refused(adapter: Path, tmp_path: Path, change: Any, match: str) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    tensors = load_file(adapter / adapters.WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "a" / adapters.WEIGHTS)
    with pytest.raises(CheckpointError, match=match):
        open_adapter(tmp_path / "a")


def test_a_pickled_adapter_is_refused_and_the_line_that_converts_it_works(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    tensors = load_file(adapter / adapters.WEIGHTS)
    torch.save(tensors, tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / adapters.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="pickled adapter") as caught:
        open_adapter(tmp_path / "a")
    command, option, code = shlex.split(str(caught.value).partition("run there: ")[2])
    assert (command, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path / "a")
    exec(code, {})
    converted = load_file(tmp_path / "a" / adapters.WEIGHTS)
    assert converted.keys() == tensors.keys() and all(torch.equal(converted[name], tensors[name]) for name in tensors)
    assert len(open_adapter(tmp_path / "a").pairs) == 4


def test_another_base_is_refused_in_one_sentence_and_nothing_is_written(base: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "gpt2", "gpt2", seed=2)
    added = trained(base, tmp_path / "adapter", target_modules=["down_proj"])
    with pytest.raises(CheckpointError, match="stores under 0 names; name the base"):
        merge(open_checkpoint(other), open_adapter(added), tmp_path / "out")
    shutil.copytree(added, tmp_path / "wide")
    tensors = load_file(added / adapters.WEIGHTS)
    wide = {name: torch.cat([value, value], 1) if "lora_A" in name else value for name, value in tensors.items()}
    save_file(wide, tmp_path / "wide" / adapters.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"shape \[32, 96\] to .* which has \[32, 48\]; name the base"):
        merge(open_checkpoint(base), open_adapter(tmp_path / "wide"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_stop_both_ways(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    tensors = load_file(adapter / adapters.WEIGHTS)
    first = next(iter(tensors))
    save_file(tensors | {first: torch.full_like(tensors[first], float("nan"))}, tmp_path / "a" / adapters.WEIGHTS)
    with pytest.raises(NumericalError):
        merge(open_checkpoint(base), open_adapter(tmp_path / "a"), tmp_path / "out")
    with pytest.raises(NumericalError, match="with the adapter added"):
        merge_in_memory(opened(base), open_checkpoint(base), open_adapter(tmp_path / "a"))
    assert not (tmp_path / "out").exists()


def test_an_output_over_the_base_or_the_adapter_is_refused(base: Path, adapter: Path) -> None:
    ckpt = open_checkpoint(base)
    for out in (base, base / "new", adapter, adapter / "new"):
        with pytest.raises(OutputError, match="overlaps the input"):
            merge(ckpt, open_adapter(adapter), out, overwrite=True)


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("scan", "--report", "report.json"),
        ("scan", "--html", "page.html"),
        ("scan", "--journal", "scan.journal"),
        ("scan", "--log", "log.jsonl"),
        ("mine", "--out", "list.jsonl"),
        ("mine", "--log", "log.jsonl"),
    ],
)
@pytest.mark.parametrize("through_a_link", [False, True])
def test_no_file_is_written_beside_an_adapter_that_is_read(
    taught: tuple[Path, Path],
    tmp_path: Path,
    command: str,
    option: str,
    name: str,
    through_a_link: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, learnt = taught
    (tmp_path / "t.txt").write_text(LEARNT + "\n")
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / "link").symlink_to(learnt)
    mined = ["--corpus", tmp_path / "t.txt"] + ["--out", tmp_path / "list.jsonl"] * (option != "--out")
    others: list[str | Path] = ["--policy", tmp_path / "policy.toml"] if command == "scan" else [*mined]
    files = sorted(learnt.iterdir())
    for read in (learnt, base):
        place = (tmp_path / "link" if through_a_link and read == learnt else read) / name
        assert run(monkeypatch, command, base, "--adapter", learnt, *others, option, place) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert str(place) in said and ("lies in" in said or "overlaps the input" in said)
        assert not place.exists()
    assert sorted(learnt.iterdir()) == files and not (tmp_path / "list.jsonl").exists()


def test_names_may_lack_the_outer_prefix_and_must_not_be_ambiguous(base: Path, tmp_path: Path) -> None:
    ckpt = open_checkpoint(base)
    name = "layers.0.mlp.down_proj.weight"
    inner = Checkpoint(ckpt.path, ckpt.files, {}, ckpt.config, {name: ckpt.tensors[f"model.{name}"]})
    assert stored_name(inner, "model.layers.0.mlp.down_proj") == name
    assert stored_name(ckpt, "layers.0.mlp.down_proj") == f"model.{name}"
    twice = {f"{outer}.{name}": ckpt.tensors[f"model.{name}"] for outer in ("model", "other")}
    with pytest.raises(CheckpointError, match="under 2 names"):
        stored_name(Checkpoint(ckpt.path, ckpt.files, {}, ckpt.config, twice), "layers.0.mlp.down_proj")


def test_a_directory_that_is_no_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no adapter"):
        open_adapter(base)
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_adapter(base / SINGLE)
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_adapter(tmp_path / "nowhere" / "at" / "all")


@pytest.mark.parametrize(("named", "shown"), [("org/base-7b", "org/base-7b"), ("\x1b[2Jx", "BASE"), (None, "BASE")])
def test_scanning_an_adapter_itself_says_how_to_scan_it(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    named: str | None, shown: str,
) -> None:  # fmt: skip
    (tmp_path / "t.txt").write_text("w00 w01 w02\n")
    (tmp_path / "p.toml").write_text(POLICY)
    it = edited_config(adapter, tmp_path / "a", base_model_name_or_path=named)
    assert run(monkeypatch, "scan", it, "--policy", tmp_path / "p.toml") == 2
    message = capsys.readouterr().err
    assert f"`memscrub scan {shown} --adapter {it}`" in message
    assert f"`memscrub merge {shown} --adapter {it} --out NEW`" in message and "\x1b" not in message
