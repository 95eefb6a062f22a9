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
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from memscrub.errors import ArchitectureError


class Orientation(Enum):
    """How a weight matrix stores its output vectors."""

    COLUMNS = "columns"  # weight [d, f]: nn.Linear
    ROWS = "rows"  # weight [f, d]: transformers' Conv1D


class Gain(Enum):
    """What a norm multiplies the normalised residual stream with, coordinate by coordinate."""

    WEIGHT = "weight"
    ONE_PLUS_WEIGHT = "one plus weight"  # Gemma stores the distance from one
    NONE = "none"  # OLMo's LayerNorm has no parameters


@dataclass(frozen=True)
class Norm:
    """A norm's module path, its gain, and whether it subtracts the mean first (LayerNorm) or not (RMSNorm)."""

    path: str
    gain: Gain = Gain.WEIGHT
    centred: bool = False


class Layout(Enum):
    """Where the queries are in the output of the module that computes them."""

    ALONE = "alone"  # a module of their own
    FIRST = "first"  # queries, then keys, then values
    PER_HEAD = "per head"  # for each head its query, its key, its value


@dataclass(frozen=True)
class Family:
    """One row of the table: module paths below the model and below one decoder block.

    The last three say how what an MLP writes reaches the logits: the norm before the unembedding, an RMSNorm
    between the MLP's output projection and the residual stream (path below a block), and the entry of
    `config.json` that this write is multiplied with.
    """

    model_type: str
    blocks: str  # the list of decoder blocks, e.g. "model.layers"
    mlp: str  # output projection of the MLP, below a block
    attention: str  # output projection of the attention, below a block
    query: str  # the module that computes the attention's queries, below a block
    layout: Layout = Layout.ALONE
    orientation: Orientation = Orientation.COLUMNS
    norm: Norm | None = None
    after_mlp: Norm | None = None
    multiplier: str | None = None


# Llama in everything that this table knows; more of them with other norms stand below.
_LLAMA_STYLE = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3")
_RMS = Norm("model.norm")
_GEMMA = Norm("model.norm", Gain.ONE_PLUS_WEIGHT)
_LN_F = Norm("transformer.ln_f", centred=True)
_AFTER_MLP = "post_feedforward_layernorm"


def _llama_style(name: str, norm: Norm = _RMS, after_mlp: Norm | None = None, multiplier: str | None = None) -> Family:
    return Family(
        name,
        "model.layers",
        "mlp.down_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        norm=norm,
        after_mlp=after_mlp,
        multiplier=multiplier,
    )


_ROWS = (
    *(_llama_style(name) for name in _LLAMA_STYLE),
    replace(_llama_style("phi3"), query="self_attn.qkv_proj", layout=Layout.FIRST),
    _llama_style("olmo", Norm("model.norm", Gain.NONE, centred=True)),
    _llama_style("olmo2", after_mlp=Norm(_AFTER_MLP)),
    _llama_style("olmo3", after_mlp=Norm(_AFTER_MLP)),
    _llama_style("gemma", _GEMMA),
    _llama_style("gemma2", _GEMMA, after_mlp=Norm(_AFTER_MLP, Gain.ONE_PLUS_WEIGHT)),
    _llama_style("granite", multiplier="residual_multiplier"),
    _llama_style("stablelm", Norm("model.norm", centred=True)),
    Family(
        "phi",
        "model.layers",
        "mlp.fc2",
        "self_attn.dense",
        "self_attn.q_proj",
        norm=Norm("model.final_layernorm", centred=True),
    ),
    Family(
        "starcoder2",
        "model.layers",
        "mlp.c_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        norm=Norm("model.norm", centred=True),
    ),
    Family(
        "opt",
        "model.decoder.layers",
        "fc2",
        "self_attn.out_proj",
        "self_attn.q_proj",
        norm=Norm("model.decoder.final_layer_norm", centred=True),
    ),
    Family(
        "gpt_neox",
        "gpt_neox.layers",
        "mlp.dense_4h_to_h",
        "attention.dense",
        "attention.query_key_value",
        Layout.PER_HEAD,
        norm=Norm("gpt_neox.final_layer_norm", centred=True),
    ),
    Family("gptj", "transformer.h", "mlp.fc_out", "attn.out_proj", "attn.q_proj", norm=_LN_F),
    Family("gpt_neo", "transformer.h", "mlp.c_proj", "attn.attention.out_proj", "attn.attention.q_proj", norm=_LN_F),
    Family(
        "gpt2",
        "transformer.h",
        "mlp.c_proj",
        "attn.c_proj",
        "attn.c_attn",
        Layout.FIRST,
        Orientation.ROWS,
        norm=_LN_F,
    ),
)

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ROWS}


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
