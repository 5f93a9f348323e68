"""Small random models of many families: their configurations, and how exactly they can be compared."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 67
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0,
    "embd_pdrop": 0,
    "resid_pdrop": 0,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FALCON_H1 = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "lm_head_multiplier": 0.5,
}

EXACT, OWN_CASTS = 1e-12, 1e-6
FAMILIES: dict[str, tuple[dict[str, Any], float]] = {
    "llama": ({}, EXACT),
    "qwen2": ({}, EXACT),
    "qwen3": ({"head_dim": 8}, EXACT),
    "mistral": ({"sliding_window": 6}, EXACT),
    "phi": ({"attention_dropout": 0.0, "resid_pdrop": 0.0}, EXACT),
    "phi3": ({"resid_pdrop": 0.0}, EXACT),
    "olmo2": ({}, EXACT),
    "granite": ({"logits_scaling": 3.0}, EXACT),
    "starcoder2": ({}, EXACT),
    "gpt2": (GPT2, EXACT),
    "gpt_neox": ({"hidden_dropout": 0.0, "attention_dropout": 0.0}, EXACT),
    "mixtral": (MOE, EXACT),
    "qwen3_moe": ({**MOE, "head_dim": 8}, EXACT),
    "gpt_oss": ({**MOE, "head_dim": 8}, EXACT),
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 2.0}, OWN_CASTS),
    "gemma3_text": ({"head_dim": 8, "final_logit_softcapping": 2.0}, OWN_CASTS),
    "cohere": ({"logit_scale": 0.25}, OWN_CASTS),
    "deepseek_v3": (DEEPSEEK, OWN_CASTS),
    "mamba": ({"state_size": 8, "time_step_rank": 4}, OWN_CASTS),
    "falcon_h1": (FALCON_H1, OWN_CASTS),
}


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(11)
    # The grouped product of the experts has no float64.
    experts = {"experts_implementation": "eager"} if "num_experts_per_tok" in FAMILIES[family][0] else {}
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family][0], **changes})
    return AutoModelForCausalLM.from_config(config, **experts).double().train()
