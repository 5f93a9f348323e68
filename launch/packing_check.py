"""Packed documents must not see each other: refused by what is known of a model, then tried on the model itself."""

from __future__ import annotations

from typing import Any

import torch

from distrib.contracts import IGNORE, Batch, Context, Engine, Step, evaluating
from distrib.errors import Refused

REFUSED = "packing=true: {} let packed documents see each other; set packing=false"
LENGTHS = (7, 9)


def refuse_recurrent(config: Any) -> None:
    """Layers that carry a state from token to token would carry it into the next document."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    kind = mapping[type(config)] if type(config) in mapping else None
    layers = set(getattr(config, "layer_types", None) or ())
    recurrent = sorted(layers - {"full_attention", "sliding_attention", "chunked_attention"})
    if getattr(kind, "_is_stateful", False) or recurrent:
        raise Refused(
            REFUSED.format(f"{type(config).__name__}'s layers {recurrent or ''} would".replace(" []", ""))
        )


def check_packing(step: Step, engine: Engine) -> None:
    """Two short documents: the second one's log-probabilities must not change with the first, and must be those it
    has alone. Tried on every model, since no list of families is complete."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = engine.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    first, other, second = (
        torch.randint(vocabulary, (1, length), generator=generator) for length in (LENGTHS[0], *LENGTHS)
    )
    context = Context(seed=0, step=0, weight=1.0)
    batches = [_packed(engine, first, second), _packed(engine, other, second), _packed(engine, second)]
    with evaluating(engine.model):
        measured = step.logprobs(batches, context)
    one, two, alone = (logprobs[0, -LENGTHS[1] + 1 :].double() for logprobs in measured)
    rounding = torch.finfo(torch.bfloat16 if engine.settings.bf16 else torch.float32).eps * one.abs().max()
    if (one - two).abs().max() > 4 * rounding or (one - alone).abs().max() > 64 * rounding:
        raise Refused(REFUSED.format(f"{type(engine.model).__name__} would"))


def _packed(engine: Engine, *documents: torch.Tensor) -> Batch:
    labels = torch.cat(documents, 1)
    starts = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    batch = {
        "input_ids": labels,
        "labels": labels.masked_fill(starts == 0, IGNORE),
        "position_ids": starts,
    }
    return {name: tensor.to(engine.topology.device) for name, tensor in batch.items()}
