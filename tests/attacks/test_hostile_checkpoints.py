"""A checkpoint that carries everything an attacker would put into one is measured, and nothing in it comes alive.

The command runs in a process of its own under an audit hook (`tests/watching.py`), which sees what transformers, torch
and huggingface_hub do too.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from models import opened, random_text, tiny_checkpoint
from watching import NETWORK, PROCESSES, Seen, watched

MARK = "PWNED"
POLICY = """schema = 1
name = "hostile"
[protected]
files = ["texts.jsonl"]
[class.a]
max_verbatim_tokens = 4
"""
CODE = f"open({MARK!r}, 'w').close()\nraise SystemExit(99)\n"
TEMPLATE = "{{ cycler.__init__.__globals__.os.system('touch " + MARK + "') }}{% for x in range(10**9) %}{% endfor %}"


class Bomb:
    """What unpickles to a file that should not be there."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {MARK}",)


def arm(root: Path, outside: Path) -> None:
    """Put into the checkpoint at `root` all that would run if anything were trusted."""
    config = json.loads((root / "config.json").read_text())
    code = {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Slow", "evil.Fast"],
    }
    config |= {
        "auto_map": code,
        "custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}},
        "attn_implementation": "kernels-community/flash-attn",  # code from the hub, where `kernels` is installed
        "_name_or_path": "evil/evil",
        "trust_remote_code": True,
    }
    (root / "config.json").write_text(json.dumps(config))
    settings = json.loads((root / "tokenizer_config.json").read_text())
    settings |= {
        "auto_map": code,
        "chat_template": TEMPLATE,
        "tokenizer_file": str(outside),
        "vocab_file": str(outside),
        "trust_remote_code": True,
    }
    (root / "tokenizer_config.json").write_text(json.dumps(settings))
    (root / "generation_config.json").write_text(
        json.dumps({"custom_generate": "evil/evil", "trust_remote_code": True})
    )
    for name in ("evil.py", "sitecustomize.py", "conftest.py", "setup.py", "custom_generate/generate.py", "torch.py"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(CODE)
    bomb = pickle.dumps(Bomb())
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "tokenizer.pkl",
        "vocab.pkl",
        "rng_state.pth",
    ):
        (root / name).write_bytes(bomb)
    np.save(root / "weights.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    (root / "chat_template.jinja").write_text(TEMPLATE)
    (root / "additional_chat_templates").mkdir()
    (root / "additional_chat_templates" / "tool.jinja").write_text(TEMPLATE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    tiny_checkpoint(root / "ckpt", "llama", seed=5)
    (root / "outside.json").write_text((root / "ckpt" / "tokenizer.json").read_text())
    arm(root / "ckpt", root / "outside.json")
    (root / "texts.jsonl").write_text(json.dumps({"id": "a", "text": random_text(1, 30)}) + "\n")
    (root / "policy.toml").write_text(POLICY)
    return root


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    """One scan; it must have ended with a verdict, or what follows would prove nothing."""
    found = watched("scan", folder / "ckpt", "--policy", folder / "policy.toml", "--json", folder=folder)
    assert found.status in (0, 1), found.output
    assert '"schema"' in found.output
    assert found.of("open")
    return found


def test_no_code_of_a_checkpoint_runs(seen: Seen, folder: Path) -> None:
    ours = str(folder)
    assert not [given for given in seen.of("compile", "exec", "import") if any(ours in text for text in given)]
    assert not list(folder.rglob(MARK))


def test_no_pickle_of_a_checkpoint_is_read(seen: Seen, folder: Path) -> None:
    assert not [given for given in seen.of("pickle.find_class") if "system" in given or "posix" in given]
    assert not list(folder.rglob(MARK))


def test_a_scan_of_a_directory_asks_nothing_of_the_network(seen: Seen) -> None:
    assert seen.of(*NETWORK) == []


def test_a_scan_starts_no_process_that_a_checkpoint_names(seen: Seen) -> None:
    # The report names the machine, which Python's platform module asks `uname` for.
    assert {given[0] for given in seen.of(*PROCESSES)} <= {"uname"}


def test_no_path_in_a_checkpoint_leads_to_a_file_outside_of_it(seen: Seen, folder: Path) -> None:
    assert not [given for given in seen.of("open") if given[0] == str(folder / "outside.json")]


def test_no_chat_template_is_rendered_or_even_compiled(seen: Seen) -> None:
    assert not [given for given in seen.of("compile", "exec") if "<template>" in given]


def test_the_kernel_that_a_config_asks_for_is_not_fetched(folder: Path, tmp_path: Path) -> None:
    """Which attention is computed is ours to say: the name of a kernel is a name of code on the hub."""
    for number, asked in enumerate(("kernels-community/flash-attn", "paged|evil/kernel:f", "flash_attention_2")):
        root = tiny_checkpoint(tmp_path / str(number), "llama", seed=5)
        config = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps(config | {"attn_implementation": asked}))
        assert opened(root).model.config._attn_implementation in ("sdpa", "eager")
