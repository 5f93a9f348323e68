"""A tiny random model of every causal language model type that the installed Transformers knows.

One rule shrinks them all: an attribute of the default configuration that is named in `TINY` gets the value there, a
list with one kind a layer is cut to one layer of each kind, dropout goes. `EXCEPTIONS` has what the rule cannot know.
Limit: a type that only comes with a later Transformers may need a line there; until then `build` raises for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import strategies
from distrib.errors import Refused
from distrib.topology import Topology

TYPES: list[str] = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, HIDDEN, HEADS, HEAD, INNER, EXPERT, LAYERS, WINDOW = 67, 32, 4, 8, 48, 24, 2, 6
# Outside the ids that a test draws below it: some types tell positions by what is not padding.
PADDING = VOCABULARY - 1


def _same(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


TINY: dict[str, Any] = {
    **_same(VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    **_same(None, "pad_token_id bos_token_id eos_token_id eod_token_id sep_token_id cls_token_id"),
    **_same(128, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    **_same(0.2, "initializer_range init_std embed_init_std embedding_initializer_range w_init_variance_scale"),
    **_same(HIDDEN, "hidden_size n_embd d_model emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width"),
    **_same(HIDDEN, "input_embedding_size output_embedding_size"),
    **_same(16, "router_hidden_size hidden_size_per_layer_input laurel_rank gated_norm_rank adapter_rank hc_lowrank"),
    **_same(16, "q_lora_rank kv_lora_rank o_lora_rank ple_embed_dim rel_extent"),
    **_same(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    **_same(HEADS, "swa_num_attention_heads"),
    **_same(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    **_same(HEAD, "head_dim dim_head d_head attention_head_size kv_channels swa_head_dim d_rel"),
    **_same(HEAD, "qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    **_same(4, "rotary_dim o_groups"),
    **_same(INNER, "intermediate_size ffn_dim ffn_hidden_size dim_ff dff d_inner feed_forward_size decoder_ffn_dim"),
    **_same(INNER, "intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size"),
    **_same(EXPERT, "moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size"),
    **_same(EXPERT, "shared_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_same(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_same(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k zero_expert_num"),
    **_same(2, "n_group num_expert_group hc_mult hc_count"),
    **_same(1, "topk_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    **_same(0.0, "router_jitter_noise input_jitter_noise"),
    **_same(WINDOW, "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size"),
    **_same(2 * WINDOW, "local_attention"),
    **_same(True, "use_sliding_window is_decoder"),
    **_same(4, "index_topk index_n_heads"),
    **_same(16, "index_head_dim"),
    **_same(2, "index_block_size index_topk_blocks"),
    **_same(2, "linear_num_key_heads"),
    **_same(4, "linear_num_value_heads linear_num_heads"),
    **_same(HEAD, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **_same(8, "state_size ssm_state_size mamba_d_state"),
    **_same(4, "mamba_n_heads mamba_num_heads n_mamba_heads time_step_rank mamba_dt_rank"),
    **_same(16, "mamba_d_head mamba_head_dim"),
    **_same(64, "mamba_d_ssm"),
    **_same(2, "n_groups mamba_n_groups mamba_ngroups"),
    **_same(4, "chunk_size mamba_chunk_size block_size"),
    # The first layer is dense, or without attention; the second is the other kind.
    **_same(1, "first_k_dense_replace num_dense_layers moe_layer_start_index expert_layer_offset attn_layer_offset"),
    **_same(2, "expert_layer_period attn_layer_period layer_group_size global_attn_every_n_layers"),
    **_same(2, "sliding_window_pattern no_rope_layer_interval interleave_moe_layer_step"),
    **_same([0], "mlp_only_layers"),
    **_same([1], "attn_layer_indices full_attn_idxs"),
    **_same(-1, "moe_layer_end_index"),
}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")

PADDED = {"pad_token_id": PADDING}
HYBRID = ["linear_attention", "hybrid"] * 2
WINDOWED = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Layers 2 and 3 read the keys and values of layers 0 and 1.
SHARED = {"num_hidden_layers": 4, "layer_types": WINDOWED * 2, "num_kv_shared_layers": 2}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "camembert": PADDED,
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": ROPE, "full_attention": ROPE}},
    "cwm": {"bos_token_id": PADDING},
    "data2vec-text": PADDED,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": EXPERT, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": HIDDEN},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots3_note_text": {
        **_same(HEADS, "swa_num_attention_heads swa_num_key_value_heads"),
        **_same(16, "swa_q_lora_rank swa_kv_lora_rank swa_head_dim"),
        **_same(HEAD, "swa_qk_nope_head_dim swa_v_head_dim"),
    },
    "gemma3n_text": {**SHARED, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]},
    "gemma4_text": {**SHARED, "global_head_dim": 16, "enable_moe_block": True, "top_k_experts": 2},
    "gemma4_unified_text": {**SHARED, "global_head_dim": 16},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "minicpm3": {"dim_model_base": HIDDEN},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "modernbert-decoder": _same(PADDING, "pad_token_id bos_token_id eos_token_id cls_token_id sep_token_id"),
    "qwen4_exp_text": {
        **PADDED,
        "eos_token_id": PADDING,
        "layer_types": ["linear_attention", "indexed_attention"],
        **_same(4, "indexer_n_heads indexer_budget"),
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        **_same(8, "make_ngram_vocab_size_divisible_by split_ngram_parts"),
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"attn_layers": ["local", "lsh"], "axial_pos_embds": False, "hash_seed": 0},
    "roberta": PADDED,
    "roberta-prelayernorm": PADDED,
    "roc_bert": {
        **_same(VOCABULARY, "pronunciation_vocab_size shape_vocab_size"),
        **_same(16, "pronunciation_embed_dim shape_embed_dim"),
    },
    "xlm": {**PADDED, "causal": True},
    "xlm-roberta": PADDED,
    "xlm-roberta-xl": PADDED,
    "xmod": {**PADDED, "default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID, "num_hidden_layers": 4, "num_key_value_heads": HEADS},
    "zamba2": {"layers_block_type": HYBRID, "num_hidden_layers": 4, "num_key_value_heads": HEADS},
    "zaya": {"num_experts_per_tok": 1},
}
# Their own arithmetic fails in float64: all of the model, or the parts of these names, stay in float32.
FLOAT32 = {"xglm": "", "inkling2_text": ".gate"}

NOT_TEXT: dict[str, str] = {
    "blt": "makes its own patches of bytes with a second model",
    "emu3": "has a vq_config",
    "fuyu": "takes patches of images",
    "gemma4": "is a wrapper of text, images and sound",
    "gemma4_unified": "is a wrapper of text, images and sound",
    "gemma4_assistant": "drafts from another model's keys and values",
    "gemma4_unified_assistant": "drafts from another model's keys and values",
}


def build(model_type: str, **changes: Any) -> nn.Module:
    """In float64, training, seeded. Raises Refused, as the product does, for what is not a decoder of text."""
    if model_type in NOT_TEXT:
        raise Refused(f"model type {model_type!r} {NOT_TEXT[model_type]}: only decoder-only text models train")
    config = configure(model_type, **changes)
    strategies.check([strategies.get("plain")()], config, Topology())
    set_seed(11)
    # The grouped product of the experts has no float64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().train()
    for name, module in model.named_modules():
        if name.endswith(FLOAT32.get(model_type, " ")):
            module.float()
    _stir(model)
    return model


def configure(model_type: str, **changes: Any) -> Any:
    default = AutoConfig.for_model(model_type)
    return AutoConfig.for_model(model_type, **{**shrink(default), **EXCEPTIONS.get(model_type, {}), **changes})


def shrink(default: Any) -> dict[str, Any]:
    """The arguments that make a tiny configuration of this default one."""
    named = default.to_dict()
    tiny = {name: value for name, value in TINY.items() if name in named}
    tiny |= {name: 0.0 for name, value in named.items() if "drop" in name and isinstance(value, float)}
    if "kv_lora_rank" in named and "num_key_value_heads" in named:
        tiny["num_key_value_heads"] = HEADS
    kinds = {name: _kinds(named[name], "sliding_window" in named) for name in KINDS if named.get(name)}
    layers = max([LAYERS, *map(len, kinds.values())])
    tiny |= {name: layers for name in DEPTHS if name in named}
    return tiny | {name: (found * layers)[:layers] for name, found in kinds.items()}


def _kinds(per_layer: list[str], windows: bool) -> list[str]:
    """Each kind of layer once, in the order of the default; a family that can have windows has one."""
    found = list(dict.fromkeys(per_layer))
    return ["sliding_attention", *found] if windows and found == ["full_attention"] else found


def _stir(model: nn.Module) -> None:
    """Noise on parameters that start as a constant: a zero gate would hide a wrong gradient behind it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.1 * torch.randn_like(parameter)
