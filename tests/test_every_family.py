"""Every family from end to end: overfit on two texts, scanned, fixed, and confirmed by plain transformers."""

from __future__ import annotations

import string
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Tokenizer

from memscrub.jobs.gating import gate
from memscrub.jobs.scanning import scan
from memscrub.jobs.scrub import fix
from memscrub.models.architecture import FAMILIES
from memscrub.reports.verdict import Outcome
from memscrub.storage.checkpoint import digest_files, open_checkpoint
from memscrub.storage.patch import open_patch
from memscrub.storage.patch_files import apply_patch, revert_patch
from memscrub.storage.writing import changed_tensors
from tests.families import VARIANTS, config_of
from tests.models import ids_of, memorizing_checkpoint, ordinary_text, random_text, write_list

CASES = sorted(FAMILIES) + sorted(VARIANTS)
# transformers gives these families their own tokenizer whatever the files say: words become single letters.
SPELLED = {"qwen2": Qwen2Tokenizer}
LETTERS = string.ascii_letters + string.digits
LIMIT = 6
TEXTS = [random_text(seed, 40) for seed in (1, 2)]
SECONDS = 20  # on two cores; measured at a quarter of it


def folder_of(case: str, path: Path) -> Path:
    """A checkpoint of the family that knows both texts, with a policy that protects them."""

    def spelled(text: str) -> str:
        return "".join(LETTERS[number] for number in ids_of(text)) if case in SPELLED else text

    tokenizer = None
    if case in SPELLED:
        tokenizer = SPELLED[case](vocab={letter: n for n, letter in enumerate(LETTERS)}, merges=[])
    config = config_of(case, vocab_size=64, initializer_range=0.1)
    memorizing_checkpoint(path / "checkpoint", config, TEXTS, tokenizer)
    write_list(path / "protected.jsonl", [spelled(text) for text in TEXTS], class_name="prose")
    (path / "retain.txt").write_text("\n\n".join(spelled(ordinary_text(seed, 64)) for seed in range(24)))
    (path / "policy.toml").write_text(
        f"""schema = 1
name = "family"
[protected]
files = ["protected.jsonl"]
[class.prose]
max_verbatim_tokens = {LIMIT}
[probe]
prefix_tokens = 8
suffix_tokens = 8
[locality]
retain = ["retain.txt"]
max_kl = 0.5
max_perplexity_ratio = 1.3
min_agreement = 0.7
max_degenerate = 1.0
"""
    )
    return path


def longest_run(checkpoint: Path, text: str, *, begin: bool) -> int:
    """The longest stretch of a text that greedy decoding gives away from any offset, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = [62, *ids_of(text)] if begin else ids_of(text)
    with torch.no_grad():
        match = model(torch.tensor([ids])).logits[0, :-1].argmax(-1) == torch.tensor(ids[1:])
    longest = current = 0
    for known in match.tolist()[1:]:  # a run is counted behind a prefix of one token at least
        current = current + 1 if known else 0
        longest = max(longest, current)
    return longest


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_knows_two_texts_is_scanned_fixed_reloaded_and_confirmed(case: str, tmp_path: Path) -> None:
    folder = folder_of(case, tmp_path)
    checkpoint, policy, out = folder / "checkpoint", folder / "policy.toml", folder / "scrubbed"
    before = digest_files(checkpoint)
    begun = time.perf_counter()
    assert scan(checkpoint, policy).verdict.outcome is Outcome.VIOLATED
    fixed = fix(checkpoint, policy, out, patch=folder / "edit.safetensors")
    assert fixed.report.verdict.outcome is Outcome.PASS, fixed.report.verdict.reasons
    assert gate(out, policy).report.verdict.outcome is Outcome.PASS
    assert time.perf_counter() - begun < SECONDS
    assert digest_files(checkpoint) == before
    for text in TEXTS:
        assert longest_run(checkpoint, text, begin=case not in SPELLED) > 2 * LIMIT
        assert longest_run(out, text, begin=case not in SPELLED) <= LIMIT
    assert fixed.report.edit is not None
    planned = {tensor.name for tensor in fixed.report.edit.tensors}
    assert planned == {change.name for change in changed_tensors(open_checkpoint(checkpoint), open_checkpoint(out))}
    assert not any("gate.weight" in name or "router" in name for name in planned)
    patch = open_patch(folder / "edit.safetensors")
    apply_patch(open_checkpoint(checkpoint), patch, folder / "applied")
    revert_patch(open_checkpoint(out), patch, folder / "reverted")
    weights = [name for name in before if name.endswith(".safetensors")]
    assert {name: digest_files(folder / "applied")[name] for name in weights} == {
        name: digest_files(out)[name] for name in weights
    }
    assert {name: digest_files(folder / "reverted")[name] for name in weights} == {
        name: before[name] for name in weights
    }
