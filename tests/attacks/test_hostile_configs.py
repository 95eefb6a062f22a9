"""Any value in any entry of config.json, and any tokenizer file, ends in a loaded model or one refusal, soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from models import FAMILIES, opened, tiny_checkpoint

from memscrub.errors import MemscrubError

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
