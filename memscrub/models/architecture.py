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
    PER_HEAD = "per head"  # for each head, or group of heads, its queries, its key, its value


@dataclass(frozen=True)
class Variant:
    """A value of an entry of `config.json` for which a family differs from its row.

    Such a checkpoint has the queries of its fused projection in `layout`, or computes them in the module `query`;
    without either it is refused for `reason`.
    """

    entry: str
    value: bool | None
    default: bool | int  # what transformers takes where config.json lacks the entry
    layout: Layout | None = None
    reason: str = ""
    query: str | None = None

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether this `config.json` has that value."""
        value = config.get(self.entry, self.default)
        return (self.default if value is None and self.value is not None else value) == self.value


@dataclass(frozen=True)
class Experts:
    """Where the routed experts of a mixture-of-experts block are.

    `path` is the module, below a block, whose parameters `gate_up_proj` and `down_proj` hold the matrices of all
    experts; `down_proj` is `[experts, d, f]` in orientation COLUMNS and `[experts, f, d]` in ROWS. `shared` is the
    output projection of what every token passes through besides. `stored` are the ends of the names that
    `down_proj` has on disk, below a block: one tensor for each `{expert}`, or one for all.
    """

    path: str
    stored: tuple[str, ...]
    shared: str | None = None
    orientation: Orientation = Orientation.COLUMNS
    shared_gate: str | None = None  # what the shared write is multiplied with is the sigmoid of this module's output
    weighs_inputs: bool = False  # the router's weight multiplies what enters an expert, not what leaves it


@dataclass(frozen=True)
class Family:
    """One row of the table: module paths below the model and below one decoder block.

    `norm`, `after_mlp` and `multiplier` say how what an MLP writes reaches the logits: the norm before the
    unembedding, an RMSNorm between the MLP's output projection and the residual stream (path below a block), and
    the entry of `config.json` that this write is multiplied with. Of the `variants` the first that fits counts.
    A family with `experts` has in each block either those or the dense `mlp`.
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
    variants: tuple[Variant, ...] = ()
    experts: Experts | None = None


# Llama in everything that this table knows; more of them with other norms stand below.
_LLAMA_STYLE = (
    *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "smollm3", "arcee", "apertus", "cwm"),
    *("ernie4_5", "glm", "helium", "hunyuan_v1_dense", "seed_oss"),
)
_RMS = Norm("model.norm")
_LAYER_NORM = Norm("model.norm", centred=True)
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


# One tensor for each expert on disk (transformers fuses them), or fused as in memory.
_EACH_DOWN = ("mlp.experts.{expert}.down_proj.weight", "mlp.experts.down_proj")
_EACH_W2 = ("block_sparse_moe.experts.{expert}.w2.weight", "mlp.experts.down_proj")


def _mixture(
    name: str, stored: tuple[str, ...] = _EACH_DOWN, shared: str | None = None, gate: str | None = None
) -> Family:
    return replace(_llama_style(name), experts=Experts("mlp.experts", stored, shared, shared_gate=gate))


_MIXTURES = (
    _mixture("mixtral", _EACH_W2),
    *(_mixture(name) for name in ("qwen3_moe", "olmoe")),
    replace(_mixture("flex_olmo"), after_mlp=Norm(_AFTER_MLP)),
    _mixture("qwen2_moe", shared="mlp.shared_expert.down_proj", gate="mlp.shared_expert_gate"),
    _mixture("hunyuan_v1_moe", shared="mlp.shared_mlp.down_proj"),
    *(
        _mixture(name, shared="mlp.shared_experts.down_proj")
        for name in ("dots1", "glm4_moe", "exaone_moe", "ernie4_5_moe")
    ),
    *(
        replace(
            _mixture(name, shared="mlp.shared_experts.down_proj"),
            query="self_attn.q_b_proj",
            variants=(Variant("q_lora_rank", None, 1536, query="self_attn.q_proj"),),
        )
        for name in ("deepseek_v2", "deepseek_v3")
    ),
    replace(_mixture("phimoe", _EACH_W2), norm=_LAYER_NORM),
    replace(
        _llama_style("granitemoe", multiplier="residual_multiplier"),
        experts=Experts("block_sparse_moe.experts", ("block_sparse_moe.output_linear.weight",)),
    ),
    replace(
        _llama_style("gpt_oss"),
        experts=Experts("mlp.experts", ("mlp.experts.down_proj",), orientation=Orientation.ROWS),
    ),
    replace(
        _llama_style("llama4_text"),
        mlp="feed_forward.down_proj",
        experts=Experts(
            "feed_forward.experts",
            ("feed_forward.experts.down_proj",),
            "feed_forward.shared_expert.down_proj",
            Orientation.ROWS,
            weighs_inputs=True,
        ),
    ),
)

