"""Every row of the architecture table against a two-layer model of its family, built on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memscrub.architecture import FAMILIES, Orientation, family_of
from memscrub.errors import ArchitectureError, UsageError
from memscrub.model import LoadedModel, sites_of

HIDDEN = 64
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
EXTRA: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global"], 2]], "intermediate_size": 96},
    "ministral": {"head_dim": 16, "intermediate_size": 96},
    "gptj": {"rotary_dim": 8, "n_inner": 96},
    "gpt2": {"n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN},
}


def _loaded(name: str) -> LoadedModel:
    settings = {**SMALL, **EXTRA.get(name, {"intermediate_size": 96})}
    if name not in EXTRA and name not in {"gpt_neox", "phi"}:
        settings["num_key_value_heads"] = 2
    config = AutoConfig.for_model(name, **settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return LoadedModel(
        model=model,
        tokenizer=None,
        family=FAMILIES[name],
        prompt=(),
        device=torch.device("meta"),
        dtype=torch.float32,
        vocabulary=96,
        max_positions=64,
    )


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_block_has_both_sites_in_the_stated_orientation(name: str) -> None:
    loaded = _loaded(name)
    sites = sites_of(loaded)
    assert [(site.kind, site.layer) for site in sites] == [(k, n) for k in ("mlp", "attention") for n in (0, 1)]
    for site in sites:
        module = loaded.model.get_submodule(site.name)
        assert loaded.weight(site).shape[0] == HIDDEN
        assert (type(module).__name__ == "Conv1D") == (site.orientation is Orientation.ROWS)
        if site.kind == "mlp":
            assert loaded.weight(site).shape[1] == 96


def test_an_unknown_family_is_refused_with_the_known_ones_named() -> None:
    with pytest.raises(ArchitectureError, match="llama"):
        family_of({"model_type": "never-heard-of"})


def test_a_layer_the_model_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="layers 0 to 1"):
        sites_of(_loaded("llama"), layers=[2])
