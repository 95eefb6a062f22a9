"""A model spread over places by accelerate is measured like one in a single place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memscrub.errors import UsageError
from memscrub.measures.continuation import continue_greedily, openings
from memscrub.measures.extraction import Sampling, score
from memscrub.models.model import load_model
from memscrub.models.spreading import spread
from memscrub.storage.checkpoint import open_checkpoint
from tests.models import opened, random_text, tiny_checkpoint, token_text

TEXT = random_text(3, 40)
PLACES = {
    "llama": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
              "model.norm": "disk", "lm_head": "disk"},
    "gpt_neox": {"gpt_neox.embed_in": "disk", "gpt_neox.emb_dropout": "cpu", "gpt_neox.rotary_emb": "cpu",
                 "gpt_neox.layers.0": "cpu", "gpt_neox.layers.1": "disk", "gpt_neox.final_layer_norm": "cpu",
                 "lm_head": "disk"},
}  # fmt: skip


@pytest.mark.parametrize("family", PLACES)
def test_weights_that_wait_on_disk_give_the_same_measures(family: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "checkpoint", family, seed=1, texts=[TEXT], steps=60)
    whole = opened(path)
    text = token_text(whole, TEXT)
    expected = score(whole, [text], lambda _: Sampling())
    starts = openings([text], whole.prompt, (0, 4), 8, 12)
    said = continue_greedily(whole, starts)
    apart = opened(path)
    apart = replace(apart, model=spread(apart.model, PLACES[family], offload=tmp_path / "offload"))
    waiting = [name for name, parameter in apart.model.named_parameters() if parameter.device.type == "meta"]
    assert waiting and len(waiting) < len(list(apart.model.named_parameters()))
    (found,) = score(apart, [text], lambda _: Sampling())
    torch.testing.assert_close(torch.as_tensor(found.gap), torch.as_tensor(expected[0].gap), atol=1e-5, rtol=1e-5)
    assert continue_greedily(apart, starts) == said
    assert apart.projects == whole.projects


def test_spread_by_name_is_for_measuring_only(tmp_path: Path) -> None:
    from memscrub.jobs.scrub import fix

    path = tiny_checkpoint(tmp_path / "checkpoint", "llama", seed=1)
    loaded = load_model(open_checkpoint(path), device="spread")
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded.logits(ids).cpu(), opened(path).logits(ids))
    (tmp_path / "policy.toml").write_text('schema = 1\nname = "p"\n[protected]\nfiles = ["p.txt"]\n[class.protected]\n')
    with pytest.raises(UsageError, match="one device"):
        fix(path, tmp_path / "policy.toml", tmp_path / "out", device="spread")
    assert not (tmp_path / "out").exists()
