"""Any value in any entry of config.json, and any tokenizer file, ends in a loaded model or one refusal, soon."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, opened, random_text, tiny_checkpoint, token_text, write_list
from safetensors.torch import load_file, save_file

from memscrub.cli.token_views import token_views
from memscrub.edit.modes import Mode, available_modes, fixed_distractor
from memscrub.errors import CheckpointError, IncompleteError, MemscrubError
from memscrub.jobs.foreign_lists import ForeignSource, read_foreign
from memscrub.jobs.ordinary_text import neighbour_texts
from memscrub.jobs.scanning import open_inputs, scan
from memscrub.measures.continuation import similarity
from memscrub.measures.depths import measure_depths
from memscrub.measures.measure import measure
from memscrub.mining.windows import Encoder
from memscrub.models.tokens import blocks, decoded
from memscrub.policy.document import load_policy
from memscrub.reports.report import CheckpointRecord
from memscrub.storage.checkpoint import digest_files, open_checkpoint, tree_digest
from memscrub.storage.untrusted_config import Reading
from memscrub.texts.protected import Document, load_protected

VALUES: tuple[Any, ...] = (0, -1, 10**9, 10**30, 1.5, None, "x", [], {})


def reload(root: Path) -> str | None:
    """What is wrong with how the checkpoint is loaded or refused; None where nothing is."""
    begin = time.process_time()
    try:
        opened(root)
    except MemscrubError as error:
        if not str(error).isprintable() or len(str(error)) > 600:
            return str(error)
    taken = time.process_time() - begin
    return None if taken < 5 else f"{taken} seconds"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_value_that_an_entry_cannot_have_is_one_refusal(family: str, tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "c", family, seed=1)
    config = json.loads((root / "config.json").read_text())
    wrong = {}
    for number, key in enumerate(config):
        # Every value for every entry takes a minute; each entry gets two, and each value its share of entries.
        for value in (VALUES[(2 * number + i) % len(VALUES)] for i in range(2)):
            (root / "config.json").write_text(json.dumps(config | {key: value}))
            if found := reload(root):
                wrong[key, repr(value)] = found
    assert not wrong


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_hidden_layers": 10**9}, "asks for more num_hidden_layers than the"),
        ({"text_config": {"n_layer": 10**30}}, "asks for more n_layer than the"),
        ({"num_local_experts": 10**9}, "asks for more num_local_experts than the"),
        ({"vocab_size": 10**9}, "describes a model of 64000015520 parameters, but 19616 are"),
        ({"intermediate_size": 10**9}, "parameters, but"),
        ({"num_attention_heads": 0}, "transformers cannot load this checkpoint"),
        ({"num_hidden_layers": 1.5}, "transformers cannot load this checkpoint"),
    ],
)
def test_a_model_far_larger_than_what_is_stored_is_never_built(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | changed))
    begin = time.process_time()
    with pytest.raises(MemscrubError, match=words):
        opened(root)
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    "tokenizer",
    [
        {},
        [],
        {"version": "1.0", "added_tokens": [], "model": {"type": "None"}},
        {"version": "9.9", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}},
        {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        {"version": "1.0", "added_tokens": [{"id": 2**70}], "model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}},
    ],
)
def test_a_tokenizer_that_is_none_is_one_refusal(tokenizer: object, tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    (root / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert reload(root) is None


DECOY = "shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("entry", "copied", "words"),
    [
        ({"transformers_weights": "decoy.safetensors"}, "decoy.safetensors", r"\(transformers_weights\)"),
        ({"configuration_files": ["config.4.0.0.json"]}, None, r"\(configuration_files\)"),
        ({}, DECOY, f"^{DECOY} is a part of a training checkpoint"),
    ],
)
def test_other_weights_or_settings_than_those_that_were_looked_at_are_never_measured(
    entry: dict[str, Any], copied: str | None, words: str, tmp_path: Path
) -> None:
    """transformers would load them, and most other readers what lies in the usual place."""
    root, other = tiny_checkpoint(tmp_path / "c", "llama", seed=1), tiny_checkpoint(tmp_path / "o", "llama", seed=2)
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | entry))
    (root / "config.4.0.0.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    if copied is not None:
        (root / copied).write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(root)


def test_a_tokenizer_from_outside_the_directory_is_not_read(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    (root / "tokenizer.json").rename(tmp_path / "tokenizer.4.0.0.json")
    settings = json.loads((root / "tokenizer_config.json").read_text())
    settings["fast_tokenizer_files"] = ["../tokenizer.4.0.0.json"]
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="fast_tokenizer_files"):
        opened(root)


def test_a_tokenizer_that_cannot_say_which_characters_a_token_is_is_refused(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    (root / "tokenizer.json").unlink()
    (root / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    with pytest.raises(CheckpointError, match="ByT5Tokenizer"):
        opened(root)


@pytest.mark.parametrize(
    "broken",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # a panic while it is loaded
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},  # a panic at the first text
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "none"}},  # an exception at the first text
    ],
)
def test_a_tokenizer_that_breaks_down_is_one_refusal_without_the_text(broken: dict[str, Any], tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    whole = json.loads((root / "tokenizer.json").read_text())
    (root / "tokenizer.json").write_text(json.dumps(whole | broken))
    with pytest.raises(CheckpointError) as caught:
        token_text(opened(root), "w01 secretword")
    assert "secretword" not in str(caught.value)
    with pytest.raises(CheckpointError):
        blocks(opened(root), [Document("w01 secretword", "retain.txt", 1)])


@pytest.mark.parametrize(
    "broken",
    [
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "none"}},
    ],
)
def test_a_tokenizer_that_breaks_down_is_one_refusal_wherever_it_is_given_a_text(
    broken: dict[str, Any], tmp_path: Path
) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    write_list(tmp_path / "list.jsonl", ["w01 w02 w03 w04"], "t", "c")
    (tmp_path / "near.txt").write_text("w01 secretword")
    (tmp_path / "policy.toml").write_text(
        'schema = 1\nname = "n"\n[protected]\nfiles = ["list.jsonl"]\n[class.c]\nmax_verbatim_tokens = 2\n'
        '[locality]\nneighbours = ["near.txt"]\n'
    )
    inputs = open_inputs(root, tmp_path / "policy.toml", device="cpu")
    ids = np.full((2, 80), 3, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    whole = json.loads((root / "tokenizer.json").read_text())
    (root / "tokenizer.json").write_text(json.dumps(whole | broken))
    loaded = opened(root)
    source = ForeignSource("mempi", tmp_path / "ids.npy")
    if "model" in broken:  # which knows no id either
        loaded.tokenizer.decode = lambda ids, **_: "w01 secretword"
    for ask in (
        lambda: Encoder(loaded.tokenizer)(["w01 secretword"]),
        lambda: neighbour_texts(replace(inputs, loaded=loaded)),
        lambda: read_foreign(loaded, inputs.policy, source),
        lambda: fixed_distractor(loaded.tokenizer, Mode.REDACT),
        lambda: available_modes(loaded.tokenizer),
    ):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is broken") as caught:
            ask()
        assert "secretword" not in str(caught.value)


def test_a_tokenizer_that_breaks_down_at_tokens_is_one_refusal_wherever_it_is_given_them(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    text = random_text(3, 40)
    write_list(tmp_path / "list.jsonl", [text], "t", "c")
    (tmp_path / "policy.toml").write_text(
        'schema = 1\nname = "n"\n[protected]\nfiles = ["list.jsonl"]\n[class.c]\nmax_near_verbatim = 0.9\n'
    )
    policy = load_policy(tmp_path / "policy.toml")
    protected = tuple(load_protected(policy))
    report = scan(root, policy, device="cpu")
    whole = json.loads((root / "tokenizer.json").read_text())
    # A panic at every token: more is stripped from it than it has.
    alike = {"type": "Replace", "pattern": {"Regex": "."}, "content": "w"}
    strip = {"type": "Strip", "content": "w", "start": 0, "stop": 99}
    decoder = {"type": "Sequence", "decoders": [alike, strip]}
    (root / "tokenizer.json").write_text(json.dumps(whole | {"decoder": decoder}))
    files = digest_files(open_checkpoint(root))
    report = replace(report, input=CheckpointRecord(str(root), tree_digest(files), files))
    loaded = opened(root)
    given = token_text(loaded, text)
    ids = tuple(given.tokens[given.start :])
    for ask in (
        lambda: decoded(loaded, ids),
        lambda: similarity(loaded, ids, ids),
        lambda: measure(loaded, policy, [given]),
        lambda: measure(loaded, policy, [given], screen=True),
        lambda: measure_depths(loaded, policy, protected, [given], also=("membership",)),
        lambda: measure_depths(loaded, policy, protected, [given], also=("alignment",)),
        lambda: token_views(report, policy, reveal=True, device="cpu"),
    ):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is broken") as caught:
            ask()
        assert not any(word in str(caught.value) for word in text.split())


@pytest.mark.parametrize("change", [('"__metadata__":{', '"__metadata__":{"x":"\\ud800",'), ("[0,", "[-0,")])
def test_a_header_that_only_the_library_refuses_is_one_refusal(change: tuple[str, str], tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    data = (root / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().replace(*change, 1).encode()
    assert header != data[8 : 8 + length]
    (root / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(CheckpointError, match="transformers cannot load this checkpoint"):
        opened(root)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_not_measured(dtype: torch.dtype, tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "c", "llama", seed=1)
    tensors = load_file(root / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, root / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}' is stored as"):
        open_checkpoint(root)
    save_file(tensors | {"mask": torch.ones(2, 2).to(dtype)}, root / "model.safetensors")
    open_checkpoint(root)


def test_a_lack_of_memory_is_not_blamed_on_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="out of memory while it was loaded"), Reading(tmp_path):
        torch.empty(1 << 60, dtype=torch.uint8)
