"""Sizes of public models that recipes name, for plans and shrunk runs where the hub cannot be reached."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

log = logging.getLogger("ebbtide.known")

_LLAMA_31_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_QWEN3_BASE = {"max_position_embeddings": 32768, "eos_token_id": 151643}


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return _QWEN3 | sizes | {"num_attention_heads": heads} | others


_QWEN3_4B = _qwen3(2560, 9728, 36, 32, tie_word_embeddings=True)
_QWEN3_8B = _qwen3(4096, 12288, 36, 32)
_QWEN3_14B = _qwen3(5120, 17408, 40, 40)
_QWEN3_30B_A3B = _qwen3(
    2048,
    6144,
    48,
    32,
    model_type="qwen3_moe",
    num_key_value_heads=4,
    num_local_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    norm_topk_prob=True,
)
_GEMMA_2_9B = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _LLAMA_31_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_31_8B | {"eos_token_id": [128001, 128008, 128009]},
    "mistralai/Mistral-7B-v0.3": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B,
    "Qwen/Qwen3-4B": _QWEN3_4B,
    "Qwen/Qwen3-4B-Base": _QWEN3_4B | _QWEN3_BASE,
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-8B-Base": _QWEN3_8B | _QWEN3_BASE,
    "Qwen/Qwen3-14B": _QWEN3_14B,
    "Qwen/Qwen3-14B-Base": _QWEN3_14B | _QWEN3_BASE,
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B_A3B,
    "google/gemma-2-9b": _GEMMA_2_9B,
    "google/gemma-2-9b-it": _GEMMA_2_9B,
}


def shipped(name: str) -> Any:
    """The configuration of a public model by its hub name, as far as its sizes; None of any other."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**KNOWN[name]) if name in KNOWN else None


@cache
def say_shipped(name: str) -> None:
    """Once a process."""
    log.warning("%s: the hub does not give its configuration; the sizes that Ebbtide ships are used", name)
