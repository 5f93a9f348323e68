"""Floating-point operations that training needs, whatever a strategy computes twice; attention counts per document.

A product with a weight costs two operations a token and element forward, as much again for its input's gradient and,
when it is trained, for its own. A causal attention of n tokens costs four operations for each pair it looks at and
each element of a head, and twice that backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from strategies.lowbit.frozen import numbers

# Dense products in bfloat16 with sums in float32, from the makers' data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device_name: str) -> float | None:
    """Of one device in bfloat16; None for one that is not listed."""
    return next((value for key, value in PEAK_FLOPS.items() if key in device_name), None)


def training_flops(model: nn.Module, config: Any, lengths: Sequence[int]) -> float | None:
    """Of forward and backward of documents of these lengths; None for a model with layers that it cannot count."""
    by_token, windows = token_flops(model, config), attention_windows(config)
    if by_token is None or windows is None:
        return None
    pairs = sum(_pairs(length, window) for length in lengths for window in windows)
    return sum(lengths) * by_token + 12.0 * _head_width(config) * pairs


def token_flops(model: nn.Module, config: Any) -> float | None:
    """Of all products with weights. Of a layer's experts, those that a token meets."""
    sizes = {id(parameter): size for parameter, size in numbers(model)}
    seen: set[int] = set()
    total = 0.0
    for module in model.modules():
        for leaf, weight in module._parameters.items():
            if weight is None or weight.ndim < 2 or isinstance(module, nn.Embedding) or leaf == "bias":
                continue
            if id(weight) in seen or weight.ndim > 3:
                continue
            seen.add(id(weight))
            share = _expert_share(config) if weight.ndim == 3 else 1.0
            if share is None:
                return None
            total += (6 if weight.requires_grad else 4) * sizes[id(weight)] * share
    return total


def _expert_share(config: Any) -> float | None:
    met = getattr(config, "num_experts_per_tok", None)
    counts = [getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")]
    experts = next(filter(None, counts), None)
    return met / experts if met and experts else None


def attention_windows(config: Any) -> list[int | None] | None:
    """How far back each layer looks, None for all the way; None in the place of the list for other kinds of layers."""
    near = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    usual = "sliding_attention" if near else "full_attention"
    kinds = getattr(config, "layer_types", None) or [usual] * config.num_hidden_layers
    fields = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    if not set(kinds) <= {"full_attention", *fields}:
        return None
    return [getattr(config, fields[kind], None) if kind in fields else None for kind in kinds]


def _head_width(config: Any) -> int:
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _pairs(length: int, window: int | None) -> float:
    near = length if window is None else min(length, window)
    return near * near / 2 + (length - near) * near
