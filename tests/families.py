"""A small configuration for every row of the architecture table."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

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
    "ministral": {"head_dim": 16, "intermediate_size": 96, "num_key_value_heads": 2},
    "gptj": {"rotary_dim": 8, "n_inner": 96},
    "gpt2": {"n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": HIDDEN},
    **{
        name: {"head_dim": 16, "intermediate_size": 96, "num_key_value_heads": 2}
        for name in ("gemma3_text", "glm", "glm4", "helium", "hunyuan_v1_dense", "ministral3", "seed_oss")
    },
    # With their own norm, of small random gains, the queries would hardly matter.
    "persimmon": {"intermediate_size": 96, "qk_layernorm": False},
    "bloom": {},
    "falcon": {"ffn_hidden_size": 96},
    "gpt_bigcode": {"n_inner": 96},
    **{
        name: {
            "head_dim": 16,
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
        for name in ("gpt_oss", "llama4_text")
    },
    "mixtral": {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4},
    **{
        name: {
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 96,
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
        for name in ("qwen3_moe", "olmoe", "flex_olmo")
    },
    "qwen2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 96,
        "shared_expert_intermediate_size": 96,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    **{
        name: {
            "head_dim": 16,
            "intermediate_size": 96,
            "moe_intermediate_size": 96,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
        }
        for name in ("dots1", "glm4_moe")
    },
    "exaone_moe": {
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 96,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 96,
        "num_key_value_heads": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_k": 2,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": {
        "head_dim": 16,
        "intermediate_size": 96,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_topk": 2,
    },
    "phimoe": {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4},
    "granitemoe": {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"max_seq_len": 64},
    **{
        name: {
            "intermediate_size": 96,
            "moe_intermediate_size": 96,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        }
        for name in ("deepseek_v2", "deepseek_v3")
    },
}
# The same families with settings of config.json for which the table has another layout.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon with keys and values per head": ("falcon", {"multi_query": False, "alibi": True, "parallel_attn": False}),
    "falcon with groups of heads": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "deepseek_v3 without low-rank queries": ("deepseek_v3", {"q_lora_rank": None}),
    "gpt_bigcode with keys and values per head": ("gpt_bigcode", {"multi_query": False}),
}


def config_of(case: str, **settings: Any) -> Any:
    """The configuration of a two-layer model of a family, or of one of `VARIANTS`."""
    name, variant = VARIANTS.get(case, (case, {}))
    chosen = {**SMALL, **EXTRA.get(name, {"intermediate_size": 96}), **variant}
    if name not in EXTRA and name not in {"gpt_neox", "phi"}:
        chosen["num_key_value_heads"] = 2
    return AutoConfig.for_model(name, **{**chosen, **settings})
