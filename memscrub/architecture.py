"""The architecture table: for each model family, where its output vectors live; data only, knows no torch.

An *output vector* is what one MLP neuron (or one coordinate of an attention head) writes into the residual
stream when its activation is one. Families store these vectors as columns (`nn.Linear`, weight `[d, f]`) or as
rows (GPT-2's `Conv1D`, weight `[f, d]`). The orientation is written down here, never guessed from shapes: a
square matrix would be ambiguous.

Adding a family is one row here. `tests/test_families.py` builds a two-layer model of every row and checks that
each site is found and has the orientation the row says; `tests/test_edit.py` scrubs a model of chosen families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from memscrub.errors import ArchitectureError


class Orientation(Enum):
    """How a weight matrix stores its output vectors."""

    COLUMNS = "columns"  # weight [d, f]: nn.Linear
    ROWS = "rows"  # weight [f, d]: transformers' Conv1D


@dataclass(frozen=True)
class Family:
    """One row of the table: module paths below the model and below one decoder block."""

    model_type: str
    blocks: str  # the list of decoder blocks, e.g. "model.layers"
    mlp: str  # output projection of the MLP, below a block
    attention: str  # output projection of the attention, below a block
    orientation: Orientation = Orientation.COLUMNS


_LLAMA_STYLE = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "olmo",
    "olmo2",
    "olmo3",
    "smollm3",
    "gemma",
    "gemma2",
    "granite",
    "phi3",
    "stablelm",
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        *(Family(name, "model.layers", "mlp.down_proj", "self_attn.o_proj") for name in _LLAMA_STYLE),
        Family("phi", "model.layers", "mlp.fc2", "self_attn.dense"),
        Family("starcoder2", "model.layers", "mlp.c_proj", "self_attn.o_proj"),
        Family("opt", "model.decoder.layers", "fc2", "self_attn.out_proj"),
        Family("gpt_neox", "gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense"),
        Family("gptj", "transformer.h", "mlp.fc_out", "attn.out_proj"),
        Family("gpt_neo", "transformer.h", "mlp.c_proj", "attn.attention.out_proj"),
        Family("gpt2", "transformer.h", "mlp.c_proj", "attn.c_proj", Orientation.ROWS),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint's `config.json`; an ArchitectureError for one that is not in the table."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ArchitectureError("config.json has no model_type; memscrub cannot tell where the output vectors are.")
    if model_type not in FAMILIES:
        raise ArchitectureError(
            f"the family '{model_type}' is not in memscrub's architecture table; it knows"
            f" {', '.join(sorted(FAMILIES))}. memscrub/architecture.py says how to add one."
        )
    return FAMILIES[model_type]