_ROWS = (
    *_MIXTURES,
    *(_llama_style(name) for name in _LLAMA_STYLE),
    replace(_llama_style("phi3"), query="self_attn.qkv_proj", layout=Layout.FIRST),
    _llama_style("olmo", Norm("model.norm", Gain.NONE, centred=True)),
    _llama_style("olmo2", after_mlp=Norm(_AFTER_MLP)),
    _llama_style("olmo3", after_mlp=Norm(_AFTER_MLP)),
    _llama_style("gemma", _GEMMA),
    *(
        _llama_style(name, _GEMMA, after_mlp=Norm(_AFTER_MLP, Gain.ONE_PLUS_WEIGHT))
        for name in ("gemma2", "gemma3_text")
    ),
    _llama_style("exaone4", after_mlp=Norm(_AFTER_MLP)),
    _llama_style("glm4", after_mlp=Norm("post_mlp_layernorm")),
    _llama_style("granite", multiplier="residual_multiplier"),
    *(_llama_style(name, _LAYER_NORM) for name in ("stablelm", "cohere", "cohere2", "jais2")),
    _llama_style("nemotron", replace(_GEMMA, centred=True)),
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
        norm=_LAYER_NORM,
    ),
    Family(
        "persimmon",
        "model.layers",
        "mlp.dense_4h_to_h",
        "self_attn.dense",
        "self_attn.query_key_value",
        Layout.PER_HEAD,
        norm=Norm("model.final_layernorm", centred=True),
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
    Family(
        "bloom",
        "transformer.h",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
        "self_attention.query_key_value",
        Layout.PER_HEAD,
        norm=_LN_F,
        variants=(
            Variant("slow_but_exact", True, False, reason="the output projections are then computed in slices"),
            Variant(
                "apply_residual_connection_post_layernorm",
                True,
                False,
                reason="the residual stream then passes through a norm in every block",
            ),
        ),
    ),
    Family(
        "falcon",
        "transformer.h",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
        "self_attention.query_key_value",
        Layout.FIRST,
        norm=_LN_F,
        variants=(
            Variant("new_decoder_architecture", True, False, Layout.PER_HEAD),
            Variant("multi_query", False, True, Layout.PER_HEAD),
        ),
    ),
    Family(
        "gpt_bigcode",
        "transformer.h",
        "mlp.c_proj",
        "attn.c_proj",
        "attn.c_attn",
        Layout.FIRST,
        norm=_LN_F,
        variants=(Variant("multi_query", False, True, Layout.PER_HEAD),),
    ),
    Family(
        "mpt",
        "transformer.blocks",
        "ffn.down_proj",
        "attn.out_proj",
        "attn.Wqkv",
        Layout.FIRST,
        norm=Norm("transformer.norm_f", centred=True),
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
    """The family of a checkpoint's `config.json`, in the variant that it asks for.

    Raises ArchitectureError for a family that is not in the table and for a variant that memscrub refuses.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ArchitectureError("config.json has no model_type; memscrub cannot tell where the output vectors are.")
    if model_type not in FAMILIES:
        raise ArchitectureError(
            f"the family '{model_type}' is not in memscrub's architecture table; it knows"
            f" {', '.join(sorted(FAMILIES))}. memscrub/models/architecture.py says how to add one."
        )
    family = FAMILIES[model_type]
    for variant in family.variants:
        if variant.fits(config):
            if variant.layout is None and variant.query is None:
                setting = f"'{variant.entry}' {str(variant.value).lower()} in config.json"
                raise ArchitectureError(f"memscrub cannot edit '{model_type}' with {setting}: {variant.reason}.")
            return replace(family, layout=variant.layout or family.layout, query=variant.query or family.query)
    return family
