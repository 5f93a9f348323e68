"""The truth for what chunks do on purpose: plain Transformers run chunk by chunk, and all of it kept as one graph.

Dropout draws in the order of the chunks, and an estimator scales what flows between them, so neither can be compared
with a run of the whole sequence. Attention is written out here, over the keys of an ordinary `DynamicCache`.

Shapes: B rows, H heads, T positions, [start, stop) a chunk of C, K keys so far.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from distrib.contracts import IGNORE, Batch
from distrib.units import blocks

NAME = "one_graph"
Bounds = list[tuple[int, int]]
Losses = Callable[[nn.Module, Batch, Bounds], list[Tensor]]
"""The summed cross-entropy of each chunk."""

_factor_K: list[Tensor] = []
"""What the gradients of all keys and values so far are multiplied by, in the chunk that runs."""


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    if _factor_K:
        # Of views, since later chunks reach the earlier keys through these very tensors.
        key, value = key.view_as(key), value.view_as(value)
        for states in (key, value):
            states.register_hook(lambda by, factor_K=_factor_K[-1]: by * factor_K[:, None])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # Padding sees nothing, and nothing comes of it: any finite score will do there.
    score_BHCK = (query @ key.mT * scaling).masked_fill(~mask, -1e30)
    weight_BHCK = F.dropout(score_BHCK.softmax(-1), dropout, module.training)
    return (weight_BHCK @ value).transpose(1, 2).contiguous(), None


def visible(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, attention_mask: Any = None, **_: Any
) -> Tensor:
    """[B, 1, C, K]: the triangle, without padding."""
    triangle = torch.ones(kv_length, kv_length, dtype=torch.bool).tril()[q_offset : q_offset + q_length]
    mask = triangle.expand(batch_size, 1, -1, -1)
    return mask if attention_mask is None else mask & attention_mask[:, None, None, :kv_length].bool()


@contextmanager
def _attending(model: nn.Module) -> Iterator[None]:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, visible)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _cross_entropies(logits_BTV: Tensor, batch: Batch, bounds: Bounds, start: int = 0) -> list[Tensor]:
    """Of the chunks that these logits, which begin at `start`, reach."""
    labels_BT = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    end = start + logits_BTV.shape[1]
    return [
        F.cross_entropy(
            logits_BTV[:, a - start : b - start].flatten(0, 1), labels_BT[:, a:b].flatten(), reduction="sum"
        )
        for a, b in bounds
        if start <= a < end
    ]


def model_by_chunks(
    model: nn.Module, batch: Batch, bounds: Bounds, factors: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Each chunk goes through the whole model before the next one. `factors` [K] of each chunk, if any, scale what
    its backward gives to keys and values."""
    cache, losses = DynamicCache(), []
    with _attending(model):
        for index, (start, stop) in enumerate(bounds):
            _factor_K[:] = [] if factors is None else [factors[index]]
            padding = {"attention_mask": batch["attention_mask"][:, :stop]} if "attention_mask" in batch else {}
            ids_BC = batch["input_ids"][:, start:stop]
            logits_BCV = model(input_ids=ids_BC, past_key_values=cache, use_cache=True, **padding).logits
            losses += _cross_entropies(logits_BCV, batch, bounds, start)
    _factor_K.clear()
    return losses


def layers_by_chunks(model: nn.Module, batch: Batch, bounds: Bounds) -> list[Tensor]:
    """Each layer takes all chunks before the next one does; what is around the layers sees the whole sequence."""
    cache = DynamicCache()
    layers = [layer for _, layer in blocks(model)]
    for layer in layers:
        vars(layer)["forward"] = _by_chunks(layer, bounds, cache)
    padding = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
    try:
        with _attending(model):
            logits_BTV = model(input_ids=batch["input_ids"], use_cache=False, **padding).logits
    finally:
        for layer in layers:
            vars(layer).pop("forward")
    return _cross_entropies(logits_BTV, batch, bounds)


def _by_chunks(layer: nn.Module, bounds: Bounds, cache: DynamicCache) -> Callable[..., Tensor]:
    own = type(layer).forward
    signature = inspect.signature(own)
    cache_name = next(name for name in ("past_key_values", "layer_past") if name in signature.parameters)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(signature.bind(layer, *args, **kwargs).arguments)
        del given["self"]
        given |= given.pop("kwargs", {})
        parts = []
        for start, stop in bounds:
            cut = {name: _cut(name, value, start, stop) for name, value in given.items()}
            parts.append(own(layer, **{**cut, cache_name: cache}))
        return torch.cat(parts, 1)

    return forward


def _cut(name: str, value: Any, start: int, stop: int) -> Any:
    if name == "attention_mask":
        return value[:, :, start:stop, :stop]
    if name in ("hidden_states", "position_ids"):
        return value[:, start:stop]
    if name == "position_embeddings":
        return tuple(table_BTD[:, start:stop] for table_BTD in value)
    assert not isinstance(value, Tensor), name
    return value
